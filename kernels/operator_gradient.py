# SPDX-License-Identifier: MIT
"""Power iteration: the gradient of sigma in every kernel, u v^T seen through the operator.

dW[o, c, t] = g rs_o cs_c sum over positions p of x[o, p] y[c, s p + d t - pad], where x is the
vector on the stencil's output side and y the one on its input side, as saved by the step. One
program owns a tile of rows times channels of a weight, all its taps, and adds the operators that
share the weight in the order of the table. With SCALES it also leaves its part of the gradients in
the row and column scales, sums of W dA over its columns and rows, for
:mod:`lmtfast.kernels.scale_gradient` to add in order. One launch.

Floor: 2 flop per weight and output position, 10.5 GFLOP for WRN-28-10, 157 us at 67 TFLOP/s in
float32; every gradient written once, 34 us at 4.3 TB/s. float32 by default, TF32 as for the
products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.channel_scale import scale_of
from lmtfast.kernels.descriptor import (
    CHANNELS,
    CIRCULAR,
    COLUMN_SCALE,
    DTYPE_NAMES,
    GROUPS,
    IN,
    NUMBER,
    OUT,
    ROW_SCALE,
    ROWS,
    SAVED,
    STRIDE,
    TAPS,
    TENSOR_WIDTH,
    TRANSPOSED,
    entries,
    specialized,
    store_entries,
    stored_entries,
    whole,
)
from lmtfast.kernels.gradient_work import GRADIENT_SIDES, GROUP_TILE_WIDTH
from lmtfast.kernels.operator_product import extents, wrapped
from lmtfast.kernels.operator_work import (
    COLUMN_SUMS,
    IMAGE_SIZE,
    IN_POINTS,
    OPERATOR_WIDTH,
    OUT_POINTS,
    ROW_SUMS,
    VISITS,
)
from lmtfast.kernels.specialization import Specialization
from lmtfast.kernels.visit_work import VISIT_WIDTH

TILE_WIDTH = tl.constexpr(GROUP_TILE_WIDTH)
LARGE, SMALL = (tl.constexpr(side) for side in GRADIENT_SIDES)
GRADIENT_GEOMETRY = {"num_warps": 8, "num_stages": 2}


@triton.jit
def operator_gradient(
    operators, tensors, visits, tiles, sharers, targets, saved, grad_sigmas, grad_scales, gradients,
    DTYPES: tl.constexpr, SCALES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile (gradient_work.group_tiles) of a weight's gradient, and its part of those in the
    scales.

    ``targets`` holds per tensor the byte at which its gradient starts in ``gradients``, or -1.
    """
    item = tiles + tl.program_id(0) * TILE_WIDTH
    if SCALES | (tl.load(targets + tl.load(item)) >= 0):
        if tl.load(item + 8) == SMALL:
            gradient_tile(
                operators, tensors, visits, item, sharers, targets, saved, grad_sigmas,
                grad_scales, gradients, DTYPES, SCALES, PRECISION, SMALL,
            )  # fmt: skip
        else:
            gradient_tile(
                operators, tensors, visits, item, sharers, targets, saved, grad_sigmas,
                grad_scales, gradients, DTYPES, SCALES, PRECISION, LARGE,
            )  # fmt: skip


@triton.jit
def gradient_tile(
    operators, tensors, visits, item, sharers, targets, saved, grad_sigmas, grad_scales, gradients,
    DTYPES: tl.constexpr, SCALES: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    tensor = tensors + tl.load(item) * TENSOR_WIDTH
    address, code = tl.load(tensor), tl.load(tensor + 1)
    tap_major = tl.load(tensor + 3) != 0
    target = tl.load(targets + tl.load(item))
    first, last = tl.load(item + 1), tl.load(item + 2)
    row_first, row_last = tl.load(item + 3), tl.load(item + 4)
    channel_first, channel_last = tl.load(item + 5), tl.load(item + 6)
    some = operators + tl.load(sharers + first) * OPERATOR_WIDTH
    channels, n_taps = whole(some, CHANNELS), whole(some, TAPS)
    columns = channels * n_taps
    # In float32 all of a step's operands pass through registers.
    BLOCK_P: tl.constexpr = 16 if SCALES or PRECISION == "ieee" else 32
    r = row_first + tl.arange(0, SIDE)
    c = channel_first + tl.arange(0, SIDE)
    inside = (r < row_last)[:, None] & (c < channel_last)[None, :]
    start = columns.to(tl.int64) * row_first
    for sharer in range(first, last):
        row = operators + tl.load(sharers + sharer) * OPERATOR_WIDTH
        group = row_first // whole(row, ROWS)
        n_in, n_out = whole(row, IN_POINTS), whole(row, OUT_POINTS)
        image, vector = saved + tl.load(row + SAVED), saved + tl.load(row + SAVED)
        vector += tl.load(row + IMAGE_SIZE)
        if tl.load(row + TRANSPOSED) != 0:
            outputs, inputs = vector, image
        else:
            outputs, inputs = image, vector
        outputs += row_first.to(tl.int64) * n_out
        inputs += (group * channels + channel_first).to(tl.int64) * n_in
        l0, l1, l2 = extents(row, IN)
        o0, o1, o2 = extents(row, OUT)
        s0, s1, s2 = extents(row, STRIDE)
        circular = whole(row, CIRCULAR)
        g = tl.load(grad_sigmas + tl.load(row + NUMBER))
        row_scale = scale_of(saved, tl.load(row + ROW_SCALE), r, r < row_last)
        column_scale = scale_of(
            saved, tl.load(row + COLUMN_SCALE), group * channels + c, c < channel_last
        )
        row_sum = tl.zeros((SIDE,), tl.float64)
        column_sum = tl.zeros((SIDE,), tl.float64)
        for t in range(0, n_taps):
            visit = visits + (whole(row, VISITS) + t) * VISIT_WIDTH
            e0, e1, e2 = tl.load(visit + 1), tl.load(visit + 2), tl.load(visit + 3)
            total = tl.zeros((SIDE, SIDE), tl.float32)
            for p_start in range(0, n_out, BLOCK_P):
                p = p_start + tl.arange(0, BLOCK_P)
                i0 = wrapped(p // (o1 * o2) * s0 + e0, l0, circular * l0)
                i1 = wrapped(p // o2 % o1 * s1 + e1, l1, circular * l1)
                i2 = wrapped(p % o2 * s2 + e2, l2, circular * l2)
                reads = (p < n_out) & (i0 >= 0) & (i0 < l0) & (i1 >= 0) & (i1 < l1)
                reads = reads & (i2 >= 0) & (i2 < l2)
                i = (i0 * l1 + i1) * l2 + i2
                x = tl.load(
                    outputs + (r - row_first)[:, None] * n_out + p[None, :],
                    (r < row_last)[:, None] & (p < n_out)[None, :], other=0.0,
                )  # fmt: skip
                # Positions come first, so that neighbouring threads read neighbouring ones.
                y = tl.load(
                    inputs + i[:, None] + (c - channel_first)[None, :] * n_in,
                    reads[:, None] & (c < channel_last)[None, :], other=0.0,
                )  # fmt: skip
                total = tl.dot(x, y, total, input_precision=PRECISION)
            total *= g
            k = c * n_taps + t
            if tap_major:
                k = t * channels + c
            at = (r - row_first)[:, None] * columns + k[None, :]
            if SCALES:
                w = entries(address, code, start, at, inside, DTYPES, False) * total
                row_sum += tl.sum(w * column_scale[None, :], 1).to(tl.float64)
                column_sum += tl.sum(w * row_scale[:, None], 0).to(tl.float64)
            if target >= 0:
                total *= row_scale[:, None] * column_scale[None, :]
                if (sharer > first) | (tl.load(item + 9) != 0):
                    total += stored_entries(
                        gradients + target, code, start, at, inside, DTYPES, False
                    )  # fmt: skip
                store_entries(gradients + target, code, start, at, total, inside, DTYPES, False)
        if SCALES:
            rows = whole(row, GROUPS) * whole(row, ROWS)
            if tl.load(row + ROW_SCALE) >= 0:
                part = tl.load(row + ROW_SUMS) + (channel_first // SIDE) * rows
                tl.store(grad_scales + part + r, row_sum, r < row_last)
            if tl.load(row + COLUMN_SCALE) >= 0:
                every = whole(row, GROUPS) * channels
                part = tl.load(row + COLUMN_SUMS) + tl.load(item + 7) * every + group * channels
                tl.store(grad_scales + part + c, column_sum, c < channel_last)


def shipped() -> list[Specialization]:
    """Each dtype of weights, and several in one network; with gradients in scales, and TF32."""
    found = [
        specialized(
            operator_gradient, name, GRADIENT_GEOMETRY, DTYPES=code, SCALES=False, PRECISION="ieee"
        )
        for name, code in zip((*DTYPE_NAMES, "several dtypes"), (0, 1, 2, -1), strict=True)
    ]
    for precision in ("ieee", "tf32"):
        found.append(
            specialized(
                operator_gradient,
                f"float32, scales, {precision}",
                GRADIENT_GEOMETRY,
                DTYPES=0,
                SCALES=True,
                PRECISION=precision,
            )  # fmt: skip
        )
    return found
