"""Every matrix in every representation, for every model of the list, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from torch_curvature import reference
from torch_curvature.layers import FUNCTION_RULES, MODULE_RULES

from .models import CASES, Function, ScaledLinear

N = 4


@pytest.fixture(autouse=True, scope="module")
def own_rule() -> Iterator[None]:
    """A user's rule for a user's module."""

    @tc.register_rule(ScaledLinear)
    def rule(module: ScaledLinear, output: Tensor, x: Tensor) -> Iterator[tc.Use]:
        yield tc.Use(module.weight, 1, lambda dz: torch.e * dz.unsqueeze(2), lambda: x.unsqueeze(1), transposed=True)

    yield
    del MODULE_RULES[ScaledLinear]


def close(ours: Tensor, truth: Tensor, whole: Tensor | None = None) -> None:
    """Equal to ten digits; a part that vanishes identically to ten digits of the ``whole`` it belongs to."""
    assert ours.shape == truth.shape
    error = float((ours - truth).norm())
    size = float(truth.norm()) + (0.0 if whole is None else 1e-4 * float(whole.norm()))
    assert error <= 1e-10 * size, f"error {error:.1e}, size {size:.1e}"


def problem(name: str) -> tuple[nn.Module, Any, Tensor]:
    case = CASES[name]
    model, inputs = case.build(), case.inputs(N)
    with torch.no_grad():
        outputs = call(model, inputs)
    classes = outputs.shape[1]
    return model, inputs, torch.randint(0, classes, (outputs.shape[0], *outputs.shape[2:]))


def call(model: nn.Module, inputs: Any) -> Tensor:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def part(matrix: Tensor, model: nn.Module, names: list[str]) -> Tensor:
    """Rows and columns of some parameters."""
    kept, start = [], 0
    for name, p in reference.parameters(model).items():
        if name in names:
            kept.append(torch.arange(start, start + p.numel()))
        start += p.numel()
    index = torch.cat(kept)
    return matrix[index][:, index]


def check_quadratic(matrix: Any, truth: Tensor, model: nn.Module) -> None:
    """All representations of one matrix."""
    names = list(reference.parameters(model))
    dense = matrix.dense()
    close(dense, truth)
    assert torch.equal(dense, dense.T)
    for name, block in matrix.blocks().items():
        close(block, part(truth, model, [name]), truth)
        assert torch.equal(block, block.T)
    blocks = matrix.blocks(by="module")
    for module, block in blocks.items():
        members = [n for n in names if n.rpartition(".")[0] == module]
        close(block, part(truth, model, members), truth)
        assert torch.equal(block, block.T)
    assert sum(len(block) for block in blocks.values()) == len(truth)
    diagonal = matrix.diagonal()
    for name, p in reference.parameters(model).items():
        assert diagonal[name].shape == p.shape
    close(torch.cat([d.flatten() for d in diagonal.values()]), truth.diagonal())
    close(matrix.trace(), truth.trace())
    close(matrix.frobenius_norm(), truth.norm())
    P = len(truth)
    v, V = torch.randn(P), torch.randn(P, 17)
    close(matrix @ v, truth @ v)
    close(matrix @ V[:, :2], truth @ V[:, :2])
    close(matrix @ V, truth @ V)
    pieces = v.split([p.numel() for p in reference.parameters(model).values()])
    named = {n: x.reshape(p.shape) for (n, p), x in zip(reference.parameters(model).items(), pieces)}
    close(torch.cat([x.flatten() for x in (matrix @ named).values()]), truth @ v)


def check_dual(matrix: Any, truth: Tensor) -> None:
    """The Gram matrix has the nonzero eigenvalues of the matrix, and gives its Frobenius norm."""
    gram = matrix.gram()
    assert torch.equal(gram, gram.T)
    ours, theirs = torch.linalg.eigvalsh(gram), torch.linalg.eigvalsh(truth)
    count = min(len(ours), len(theirs))
    close(ours[-count:], theirs[-count:])
    close(gram.norm(), truth.norm())


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton(name: str) -> None:
    model, inputs, targets = problem(name)
    loss = nn.CrossEntropyLoss()
    truth = reference.gauss_newton(model, loss, (inputs, targets))
    matrix = tc.GaussNewton(model, loss, (inputs, targets))
    check_quadratic(matrix, truth, model)
    check_dual(matrix, truth)
    case, coverage = CASES[name], matrix.coverage()
    for parameter, p in model.named_parameters():
        expected = (
            "frozen"
            if not p.requires_grad
            else "unused"
            if parameter in case.unused
            else "fallback"
            if parameter in case.fallback
            else "closed rule"
        )
        assert coverage[parameter].startswith(expected), f"{parameter}: {coverage[parameter]}"


@pytest.mark.parametrize("name", CASES)
def test_fisher_and_gradient_second_moment(name: str) -> None:
    model, inputs, targets = problem(name)
    loss = nn.CrossEntropyLoss(reduction="sum", weight=torch.rand(int(targets.max()) + 10)[: channels(model, inputs)])
    data = (inputs, targets)
    fisher = tc.Fisher(model, loss, data)
    close(fisher.dense(), reference.fisher(model, loss, data))
    v = torch.randn(len(fisher.dense()))
    close(fisher @ v, reference.fisher(model, loss, data) @ v)
    truth = reference.empirical_fisher(model, loss, data)
    matrix = tc.EmpiricalFisher(model, loss, data)
    check_quadratic(matrix, truth, model)
    rows = torch.cat([g.reshape(N, -1) for g in reference.per_sample_gradients(model, loss, data).values()], 1)
    close(matrix.gram(), rows @ rows.T)
    close(matrix.gradient_norms(), rows.norm(dim=1))
    close(matrix.gradient_norms(squared=True), rows.square().sum(1))


def channels(model: nn.Module, inputs: Any) -> int:
    with torch.no_grad():
        return call(model, inputs).shape[1]


@pytest.mark.parametrize("name", CASES)
def test_jacobian(name: str) -> None:
    model, inputs, _ = problem(name)
    J = reference.jacobian(model, inputs)
    data = (inputs, None) if isinstance(inputs, tuple) else inputs
    matrix = tc.Jacobian(model, data)
    close(matrix.dense(), J)
    sizes = [p.numel() for p in reference.parameters(model).values()]
    for block, truth in zip(matrix.blocks().values(), J.split(sizes, 2)):
        close(block, truth, J)
    close(torch.cat(list(matrix.blocks(by="module").values()), 2).norm(), J.norm())
    kernel = matrix.gram()
    close(kernel, torch.einsum("ncp,mdp->ncmd", J, J))
    flat = kernel.flatten(2).flatten(0, 1)
    assert torch.equal(flat, flat.T)
    close(matrix.frobenius_norm(), J.norm())
    v, V, u = torch.randn(J.shape[2]), torch.randn(J.shape[2], 3), torch.randn(J.shape[:2])
    close(matrix @ v, J @ v)
    close(matrix @ V, J @ V)
    close(matrix.transposed_product(u), torch.einsum("ncp,nc->p", J, u))


@pytest.mark.parametrize("name", CASES)
def test_tracked_gradients(name: str) -> None:
    model, inputs, targets = problem(name)
    loss = nn.CrossEntropyLoss()
    truth = reference.per_sample_gradients(model, loss, (inputs, targets))
    with tc.track(model) as t:
        loss(call(model, inputs), targets).backward()
    gradients = t.gradients()
    rows = torch.cat([g.reshape(N, -1) for g in truth.values()], 1)
    assert list(gradients) == list(truth)
    for key, p in reference.parameters(model).items():
        close(gradients[key], truth[key], rows)
        if p.grad is not None:
            close(gradients[key].sum(0), p.grad, rows)
    close(t.gradient_norms(), rows.norm(dim=1))
    close(t.gradient_norms(squared=True), rows.square().sum(1))
    close(t.gradient_gram(), rows @ rows.T)
    for key, variance in t.gradient_variance().items():
        close(variance, truth[key].var(0, unbiased=False), rows.square())


ONE_POSITION = ["mlp", "single layer", "mlp without bias, relu in place", "matrix products with parameters", "bilinear"]


@pytest.mark.parametrize("name", ONE_POSITION)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_factors_are_exact_for_one_sample_with_one_position(name: str, sharing: str) -> None:
    model, inputs, targets = problem(name)
    data = take(inputs, slice(0, 1)), targets[:1]
    loss = nn.CrossEntropyLoss(reduction="sum")
    truth = reference.gauss_newton(model, loss, data)
    parameters = reference.parameters(model)
    found = tc.GaussNewton(model, loss, data).kronecker(sharing)
    for key, (A, B) in found.items():
        if key in parameters:
            block = part(truth, model, [key])
            stored_as_inputs_by_outputs = len(A) > 1 and parameters[key].shape == (len(A), len(B)) and key != "weight"
            close(torch.kron(A, B) if stored_as_inputs_by_outputs else torch.kron(B, A), block)
            continue
        names = [n for n in parameters if n.rpartition(".")[0] == key]
        order = list(range(len(B) * len(A)))
        if len(names) == 2:  # the last column of the joined matrix is the bias: weights first, then biases
            order = [k for k in order if k % len(A) != len(A) - 1] + [k for k in order if k % len(A) == len(A) - 1]
        close(torch.kron(B, A)[order][:, order], part(truth, model, names))


@pytest.mark.parametrize("name", CASES)
def test_kronecker_factors_keep_the_trace_and_are_symmetric(name: str) -> None:
    """For sums over positions: tr A = mean |a|^2 and tr B = sum |g|^2; own blocks of the rest are exact."""
    model, inputs, targets = problem(name)
    loss = nn.CrossEntropyLoss()
    truth = reference.gauss_newton(model, loss, (inputs, targets))
    found = tc.GaussNewton(model, loss, (inputs, targets)).kronecker()
    for key, (A, B) in found.items():
        assert torch.equal(A, A.T)
        assert torch.equal(B, B.T)
        if len(A) == 1 and key in reference.parameters(model):
            close(A * B, part(truth, model, [key]), truth)


def take(inputs: Any, which: slice) -> Any:
    if isinstance(inputs, dict):
        return {key: x[which] for key, x in inputs.items()}
    return tuple(x[which] for x in inputs) if isinstance(inputs, tuple) else inputs[which]


def test_every_rule_has_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function with a rule is called by some model of the list, and one of its parameters is covered there."""
    used: set[Any] = set()

    def watched(function: Any, rule: Any) -> Any:
        def run(output: Any, *args: Any, **kwargs: Any) -> Iterator[tc.Use]:
            for use in rule(output, *args, **kwargs):
                if isinstance(use.parameter, nn.Parameter) or isinstance(use.parameter._base, nn.Parameter):
                    used.add(function)
                yield use

        return run

    for function, rule in list(FUNCTION_RULES.items()):
        monkeypatch.setitem(FUNCTION_RULES, function, watched(function, rule))
    for name in CASES:
        model, inputs, _ = problem(name)
        tc.Jacobian(model, (inputs, None) if isinstance(inputs, tuple) else inputs).coverage()
    missing = [getattr(f, "__qualname__", str(f)) for f in FUNCTION_RULES if f not in used]
    assert not missing, f"no model of the list uses the rules of {missing}"


def test_biases_joined_with_their_weights() -> None:
    """One factor where one g serves both; batches in which that differs are summed parameter by parameter."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    flat, steps = torch.randn(5, 3), torch.randn(2, 6, 3)
    J = tc.Jacobian(model, [flat])
    joined = next(dict(pieces) for batch in J._sweep("test") for pieces, _ in batch.pieces())
    assert {name: factor.bias for name, factor in joined.items()} == {"0.weight": "0.bias", "2.weight": "2.bias"}

    def mean(m: nn.Module, x: Tensor) -> tuple[Tensor, None]:
        z = m(x)
        return (z.mean(1) if x.dim() == 3 else z), None

    kernel = tc.Jacobian(model, [flat, steps], forward=mean).gram()
    rows = torch.cat([tc.Jacobian(model, [x], forward=mean).dense() for x in (flat, steps)])
    close(kernel, torch.einsum("ncp,mdp->ncmd", rows, rows))
    with tc.track(model) as t:
        for x in (flat, steps):
            mean(model, x)[0].sum().backward()
    close(t.gradient_gram(), torch.einsum("ncp,mdp->nm", rows, rows))
    close(t.gradient_norms(), rows.sum(1).norm(dim=1))


def test_a_bias_used_elsewhere_is_not_joined() -> None:
    shared = nn.Parameter(torch.randn(4))
    model = Function(
        lambda m, x: nn.functional.linear(torch.tanh(nn.functional.linear(x, m.first, m.shared)), m.last, m.shared),
        first=nn.Parameter(torch.randn(4, 4)),
        last=nn.Parameter(torch.randn(4, 4)),
        shared=shared,
    )
    x = torch.randn(3, 4)
    J = reference.jacobian(model, x)
    matrix = tc.Jacobian(model, x)
    close(matrix.gram(), torch.einsum("ncp,mdp->ncmd", J, J))
    close(matrix.frobenius_norm(), J.norm())
    loss = nn.CrossEntropyLoss()
    data = x, torch.randint(4, (3,))
    truth = reference.gauss_newton(model, loss, data).diagonal()
    close(torch.cat([d.flatten() for d in tc.GaussNewton(model, loss, data).diagonal().values()]), truth)
