# SPDX-License-Identifier: MIT
"""Outward rounding: scalar arithmetic that only errs to the safe side, and verified sums over
tensors.

The scalar helpers form the exact rational result in Python integers and round that once, in the
asked direction. They therefore need no assumption about the processor's rounding mode. Operands
stand for themselves; an operand of plus infinity stands for "no upper bound known", a result of
plus infinity is a valid upper bound, and a NaN raises. The tensor helpers assume IEEE 754 binary64,
round to nearest, gradual underflow, sums and products in any order, and faithful square roots
(ADR 0014: a root counts as two roundings); :func:`self_test` looks for processors and processes
where that does not hold.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

import torch

from lmtfast.errors import DtypeError, NonFiniteError
from lmtfast.verified.arithmetic import ensure_arithmetic as ensure_arithmetic
from lmtfast.verified.arithmetic import self_test as self_test

UNIT_ROUNDOFF = 2.0**-53
# Bounds the absolute rounding error of one product or fused multiply-add that underflows. The IEEE
# value is 2^-1075; every use sits beside quantities near 1, so a far larger constant costs nothing
# and also covers a library kernel that flushes its results to zero.
UNDERFLOW = 2.0**-1000
_ROOT_BITS = (
    256  # working precision of the integer square root; anything above 2 * 53 + 2 rounds tightly
)
_SUM_WIDTH = 1024  # first level of the two-level sum; keeps gamma near 1024 + N / 1024 instead of N


def next_up(x: float) -> float:
    """Smallest float above ``x``; infinity stays."""
    return math.nextafter(x, math.inf)


def next_down(x: float) -> float:
    """Largest float below ``x``; minus infinity stays."""
    return math.nextafter(x, -math.inf)


def _operands(where: str, *values: float) -> bool:
    """True when all operands are finite; raises on NaN."""
    if all(map(math.isfinite, values)):
        return True
    if any(map(math.isnan, values)):
        raise NonFiniteError(
            "real numbers or plus infinity",
            f"NaN among {values}",
            where,
            "check weights and inputs for NaN before asking for a bound",
        )
    return False


def _nearest(p: int, q: int) -> float:
    """The float nearest p / q, infinite on overflow; callers correct its direction."""
    try:
        return p / q + 0.0  # adding 0.0 turns -0.0 into 0.0
    except OverflowError:
        return math.inf if p > 0 else -math.inf


def ratio_up(p: int, q: int) -> float:
    """Smallest float >= p / q for integers p and q > 0."""
    r = _nearest(p, q)
    while r != math.inf:
        if r != -math.inf:
            a, b = r.as_integer_ratio()
            if a * q >= p * b:
                break
        r = next_up(r)
    return r + 0.0


def ratio_down(p: int, q: int) -> float:
    """Largest float <= p / q for integers p and q > 0."""
    return -ratio_up(-p, q) + 0.0


def _sum_ratio(values: tuple[float, ...]) -> tuple[int, int]:
    ratios = [v.as_integer_ratio() for v in map(float, values)]
    q = max(
        (d for _, d in ratios), default=1
    )  # denominators are powers of two: the largest is common to all
    return sum(p * (q // d) for p, d in ratios), q


def sum_up(values: Iterable[float]) -> float:
    """Upper bound on the exact sum of ``values``, tight to the last bit; 0.0 for no values."""
    values = tuple(float(v) for v in values)
    if not _operands("sum_up", *values):
        total = sum({v for v in values if math.isinf(v)})
        _operands("sum_up (opposite infinities)", total)
        return total
    return ratio_up(*_sum_ratio(values))


def sum_down(values: Iterable[float]) -> float:
    """Lower twin of :func:`sum_up`."""
    return -sum_up(-float(v) for v in values) + 0.0


def add_up(a: float, b: float) -> float:
    """Smallest float >= a + b."""
    return sum_up((a, b))


def add_down(a: float, b: float) -> float:
    """Largest float <= a + b."""
    return sum_down((a, b))


def sub_up(a: float, b: float) -> float:
    """Smallest float >= a - b."""
    return sum_up((a, -b))


def sub_down(a: float, b: float) -> float:
    """Largest float <= a - b."""
    return sum_down((a, -b))


def mul_up(a: float, b: float) -> float:
    """Smallest float >= a * b. Zero times infinity is 0: infinity is an unknown finite bound."""
    if not _operands("mul_up", a, b):
        return 0.0 if a == 0 or b == 0 else a * b
    (p, q), (r, s) = float(a).as_integer_ratio(), float(b).as_integer_ratio()
    return ratio_up(p * r, q * s)


def mul_down(a: float, b: float) -> float:
    """Largest float <= a * b, with the same convention for zero times infinity."""
    return -mul_up(-a, b) + 0.0


def div_up(a: float, b: float) -> float:
    """Smallest float >= a / b. A zero divisor gives an infinity with the sign of ``a``; 0 / 0
    raises.

    With an infinite divisor the result is 0.0: the divisor is read as larger than every float, of
    known sign.
    """
    finite = _operands("div_up", a, b)
    if b == 0:
        _operands("div_up (0 / 0)", math.nan if a == 0 else a)
        return math.copysign(math.inf, a)
    if not finite:
        _operands("div_up (inf / inf)", a / b)
        if math.isinf(b):
            return (
                0.0
                if (a >= 0) != (b > 0) or a == 0
                else sys.float_info.min * sys.float_info.epsilon
            )
        return a / b
    (p, q), (r, s) = float(a).as_integer_ratio(), float(b).as_integer_ratio()
    return ratio_up(p * s, q * r) if r > 0 else ratio_up(-p * s, -q * r)


def div_down(a: float, b: float) -> float:
    """Largest float <= a / b, with the conventions of :func:`div_up`."""
    return -div_up(-a, b) + 0.0


def _root(p: int, q: int) -> tuple[int, int, bool]:
    """(r, s, exact) with r / 2**s <= sqrt(p / q) < (r + 1) / 2**s."""
    shift = max(0, (_ROOT_BITS + q.bit_length() - p.bit_length()) // 2 + 1)
    n, rest = divmod(p << (2 * shift), q)
    r = math.isqrt(n)
    return r, shift, rest == 0 and r * r == n


def _root_up(p: int, q: int) -> float:
    r, shift, exact = _root(p, q)
    return ratio_up(r if exact else r + 1, 1 << shift)


def _root_down(p: int, q: int) -> float:
    r, shift, _ = _root(p, q)
    return ratio_down(r, 1 << shift)


def _radicand(x: float, where: str) -> bool:
    if x < 0:
        raise NonFiniteError(
            "a nonnegative number", repr(x), where, "take the root of a bound that is nonnegative"
        )
    return _operands(where, x)


def sqrt_up(x: float) -> float:
    """Smallest float >= sqrt(x) for x >= 0."""
    return _root_up(*float(x).as_integer_ratio()) if _radicand(x, "sqrt_up") else math.inf


def sqrt_down(x: float) -> float:
    """Largest float <= sqrt(x) for x >= 0."""
    return _root_down(*float(x).as_integer_ratio()) if _radicand(x, "sqrt_down") else math.inf


def _square_ratio(values: tuple[float, ...]) -> tuple[int, int]:
    ratios = [float(v).as_integer_ratio() for v in values]
    q = max((d for _, d in ratios), default=1)
    return sum((p * (q // d)) ** 2 for p, d in ratios), q * q


def hypot_up(*values: float) -> float:
    """Smallest float >= the root of the sum of squares; 0.0 for no values."""
    return _root_up(*_square_ratio(values)) if _operands("hypot_up", *values) else math.inf


def hypot_down(*values: float) -> float:
    """Largest float <= the root of the sum of squares."""
    return _root_down(*_square_ratio(values)) if _operands("hypot_down", *values) else math.inf


def scale_up(x: float, exponent: int) -> float:
    """Smallest float >= x * 2**exponent."""
    if not _operands("scale_up", x):
        return x
    p, q = float(x).as_integer_ratio()
    return ratio_up(p << max(exponent, 0), q << max(-exponent, 0))


def gamma_up(n: int) -> float:
    """Upper bound of n u / (1 - n u), u = 2**-53; infinite from n = 2**53 on.

    A sum of n products, evaluated in any order, with or without fused multiply-add, differs from
    the exact sum by at most this factor times the sum of absolute products (plus underflow).
    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, lemma 3.1 and
    equation (3.5).
    """
    return ratio_up(n, (1 << 53) - n) if n < 1 << 53 else math.inf


def inflate(computed: float, depth: int, count: int) -> float:
    """Upper bound of a sum of nonnegative terms from its computed value.

    ``computed / (1 - gamma) + 2 count UNDERFLOW``, where ``1 / (1 - gamma)`` is exactly
    ``(2**53 - depth) / (2**53 - 2 depth)``: one fraction, rounded once.

    Args:
        computed: Float64 value of the sum, finite and nonnegative.
        depth: Largest number of roundings any term passes through, its own included.
        count: Number of terms, each of which may underflow once by at most ``UNDERFLOW``.
    """
    whole = 1 << 53
    if not _operands("inflate", computed) or 2 * depth >= whole:
        return math.inf
    (p, q), (r, s) = float(computed).as_integer_ratio(), UNDERFLOW.as_integer_ratio()
    rest = whole - 2 * depth
    return ratio_up(p * (whole - depth) * s + 2 * count * r * q * rest, q * rest * s)


def require_float64(tensor: torch.Tensor, where: str) -> None:
    """Raise DtypeError unless the tensor is float64."""
    if tensor.dtype != torch.float64:
        raise DtypeError(
            "a float64 tensor",
            str(tensor.dtype),
            where,
            "convert with .double(): every float32, float16 or bfloat16 value is exact in float64",
        )


def magnitude(tensor: torch.Tensor, where: str) -> float:
    """Largest absolute value, exactly; 0.0 when empty. Raises NonFiniteError on NaN or infinity."""
    require_float64(tensor, where)
    if tensor.numel() == 0:
        return 0.0
    low, high = (float(x) for x in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFiniteError(
            "finite entries",
            "NaN or infinity",
            where,
            "find and repair the tensor that holds it; no bound exists",
        )
    return max(abs(low), abs(high))


def times_power_of_two(tensor: torch.Tensor, exponent: int) -> torch.Tensor:
    """tensor * 2**exponent in steps that stay in range; exact unless an entry turns denormal."""
    while exponent:
        step = max(-1000, min(1000, exponent))
        tensor, exponent = tensor * 2.0**step, exponent - step
    return tensor


def prescale(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Scale by a power of two so that the largest absolute entry lies in [1/2, 1).

    Args:
        matrix: Float64 tensor of any shape.

    Returns:
        ``(scaled, exponent)`` with ``matrix = scaled * 2**exponent``: exactly when scaling up, and
        when scaling down up to 2**-1022 per entry of ``scaled`` (entries that become denormal). A
        zero or empty tensor comes back with exponent 0.

    Raises:
        DtypeError: The tensor is not float64.
        NonFiniteError: It holds NaN or infinity.
    """
    largest = magnitude(matrix, "prescale")
    exponent = math.frexp(largest)[1] if largest else 0
    return times_power_of_two(matrix, -exponent), exponent


def prescale_loss(count: int) -> float:
    """Bound on the Frobenius norm of what :func:`prescale` lost over ``count`` entries, scaled."""
    return mul_up(sqrt_up(float(count)), 2.0**-1022)


def largest_square_sum(*parts: torch.Tensor) -> float:
    """Upper bound on the largest sum of squares over a batch.

    Args:
        parts: One or more float64 tensors ``(B, ...)`` of one shape (a real part, or real and
            imaginary parts), so scaled that no square overflows; sums run over everything but the
            first dimension, and over the parts.
    """
    batch = parts[0].shape[0]
    count = parts[0].numel() // batch
    cut = count - count % _SUM_WIDTH
    totals = []
    for part in parts:
        squares = part.reshape(batch, -1).square()
        total = squares[:, cut:].sum(-1)
        if cut:
            total += squares[:, :cut].view(batch, -1, _SUM_WIDTH).sum(-1).sum(-1)
        totals.append(total)
    sums = sum(totals[1:], totals[0])
    depth = _SUM_WIDTH + count // _SUM_WIDTH + 2 + len(parts)
    return inflate(float(sums.amax()), depth, len(parts) * count)


def frobenius_up(tensor: torch.Tensor) -> float:
    """Verified upper bound on the Frobenius norm of a float64 tensor.

    Args:
        tensor: Any shape, float64, CPU or CUDA.

    Returns:
        A float at or above the exact norm, 0.0 exactly for zero and empty tensors, infinite when
        out of range. Relative excess about (1024 + N / 1024) * 2**-54 for N entries.

    Raises:
        DtypeError: The tensor is not float64.
        NonFiniteError: It holds NaN or infinity.

    Guarantee:
        Rigorous, under the arithmetic assumption in this module's docstring: any order of
        summation.

    Example:
        >>> frobenius_up(torch.tensor([3.0, 4.0], dtype=torch.float64)) >= 5.0
        True
    """
    scaled, exponent = prescale(tensor)
    if tensor.numel() == 0 or not bool(scaled.any()):
        return 0.0
    return scale_up(
        add_up(sqrt_up(largest_square_sum(scaled.reshape(1, -1))), prescale_loss(tensor.numel())),
        exponent,
    )
