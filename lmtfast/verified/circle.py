# SPDX-License-Identifier: MIT
"""Correctly rounded points on the unit circle, from integer arithmetic alone."""

from __future__ import annotations

from functools import cache

_FIXED_BITS = 128  # fixed-point precision; the rounding to float64 needs 54


@cache
def _pi_fixed() -> int:
    """pi * 2**_FIXED_BITS within one unit, by Machin's formula in integers with guard bits."""
    guard = 32
    one = 1 << (_FIXED_BITS + guard)

    def arctan_inverse(x: int) -> int:
        term, total, k = one // x, 0, 0
        while term:
            total += (-term if k % 2 else term) // (2 * k + 1)
            term, k = term // (x * x), k + 1
        return total

    return (4 * (4 * arctan_inverse(5) - arctan_inverse(239))) >> guard


@cache
def unit_circle(n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """cos and sin of 2 pi r / n for r in range(n), each within 2**-53."""
    cosines, sines = [], []
    for r in range(n):
        # Nearest multiple of a quarter turn; the rest is an angle of at most an eighth of a turn.
        quarter = (8 * r + n) // (2 * n)
        angle = (_pi_fixed() * (4 * r - quarter * n)) // (2 * n)
        term, k, c, s = 1 << _FIXED_BITS, 0, 0, 0
        while term:
            if k % 2 == 0:
                c += term if k % 4 == 0 else -term
            else:
                s += term if k % 4 == 1 else -term
            k += 1
            product = abs(term * angle) >> _FIXED_BITS
            term = (product if (term < 0) == (angle < 0) else -product) // k
            if term == -1:
                term = 0
        c, s = ((c, s), (-s, c), (-c, -s), (s, -c))[quarter % 4]
        cosines.append(c / (1 << _FIXED_BITS))
        sines.append(s / (1 << _FIXED_BITS))
    return tuple(cosines), tuple(sines)
