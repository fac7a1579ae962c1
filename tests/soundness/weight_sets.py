# SPDX-License-Identifier: MIT
"""Random and adversarial weight sets: a table of generators, many sets per call.

A generator takes a random generator, a count R and a shape (m, n), and gives ``(R, m, n)`` float64;
kernels of convolutions are drawn as matrices of their output channels by everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Random = np.random.Generator
Draw = Callable[[Random, int, int, int], np.ndarray]


def _powers(rng: Random, count: int, low: int, high: int) -> np.ndarray:
    return 2.0 ** rng.integers(low, high, (count, 1, 1)).astype(float)


def _eye(m: int, n: int) -> np.ndarray:
    return np.eye(m, n)[None]


def gaussian(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    return rng.standard_normal((count, m, n))


def orthogonal(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """Orthonormal rows or columns, up to rounding."""
    q = np.linalg.qr(rng.standard_normal((count, max(m, n), min(m, n))))[0]
    return q if m >= n else q.mT


def _with_spectrum(rng: Random, spectrum: np.ndarray, m: int, n: int) -> np.ndarray:
    """``spectrum`` (R, min(m, n)) between random orthonormal factors."""
    count, rank = spectrum.shape
    return orthogonal(rng, count, m, rank) * spectrum[:, None] @ orthogonal(rng, count, rank, n)


def near_multiple(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """Several top values within 2^-k, k up to 52."""
    rank = min(m, n)
    below = (np.arange(rank) >= rng.integers(1, rank + 1, (count, 1))).astype(float)
    gap = 2.0 ** -rng.integers(1, 53, (count, 1)).astype(float)
    return _with_spectrum(rng, 1.0 - gap * below, m, n)


def gaps(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """diag(1, 1 - 2^-k, ...), permuted, with signs, at any scale."""
    rank = min(m, n)
    values = 1.0 - 2.0 ** -rng.integers(1, 53, (count, rank)).astype(float)
    values[:, 0] = 1.0
    values *= rng.choice((-1.0, 1.0), (count, rank))
    return _placed(rng, values, m, n) * _powers(rng, count, -149, 128)


def _placed(rng: Random, values: np.ndarray, m: int, n: int) -> np.ndarray:
    """``(R, min(m, n))`` values on a diagonal whose rows and columns are permuted."""
    out = np.zeros((len(values), m, n))
    at = np.arange(min(m, n))
    out[:, rng.permutation(m)[at], rng.permutation(n)[at]] = values
    return out


def signed_permutation(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    return _placed(rng, rng.integers(-8, 9, (count, min(m, n))) / 4.0, m, n)


def hadamard(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """A corner of Sylvester's matrix, times a power of two; all values equal where it is whole."""
    order = 1 << (max(m, n) - 1).bit_length()
    i = np.arange(order)
    bits = np.bitwise_and(i[:, None], i)
    odd = sum((bits >> k) & 1 for k in range(order.bit_length())) % 2
    return (1.0 - 2.0 * odd)[:m, :n] * _powers(rng, count, -149, 128)


def circulant(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """Integer circulants: of one sign, of alternating sign (top vector orthogonal to ones), any."""
    first = rng.integers(0, 5, (count, n)).astype(float)
    kind = rng.integers(0, 3, (count, 1))
    alternating = np.where(np.arange(n) % 2, -1.0, 1.0)
    first *= np.where(kind == 0, 1.0, alternating)
    first *= np.where(kind == 2, rng.choice((-1.0, 1.0), (count, n)), 1.0)
    return first[:, (np.arange(n) - np.arange(m)[:, None]) % n]


def direct_sum(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """Two blocks; the larger norm sits in either, by a factor from 1 to 2^8."""
    i, j = rng.integers(1, max(2, m)), rng.integers(1, max(2, n))
    out = gaussian(rng, count, m, n)
    out[:, i:, :j] = out[:, :i, j:] = 0.0
    out[:, :i] *= _powers(rng, count, -8, 9)
    return out


def low_rank(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    rank = int(rng.integers(1, 1 + max(1, min(m, n) // 2)))
    return gaussian(rng, count, m, rank) @ gaussian(rng, count, rank, n)


def rank_one_integer(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    a, b = rng.integers(-9, 10, (count, m, 1)), rng.integers(-9, 10, (count, 1, n))
    return (a * b).astype(float)


def mixed_rows(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    powers = rng.choice((120, 0, -1, -60, -140), (count, m, 1))
    return np.ldexp(gaussian(rng, count, m, n), powers)


def graded(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    return np.ldexp(gaussian(rng, count, m, n), rng.integers(-300, 300, (count, m, n)))


def denormal(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """A few units of 2^-1074, or normal numbers that reach below 2^-1022."""
    units = rng.integers(-5, 6, (count, m, n)) * 5e-324
    edge = np.ldexp(gaussian(rng, count, m, n), -rng.integers(1015, 1060, (count, 1, 1)))
    return np.where(rng.random((count, 1, 1)) < 0.5, units, edge)


def sparse(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    kept = rng.random((count, m, n)) < rng.choice((0.02, 0.1, 0.3), (count, 1, 1))
    return gaussian(rng, count, m, n) * kept


def householder(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """I - 2 v v^T / |v|^2 for an integer v; with 1, 4 or 16 ones in v it has dyadic entries."""
    size = max(m, n)
    v = rng.integers(-3, 4, (count, size)).astype(float)
    ones = (np.arange(size) < 4 ** rng.integers(0, 3, (count, 1))).astype(float)
    v = np.where(rng.random((count, 1)) < 0.5, v, ones)
    v[:, 0] += v.any(1) == 0
    lengths = (v * v).sum(1)[:, None, None]
    return (_eye(size, size) - 2.0 * v[:, :, None] * v[:, None] / lengths)[:, :m, :n]


def kronecker(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    a = rng.integers(-2, 3, (count, 2, 2))
    b = rng.integers(-3, 4, (count, -(-m // 2), -(-n // 2)))
    product = np.einsum("rij,rkl->rikjl", a, b)
    return product.reshape(count, 2 * b.shape[1], 2 * b.shape[2])[:, :m, :n].astype(float)


def cancelling(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """Columns [B, B + small, -B, ...]: large entries whose combinations cancel."""
    part = -(-n // 3)
    big = gaussian(rng, count, m, part) * 2.0**30
    return np.concatenate([big, big + gaussian(rng, count, m, part), -big], 2)[:, :, :n]


def one_sided(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """All entries equal, or all in one narrow band: roundings of sums all point the same way."""
    value = rng.uniform(0.5, 1.0, (count, 1, 1))
    return value * (1.0 + rng.integers(0, 3, (count, m, n)) * 2.0 ** -rng.integers(20, 53))


def full_mantissas(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """2 - k 2^-52 and 1 + k 2^-52: products round worst."""
    steps = rng.integers(0, 4, (count, m, n)) * 2.0**-52
    signs = rng.choice((-1.0, 1.0), (count, m, n))
    return signs * np.where(rng.random((count, m, n)) < 0.5, 2.0 - 2.0**-52 - steps, 1.0 + steps)


def nilpotent(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    return np.triu(rng.integers(-3, 4, (count, m, n)), 1).astype(float)


def dominated(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """One entry far above the rest: the norm is that entry and a little more."""
    out = gaussian(rng, count, m, n) * 2.0 ** -rng.integers(10, 60, (count, 1, 1)).astype(float)
    out[:, rng.integers(0, m), rng.integers(0, n)] = rng.uniform(1.0, 2.0, count)
    return out


def repeated_rows(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    """Few distinct rows, with signs: ties everywhere."""
    rows = gaussian(rng, count, max(1, m // 3), n)
    return rows[:, rng.integers(0, rows.shape[1], m)] * rng.choice((-1.0, 1.0), (count, m, 1))


def scaled(rng: Random, count: int, m: int, n: int) -> np.ndarray:
    return gaussian(rng, count, m, n) * _powers(rng, count, -1000, 1000)


def _times(draw: Draw, low: int, high: int) -> Draw:
    return lambda rng, count, m, n: draw(rng, count, m, n) * _powers(rng, count, low, high)


@dataclass(frozen=True)
class Generator:
    """Attributes:
    draw: Many sets of one shape.
    dtype: The values are rounded to it, and the library is handed tensors of it.
    tame: Neither huge nor tiny, so that products of a few of them stay in range.
    """

    draw: Draw
    dtype: torch.dtype = torch.float64
    tame: bool = True

    def __call__(self, rng: Random, count: int, m: int, n: int) -> torch.Tensor:
        """``(count, m, n)`` tensors of ``dtype``."""
        return torch.from_numpy(np.ascontiguousarray(self.draw(rng, count, m, n))).to(self.dtype)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

GENERATORS: dict[str, Generator] = {
    "gaussian": Generator(gaussian),
    "gaussian float32": Generator(gaussian, F32),
    "gaussian bfloat16": Generator(gaussian, BF16),
    "gaussian float16": Generator(gaussian, F16),
    "uniform": Generator(lambda rng, count, m, n: rng.random((count, m, n))),
    "scaled by 2^k": Generator(scaled, tame=False),
    "scaled by 2^k, float32": Generator(_times(gaussian, -140, 120), F32, tame=False),
    "mixed rows": Generator(mixed_rows, tame=False),
    "graded": Generator(graded, tame=False),
    "denormal": Generator(denormal, tame=False),
    "denormal float32": Generator(_times(gaussian, -149, -120), F32, tame=False),
    "near overflow": Generator(
        lambda rng, count, m, n: rng.uniform(-1, 1, (count, m, n)) * 1e300, tame=False
    ),
    "near-multiple top": Generator(near_multiple),
    "near-multiple top, float32": Generator(near_multiple, F32),
    "gaps": Generator(gaps, tame=False),
    "orthogonal": Generator(orthogonal),
    "orthogonal float32": Generator(orthogonal, F32),
    "orthogonal bfloat16": Generator(orthogonal, BF16),
    "signed permutation": Generator(signed_permutation),
    "hadamard": Generator(hadamard, tame=False),
    "circulant": Generator(circulant),
    "direct sum": Generator(direct_sum),
    "low rank": Generator(low_rank),
    "rank one, integer": Generator(rank_one_integer),
    "sparse": Generator(sparse),
    "integer": Generator(lambda rng, count, m, n: rng.integers(-3, 4, (count, m, n)) * 1.0),
    "dyadic": Generator(lambda rng, count, m, n: rng.integers(-64, 65, (count, m, n)) / 64.0),
    "householder": Generator(householder),
    "kronecker": Generator(kronecker),
    "cancelling": Generator(cancelling),
    "one-sided": Generator(one_sided),
    "full mantissas": Generator(full_mantissas),
    "nilpotent": Generator(nilpotent),
    "dominated": Generator(dominated),
    "repeated rows": Generator(repeated_rows),
}
