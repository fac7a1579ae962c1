# SPDX-License-Identifier: MIT
"""Every bound on the operators of the table against their exact norms. No tolerances below."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest

from lmtfast.verified.region import METHODS, operator_norm_upper
from tests.oracles import norm_is_at_most
from tests.soundness.constructions import (
    FAMILIES,
    Construction,
    construction,
)

COUNT, MANY = 20, 600
# Bareiss on so many rows takes milliseconds where entries are a few bits.
TABLE_SIZE = 36
UNKNOWN = ("C13", "C17", "C20")  # judged by the oracles alone
# Relative excess that the specification allows; the torus is exact on its own grid only.
EXCESS = {"auto": 1e-6, "dense": 1e-9, "banded": 1e-6}


def members(family: str, seeds: Iterable[int], size: int = 8) -> list[Construction]:
    return [construction(family, seed, size) for seed in seeds]


def assert_sound(case: Construction, bound: float, how: str, excess: float | None = None) -> None:
    assert not math.isnan(bound), (case, how)
    assert not case.understated_by(bound), f"{case}: {how} gives {bound!r}"
    if excess is not None:
        assert case.within(bound, excess), f"{case}: {how} gives {bound!r}"


# -- the table itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_right(family: str) -> None:
    """Exact, to one unit in the last place: the stated norm is a bound, the float below is none."""
    judged = 0
    for case in members(family, range(2 * COUNT)):
        matrix = case.matrix()
        if case.square is None or min(matrix.shape) > TABLE_SIZE:
            continue
        exponent = math.frexp(float(np.abs(matrix).max()))[1] if matrix.any() else 0
        scaled, square = np.ldexp(matrix, -exponent), case.square / Fraction(4) ** exponent
        root = math.sqrt(square)
        while Fraction(root) ** 2 < square:
            root = math.nextafter(root, math.inf)
        below = root
        while Fraction(below) ** 2 >= square and below > 0.0:
            below = math.nextafter(below, 0.0)
        assert norm_is_at_most(scaled, root), case
        assert square == 0 or not norm_is_at_most(scaled, below), case
        judged += 1
    assert judged > COUNT or family in UNKNOWN, judged


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bound_one_unit_too_small_is_noticed(family: str) -> None:
    """What the judge says of the norm itself and of the next smaller float, where one is exact."""
    judged = 0
    for case in members(family, range(2 * COUNT)):
        root = (
            Fraction(math.isqrt(case.square.numerator), math.isqrt(case.square.denominator))
            if (case.square)
            else Fraction(0)
        )
        if not root or root**2 != case.square:
            continue
        assert not case.understated_by(float(root))
        assert case.understated_by(math.nextafter(float(root), 0.0))
        judged += 1
    assert judged > 0 or family in UNKNOWN


# -- proofs of single operators --------------------------------------------------------------------


def proved(case: Construction, method: str) -> float:
    region, weights = case.region()
    return operator_norm_upper(region, weights, method=method).upper


def prove(case: Construction) -> None:
    for method in METHODS:
        if case.weight.ndim == 2 and method != "auto":
            continue  # a matrix has one proof, whatever is asked for
        assert_sound(case, proved(case, method), method, EXCESS.get(method))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_proof_is_below_the_exact_norm(family: str) -> None:
    for case in members(family, range(COUNT)):
        if not case.traceable_only:
            prove(case)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [4, 8, 24, 96])
def test_no_proof_is_below_the_exact_norm_in_a_long_search(family: str, size: int) -> None:
    for case in members(family, range(1000, 1000 + MANY // size * 4), size):
        if not case.traceable_only:
            prove(case)
