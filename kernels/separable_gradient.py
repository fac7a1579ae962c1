# SPDX-License-Identifier: MIT
"""Engine ``separable``: the gradient of sigma in every kernel; two launches.

With h, a, y of the saved group (csrc/ops/spectral.h) and the windows X of h, dW_t = g rs cs V_t a^T
with V = y X^T X over what ||A v|| is in units of y, and 0 in other groups. ``separable_overlap``
finds X^T X, one program per operator. ``separable_gradient``: one program owns a block of rows of a
weight, adds the operators that share it in the order of the table and, with SCALES, leaves its part
of the gradients in the row and column scales for :mod:`lmtfast.kernels.scale_gradient`.

Floor: every gradient written once, 34 us for the 146 MB of WRN-28-10 at 4.3 TB/s, and 16 flop per
weight. Weights are read only for gradients in scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.channel_scale import scale_of
from lmtfast.kernels.descriptor import (
    CHANNELS,
    COLUMN_SCALE,
    DTYPE_NAMES,
    GROUPS,
    NUMBER,
    RANK,
    ROW_SCALE,
    ROWS,
    SAVED,
    TAPS,
    TENSOR_WIDTH,
    entries,
    specialized,
    store_entries,
    stored_entries,
    whole,
)
from lmtfast.kernels.gradient_work import GROUP_TILE_WIDTH, SEPARABLE_ROWS
from lmtfast.kernels.separable_grid import BLOCK_DEPTH, gather_windows, square
from lmtfast.kernels.separable_work import (
    COLUMN_SUMS,
    GRAM,
    IN_POINTS,
    LANES,
    MIXED_IMAGE,
    OUT_POINTS,
    PATTERNS,
    ROW_SUMS,
    SEPARABLE_WIDTH,
    WINDOWS,
)
from lmtfast.kernels.specialization import Specialization

TILE_WIDTH = tl.constexpr(GROUP_TILE_WIDTH)
TILE, BLOCK = tl.constexpr(SEPARABLE_ROWS), tl.constexpr(64)
BLOCK_C = tl.constexpr(32)
GRADIENT_GEOMETRY = {"num_warps": 8, "num_stages": 1}


@triton.jit
def separable_overlap(operators, visits, saved, workspace):
    """X^T X of an operator's saved patterns, in the place of its first group's Gram matrix."""
    row = operators + tl.program_id(0) * SEPARABLE_WIDTH
    inputs, rank = whole(row, IN_POINTS), whole(row, RANK)
    depth, lane = whole(row, TAPS) * LANES, tl.arange(0, LANES)
    h = saved + tl.load(row + SAVED) + 2
    patterns = workspace + tl.load(row + PATTERNS)
    for start in range(0, inputs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = (i < inputs)[:, None] & (lane < rank)[None, :]
        x = tl.load(h + (i[:, None] * rank + lane[None, :]), inside, other=0.0)
        tl.store(patterns + (i[:, None] * LANES + lane[None, :]), x, (i < inputs)[:, None])
    tl.debug_barrier()
    windows = workspace + tl.load(row + WINDOWS)
    gather_windows(row, visits, patterns, windows)
    square(windows, whole(row, OUT_POINTS), depth, 1.0, workspace + tl.load(row + GRAM))


@triton.jit
def separable_gradient(
    operators, tensors, tiles, sharers, targets, saved, grad_sigmas, grad_scales, workspace,
    gradients,
    DTYPES: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """One tile (gradient_work.group_tiles) of a weight's gradient.

    ``targets`` holds per tensor the byte at which its gradient starts in ``gradients``, or -1.
    """
    item = tiles + tl.program_id(0) * TILE_WIDTH
    target = tl.load(targets + tl.load(item))
    if SCALES | (target >= 0):
        for sharer in range(tl.load(item + 1), tl.load(item + 2)):
            row = operators + tl.load(sharers + sharer) * SEPARABLE_WIDTH
            adds = (sharer > tl.load(item + 1)) | (tl.load(item + 9) != 0)
            shared_tile(
                row, tensors, item, target, adds, saved, grad_sigmas, grad_scales, workspace,
                gradients, DTYPES, SCALES,
            )  # fmt: skip


@triton.jit
def seen_image(row, first, last, present, y, gram, image):
    """V of rows [first, last) of a group before the division; zeros where not ``present``."""
    rank, depth = whole(row, RANK), whole(row, TAPS) * LANES
    width = whole(row, TAPS) * rank
    r = first + tl.arange(0, TILE)
    for j_start in range(0, depth, BLOCK_DEPTH):
        j = j_start + tl.arange(0, BLOCK_DEPTH)
        total = tl.zeros((TILE, BLOCK_DEPTH), tl.float32)
        for k_start in range(0, depth, BLOCK_DEPTH):
            k = k_start + tl.arange(0, BLOCK_DEPTH)
            inside = present & (k < depth) & (k % LANES < rank)
            left = tl.load(
                y + (r[:, None] * width + (k // LANES * rank + k % LANES)[None, :]),
                (r < last)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                gram + (k[:, None] * depth + j[None, :]),
                (k < depth)[:, None] & (j < depth)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(left, right, total, input_precision="ieee")
        written = (r < last)[:, None] & (j < depth)[None, :]
        tl.store(image + (r[:, None] * depth + j[None, :]), total, written)
    tl.debug_barrier()


@triton.jit
def shared_tile(
    row, tensors, item, target, adds, saved, grad_sigmas, grad_scales, workspace, gradients,
    DTYPES: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    tensor = tensors + tl.load(item) * TENSOR_WIDTH
    address, code = tl.load(tensor), tl.load(tensor + 1)
    tap_major = tl.load(tensor + 3) != 0
    row_first, row_last = tl.load(item + 3), tl.load(item + 4)
    rows, channels, n_taps = whole(row, ROWS), whole(row, CHANNELS), whole(row, TAPS)
    rank, columns, depth = whole(row, RANK), channels * n_taps, n_taps * LANES
    group = row_first // rows
    kept = saved + tl.load(row + SAVED)
    present = tl.load(kept).to(tl.int32) == group
    norm = tl.load(kept + 1)
    g = tl.load(grad_sigmas + tl.load(row + NUMBER)) / tl.where(norm > 0, norm, 1.0)
    a = kept + 2 + whole(row, IN_POINTS) * rank
    image = workspace + tl.load(row + MIXED_IMAGE)
    first = row_first - group * rows
    seen_image(
        row, first, row_last - group * rows, present, a + channels * rank,
        workspace + tl.load(row + GRAM), image,
    )  # fmt: skip
    within = tl.arange(0, TILE)
    r = row_first + within
    start = columns.to(tl.int64) * row_first
    row_scale = scale_of(saved, tl.load(row + ROW_SCALE), r, r < row_last)
    row_sum = tl.zeros((TILE,), tl.float64)
    # A product needs sixteen terms.
    term = tl.arange(0, 2 * LANES)
    for c_start in range(0, channels, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        inside = (r < row_last)[:, None] & (c < channels)[None, :]
        column_scale = scale_of(
            saved, tl.load(row + COLUMN_SCALE), group * channels + c, c < channels
        )
        x = tl.load(
            a + (c[None, :] * rank + term[:, None]),
            (c < channels)[None, :] & (term < rank)[:, None], other=0.0,
        )  # fmt: skip
        column_sum = tl.zeros((BLOCK_C,), tl.float64)
        for t in range(0, n_taps):
            v = tl.load(
                image + ((first + within) * depth + t * LANES)[:, None] + term[None, :],
                (r < row_last)[:, None] & (term < rank)[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(v, x, input_precision="ieee") * g
            k = c * n_taps + t
            if tap_major:
                k = t * channels + c
            at = within[:, None] * columns + k[None, :]
            if SCALES:
                w = entries(address, code, start, at, inside, DTYPES, False) * total
                row_sum += tl.sum(w * column_scale[None, :], 1).to(tl.float64)
                column_sum += tl.sum(w * row_scale[:, None], 0).to(tl.float64)
            if target >= 0:
                total *= row_scale[:, None] * column_scale[None, :]
                if adds:
                    total += stored_entries(
                        gradients + target, code, start, at, inside, DTYPES, False
                    )
                store_entries(gradients + target, code, start, at, total, inside, DTYPES, False)
        if SCALES:
            every = whole(row, GROUPS) * channels
            part = tl.load(row + COLUMN_SUMS) + tl.load(item + 7) * every + group * channels
            scaled = tl.load(row + COLUMN_SCALE) >= 0
            tl.store(grad_scales + part + c, column_sum, (c < channels) & scaled)
    if SCALES:
        scaled = tl.load(row + ROW_SCALE) >= 0
        tl.store(grad_scales + tl.load(row + ROW_SUMS) + r, row_sum, (r < row_last) & scaled)


def shipped() -> list[Specialization]:
    """Each dtype of weights, and several in one network; with gradients in scales."""
    found = [specialized(separable_overlap, "any network", GRADIENT_GEOMETRY)]
    for name, code in zip((*DTYPE_NAMES, "several dtypes"), (0, 1, 2, -1), strict=True):
        found += [
            specialized(separable_gradient, label, GRADIENT_GEOMETRY, DTYPES=code, SCALES=scales)
            for label, scales in ((name, False), (f"{name}, scales", True))
        ]
    return found
