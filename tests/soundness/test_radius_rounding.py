# SPDX-License-Identifier: MIT
"""Radii from given logits, errors and constants: strictly safe and tight to some units, exactly."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtfast.composing import SQRT2_UP
from lmtfast.errors import ArgumentError, NotCertifiedError, ShapeError
from lmtfast.execution.recursion import Affine, ExecutionError
from lmtfast.radius import PairTable, canonical_up, radius_lower, raised_sum
from tests.classifiers import hand_made

INF, NAN = math.inf, math.nan
HEAD = torch.eye(5, dtype=torch.float64)
# Below the root of two by less than 2^-200, and above it.
ROOT2_DOWN = Fraction(math.isqrt(2 << 400), 1 << 200)
ROOT2_UP = ROOT2_DOWN + Fraction(1, 1 << 200)
TIGHT = 1 - Fraction(1, 2**45)


class Given(PairTable):
    """Pair norms by sample, not computed."""

    def __init__(self, rows: Tensor) -> None:
        self.given = rows

    def rows(self, classes: Tensor) -> Tensor:
        return self.given.scatter(1, classes[:, None], 0.0)


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, errors and pair norms that make every operation round."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn((count, 5), dtype=torch.float64, generator=generator)
    error = torch.rand((count, 5), dtype=torch.float64, generator=generator)
    pairs = torch.rand((count, 5), dtype=torch.float64, generator=generator) + 0.5
    return value, error * 2.0 ** torch.arange(-4.0, -54.0, -10.0), pairs


def rivals(
    value: Tensor, error: Tensor, pairs: Tensor
) -> list[tuple[int, list[tuple[Fraction, Fraction]]]]:
    """Of every sample the class and, per rival, the exact margin and the pair norm."""
    found = []
    for v, e, p in zip(value.tolist(), error.tolist(), pairs.tolist(), strict=True):
        c = max(range(len(v)), key=v.__getitem__)
        low = Fraction(v[c]) - Fraction(e[c])
        found.append((c, [(low - Fraction(v[j]) - Fraction(e[j]), Fraction(p[j]))
                          for j in range(len(v)) if j != c]))  # fmt: skip
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [None, 3.7])
def test_radii_are_strictly_safe_and_tight(seed: int, scale: float | None) -> None:
    value, error, pairs = drawn(400, seed)
    bound = hand_made(HEAD, 1.3)
    prediction, radius, margin = radius_lower(value, error, bound, scale=scale, pairs=Given(pairs))
    lipschitz = Fraction(1.3 if scale is None else scale)
    positive = 0
    for i, (c, row) in enumerate(rivals(value, error, pairs)):
        assert int(prediction[i]) == c
        least = min(m for m, _ in row)
        found, r = Fraction(float(margin[i])), Fraction(float(radius[i]))
        assert 0 <= found <= max(least, 0)
        if least <= 0:
            assert found == r == 0
            continue
        positive += 1
        assert all(r * lipschitz * p < m for m, p in row)
        if least > Fraction(1, 10):
            assert found >= least * TIGHT
            assert r >= min(m / (lipschitz * p) for m, p in row) * TIGHT
    assert positive > 100


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exponents", [(-3, -3, -3, -3), (-1, -9, -40, -40), (-40, -40, -1, -6)])
def test_executed_radii_are_strictly_safe_and_tight(
    seed: int, exponents: tuple[int, int, int, int]
) -> None:
    """``r ((L + s) P + sqrt(2) s') + c P + sqrt(2) c' < m`` for every rival."""
    value, error, pairs = drawn(400, seed)
    error = error * 2.0**-3
    c, s, c_logits, s_logits = (math.pi / 4 * 2.0**e for e in exponents)
    execution = ExecutionError(Affine(c, s), Affine(c_logits, s_logits), Affine(), 1e6)
    _, radius, _ = radius_lower(
        value, error, hand_made(HEAD, 1.3), pairs=Given(pairs), execution=execution
    )
    positive = 0
    for r, (_, row) in zip(
        map(Fraction, radius.tolist()), rivals(value, error, pairs), strict=True
    ):
        found = []
        for m, p in row:
            slope = (Fraction(1.3) + Fraction(s)) * p
            room = m - Fraction(c) * p - ROOT2_UP * Fraction(c_logits)
            assert r == 0 or r * (slope + ROOT2_UP * Fraction(s_logits)) < room
            found.append(room / (slope + ROOT2_UP * Fraction(s_logits)))
        if min(found) > Fraction(1, 10):
            positive += 1
            assert r >= min(found) * TIGHT
    assert positive > 30


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_the_largest_radius_without_an_overflow_is_the_largest_radius() -> None:
    execution = ExecutionError(Affine(), Affine(), Affine(), 0.25)
    zero, bound = row(0, 0, 0, 0, 0), hand_made(HEAD)
    for value in (row(9, 0, 0, 0, 0), row(0.01, 0, 0, 0, 0)):
        free = float(radius_lower(value, zero, bound)[1])
        held = float(radius_lower(value, zero, bound, execution=execution)[1])
        assert held == min(free, 0.25) or 0.99 * free < held < free < 0.25
    single = hand_made(torch.ones(1, 2, dtype=torch.float64))
    assert float(radius_lower(row(1), row(0), single, execution=execution)[1]) == 0.25
    assert float(radius_lower(row(1), row(0), single)[1]) == INF


def test_execution_may_separate_classes_that_exactly_never_meet() -> None:
    """Equal rows of a head never change their margin, but their executions do."""
    head, zero = torch.ones(2, 3, dtype=torch.float64), row(0, 0)
    bound = hand_made(head)
    assert float(radius_lower(row(1, 0), zero, bound)[1]) == INF
    grows = ExecutionError(Affine(), Affine(0.0, 0.5), Affine(), INF)
    found = float(radius_lower(row(1, 0), zero, bound, execution=grows)[1])
    assert 0.99 * math.sqrt(2) < found < math.sqrt(2)
    parts = ExecutionError(Affine(), Affine(0.75, 0.0), Affine(), INF)
    assert float(radius_lower(row(1, 0), zero, bound, execution=parts)[1]) == 0.0


def test_every_operation_of_a_margin_rounds_outward() -> None:
    """Of logits near -0.4 and -1 the lower rounds twice as coarsely as the difference: the steps
    of the other operations do not cover it."""
    generator = torch.Generator().manual_seed(4)
    low, high, errors = (torch.rand((20_000, n), dtype=torch.float64, generator=generator)
                         for n in (1, 1, 2))  # fmt: skip
    value = torch.cat((-0.4 - 0.05 * low, -1.0 - 0.1 * high), 1)
    for flip in (False, True):
        given = -value.flip(1) if flip else value
        _, _, margin = radius_lower(given, 1e-3 * errors, hand_made(HEAD[:2]))
        truths = rivals(given, 1e-3 * errors, value)
        for found, (_, [(exact, _)]) in zip(margin.tolist(), truths, strict=True):
            assert found <= exact


@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("what", ["value", "error"])
def test_what_is_not_finite_has_no_radius(what: str, bad: float, where: int) -> None:
    value, error = row(1, 0, -1).repeat(2, 1), row(0, 0, 0).repeat(2, 1)
    (value if what == "value" else error)[0, where] = bad
    for head in (torch.eye(3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)):
        _, radius, margin = radius_lower(value, error, hand_made(head))
        assert float(radius[0]) == float(margin[0]) == 0.0
        assert min(float(radius[1]), float(margin[1])) > 0.0
    single = hand_made(torch.ones(1, 2, dtype=torch.float64))
    one = radius_lower(value[:, where : where + 1], error[:, where : where + 1], single)
    assert one[1].tolist() == one[2].tolist() == [0.0, INF]


def test_a_negative_error_is_no_error() -> None:
    bound = hand_made(torch.eye(3, dtype=torch.float64))
    for where in range(3):
        error = row(0, 0, 0)
        error[0, where] = -1e-300
        assert float(radius_lower(row(1, 0, 0), error, bound)[1]) == 0.0


@pytest.mark.parametrize("features", [0.0, 1.0])
@pytest.mark.parametrize("head", [torch.eye(2), torch.ones(2, 2)])
@pytest.mark.parametrize("value", [(0.0, 0.0), (1.0, 1.0), (-1.0, -1.0)])
def test_ties_have_radius_zero(value: tuple[float, float], head: Tensor, features: float) -> None:
    bound = hand_made(head.double(), features)
    _, radius, margin = radius_lower(row(*value), row(0, 0), bound)
    assert radius.tolist() == margin.tolist() == [0.0]


def test_margins_that_rounding_hides_are_no_margins() -> None:
    """``1 - 2^-60 < 1`` may be a tie, or lost: float64 sees the margin as 0 or as one unit."""
    for errors in ((2.0**-60, 0.0), (0.0, 2.0**-60), (2.0**-54, 2.0**-54)):
        for gap in (0.0, 2.0**-53):
            _, radius, _ = radius_lower(row(1.0, 1.0 - gap), row(*errors), hand_made(HEAD[:2]))
            exact = Fraction(gap) - sum(map(Fraction, errors))
            assert exact > 0 or float(radius) == 0.0


@pytest.mark.parametrize("nothing", [{"scale": 0.0}, {}])
def test_a_constant_function_keeps_its_class(nothing: dict[str, float]) -> None:
    bound = hand_made(HEAD, 1.0 if nothing else 0.0)
    _, radius, margin = radius_lower(row(1, 0, 0, 0, 0), row(0, 0, 0, 0, 0), bound, **nothing)
    assert radius.tolist() == [INF]
    assert 0.999 < float(margin) <= 1.0


def test_the_total_counts_without_a_head_and_the_features_with_one() -> None:
    zero = row(0, 0)
    without = hand_made(HEAD[:2], 1.0, head_weight=None, total=4.0)
    assert 0.99 / (4 * math.sqrt(2)) < float(radius_lower(row(1, 0), zero, without)[1]) < 0.1768
    beside = hand_made(HEAD[:2], 0.5, total=4.0)
    assert 1.41 < float(radius_lower(row(1, 0), zero, beside)[1]) < math.sqrt(2)


def test_no_samples_have_no_radii() -> None:
    none = torch.zeros(0, 5, dtype=torch.float64)
    for found in radius_lower(none, none, hand_made(HEAD)):
        assert found.shape == (0,)


FAULTS: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "estimate": (NotCertifiedError, lambda: radius_lower(
        row(1, 0), row(0, 0), hand_made(HEAD[:2], level="estimate"))),
    "another norm": (ArgumentError, lambda: radius_lower(
        row(1, 0), row(0, 0), hand_made(HEAD[:2], norm="linf"))),
    "other classes": (ShapeError, lambda: radius_lower(row(1, 0), row(0, 0), hand_made(HEAD))),
    "other errors": (ShapeError, lambda: radius_lower(row(1, 0), row(0), hand_made(HEAD[:2]))),
    "no samples' axis": (ShapeError, lambda: radius_lower(
        row(1, 0)[0], row(0, 0)[0], hand_made(HEAD[:2]))),
    "negative": (NotCertifiedError, lambda: radius_lower(
        row(1, 0), row(0, 0), hand_made(HEAD[:2]), scale=-1e-300)),
    "no number": (NotCertifiedError, lambda: radius_lower(
        row(1, 0), row(0, 0), hand_made(HEAD[:2], NAN))),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_certified_is_refused(name: str) -> None:
    kind, call = FAULTS[name]
    with pytest.raises(kind):
        call()


def test_a_raised_sum_is_above_and_near() -> None:
    """``a`` may be half a unit below what it stands for."""
    generator = torch.Generator().manual_seed(5)
    x, y, b = (torch.rand(2000, dtype=torch.float64, generator=generator) + 0.01 for _ in range(3))
    for u, v, w, found in zip(*map(Tensor.tolist, (x, y, b, raised_sum(x * y, b))), strict=True):
        exact = Fraction(u) * Fraction(v) + Fraction(w)
        assert exact <= Fraction(found) <= exact * (1 + Fraction(1, 2**50))


def test_the_root_of_two_is_above_and_near() -> None:
    assert ROOT2_UP < Fraction(SQRT2_UP) < ROOT2_UP * (1 + Fraction(1, 2**51))


def test_canonical_bounds_have_24_bits_and_the_margin_of_other_machines() -> None:
    generator = torch.Generator().manual_seed(6)
    normal = torch.randn(2000, dtype=torch.float64, generator=generator).abs()
    powers = torch.randint(-1000, 1000, (2000,), generator=generator).double()
    for value in [*(normal * 2.0**powers).tolist(), 1.0, 1.0 - 2.0**-53, 1.5, 2.0**-1000]:
        raised = Fraction(canonical_up(value))
        least = Fraction(value) * (1 + Fraction(1, 2**26))
        assert least <= raised <= least * (1 + Fraction(1, 2**22))
        assert (math.frexp(float(raised))[0] * 2**24).is_integer()


@pytest.mark.parametrize("value", [5e-324, 1e-323, 1e-310, 2.0**-1022])
def test_canonical_bounds_of_denormal_numbers_are_not_below(value: float) -> None:
    assert value <= canonical_up(value) <= 2 * value


def test_canonical_bounds_beyond_the_largest_number_are_infinite() -> None:
    assert canonical_up(sys.float_info.max) == canonical_up(INF) == INF
    assert canonical_up(1.7e308) < 1.7e308 * (1 + 2e-7)
    assert canonical_up(0.0) == 0.0
