"""Layers, activations and losses of torch, each as a scalar function of parameters: what a derivative is tried on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from docs.case_builders import CASES, Call, Case, function, layer, lookup, loss

__all__ = ["CASES", "Case"]


def plain_attention(module: nn.Module, x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return module(x)


for activation in (
    *(nn.ReLU(), nn.LeakyReLU(0.1), nn.ELU(), nn.SELU(), nn.CELU(1.3), nn.GELU(), nn.GELU(approximate="tanh")),
    *(nn.SiLU(), nn.Mish(), nn.Sigmoid(), nn.LogSigmoid(), nn.Tanh(), nn.Hardtanh(), nn.ReLU6(), nn.Hardsigmoid()),
    *(nn.Hardswish(), nn.Hardshrink(), nn.Softshrink(), nn.Tanhshrink(), nn.Softplus(), nn.Softsign(), nn.RReLU()),
    *(nn.Threshold(0.1, 0.2), nn.GLU(), nn.Softmax(-1), nn.Softmin(-1), nn.LogSoftmax(-1)),
):
    function(str(activation), "activation", activation.eval(), 4)

layer("Linear", lambda: nn.Linear(4, 3), 4)
layer("Bilinear", lambda: nn.Bilinear(3, 3, 2), 3, call=lambda m, x: m(x, x.sin()))
layer("PReLU", lambda: nn.PReLU(3), 3)
layer("Conv1d", lambda: nn.Conv1d(2, 3, 2, stride=2, padding=1), 2, 5)
layer("Conv2d", lambda: nn.Conv2d(2, 2, 2, padding=1), 2, 3, 3)
layer("Conv2d dilated, grouped", lambda: nn.Conv2d(2, 4, 2, dilation=2, groups=2), 2, 4, 4)
layer("Conv2d circular", lambda: nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular"), 2, 3, 3)
layer("Conv2d reflect", lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), 1, 3, 3)
layer("Conv3d", lambda: nn.Conv3d(1, 2, 2), 1, 2, 3, 2)
layer("ConvTranspose1d", lambda: nn.ConvTranspose1d(2, 2, 3, stride=2), 2, 3)
layer("ConvTranspose2d", lambda: nn.ConvTranspose2d(2, 1, 2, stride=2), 2, 2, 2)
layer("LayerNorm", lambda: nn.LayerNorm(5), 5)
layer("LayerNorm without affine", lambda: nn.LayerNorm(5, elementwise_affine=False), 5)
layer("RMSNorm", lambda: nn.RMSNorm(5), 5)
layer("GroupNorm", lambda: nn.GroupNorm(2, 4), 4, 2)
layer("InstanceNorm1d affine", lambda: nn.InstanceNorm1d(2, affine=True), 2, 4)
layer("InstanceNorm2d affine", lambda: nn.InstanceNorm2d(2, affine=True), 2, 2, 2)
layer("BatchNorm1d eval", lambda: nn.BatchNorm1d(4), 4)
layer("BatchNorm2d eval", lambda: nn.BatchNorm2d(2), 2, 2, 2)
layer("RNN", lambda: nn.RNN(2, 2, batch_first=True), 3, 2, call=lambda m, x: m(x)[0])
layer("GRU", lambda: nn.GRU(2, 2, batch_first=True), 3, 2, call=lambda m, x: m(x)[0])
layer("LSTM", lambda: nn.LSTM(2, 2, batch_first=True), 3, 2, call=lambda m, x: m(x)[0])
layer(
    "LSTM bidirectional, two layers",
    lambda: nn.LSTM(1, 1, 2, bidirectional=True, batch_first=True),
    *(2, 1),
    call=lambda m, x: m(x)[0],
)
layer("LSTMCell", lambda: nn.LSTMCell(2, 2), 2, call=lambda m, x: m(x)[0])
layer("GRUCell", lambda: nn.GRUCell(2, 2), 2)
layer(
    "MultiheadAttention",
    lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    *(2, 4),
    call=lambda m, x: m(x, x, x, need_weights=False)[0],
)
layer(
    "MultiheadAttention with weights",
    lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    *(2, 4),
    call=lambda m, x: m(x, x, x)[0],
)
layer("TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 2, 4)
layer(
    "TransformerEncoderLayer pre-norm, gelu",
    lambda: nn.TransformerEncoderLayer(4, 2, 4, activation="gelu", norm_first=True, batch_first=True),
    *(2, 4),
)
layer(
    "TransformerEncoderLayer, plain attention kernel",
    lambda: nn.TransformerEncoderLayer(4, 2, 4, batch_first=True),
    *(2, 4),
    call=plain_attention,
)
layer(
    "TransformerDecoderLayer",
    lambda: nn.TransformerDecoderLayer(4, 1, 3, batch_first=True),
    *(2, 4),
    call=lambda m, x: m(x, x.sin()),
)
layer("weight_norm (parametrization)", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), 4)
layer("weight_norm over all axes", lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=None), 4)
layer("spectral_norm eval", lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), 4)
layer("orthogonal (parametrization)", lambda: parametrizations.orthogonal(nn.Linear(3, 3)), 3)
lookup("Embedding", lambda: nn.Embedding(4, 3), lambda: torch.tensor([[0, 2], [3, 2]]))
for mode in ("sum", "mean", "max"):
    lookup(
        f"EmbeddingBag {mode}",
        lambda mode=mode: nn.EmbeddingBag(5, 3, mode=mode, padding_idx=1),
        lambda: torch.tensor([[0, 2, 1], [3, 2, 4]]),
    )
lookup(
    "EmbeddingBag with offsets",
    lambda: nn.EmbeddingBag(5, 3, mode="mean"),
    lambda: (torch.tensor([0, 2, 1, 3, 3]), torch.tensor([0, 2])),
)
lookup(
    "EmbeddingBag weighted",
    lambda: Call(nn.EmbeddingBag(5, 3, mode="sum"), lambda m, x: m(x, per_sample_weights=m.weight[:2, :2].sin())),
    lambda: torch.tensor([[0, 2], [3, 4]]),
)

function("scaled_dot_product_attention", "function", lambda x: F.scaled_dot_product_attention(x, x.sin(), x), 1, 2, 2)
function(
    "scaled_dot_product_attention causal",
    "function",
    lambda x: F.scaled_dot_product_attention(x, x.sin(), x, is_causal=True),
    *(1, 3, 2),
)
function("MaxPool2d", "function", nn.MaxPool2d(2), 1, 4, 2)
function("AvgPool2d", "function", nn.AvgPool2d(2), 1, 4, 2)
function("AdaptiveAvgPool2d", "function", nn.AdaptiveAvgPool2d(2), 1, 3, 3)
function("AdaptiveMaxPool1d", "function", nn.AdaptiveMaxPool1d(2), 1, 5)
function("LPPool1d", "function", lambda x: F.lp_pool1d(x.exp(), 3.0, 2), 1, 4)
function("LocalResponseNorm", "function", nn.LocalResponseNorm(2), 3, 2)
function("Upsample nearest", "function", nn.Upsample(scale_factor=2), 1, 2, 2)
function("Upsample bilinear", "function", nn.Upsample(scale_factor=2, mode="bilinear"), 1, 2, 2)
function("Upsample bicubic", "function", nn.Upsample(scale_factor=2, mode="bicubic"), 1, 2, 2)
function("PixelShuffle", "function", nn.PixelShuffle(2), 4, 1, 2)
function("Unfold", "function", nn.Unfold(2), 1, 3, 2)
function("Fold", "function", nn.Fold((3, 2), 2), 4, 2)
function("grid_sample input", "function", lambda x: F.grid_sample(x, GRID, align_corners=False), 1, 3, 3)
function("grid_sample grid", "function", lambda x: F.grid_sample(IMAGE, x.tanh(), align_corners=False), 2, 1, 2)
function("normalize", "function", F.normalize, 4)
function("CosineSimilarity", "function", lambda x: F.cosine_similarity(x[:, 0], x[:, 1]), 2, 3)
function("PairwiseDistance", "function", lambda x: F.pairwise_distance(x[:, 0], x[:, 1]), 2, 3)
function("cdist", "function", lambda x: torch.cdist(x, x.sin() + 1), 2, 3)
function("cdist p=3", "function", lambda x: torch.cdist(x, x.sin() + 1, p=3.0), 2, 3)
function("logsumexp", "function", lambda x: x.logsumexp(-1), 4)
function("cumprod", "function", lambda x: x.cumprod(-1), 4)
function("inverse", "function", lambda x: (x + 3 * EYE).inverse(), 2, 2)
function("cholesky", "function", lambda x: torch.linalg.cholesky(x @ x.mT + EYE), 2, 2)
function("logdet", "function", lambda x: (x @ x.mT + EYE).logdet(), 2, 2)

GRID = torch.linspace(-0.8, 0.7, 12, dtype=torch.float64).sin().reshape(1, 3, 2, 2).expand(2, 3, 2, 2)
IMAGE = torch.linspace(-1, 5, 32, dtype=torch.float64).cos().reshape(2, 1, 4, 4)
EYE = torch.eye(2, dtype=torch.float64)


def classes() -> Tensor:
    return torch.randint(4, (3,))


def signs() -> Tensor:
    return torch.randint(2, (3, 4)).double() * 2 - 1


def noise() -> Tensor:
    return torch.randn(3, 4)


loss("CrossEntropyLoss", nn.CrossEntropyLoss(), classes, 4)
loss("CrossEntropyLoss weighted, smoothed", lambda u, y: F.cross_entropy(u, y, WEIGHT, label_smoothing=0.1), classes, 4)
loss("CrossEntropyLoss with ignored targets", nn.CrossEntropyLoss(ignore_index=1), lambda: torch.tensor([0, 1, 3]), 4)
loss("CrossEntropyLoss of probabilities", nn.CrossEntropyLoss(), lambda: torch.rand(3, 4).softmax(-1), 4)
loss("CrossEntropyLoss of tokens", nn.CrossEntropyLoss(), lambda: torch.randint(3, (3, 2)), 3, 2)
loss("NLLLoss", nn.NLLLoss(), classes, 4, transfer=nn.LogSoftmax(-1))
loss("BCELoss", nn.BCELoss(), lambda: torch.rand(3, 4), 4, transfer=nn.Sigmoid())
loss("BCEWithLogitsLoss", nn.BCEWithLogitsLoss(), lambda: torch.rand(3, 4), 4)
loss(
    "BCEWithLogitsLoss pos_weight",
    lambda u, y: F.binary_cross_entropy_with_logits(u, y, pos_weight=WEIGHT),
    lambda: torch.rand(3, 4),
    4,
)
loss("MSELoss", nn.MSELoss(), noise, 4)
loss("L1Loss", nn.L1Loss(), noise, 4)
loss("SmoothL1Loss", nn.SmoothL1Loss(beta=0.7), noise, 4)
loss("HuberLoss", nn.HuberLoss(delta=0.8), noise, 4)
loss("PoissonNLLLoss", nn.PoissonNLLLoss(), lambda: torch.randint(5, (3, 4)).double(), 4)
loss(
    "PoissonNLLLoss of rates",
    nn.PoissonNLLLoss(log_input=False),
    lambda: torch.randint(5, (3, 4)).double(),
    *(4,),
    transfer=nn.Softplus(),
)
loss("GaussianNLLLoss", lambda u, y: F.gaussian_nll_loss(u[:, 0], y, u[:, 1].exp()), lambda: torch.randn(3, 2), 2, 2)
loss("KLDivLoss", nn.KLDivLoss(reduction="batchmean"), lambda: noise().softmax(-1), 4, transfer=nn.LogSoftmax(-1))
loss(
    "KLDivLoss log_target",
    nn.KLDivLoss(reduction="batchmean", log_target=True),
    lambda: noise().log_softmax(-1),
    *(4,),
    transfer=nn.LogSoftmax(-1),
)
loss("SoftMarginLoss", nn.SoftMarginLoss(), signs, 4)
loss("MultiLabelSoftMarginLoss", nn.MultiLabelSoftMarginLoss(), lambda: (signs() + 1) / 2, 4)
loss("MultiMarginLoss", nn.MultiMarginLoss(), classes, 4)
loss("MultiMarginLoss p=2", nn.MultiMarginLoss(p=2), classes, 4)
loss("MultiLabelMarginLoss", nn.MultiLabelMarginLoss(), lambda: torch.tensor([[3, 0, -1, 1]] * 3), 4)
loss("HingeEmbeddingLoss", nn.HingeEmbeddingLoss(), signs, 4)
loss(
    "CosineEmbeddingLoss",
    lambda u, y: F.cosine_embedding_loss(u[:, 0], u[:, 1], y, margin=-1.0),
    lambda: signs()[:, 0],
    *(2, 4),
)
loss("MarginRankingLoss", lambda u, y: F.margin_ranking_loss(u[:, 0], u[:, 1], y), lambda: signs(), 2, 4)
loss(
    "TripletMarginLoss",
    lambda u, y: F.triplet_margin_loss(u[:, 0], u[:, 1], u[:, 2] + y, margin=9.0),
    lambda: torch.randn(3, 4),
    *(3, 4),
)
loss(
    "CTCLoss",
    lambda u, y: F.ctc_loss(u.log_softmax(-1).movedim(1, 0), y, torch.full((3,), 4), torch.full((3,), 2)),
    lambda: torch.tensor([[1, 2], [2, 2], [2, 1]]),
    *(4, 3),
)
WEIGHT = torch.tensor([0.4, 1.7, 0.9, 1.2], dtype=torch.float64)
