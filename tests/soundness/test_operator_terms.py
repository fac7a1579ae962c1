# SPDX-License-Identifier: MIT
"""Terms of the proofs for operators: bands of blocks, symbols, and the moment bound."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from fractions import Fraction

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor

from lmtfast.backends.reference import Leaves
from lmtfast.verified import banded, composite, convolution
from lmtfast.verified import dense as dense_module
from lmtfast.verified.banded import residual_up
from lmtfast.verified.convolution import ConvolutionGram, Geometry
from lmtfast.verified.dense import materialise
from lmtfast.verified.moment import (
    _DRAW_ERROR,
    PRODUCT_ERROR,
    moment_norm_upper,
    normal_draw,
)
from lmtfast.verified.rounding import UNDERFLOW
from lmtfast.verified.torus import _MULTIPLY_ERROR, _PHASE_ERROR, _symbol_error
from tests.soundness.test_proof_terms import NEAR, ROOT2_DOWN, U, gamma, squared
from tests.soundness.test_weight_error import (
    OPERATIONS,
    ROWS,
    STORED,
    W,
    dense,
    leaves,
    never_below,
    region,
)
from tests.test_verified_banded import all_forms, dense_matrix


def root_down(value: Fraction) -> Fraction:
    return Fraction(math.isqrt((value.numerator << 300) // value.denominator), 1 << 150)


# -- bands of blocks
# ----------------------------------------------------------------------------------------


class Blocks:
    """A matrix stored whole, in blocks of the orders given, with an error for every block."""

    def __init__(self, matrix: Tensor, orders: list[int], bandwidth: int, error: float) -> None:
        self.matrix, self.orders, self.bandwidth, self.lost = matrix, orders, bandwidth, error
        self.starts = [sum(orders[:i]) for i in range(len(orders) + 1)]

    def part(self, matrix: Tensor, i: int, j: int) -> Tensor:
        s = self.starts
        return matrix[s[i] : s[i + 1], s[j] : s[j + 1]].clone()

    def block(self, i: int, j: int) -> Tensor:
        return self.part(self.matrix, i, j)

    def error(self, i: int, j: int) -> float:
        return self.lost * (1 + i + 2 * j)


def factor(orders: list[int], bandwidth: int) -> Tensor:
    """A banded lower triangular matrix of small integers, which its product gives back exactly."""
    size, generator = sum(orders), torch.Generator().manual_seed(sum(orders))
    lower = torch.randint(-2, 3, (size, size), generator=generator).double().tril(-1)
    rows = torch.repeat_interleave(torch.arange(len(orders)), torch.tensor(orders))
    lower = lower * ((rows[:, None] - rows[None, :]) <= bandwidth)
    return lower + 4.0 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("orders", [[1], [3], [2, 2], [3, 1, 2], [1, 1, 1, 1], [2, 3, 2, 3, 2]])
@pytest.mark.parametrize("bandwidth", [0, 1, 2])
@pytest.mark.parametrize("error", [0.0, 2.0**-40, 1.0])
def test_blocks_without_a_residual_leave_the_roundings(
    orders: list[int], bandwidth: int, error: float
) -> None:
    """``gamma (|D| + sum |L_ik| |L_jk|) + u max D + error``; the largest sum over a block row."""
    lower, guess = factor(orders, bandwidth), 1024.0
    shifted = lower @ lower.mT
    gram = Blocks(guess * torch.eye(len(shifted)).double() - shifted, orders, bandwidth, error)
    found = Fraction(residual_up(gram, guess))
    sums = [Fraction(0)] * len(orders)
    for i in range(len(orders)):
        for j in range(max(0, i - bandwidth), i + 1):
            shared = range(max(0, i - bandwidth), j + 1)
            size = root_down(squared(gram.part(shifted, i, j)))
            size += sum(root_down(squared(gram.part(lower, i, k)) * squared(gram.part(lower, j, k)))
                        for k in shared)  # fmt: skip
            least = gamma(sum(orders[k] + 1 for k in shared)) * size
            least += Fraction(gram.error(i, j))
            if i == j:
                least += U * Fraction(float(gram.part(shifted, i, i).diagonal().max()))
            for row in {i, j}:
                sums[row] += least
    assert max(sums) <= found <= 2 * max(sums) * NEAR


@pytest.mark.parametrize("order", [1, 2, 40, banded.BLOCK + 1, 2 * banded.BLOCK + 3])
def test_both_halves_of_a_symmetric_residual_count(order: int) -> None:
    generator = torch.Generator().manual_seed(order)
    lower = torch.randint(-3, 4, (order, order), generator=generator).double().tril(-1)
    whole = lower + lower.mT + torch.eye(order, dtype=torch.float64)
    # The upper half beside the diagonal blocks is never computed.
    computed = whole.clone()
    for start in range(0, order, banded.BLOCK):
        computed[start : start + banded.BLOCK, start + banded.BLOCK :] = 0.0
    found = Fraction(banded._residual_up(computed, symmetric=True)) ** 2
    assert squared(whole) <= found <= squared(whole) * NEAR
    found = Fraction(banded._residual_up(whole, symmetric=False)) ** 2
    assert squared(whole) <= found <= squared(whole) * NEAR


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**500, -(2.0**500)])
def test_absurd_residuals_prove_nothing(bad: float) -> None:
    work = torch.eye(3, dtype=torch.float64)
    work[2, 0] = bad
    assert banded._residual_up(work, symmetric=True) == math.inf
    assert banded._residual_up(work, symmetric=False) == math.inf
    assert banded._residual_up(torch.zeros(0, 3).double(), symmetric=False) == 0.0


def test_estimates_that_are_no_numbers_prove_nothing() -> None:
    gram = Blocks(torch.eye(2, dtype=torch.float64), [2], 0, 0.0)
    for estimate in (0.0, -1.0, math.nan, math.inf):
        assert banded.squared_norm_upper(gram, estimate) == math.inf
    assert 1.0 <= banded.squared_norm_upper(gram, 1.0) <= 1.0 + 1e-6
    assert 1.0 <= banded.squared_norm_upper(gram, 0.999) <= 1.1


# -- Gram matrices of operators
# ----------------------------------------------------------------------------------------


def majorant(left: Tensor, right: Tensor) -> Fraction:
    """Square of the Frobenius norm of ``|left| |right|^T``."""
    return squared(left.abs() @ right.abs().mT)


@pytest.mark.parametrize("channels", [1, 3, 40])
@pytest.mark.parametrize("kernel", [(1,), (5,), (3, 2), (2, 2, 2)])
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("exponent", [0, -520])
def test_a_convolutions_blocks_err_by_every_rounding(
    channels: int, kernel: tuple[int, ...], outputs: bool, exponent: int
) -> None:
    """Where one output reads every input, an entry sums all products of channels and taps."""
    ones = (1,) * len(kernel)
    g = Geometry(kernel, ones, kernel, ones, ones, (0,) * len(kernel))
    weight = torch.full((1, channels, *kernel), 0.75 * 2.0**exponent, dtype=torch.float64)
    gram = ConvolutionGram(weight, g, convolution._form(g, 1, channels, outputs, 0))
    count, inner = math.prod(kernel), channels if outputs else 1
    found = Fraction(gram.error(0, 0))
    if outputs:
        least = gamma(inner + count - 1) * squared(weight / 2.0**exponent)
    else:
        matrix = (weight / 2.0**exponent).reshape(-1, 1)
        least = gamma(inner) * root_down(majorant(matrix, matrix))
    underflow = inner * (count if outputs else 1) * Fraction(UNDERFLOW)
    assert least * Fraction(2) ** (2 * exponent) + underflow <= found


@pytest.mark.parametrize("seed", range(6))
def test_blocks_of_convolutions_err_by_gamma_times_their_majorant(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "SMALLEST_BLOCK", 4)
    generator = torch.Generator().manual_seed(seed)
    g = Geometry((6, 5), (6, 4), (3, 2), (1, 1), (1, 1), (1, 0))
    weight = torch.randint(1, 5, (2, 3, 3, 2), generator=generator).double()
    matrix = dense_matrix(weight, g)
    for form in all_forms(g, 2, 3):
        axes = [form.axis, 1 - form.axis]
        extent, order = (g.out_extent, 2) if form.outputs else (g.in_extent, 3)
        side = (matrix if form.outputs else matrix.T).reshape(order, *extent, -1)
        side = side.permute(*(1 + a for a in axes), 0, 3).flatten(0, -2)
        gram = ConvolutionGram(weight, g, form)
        starts = [sum(gram.orders[:k]) for k in range(len(gram.orders) + 1)]
        rows = [side[starts[k] : starts[k + 1]] for k in range(len(gram.orders))]
        inner = weight.shape[1 if form.outputs else 0]
        for i in range(len(rows)):
            for j in range(max(0, i - gram.bandwidth), i + 1):
                least = gamma(inner + 1) ** 2 * majorant(rows[i], rows[j])
                assert least <= Fraction(gram.error(i, j)) ** 2


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("exponent", [0, -520])
def test_blocks_of_regions_err_by_every_rounding(outputs: bool, exponent: int) -> None:
    """A column of ones: each entry of T_i sums all products of a line."""
    op = dense(1, 24) if outputs else dense(24, 1)
    weights = Leaves({W: torch.full(op.out_shape + op.in_shape, 0.75, dtype=torch.float64)})
    found = region(op)
    reach = composite.line_reach(found, weights)
    form = composite._form(found, reach if outputs else reach.T, outputs)
    gram = composite.CompositeGram(found, weights, form, -exponent)
    scale = Fraction(2) ** (2 * exponent)
    for i in range(len(gram.orders)):
        least = scale * gamma(24) * gram.orders[i] * 24 * Fraction(9, 16)
        least += 24 * gram.orders[i] * Fraction(UNDERFLOW)
        assert least <= Fraction(gram.error(i, i)) <= 4 * least


@pytest.mark.parametrize("name", ["linear", "wide", "conv", "groups"])
@pytest.mark.parametrize("scaled", [False, True])
def test_materialising_errs_by_gamma_times_the_absolute_matrix(name: str, scaled: bool) -> None:
    op = OPERATIONS[name]
    op = replace(op, row_scales=ROWS, gain=0.5) if scaled else op
    weights = leaves(op, r=op.out_shape[0])
    absolute = materialise(region(op), weights).abs()
    least = gamma(STORED + 2 if scaled else 1) ** 2 * squared(absolute)
    assert least <= Fraction(dense_module._materialising_error(region(op), weights)) ** 2
    if scaled:
        # One float off in every entry is a matrix that the proof has to cover.
        found = dense_module.dense_norm_upper(region(op), weights).upper
        assert never_below(absolute * torch.sign(materialise(region(op), weights)), found)


# -- symbols
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 2, 3), (300, 1, 2)])
@pytest.mark.parametrize("exponent", [0, -990])
def test_the_symbols_error_is_its_formula(
    axes: int, shape: tuple[int, int, int], exponent: int
) -> None:
    """``sqrt(2) (gamma (1 + e) + e) |sum of absolute taps|_F``, and what underflows."""
    count, rows, columns = shape
    generator = torch.Generator().manual_seed(axes)
    weights = torch.randn(shape, dtype=torch.float64, generator=generator) * 2.0**exponent
    phase = axes * Fraction(_PHASE_ERROR) + (axes - 1) * Fraction(_MULTIPLY_ERROR)
    total = sum((sum(abs(Fraction(v)) for v in column) ** 2
                 for column in weights.reshape(count, -1).mT.tolist()), Fraction(0))  # fmt: skip
    g = gamma(count)
    scale = Fraction(2) ** exponent
    least = ROOT2_DOWN * (g * (1 + phase) + phase) * root_down(total / scale**2) * scale
    least += root_down(Fraction(2 * rows * columns)) * count * Fraction(UNDERFLOW)
    assert least <= Fraction(_symbol_error(weights, axes)) <= least * 4


# -- moments
# ----------------------------------------------------------------------------------------


def words(seed: int, pairs: int) -> list[tuple[int, int, int]]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2**63), 2**63 - 1, (pairs, 3), generator=generator).tolist()
    extremes = [(0, 0, 0), (-1, -1, -1), (0, 1 << 11, 1), (-1, 0, 1 << 62), (1 << 63 - 1, 5, 2)]
    return [tuple(v) for v in [*extremes, *values][:pairs]]  # type: ignore[misc]


def test_the_draw_is_the_box_muller_map() -> None:
    """Three words a pair: 106 bits of a uniform, its side, and 53 bits of the angle."""
    drawn = words(1, 200)
    content = b"".join(struct.pack("<3q", *(v - (1 << 64) if v >= 1 << 63 else v for v in row))
                       for row in drawn)  # fmt: skip
    found = normal_draw((400,), lambda n: content[:n]).tolist()
    with mpmath.workdps(60):
        for i, row in enumerate(drawn):
            high, low, turn = ((v % (1 << 64)) >> 11 for v in row)
            w = (mpf(high) + (mpf(low) + mpf(0.5)) / 2**53) / 2**54
            uniform = w if row[2] % 2 == 0 else 1 - w
            radius = mpmath.sqrt(-2 * mpmath.log(uniform))
            angle = 2 * mpmath.pi * (mpf(turn) + mpf(0.5)) / 2**53
            for value, exact in ((found[i], radius * mpmath.cos(angle)),
                                 (found[200 + i], radius * mpmath.sin(angle))):  # fmt: skip
                assert abs(mpf(value) - exact) <= mpf(_DRAW_ERROR) * radius


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_draw_asks_for_the_bytes_it_uses(count: int) -> None:
    asked: list[int] = []

    def zeros(n: int) -> bytes:
        asked.append(n)
        return bytes(n)

    assert normal_draw((count, 1), zeros).shape == (count, 1)
    assert asked == [24 * ((count + 1) // 2)]


@pytest.mark.parametrize("product_error", [0.0, 2.0**-20, 2.0**-17])
@pytest.mark.parametrize("iterations", [1, 7, 100])
@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("power", [0, 400])
def test_the_moment_bound_is_its_formula(
    product_error: float, iterations: int, probes: int, power: int
) -> None:
    """Of 3 2^p times the identity, whose iterates are known."""
    content = torch.randint(0, 256, (24 * 40,), dtype=torch.uint8).numpy().tobytes()
    delta, sigma = 0.25, 3.0 * 2.0**power
    found = moment_norm_upper(
        lambda x: x * sigma, lambda y: y * sigma, (5,), delta=delta, probes=probes,
        iterations=iterations, product_error=product_error, entropy=lambda n: content[:n],
    )  # fmt: skip
    draws = normal_draw((probes, 5), lambda n: content[:n])
    with mpmath.workdps(50):
        longest = max(mpmath.sqrt(sum(mpf(v) ** 2 for v in row)) for row in draws.tolist())
        rho = mpf(2.1) * max(mpf(product_error), mpf(PRODUCT_ERROR))
        t = mpmath.root(mpf(delta), probes) * mpmath.sqrt(mpmath.pi / 2)
        t -= (rho * iterations * (1 + rho) ** iterations + mpf(_DRAW_ERROR)) * longest
        exact = mpf(sigma) * (longest / t) ** (mpf(1) / (2 * iterations))
        assert exact <= mpf(found) <= exact * (1 + mpf(2) ** -30)


def test_the_constants_of_the_moment_bound() -> None:
    assert _DRAW_ERROR >= 2.0**-46
    assert PRODUCT_ERROR >= 2.0**-35


def test_the_constants_of_the_symbol() -> None:
    """A product of complex floats errs by the root of five units (Brent, Percival, Zimmermann)."""
    assert Fraction(_MULTIPLY_ERROR) ** 2 >= 5 * U**2
    assert Fraction(_PHASE_ERROR) >= 2 * U
