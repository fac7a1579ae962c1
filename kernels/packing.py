# SPDX-License-Identifier: MIT
"""Acting kernels as (group, tap, row, channel): packed once per step, or the weight as it lies.

A packed kernel has its scales and its identity folded in and rows padded with zeros to a multiple
of four channels, so that every row starts at a multiple of 16 bytes. A float32 weight without
scales is read in place where it has these properties itself: a matrix, a pointwise kernel or a
channels-last one, with a multiple of four channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.channel_scale import scale_product
from lmtfast.kernels.descriptor import (
    CENTRE,
    CHANNELS,
    COLUMN_FIRST,
    COLUMN_LAST,
    IDENTITY,
    ROW_FIRST,
    ROW_LAST,
    ROWS,
    SLOT,
    TAPS,
    TENSOR_WIDTH,
    entries,
    real,
    whole,
)

PACK_ROWS, PACK_CHANNELS = 8, 32
BLOCK_R, BLOCK_C, BLOCK_T = tl.constexpr(PACK_ROWS), tl.constexpr(PACK_CHANNELS), tl.constexpr(16)


@triton.jit
def read_in_place(row, tensors, direct):
    """Whether the tensor is what a product reads; ``direct``: nothing is to be folded in."""
    tensor = tensors + tl.load(row + SLOT) * TENSOR_WIDTH
    single = (tl.load(tensor + 1) == 0).to(tl.int64)
    shaped = ((tl.load(tensor + 3) != 0) | (tl.load(row + TAPS) == 1)).to(tl.int64)
    fits = ((tl.load(row + CHANNELS) % 4 == 0) & (tl.load(tensor) % 16 == 0)).to(tl.int64)
    return (direct * single * shaped * fits) != 0


@triton.jit
def kernel_view(row, tensors, direct, packed, width, group):
    """Pointer to a group's kernel, and the steps from row to row and from tap to tap."""
    in_place = read_in_place(row, tensors, direct)
    rows, n_taps = whole(row, ROWS), whole(row, TAPS)
    address = tl.load(tensors + tl.load(row + SLOT) * TENSOR_WIDTH)
    address = tl.where(in_place, address, packed.to(tl.int64))
    step = tl.where(in_place, n_taps * width, width) // 4 * 4
    tap_step = tl.where(in_place, width, rows * width) // 4 * 4
    size = (n_taps * rows).to(tl.int64) * width
    return address.to(tl.pointer_type(tl.float32)) + group * size, step, tap_step


@triton.jit
def pack_block(row, tensors, factors, group, row_block, channel_block, packed, width):
    """One block of rows and channels of a group's acting kernel, all taps."""
    tensor = tensors + tl.load(row + SLOT) * TENSOR_WIDTH
    address, code = tl.load(tensor), tl.load(tensor + 1)
    tap_major = tl.load(tensor + 3) != 0
    rows, channels, n_taps = whole(row, ROWS), whole(row, CHANNELS), whole(row, TAPS)
    columns = channels * n_taps
    first = row_block * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    c = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    row_scale = scale_product(
        tensors, factors, whole(row, ROW_FIRST), whole(row, ROW_LAST), -1,
        group * rows + r, r < rows,
    ).to(tl.float32)  # fmt: skip
    column_scale = scale_product(
        tensors, factors, whole(row, COLUMN_FIRST), whole(row, COLUMN_LAST), -1,
        group * channels + c, c < channels,
    ).to(tl.float32)  # fmt: skip
    scale = row_scale[:, None, None] * column_scale[None, :, None]
    identity, centre = real(row, IDENTITY).to(tl.float32), whole(row, CENTRE)
    start = (group * rows + first).to(tl.int64) * columns
    packed += group.to(tl.int64) * n_taps * rows * width
    for t_start in range(0, n_taps, BLOCK_T):
        t = t_start + tl.arange(0, BLOCK_T)
        k = c[:, None] * n_taps + t[None, :]
        if tap_major:
            k = t[None, :] * channels + c[:, None]
        inside = (r < rows)[:, None, None] & ((c < channels)[:, None] & (t < n_taps)[None, :])[None]
        offset = (r - first)[:, None, None] * columns + k[None, :, :]
        w = entries(address, code, start, offset, inside, -1, False) * scale
        own = (r[:, None] == c[None, :])[:, :, None] & (t == centre)[None, None, :]
        w = tl.where(inside, w + tl.where(own, identity, 0.0), 0.0)
        written = (r < rows)[:, None, None] & ((c < width)[:, None] & (t < n_taps)[None, :])[None]
        at = t[None, None, :] * (rows * width) + r[:, None, None] * width + c[None, :, None]
        tl.store(packed + at, w, written)
