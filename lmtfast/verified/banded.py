# SPDX-License-Identifier: MIT
r"""Verified norms of block-banded operators: a-posteriori Cholesky over rows of the image.

For a symmetric G = A A^T whose blocks G_ij vanish for |i - j| > w, *any* number c and *any* lower
block-banded L of the same bandwidth,

.. math::  c I - G = L L^T + E, \qquad L L^T \succeq 0
           \;\Rightarrow\; \lVert A \rVert^2 = \lambda_{\max}(G) \le c + \lVert E \rVert_2,
           \qquad \lVert E \rVert_2 \le \max_i \sum_j \lVert E_{ij} \rVert_F .

The last step: the norm of a block matrix is at most that of the matrix of its blocks' norms, which
is symmetric, so at most its largest row sum. L is banded, so is E, and only w + 1 rows of blocks
are held. The row sum does not grow with the number of rows, which a Frobenius norm over all of E
would.

One pass forms both the factor and its residual. Block (i, j) of the factor needs
R = D_ij - sum_{k<j} L_ik L_jk^T, D = fl(c I - G), from which a solver that is *not* trusted makes
L_ij; then S = R - L_ij L_jj^T is the computed residual. So the residual costs the products with the
diagonal blocks, not a second factorisation. Term by term, u = 2^-53, i >= j:

1. c I - G_hat - D: only the diagonal is rounded, by at most u |D_ii|: u max|D_ii| in norm.
2. G_hat - G: stated by the source of the blocks (:meth:`GramBlocks.error`).
3. S: every product term and D_ij pass at most depth = sum_k (n_k + 1) + 1 roundings, n_k the inner
   dimensions, in whatever order each product sums; so S differs from
   D_ij - sum_{k<=j} L_ik L_jk^T by at most gamma(depth) (|D_ij|_F + sum_k |L_ik|_F |L_jk|_F).
4. |S|_F, from computed squares.
5. Underflow: each product adds at most UNDERFLOW: below 2 sqrt(n_i n_j) sum_k n_k UNDERFLOW.

L is used as stored; the strictly upper halves of its diagonal blocks are set to zero.

In the spirit of Rump, BIT 51 (2011), 367-384; the proof above is complete.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from lmtfast.verified.rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    add_up,
    gamma_up,
    largest_square_sum,
    mul_up,
    sqrt_up,
    sum_up,
)

# Blocks of fewer rows are merged: below, a call costs more than its arithmetic.
SMALLEST_BLOCK = 256
# Rows per product: above the cache block of every BLAS in use, so that it costs no speed; it lets
# the half of a symmetric or triangular product that nobody reads be skipped.
BLOCK = 512
# A guess above the top eigenvalue by this fraction; on the norm the excess is half of it.
MARGIN = 4e-7
# A refused guess grows by this, then by four times the last step.
WIDEN = 1.6e-6
ATTEMPTS = 12
# Relative residual above which a factorisation counts as failed (good: 1e-8).
ACCEPT = 2.0**-20

# Entries beyond it are the work of a failed factorisation; their squares could overflow.
LARGEST = 2.0**400

Window = deque[dict[int, Tensor]]


class GramBlocks(Protocol):
    """Blocks of G = A A^T, numbered along a band.

    Attributes:
        orders: Order of every diagonal block.
        bandwidth: w; blocks with |i - j| > w are zero.
    """

    orders: list[int]
    bandwidth: int

    def block(self, i: int, j: int) -> Tensor:
        """Computed G_ij, a fresh tensor of shape ``(orders[i], orders[j])``, float64."""
        ...

    def error(self, i: int, j: int) -> float:
        """Bound on the Frobenius norm of (computed - exact) G_ij."""
        ...


def proof_operations(orders: list[int], bandwidth: int) -> float:
    """Floating-point operations of one attempt, within about a fifth."""
    w = min(bandwidth, len(orders) - 1)
    return sum(float(n) ** 3 for n in orders) * (w * w + 2.5 * w + 1.2)


def proof_bytes(orders: list[int], bandwidth: int) -> float:
    """Bytes held at once: the window of the factor and a few blocks in work."""
    w = min(bandwidth, len(orders) - 1)
    return 8.0 * max(orders) ** 2 * ((w + 1) * (w + 2) / 2 + 4)


def squared_norm_upper(gram: GramBlocks, estimate: float) -> float:
    """Verified upper bound on the largest eigenvalue of G.

    Args:
        gram: Its blocks, so scaled that no square overflows.
        estimate: What that eigenvalue is believed to be; positive. Not trusted: a guess that is too
            small is refused and raised, one that is too large is proved as it stands.

    Returns:
        The bound; infinite where every guess was refused.

    Guarantee:
        Rigorous, for float64 products that sum in any order (no Strassen, Winograd or emulation).
    """
    guess, step = estimate * (1.0 + MARGIN), WIDEN
    for _ in range(ATTEMPTS):
        if not 0.0 < guess < math.inf:
            break
        excess = residual_up(gram, guess)
        if excess <= ACCEPT * guess:
            return add_up(guess, excess)
        guess, step = guess * (1.0 + step), 4.0 * step
    return math.inf


def residual_up(gram: GramBlocks, guess: float) -> float:
    """Bound on the norm of E for one guess; infinite where the factorisation fails."""
    w = gram.bandwidth
    sums = [0.0] * len(gram.orders)
    window: Window = deque(maxlen=w + 1)  # rows i - w to i of the factor, by column
    lengths: deque[dict[int, float]] = deque(maxlen=w + 1)
    for i in range(len(gram.orders)):
        window.append({})
        lengths.append({})
        first = max(0, i - w)
        for j in range(first, i + 1):
            found = _block(gram, guess, window, lengths, i, j)
            if not found < math.inf:
                return math.inf
            sums[i] = add_up(sums[i], found)
            if j < i:
                sums[j] = add_up(sums[j], found)
    return max(sums)


def _block(
    gram: GramBlocks,
    guess: float,
    window: Window,
    lengths: deque[dict[int, float]],
    i: int,
    j: int,
) -> float:
    """Factor block (i, j); returns the bound on |E_ij|_F, infinite where it has no factor."""
    row, column = window[-1], window[j - i - 1]
    row_lengths, column_lengths = lengths[-1], lengths[j - i - 1]
    shared = [k for k in row if k in column]
    work = gram.block(i, j).neg_()
    rounded = 0.0
    if i == j:
        diagonal = work.diagonal()
        diagonal.add_(guess)
        rounded = mul_up(UNIT_ROUNDOFF, float(diagonal.abs().max()))
    size = _frobenius_up(work)
    for k in shared:
        _subtract(work, row[k], column[k], symmetric=i == j)
    if i == j:
        factor, info = torch.linalg.cholesky_ex(work)
        if int(info) != 0:
            return math.inf
        row[j] = factor.tril_()
    else:
        solved = torch.linalg.solve_triangular(column[j], work.mT, upper=False)
        row[j] = solved.mT.contiguous()
    row_lengths[j] = _frobenius_up(row[j])
    if not row_lengths[j] < math.inf:
        return math.inf
    _subtract_triangular(work, row[j], column[j], symmetric=i == j)
    residual = _residual_up(work, symmetric=i == j)
    inner = [gram.orders[k] for k in (*shared, j)]
    products = [mul_up(row_lengths[k], column_lengths[k]) for k in (*shared, j)]
    return sum_up(
        (
            residual,
            mul_up(gamma_up(sum(n + 1 for n in inner) + 1), sum_up((size, *products))),
            rounded,
            gram.error(i, j),
            mul_up(2.0 * math.ceil(math.sqrt(work.numel())) * sum(inner), UNDERFLOW),
        )
    )


def _subtract(work: Tensor, left: Tensor, right: Tensor, *, symmetric: bool) -> None:
    """work -= left right^T; of a symmetric result only the lower half, in steps of ``BLOCK``."""
    if not symmetric:
        work.addmm_(left, right.mT, alpha=-1.0)
        return
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        work[start:stop, :stop].addmm_(left[start:stop], right[:stop].mT, alpha=-1.0)


def _subtract_triangular(work: Tensor, left: Tensor, lower: Tensor, *, symmetric: bool) -> None:
    """As :func:`_subtract` for a lower triangular right factor, whose zeros are skipped."""
    for start in range(0, len(lower), BLOCK):
        stop = min(start + BLOCK, len(lower))
        rows = slice(start if symmetric else 0, None)
        work[rows, start:stop].addmm_(left[rows, :stop], lower[start:stop, :stop].mT, alpha=-1.0)


def _residual_up(work: Tensor, *, symmetric: bool) -> float:
    """Bound on |S|_F; of a symmetric S the computed lower half counts twice."""
    if not symmetric:
        return _frobenius_up(work)
    total = 0.0
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        below, here = work[stop:, start:stop], work[start:stop, start:stop]
        if below.numel():
            total = add_up(total, 2.0 * _squares_up(below))
        total = add_up(total, _squares_up(here))
    return sqrt_up(total)


def _squares_up(matrix: Tensor) -> float:
    """Bound on the sum of squares; infinite where an entry is NaN, infinite or absurd."""
    if not matrix.numel():
        return 0.0
    if not float(matrix.abs().max()) < LARGEST:
        return math.inf
    return largest_square_sum(matrix.unsqueeze(0))


def _frobenius_up(matrix: Tensor) -> float:
    return sqrt_up(_squares_up(matrix))


__all__ = ["GramBlocks", "proof_bytes", "proof_operations", "residual_up", "squared_norm_upper"]
