# SPDX-License-Identifier: MIT
"""The gradient of sigma in the tensors that scale channels: batch norms' gains, factors.

One program owns 32 entries of one tensor, or the only entry of a tensor that serves all channels,
and adds every use of it in the order of the table: no float is added across programs. A use needs
the gradient in the product of factors it is part of. For rows of the symbol engine that is u . p of
what the step has saved; for its columns a sum over the weights; for a diagonal map all of it
is that of one entry; other engines have written theirs into ``grad_scales``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.channel_scale import (
    FACTOR_CONSTANT,
    FACTOR_INVERSE,
    FACTOR_OFFSET,
    WIDTH,
    factor_parts,
    largest_entry,
    scale_of,
    scale_product,
)
from lmtfast.kernels.descriptor import (
    CHANNELS,
    NUMBER,
    ROW_SCALE,
    ROWS,
    SLOT,
    TAPS,
    TENSOR_WIDTH,
    entries,
    real,
    store_entries,
    whole,
)
from lmtfast.kernels.gradient_work import ENTRY_BLOCK, OF_COLUMNS, OF_DIAGONAL, USE_WIDTH
from lmtfast.kernels.matrix import kept_pair, saved_image
from lmtfast.kernels.scale_work import SCALE_BLOCK
from lmtfast.kernels.symbol_work import SYMBOL_WIDTH

BLOCK = tl.constexpr(ENTRY_BLOCK)
SUM_ROWS, SUM_TAPS = tl.constexpr(8), tl.constexpr(4)
USE, SCAN_BLOCK = tl.constexpr(USE_WIDTH), tl.constexpr(SCALE_BLOCK)
COLUMN_SIDE, DIAGONAL_SIDE = tl.constexpr(OF_COLUMNS), tl.constexpr(OF_DIAGONAL)


@triton.jit
def scale_entries(
    operators, tensors, factors, item, uses, targets, saved, grad_sigmas, grad_scales, gradients
):  # fmt: skip
    """The block (slot, first entry, first and last use) of one tensor's gradient."""
    slot, start = tl.load(item), tl.load(item + 1)
    first, last = tl.load(item + 2), tl.load(item + 3)
    target = tl.load(targets + slot)
    if target >= 0:
        tensor = tensors + slot * TENSOR_WIDTH
        code, single = tl.load(tensor + 1), tl.load(tensor + 2) == 1
        total = tl.zeros((BLOCK,), tl.float64)
        for use in range(first, last):
            entry = uses + use * USE
            length = tl.load(entry + 8)
            # One entry that serves all channels is the first program's, which runs through them.
            end = tl.where(single & (start == 0), length, tl.minimum(start + 1, length))
            for i_start in range(start, end, BLOCK):
                i = i_start + tl.arange(0, BLOCK)
                total += use_gradient(
                    operators, tensors, factors, entry, saved, grad_sigmas, grad_scales, i,
                    i < length,
                )  # fmt: skip
        i = start + tl.arange(0, BLOCK)
        if single:
            total = tl.where(i == 0, tl.sum(total, 0), 0.0)
        store_entries(
            gradients + target, code, 0, i, total.to(tl.float32), i < tl.load(tensor + 2), -1, False
        )


@triton.jit
def use_gradient(
    operators, tensors, factors, entry, saved, grad_sigmas, grad_scales, i, mask
):  # fmt: skip
    """Of one use (gradient_work.ScaleEntries) at entries i, float64; 0 where masked."""
    k, first, last = tl.load(entry), tl.load(entry + 4), tl.load(entry + 5)
    factor = factors + k * WIDTH
    op, side = tl.load(entry + 2), tl.load(entry + 3)
    if op < 0:
        outer = tl.zeros((BLOCK,), tl.float64)
        for part in range(0, tl.load(entry + 7)):
            place = grad_scales + tl.load(entry + 6) + part * tl.load(entry + 8)
            outer += tl.load(place + i, mask, other=0.0)
    elif side == DIAGONAL_SIDE:
        scales = saved + tl.load(factor + FACTOR_OFFSET)
        grad = tl.load(grad_sigmas + op)
        outer = diagonal_gradient(scales, tl.load(entry + 8), grad, i, mask)
    else:
        row = operators + op * SYMBOL_WIDTH
        if side == COLUMN_SIDE:
            outer = column_gradient(row, tensors, saved, i, mask)
        else:
            outer = row_gradient(row, tensors, saved, i, mask)
        outer *= tl.load(grad_sigmas + tl.load(row + NUMBER)).to(tl.float64)
    numerator, root = factor_parts(tensors, factor, i, mask)
    inverse = tl.load(factor + FACTOR_INVERSE) != 0
    value = numerator / root
    if inverse:
        value = root / numerator
    if tl.load(entry + 1) != 0:
        own = -0.5 * value / (root * root)
        if inverse:
            own = -own
    else:
        own = real(factor, FACTOR_CONSTANT) / root
        if inverse:
            own = -value / numerator * real(factor, FACTOR_CONSTANT)
    own *= outer * scale_product(tensors, factors, first, last, k, i, mask)
    return tl.where(mask, own, 0.0)


@triton.jit
def diagonal_gradient(scales, length, grad, i, mask):
    """All of it belongs to the entry that is a diagonal map's norm; float64."""
    x = tl.load(scales + i, mask & (i == largest_entry(scales, length, SCAN_BLOCK)), other=0.0)
    return tl.where(x == 0, 0.0, tl.where(x < 0, -grad, grad)).to(tl.float64)


@triton.jit
def row_gradient(row, tensors, saved, i, mask):
    """u . p of the winner's rows, float64; 0 in other groups. A matrix has not kept its p."""
    rows = whole(row, ROWS)
    group, u, z, parts = kept_pair(row, saved)
    local = i - group * rows
    present = mask & (local >= 0) & (local < rows)
    total = tl.load(u + parts * local, present, other=0.0).to(tl.float64)
    if parts == 1:
        total *= saved_image(row, tensors, saved, z, i, present)
    else:
        p = z + 2 * whole(row, CHANNELS) * whole(row, TAPS) + 2 * local
        total *= tl.load(p, present, other=0.0)
        im = tl.load(u + 2 * local + 1, present, other=0.0).to(tl.float64)
        total += im * tl.load(p + 1, present, other=0.0)
    return total


@triton.jit
def column_gradient(row, tensors, saved, i, mask):
    """Sum over rows o and taps t of rs_o W_oct (u_o . z_ct) of the winner, float64."""
    rows, channels, n_taps = whole(row, ROWS), whole(row, CHANNELS), whole(row, TAPS)
    columns = channels * n_taps
    group, u, vector, parts = kept_pair(row, saved)
    tensor = tensors + tl.load(row + SLOT) * TENSOR_WIDTH
    address, code = tl.load(tensor), tl.load(tensor + 1)
    tap_major = tl.load(tensor + 3) != 0
    c = i - group * channels
    present = mask & (c >= 0) & (c < channels)
    total = tl.zeros((BLOCK,), tl.float64)
    for r_start in range(0, rows, SUM_ROWS):
        r = r_start + tl.arange(0, SUM_ROWS)
        scale = scale_of(saved, tl.load(row + ROW_SCALE), group * rows + r, r < rows)
        u_re = tl.load(u + parts * r, r < rows, other=0.0) * scale
        u_im = tl.load(u + parts * r + 1, (r < rows) & (parts > 1), other=0.0) * scale
        for t_start in range(0, n_taps, SUM_TAPS):
            t = t_start + tl.arange(0, SUM_TAPS)
            inside = present[:, None] & (t < n_taps)[None, :]
            k = c[:, None] * n_taps + t[None, :]
            z = vector + parts * k
            z_re = tl.load(z, inside, other=0.0)
            z_im = tl.load(z + 1, inside & (parts > 1), other=0.0)
            if tap_major:
                k = t[None, :] * channels + c[:, None]
            start = (group * rows + r_start).to(tl.int64) * columns
            offset = (r - r_start)[:, None, None] * columns + k[None, :, :]
            every = (r < rows)[:, None, None] & inside[None, :, :]
            w = entries(address, code, start, offset, every, -1, False)
            both = u_re[:, None, None] * z_re[None, :, :] + u_im[:, None, None] * z_im[None, :, :]
            total += tl.sum(tl.sum(w * both, 2), 0).to(tl.float64)
    return total
