# SPDX-License-Identifier: MIT
"""The best frequency for fixed vectors, as :func:`lmtfast.engines.frequency.improve` finds it.

For F candidates at once: ``|g(w)|^2`` with ``g(w) = sum_t q_t exp(-i w . tau_t)`` on a grid, then
one damped Newton step, each kept only where it gains. A frequency is a point on the unit circle per
axis throughout, and powers of it are products: no inverse tangent, and sine and cosine only of
the Newton step. The grid runs in float32 from a table of roots of one, everything else in float64.

Circles have the shape (candidates, SLOTS): three right-aligned axes, of which unused ones hold the
angle 0, and one more that fills a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.descriptor import AXES, TAPS, whole
from lmtfast.kernels.symbol_work import (
    GRID_0,
    GRID_1,
    GRID_2,
    ROOT_TABLE,
    SLOTS,
    TAP_TABLE,
    TAP_WIDTH,
    F,
)

BLOCK_TAPS = tl.constexpr(16)
BLOCK_GRID = tl.constexpr(64)
HALF_PI_HIGH = tl.constexpr(1.5707963267948966)
HALF_PI_LOW = tl.constexpr(6.123233995736766e-17)
INVERSE_HALF_PI = tl.constexpr(0.6366197723675814)


@triton.jit
def circles(base, axes, valid):
    """Cosines and sines of the frequencies stored at the pointers ``base``, (n, SLOTS) float64.

    A frequency is the angle of two reals; (1, 0) where there is no axis or no angle.
    """
    a = tl.arange(0, SLOTS)[None, :]
    point = base[:, None] + 2 * (a - 3 + axes)
    present = valid[:, None] & (a < 3) & (a >= 3 - axes)
    c = tl.load(point, present, other=1.0).to(tl.float64)
    s = tl.load(point + 1, present, other=0.0).to(tl.float64)
    length = tl.sqrt(c * c + s * s)
    nowhere = length == 0
    c, length = tl.where(nowhere, 1.0, c), tl.where(nowhere, 1.0, length)
    return c / length, s / length


@triton.jit
def store_circles(base, axes, valid, c, s):
    """What :func:`circles` reads."""
    a = tl.arange(0, SLOTS)[None, :]
    point = base[:, None] + 2 * (a - 3 + axes)
    present = valid[:, None] & (a < 3) & (a >= 3 - axes)
    tl.store(point, c.to(tl.float32), present)
    tl.store(point + 1, s.to(tl.float32), present)


@triton.jit
def tap_offsets(taps, t, mask):
    """Offsets of the taps t, (SLOTS, taps) int32."""
    a = tl.arange(0, SLOTS)[:, None]
    return tl.load(taps + t[None, :] * TAP_WIDTH + a, mask[None, :] & (a < 3), other=0)


@triton.jit
def powers(cosine, sine, n, BITS: tl.constexpr):
    """exp(-i w n) for integers |n| < 2 ** BITS, where cosine and sine are those of w."""
    base_re = cosine + tl.zeros_like(n).to(tl.float64)
    base_im = tl.where(n < 0, sine, -sine)
    m = tl.abs(n)
    re = tl.full(base_re.shape, 1.0, tl.float64)
    im = tl.zeros_like(base_re)
    for bit in tl.static_range(BITS):
        taken = ((m >> bit) & 1) == 1
        next_re = re * base_re - im * base_im
        next_im = re * base_im + im * base_re
        re, im = tl.where(taken, next_re, re), tl.where(taken, next_im, im)
        twice_im = 2.0 * base_re * base_im
        base_re = base_re * base_re - base_im * base_im
        base_im = twice_im
    return re, im


@triton.jit
def slot(x, i: tl.constexpr):
    """x[:, i] of (n, SLOTS, taps)."""
    chosen = (tl.arange(0, SLOTS) == i)[None, :, None]
    return tl.sum(tl.where(chosen, x, 0.0), 1)


@triton.jit
def tap_phases(c, s, offsets, BITS: tl.constexpr):
    """exp(-i w . tau_t), (n, taps) float64."""
    re, im = powers(c[:, :, None], s[:, :, None], offsets[None, :, :], BITS)
    x_re, x_im = slot(re, 2), slot(im, 2)
    for i in tl.static_range(2):
        a, b = slot(re, i), slot(im, i)
        x_re, x_im = x_re * a - x_im * b, x_re * b + x_im * a
    return x_re, x_im


@triton.jit
def sine_and_cosine(x):
    """Of float64 angles: exact reduction for moderate ones, Taylor sums on [-pi / 4, pi / 4]."""
    n = tl.floor(x * INVERSE_HALF_PI + 0.5)
    y = (x - n * HALF_PI_HIGH) - n * HALF_PI_LOW
    y2 = y * y
    s = y2 * (-2.505210838544172e-8 + y2 * 1.6059043836821613e-10)
    s = y2 * (-0.0001984126984126984 + y2 * (2.7557319223985893e-6 + s))
    s = y + y * y2 * (-0.16666666666666666 + y2 * 0.008333333333333333 + y2 * s)
    c = y2 * (-2.755731922398589e-7 + y2 * (2.08767569878681e-9 - y2 * 1.1470745597729725e-11))
    c = y2 * (-0.001388888888888889 + y2 * (2.48015873015873e-5 + c))
    c = 1.0 + y2 * (-0.5 + y2 * (0.041666666666666664 + c))
    # Far away nothing is left of the angle; such a step is no gain and is dropped.
    quadrant = tl.where(tl.abs(n) < 1e9, n, 0.0).to(tl.int64) & 3
    odd = (quadrant & 1) == 1
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where(quadrant >= 2, -sine, sine)
    cosine = tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    return sine, cosine


@triton.jit
def turn(c, s, angle):
    """The circles after a turn by ``angle``."""
    sine, cosine = sine_and_cosine(angle)
    return c * cosine - s * sine, s * cosine + c * sine


@triton.jit
def response(q, n_taps, t, scale):
    """q at the taps t, (F, taps) float64, times ``scale``; 0 beyond the last tap."""
    f = tl.arange(0, F)[:, None]
    mask = (t < n_taps)[None, :] & (f >= 0)
    re = tl.load(q + f * n_taps + t[None, :], mask, other=0.0).to(tl.float64)
    im = tl.load(q + (F + f) * n_taps + t[None, :], mask, other=0.0).to(tl.float64)
    return re * scale[:, None], im * scale[:, None]


@triton.jit
def terms(q, scale, n_taps, taps, t, c, s, BITS: tl.constexpr):
    """q_t exp(-i w . tau_t), (F, taps) float64, and the offsets."""
    re, im = response(q, n_taps, t, scale)
    offsets = tap_offsets(taps, t, t < n_taps)
    a, b = tap_phases(c, s, offsets, BITS)
    return re * a - im * b, re * b + im * a, offsets


@triton.jit
def squared_response(q, scale, n_taps, taps, c, s, BITS: tl.constexpr):
    """|g(w)|^2 of the candidates, (F,) float64."""
    g_re = tl.zeros((F,), tl.float64)
    g_im = tl.zeros((F,), tl.float64)
    for start in range(0, n_taps, BLOCK_TAPS):
        t = start + tl.arange(0, BLOCK_TAPS)
        re, im, offsets = terms(q, scale, n_taps, taps, t, c, s, BITS)
        g_re += tl.sum(re, 1)
        g_im += tl.sum(im, 1)
    return g_re * g_re + g_im * g_im


@triton.jit
def matrix_entry(matrix, i: tl.constexpr, j: tl.constexpr):
    """matrix[:, i, j] of (F, SLOTS, SLOTS)."""
    a = tl.arange(0, SLOTS)
    chosen = (a == i)[None, :, None] & (a == j)[None, None, :]
    return tl.sum(tl.sum(tl.where(chosen, matrix, 0.0), 2), 1)


@triton.jit
def vector_entry(vector, i: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, SLOTS) == i)[None, :], vector, 0.0), 1)


@triton.jit
def newton_step(q, scale, n_taps, taps, c, s, axes, BITS: tl.constexpr):
    """|g|^2 at w, (F,), and the damped Newton step from there, angles (F, SLOTS)."""
    a = tl.arange(0, SLOTS)
    g_re = tl.zeros((F,), tl.float64)
    g_im = tl.zeros((F,), tl.float64)
    first_re = tl.zeros((F, SLOTS), tl.float64)
    first_im = tl.zeros((F, SLOTS), tl.float64)
    second_re = tl.zeros((F, SLOTS, SLOTS), tl.float64)
    second_im = tl.zeros((F, SLOTS, SLOTS), tl.float64)
    for start in range(0, n_taps, BLOCK_TAPS):
        t = start + tl.arange(0, BLOCK_TAPS)
        re, im, offsets = terms(q, scale, n_taps, taps, t, c, s, BITS)
        tau = offsets.to(tl.float64)
        g_re += tl.sum(re, 1)
        g_im += tl.sum(im, 1)
        tau_re, tau_im = tau[None, :, :] * re[:, None, :], tau[None, :, :] * im[:, None, :]
        first_re += tl.sum(tau_re, 2)
        first_im += tl.sum(tau_im, 2)
        second_re += tl.sum(tau_re[:, :, None, :] * tau[None, None, :, :], 3)
        second_im += tl.sum(tau_im[:, :, None, :] * tau[None, None, :, :], 3)
    # Derivatives of g: -i times the first sums, minus the second ones.
    slope = 2.0 * (g_re[:, None] * first_im - g_im[:, None] * first_re)
    hessian = first_re[:, :, None] * first_re[:, None, :]
    hessian += first_im[:, :, None] * first_im[:, None, :]
    hessian += -g_re[:, None, None] * second_re - g_im[:, None, None] * second_im
    hessian *= 2.0
    diagonal = (a[:, None] == a[None, :])[None, :, :]
    own = tl.sum(tl.where(diagonal, hessian, 0.0), 2)
    others = tl.sum(tl.where(diagonal, 0.0, tl.abs(hessian)), 2)
    present = ((a < 3) & (a >= 3 - axes))[None, :]
    # Gershgorin: without damping the Hessian is negative definite where this is negative.
    edge = tl.max(tl.where(present, own + others, -float("inf")), 1)
    damping = tl.where(edge < 0, 0.0, edge + 1e-3 * tl.max(tl.abs(own), 1))
    # An axis that is not there must not make the matrix singular.
    filled = tl.where(present, own - damping[:, None], -1.0)
    hessian = tl.where(diagonal, filled[:, :, None], hessian)
    h00, h01 = matrix_entry(hessian, 0, 0), matrix_entry(hessian, 0, 1)
    h11, h02 = matrix_entry(hessian, 1, 1), matrix_entry(hessian, 0, 2)
    h22, h12 = matrix_entry(hessian, 2, 2), matrix_entry(hessian, 1, 2)
    d0, d1, d2 = vector_entry(slope, 0), vector_entry(slope, 1), vector_entry(slope, 2)
    m00, m01, m02 = h11 * h22 - h12 * h12, h02 * h12 - h01 * h22, h01 * h12 - h02 * h11
    m11, m12, m22 = h00 * h22 - h02 * h02, h01 * h02 - h00 * h12, h00 * h11 - h01 * h01
    inverse = -1.0 / (h00 * m00 + h01 * m01 + h02 * m02)
    x0 = (m00 * d0 + m01 * d1 + m02 * d2) * inverse
    x1 = (m01 * d0 + m11 * d1 + m12 * d2) * inverse
    x2 = (m02 * d0 + m12 * d1 + m22 * d2) * inverse
    step = tl.where((a == 0)[None, :], x0[:, None], 0.0)
    step = tl.where((a == 1)[None, :], x1[:, None], step)
    step = tl.where((a == 2)[None, :], x2[:, None], step)
    return g_re * g_re + g_im * g_im, step


@triton.jit
def root(roots, i, n, offset, mask):
    """exp(-2 pi i (i / n) tau), (points, taps) float32; the taps' offsets may be negative."""
    m = (i[:, None] * tl.load(offset, mask, other=0)[None, :]) % n
    m = tl.where(m < 0, m + n, m)
    inside = mask[None, :] & (i >= 0)[:, None]
    return tl.load(roots + 2 * m, inside, other=0.0), -tl.load(roots + 2 * m + 1, inside, other=0.0)


@triton.jit
def best_on_grid(q, scale, n_taps, taps, roots, n0, n1, n2):
    """Largest |g|^2 on the grid and its flat index, the last axis fastest; (F,) each, float32."""
    peak = tl.full((F,), -1.0, tl.float32)
    index = tl.zeros((F,), tl.int32)
    for first in range(0, n0 * n1 * n2, BLOCK_GRID):
        point = first + tl.arange(0, BLOCK_GRID)
        g_re = tl.zeros((F, BLOCK_GRID), tl.float32)
        g_im = tl.zeros((F, BLOCK_GRID), tl.float32)
        for start in range(0, n_taps, BLOCK_TAPS):
            t = start + tl.arange(0, BLOCK_TAPS)
            entry = taps + t * TAP_WIDTH
            re, im = root(roots, point // (n1 * n2), n0, entry, t < n_taps)
            a, b = root(roots + 2 * n0, point // n2 % n1, n1, entry + 1, t < n_taps)
            re, im = re * a - im * b, re * b + im * a
            a, b = root(roots + 2 * (n0 + n1), point % n2, n2, entry + 2, t < n_taps)
            re, im = (re * a - im * b)[None, :, :], (re * b + im * a)[None, :, :]
            q_re, q_im = response(q, n_taps, t, scale)
            q_re, q_im = q_re.to(tl.float32)[:, None, :], q_im.to(tl.float32)[:, None, :]
            g_re += tl.sum(q_re * re - q_im * im, 2)
            g_im += tl.sum(q_re * im + q_im * re, 2)
        value = g_re * g_re + g_im * g_im
        value = tl.where((point < n0 * n1 * n2)[None, :], value, -1.0)
        here, at = tl.max(value, 1, return_indices=True)
        index = tl.where(here > peak, first + at, index)
        peak = tl.where(here > peak, here, peak)
    return peak, index


@triton.jit
def grid_circles(roots, index, n0, n1, n2):
    """The circles of points of the grid, (F, SLOTS) float64; index (F,)."""
    a = tl.arange(0, SLOTS)[None, :]
    n = tl.where(a == 0, n0, tl.where(a == 1, n1, n2))
    behind = tl.where(a == 0, n1 * n2, tl.where(a == 1, n2, 1))
    first = tl.where(a == 0, 0, tl.where(a == 1, n0, n0 + n1))
    place = roots + 2 * (first + index[:, None] // behind % n)
    inside = (a < 3) & (index >= 0)[:, None]
    c = tl.load(place, inside, other=1.0).to(tl.float64)
    return c, tl.load(place + 1, inside, other=0.0).to(tl.float64)


@triton.jit
def kept_circles(scratch, PLACE: tl.constexpr):
    i = tl.arange(0, F)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    c = tl.load(scratch + 2 * PLACE * F * SLOTS + i)
    return c, tl.load(scratch + (2 * PLACE + 1) * F * SLOTS + i)


@triton.jit
def keep_circles(scratch, PLACE: tl.constexpr, c, s):
    i = tl.arange(0, F)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    tl.store(scratch + 2 * PLACE * F * SLOTS + i, c)
    tl.store(scratch + (2 * PLACE + 1) * F * SLOTS + i, s)
    tl.debug_barrier()


# The parts of the search speak through memory, and are calls: in one chain of values the compiler
# takes far longer. ``scratch`` points to SCRATCH_SIZE float64 of the program's own; circles in
# place PRESENT become those in place FOUND, the response is scaled by what place SCALE holds.
PRESENT, FOUND, TRIAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SCALE, REACHED, LENGTH = ((6 * SLOTS + i) * F for i in range(3))


@triton.jit(noinline=True)
def search_grid(row, q, tap_table, root_table, scratch, BITS: tl.constexpr):
    """The better of the present frequency and the best one on the grid."""
    n_taps = whole(row, TAPS)
    taps = tap_table + tl.load(row + TAP_TABLE)
    roots = root_table + tl.load(row + ROOT_TABLE)
    n0, n1, n2 = whole(row, GRID_0), whole(row, GRID_1), whole(row, GRID_2)
    scale = tl.load(scratch + SCALE + tl.arange(0, F))
    c, s = kept_circles(scratch, PRESENT)
    if n0 * n1 * n2 > 1:
        peak, index = best_on_grid(q, scale, n_taps, taps, roots, n0, n1, n2)
        better = peak > squared_response(q, scale, n_taps, taps, c, s, BITS)
        there_c, there_s = grid_circles(roots, index, n0, n1, n2)
        c = tl.where(better[:, None], there_c, c)
        s = tl.where(better[:, None], there_s, s)
    keep_circles(scratch, FOUND, c, s)


@triton.jit(noinline=True)
def try_newton(row, q, tap_table, scratch, BITS: tl.constexpr):
    """The frequency after a Newton step from the one found, and the value before it."""
    taps = tap_table + tl.load(row + TAP_TABLE)
    scale = tl.load(scratch + SCALE + tl.arange(0, F))
    c, s = kept_circles(scratch, FOUND)
    value, step = newton_step(q, scale, whole(row, TAPS), taps, c, s, whole(row, AXES), BITS)
    c, s = turn(c, s, step)
    tl.store(scratch + REACHED + tl.arange(0, F), value)
    keep_circles(scratch, TRIAL, c, s)


@triton.jit(noinline=True)
def take_better(row, q, tap_table, scratch, BITS: tl.constexpr):
    """The Newton step's frequency where it gains."""
    taps = tap_table + tl.load(row + TAP_TABLE)
    scale = tl.load(scratch + SCALE + tl.arange(0, F))
    value = tl.load(scratch + REACHED + tl.arange(0, F))
    c, s = kept_circles(scratch, FOUND)
    there_c, there_s = kept_circles(scratch, TRIAL)
    better = squared_response(q, scale, whole(row, TAPS), taps, there_c, there_s, BITS) > value
    c = tl.where(better[:, None], there_c, c)
    s = tl.where(better[:, None], there_s, s)
    # All threads have read the circles that are now replaced.
    tl.debug_barrier()
    keep_circles(scratch, FOUND, c, s)


@triton.jit
def search(row, q, tap_table, root_table, scratch, BITS: tl.constexpr):
    """A frequency per candidate at which |g| is no smaller than at the present one."""
    search_grid(row, q, tap_table, root_table, scratch, BITS)
    if whole(row, GRID_0) * whole(row, GRID_1) * whole(row, GRID_2) > 1:
        try_newton(row, q, tap_table, scratch, BITS)
        take_better(row, q, tap_table, scratch, BITS)
