# SPDX-License-Identifier: MIT
"""Independent oracles: exact rational norms, dense convolution matrices, float64 references.

Imports nothing from the library. Exact judgements are in Python integers: every float is a
rational, and a convolution matrix only copies floats (or adds them, where padding folds pixels).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def _integers(matrix: np.ndarray) -> tuple[list[list[int]], int]:
    """Entries times 2**shift, as exact integers."""
    ratios = [[float(x).as_integer_ratio() for x in row] for row in matrix]
    q = max((d for row in ratios for _, d in row), default=1)
    return [[p * (q // d) for p, d in row] for row in ratios], q.bit_length() - 1


def _multiply(left: list[list[int]], right: list[list[int]]) -> list[list[int]]:
    columns = list(zip(*right, strict=True))
    return [[sum(map(int.__mul__, row, column)) for column in columns] for row in left]


def is_positive_semidefinite(matrix: list[list[int]]) -> bool:
    """Exact test of a symmetric integer matrix by fraction-free symmetric elimination (Bareiss).

    A zero pivot is allowed only with a zero row: a positive semidefinite matrix has no other.
    """
    a, previous, live = [row[:] for row in matrix], 1, list(range(len(matrix)))
    while live:
        if any(a[i][i] < 0 for i in live):
            return False
        empty = [i for i in live if a[i][i] == 0]
        if any(a[i][j] for i in empty for j in live):
            return False
        live = [i for i in live if a[i][i] != 0]
        if not live:
            return True
        k = live.pop(0)
        pivot, row = a[k][k], a[k]
        for at, i in enumerate(live):
            factor, target = row[i], a[i]
            for j in live[at:]:
                target[j] = a[j][i] = (target[j] * pivot - factor * row[j]) // previous
        previous = pivot
    return True


def norm_is_at_most(matrix: np.ndarray, bound: float) -> bool:
    """Exact: is the norm of a real matrix <= bound? Decides c^2 I - A A^T >= 0 in integers."""
    if math.isinf(bound):
        return bound > 0
    if bound < 0:
        return False
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.size == 0:
        return True
    return integer_norm_is_at_most(*_integers(matrix), bound)


def integer_norm_is_at_most(rows: list[list[int]], shift: int, bound: float) -> bool:
    """Exact: the same for the matrix ``rows * 2**-shift``, for a finite bound >= 0."""
    if len(rows) > len(rows[0]):
        rows = [list(column) for column in zip(*rows, strict=True)]
    gram = _multiply(rows, [list(column) for column in zip(*rows, strict=True)])
    p, q = float(bound).as_integer_ratio()
    # c^2 4^shift q^2 - q^2 gram, scaled to integers
    square, q = (p << max(shift, 0)) ** 2, q << max(-shift, 0)
    shifted = [[-q * q * g for g in row] for row in gram]
    for i in range(len(shifted)):
        shifted[i][i] += square
    return is_positive_semidefinite(shifted)


def complex_norm_is_at_most(real: np.ndarray, imag: np.ndarray, bound: float) -> bool:
    """Exact: the same for a complex matrix, through its real embedding of twice the size."""
    return norm_is_at_most(np.block([[real, -imag], [imag, real]]), bound)


def rayleigh_exceeds(matrix: np.ndarray, bound: float, vector: np.ndarray | None = None) -> bool:
    """Exact one-sided witness for larger matrices: does |A v| > bound |v| hold for some v?

    True proves ``bound`` unsound. By default v is the top right vector of a float64 SVD; the
    comparison is over the integers.
    """
    if math.isinf(bound):
        return False
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.size == 0 or not matrix.any():
        return bound < 0
    if vector is None:
        scale = 2.0 ** -math.frexp(float(np.abs(matrix).max()))[1]
        vector = np.linalg.svd(matrix * scale)[2][0]
    rows, shift = _integers(matrix)
    v, _ = _integers(vector[None, :])
    image = [sum(map(int.__mul__, row, v[0])) for row in rows]
    p, q = float(bound).as_integer_ratio()
    return sum(y * y for y in image) * q * q > (p << shift) ** 2 * sum(x * x for x in v[0])


def svd_norm(matrix: np.ndarray) -> float:
    """Float64 spectral norm: for tightness only, off by a few units times the size either way."""
    return float(np.linalg.norm(matrix, 2)) if matrix.size else 0.0


def exact_sum_of_squares(values: np.ndarray) -> Fraction:
    """Sum of squares of floats as an exact rational."""
    rows, shift = _integers(np.asarray(values, dtype=np.float64).reshape(1, -1))
    return Fraction(sum(x * x for x in rows[0]), 1 << (2 * shift))


def _pairs(value: int | Sequence, axes: int) -> list[tuple[int, int]]:
    values = [value] * axes if isinstance(value, int) else list(value)
    return [(v, v) if isinstance(v, int) else (int(v[0]), int(v[1])) for v in values]


def _tuple(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def source_index(position: int, length: int, mode: str) -> int | None:
    """Pixel that a padded position reads, or None for a zero; torch's rules."""
    if 0 <= position < length:
        return position
    if mode == "zeros":
        return None
    if mode == "circular":
        return position % length
    if mode == "replicate":
        return min(max(position, 0), length - 1)
    if mode == "reflect":
        return -position if position < 0 else 2 * (length - 1) - position
    raise ValueError(mode)


def output_extent(n: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> int:
    """Output length of a convolution on one axis; zero when the kernel does not fit."""
    return max(0, (n + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1)


def conv_matrix(
    weight: np.ndarray,
    input_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> np.ndarray:
    """Dense matrix of a convolution, entry by entry, acting on inputs flattened as (C, *spatial).

    Args:
        weight: ``(C_out, C_in / groups, k...)``, or for ``transposed``
            ``(C_in, C_out / groups, k...)``, as torch has them. Any number of spatial axes.
        input_shape: ``(C_in, *spatial)``.
        padding: A number, or per axis a number or a pair (low, high).
        output_padding: Extra output rows at the high side; only with ``transposed``.
    """
    axes = weight.ndim - 2
    stride, dilation = _tuple(stride, axes), _tuple(dilation, axes)
    pads, extra = _pairs(padding, axes), _tuple(output_padding, axes)
    channels, spatial, kernel = input_shape[0], tuple(input_shape[1:]), weight.shape[2:]
    taps = list(itertools.product(*map(range, kernel)))
    if transposed:
        out_channels = weight.shape[1] * groups
        out_spatial = tuple(
            (n - 1) * s - p[0] - p[1] + d * (k - 1) + e + 1
            for n, s, p, d, k, e in zip(spatial, stride, pads, dilation, kernel, extra, strict=True)
        )
    else:
        out_channels = weight.shape[0]
        out_spatial = tuple(
            output_extent(n, k, s, p, d)
            for n, k, s, p, d in zip(spatial, kernel, stride, pads, dilation, strict=True)
        )
    matrix = np.zeros((out_channels, *out_spatial, channels, *spatial))
    per_in, per_out = channels // groups, out_channels // groups
    # The strided side walks the anchor; the other side moves by the tap.
    for anchor in itertools.product(*map(range, spatial if transposed else out_spatial)):
        for t in taps:
            moved = [
                a * s + d * i - p[0]
                for a, s, d, i, p in zip(anchor, stride, dilation, t, pads, strict=True)
            ]
            if transposed:
                if any(not 0 <= m < n for m, n in zip(moved, out_spatial, strict=True)):
                    continue
                read, write = anchor, tuple(moved)
            else:
                indices = [
                    source_index(m, n, padding_mode) for m, n in zip(moved, spatial, strict=True)
                ]
                if any(i is None for i in indices):
                    continue
                read, write = tuple(indices), anchor
            for g in range(groups):
                rows = slice(g * per_out, (g + 1) * per_out)
                columns = slice(g * per_in, (g + 1) * per_in)
                block = weight[(slice(None), slice(None), *t)]
                block = block[columns].T if transposed else block[rows]
                matrix[(rows, *write, columns, *read)] += block
    return matrix.reshape(out_channels * math.prod(out_spatial), channels * math.prod(spatial))
