"""Runs the CUDA kernels of csrc/cuda on the CPU: builds the driver with g++ and hands it cases.

`Emulator(variant)` builds one driver ("plain", "asan" with UBSan, "tsan") in the cache folder `build/`, incrementally:
an object is compiled anew when a file it includes has changed. `run` sends cases through one process and returns
their buffers as tensors. Environment: TORCH_CURVATURE_CXX names the compiler (default g++).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CACHE = HERE / "build"
KERNELS = HERE.parents[1] / "csrc" / "cuda"
COMPILER = os.environ.get("TORCH_CURVATURE_CXX", "g++")

COMMON = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-ffp-contract=off"]
VARIANTS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
TYPES = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "__nv_bfloat16",
    "float16": "__half",
    "tf32": "torch_curvature::cuda::Tf32",  # float32, multiplied in TF32
}
# A failed case ends the process at once, with the sanitizer's report on stderr.
SANITIZER_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=0:halt_on_error=1:exitcode=66",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0",
}


class EmulationError(RuntimeError):
    """The emulator or a sanitizer refused what a kernel did; the message is theirs."""


@dataclass
class Case:
    """One launch: `integers` as cases/<op>.cpp documents them, `buffers` as raw storage in the order given there."""

    operator: str
    format: str
    integers: list[int]
    buffers: list[torch.Tensor]  # one-dimensional and contiguous; outputs are given filled with what must not survive
    shift: list[int] = field(default_factory=list)  # bytes off alignment, per buffer
    sparse: list[int] = field(
        default_factory=list
    )  # per buffer: bytes of address space, of which the tensor is the end
    first_block: int = 0  # earlier blocks are left out

    def encode(self) -> bytes:
        def text(s: str) -> bytes:
            return struct.pack("<q", len(s)) + s.encode()

        head = text(self.operator) + text(self.format)
        head += struct.pack(f"<q{len(self.integers)}q", len(self.integers), *self.integers)
        head += struct.pack("<qq", self.first_block, len(self.buffers))
        parts = [head]
        for i, tensor in enumerate(self.buffers):
            raw = raw_bytes(tensor)
            space = self.sparse[i] if self.sparse else 0
            shift = self.shift[i] if self.shift else 0
            parts.append(struct.pack("<qqq", space or len(raw), shift, len(raw) if space else -1))
            parts.append(raw)
        return b"".join(parts)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def unavailable() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    return None if shutil.which(COMPILER) else f"no C++ compiler {COMPILER!r}"


class Emulator:
    """One driver: of all operators and formats by default; of one operator and format, and of kernels elsewhere, for
    mutants."""

    def __init__(
        self,
        variant: str = "plain",
        operator: str | None = None,
        format: str | None = None,
        kernels: Path = KERNELS,
    ):
        self.variant = variant
        names = sorted(p.stem for p in (HERE / "cases").glob("*.cpp")) if operator is None else [operator]
        flags = [*COMMON, *VARIANTS[variant], f"-I{HERE / 'emulator'}"]
        own = [*flags, "-DTORCH_CURVATURE_EMULATOR", f"-I{kernels}"]
        if format is not None:
            own.append(f"-DEMULATOR_ONLY_TYPE={TYPES[format]}")
        sources = [(HERE / "cases" / f"{name}.cpp", own) for name in names]
        self.program = build([*sources, *((HERE / "emulator" / f, flags) for f in ("engine.cpp", "driver.cpp"))])

    def run(self, cases: list[Case], **options: object) -> list[list[torch.Tensor]]:
        """The buffers of every case after its launch, as flat tensors. Options: order=forward|reverse|<seed>,
        copies=lazy|eager, max_blocks=<cap of the grid>."""
        request = b"".join(case.encode() for case in cases) + struct.pack("<q", 0)
        command = [str(self.program), *(f"{k}={v}" for k, v in options.items())]
        if self.variant == "tsan" and shutil.which("setarch"):
            command = ["setarch", "-R", *command]  # TSan's shadow does not suit every layout of address space
        environment = {**os.environ, **SANITIZER_ENVIRONMENT}
        done = subprocess.run(command, input=request, capture_output=True, env=environment)
        return decode(cases, done)


def decode(cases: list[Case], done: subprocess.CompletedProcess[bytes]) -> list[list[torch.Tensor]]:
    results, at, data = [], 0, done.stdout
    for number, case in enumerate(cases):
        what = f"case {number}: {case.operator} {case.format} {case.integers}"
        if at + 8 > len(data):
            raise EmulationError(
                f"{what}\n{done.stderr.decode(errors='replace')[-6000:]}\nexit status {done.returncode}"
            )
        (length,) = struct.unpack_from("<q", data, at)
        at += 8
        if length:
            raise EmulationError(f"{what}\n{data[at : at + length].decode()}")
        buffers = []
        for tensor in case.buffers:
            size = tensor.numel() * tensor.element_size()
            piece = torch.frombuffer(bytearray(data[at : at + size]), dtype=tensor.dtype) if size else tensor.clone()
            buffers.append(piece)
            at += size
        results.append(buffers)
    if done.returncode:
        raise EmulationError(f"exit status {done.returncode}\n{done.stderr.decode(errors='replace')[-6000:]}")
    return results


# ---- building ----


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compile_object(source: Path, flags: list[str]) -> Path:
    """The object of one source. Its record lists every file it was made from, with their contents' hashes."""
    key = hashlib.sha256("\0".join([COMPILER, str(source), *flags]).encode()).hexdigest()[:16]
    target, record = CACHE / f"{source.stem}-{key}.o", CACHE / f"{source.stem}-{key}.made-from"
    if target.exists() and record.exists():
        lines = [line.split(" ", 1) for line in record.read_text().splitlines()]
        if all(Path(name).exists() and digest(Path(name)) == old for old, name in lines):
            return target
    record.unlink(missing_ok=True)
    depends = target.with_suffix(".d")
    command = [COMPILER, *flags, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(f"{' '.join(command)}\n{done.stderr[-6000:]}")
    files = depends.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    ours = [Path(name) for name in files if not name.startswith("/usr/")]
    record.write_text("".join(f"{digest(path)} {path}\n" for path in ours))
    return target


def build(sources: list[tuple[Path, list[str]]]) -> Path:
    CACHE.mkdir(exist_ok=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(lambda source: compile_object(*source), sources))
    key = hashlib.sha256("".join(digest(o) for o in objects).encode()).hexdigest()[:16]
    program = CACHE / f"driver-{key}"
    if not program.exists():
        partial = program.with_suffix(f".{os.getpid()}")
        sanitize = [flag for flag in sources[0][1] if flag.startswith("-fsanitize")]
        command = [COMPILER, *sanitize, *map(str, objects), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EmulationError(done.stderr[-6000:])
        partial.rename(program)
    return program
