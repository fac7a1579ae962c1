# SPDX-License-Identifier: MIT
"""Verified spectral norms of float64 matrices: upper bounds that include every rounding error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmtfast.errors import ArgumentError, ShapeError
from lmtfast.level import RIGOROUS, Level
from lmtfast.verified.residual import ResidualSweep, chunk_size
from lmtfast.verified.rounding import (
    add_up,
    ensure_arithmetic,
    inflate,
    largest_square_sum,
    magnitude,
    mul_up,
    prescale_loss,
    require_float64,
    scale_up,
    sqrt_up,
    times_power_of_two,
)


@dataclass(frozen=True)
class NormEnclosure:
    """A verified upper bound on a spectral norm and how it was found.

    Attributes:
        upper: At or above the exact norm; infinite when no finite float is.
        lower: Untrusted float estimate of the norm, for reporting alone.
        method: ``"cholesky"``, ``"frobenius"``, ``"row-column"`` (root of the product of the 1-norm
            and the infinity-norm), ``"zero"`` or ``"empty"``.
        slack: Relative excess ``upper / lower - 1`` as far as ``lower`` can be believed; 0.0 where
            both are zero.
        level: What ``upper`` claims.
    """

    upper: float
    lower: float
    method: str
    slack: float
    level: Level = RIGOROUS


def enclosure(upper: float, lower: float, method: str) -> NormEnclosure:
    """A NormEnclosure with its slack filled in."""
    if upper == 0.0:
        return NormEnclosure(0.0, 0.0, method, 0.0)
    slack = upper / lower - 1.0 if 0.0 < lower < math.inf else math.inf
    return NormEnclosure(upper, lower, method, max(0.0, slack))


def check_entry_error(entry_error: float) -> float:
    """The allowance as a float; raises unless it is a nonnegative number (infinity allowed)."""
    if not float(entry_error) >= 0.0:
        raise ArgumentError(
            "a nonnegative bound on the Frobenius norm of the entries' errors",
            repr(entry_error),
            "entry_error",
            "pass 0.0 when the matrix holds the exact values",
        )
    return float(entry_error)


def row_column_up(real: torch.Tensor, imag: torch.Tensor | None = None) -> float:
    """Upper bound on max over a batch of sqrt(1-norm * infinity-norm).

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, equation (6.19).
    """
    m, n = real.shape[-2:]
    # Complex moduli: a square, a sum, and a faithful root, which counts twice; squares that
    # underflow add at most sqrt(2 UNDERFLOW) to each.
    size, extra, lost = real.abs(), 0, 0.0
    if imag is not None:
        size, extra, lost = (real.square() + imag.square()).sqrt(), 4, 2.0**-499
    depth = m + n + extra
    columns = add_up(inflate(float(size.sum(-2).amax()), depth, m), m * lost)
    rows = add_up(inflate(float(size.sum(-1).amax()), depth, n), n * lost)
    return sqrt_up(mul_up(columns, rows))


def matrix_norm_upper(matrix: torch.Tensor, *, entry_error: float = 0.0) -> NormEnclosure:
    r"""Bound the largest singular value of a matrix, or of the worst of a batch, from above.

    A guess c slightly above the largest eigenvalue of the smaller Gram matrix is proved by the
    residual of a Cholesky factor L of c I - G:

    .. math::  \lVert A \rVert_2^2 \le c + (1+u) \lVert S \rVert_F + u \max_i |D_{ii}|
               + \gamma_g \lVert A \rVert_F^2 + \gamma_l \lVert L \rVert_F^2 + 8 m (K_g + K_l)\,
               \eta

    (G = fl(A A^T), D = fl(c I - G), S = fl(D - fl(L L^T)); every term is derived in
    ``residual.py``). The matrix is first scaled by a power of two so that its largest entry lies in
    [1/2, 1); entries that this pushes below the normal range cost at most sqrt(m n) 2^-1022, which
    is added, as is ``entry_error``. Frobenius and sqrt(1-norm * infinity-norm) are bounded as well
    and the smallest of the three is returned.

    Args:
        matrix: Shape ``(m, n)`` or ``(B, m, n)``, float64, CPU or CUDA. Sizes may be zero.
        entry_error: Upper bound on the Frobenius norm of (true matrix - ``matrix``), the largest
            over a batch.

    Returns:
        The enclosure; ``upper`` is 0.0 exactly for zero and empty matrices.

    Raises:
        DtypeError: Not float64. float32 and narrower values convert exactly.
        ShapeError: Not two or three dimensions.
        NonFiniteError: NaN or infinity among the entries.
        NotCertifiedError: The process or device does not compute in IEEE 754 double precision.

    Guarantee:
        Rigorous. Assumes IEEE 754 binary64 (probed on every call), and matrix products that sum
        exact or rounded products in any order. The Cholesky solver and the eigenvalue estimate are
        not trusted. Relative excess below 1e-9 up to m = 2048 (typically 1e-12 at 64, 1e-10 at
        2048).

    Source:
        Rump, "Verified bounds for singular values", BIT 51 (2011) 367-384; the residual form is
        proved in full in ``residual.py``.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, -3.0], dtype=torch.float64))
        >>> 3.0 <= matrix_norm_upper(matrix).upper < 3.0 + 1e-12
        True
    """
    if matrix.dim() not in (2, 3):
        raise ShapeError(
            "a matrix (m, n) or a batch (B, m, n)",
            str(tuple(matrix.shape)),
            "matrix",
            "flatten the operator into matrices first",
        )
    return _norm_upper(matrix if matrix.dim() == 3 else matrix.unsqueeze(0), None, entry_error)


def complex_matrix_norm_upper(
    real: torch.Tensor, imag: torch.Tensor, *, entry_error: float = 0.0
) -> NormEnclosure:
    """Bound the largest singular value over a batch of complex matrices given by real and imaginary
    parts.

    The same proof as :func:`matrix_norm_upper`, with all trusted products formed on the real parts;
    the complex Cholesky factorisation is not trusted.

    Args:
        real: Real parts, shape ``(F, m, n)`` or ``(m, n)``, float64.
        imag: Imaginary parts, same shape, dtype and device.
        entry_error: Upper bound on the Frobenius norm of the complex entry errors, the largest over
            the batch.

    Returns:
        The enclosure of the largest norm of the batch.

    Raises:
        DtypeError: Not float64.
        ShapeError: Not two or three dimensions, or parts of different shapes.
        NonFiniteError: NaN or infinity among the entries.
        NotCertifiedError: The process or device does not compute in IEEE 754 double precision.

    Guarantee:
        Rigorous, with the assumptions of :func:`matrix_norm_upper`. Relative excess below 1e-8.

    Source:
        As :func:`matrix_norm_upper`; complex error terms in ``residual.py``.

    Example:
        >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
        >>> complex_matrix_norm_upper(one, one).upper >= 2.0**0.5
        True
    """
    if real.dim() not in (2, 3) or real.shape != imag.shape:
        raise ShapeError(
            "two parts of one shape (m, n) or (F, m, n)",
            f"{tuple(real.shape)} and {tuple(imag.shape)}",
            "real, imag",
            "pass the real and imaginary parts of the same batch",
        )
    lift: Callable[[torch.Tensor], torch.Tensor] = (
        (lambda t: t) if real.dim() == 3 else (lambda t: t.unsqueeze(0))
    )
    return _norm_upper(lift(real), lift(imag), entry_error)


def _norm_upper(real: torch.Tensor, imag: torch.Tensor | None, entry_error: float) -> NormEnclosure:
    entry_error = check_entry_error(entry_error)
    ensure_arithmetic(real.device)
    parts = [real] if imag is None else [real, imag]
    for part in parts:
        require_float64(part, "matrix")
    if real.numel() == 0:
        return enclosure(entry_error, 0.0, "empty")
    largest = max(magnitude(part, "matrix") for part in parts)
    if largest == 0.0:
        return enclosure(entry_error, 0.0, "zero")
    exponent = math.frexp(largest)[1]
    batch, m, n = real.shape
    sweep, squares, rows_columns, step = ResidualSweep(), 0.0, 0.0, chunk_size(m, n)
    for start in range(0, batch, step):
        chunk = [times_power_of_two(part[start : start + step], -exponent) for part in parts]
        found = sweep.feed(*chunk) if min(m, n) > 1 else largest_square_sum(*chunk)
        squares, rows_columns = max(squares, found), max(rows_columns, row_column_up(*chunk))
    bounds = [(sqrt_up(squares), "frobenius"), (rows_columns, "row-column")]
    estimate = math.sqrt(squares)
    if min(m, n) > 1:
        bounds.append((sqrt_up(sweep.squared), "cholesky"))
        estimate = math.sqrt(sweep.estimate)
    upper, method = min(bounds)
    upper = add_up(
        scale_up(add_up(upper, prescale_loss(len(parts) * m * n)), exponent), entry_error
    )
    return enclosure(upper, float(scale_up(estimate, exponent)), method)
