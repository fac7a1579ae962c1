# SPDX-License-Identifier: MIT
"""Operations without a Lipschitz rule, and keyword arguments that rules may not have thought of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import Lambda

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """A module whose forward is one operation, and what a refusal has to call it."""

    build: Callable[[], nn.Module]
    shape: Shape
    named: tuple[str, ...]


# What a refusal may name instead: the call that an operation is made of.
ALIASES: dict[str, tuple[str, ...]] = {
    "baddbmm": ("baddbmm",), "bmm": ("matmul",), "bool": ("cast",), "complex": ("complex", "abs"),
    "corrcoef": ("equal", "cov"), "cov": ("equal", "cov"), "diag_embed": ("diag",),
    "diff": ("mul",), "dist": ("dist", "norm"), "dot": ("mul",), "F.bilinear": ("linear",),
    "F.cosine_similarity": ("cosine_similarity", "norm"), "F.cross_entropy": ("argmax",),
    "F.embedding": ("cast",), "F.gumbel_softmax": ("empty_like", "exponential"),
    "F.hardshrink": ("le.", "hardshrink"), "F.huber_loss": ("broadcast_tensors", "huber_loss"),
    "F.logsigmoid_squared": ("pow",), "F.mse_loss": ("broadcast_tensors", "mse_loss"),
    "F.multi_margin_loss": ("argmax",), "F.normalize": ("norm",), "F.one_hot": ("cast",),
    "F.pairwise_distance": ("pairwise_distance", "norm"), "F.rms_norm": ("rms_norm", "pow"),
    "F.scaled_dot_product_attention": ("attention", "matmul"), "F.silu_by_hand": ("mul",),
    "F.softmin": ("softmax",), "F.softshrink": ("gt.",), "F.softsign": ("div",),
    "fft.fft": ("fft",), "fft.ifft2": ("fft",), "fft.rfft": ("fft",), "float_power": ("pow",),
    "floor_divide": ("floor_divide", "div"), "fmax": ("mul",), "gather": ("argsort",),
    "gcd": ("cast",), "index_put": ("slice",), "int": ("cast",), "isclose": ("isclose", "abs"),
    "item": ("sum",), "kron": ("kron", "batch"), "ldexp": ("ldexp", "pow"), "msort": ("sort",),
    "mvlgamma": ("mvlgamma", "lgamma"), "nansum": ("nansum",), "outer": ("einsum",),
    "polar": ("polar", "abs"), "round_decimals": ("round",), "stft": ("view", "stft"),
    "tril_product": ("matmul", "tril"), "unbind_copy": ("pow",), "vander": ("select", "vander"),
}  # fmt: skip
OPERATIONS: dict[str, Operation] = {}


def _add(prefix: str, functions: dict[str, Callable[..., Tensor]], shape: Shape = (4,)) -> None:
    for name, function in functions.items():
        aliases = ALIASES.get(prefix + name, ALIASES.get(name, (name,)))
        OPERATIONS[prefix + name] = Operation(
            lambda f=function: Lambda(lambda m, x: f(x)).eval(), shape, aliases
        )


def _named(module: Any, names: str, *arguments: Any) -> dict[str, Callable[..., Tensor]]:
    return {n: lambda x, n=n: getattr(module, n)(x, *arguments) for n in names.split()}


W = torch.tensor([[0.5, -1.0, 2.0, 0.25]])
MASK = torch.tensor([True, False, True, True])

_add(
    "torch.",
    _named(
        torch,
        """
    exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal tan asin acos sinh cosh asinh
    acosh atanh sign sgn floor ceil round trunc frac erfc erfinv lgamma digamma logit deg2rad
    rad2deg sinc nan_to_num signbit isnan isinf isfinite angle conj_physical i0 bitwise_not
    logical_not
""",
    ),
)
_add(
    "special.",
    _named(
        torch.special,
        """
    entr ndtr ndtri log_ndtr i0e i1 i1e erfcx bessel_j0 bessel_j1 bessel_y0 bessel_y1
    modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 scaled_modified_bessel_k0
    spherical_bessel_j0 airy_ai expit psi
""",
    ),
)
_add(
    "linalg.",
    _named(
        torch.linalg,
        """
    inv det slogdet matrix_norm svdvals eigvalsh cholesky_ex qr pinv matrix_exp matrix_rank cond
""",
    ),
    (3, 3),
)
_add("torch.", _named(torch, """
    cumsum cumprod logcumsumexp softmax log_softmax logsumexp prod argsort argmin std var nansum
    all any count_nonzero
""", 1))  # fmt: skip
_add("torch.", {
    "median": lambda x: torch.median(x, 1)[0], "nanmedian": lambda x: torch.nanmedian(x, 1)[0],
    "mode": lambda x: torch.mode(x, 1)[0], "cummax": lambda x: torch.cummax(x, 1)[0],
    "cummin": lambda x: torch.cummin(x, 1)[0], "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "aminmax": lambda x: torch.aminmax(x, dim=1)[0], "msort": lambda x: torch.msort(x),
    "quantile": lambda x: torch.quantile(x, 0.5, 1), "renorm": lambda x: x.renorm(2, 0, 1.0),
    "unique_consecutive": lambda x: torch.unique_consecutive(x, dim=1),
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([0.0, 1.0])).float(),
    "diff": lambda x: torch.diff(x * x, dim=1), "unbind_copy": lambda x: x.unbind(1)[0] ** 3,
})  # fmt: skip
_add("fft.", {
    "rfft": lambda x: torch.fft.rfft(x).abs(), "fft": lambda x: torch.fft.fft(x).real,
}, (8,))  # fmt: skip
_add("", {"fft.ifft2": lambda x: torch.fft.ifft2(x).imag}, (8, 8))
_add("", {"stft": lambda x: torch.stft(
    x, 4, 2, window=torch.ones(4), return_complex=True).abs()}, (8,))  # fmt: skip
_add("", {
    "pow": lambda x: torch.pow(x, 3.0), "float_power": lambda x: torch.float_power(x, 2),
    "xlogy": lambda x: torch.xlogy(x, x), "hypot": lambda x: torch.hypot(x, x),
    "atan2": lambda x: torch.atan2(x, W), "fmod": lambda x: torch.fmod(x, 2.0),
    "remainder": lambda x: torch.remainder(x, 2.0), "floor_divide": lambda x: x // 2.0,
    "copysign": lambda x: torch.copysign(x, W), "nextafter": lambda x: torch.nextafter(x, W),
    "heaviside": lambda x: torch.heaviside(x, W), "ldexp": lambda x: torch.ldexp(x, x),
    "lerp": lambda x: torch.lerp(x, W, x), "addcmul": lambda x: torch.addcmul(x, x, x),
    "addcdiv": lambda x: torch.addcdiv(x, W, x), "dist": lambda x: torch.dist(x, W),
    "cdist": lambda x: torch.cdist(x[:, None], x[:, None]), "fmax": lambda x: torch.fmax(x, x * x),
    "logaddexp": lambda x: torch.logaddexp(x, -x), "dot": lambda x: (x * x).sum(1),
    "polar": lambda x: torch.polar(x, x).abs(), "gcd": lambda x: torch.gcd(x.int(), x.int()),
    "masked_fill": lambda x: x.masked_fill(MASK, 1.0), "where": lambda x: torch.where(MASK, x, W),
    "gt": lambda x: (x > 1.0).float(), "eq": lambda x: (x == 0).float(),
    "ge": lambda x: x.ge(0).double(), "isclose": lambda x: torch.isclose(x, W).float(),
    "scatter": lambda x: x.scatter(1, torch.zeros(2, 1, dtype=torch.long), x),
    "index_add": lambda x: x.index_add(1, torch.tensor([0]), x[:, :1]),
    "index_copy": lambda x: x.index_copy(1, torch.tensor([0]), x[:, 1:2]),
    "index_fill": lambda x: x.index_fill(1, torch.tensor([0]), 1.0),
    "index_put": lambda x: x.index_put((torch.tensor([0]),), x[:1] * 2),
    "masked_select": lambda x: x.masked_select(MASK),
    "gather": lambda x: x.gather(1, x.argsort(1)), "take": lambda x: x.take(torch.tensor([0, 1])),
    "as_strided": lambda x: x.as_strided((2, 2), (4, 2)), "unfold": lambda x: x.unfold(1, 2, 1),
    "diag_embed": lambda x: torch.diag_embed(x) @ torch.diag_embed(x),
    "outer": lambda x: torch.einsum("bi,bj->bij", x, x), "bmm": lambda x: x[:, None] @ x[..., None],
    "baddbmm": lambda x: torch.baddbmm(x[:, None, :1], x[:, None], x[..., None]),
    "kron": lambda x: torch.kron(W, x), "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:]),
    "cov": lambda x: torch.cov(x), "corrcoef": lambda x: torch.corrcoef(x),
    "tril_product": lambda x: x[..., None].tril() @ x[:, None],
    "complex": lambda x: torch.complex(x, x).abs(), "histc": lambda x: torch.histc(x, 4),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()), "rand": lambda x: x * torch.rand(4),
    "normal": lambda x: torch.normal(x, 1.0), "dropout": lambda x: F.dropout(x, 0.3, True),
    "multinomial": lambda x: torch.multinomial(x.sigmoid(), 2).float(),
    "searchsorted": lambda x: torch.searchsorted(torch.arange(4.0), x).float(),
    "vander": lambda x: torch.vander(x[0]), "polygamma": lambda x: torch.polygamma(1, x),
    "mvlgamma": lambda x: torch.mvlgamma(x + 9, 2), "round_decimals": lambda x: x.round(decimals=1),
    "int": lambda x: x.int().float(), "view_as_complex": lambda x: torch.view_as_complex(
        x.unflatten(1, (2, 2))).abs(), "bool": lambda x: x.bool().float(),
    "nonzero": lambda x: x.nonzero().float(), "item": lambda x: x * x.sum().item(),
})  # fmt: skip
_add("F.", {
    "layer_norm": lambda x: F.layer_norm(x, (4,)), "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "group_norm": lambda x: F.group_norm(x, 2), "normalize": lambda x: F.normalize(x),
    "softmin": lambda x: F.softmin(x, 1), "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "glu": lambda x: F.glu(x), "cosine_similarity": lambda x: F.cosine_similarity(x, W),
    "pairwise_distance": lambda x: F.pairwise_distance(x, W),
    "mse_loss": lambda x: F.mse_loss(x, 2 * x), "bilinear": lambda x: F.bilinear(
        x, x, torch.ones(2, 4, 4)), "one_hot": lambda x: F.one_hot(x.long().abs(), 99).float(),
    "embedding": lambda x: F.embedding(x.long().abs() % 3, torch.eye(3)),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None]),
    "logsigmoid_squared": lambda x: F.logsigmoid(x) ** 2, "threshold": lambda x: F.threshold(
        x, 0.5, 20.0), "softsign": lambda x: F.softsign(x), "tanhshrink": lambda x: F.tanhshrink(x),
    "hardshrink": lambda x: F.hardshrink(x), "softshrink": lambda x: F.softshrink(x),
    "silu_by_hand": lambda x: x * x.sigmoid(), "binary_cross_entropy": lambda x:
        F.binary_cross_entropy(x.sigmoid(), 2 * x), "huber_loss": lambda x: F.huber_loss(
        x, 2 * x), "kl_div": lambda x: F.kl_div(x, 2 * x),
    "cross_entropy": lambda x: F.cross_entropy(x, x.argmax(1)), "poisson_nll_loss": lambda x:
        F.poisson_nll_loss(x, 2 * x), "multi_margin_loss": lambda x:
        F.multi_margin_loss(x, x.argmax(1)), "pdist": lambda x: F.pdist(x),
    "rrelu": lambda x: F.rrelu(x, training=True),
})  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A layer that has a rule, with arguments out of the ordinary. ``exact``: its Jacobian holds no
    rounded number, or rounded ones of one sign."""

    build: Callable[[], nn.Module]
    shape: Shape


def _call(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Lambda(lambda m, x: function(x))


IMAGE = (2, 5, 4)
VARIANTS: dict[str, Variant] = {
    name: Variant(build, shape)
    for name, build, shape in (
        ("conv, dilation", lambda: nn.Conv2d(2, 2, 2, dilation=(3, 2)), IMAGE),
        ("conv, dilation larger than the map", lambda: nn.Conv2d(
            2, 1, 2, dilation=6, padding=3), IMAGE),
        ("conv, stride above kernel", lambda: nn.Conv2d(2, 3, 1, stride=(3, 2)), IMAGE),
        ("conv, groups", lambda: nn.Conv2d(2, 6, 2, groups=2), IMAGE),
        ("conv, even kernel, same", lambda: nn.Conv2d(2, 2, (2, 4), padding="same"), IMAGE),
        ("conv, valid", lambda: nn.Conv2d(2, 2, 3, padding="valid"), IMAGE),
        ("conv, kernel above map", lambda: nn.Conv2d(2, 1, 7, padding=3), IMAGE),
        ("conv, uneven padding", lambda: nn.Conv2d(2, 2, 3, padding=(2, 0)), IMAGE),
        ("conv, circular, dilated", lambda: nn.Conv2d(
            2, 2, 3, padding=2, dilation=2, padding_mode="circular"), IMAGE),
        ("conv, reflect, strided", lambda: nn.Conv2d(
            2, 2, 3, padding=3, stride=2, padding_mode="reflect"), IMAGE),
        ("conv, replicate, grouped", lambda: nn.Conv2d(
            2, 2, 2, padding=2, groups=2, padding_mode="replicate"), IMAGE),
        ("conv 3d, same", lambda: nn.Conv3d(1, 1, (1, 2, 3), padding="same"), (1, 2, 3, 3)),
        ("conv 1d, reflect, even", lambda: nn.Conv1d(
            1, 2, 4, padding=3, padding_mode="reflect"), (1, 5)),
        ("transposed, output padding", lambda: nn.ConvTranspose2d(
            2, 1, 2, stride=3, output_padding=(2, 1)), IMAGE),
        ("transposed, dilation", lambda: nn.ConvTranspose2d(2, 1, 2, dilation=3), IMAGE),
        ("transposed, groups, padding", lambda: nn.ConvTranspose2d(
            2, 4, 3, groups=2, padding=1), IMAGE),
        ("transposed, padding above kernel", lambda: nn.ConvTranspose1d(
            1, 1, 2, stride=2, padding=2), (1, 5)),
        ("average, ceil mode", lambda: nn.AvgPool2d(2, ceil_mode=True), IMAGE),
        ("average, ceil mode, padding", lambda: nn.AvgPool2d(
            3, 2, padding=1, ceil_mode=True), IMAGE),
        ("average, padding not counted", lambda: nn.AvgPool2d(
            3, 2, padding=1, count_include_pad=False), IMAGE),
        ("average, divisor", lambda: nn.AvgPool2d(2, divisor_override=3), IMAGE),
        ("average, divisor one", lambda: nn.AvgPool2d(3, 1, divisor_override=1), IMAGE),
        ("average, stride above kernel", lambda: nn.AvgPool2d(1, 3), IMAGE),
        ("average, uneven adaptive", lambda: nn.AdaptiveAvgPool2d((3, 3)), IMAGE),
        ("average, adaptive, None", lambda: nn.AdaptiveAvgPool2d((None, 2)), IMAGE),
        ("average 3d", lambda: nn.AvgPool3d((1, 2, 2), 1), (1, 2, 3, 3)),
        ("maximum, ceil mode", lambda: nn.MaxPool2d(2, ceil_mode=True), IMAGE),
        ("maximum, dilation", lambda: nn.MaxPool2d(2, 1, dilation=2), IMAGE),
        ("maximum, overlap, padding", lambda: nn.MaxPool2d(3, 1, padding=1), IMAGE),
        ("maximum, ceil mode, padding", lambda: nn.MaxPool2d(
            3, 2, padding=1, ceil_mode=True), IMAGE),
        ("maximum, adaptive", lambda: nn.AdaptiveMaxPool2d((3, 3)), IMAGE),
        ("maximum, with indices", lambda: Lambda(
            lambda m, x: m.a(x)[0], a=nn.MaxPool2d(2, 1, return_indices=True)), IMAGE),
        ("batch norm, no affine, large eps", lambda: nn.BatchNorm2d(
            2, affine=False, eps=3.0), IMAGE),
        ("batch norm, eps zero", lambda: nn.BatchNorm2d(2, eps=0.0), IMAGE),
        ("leaky, negative slope", lambda: nn.LeakyReLU(-3.0), (4,)),
        ("ELU, alpha", lambda: nn.ELU(5.0), (4,)), ("CELU, alpha", lambda: nn.CELU(0.1), (4,)),
        ("softplus, beta", lambda: nn.Softplus(4.0), (4,)),
        ("softplus, threshold", lambda: nn.Softplus(1.0, 1.0), (4,)),
        ("GELU, tanh", lambda: nn.GELU("tanh"), (4,)),
        ("hardtanh, limits", lambda: nn.Hardtanh(-0.1, 3.0), (4,)),
        ("add, alpha", _call(lambda x: torch.add(x, x.flip(1), alpha=-2.5)), (4,)),
        ("rsub, alpha", _call(lambda x: torch.rsub(x, 1.0, alpha=3)), (4,)),
        ("addmm, alpha, beta", lambda: Lambda(lambda m, x: torch.addmm(
            m.b, x, m.w, beta=7, alpha=-3), b=nn.Parameter(torch.ones(3)),
            w=nn.Parameter(torch.ones(4, 3))), (4,)),
        ("division rounded down", _call(lambda x: torch.div(x, 0.5, rounding_mode="floor")), (4,)),
        ("division truncated", _call(lambda x: torch.div(x, 0.5, rounding_mode="trunc")), (4,)),
        ("sum into integers", _call(
            lambda x: x.sum(1, keepdim=True, dtype=torch.int64).double()), (4,)),
        ("integer by type_as", _call(lambda x: x.type_as(torch.ones(1).int()) * 1.0), (4,)),
        ("mean in float32", _call(lambda x: x.mean(1, dtype=torch.float32)), (4,)),
        ("sum over nothing", _call(lambda x: x.sum((), keepdim=True)), (4,)),
        ("clamp by tensors", _call(lambda x: x.clamp(torch.zeros(4), 2 * torch.ones(4))), (4,)),
        ("topk, smallest", _call(lambda x: x.topk(2, 1, largest=False)[0]), (4,)),
        ("sort, descending, stable", _call(
            lambda x: torch.sort(x, dim=1, descending=True, stable=True)[0]), (4,)),
        ("upsampling by 1.5", _call(lambda x: F.interpolate(x, scale_factor=1.5)), (1, 4)),
        ("upsampling, exact", _call(
            lambda x: F.interpolate(x, size=7, mode="nearest-exact")), (1, 4)),
        ("upsampling, corners", _call(lambda x: F.interpolate(
            x, size=7, mode="linear", align_corners=True)), (1, 4)),
        ("pad, circular, uneven", _call(lambda x: F.pad(x, (3, 1), mode="circular")), (1, 4)),
        ("pad, replicate, large", _call(lambda x: F.pad(x, (9, 0), mode="replicate")), (1, 4)),
        ("pad, constant and negative", _call(lambda x: F.pad(x, (-1, 2), value=3.0)), (1, 4)),
        ("index with repeats", _call(lambda x: x[:, [1, 1, -1, 1]]), (4,)),
        ("dropout of everything, off", _call(lambda x: F.dropout(x, 1.0, False)), (4,)),
    )
}  # fmt: skip
