# SPDX-License-Identifier: MIT
"""The separable engine's patterns on the grid, within one program: windows, their products, fold.

Windows X (m, D) of patterns h (n, LANES) hold shift_t h_k at every output; with G the Gram matrix
of y over taps and terms, ||A v||^2 = <X G, X> and a power step in h is the fold of X G, the adjoint
of taking windows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.descriptor import CIRCULAR, IN, OUT, STRIDE, TAPS, whole
from lmtfast.kernels.operator_product import extents, inverse_of, wrapped
from lmtfast.kernels.separable_work import (
    CLASS_FIRST,
    CLASS_LAST,
    CLASS_WIDTH,
    LANES,
    OUT_POINTS,
    VISITS,
)
from lmtfast.kernels.visit_work import VISIT_WIDTH

BLOCK_POINTS, BLOCK_DEPTH, BLOCK_VISITS = tl.constexpr(64), tl.constexpr(32), tl.constexpr(4)


@triton.jit
def shifts(visits, v, mask):
    """Per axis the shifts of visits v."""
    visit = visits + v * VISIT_WIDTH
    e0 = tl.load(visit + 1, mask, other=0)
    return e0, tl.load(visit + 2, mask, other=0), tl.load(visit + 3, mask, other=0)


@triton.jit
def within(i, length):
    return (i >= 0) & (i < length)


@triton.jit
def gather_windows(row, visits, h, windows):
    """X of h."""
    points, n_taps = whole(row, OUT_POINTS), whole(row, TAPS)
    l0, l1, l2 = extents(row, IN)
    o0, o1, o2 = extents(row, OUT)
    s0, s1, s2 = extents(row, STRIDE)
    circular = whole(row, CIRCULAR)
    lane = tl.arange(0, LANES)
    first = visits + tl.load(row + VISITS) * VISIT_WIDTH
    for start in range(0, points, BLOCK_POINTS):
        p = start + tl.arange(0, BLOCK_POINTS)
        x0, x1, x2 = p // (o1 * o2) * s0, p // o2 % o1 * s1, p % o2 * s2
        for t_start in range(0, n_taps, BLOCK_VISITS):
            t = t_start + tl.arange(0, BLOCK_VISITS)
            e0, e1, e2 = shifts(first, t, t < n_taps)
            i0 = wrapped(x0[:, None] + e0[None, :], l0, circular * l0)
            i1 = wrapped(x1[:, None] + e1[None, :], l1, circular * l1)
            i2 = wrapped(x2[:, None] + e2[None, :], l2, circular * l2)
            present = (p < points)[:, None] & (t < n_taps)[None, :]
            reads = present & within(i0, l0) & within(i1, l1) & within(i2, l2)
            i = ((i0 * l1 + i1) * l2 + i2)[:, :, None] * LANES + lane[None, None, :]
            x = tl.load(h + i, reads[:, :, None], other=0.0)
            at = (p[:, None] * n_taps + t[None, :])[:, :, None] * LANES + lane[None, None, :]
            tl.store(windows + at, x, present[:, :, None])
    tl.debug_barrier()


@triton.jit
def fold(row, visits, classes, mixed, h):
    """h of the adjoint of taking windows, by class of positions; the sum of squares, float64."""
    n_taps = whole(row, TAPS)
    l0, l1, l2 = extents(row, IN)
    o0, o1, o2 = extents(row, OUT)
    s0, s1, s2 = extents(row, STRIDE)
    lane = tl.arange(0, LANES)
    squares = tl.zeros((BLOCK_POINTS,), tl.float64)
    for number in range(whole(row, CLASS_FIRST), whole(row, CLASS_LAST)):
        part = classes + number * CLASS_WIDTH
        first, last = tl.load(part), tl.load(part + 1)
        r0, r1, r2 = tl.load(part + 2), tl.load(part + 3), tl.load(part + 4)
        n0, n1, n2 = tl.load(part + 5), tl.load(part + 6), tl.load(part + 7)
        for start in range(0, n0 * n1 * n2, BLOCK_POINTS):
            j = start + tl.arange(0, BLOCK_POINTS)
            present = j < n0 * n1 * n2
            x0, x1, x2 = j // (n1 * n2), j // n2 % n1, j % n2
            total = tl.zeros((BLOCK_POINTS, LANES), tl.float32)
            for v_start in range(first, last, BLOCK_VISITS):
                v = v_start + tl.arange(0, BLOCK_VISITS)
                e0, e1, e2 = shifts(visits, v, v < last)
                p0, p1 = x0[:, None] + e0[None, :], x1[:, None] + e1[None, :]
                p2 = x2[:, None] + e2[None, :]
                reads = present[:, None] & (v < last)[None, :]
                reads = reads & within(p0, o0) & within(p1, o1) & within(p2, o2)
                tap = tl.load(visits + v * VISIT_WIDTH, v < last, other=0)
                p = ((p0 * o1 + p1) * o2 + p2) * n_taps + tap[None, :]
                at = p[:, :, None] * LANES + lane[None, None, :]
                total += tl.sum(tl.load(mixed + at, reads[:, :, None], other=0.0), 1)
            i = ((r0 + s0 * x0) * l1 + r1 + s1 * x1) * l2 + r2 + s2 * x2
            tl.store(h + (i[:, None] * LANES + lane[None, :]), total, present[:, None])
            kept = tl.where(present[:, None], total, 0.0).to(tl.float64)
            squares += tl.sum(kept * kept, 1)
    tl.debug_barrier()
    return tl.sum(squares, 0)


@triton.jit
def scale_to_unit(h, rows, squares):
    """Divides a matrix (rows, LANES) by its length; zero stays zero."""
    inverse = inverse_of(tl.sqrt(squares))
    lane = tl.arange(0, LANES)
    for start in range(0, rows, BLOCK_POINTS):
        i = start + tl.arange(0, BLOCK_POINTS)
        at = h + (i[:, None] * LANES + lane[None, :])
        x = tl.load(at, (i < rows)[:, None], other=0.0).to(tl.float64) * inverse
        tl.store(at, x.to(tl.float32), (i < rows)[:, None])
    tl.debug_barrier()


@triton.jit(noinline=True)
def multiply(x, matrix, product, rows, depth, factor):
    """product (rows, D) = factor x (rows, D) times matrix (D, D)."""
    for start in range(0, rows, BLOCK_POINTS):
        i = start + tl.arange(0, BLOCK_POINTS)
        for j_start in range(0, depth, BLOCK_DEPTH):
            j = j_start + tl.arange(0, BLOCK_DEPTH)
            total = tl.zeros((BLOCK_POINTS, BLOCK_DEPTH), tl.float32)
            for k_start in range(0, depth, BLOCK_DEPTH):
                k = k_start + tl.arange(0, BLOCK_DEPTH)
                left = tl.load(
                    x + (i[:, None] * depth + k[None, :]),
                    (i < rows)[:, None] & (k < depth)[None, :], other=0.0,
                )  # fmt: skip
                right = tl.load(
                    matrix + (k[:, None] * depth + j[None, :]),
                    (k < depth)[:, None] & (j < depth)[None, :], other=0.0,
                )  # fmt: skip
                total = tl.dot(left * factor, right, total, input_precision="ieee")
            written = (i < rows)[:, None] & (j < depth)[None, :]
            tl.store(product + (i[:, None] * depth + j[None, :]), total, written)
    tl.debug_barrier()


@triton.jit
def inner_product(x, y, size):
    """<x, y> over flat entries, float64."""
    total = tl.zeros((BLOCK_POINTS * LANES,), tl.float64)
    for start in range(0, size, BLOCK_POINTS * LANES):
        i = start + tl.arange(0, BLOCK_POINTS * LANES)
        a = tl.load(x + i, i < size, other=0.0).to(tl.float64)
        total += a * tl.load(y + i, i < size, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(noinline=True)
def square(x, rows, depth, factor, gram):
    """gram (D, D) = factor^2 x^T x of x (rows, D)."""
    for i_start in range(0, depth, BLOCK_DEPTH):
        i = i_start + tl.arange(0, BLOCK_DEPTH)
        for j_start in range(0, depth, BLOCK_DEPTH):
            j = j_start + tl.arange(0, BLOCK_DEPTH)
            total = tl.zeros((BLOCK_DEPTH, BLOCK_DEPTH), tl.float32)
            for start in range(0, rows, BLOCK_POINTS):
                r = start + tl.arange(0, BLOCK_POINTS)
                left = tl.load(
                    x + (r[:, None] * depth + i[None, :]),
                    (r < rows)[:, None] & (i < depth)[None, :], other=0.0,
                )  # fmt: skip
                right = tl.load(
                    x + (r[:, None] * depth + j[None, :]),
                    (r < rows)[:, None] & (j < depth)[None, :], other=0.0,
                )  # fmt: skip
                total = tl.dot(
                    tl.trans(left * factor), right * factor, total, input_precision="ieee"
                )
            written = (i < depth)[:, None] & (j < depth)[None, :]
            tl.store(gram + (i[:, None] * depth + j[None, :]), total, written)
    tl.debug_barrier()
