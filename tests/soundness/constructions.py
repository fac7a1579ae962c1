# SPDX-License-Identifier: MIT
"""Operators whose norms are known exactly, by family: C1 to C20 of the adversarial suite.

:data:`FAMILIES` is the table: a family's name to a generator ``(rng, size) -> Construction``;
``construction(family, seed, size)`` is one member of it, the same one at every call. Weights are
held exactly in float64 and, where ``dtype`` says so, in float32 or bfloat16 too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from lmtfast.backends.reference import Leaves
from lmtfast.graph import Linear, Region, RegionNode
from tests.cases import CONVS, TRANSPOSED
from tests.engine_cases import REF, conv_region, weights_of
from tests.oracles import conv_matrix, norm_is_at_most, rayleigh_exceeds, svd_norm

Generator = np.random.Generator
# Up to so many rows or columns, an operator without a known norm is judged completely.
EXACT_SIZE = 12


@dataclass(frozen=True)
class Construction:
    """A matrix, or a convolution of inputs ``shape``, and the exact square of its norm.

    Attributes:
        name: What it is, for messages.
        weight: ``(m, n)``, or a kernel as torch has it. Float64.
        shape: Of one input: ``(n,)`` for a matrix.
        options: Geometry of the convolution, as ``tests.oracles.conv_matrix`` takes it.
        square: Exact square of the norm, or None where the oracles alone judge.
        dtype: The narrowest dtype that holds the weight.
    """

    name: str
    weight: np.ndarray = field(repr=False)
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    square: Fraction | None = None
    dtype: torch.dtype = torch.float64

    def matrix(self) -> np.ndarray:
        """The operator's matrix. Exact: sums meet only where padding folds dyadic taps."""
        if self.weight.ndim == 2:
            return self.weight
        return conv_matrix(self.weight, self.shape, **self.options)

    def understated_by(self, bound: float) -> bool:
        """Whether ``bound`` is below the norm: decided, or beyond EXACT_SIZE proved by a witness.

        No tolerance: rationals against the known square, integers otherwise.
        """
        if math.isinf(bound):
            return bound < 0
        if self.square is not None:
            return bound < 0 or Fraction(bound) ** 2 < self.square
        matrix = self.matrix()
        if min(matrix.shape) <= EXACT_SIZE:
            return not norm_is_at_most(matrix, bound)
        return rayleigh_exceeds(matrix, bound)

    def within(self, bound: float, excess: float) -> bool:
        """Whether ``bound`` is at most ``1 + excess`` times the norm."""
        if self.square is not None:
            return Fraction(bound) <= 0 or (
                Fraction(bound) ** 2 <= self.square * (1 + Fraction(excess)) ** 2
            )
        return bound <= svd_norm(self.matrix()) * (1 + excess)

    def region(self) -> tuple[Region, Leaves]:
        """The operator as a traced network would hold it, and its weight."""
        weight = torch.from_numpy(self.weight)
        if self.weight.ndim == 2:
            op = Linear("matrix", (weight.shape[1],), (weight.shape[0],), REF)
            return Region("matrix", op.in_shape, op.out_shape, (RegionNode(op, (-1,)),)), (
                weights_of(weight)
            )
        axes = self.weight.ndim - 2
        given = dict(self.options)
        pads = _per_axis(given.pop("padding", 0), axes)
        given["padding"] = tuple(p if isinstance(p, tuple) else (p, p) for p in pads)
        for key in ("stride", "dilation", "output_padding"):
            if key in given:
                given[key] = _per_axis(given[key], axes)
        return conv_region(weight, self.shape, **given), weights_of(weight)

    @property
    def traceable_only(self) -> bool:
        """Whether padding is a map of its own, so that there is no single primitive."""
        return self.options.get("padding_mode", "zeros") in ("reflect", "replicate")

    def module(self) -> nn.Module:
        """The operator as a layer of ``dtype``, in eval mode."""
        weight = torch.from_numpy(self.weight)
        if self.weight.ndim == 2:
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            return _with(layer, weight, self.dtype)
        given, axes = dict(self.options), self.weight.ndim - 2
        groups, transposed = given.get("groups", 1), given.pop("transposed", False)
        pads = _per_axis(given.pop("padding", 0), axes)
        uneven = [p for p in reversed(pads) if isinstance(p, tuple)]
        given["padding"] = 0 if uneven else pads
        c0, c1 = weight.shape[:2]
        ends = (c0, c1 * groups) if transposed else (c1 * groups, c0)
        kind = (TRANSPOSED if transposed else CONVS)[axes]
        layer = _with(kind(*ends, weight.shape[2:], bias=False, **given), weight, self.dtype)
        if not uneven:
            return layer
        border = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d}[axes]
        return nn.Sequential(border([n for p in uneven for n in p], 0.0), layer).eval()


def _per_axis(value: Any, axes: int) -> tuple:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _with(layer: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    layer = layer.to(dtype).eval()
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert torch.equal(layer.weight.detach().double(), weight), "the dtype rounds the weight"
    return layer


def dense(name: str, weight: Any, square: Fraction | int | None = None, **fields: Any) -> Any:
    """A matrix of the table."""
    weight = np.ascontiguousarray(weight, dtype=np.float64)
    known = None if square is None else Fraction(square)
    return Construction(name, weight, (weight.shape[1],), {}, known, **fields)


def conv(
    name: str, weight: Any, shape: tuple[int, ...], square: Fraction | int | None, **options: Any
) -> Construction:
    """A convolution of the table."""
    weight = np.ascontiguousarray(weight, dtype=np.float64)
    known = None if square is None else Fraction(square)
    return Construction(name, weight, shape, options, known)


# -- parts -----------------------------------------------------------------------------------------

PYTHAGOREAN = (
    (3, 4),
    (5, 12),
    (8, 15),
    (1, 2, 2),
    (2, 3, 6),
    (1, 4, 8),
    (2, 4, 5, 6),
    (1, 1, 1, 1),
)


def exact_square(values: np.ndarray) -> Fraction:
    """Sum of squares of floats."""
    return sum((Fraction(float(v)) ** 2 for v in np.ravel(values)), Fraction(0))


def dyadics(rng: Generator, *shape: int) -> np.ndarray:
    """Multiples of 1/16 in (-4, 4)."""
    return rng.integers(-63, 64, shape) / 16.0


def signed_permutation(rng: Generator, n: int) -> np.ndarray:
    return np.diag(rng.choice([-1.0, 1.0], n))[rng.permutation(n)]


def hadamard(order: int) -> np.ndarray:
    """Sylvester's: ``H H^T = order I``."""
    h = np.ones((1, 1))
    while len(h) < order:
        h = np.block([[h, h], [h, -h]])
    return h


def block_diagonal(*blocks: np.ndarray) -> np.ndarray:
    out = np.zeros(tuple(sum(b.shape[i] for b in blocks) for i in (0, 1)))
    row = column = 0
    for b in blocks:
        out[row : row + b.shape[0], column : column + b.shape[1]] = b
        row, column = row + b.shape[0], column + b.shape[1]
    return out


def orthogonal_kernel(rng: Generator, axes: int, channels: int, steps: int) -> np.ndarray:
    """Block convolution of projectors: ``K(z) K(1/z)^T = I``, in quarters.

    Every step multiplies by ``P + (I - P) z`` along one axis, P an orthogonal projector; ``steps``
    per axis give ``steps + 1`` taps.
    """
    kernel = signed_permutation(rng, channels).reshape(channels, channels, *(1,) * axes)
    for axis in np.repeat(np.arange(axes), steps):
        fours = channels // 4 if channels % 4 == 0 else 0
        basis = np.kron(np.eye(fours), hadamard(4) / 2.0) if fours else np.eye(channels)
        p = basis @ np.diag(rng.integers(0, 2, channels)) @ basis.T
        stay = np.einsum("ab,b...->a...", p, kernel)
        move = np.einsum("ab,b...->a...", np.eye(channels) - p, kernel)
        pad = [(0, 0)] * (axes + 2)
        pad[axis + 2] = (0, 1)
        late = list(pad)
        late[axis + 2] = (1, 0)
        kernel = np.pad(stay, pad) + np.pad(move, late)
    return kernel


# -- families --------------------------------------------------------------------------------------


def c1(rng: Generator, size: int) -> Construction:
    """Signed permutations of dyadics: the largest entry."""
    n = int(rng.integers(1, size + 1))
    weight = signed_permutation(rng, n) * dyadics(rng, n)
    return dense(f"signed permutation {n}", weight, Fraction(float(np.abs(weight).max())) ** 2)


def c2(rng: Generator, size: int) -> Construction:
    """Sylvester-Hadamard: all singular values equal, no gap."""
    order = 2 ** int(rng.integers(0, max(1, int(math.log2(size))) + 1))
    scale = 2.0 ** int(rng.integers(-4, 5))
    rows = int(rng.integers(1, order + 1))
    return dense(f"hadamard {rows} of {order}", hadamard(order)[:rows] * scale,
                 order * Fraction(scale) ** 2)  # fmt: skip


def c3(rng: Generator, size: int) -> Construction:
    """Integer circulants: sum of the entries where they are nonnegative, or alternate in sign."""
    kind = rng.choice(["matrix", "1-D", "2-D", "wrapped", "strided"])
    n = 2 * int(rng.integers(1, max(2, size // 2) + 1))
    sign = bool(rng.integers(0, 2))  # with it the top vector is orthogonal to constants
    if kind == "matrix":
        c = rng.integers(0, 6, n) * ((-1.0) ** np.arange(n) if sign else 1.0)
        rolled = np.stack([np.roll(c, i) for i in range(n)])
        return dense(f"circulant {n}", rolled, int(np.abs(c).sum()) ** 2)
    if kind == "2-D":
        n = min(n, 6)
        c = rng.integers(0, 4, (3, 3)) * ((-1.0) ** np.indices((3, 3)).sum(0) if sign else 1.0)
        return conv(f"circular 3 x 3 on {n}", c.reshape(1, 1, 3, 3), (1, n, n),
                    int(np.abs(c).sum()) ** 2, padding=1, padding_mode="circular")  # fmt: skip
    if kind == "wrapped":
        c = rng.integers(0, 5, 2 * n + 1) * ((-1.0) ** np.arange(2 * n + 1) if sign else 1.0)
        return conv(f"circular {2 * n + 1} taps on {n}", c.reshape(1, 1, -1), (1, n),
                    int(np.abs(c).sum()) ** 2, padding=n, padding_mode="circular")  # fmt: skip
    k = 2 * int(rng.integers(0, n // 2)) + 1
    c = rng.integers(0, 7, k)
    if kind == "strided":
        stride = int(rng.choice([s for s in range(1, n + 1) if n % s == 0]))
        phases = [int(c[i::stride].sum()) for i in range(stride)]
        return conv(f"circular {k} taps on {n}, stride {stride}", c.reshape(1, 1, -1), (1, n),
                    sum(p * p for p in phases), padding=k // 2, stride=stride,
                    padding_mode="circular")  # fmt: skip
    c = c * ((-1.0) ** np.arange(k) if sign else 1.0)
    return conv(f"circular {k} taps on {n}", c.reshape(1, 1, -1), (1, n),
                int(np.abs(c).sum()) ** 2, padding=k // 2, padding_mode="circular")  # fmt: skip


def small(rng: Generator, size: int) -> Construction:
    """A matrix of a family whose square is known."""
    found = FAMILIES[rng.choice(["C1", "C2", "C6", "C7"])](rng, max(2, size))
    return found if found.weight.ndim == 2 else c1(rng, size)


def c4(rng: Generator, size: int) -> Construction:
    """Kronecker products, as matrices and as separable circular convolutions."""
    side = max(2, math.isqrt(size))
    a = small(rng, side)
    assert a.square is not None
    if rng.integers(0, 2):
        b = small(rng, side)
        assert b.square is not None
        return dense(f"{a.name} (x) {b.name}", np.kron(a.weight, b.weight), a.square * b.square)
    taps, n = rng.integers(0, 4, 3), int(rng.integers(3, 6))
    return conv(f"{a.name} (x) circular taps", np.multiply.outer(a.weight, taps),
                (a.weight.shape[1], n), a.square * int(taps.sum()) ** 2, padding=1,
                padding_mode="circular")  # fmt: skip


def c5(rng: Generator, size: int) -> Construction:
    """Direct sums, as matrices and as grouped convolutions: the largest part."""
    if rng.integers(0, 2):
        parts = [small(rng, max(2, size // 3)) for _ in range(int(rng.integers(2, 4)))]
        weight = block_diagonal(*(p.weight for p in parts))
        return dense("direct sum", weight, max(p.square for p in parts if p.square is not None))
    groups, channels = int(rng.integers(2, 4)), int(rng.choice([1, 2, 4]))
    scales = 2.0 ** rng.integers(-3, 4, groups)
    kernels = [orthogonal_kernel(rng, 1, channels, 2) * s for s in scales]
    n = int(rng.integers(3, 6))
    return conv(f"{groups} groups of {channels}", np.concatenate(kernels), (groups * channels, n),
                Fraction(float(scales.max())) ** 2, padding=2, groups=groups)  # fmt: skip


def c6(rng: Generator, size: int) -> Construction:
    """Rank one from Pythagorean tuples; a kernel as large as its image is one row."""
    u, v = (np.array(PYTHAGOREAN[int(rng.integers(len(PYTHAGOREAN)))]) for _ in range(2))
    u, v = (rng.permutation(w) * rng.choice([-1, 1], len(w)) for w in (u, v))
    u, v = u[:size], v[:size]
    square = int(u @ u) * int(v @ v)
    if size >= 4 and rng.integers(0, 3) == 0:
        return conv("kernel as large as its image", np.multiply.outer(u, v)[:, None, :],
                    (1, len(v)), square)  # fmt: skip
    return dense("rank one", np.outer(u, v), square)


def c7(rng: Generator, size: int) -> Construction:
    """Householder times the length of its integer vector: ``(v.v) I - 2 v v^T``."""
    n = int(rng.integers(1, size + 1))
    v = rng.integers(-3, 4, n)
    v[0] = v[0] or 1
    return dense(f"householder {n}", int(v @ v) * np.eye(n) - 2 * np.outer(v, v), int(v @ v) ** 2)


def c8(rng: Generator, size: int) -> Construction:
    """Orthogonal convolutions: norm one under every geometry drawn here."""
    kind = rng.choice(["shift", "unshuffle", "shuffle", "pointwise", "blocks", "blocks 2-D"])
    n = int(rng.integers(3, max(4, min(size, 8)) + 1))
    if kind == "shift":
        weight = np.zeros((1, 1, 3, 3))
        weight[(0, 0, *rng.integers(0, 3, 2))] = rng.choice([-1.0, 1.0])
        return conv("shift", weight, (1, n, n), 1, padding=1)
    if kind in ("unshuffle", "shuffle"):
        s = int(rng.integers(2, 4))
        weight = signed_permutation(rng, s * s).reshape(s * s, 1, s, s)
        if kind == "unshuffle":
            return conv("pixel-unshuffle", weight, (1, 2 * s, 2 * s), 1, stride=s)
        return conv("pixel-shuffle", weight, (s * s, 2, 3), 1, stride=s, transposed=True)
    if kind == "pointwise":
        c = int(rng.integers(1, 6))
        weight = signed_permutation(rng, c)[:, :, None, None]
        return conv("1 x 1 signed permutation", weight, (c, 2, 3), 1)
    axes = 2 if kind == "blocks 2-D" else 1
    weight = orthogonal_kernel(rng, axes, int(rng.choice([2, 4])), 2)
    mode = rng.choice(["circular", "full", "transposed"])
    shape = (weight.shape[1], *(min(n, 4) if axes == 2 else n,) * axes)
    if mode == "circular":
        return conv("block convolution, circular", weight, shape, 1, padding=1,
                    padding_mode="circular")  # fmt: skip
    if mode == "full":
        return conv("block convolution, full padding", weight, shape, 1, padding=2)
    return conv("block convolution, transposed", weight, shape, 1, transposed=True)


def c11(rng: Generator, size: int) -> Construction:
    """Any of the above times a power of two in float32; mixed rows; denormals alone."""
    kind = rng.choice(["scaled", "scaled", "mixed rows", "denormal"])
    if kind == "mixed rows":
        n = int(rng.integers(2, max(3, size)))
        exponents = rng.choice([120, -140, -149, 0], n)
        weight = np.ldexp(signed_permutation(rng, n), exponents[:, None])
        return dense("mixed rows", weight, Fraction(2) ** (2 * int(exponents.max())),
                     dtype=torch.float32)  # fmt: skip
    base = FAMILIES[rng.choice(["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8"])](rng, size)
    assert base.square is not None
    largest = float(np.abs(base.weight).max())
    if largest == 0.0:
        return base
    entries = [float(v) for v in np.unique(np.abs(base.weight)) if v]
    top = math.frexp(largest)[1]
    # From the last bit at 2^-149 to the first below 2^128, or below the normal range.
    least = -149 - min(map(_last_bit, entries))
    most = (-126 if kind == "denormal" else 128) - top
    k = int(rng.integers(least, max(least, most) + 1))
    weight = np.ldexp(base.weight, k)
    return replace(base, name=f"{base.name} * 2^{k}", weight=weight,
                   square=base.square * Fraction(4) ** k, dtype=torch.float32)  # fmt: skip


def _last_bit(value: float) -> int:
    """Exponent of the last nonzero bit."""
    p, q = value.as_integer_ratio()
    return (p & -p).bit_length() - q.bit_length()


def c12(rng: Generator, size: int) -> Construction:
    """Gaps of every width down to one unit, and multiplicities, in a rotated basis."""
    n = 2 ** int(rng.integers(1, max(2, int(math.log2(size))) + 1))
    k, multiplicity = int(rng.integers(1, 53)), int(rng.integers(1, n))
    values = np.where(np.arange(n) < multiplicity, 1.0, 1.0 - 2.0**-k)
    if rng.integers(0, 2):
        return dense(f"gap 2^-{k}, {multiplicity} of {n}", np.diag(values), 1)
    # In pairs the rotation is exact: (1 +- (1 - 2^-k)) / 2.
    pair = np.array(
        [[1 - 2.0 ** -(k + 1), 2.0 ** -(k + 1)], [2.0 ** -(k + 1), 1 - 2.0 ** -(k + 1)]]
    )
    return dense(f"rotated gap 2^-{k}", block_diagonal(*[pair] * (n // 2)), 1)


def c13(rng: Generator, size: int) -> Construction:
    """Orthogonal matrices rounded to float32 or bfloat16: the norm is not one any more."""
    n = int(rng.integers(2, min(size, EXACT_SIZE) + 1))
    q = torch.from_numpy(np.linalg.qr(rng.standard_normal((n, n)))[0])
    dtype = (torch.float32, torch.bfloat16)[int(rng.integers(0, 2))]
    return dense(f"orthogonal {n} in {dtype}", q.to(dtype).double().numpy(), dtype=dtype)


def c14(rng: Generator, size: int) -> Construction:
    """Top vectors that a start vector misses: all-ones, a unit vector, seeded normals, signs."""
    n = int(rng.integers(2, max(3, size) + 1))
    kind = rng.choice(["ones", "units", "normals", "signs", "row"])
    if kind == "row":
        return dense("[1, -1]", np.array([[1.0, -1.0]]), 2)
    if kind == "units":
        last = float(rng.integers(2, 1500))
        return dense("diag(1, ..., large)", np.diag([*[1.0] * (n - 1), last]), Fraction(last) ** 2)
    if kind == "normals":
        draws = torch.randn(min(100, n - 1), n, generator=torch.Generator().manual_seed(0))
        v = np.linalg.svd(draws.double().numpy())[2][-1]
        # 40 bits, so that three and four times an entry are exact.
        rank_one = np.outer([3.0, 4.0], np.ldexp(np.round(np.ldexp(v, 40)), -40))
        return dense(f"orthogonal to {n - 1} seeded normals",
                     block_diagonal(np.eye(1), rank_one), exact_square(rank_one))  # fmt: skip
    # a I + b v v^T with v orthogonal to the ones: a + b v.v
    v = np.zeros(n, dtype=int)
    i, j = rng.choice(n, 2, replace=False)
    v[i], v[j] = 1, -1 if kind == "ones" else int(rng.choice([-1, 1]))
    a, b = int(rng.integers(1, 4)), int(rng.integers(1, 700))
    return dense(f"{a} I + {b} v v^T", a * np.eye(n) + b * np.outer(v, v), (a + 2 * b) ** 2)


def c20(rng: Generator, size: int) -> Construction:
    """Random matrices: floats of every size, dyadics, cancelling columns, low rank."""
    shape = [int(n) for n in rng.integers(1, size + 1, 2)]
    kind = rng.choice(["normal", "float32", "dyadic", "cancelling", "wild", "low rank"])
    if kind == "dyadic":
        return dense(kind, dyadics(rng, *shape))
    weight = rng.standard_normal(shape)
    if kind == "float32":
        return dense(kind, weight.astype(np.float32), dtype=torch.float32)
    if kind == "cancelling":
        big = weight * 2.0**30
        return dense(kind, np.concatenate([big, -big + rng.standard_normal(shape)], 1))
    if kind == "wild":
        return dense(kind, np.ldexp(weight, rng.integers(-60, 60, shape)))
    if kind == "low rank":
        return dense(kind, weight[:, :1] * weight[:1])
    return dense(kind, weight)


# Where a geometry surprises: between-grid peaks, borders that fold, kernels that miss or overhang.
GEOMETRIES: tuple[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ("peak between the grid", (1, 1, 7), (1, 7), {"padding": 3}),
    ("peak between the grid, 2-D", (1, 1, 3, 3), (1, 3, 3), {"padding": 1}),
    ("reflect", (2, 1, 3), (1, 5), {"padding": 1, "padding_mode": "reflect"}),
    ("reflect, whole map", (1, 1, 5), (1, 3), {"padding": 2, "padding_mode": "reflect"}),
    ("reflect, 2-D", (1, 1, 3, 3), (1, 3, 4), {"padding": 1, "padding_mode": "reflect"}),
    ("edge, p = 3", (1, 1, 7), (1, 4), {"padding": 3, "padding_mode": "replicate"}),
    ("edge, p = 3, 2-D", (1, 1, 3, 3), (1, 2, 3), {"padding": 3, "padding_mode": "replicate"}),
    ("edge, one pixel", (1, 1, 3), (1, 1), {"padding": 3, "padding_mode": "replicate"}),
    ("even kernel", (2, 2, 4), (2, 5), {"padding": 2}),
    ("even kernel, circular", (1, 2, 2), (2, 5), {"padding": 1, "padding_mode": "circular"}),
    ("dilation larger than the image", (2, 1, 3), (1, 4), {"padding": 5, "dilation": 5}),
    ("stride larger than the kernel", (2, 2, 2), (2, 9), {"stride": 4}),
    ("stride larger than the kernel, 2-D", (3, 1, 1, 2), (1, 5, 7), {"stride": (3, 4)}),
    ("kernel larger than the image", (2, 1, 7), (1, 3), {"padding": 4}),
    ("groups", (4, 1, 3), (4, 4), {"padding": 1, "groups": 4}),
    ("groups, widening", (6, 2, 2), (4, 4), {"groups": 2, "stride": 2}),
    ("transposed", (2, 1, 3), (2, 4), {"transposed": True, "stride": 2, "padding": 1}),
    ("transposed, output padding", (1, 2, 3), (1, 3),
     {"transposed": True, "stride": 3, "padding": 1, "output_padding": 2}),
    ("transposed, 2-D, output padding", (2, 1, 2, 3), (2, 2, 2),
     {"transposed": True, "stride": 2, "padding": 1, "output_padding": (1, 0)}),
    ("transposed, groups", (4, 1, 3), (4, 3), {"transposed": True, "groups": 2, "dilation": 2}),
    ("1 x N", (1, 2, 1, 4), (2, 3, 5), {"padding": (0, 2)}),
    ("one row", (2, 1, 3, 3), (1, 1, 6), {"padding": 1}),
    ("same, uneven", (1, 1, 4), (1, 6), {"padding": ((1, 2),)}),
    ("same, uneven, 2-D", (2, 1, 2, 2), (1, 3, 4), {"padding": ((0, 1), (1, 0))}),
    ("only padding at the ends", (1, 1, 1), (1, 3), {"padding": 4, "stride": 3}),
    ("circular, stride does not divide", (2, 1, 3), (1, 5),
     {"padding": 1, "stride": 2, "padding_mode": "circular"}),
    ("circular, longer than the image", (1, 1, 2), (1, 4),
     {"padding": 3, "padding_mode": "circular"}),
    ("3-D", (1, 1, 2, 1, 2), (1, 3, 2, 2), {"padding": (1, 0, 1), "stride": (2, 1, 1)}),
)  # fmt: skip


def c17(rng: Generator, size: int) -> Construction:
    """Every geometry of the table with a dyadic, all-ones or alternating kernel."""
    name, kernel, shape, options = GEOMETRIES[int(rng.integers(len(GEOMETRIES)))]
    return geometry(name, kernel, shape, options, rng)


def geometry(
    name: str, kernel: tuple[int, ...], shape: tuple[int, ...], options: dict[str, Any],
    rng: Generator,
) -> Construction:  # fmt: skip
    """One row of GEOMETRIES with a kernel drawn for it."""
    kind = rng.choice(["dyadic", "dyadic", "ones", "alternating"])
    weight = dyadics(rng, *kernel)
    if kind == "ones":
        weight = np.ones(kernel)
    elif kind == "alternating":
        weight = (-1.0) ** np.indices(kernel).sum(0)
    return conv(f"{name}, {kind}", weight, shape, None, **options)


FAMILIES: dict[str, Callable[[Generator, int], Construction]] = {
    "C1": c1, "C2": c2, "C3": c3, "C4": c4, "C5": c5, "C6": c6, "C7": c7, "C8": c8, "C11": c11,
    "C12": c12, "C13": c13, "C14": c14, "C17": c17, "C20": c20,
}  # fmt: skip


def construction(family: str, seed: int, size: int = 8) -> Construction:
    """Member ``seed`` of a family, of about ``size`` rows and columns."""
    return FAMILIES[family](np.random.default_rng([zlib.crc32(family.encode()), seed]), size)
