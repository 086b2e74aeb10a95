"""Models and data of the workloads, from a fixed seed, and the float64 references that results are checked against.

The references are written in plain torch, one sample at a time or by products with probes: nothing of the package.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

LOSS = nn.CrossEntropyLoss()
PROBES = 4


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        N, T, W = x.shape
        q, k, v = self.project(x).view(N, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.mT * (W // self.heads) ** -0.5, -1) @ v
        return self.out(mixed.transpose(1, 2).reshape(N, T, W))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """3-32-64-64 channels on 32 x 32, halved twice."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


@dataclass
class Problem:
    """A model, its data, and the parameters' names."""

    title: str
    model: nn.Module
    x: Tensor
    y: Tensor
    names: list[str] = field(init=False)
    classes: int = 10

    def __post_init__(self) -> None:
        self.names = [n for n, _ in self.model.named_parameters()]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(self.title, self.copy().to(dtype), self.x.to(dtype), self.y)

    def probes(self, size: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(size, PROBES, generator=generator, dtype=torch.float64).to(self.x.device)


def make(kind: str, N: int, device: torch.device) -> Problem:
    torch.manual_seed(0)
    shapes = {"mlp784x16": (784,), "mlp784": (784,), "tanh16": (16,), "cnn": (3, 32, 32), "transformer": (128, 128)}
    models = {
        "mlp64": lambda: mlp(64, 64, 32, 10),
        "tanh64": lambda: mlp(64, 64, 32, 10, activation=nn.Tanh),
        "tanh16": lambda: mlp(16, 32, 32, 10, activation=nn.Tanh),
        "mlp784x16": lambda: mlp(784, 16, 10),
        "mlp784": lambda: mlp(784, 512, 256, 10),
        "cnn": cnn,
        "transformer": Transformer,
    }
    x = torch.randn(N, *shapes.get(kind, (64,)))
    return Problem(kind, models[kind]().to(device), x.to(device), torch.randint(10, (N,)).to(device))


# ---------------------------------------------------------------------- references, in float64


def _function(p: Problem):
    return lambda parameters: functional_call(p.model, parameters, (p.x,))


def gauss_newton_products(p: Problem, directions: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """G v for the mean cross entropy, by one forward and one reverse product each."""
    parameters = {n: q.detach() for n, q in p.model.named_parameters()}
    outputs, back = vjp(_function(p), parameters)
    probability = outputs.softmax(1)
    found = []
    for v in directions:
        u = jvp(_function(p), (parameters,), (v,))[1]
        u = probability * (u - (probability * u).sum(1, keepdim=True)) / len(p.x)
        found.append(back(u)[0])
    return found


def split(p: Problem, vector: Tensor) -> dict[str, Tensor]:
    sizes = [q.numel() for q in p.model.parameters()]
    return {n: v.view_as(q) for (n, q), v in zip(p.model.named_parameters(), vector.split(sizes))}


def joined(p: Problem, pieces: dict[str, Tensor]) -> Tensor:
    return torch.cat([pieces[n].reshape(-1) for n in p.names])


def reference_dense(p: Problem) -> Tensor:
    """The matrix times probes, [P, PROBES]."""
    probes = p.probes(p.size)
    return torch.stack([joined(p, g) for g in gauss_newton_products(p, [split(p, v) for v in probes.T])], 1)


def reference_product(p: Problem) -> Tensor:
    return joined(p, gauss_newton_products(p, [split(p, p.probes(p.size)[:, 0].clone())])[0])


def weights(p: Problem) -> list[str]:
    return [n for n, q in p.model.named_parameters() if q.dim() > 1]


def reference_blocks(p: Problem) -> Tensor:
    """Each weight's block times probes, one after the other."""
    found = []
    for name in weights(p):
        shape = p.model.get_parameter(name).shape
        zeros = {n: torch.zeros_like(q) for n, q in p.model.named_parameters()}
        directions = [{**zeros, name: v.reshape(shape)} for v in p.probes(shape.numel()).T]
        found += [g[name].reshape(-1) for g in gauss_newton_products(p, directions)]
    return torch.cat(found)


def sample_jacobians(p: Problem):
    """For each sample the Jacobian [C, P] of its outputs."""
    parameters = list(p.model.parameters())
    for n in range(len(p.x)):
        outputs = p.model(p.x[n : n + 1])[0]
        rows = [torch.autograd.grad(z, parameters, retain_graph=True) for z in outputs]
        yield outputs.detach(), torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def reference_diagonal(p: Problem) -> Tensor:
    total = torch.zeros(p.size, dtype=torch.float64, device=p.x.device)
    for outputs, J in sample_jacobians(p):
        q = outputs.softmax(0)
        H = torch.diag(q) - torch.outer(q, q)
        total += (J * (H @ J)).sum(0)
    return total / len(p.x)


def reference_kernel(p: Problem) -> Tensor:
    """Neural tangent kernel [N C, N C]."""
    J = torch.cat([J for _, J in sample_jacobians(p)])
    return J @ J.T


def sample_gradients(p: Problem) -> Tensor:
    """[N, P], each sample's share of the mean loss."""
    parameters, rows = list(p.model.parameters()), []
    for n in range(len(p.x)):
        loss = LOSS(p.model(p.x[n : n + 1]), p.y[n : n + 1]) / len(p.x)
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def reference_norms(p: Problem) -> Tensor:
    return sample_gradients(p).norm(dim=1)


def reference_gram(p: Problem) -> Tensor:
    gradients = sample_gradients(p)
    return gradients @ gradients.T


def reference_hessian(p: Problem) -> Tensor:
    """The Hessian of the loss times probes, by differences of nothing: reverse mode twice."""
    parameters = list(p.model.parameters())
    first = torch.autograd.grad(LOSS(p.model(p.x), p.y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in first])
    columns = []
    for v in p.probes(p.size).T:
        second = torch.autograd.grad(flat @ v, parameters, retain_graph=True)
        columns.append(torch.cat([g.reshape(-1) for g in second]))
    return torch.stack(columns, 1)
