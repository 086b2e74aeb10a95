"""A GPU played by the CPU: tensors that say ``device="cuda"`` and keep their values on the CPU.

Fake tensors have no values, so nothing that looks at values runs on them. These have: every operation runs on the CPU,
but keeps to what CUDA allows. Operands on two devices, an operation of the device with a generator of the CPU, and
an access to the memory of a device tensor fail as they would on a GPU. What a GPU allows and pays for is counted:
reads (a value or a data-dependent shape that the host waits for) and sends (copies of host tensors to the device).
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

aten = torch.ops.aten
PACKAGE = str(Path(__file__).resolve().parents[2] / "torch_curvature")
DEVICE = torch.device("cuda", 0)
PLAYED = ("cuda", "meta")  # meta is what a device tensor calls itself in C++, so that autograd asks for no CUDA stream
READS = {
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default),
    *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor),
}  # operations whose result, or its shape, the host must wait for
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
PACKING = {
    aten._pack_padded_sequence.default,
    aten._pad_packed_sequence.default,
}  # lengths are on the CPU, on a GPU too
ZEROS = aten._efficientzerotensor.default
COPIES = {aten.copy_.default, aten._to_copy.default}


class DeviceTensor(Tensor):
    """A tensor of the stand-in; ``host`` holds its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device="meta",
        )  # fmt: skip
        made.host = host
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the stand-in")

    def tolist(self) -> Any:
        return current().read("tolist", self.host).tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        if id(self) not in memo:
            copied = DeviceTensor(self.host.clone())
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __getitem__(self, index: Any) -> Tensor:
        """In C++ a list would become a tensor without values, on the meta device."""
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(x, device=DEVICE) if isinstance(x, list) else x for x in parts))

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": DEVICE, **options})

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({self.host!r})"


class Generator(torch.Generator):
    """A generator that remembers the device it was made for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, device="cpu")
        made.made_for = torch.device(device)
        if made.made_for.type in PLAYED:
            current().generators[made._cdata] = made
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE if self.made_for.type in PLAYED else self.made_for


class StandIn(TorchDispatchMode):
    """Runs operations of device tensors on the CPU while it is active; ``reads`` and ``sends`` count by place."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)  # the device's own
        self.generators: dict[int, torch.Generator] = {}  # made for the device, by address
        self.reads: collections.Counter[str] = collections.Counter()
        self.sends: collections.Counter[str] = collections.Counter()

    def read(self, what: str, value: Any) -> Any:
        self.reads[f"{what} at {place()}"] += 1
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if isinstance(x, DeviceTensor)]
        target = kwargs.get("device")
        target = torch.device(target) if target is not None else None
        if not on_device and (target is None or target.type not in PLAYED):
            return func(*args, **kwargs)
        self._check(func, args, tensors, bool(on_device))
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        self._check_generator(func, kwargs)
        arguments, options = tree_map_only(DeviceTensor, lambda t: t.host, (args, kwargs))
        with self._randomness(func, options):
            out = (aten.zeros.default if func is ZEROS else func)(*arguments, **options)
        if func is ZEROS and not out.dim():
            return out  # the tangent of a number; torch wants it on the CPU, as numbers are
        name = func._schema.name.removeprefix("aten::")
        if func in READS or (func in INDEXING and _by_mask(args)):
            self.read(name, None)
        if func is aten._to_copy.default:
            if target is not None and target.type == "cpu":
                return self.read("copy to the host", out)
            if not on_device:
                self.sends[f"{name} at {place()}"] += 1
        if func is aten.copy_.default and not isinstance(args[0], DeviceTensor):
            return self.read("copy to the host", args[0])
        flat, form = tree_flatten(out)
        if func in PACKING:
            return DeviceTensor(out[0]), out[1]
        known = {id(x.host): x for x in on_device}
        wrapped = [known[id(x)] if id(x) in known else DeviceTensor(x) if isinstance(x, Tensor) else x for x in flat]
        result = tree_unflatten(wrapped, form)
        if not on_device or not hasattr(func, "_schema") or not any(a.alias_info for a in func._schema.arguments):
            return result
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _check(self, func: Any, args: Any, tensors: list[Tensor], device: bool) -> None:
        """Operands on the CPU that CUDA would refuse."""
        if func in COPIES | PACKING or func is aten.lift_fresh.default:
            if func is aten.copy_.default and isinstance(args[0], DeviceTensor) and args[1].device != DEVICE:
                self.sends[f"copy_ at {place()}"] += 1
            return
        strangers = [t for t in tensors if not isinstance(t, DeviceTensor) and t.dim() > 0]
        if func in INDEXING and strangers and isinstance(args[0], DeviceTensor):
            indices = [x for x in args[1] if x is not None and not isinstance(x, DeviceTensor)]
            self.sends[f"index at {place()}"] += len(indices)
            strangers = [t for t in strangers if not any(t is x for x in indices)]
        if strangers and device:
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {tensors}")

    def _check_generator(self, func: Any, kwargs: dict[str, Any]) -> None:
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in self.generators:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")

    @contextlib.contextmanager
    def _randomness(self, func: Any, kwargs: dict[str, Any]) -> Iterator[None]:
        """Without a generator of its own, a random operation draws from the device's."""
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            yield
            return
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)


def _by_mask(args: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def place() -> str:
    """The line of the package that is running, or of the caller."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(PACKAGE) and not frame.filename.endswith("/recorder.py"):
            return f"{frame.filename[len(PACKAGE) + 1 :]}:{frame.name}"
    return "the caller"


_active: list[StandIn] = []


def current() -> StandIn:
    return _active[-1]


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    """A device "cuda" for as long as this lasts, whether or not there is a GPU.

    Compute on the CPU outside of it: what torch does there with the meta device would go to the stand-in.
    """
    mode = StandIn()
    lifting = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    _active.append(mode)
    try:
        with pytest.MonkeyPatch.context() as patch, mode:
            patch.setattr(torch, "Generator", Generator)
            patch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: False)
            patch.setattr(torch.cuda, "_lazy_init", lambda: None)
            patch.setattr(torch.cuda, "get_rng_state", lambda device=None: mode.generator.get_state())
            patch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: mode.generator.set_state(state))
            patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (8 << 30, 16 << 30))
            patch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
            patch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)
            yield mode
    finally:
        _active.pop()
        torch._C._set_only_lift_cpu_tensors(lifting)


def on_device(value: Any) -> Any:
    """Tensors in any nesting, moved; of a module its parameters and buffers (a copy), of a partial its keywords."""
    if isinstance(value, functools.partial):
        return functools.partial(value.func, *on_device(value.args), **on_device(value.keywords))
    if isinstance(value, nn.Module):
        memo: dict[int, Any] = {}
        for tensor in (*value.parameters(), *value.buffers()):
            moved = DeviceTensor(tensor.detach().clone())
            memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        return copy.deepcopy(value, memo)
    return tree_map_only(Tensor, lambda t: DeviceTensor(t.detach().clone()), value)


def same(found: Any, expected: Any) -> None:
    """Every tensor is on the device, and equal to its counterpart on the CPU up to rounding."""
    (ours, form), (theirs, expected_form) = tree_flatten(found), tree_flatten(expected)
    assert form == expected_form
    size = max([float(y.abs().max()) for y in theirs if isinstance(y, Tensor) and y.numel()], default=0.0)
    for x, y in zip(ours, theirs):
        assert isinstance(x, Tensor) == isinstance(y, Tensor)
        if isinstance(y, Tensor):
            assert isinstance(x, DeviceTensor), f"a result on {x.device}"
            assert (x.device, x.dtype, x.shape) == (DEVICE, y.dtype, y.shape)
            torch.testing.assert_close(x.host, y, rtol=1e-11, atol=1e-13 * size)
        else:
            assert x == y
