# SPDX-License-Identifier: MIT
"""Bounds and certified radii of networks against exact constants and radii. No tolerances."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.errors import LmtfastError
from tests.soundness.nets import (
    JOINS,
    NETS,
    PLANTED,
    PLANTED_SIZE,
    Net,
    n10,
    net,
    planar,
    plant,
    planted_model,
    trap,
)
from tests.soundness.polygons import exact_logits, exact_radius, pieces
from tests.soundness.traced import Traced

LEVELS = ("rigorous", "probabilistic")
RANGE = (-4.0, 5.0)


def certified(model: nn.Module, x: Tensor, level: str = "rigorous") -> lf.Certificate:
    return lf.certify(
        model, x, input_shape=tuple(x.shape[1:]), input_range=RANGE, level=level
    )  # fmt: skip


def assert_radius(
    radius: float, prediction: int, truth: tuple[int, Fraction | None], tight: bool = False
) -> None:
    """A radius claims that the class is the exact one and stays so strictly inside it."""
    best, square = truth
    assert radius >= 0.0
    if radius > 0.0:
        assert prediction == best
    if square is not None:
        assert radius < math.inf
        assert Fraction(radius) ** 2 < square or radius == 0.0
        assert not tight or Fraction(radius) ** 2 >= square * (1 - Fraction(1, 10**6))


def assert_net(case: Net, level: str = "rigorous") -> None:
    traced = Traced(case.model, case.shape)
    total = float(traced.bound(level=level).total)
    if case.constant is not None:
        assert not case.constant.understated_by(total), (case, total)
        if case.excess is not None and level == "rigorous":
            assert case.constant.within(total, case.excess), (case, total)
    if case.radii:
        assert case.points is not None
        found = traced.radii(case.points, level=level)
        for (prediction, radius), truth in zip(found, case.radii, strict=True):
            assert_radius(radius, prediction, truth, case.tight and level == "rigorous")
        assert not case.tight or any(radius > 0 for _, radius in found)


@pytest.mark.parametrize("family", [f for f in NETS if f != "N10"])
def test_constants_and_radii_are_never_overclaimed(family: str) -> None:
    for seed in range(2):
        assert_net(net(family, seed))
    assert_net(net(family, 2), "probabilistic")


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", NETS)
def test_constants_and_radii_are_never_overclaimed_in_a_long_search(
    family: str, level: str
) -> None:
    for seed in range(100, 140):
        assert_net(net(family, seed), level)


@pytest.mark.parametrize("join", range(len(JOINS)), ids=[j[0] for j in JOINS])
def test_n10_joins_have_their_exact_constant(join: int) -> None:
    assert_net(n10(np.random.default_rng(join), join))


# -- N7 and C16: every linear piece, in rationals --------------------------------------------------


def grid(rng: np.random.Generator, count: int) -> Tensor:
    return torch.from_numpy(rng.integers(0, 65, (count, 2)) / 64.0)


def assert_planar(model: nn.Sequential, rng: np.random.Generator, count: int) -> int:
    """The constant and the radii of a network on the plane; how many radii were positive."""
    found, traced = pieces(model), Traced(model, (2,))
    total = float(traced.bound().total)
    assert math.isinf(total) or not any(piece.slope_exceeds(total) for piece in found)
    x = grid(rng, count)
    claims = traced.radii(x)
    for point, (prediction, radius) in zip(x.tolist(), claims, strict=True):
        logits = exact_logits(model, point)
        truth = exact_radius(found, (Fraction(point[0]), Fraction(point[1])), logits)
        assert_radius(radius, prediction, truth)
    return sum(radius > 0 for _, radius in claims)


def test_n7_every_piece_of_a_small_relu_network() -> None:
    assert sum(assert_planar(planar(r := np.random.default_rng([7, s])), r, 6)
               for s in range(4)) > 8  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 200, 20))
def test_n7_every_piece_of_a_small_relu_network_in_a_long_search(start: int) -> None:
    for seed in range(start, start + 20):
        assert_planar(planar(r := np.random.default_rng([77, seed])), r, 20)


def test_c16_layers_that_cancel_only_in_exact_arithmetic() -> None:
    for seed in range(6):
        rng = np.random.default_rng([16, seed])
        try:
            assert_planar(trap(rng), rng, 20)
        except LmtfastError:
            continue  # refused: weights too extreme


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 200, 20))
def test_c16_layers_that_cancel_only_in_exact_arithmetic_in_a_long_search(start: int) -> None:
    for seed in range(start, start + 20):
        rng = np.random.default_rng([166, seed])
        try:
            assert_planar(trap(rng), rng, 20)
        except LmtfastError:
            continue


# -- N9: planted flips -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benches() -> dict[str, Traced]:
    return {
        kind: Traced(planted_model(kind), (1, PLANTED_SIZE)[kind != "convolution" :])
        for kind in PLANTED
    }


def assert_planted(kind: str, bench: Traced, seed: int, shrink: float = 1.0) -> bool:
    """Whether the class is certified at all; a radius that reaches the flip is an error."""
    case = plant(kind, bench.model, np.random.default_rng([9, seed]))
    at, there = exact_logits(bench.model, case.x.tolist()), exact_logits(bench.model, case.flip)
    assert at[0] > at[1]
    assert there[1] > there[0]
    moved = [b - Fraction(a) for a, b in zip(case.x.tolist(), case.flip, strict=True)]
    assert sum(m * m for m in moved) == case.distance**2 > case.square
    ((prediction, radius),) = bench.radii(case.x, shrink=shrink)
    assert prediction == 0
    assert Fraction(radius) < case.distance, (kind, seed)
    assert Fraction(radius) ** 2 < case.square, (kind, seed)
    return radius > 0.0


def test_n9_no_radius_reaches_a_planted_flip(benches: dict[str, Traced]) -> None:
    found = [assert_planted(k := PLANTED[s % len(PLANTED)], benches[k], s) for s in range(200)]
    assert all(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTED)
def test_n9_no_radius_reaches_a_planted_flip_in_a_long_search(
    kind: str, benches: dict[str, Traced]
) -> None:
    assert all(assert_planted(kind, benches[kind], 1000 + s) for s in range(500))


@pytest.mark.parametrize("kind", ["ramp", "convolution", "deep"])
def test_n9_notices_a_constant_that_is_a_thousandth_too_small(
    kind: str, benches: dict[str, Traced]
) -> None:
    noticed = 0
    for seed in range(20):
        try:
            assert_planted(kind, benches[kind], seed, shrink=0.999)
        except AssertionError:
            noticed += 1
    assert noticed == 20


@pytest.mark.parametrize("kind", PLANTED)
def test_n9_the_whole_certificate_agrees(kind: str, benches: dict[str, Traced]) -> None:
    bench = benches[kind]
    case = plant(kind, bench.model, np.random.default_rng(1))
    x = case.x.reshape(1, *bench.shape)
    for level in LEVELS:
        found = certified(bench.model, x, level)
        assert found.prediction[0] == 0
        assert 0 < Fraction(float(found.prediction_radius[0])) ** 2 < case.square
