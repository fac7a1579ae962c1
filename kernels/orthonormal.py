# SPDX-License-Identifier: MIT
"""QR of a tall matrix with LANES columns by Householder reflections, within one program.

Columns that depend on those before them get a zero on the diagonal and a direction of their own.
Entries are float32, sums and reflections float64. Threads read each other's rows only behind a
barrier; a block has at least as many entries as a program has threads, so that each entry has one
owner.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.separable_work import LANES

BLOCK_ROWS = tl.constexpr(64)


@triton.jit
def block_of_rows(data, i, mask):
    """Rows i of the matrix, (rows, LANES) float64."""
    lane = tl.arange(0, LANES)
    return tl.load(data + i[:, None] * LANES + lane[None, :], mask[:, None], other=0.0).to(
        tl.float64
    )


@triton.jit
def column(x, k):
    """Column k of a block."""
    lane = tl.arange(0, LANES)
    return tl.sum(tl.where((lane == k)[None, :], x, 0.0), 1)


@triton.jit
def only(x, k):
    """Entry k of a row."""
    return tl.sum(tl.where(tl.arange(0, LANES) == k, x, 0.0), 0)


@triton.jit
def products_below(data, k, size):
    """Of column k with every column, over the rows below row k. (LANES,) float64."""
    total = tl.zeros((LANES,), tl.float64)
    for start in range(0, size, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        x = block_of_rows(data, i, (i < size) & (i > k))
        total += tl.sum(column(x, k)[:, None] * x, 0)
    return total


@triton.jit(noinline=True)
def orthonormalise(data, size, rank, triangle):
    """The matrix (size, LANES), whose first ``rank`` <= size columns count, becomes orthonormal
    columns and zeros; ``triangle`` gets the upper factor (LANES, LANES), its further rows zero, and
    behind it LANES entries of scratch."""
    lane = tl.arange(0, LANES)
    square = lane[:, None] * LANES + lane[None, :]
    tl.store(triangle + square, tl.zeros((LANES, LANES), tl.float32))
    factors = triangle + LANES * LANES
    tl.debug_barrier()
    for k in range(0, rank):
        dot = products_below(data, k, size)
        row = tl.load(data + k * LANES + lane).to(tl.float64)
        alpha, below = only(row, k), only(dot, k)
        norm = tl.sqrt(alpha * alpha + below)
        done = below == 0
        beta = tl.where(done, alpha, tl.where(alpha > 0, -norm, norm))
        factor = tl.where(done, 0.0, 1.0 / tl.where(done, 1.0, alpha - beta))
        reflection = tl.where(done, 0.0, (beta - alpha) / tl.where(done, 1.0, beta))
        dot = tl.where(lane > k, (dot * factor + row) * reflection, 0.0)
        tl.store(factors + k, reflection.to(tl.float32))
        entry = tl.where(lane == k, beta, row - dot)
        tl.store(triangle + k * LANES + lane, entry.to(tl.float32), lane >= k)
        # All sums are taken before a row changes.
        tl.debug_barrier()
        for start in range(0, size, BLOCK_ROWS):
            i = start + tl.arange(0, BLOCK_ROWS)
            x = block_of_rows(data, i, (i < size) & (i > k))
            reflector = (column(x, k) * factor)[:, None]
            x = tl.where((lane == k)[None, :], reflector, x - dot[None, :] * reflector)
            written = ((i < size) & (i > k))[:, None] & (lane >= k)[None, :]
            tl.store(data + i[:, None] * LANES + lane[None, :], x.to(tl.float32), written)
        tl.debug_barrier()
    # The columns of the product of the reflections, last first.
    for j in range(0, rank):
        k = rank - 1 - j
        reflection = tl.load(factors + k).to(tl.float64)
        dot = tl.where(lane > k, products_below(data, k, size) * reflection, 0.0)
        tl.debug_barrier()
        for start in range(0, size, BLOCK_ROWS):
            i = start + tl.arange(0, BLOCK_ROWS)
            x = block_of_rows(data, i, (i < size) & (i >= k))
            head = (i == k)[:, None]
            reflector = tl.where(head, 1.0, column(x, k)[:, None])
            own = tl.where(head, 1.0, 0.0) - reflection * reflector
            x = tl.where(head, 0.0, x) - dot[None, :] * reflector
            x = tl.where((lane == k)[None, :], own, x)
            written = ((i < size) & (i >= k))[:, None] & (lane >= k)[None, :]
            tl.store(data + i[:, None] * LANES + lane[None, :], x.to(tl.float32), written)
        tl.debug_barrier()
