# SPDX-License-Identifier: MIT
"""Operators whose norms are known exactly, by family: C1 to C20 of the adversarial suite.

:data:`FAMILIES` is the table: a family's name to a generator ``(rng, size) -> Construction``;
``construction(family, seed, size)`` is one member of it, the same one at every call. Weights are
held exactly in float64 and, where ``dtype`` says so, in float32 or bfloat16 too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from tests.soundness.geometries import GEOMETRIES
from tests.soundness.operators import EXACT_SIZE, Construction, conv, dense

Generator = np.random.Generator

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
