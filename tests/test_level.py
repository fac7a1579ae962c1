# SPDX-License-Identifier: MIT
"""Levels: strings equal to their names that compose by the weakest part."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lmtfast as lf
from lmtfast.errors import ArgumentError, NotCertifiedError
from lmtfast.level import DELTAS, Level, weakest
from lmtfast.tables import certificate_table

NAMES = list(DELTAS)
levels = st.sampled_from([Level("estimate"), Level("rigorous")]) | st.floats(
    0.0, 1.0, exclude_min=True, exclude_max=True
).map(lambda delta: Level("probabilistic", delta))


@pytest.mark.parametrize("name", NAMES)
def test_a_level_is_its_name(name: str) -> None:
    level = Level(name)
    assert level == name
    assert hash(level) == hash(name)
    assert {level: 1}[name] == 1
    assert f"{level}" == str(level) == name
    assert type(str(level)) is str
    assert json.dumps({"level": level}) == f'{{"level": "{name}"}}'
    assert Level(level) is level
    assert level.delta == DELTAS[name]


@given(levels)
def test_copies_keep_the_probability(level: Level) -> None:
    for twin in (pickle.loads(pickle.dumps(level)), copy.copy(level), copy.deepcopy(level)):
        assert (type(twin), twin, twin.delta) == (Level, level, level.delta)


def test_a_level_cannot_change() -> None:
    for name in ("delta", "_delta", "other"):
        with pytest.raises(AttributeError):
            setattr(Level("rigorous"), name, 0.5)


def test_names_sort_by_strength() -> None:
    assert sorted(NAMES) == ["estimate", "probabilistic", "rigorous"]


def test_labels_carry_the_probability() -> None:
    assert [Level(n).label for n in NAMES] == ["estimate", "probabilistic(7.9e-31)", "rigorous"]


@pytest.mark.parametrize(
    ("name", "delta"),
    [
        ("exact", None), ("", None), ("Rigorous", None), ("probabilistic", 0.0),
        ("probabilistic", 1.0), ("probabilistic", -0.1), ("probabilistic", float("nan")),
        ("rigorous", 0.1), ("estimate", 0.5), (Level("rigorous"), 0.5),
    ],
)  # fmt: skip
def test_other_levels_are_refused(name: str, delta: float | None) -> None:
    with pytest.raises(ArgumentError):
        Level(name, delta)


@given(levels, levels)
def test_two_levels_compose_to_the_weaker_one(a: Level, b: Level) -> None:
    both, exact = a & b, Fraction(a.delta) + Fraction(b.delta)
    assert both <= min(a, b)
    assert (both.delta, both) == ((b & a).delta, b & a)
    assert Fraction(both.delta) >= min(exact, 1)
    assert both == min(a, b) or exact >= 1 or both.delta == 1.0
    assert (a & "rigorous").delta == a.delta
    assert (a & "estimate") == "estimate"


@given(st.lists(levels, max_size=6))
def test_many_levels_compose_to_the_least_float_above_the_exact_sum(several: list[Level]) -> None:
    exact = sum((Fraction(level.delta) for level in several), Fraction(0))
    found = weakest(several)
    if exact >= 1:
        assert found == "estimate"
    else:
        assert exact <= Fraction(found.delta) <= exact * (1 + Fraction(2) ** -52)
        assert (found == "rigorous") == (exact == 0)


def test_a_bound_has_the_level_of_its_weakest_operator() -> None:
    conv = nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).eval()
    lines = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    for model, shape, drawn in ((conv, (1, 3), True), (lines, (3,), False)):
        asked = Level("probabilistic", 2.0**-20)
        bound = lf.certified_bound(model, shape, level=asked)
        assert bound.level == ("probabilistic" if drawn else "rigorous")
        assert bound.delta == (2.0**-20 if drawn else 0.0)


@pytest.mark.parametrize("operators", [1, 3, 7])
def test_the_shares_of_the_operators_add_up_to_what_was_asked(
    operators: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []

    def recorded(*_: object, delta: float, **__: object) -> float:
        shares.append(Fraction(delta))
        return 1.0

    monkeypatch.setattr("lmtfast.verified.drawn.moment_norm_upper", recorded)
    blocks = itertools.chain.from_iterable(
        (nn.Conv1d(1, 1, 3, padding=1), nn.ReLU()) for _ in range(operators)
    )
    lf.certified_bound(nn.Sequential(*blocks).eval(), (1, 4), level="probabilistic", delta=0.1)
    assert len(shares) == operators
    assert Fraction(0.1) * Fraction(0.999) < sum(shares) <= Fraction(0.1)


def test_estimates_are_refused_where_something_is_claimed() -> None:
    for level in ("estimate", Level("estimate")):
        with pytest.raises(NotCertifiedError):
            lf.certify(
                nn.Linear(2, 2).eval(), torch.rand(1, 2), input_shape=(2,), input_range=(0, 1),
                level=level,
            )  # fmt: skip
    with pytest.raises(ArgumentError):
        lf.certified_bound(nn.Linear(2, 2).eval(), (2,), level="rigorous", delta=0.5)


def test_a_table_does_not_mix_levels() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).eval()
    data, given_range = (torch.rand(2, 1, 3), torch.tensor([0, 1])), (0.0, 1.0)
    several = {
        level: lf.certify(model, data, input_shape=(1, 3), input_range=given_range, level=level)
        for level in ("rigorous", "probabilistic")
    }
    with pytest.raises(ArgumentError, match="probabilistic.*rigorous"):
        certificate_table(several, (0.1,), title="both")
    assert certificate_table({"one": several["probabilistic"]}, (0.1,), title="one").row_count
