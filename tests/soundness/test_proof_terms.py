# SPDX-License-Identifier: MIT
"""Every term of the norm proofs is as large as its derivation says, by exact arithmetic.

Where another term would hide it, the inputs make it the largest one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtfast.verified import residual, rounding
from lmtfast.verified.matrix import (
    complex_matrix_norm_upper,
    enclosure,
    matrix_norm_upper,
    row_column_up,
)
from lmtfast.verified.residual import BLOCK, ResidualSweep, product_depth
from lmtfast.verified.rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    frobenius_up,
    gamma_up,
    inflate,
    largest_square_sum,
    prescale_loss,
    ratio_up,
    scale_up,
    sub_up,
)
from tests.oracles import complex_norm_is_at_most, norm_is_at_most, svd_norm
from tests.soundness.hostile import HostileSums

U = Fraction(1, 2**53)
NEAR = 1 + Fraction(1, 10**9)
# Below the root of two by less than 2^-200.
ROOT2_DOWN = Fraction(math.isqrt(2 << 400), 1 << 200)


def gamma(n: int) -> Fraction:
    return n * U / (1 - n * U)


def squared(*parts: Tensor) -> Fraction:
    """Exact sum of the squares."""
    if all(bool((4 * p == (4 * p).trunc()).all()) for p in parts):  # then float64 has them exactly
        return sum((Fraction(float(p.square().sum())) for p in parts), Fraction(0))
    return sum((Fraction(v) ** 2 for p in parts for v in p.reshape(-1).tolist()), Fraction(0))


def is_tight(found: float, exact: Fraction) -> bool:
    """The smallest float at or above."""
    return Fraction(math.nextafter(found, -math.inf)) < exact <= Fraction(found)


# -- scalars
# ----------------------------------------------------------------------------------------


def test_the_constants_of_the_arithmetic() -> None:
    assert Fraction(UNIT_ROUNDOFF) >= U
    assert Fraction(UNDERFLOW) >= Fraction(1, 2**1022)


@pytest.mark.parametrize("depth", [0, 1, 7, 10**6, 2**51, 2**52 - 1])
@pytest.mark.parametrize("computed", [0.0, 5e-324, 2.0**-1000, 0.1, 1.0, 3e200])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_raised_sum_is_its_formula(computed: float, depth: int, count: int) -> None:
    exact = Fraction(computed) / (1 - gamma(depth)) + 2 * count * Fraction(UNDERFLOW)
    found = inflate(computed, depth, count)
    assert found == 0.0 if exact == 0 else is_tight(found, exact)


@pytest.mark.parametrize("n", [1, 2, 100, 4608, 10**9, 2**52, 2**53 - 1])
def test_gamma_is_its_formula(n: int) -> None:
    assert is_tight(gamma_up(n), gamma(n))


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_the_loss_of_prescaling_is_its_formula(count: int) -> None:
    found = Fraction(prescale_loss(count))
    least = count * Fraction(1, 2**2044)
    assert least <= found**2 <= least * NEAR


@pytest.mark.parametrize("count", [1, 3, 1023, 1024, 1025, 3000, 1 << 20])
@pytest.mark.parametrize("parts", [1, 2])
def test_sums_of_squares_may_lose_what_their_order_allows(count: int, parts: int) -> None:
    values = torch.full((2, count), 0.75, dtype=torch.float64)
    values[1] *= 0.5
    with HostileSums():
        found = largest_square_sum(*[values] * parts)
        length = frobenius_up(values[0])
    assert Fraction(found) >= parts * count * Fraction(9, 16)
    assert Fraction(found) <= parts * count * Fraction(9, 16) * NEAR
    assert Fraction(length) ** 2 >= count * Fraction(9, 16)


@pytest.mark.parametrize("count", [1, 1000, 2048])
def test_sums_of_squares_that_vanish_are_positive(count: int) -> None:
    tiny = torch.full((1, count), 2.0**-540, dtype=torch.float64)
    for parts in ([tiny], [tiny, tiny]):
        assert Fraction(largest_square_sum(*parts)) >= squared(*parts)


# -- row and column sums
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 3), (3, 1), (2, 2), (5, 4096), (4096, 5), (300, 300)]
)
@pytest.mark.parametrize("imaginary", [False, True])
def test_row_and_column_sums_may_lose_what_they_may(
    shape: tuple[int, int], imaginary: bool
) -> None:
    """All moduli are 5/8: the bound is 5/8 sqrt(m n)."""
    m, n = shape
    real = torch.full((1, m, n), 0.375 if imaginary else -0.625, dtype=torch.float64)
    imag = torch.full((1, m, n), -0.5, dtype=torch.float64) if imaginary else None
    with HostileSums():
        found = row_column_up(real, imag)
    least = Fraction(25, 64) * m * n
    assert least <= Fraction(found) ** 2 <= least * NEAR


def test_the_worst_row_and_column_of_the_batch_count() -> None:
    matrix = torch.zeros(3, 3, 4, dtype=torch.float64)
    matrix[1, 1] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    matrix[2, :, 2] = torch.tensor([5.0, -6.0, 7.0])
    # Of one member 10 and 4, of the other 7 and 18; each member's own product counts at least.
    assert Fraction(row_column_up(matrix)) ** 2 >= 7 * 18


@pytest.mark.parametrize("imaginary", [0.0, 2.0**-600])
def test_moduli_whose_squares_vanish_count(imaginary: float) -> None:
    for shape in ((1, 1), (3, 2), (50, 40)):
        real = torch.full((1, *shape), 2.0**-600, dtype=torch.float64)
        found = row_column_up(real, torch.full_like(real, imaginary))
        least = shape[0] * shape[1] * (Fraction(2.0**-600) ** 2 + Fraction(imaginary) ** 2)
        assert Fraction(found) ** 2 >= least


def test_the_reported_slack_is_the_excess_over_the_estimate() -> None:
    assert enclosure(3.0, 2.0, "cholesky").slack == 0.5
    assert enclosure(1.0, 1.5, "cholesky").slack == 0.0
    zero = enclosure(0.0, 7.0, "zero")
    assert zero.upper == zero.lower == zero.slack == 0.0
    for unknown in (0.0, math.inf, math.nan, -1.0):
        assert enclosure(1.0, unknown, "cholesky").slack == math.inf


@pytest.mark.parametrize("vanishing", ["real", "imag"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 5), (5, 3)])
def test_a_part_that_vanishes_leaves_the_norm_of_the_other(
    shape: tuple[int, int], batched: bool, vanishing: str
) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    given = matrix.unsqueeze(0) if batched else matrix
    for small in (torch.zeros_like(given), given * 2.0**-400, torch.full_like(given, 5e-324)):
        pair = (small, given) if vanishing == "real" else (given, small)
        found = complex_matrix_norm_upper(*pair)
        exact = matrix.numpy()
        assert norm_is_at_most(exact, found.upper)
        assert found.upper <= svd_norm(exact) * (1 + 1e-9)


def test_members_of_a_complex_batch_are_matrices() -> None:
    real, imag = torch.randn(2, 4, 3, dtype=torch.float64).unbind(0)
    single = complex_matrix_norm_upper(real, imag)
    assert single == complex_matrix_norm_upper(real[None], imag[None])
    assert complex_norm_is_at_most(real.numpy(), imag.numpy(), single.upper)


@pytest.mark.parametrize("entry_error", [0.0, 0.5])
def test_nothing_and_zero_have_the_norm_of_their_error(entry_error: float) -> None:
    for shape, method in (((0, 3), "empty"), ((2, 0), "empty"), ((2, 3), "zero")):
        found = matrix_norm_upper(torch.zeros(shape).double(), entry_error=entry_error)
        assert (found.upper, found.lower, found.method) == (entry_error, 0.0, method)


# -- the residual form
# ----------------------------------------------------------------------------------------


def known_term(monkeypatch: pytest.MonkeyPatch, *parts: Tensor) -> float:
    """What the sweep takes for the rounding of the Gram matrix and all underflow."""
    seen: list[float] = []

    def search(self: ResidualSweep, real: Tensor, imag: Any, known: float) -> None:
        seen.append(known)

    monkeypatch.setattr(ResidualSweep, "_search", search)
    ResidualSweep().feed(*parts)
    (known,) = seen
    return known


SHAPES = [(2, 2), (2, 3), (7, 2), (3, 700), (2, 1030)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("imaginary", [False, True])
@pytest.mark.parametrize("exponent", [0, -520])
def test_the_gram_matrix_term_is_its_formula(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], imaginary: bool, exponent: int
) -> None:
    """``kappa gamma |A|_F^2 + 8 m (K_g + K_l) UNDERFLOW``; at 2^-520 only underflow is left."""
    m, n = sorted(shape)
    count = 2 if imaginary else 1
    parts = [torch.randn((1, *shape), dtype=torch.float64) * 2.0**exponent for _ in range(count)]
    found = Fraction(known_term(monkeypatch, *parts))
    kappa = ROOT2_DOWN if imaginary else 1
    depth = product_depth(count, n)
    least = kappa * gamma(depth) * squared(*parts)
    least += 8 * m * count * (n + m) * Fraction(UNDERFLOW)
    assert least <= found <= least * NEAR


@pytest.mark.parametrize("inner", [1, 2, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_depth_of_a_product_counts_every_rounding(inner: int, parts: int) -> None:
    """A product, the sums of its block, and one addition per block and part after the first."""
    blocks = -(-inner // BLOCK)
    assert product_depth(parts, inner) == min(inner, BLOCK) + parts * blocks - 1
    assert product_depth(parts, 0) >= 0


def excess(shifted: Tensor, factor: Tensor, imag: Sequence[Tensor] | None = None) -> Fraction:
    if imag is None:
        return Fraction(ResidualSweep._excess(shifted.clone(), None, factor))
    return Fraction(ResidualSweep._excess(shifted.clone(), imag[0], torch.complex(factor, imag[1])))


def lower(order: int, *, unit: bool = False) -> Tensor:
    """A lower triangular matrix of small integers, whose product is exact."""
    generator = torch.Generator().manual_seed(order)
    entries = torch.randint(-3, 4, (1, order, order), generator=generator).double()
    return entries.tril(-1) + torch.eye(order, dtype=torch.float64) * (1 if unit else 5)


@pytest.mark.parametrize("order", [1, 2, 3, 40, 600])
@pytest.mark.parametrize("imaginary", [False, True])
def test_without_a_residual_the_roundings_are_left(order: int, imaginary: bool) -> None:
    """``u max D_ii + kappa gamma |L|_F^2``, and no more where the residual is exactly zero."""
    factor = lower(order)
    shifted = factor @ factor.mT
    zeros = [torch.zeros_like(factor), torch.zeros_like(factor)]
    found = excess(shifted, factor, zeros if imaginary else None)
    kappa, count = (ROOT2_DOWN, 2) if imaginary else (1, 1)
    largest = max(Fraction(v) for v in shifted[0].diagonal().tolist())
    least = U * largest + kappa * gamma(product_depth(count, order)) * squared(factor)
    assert least <= found <= least * NEAR


@pytest.mark.parametrize("order", [1, 2, 40, 600])
@pytest.mark.parametrize("where", ["diagonal", "below", "first column"])
@pytest.mark.parametrize("imaginary", [False, True])
def test_every_entry_of_the_residual_counts(order: int, where: str, imaginary: bool) -> None:
    """``(1 + u) |S|_F``: S is all there is, entries off the diagonal stand in both triangles."""
    if order == 1 and where != "diagonal":
        return
    residue = torch.zeros(1, order, order, dtype=torch.float64)
    if where == "diagonal":
        residue[0].diagonal()[-1] = 3.0
    else:
        residue[0, -1, 0 if where == "first column" else -2] = 3.0
    if imaginary and where != "diagonal":
        nothing = torch.zeros_like(residue)
        found = excess(nothing, nothing, [residue - residue.mT, nothing])
    else:
        found = excess(residue + residue.tril(-1).mT, torch.zeros_like(residue))
    least = (1 + U) ** 2 * 9 * (1 if where == "diagonal" else 2)
    assert least <= found**2 <= least * NEAR


@pytest.mark.parametrize("order", [30, 600])
def test_squares_of_the_residual_may_lose_what_they_may(order: int) -> None:
    shifted = torch.full((1, order, order), 0.75, dtype=torch.float64)
    with HostileSums():
        found = excess(shifted, torch.zeros_like(shifted))
    assert found**2 >= squared(shifted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_factor_that_is_no_number_proves_nothing(bad: float) -> None:
    factor = torch.ones(2, 3, 3, dtype=torch.float64).tril()
    factor[1, 2, 0] = bad
    assert ResidualSweep._excess(torch.ones_like(factor), None, factor) == math.inf


def test_products_in_blocks_are_the_product() -> None:
    """Small integers: every block once, in every position, with its sign."""
    inner = 2 * BLOCK + 5
    a, b = (torch.randint(-4, 5, (2, 6, inner)).double() for _ in range(2))
    for start, stop in ((0, 6), (2, 5)):
        found = residual.block_row([(1.0, a, a), (-1.0, b, a)], start, stop, inner)
        whole = a @ a.mT - b @ a.mT
        assert torch.equal(found, whole[:, start:stop, :stop])


# -- helpers that only their callers' tests call
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-2500, -1500, -1000, 1000, 1500, 2500])
def test_powers_of_two_go_beyond_the_range_of_one_factor(exponent: int) -> None:
    value = torch.tensor([0.75 * 2.0 ** max(-1000, min(1000, -exponent))], dtype=torch.float64)
    found = float(rounding.times_power_of_two(value, exponent))
    exact = Fraction(float(value)) * Fraction(2) ** exponent
    assert Fraction(found) == exact if abs(exponent) < 2000 else found in (0.0, math.inf)


def test_zero_is_not_scaled() -> None:
    for tensor in (torch.zeros(3).double(), torch.zeros(0, 2).double()):
        scaled, exponent = rounding.prescale(tensor)
        assert exponent == 0
        assert torch.equal(scaled, tensor)


@pytest.mark.parametrize("exponent", [-1100, -3, 0, 3, 1100])
def test_scaling_is_exact_where_it_can_be(exponent: int) -> None:
    value = 0.7 * 2.0 ** min(0, -exponent // 2) * 2.0 ** max(0, -exponent // 2)
    assert Fraction(scale_up(value, exponent)) == Fraction(value) * Fraction(2) ** exponent


def test_subtraction_and_ratios_round_up() -> None:
    assert is_tight(sub_up(1.0, 1e-30), 1 - Fraction(1e-30))
    assert is_tight(ratio_up(1, 3), Fraction(1, 3))
    assert is_tight(ratio_up(-1, 3), Fraction(-1, 3))
    assert rounding.sqrt_up(0.0) == rounding.hypot_up(0.0, 0.0) == rounding.hypot_up() == 0.0
    zeros = (rounding.sum_down(()), rounding.mul_down(0.0, 1.0), rounding.div_down(0.0, 1.0),
             rounding.ratio_down(0, 1), rounding.sqrt_down(0.0))  # fmt: skip
    assert all(math.copysign(1.0, zero) == 1.0 for zero in zeros)
    # A quotient that rounds to the smallest negative number and is raised to zero: a positive one.
    assert math.copysign(1.0, ratio_up(-3, 4 << 1074)) == 1.0
