# SPDX-License-Identifier: MIT
"""Verified norms of convolutions through their symbol on a finite torus of frequencies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from lmtfast.errors import ArgumentError, ShapeError
from lmtfast.verified.circle import unit_circle
from lmtfast.verified.matrix import NormEnclosure, enclosure
from lmtfast.verified.polyphase import Tap, polyphase
from lmtfast.verified.residual import ResidualSweep, chunk_size
from lmtfast.verified.rounding import (
    UNDERFLOW,
    add_up,
    ensure_arithmetic,
    frobenius_up,
    gamma_up,
    magnitude,
    mul_up,
    next_up,
    prescale_loss,
    require_float64,
    scale_up,
    sqrt_up,
    sum_up,
    times_power_of_two,
)

# A grid this large (1448 x 1448) is beyond any image a dense certificate is affordable for.
MAX_FREQUENCIES = 1 << 20
# Bound on the modulus of the error of one tabulated exp(i angle): both parts are correctly rounded
# from fixed point with 2^-100 to spare, so each is within 2^-53; the modulus within 2^-52.
_PHASE_ERROR = 2.0**-52
# One complex multiplication of numbers of modulus at most 1 + 2^-40 in float64: within
# sqrt(8) u (1 + small) < 4 u.
_MULTIPLY_ERROR = 2.0**-51


def _check_taps(taps: Sequence[Tap], *extents: Sequence[int]) -> int:
    """Number of axes; raises unless offsets, matrices and extents fit together."""
    axes = len(extents[0])
    for extent in extents:
        if len(extent) != axes or axes < 1 or any(n < 0 for n in extent):
            raise ShapeError(
                "one nonnegative extent per axis",
                str([tuple(e) for e in extents]),
                "extent",
                "give input and output extents with as many entries as the convolution has axes",
            )
    for offset, matrix in taps:
        require_float64(matrix, "taps")
        if len(offset) != axes or matrix.dim() != 2 or matrix.shape != taps[0][1].shape:
            raise ShapeError(
                f"{axes} offsets and a matrix of one shape per tap",
                f"offset {tuple(offset)} with matrix {tuple(matrix.shape)}",
                "taps",
                "build the taps with polyphase()",
            )
    return axes


def torus_norm_upper(
    taps: Sequence[Tap],
    *,
    input_extent: Sequence[int],
    output_extent: Sequence[int],
    max_frequencies: int = MAX_FREQUENCIES,
) -> NormEnclosure:
    r"""Bound the norm of a zero-padded stride-1 convolution by its symbol on a finite torus.

    The operator is ``out[o] = sum_q taps_q x[o + q]`` for o in ``[0, output_extent)``, with x zero
    outside ``[0, input_extent)``. Per axis, with M the input extent, n the output extent, and
    q_min, q_max over the taps that can reach the support at all (-n < q < M; the others are
    dropped, which changes nothing), take

    .. math::  N = \max(M - q_{\min},\; n + q_{\max},\; M,\; n).

    Proof that no tap wraps onto the support: N >= M and N >= n, so inputs and outputs embed into
    Z_N. For an output o in [0, n) and a tap q the zero-padded operator reads p = o + q. If 0 <= p <
    N the torus reads position p too, which holds x[p], or zero from M on. If p < 0, then p >= q_min
    >= M - N, so the torus reads p + N, in [M, N), where the embedded input is zero. p >= N cannot
    happen: p <= n - 1 + q_max <= N - 1. So the operator is a compression (embed, circular
    convolution on Z_N, restrict) and its norm is at most the circular one's, which the Fourier
    transform turns into the maximum over the N-grid of frequencies of

    .. math::  \lVert A(\omega) \rVert_2, \qquad A(\omega) = \sum_q W_q\, e^{i \omega \cdot q}.

    A(w) is the direct sum: phases are reduced modulo N in integers and tabulated from 128-bit
    integer arithmetic, so no assumption about a library's cosine enters. With phase error e
    (modulus), T taps and gamma = gamma(T), each part of each entry errs by at most (gamma (1 + e) +
    e) sum_q |W_q|, so the complex entries' error has Frobenius norm at most sqrt(2) times that of
    the summed absolute taps. Taps are real: A(-w) is the conjugate of A(w), and half the grid
    suffices.

    Args:
        taps: Pairs (offset per axis, matrix ``(C_out, C_in)`` float64), all of one shape and
            device.
        input_extent: Length of the input's support per axis.
        output_extent: Length of the output per axis.
        max_frequencies: Largest grid accepted, counted before halving.

    Returns:
        The enclosure; ``lower`` estimates the circular norm on the torus, not the zero-padded one.

    Raises:
        DtypeError: A tap is not float64.
        ShapeError: Offsets, matrices or extents disagree.
        NonFiniteError: NaN or infinity among the taps.
        ArgumentError: The grid exceeds ``max_frequencies``.

    Guarantee:
        Rigorous for the zero-padded operator, with the assumptions of
        :func:`lmtfast.verified.matrix.matrix_norm_upper`. Looser than the operator by the boundary
        effect (about 0.5 % on 32 x 32 maps, 8 % on 8 x 8).

    Source:
        The lemma and its proof are this project's; the block diagonalisation of circular
        convolutions is Sedghi, Gupta and Long (ICLR 2019), theorem 5.

    Example:
        >>> tap = torch.ones(1, 1, dtype=torch.float64)
        >>> taps = [((-1,), tap), ((0,), tap), ((1,), tap)]
        >>> bound = torus_norm_upper(taps, input_extent=(8,), output_extent=(8,))
        >>> 2.9 < bound.upper < 3.01
        True
    """
    axes = _check_taps(taps, input_extent, output_extent)
    taps = [
        (offset, matrix)
        for offset, matrix in taps
        if all(-output_extent[a] < offset[a] < input_extent[a] for a in range(axes))
    ]
    if not taps or math.prod(input_extent) * math.prod(output_extent) == 0:
        return enclosure(0.0, 0.0, "empty")
    size = [
        max(
            input_extent[a] - min(q[a] for q, _ in taps),
            output_extent[a] + max(q[a] for q, _ in taps),
            input_extent[a],
            output_extent[a],
        )
        for a in range(axes)
    ]
    return _grid_norm_upper(taps, size, max_frequencies)


def circular_norm_upper(
    taps: Sequence[Tap], *, extent: Sequence[int], max_frequencies: int = MAX_FREQUENCIES
) -> NormEnclosure:
    """Bound a circular stride-1 convolution ``out[o] = sum_q taps_q x[(o + q) mod extent]``.

    The singular values are those of the symbol on the grid of ``extent`` frequencies per axis, so
    the bound is tight to rounding. It does *not* bound a zero-padded convolution of the same size.

    Args:
        taps: As for :func:`torus_norm_upper`.
        extent: Length of input and output per axis.
        max_frequencies: Largest grid accepted.

    Returns:
        The enclosure.

    Raises:
        DtypeError, ShapeError, NonFiniteError, ArgumentError: As for :func:`torus_norm_upper`.

    Guarantee:
        Rigorous, with the assumptions of :func:`lmtfast.verified.matrix.matrix_norm_upper`.

    Source:
        Sedghi, Gupta and Long, "The singular values of convolutional layers", ICLR 2019, theorem 5.

    Example:
        >>> tap = torch.ones(1, 1, dtype=torch.float64)
        >>> bound = circular_norm_upper([((0,), tap), ((1,), tap)], extent=(6,))
        >>> 2.0 <= bound.upper < 2.0 + 1e-12
        True
    """
    _check_taps(taps, extent)
    if not taps or math.prod(extent) == 0:
        return enclosure(0.0, 0.0, "empty")
    return _grid_norm_upper(taps, list(extent), max_frequencies)


def _half_grid(size: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """One representative of each pair (j, -j) of grid points."""
    for j in itertools.product(*map(range, size)):
        if j <= tuple(-x % n for x, n in zip(j, size, strict=True)):
            yield j


def _grid_norm_upper(taps: Sequence[Tap], size: list[int], max_frequencies: int) -> NormEnclosure:
    if math.prod(size) > max_frequencies:
        raise ArgumentError(
            f"at most {max_frequencies} frequencies",
            f"{math.prod(size)} on a grid {tuple(size)}",
            "max_frequencies",
            "raise max_frequencies, or bound this operator by another method",
        )
    weights = torch.stack([matrix for _, matrix in taps])  # (T, C_out, C_in)
    ensure_arithmetic(weights.device)
    largest = magnitude(weights, "taps")
    if largest == 0.0:
        return enclosure(0.0, 0.0, "zero" if weights.numel() else "empty")
    exponent = math.frexp(largest)[1]
    weights = times_power_of_two(weights, -exponent)
    count, rows, columns = weights.shape
    offsets = torch.tensor(
        [offset for offset, _ in taps], dtype=torch.int64, device=weights.device
    )  # (T, axes)
    tables = [
        torch.tensor(unit_circle(n), dtype=torch.float64, device=weights.device) for n in size
    ]
    sweep, grid = ResidualSweep(), _half_grid(size)
    while batch := list(itertools.islice(grid, chunk_size(rows, columns))):
        cosine, sine = _phases(
            torch.tensor(batch, dtype=torch.int64, device=weights.device), offsets, tables
        )
        flat = weights.view(count, rows * columns)
        sweep.feed((cosine @ flat).view(-1, rows, columns), (sine @ flat).view(-1, rows, columns))
    error = _symbol_error(weights, len(size))
    # The triangle inequality over taps bounds every A(w); it decides only where the sweep
    # found no proof.
    triangle = sum_up(frobenius_up(matrix) for matrix in weights)
    upper, method = min(
        (add_up(sqrt_up(sweep.squared), error), "cholesky"), (triangle, "frobenius")
    )
    upper = add_up(upper, mul_up(float(count), prescale_loss(rows * columns)))
    return enclosure(
        scale_up(upper, exponent), scale_up(math.sqrt(sweep.estimate), exponent), method
    )


def _phases(
    grid: torch.Tensor, offsets: torch.Tensor, tables: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of w_f . q_t, shape (F, T), by one complex product per further axis."""
    cosine = sine = torch.empty(0)
    for a, table in enumerate(tables):
        index = (grid[:, a : a + 1] * offsets[:, a]) % table.shape[1]
        c, s = table[0][index], table[1][index]
        cosine, sine = (c, s) if a == 0 else (cosine * c - sine * s, sine * c + cosine * s)
    return cosine, sine


def _symbol_error(weights: torch.Tensor, axes: int) -> float:
    """Bound on the Frobenius norm of computed minus exact A(w), for any frequency."""
    count, rows, columns = weights.shape
    # Errors of unit-modulus factors add up; the factor 2 covers their products.
    phase = 2.0 * (axes * _PHASE_ERROR + (axes - 1) * _MULTIPLY_ERROR)
    gamma = gamma_up(count)
    per_entry = sum_up((mul_up(gamma, add_up(1.0, phase)), phase))
    # The sum of absolute taps is itself computed; 1 + 2 gamma covers 1 / (1 - gamma) for
    # gamma <= 1/2.
    total = mul_up(frobenius_up(weights.abs().sum(0)), add_up(1.0, mul_up(2.0, gamma)))
    lost = mul_up(2.0 * count * rows * columns, UNDERFLOW)
    return add_up(mul_up(next_up(math.sqrt(2.0)), mul_up(per_entry, total)), lost)


__all__ = ["MAX_FREQUENCIES", "Tap", "circular_norm_upper", "polyphase", "torus_norm_upper"]
