# SPDX-License-Identifier: MIT
"""Linear modules whose exact matrix is known for any weights: matrices, convolutions, composites.

A site pairs a module with a :class:`~tests.soundness.rayleigh.Pattern` that was written down from
the definitions of convolution, padding and pooling, not read off the library.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tests.cases import CONVS, TRANSPOSED, Lambda, random_conv
from tests.oracles import source_index
from tests.soundness.rayleigh import Pattern

Tensors = Sequence[Tensor]


def _flat(tensors: Tensors) -> np.ndarray:
    """``(R, ...)`` tensors as one ``(R, K)`` array of float64."""
    return np.concatenate([t.double().reshape(len(t), -1).numpy() for t in tensors], 1)


@dataclass(frozen=True)
class Site:
    """A module, its input shape, and how drawn weights make its matrix.

    Attributes:
        kind: Row of the counter.
        module: Float64, in eval mode; its weights are replaced by drawn ones.
        weights: Names of the drawn tensors within the module.
        pattern: Matrix from values.
        values: Drawn tensors, each ``(R, *shape)``, to values ``(R, K)``, without rounding.
        generators: The only generators it takes; None for all.
    """

    kind: str
    module: nn.Module
    shape: tuple[int, ...]
    weights: tuple[str, ...]
    pattern: Pattern
    values: Callable[[Tensors], np.ndarray] = _flat
    generators: tuple[str, ...] | None = None

    def build(self) -> nn.Module:
        """The module, as :class:`tests.cases.Parallel` asks for it."""
        return self.module


TAME = (
    "gaussian", "gaussian float32", "gaussian bfloat16", "uniform", "orthogonal",
    "orthogonal float32", "near-multiple top", "integer", "dyadic", "low rank", "cancelling",
    "householder", "full mantissas", "one-sided", "sparse", "repeated rows",
)  # fmt: skip
# Their products of two are exact in float64.
SHORT = ("gaussian float32", "gaussian bfloat16", "orthogonal float32", "integer", "dyadic")


def linear(m: int, n: int) -> Site:
    return Site("linear", _bare(nn.Linear(n, m)), (n,), ("weight",), Pattern.dense(m, n))


def _bare(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if hasattr(part, "bias"):
            part.register_parameter("bias", None)
    return module.double().eval()


def conv_triplets(
    conv: nn.Module, shape: Sequence[int]
) -> tuple[tuple[int, int], np.ndarray, np.ndarray, np.ndarray]:
    """Sizes of a convolution's matrix and its triplets (row, column, number of the weight)."""
    size = list(conv.weight.shape)
    extents, transposed = list(shape[1:]), conv.transposed
    geometry = zip(
        extents, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.output_padding, strict=True,
    )  # fmt: skip
    if transposed:
        outs = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in geometry]
    else:
        outs = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in geometry]
    # The strided side is the anchor; a tap moves from it to the other side.
    anchors, others = (extents, outs) if transposed else (outs, extents)
    places = [
        _axis(a, o, k, s, p, d, conv.padding_mode)
        for a, o, k, s, p, d in zip(
            anchors, others, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True
        )
    ]
    anchor = other = tap = np.zeros(1, int)
    for (a, o, t), extent, width, taps in zip(
        places, anchors, others, conv.kernel_size, strict=True
    ):
        anchor = (anchor[:, None] * extent + a).reshape(-1)
        other = (other[:, None] * width + o).reshape(-1)
        tap = (tap[:, None] * taps + t).reshape(-1)
    # Channels of the weight: its first axis runs over all anchors' channels, its second in a group.
    first, second = np.divmod(np.arange(size[0] * size[1]), size[1])
    partner = first // (size[0] // conv.groups) * size[1] + second
    rows = first[:, None] * math.prod(anchors) + anchor
    columns = partner[:, None] * math.prod(others) + other
    weight = np.arange(size[0] * size[1])[:, None] * math.prod(conv.kernel_size) + tap
    sizes = (size[0] * math.prod(anchors), size[1] * conv.groups * math.prod(others))
    row, column, weight = rows.reshape(-1), columns.reshape(-1), weight.reshape(-1)
    return (sizes[::-1], column, row, weight) if transposed else (sizes, row, column, weight)


def _axis(
    anchors: int, others: int, taps: int, stride: int, padding: int, dilation: int, mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """On one axis: anchor, the position that a tap reads there, and the tap."""
    found = [
        (a, source_index(a * stride + t * dilation - padding, others, mode), t)
        for a in range(anchors)
        for t in range(taps)
    ]
    triplets = np.array([f for f in found if f[1] is not None], int).reshape(-1, 3)
    return triplets[:, 0], triplets[:, 1], triplets[:, 2]


def conv_site(conv: nn.Module, shape: Sequence[int]) -> Site:
    sizes, row, column, weight = conv_triplets(conv, shape)
    kind = f"conv{len(shape) - 1}d {conv.padding_mode}"
    kind = kind.replace("conv", "transposed conv") if conv.transposed else kind
    return Site(
        kind, _bare(conv), tuple(shape), ("weight",), Pattern.of(*sizes, row, column, weight)
    )


def small_conv(seed: int) -> Site:
    """Every option drawn: kernels larger than maps, wide padding, strides, dilation, groups."""
    layer = random_conv(seed)
    return conv_site(layer.build(), layer.shape)


def larger_conv(rng: random.Random, unknowns: int) -> Site:
    """Two spatial axes, about ``unknowns`` inputs."""
    c = rng.choice((1, 2, 3, 4, 8, 16))
    n = max(3, math.isqrt(unknowns // c))
    k, s = rng.choice((1, 3, 3, 3, 5)), rng.choice((1, 1, 2))
    groups = rng.choice((1, 1, 1, c))
    mode = rng.choice(("zeros", "zeros", "zeros", "circular", "reflect", "replicate"))
    options = {"stride": s, "padding": min(k // 2 + rng.choice((0, 0, 1)), n - 1), "groups": groups}
    if rng.random() < 0.2:
        return conv_site(TRANSPOSED[2](c, groups * rng.randint(1, 3), k, **options), (c, n, n))
    dilation = rng.choice((1, 1, 1, 2)) if n > 2 * k else 1
    made = CONVS[2](c, c * rng.randint(1, 2), k, padding_mode=mode, dilation=dilation, **options)
    return conv_site(made, (c, n, n))


def _ones(tensors: Tensors) -> np.ndarray:
    """The weights, and a value 1 after them."""
    flat = _flat(tensors)
    return np.concatenate([flat, np.ones((len(flat), 1))], 1)


def _dense_triplets(m: int, n: int, start: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    every = np.arange(m * n)
    return every // n, every % n, every + start


def _joined(rows: int, columns: int, *parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Pattern:
    row, column, value = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Pattern.of(rows, columns, row, column, value)


def identity_plus_linear(rng: random.Random) -> Site:
    n = rng.randint(1, 16)
    module = _bare(Lambda(lambda m, x: x + m.a(x), a=nn.Linear(n, n)))
    same = np.arange(n)
    pattern = _joined(n, n, _dense_triplets(n, n), (same, same, np.full(n, n * n)))
    return Site("I + linear", module, (n,), ("a.weight",), pattern, _ones, TAME)


def identity_plus_conv(rng: random.Random) -> Site:
    mode = rng.choice(("zeros", "circular"))
    c, n = rng.randint(1, 2), (rng.randint(3, 4), rng.randint(3, 4))
    conv = nn.Conv2d(c, c, 3, padding=1, padding_mode=mode)
    module = _bare(Lambda(lambda m, x: x + m.a(x), a=conv))
    (size, _), row, column, weight = conv_triplets(conv, (c, *n))
    same = np.arange(size)
    pattern = _joined(
        size, size, (row, column, weight), (same, same, np.full(size, conv.weight.numel()))
    )
    return Site("I + conv", module, (c, *n), ("a.weight",), pattern, _ones, TAME)


def sum_of_branches(rng: random.Random) -> Site:
    m, n = rng.randint(1, 12), rng.randint(1, 12)
    module = _bare(Lambda(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(n, m), b=nn.Linear(n, m)))
    pattern = _joined(m, n, _dense_triplets(m, n), _dense_triplets(m, n, m * n))
    return Site("sum of branches", module, (n,), ("a.weight", "b.weight"), pattern, _flat, TAME)


def concatenated(rng: random.Random) -> Site:
    m, n = rng.randint(1, 8), rng.randint(1, 12)
    module = _bare(Lambda(lambda m, x: torch.cat([m.a(x), x], 1), a=nn.Linear(n, m)))
    same = np.arange(n)
    pattern = _joined(m + n, n, _dense_triplets(m, n), (m + same, same, np.full(n, m * n)))
    return Site("concatenation", module, (n,), ("a.weight",), pattern, _ones, TAME)


def strided_shortcut(rng: random.Random) -> Site:
    c, n = rng.randint(1, 2), rng.randint(3, 4)
    a, b = nn.Conv2d(c, 2, 3, stride=2, padding=1), nn.Conv2d(c, 2, 1, stride=2)
    module = _bare(Lambda(lambda m, x: m.a(x) + m.b(x), a=a, b=b))
    sizes, *main = conv_triplets(a, (c, n, n))
    _, row, column, weight = conv_triplets(b, (c, n, n))
    pattern = _joined(*sizes, tuple(main), (row, column, weight + a.weight.numel()))
    return Site(
        "strided shortcut", module, (c, n, n), ("a.weight", "b.weight"), pattern, _flat, TAME
    )


def batch_norm(rng: random.Random) -> Site:
    """Convolution and batch norm whose standard deviation is a power of two, so nothing rounds."""
    c, n = rng.randint(1, 2), rng.randint(2, 4)
    conv, norm = nn.Conv2d(c, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3, eps=0.125)
    power = 2.0 ** torch.tensor([rng.randint(-1, 6) for _ in range(3)], dtype=torch.float64)
    norm.double().running_var.copy_(power**2 - 0.125)
    module = nn.Sequential(conv, norm).double().eval()
    sizes, row, column, weight = conv_triplets(conv, (c, n, n))

    def values(tensors: Tensors) -> np.ndarray:
        kernel, gain = (t.double() for t in tensors)
        return _flat([kernel * (gain / power).reshape(-1, 3, 1, 1, 1)])

    pattern = Pattern.of(*sizes, row, column, weight)
    return Site(
        "conv + batch norm", module, (c, n, n), ("0.weight", "1.weight"), pattern, values, SHORT
    )  # fmt: skip


def product(rng: random.Random) -> Site:
    """Two matrices in a row; their entries are integers or dyadic, so the product is exact."""
    m, k, n = (rng.randint(1, 12) for _ in range(3))
    module = _bare(nn.Sequential(nn.Linear(n, k), nn.Linear(k, m)))

    def values(tensors: Tensors) -> np.ndarray:
        first, second = (t.double() for t in tensors)
        return _flat([second @ first])

    names = ("0.weight", "1.weight")
    return Site("product", module, (n,), names, Pattern.dense(m, n), values, ("integer", "dyadic"))


def pooled(rng: random.Random) -> Site:
    """Average over 2 x 2 behind a convolution."""
    c, n = rng.randint(1, 2), rng.randint(3, 5)
    conv = nn.Conv2d(c, 2, 3, padding=1)
    module = _bare(nn.Sequential(conv, nn.AvgPool2d(2)))
    sizes, row, column, weight = conv_triplets(conv, (c, n, n))
    channel, place = np.divmod(row, n * n)
    y, x = np.divmod(place, n)
    half = n // 2
    kept = (y < 2 * half) & (x < 2 * half)
    row = (channel * half + y // 2) * half + x // 2
    pattern = Pattern.of(2 * half * half, sizes[1], row[kept], column[kept], weight[kept])
    return Site(
        "pooled conv", module, (c, n, n), ("0.weight",), pattern, lambda t: _flat(t) / 4, TAME
    )  # fmt: skip


COMPOSITES: tuple[Callable[[random.Random], Site], ...] = (
    identity_plus_linear, identity_plus_conv, sum_of_branches, concatenated, strided_shortcut,
    batch_norm, product, pooled,
)  # fmt: skip
