# SPDX-License-Identifier: MIT
"""Ten thousand tied and nearly tied logit vectors, judged by exact rationals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import lmtfast as lf
from lmtfast.radius import radius_lower
from tests.classifiers import UNIT, certified, hand_made, linear
from tests.oracles import exact_sum_of_squares

COUNT, CLASSES = 5000, 4
HEAD = torch.tensor(
    [[1.0, 0.5, -0.25], [1.0, 0.5, -0.25], [0.5, -1.0, 2.0], [0.0, 3.0, 0.125]], dtype=torch.float64
)


def vectors(seed: int) -> Tensor:
    """Random logits of very different sizes, ``(COUNT, CLASSES)``."""
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randn(COUNT, CLASSES, generator=generator, dtype=torch.float64)
    exponent = torch.randint(-300, 300, (COUNT, 1), generator=generator)
    return torch.ldexp(mantissa, exponent)


def test_no_tie_is_certified() -> None:
    values = vectors(1)
    top = values.amax(1, keepdim=True)
    # Two to four classes share the maximum, among them the two of one and the same row.
    tied = torch.arange(COUNT)[:, None] % 3 >= torch.arange(CLASSES)[None] - 1
    logits = torch.where(tied, top, values)
    logits[::7] = 0.0
    for error in (0.0, 1e-300):
        radius = radius_lower(logits, torch.full_like(logits, error), hand_made(HEAD))[1]
        assert len(radius) >= 5000
        assert not radius.any()


def test_near_ties_are_certified_only_as_far_as_they_reach() -> None:
    """``r ||w_c - w_j|| L < z_c - z_j - 2 e`` in rationals, strictly; r > 0 only where that is."""
    values, lipschitz = vectors(2), 1.0 + 2.0**-30
    top = values.abs().amax(1, keepdim=True)
    steps = torch.randint(1, 40, (COUNT, CLASSES), generator=torch.Generator().manual_seed(3))
    # Neighbouring floats, up to forty apart.
    logits = top * (1.0 - steps.double() * 2.0**-53)
    logits[torch.arange(COUNT), torch.arange(COUNT) % CLASSES] = top[:, 0]
    errors = torch.where(torch.arange(COUNT)[:, None] % 2 == 0, 0.0, top * 2.0**-54)
    errors = errors.expand_as(logits).contiguous()
    prediction, radius, _ = radius_lower(logits, errors, hand_made(HEAD, lipschitz))
    squares = [
        [exact_sum_of_squares((a - b).numpy()) * Fraction(lipschitz) ** 2 for b in HEAD]
        for a in HEAD
    ]
    positive = 0
    for z, e, c, r in zip(
        logits.tolist(), errors[:, 0].tolist(), prediction.tolist(), radius.tolist(), strict=True
    ):
        if r == 0.0:
            continue
        positive += 1
        for j in range(CLASSES):
            margin = Fraction(z[c]) - Fraction(z[j]) - 2 * Fraction(e)
            if j != c:
                assert margin > 0
                # Infinite only if the two rows are one row.
                assert squares[c][j] == 0 if math.isinf(r) else True
                if squares[c][j]:
                    assert Fraction(r) ** 2 * squares[c][j] < margin**2
    assert len(radius) == COUNT
    assert positive > COUNT // 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_certify_nothing(bad: float) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    for column in range(CLASSES):
        for where in ("value", "error"):
            value, error = logits.clone(), torch.zeros_like(logits)
            (value if where == "value" else error)[0, column] = bad
            assert radius_lower(value, error, hand_made(HEAD))[1].tolist() == [0.0]
    negative = torch.full_like(logits, -1.0)
    assert radius_lower(logits, negative, hand_made(HEAD))[1].tolist() == [0.0]


def test_duplicated_rows_of_a_head_tie_everywhere() -> None:
    """Two classes with one row and one bias never part; with another bias they never meet."""
    row, other = [0.5, -0.25], [-1.0, 0.125]
    x = torch.rand(20, 2, dtype=torch.float64)
    tie = certified(linear([row, row, other], [1.0, 1.0, -9.0]), x)
    assert not tie.prediction_radius.any()
    apart = certified(linear([row, row], [1.0, 0.5]), x)
    assert apart.prediction_radius.tolist() == [math.inf] * 20
    assert apart.counts["constant"] == 20


def test_a_radius_is_infinite_only_where_the_constant_is_zero() -> None:
    x = torch.rand(3, 2)
    for value in (0.0, 2.0**-149, 1e-30):
        model = torch.nn.Linear(2, 2).eval()
        model.weight.data.zero_()
        model.weight.data[0, 0] = value
        model.bias.data = torch.tensor([1.0, 0.0])
        radius = lf.certify(model, x, input_shape=(2,), input_range=UNIT).prediction_radius
        assert bool((radius == math.inf).all()) is (value == 0.0)
        assert (radius > 0).all()
