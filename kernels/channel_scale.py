# SPDX-License-Identifier: MIT
"""Scales per channel: products of factors ``constant * t[slot] / sqrt(t[variance] + eps)``.

The table is :data:`lmtfast.table.SCALE_FIELDS`; all factors of one stretch of the scale buffer are
adjacent rows. A kernel that needs a scale computes it from the factors, in float64: a few per
channel, so that no launch has to wait for another one's scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lmtfast.kernels.descriptor import TENSOR_WIDTH, entries, real
from lmtfast.kernels.scale_work import STRETCH_FIELDS
from lmtfast.table import SCALE_FIELDS

WIDTH = tl.constexpr(len(SCALE_FIELDS))
FACTOR_OFFSET = tl.constexpr(SCALE_FIELDS.index("offset"))
FACTOR_SLOT = tl.constexpr(SCALE_FIELDS.index("slot"))
FACTOR_VARIANCE = tl.constexpr(SCALE_FIELDS.index("variance_slot"))
FACTOR_INVERSE = tl.constexpr(SCALE_FIELDS.index("inverse"))
FACTOR_EPS = tl.constexpr(SCALE_FIELDS.index("eps"))
FACTOR_CONSTANT = tl.constexpr(SCALE_FIELDS.index("constant"))
STRETCH_WIDTH = tl.constexpr(len(STRETCH_FIELDS))
NAN, LAST = tl.constexpr(0x7F800001), tl.constexpr(0x7FFFFFFF)


@triton.jit
def channel_entries(tensors, slot, i, mask):
    """Entries i of a tensor that is a factor, float64; a tensor of one entry serves all."""
    row = tensors + slot * TENSOR_WIDTH
    index = tl.where(tl.load(row + 2) == 1, 0, i)
    return entries(tl.load(row), tl.load(row + 1), 0, index, mask, -1, False).to(tl.float64)


@triton.jit
def factor_parts(tensors, factor, i, mask):
    """Numerator and root of one factor at entries i; the factor is their quotient, or inverse."""
    numerator = tl.full(i.shape, 1.0, tl.float64) * real(factor, FACTOR_CONSTANT)
    root = tl.full(i.shape, 1.0, tl.float64)
    slot = tl.load(factor + FACTOR_SLOT)
    if slot >= 0:
        numerator *= channel_entries(tensors, slot, i, mask)
    variance = tl.load(factor + FACTOR_VARIANCE)
    if variance >= 0:
        root = channel_entries(tensors, variance, i, mask) + real(factor, FACTOR_EPS)
        root = tl.sqrt(root)
    return numerator, root


@triton.jit
def scale_product(tensors, factors, first, last, left_out, i, mask):
    """Product at entries i of the factors in [first, last) except ``left_out``, float64."""
    product = tl.full(i.shape, 1.0, tl.float64)
    for k in range(first, last):
        numerator, root = factor_parts(tensors, factors + k * WIDTH, i, mask)
        if tl.load(factors + k * WIDTH + FACTOR_INVERSE) != 0:
            value = root / numerator
        else:
            value = numerator / root
        if k != left_out:
            product *= value
    return product


@triton.jit
def largest_entry(scales, length, BLOCK: tl.constexpr):
    """Place of the first entry of largest modulus, or of the first NaN if there is one."""
    best = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        # The bits of moduli are in their order, NaN last; below them the first place is largest.
        bits = tl.load(scales + i, i < length, other=0.0).to(tl.int32, bitcast=True) & LAST
        best = tl.maximum(best, (tl.minimum(bits, NAN).to(tl.int64) << 32) + (LAST - i))
    return LAST - (tl.max(best, 0) & LAST)


@triton.jit
def fill_scales(tensors, factors, stretches, item, saved, sigmas, BLOCK: tl.constexpr):
    """One stretch of the scale buffer (scale_work.py) at the start of ``saved``, and its norm where
    it is a diagonal map."""
    row = stretches + item * STRETCH_WIDTH
    scales, last = saved + tl.load(row), tl.load(row + 4)
    for start in range(tl.load(row + 3), last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        product = scale_product(
            tensors, factors, tl.load(row + 1), tl.load(row + 2), -1, i, i < last
        )
        tl.store(scales + i, product.to(tl.float32), i < last)
    number = tl.load(row + 5)
    if number >= 0:
        # What this program has written it now reads in another order.
        tl.debug_barrier()
        tl.store(sigmas + number, tl.abs(tl.load(scales + largest_entry(scales, last, BLOCK))))


@triton.jit
def scale_of(saved, offset, i, mask):
    """Entries i of a stretch of the scale buffer once it is filled; ones without a stretch."""
    return tl.load(saved + offset + i, mask & (offset >= 0), other=1.0)
