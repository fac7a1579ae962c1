# SPDX-License-Identifier: MIT
"""Sizes and strides that are known to be multiples, so that rows are read 16 bytes at a time.

The launcher tells the compiler of integers that are multiples of 16 and of no others: 1000 classes
would be read one by one, although every row starts at a multiple of 16 bytes.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


def alignment(*sizes: int) -> int:
    """The largest divisor of 16 that divides every size; a constant of the launch."""
    return math.gcd(16, *sizes)


@triton.jit
def multiple(size, ALIGN: tl.constexpr):
    """``size`` itself, as the multiple of ALIGN that it is (``tl.multiple_of`` does not reach the
    arguments of a kernel)."""
    return size // ALIGN * ALIGN
