# SPDX-License-Identifier: MIT
"""The soak can fail: its matrices are the modules', its judge sees one unit, its counter sums."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from lmtfast.verified import residual
from tests.cases import unit_matrix
from tests.oracles import conv_matrix, svd_norm
from tests.soundness import rayleigh, soak
from tests.soundness.rayleigh import LONGEST_ROW, Pattern, bareiss_accepts, judge, limbs
from tests.soundness.sites import COMPOSITES, Site, larger_conv, linear, small_conv
from tests.soundness.soak import COUNTER, Plan, Tally, lines, run_plan, run_stretch
from tests.soundness.weight_sets import GENERATORS, hadamard


def random_sites() -> list[Site]:
    rng = random.Random(5)
    convs = [small_conv(seed) for seed in range(60)] + [larger_conv(rng, 90) for _ in range(12)]
    return [linear(3, 5), *convs, *(make(rng) for make in COMPOSITES for _ in range(3))]


@pytest.mark.parametrize("site", random_sites(), ids=lambda site: site.kind)
def test_the_matrix_of_a_site_is_its_modules(site: Site) -> None:
    rng, drawn = np.random.default_rng(2), []
    for name in site.weights:
        weight = site.module.get_parameter(name)
        shape = tuple(weight.shape)
        sets = GENERATORS["dyadic"](rng, 2, shape[0], math.prod(shape[1:])).reshape(2, *shape)
        weight.data.copy_(sets[1])
        drawn.append(sets)
    matrix = site.pattern.matrices(site.values(drawn))[1]
    assert np.array_equal(matrix, unit_matrix(site.module, site.shape))


@pytest.mark.parametrize("seed", range(40))
def test_the_matrix_of_a_convolution_is_the_oracles(seed: int) -> None:
    site = small_conv(seed)
    conv = site.module
    weight = np.random.default_rng(seed).integers(-99, 99, conv.weight.shape).astype(float)
    want = conv_matrix(
        weight, site.shape, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.padding_mode, conv.transposed, conv.output_padding,
    )  # fmt: skip
    assert np.array_equal(site.pattern.matrices(weight.reshape(1, -1))[0], want)


@pytest.mark.parametrize("name", GENERATORS)
def test_limbs_lose_nothing_and_small_sets_are_judged(name: str) -> None:
    rng = np.random.default_rng(3)
    for m, n in ((1, 1), (4, 4), (2, 7), (9, 3)):
        sets = GENERATORS[name](rng, 3, m, n).double()
        assert sets.shape == (3, m, n)
        assert bool(sets.isfinite().all())
        values = sets.reshape(3, -1).numpy()
        whole = np.zeros_like(values)
        for part, exponent in reversed(limbs(values)):
            assert np.abs(part).max() < 1 << 20
            whole += np.ldexp(part.astype(float), exponent[:, None])
        assert np.array_equal(whole, values)
        # By elimination: at or above the truth nothing is refused.
        norms = np.array([np.nextafter(math.hypot(*row), math.inf) * (1 + 1e-12) for row in values])
        assert not judge(Pattern.dense(m, n), values, norms).unsound.any()
        assert all(
            bareiss_accepts(Pattern.dense(m, n), v, c) for v, c in zip(values, norms, strict=True)
        )


KNOWN = {
    "hadamard 16": (np.sign(hadamard(np.random.default_rng(0), 1, 16, 16)[0]), 4.0),
    "diagonal": (np.diag([1.0, -0.75, 1.0 - 2.0**-52]), 1.0),
    "one entry": (np.array([[0.0, -3.5, 0.0]]), 3.5),
    "pythagorean": (np.outer([3.0, 4.0], [1.0, 2.0, 2.0]), 15.0),
    "circulant": (np.array([np.roll([3.0, -1.0, 0.0, -2.0], i) for i in range(4)]), 6.0),
    "wide": (np.eye(2, 40), 1.0),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("power", [-900, -149, 0, 127, 900])
def test_the_judge_sees_one_unit_in_the_last_place(name: str, power: int) -> None:
    matrix, norm = KNOWN[name]
    values = np.ldexp(matrix, power).reshape(1, -1).repeat(3, 0)
    truth = math.ldexp(norm, power)
    bounds = np.array([truth, math.nextafter(truth, 0.0), truth * (1.0 - 2.0**-52)])
    pattern = Pattern.dense(*matrix.shape)
    found = judge(pattern, values, bounds)
    assert found.unsound.tolist() == [False, True, True]
    assert found.excess[0] == 0.0
    accepted = [bareiss_accepts(pattern, v, c) for v, c in zip(values, bounds, strict=True)]
    assert accepted == [True, False, False]


@pytest.mark.parametrize(("m", "n"), [(1, 9), (7, 7), (32, 32), (3, 200), (90, 60)])
def test_the_judge_sees_a_few_units_for_any_matrix(m: int, n: int) -> None:
    values = np.random.default_rng(m).standard_normal((20, m * n))
    norms = np.array([svd_norm(v.reshape(m, n)) for v in values])
    assert judge(Pattern.dense(m, n), values, norms * (1.0 - 2.0**-48)).unsound.all()
    assert not judge(Pattern.dense(m, n), values, norms * (1.0 + 2.0**-48)).unsound.any()


def test_large_sides_are_judged_through_a_krylov_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rayleigh, "SOLVED", 100)
    values = np.random.default_rng(0).standard_normal((2, 150 * 170))
    norms = np.array([svd_norm(v.reshape(150, 170)) for v in values])
    assert judge(Pattern.dense(150, 170), values, norms * (1.0 - 2.0**-30)).unsound.all()
    assert not judge(Pattern.dense(150, 170), values, norms * (1.0 + 2.0**-48)).unsound.any()


def test_the_judge_refuses_what_is_no_bound() -> None:
    values = np.array([[1.0, 2.0]] * 4 + [[0.0, 0.0]] * 2)
    bounds = np.array([math.nan, -3.0, 0.0, math.inf, 0.0, 5e-324])
    found = judge(Pattern.dense(1, 2), values, bounds)
    assert found.unsound.tolist() == [True, True, True, False, False, False]
    assert not bareiss_accepts(Pattern.dense(1, 2), values[0], 0.0)


def test_rows_too_long_for_the_integers_are_refused() -> None:
    n = LONGEST_ROW + 1
    with pytest.raises(AssertionError):
        judge(Pattern.dense(1, n), np.ones((1, n)), np.array([math.inf]))


def tiny_plan(rng: random.Random, number: int) -> Plan:
    composite = COMPOSITES[number % len(COMPOSITES)](rng)
    sites = linear(1, 9), linear(4, 300), linear(16, 11), small_conv(number + 1), composite
    return Plan(sites, "auto", 4, 8)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of a few hundred sets, which trace in a second."""
    monkeypatch.setitem(soak.SIZES, "small", tiny_plan)
    monkeypatch.setattr(soak, "BAREISS_EVERY", 20)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_a_short_soak_finds_nothing_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    counter = tmp_path / "soak" / "counter.jsonl"
    first = run_stretch(counter, "small", 3, wanted=1, seconds=math.inf)
    assert (first.first, first.plans, first.count, first.unsound) == (0, 1, 160, 0)
    assert first.exact > 6
    assert run_stretch(counter, "small", 3, wanted=160, seconds=math.inf).plans == 0
    second = run_stretch(counter, "small", 3, wanted=161, seconds=math.inf)
    assert (second.first, second.count, second.unsound) == (1, 160, 0)
    assert run_stretch(counter, "small", 3, wanted=999, seconds=0.0).plans == 0
    check(list(lines(counter)), clean=False)


def rounded_down(honest: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Products as a worse machine may sum them: short by half of what the proof allows for."""

    def block_row(parts: residual.Parts, start: int, stop: int, inner: int) -> Tensor:
        sizes = [(1.0, left.abs(), right.abs()) for _, left, right in parts]
        allowed = residual.product_depth(len(parts), inner) * residual.UNIT_ROUNDOFF
        exact = honest(parts, start, stop, inner)
        return exact - 0.5 * allowed * honest(sizes, start, stop, inner)

    return block_row


@pytest.mark.usefixtures("tiny")
def test_a_dropped_gamma_term_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(residual, "block_row", rounded_down(residual.block_row))
    honest = Tally("small", 3, 0)
    run_plan(honest, 0)
    assert honest.unsound == 0
    monkeypatch.setattr(residual, "gamma_up", lambda depth: 0.0)
    counter = tmp_path / "counter.jsonl"
    arguments = ["--small", "100", "--seed", "3", "--counter", str(counter)]
    monkeypatch.setattr(sys, "argv", ["soak", *arguments])
    assert soak.main() == 1
    (line,) = lines(counter)
    assert line["unsound"] == len(line["findings"]) > 3
    assert {"plan", "block", "site", "round", "generator", "bound"} <= set(line["findings"][0])
    assert json.loads(capsys.readouterr().err) == line["findings"]


@pytest.mark.usefixtures("tiny")
def test_bounds_a_trifle_too_small_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = soak.plan_bound

    def short(*args: object, **options: object) -> object:
        bound = honest(*args, **options)
        bound.per_operator.update({k: v * (1.0 - 2.0**-36) for k, v in bound.per_operator.items()})
        return bound

    monkeypatch.setattr(soak, "plan_bound", short)
    tally = Tally("small", 3, 0)
    run_plan(tally, 0, until=0.0)
    assert tally.count == 40
    # Zero stays zero, and a unit of the denormal range is far more than 2^-36.
    assert tally.unsound > 0.8 * tally.count


def check(found: list[dict], clean: bool = True) -> None:
    """Every line is well formed, counts each set once, and has no unsound bound."""
    seen: set[tuple[str, int, int]] = set()
    for line in found:
        assert datetime.strptime(line["date"], "%Y-%m-%dT%H:%M:%SZ") > datetime(2026, 1, 1)
        assert re.fullmatch(
            r"[0-9a-f]{40}" + ("" if clean else "( with local changes)?|unknown"), line["commit"]
        )
        assert set(line["versions"]) == {"python", "torch", "numpy"}
        assert line["machine"]
        assert line["size"] in soak.SIZES
        assert line["count"] > 0
        for parts in ("generators", "kinds", "methods"):
            assert sum(line[parts].values()) == line["count"], parts
            assert min(line[parts].values()) > 0
        assert 0 <= line["exact"] <= line["count"]
        assert 0 <= line["unbounded"] <= line["count"]
        assert line["unsound"] == 0
        assert line["findings"] == []
        assert all(0.0 <= v < math.inf for v in line["excess"].values())
        names = {name for name in line["excess"] if not name.startswith("any, by ")}
        assert names <= set(line["generators"])
        turns = {(line["size"], line["seed"], line["first"] + i) for i in range(line["plans"])}
        assert turns
        assert not turns & seen
        seen |= turns


def test_the_public_counter_is_honest() -> None:
    found = list(lines(COUNTER))
    assert found
    check(found)
    assert COUNTER.read_bytes().endswith(b"\n")
    for size in soak.SIZES:
        assert sum(line["count"] for line in found if line["size"] == size) > 0


def test_the_counters_check_can_fail() -> None:
    line = next(lines(COUNTER))
    kinds = {**line["kinds"], "linear": line["kinds"]["linear"] - 1}
    for seeded in (
        {"unsound": 1},
        {"count": line["count"] + 1},
        {"commit": "main"},
        {"kinds": kinds},
    ):
        with pytest.raises(AssertionError):
            check([line | seeded])
    with pytest.raises(AssertionError):
        check([line, line])
