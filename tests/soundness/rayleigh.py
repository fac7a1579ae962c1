# SPDX-License-Identifier: MIT
"""Exact judgement of many norm bounds at once: Rayleigh quotients in integers, and Bareiss.

For any vector v other than 0, ``|A v|^2 / |v|^2 <= |A|^2``, so a bound c with
``c^2 |v|^2 < |A v|^2`` is below the truth. Everything in that comparison is an integer: entries of
A are floats, cut without a remainder into limbs of 20 bits times powers of two, and v is the
rounding of a top singular vector to 30 bits. Only the choice of v is floating point, and a poor
choice can only make the judge milder, never wrong; where the top value stands alone, v loses about
2^-57 of the square.

Imports nothing from the library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tests.oracles import integer_norm_is_at_most

LIMB_BITS = 20
VECTOR_BITS = 30
# Products of a limb and an entry of v, summed over a row, must stay below 2^63.
LONGEST_ROW = 1 << (63 - LIMB_BITS - VECTOR_BITS - 1)
# Beyond this size a block Krylov space replaces the eigensolver.
SOLVED = 1024
KRYLOV_BLOCK, KRYLOV_STEPS = 6, 20


@dataclass(frozen=True)
class Pattern:
    """A matrix that is linear in a list of values: entry ``flat[k][i]`` adds ``index[k][i]``.

    Within one layer k every entry occurs once; ``layers`` is more than one where padding folds
    several values into one entry.
    """

    rows: int
    columns: int
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]

    @staticmethod
    def dense(rows: int, columns: int) -> Pattern:
        """The matrix whose entries are the values in order."""
        every = np.arange(rows * columns)
        return Pattern(rows, columns, ((every, every),))

    @staticmethod
    def of(
        rows: int, columns: int, row: np.ndarray, column: np.ndarray, value: np.ndarray
    ) -> Pattern:
        """From triplets: value number ``value[i]`` is added at ``(row[i], column[i])``."""
        flat = row * columns + column
        order = np.argsort(flat, kind="stable")
        flat, value = flat[order], value[order]
        first = np.searchsorted(flat, flat, side="left")
        turn = np.arange(len(flat)) - first
        layers = [(flat[turn == k], value[turn == k]) for k in range(int(turn.max(initial=-1)) + 1)]
        return Pattern(rows, columns, tuple(layers))

    @property
    def longest_row(self) -> int:
        """The most values that are added up in one row."""
        rows = [flat // self.columns for flat, _ in self.layers]
        return int(np.bincount(np.concatenate(rows)).max(initial=0)) if rows else 0

    def matrices(self, values: np.ndarray) -> np.ndarray:
        """``(R, K)`` values to ``(R, rows, columns)``, of the same dtype."""
        out = np.zeros((len(values), self.rows * self.columns), values.dtype)
        for flat, index in self.layers:
            out[:, flat] += values[:, index]
        return out.reshape(len(values), self.rows, self.columns)


@dataclass(frozen=True)
class Verdicts:
    """Per set: whether the bound is below a Rayleigh quotient, and its relative excess over it."""

    unsound: np.ndarray
    excess: np.ndarray


def limbs(values: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Integers and exponents with ``values[r] = sum(part[r] * 2**exponent[r])``, exactly.

    Leading bits first; each part is below 2^LIMB_BITS. Scaling may push small entries below the
    normal range, but those have no bits in the part that is taken.
    """
    rest, parts = values.astype(np.float64), []
    while rest.any():
        top = np.frexp(np.abs(rest).max(1))[1]
        exponent = np.where(rest.any(1), top - LIMB_BITS, 0)
        part = np.trunc(np.ldexp(rest, -exponent[:, None]))
        rest -= np.ldexp(part, exponent[:, None])
        parts.append((part.astype(np.int64), exponent))
    return parts


def top_vectors(matrices: np.ndarray) -> np.ndarray:
    """Top right singular vectors as integers of VECTOR_BITS bits. ``(R, m, n)`` to ``(R, n)``."""
    count, m, n = matrices.shape
    exponent = np.frexp(np.abs(matrices).reshape(count, -1).max(1))[1]
    scaled = np.ldexp(matrices, -exponent[:, None, None])
    wide = m < n
    gram = scaled @ scaled.mT if wide else scaled.mT @ scaled
    vectors = np.linalg.eigh(gram)[1][..., -1] if min(m, n) <= SOLVED else _krylov(gram)
    if wide:
        vectors = (scaled.mT @ vectors[..., None])[..., 0]
    largest = np.abs(vectors).max(1, keepdims=True)
    largest[largest == 0.0] = 1.0
    return np.rint(vectors / largest * 2.0**VECTOR_BITS).astype(np.int64)


def _krylov(gram: np.ndarray) -> np.ndarray:
    """Ritz vectors of the largest eigenvalue over a block Krylov space from a fixed start."""
    block = np.random.default_rng(0).standard_normal((*gram.shape[:2], KRYLOV_BLOCK))
    basis = []
    for _ in range(KRYLOV_STEPS):
        block = np.linalg.qr(gram @ block)[0]
        basis.append(block)
    span = np.linalg.qr(np.concatenate(basis, -1))[0]
    ritz = np.linalg.eigh(span.mT @ gram @ span)[1][..., -1:]
    return (span @ ritz)[..., 0]


def judge(pattern: Pattern, values: np.ndarray, bounds: np.ndarray) -> Verdicts:
    """Compare every bound with the Rayleigh quotient of its matrix, in integers.

    Args:
        pattern: How values make a matrix.
        values: ``(R, K)`` float64: R sets.
        bounds: ``(R,)`` float64, infinity allowed.
    """
    assert pattern.longest_row <= LONGEST_ROW
    matrices = pattern.matrices(values)
    vectors = top_vectors(matrices)
    parts = [
        (np.matmul(pattern.matrices(part), vectors[..., None])[..., 0], exponent)
        for part, exponent in limbs(values)
    ]
    unsound, excess = np.zeros(len(values), bool), np.zeros(len(values))
    for r, bound in enumerate(bounds.tolist()):
        image, exponent = _sum([(p[r].tolist(), int(e[r])) for p, e in parts], pattern.rows)
        length = sum(x * x for x in vectors[r].tolist())
        truth = sum(y * y for y in image)
        assert truth > 0 or not matrices[r].any(), "a top vector that is none"
        unsound[r], excess[r] = _compare(bound, truth, length, exponent)
    return Verdicts(unsound, excess)


def _sum(parts: list[tuple[list[int], int]], size: int) -> tuple[list[int], int]:
    """Integers and the exponent they share."""
    low = min((e for _, e in parts), default=0)
    total = [0] * size
    for part, exponent in parts:
        if any(part):
            total = [a + (b << (exponent - low)) for a, b in zip(total, part, strict=True)]
    return total, low


def _compare(bound: float, truth: int, length: int, exponent: int) -> tuple[bool, float]:
    """Is bound^2 length < truth 4^exponent; and the relative excess of the bound."""
    if math.isnan(bound) or bound < 0.0:
        return True, math.nan
    if truth == 0:
        return False, 0.0 if bound == 0.0 else math.inf
    if math.isinf(bound):
        return False, math.inf
    p, q = bound.as_integer_ratio()
    left, right = p * p * length, truth * q * q
    left, right = left << max(0, -2 * exponent), right << max(0, 2 * exponent)
    if left < right:
        return True, math.nan
    square = (
        (left - right) / right
        if (left - right).bit_length() < right.bit_length() + 900
        else math.inf
    )
    return False, square / (1.0 + math.sqrt(1.0 + square)) if square < math.inf else math.inf


def bareiss_accepts(pattern: Pattern, values: np.ndarray, bound: float) -> bool:
    """Exact, both ways: is the norm of one set, ``values`` of shape ``(K,)``, at most ``bound``?"""
    parts = [
        (pattern.matrices(part)[0].reshape(-1).tolist(), int(exponent[0]))
        for part, exponent in limbs(values[None])
    ]
    flat, low = _sum(parts, pattern.rows * pattern.columns)
    rows = [flat[i * pattern.columns : (i + 1) * pattern.columns] for i in range(pattern.rows)]
    return integer_norm_is_at_most(rows, -low, bound)
