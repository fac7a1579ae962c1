# SPDX-License-Identifier: MIT
"""Lengths of vectors, and vectors brought to unit length."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3e38)
LENGTH_BLOCK, KEPT_BLOCK = tl.constexpr(256), tl.constexpr(4096)


@triton.jit
def length_of(x, size):
    """||x||, float64."""
    squares = tl.zeros((LENGTH_BLOCK,), tl.float64)
    for start in range(0, size, LENGTH_BLOCK):
        i = start + tl.arange(0, LENGTH_BLOCK)
        part = tl.load(x + i, i < size, other=0.0).to(tl.float64)
        squares += part * part
    return tl.sqrt(tl.sum(squares, 0))


@triton.jit
def inverse_of(norm):
    """1 / norm in float32, or its largest; a vector of zeros stays one, and NaN comes through."""
    inverse = 1.0 / tl.where(norm == 0, 1.0, norm)
    return tl.where(inverse > LARGEST, LARGEST, inverse).to(tl.float32)


@triton.jit(noinline=True)
def keep_scaled(source, factor, target, copy, size, part, parts):
    """One of several programs' share of a vector times a factor, to two places."""
    for start in range(part * KEPT_BLOCK, size, parts * KEPT_BLOCK):
        i = start + tl.arange(0, KEPT_BLOCK)
        x = tl.load(source + i, i < size, other=0.0) * factor
        tl.store(target + i, x, i < size)
        tl.store(copy + i, x, i < size)
