# SPDX-License-Identifier: MIT
"""The checker's proof of a norm where the arithmetic is exact: what is left is what it counts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from lmtfast import check
from tests.described_convolutions import convolution_matrix
from tests.oracles import svd_norm
from tests.soundness.certificates import UP
from tests.soundness.test_checker_operators import BELOW, drawn, loop
from tests.soundness.test_checker_terms import samples

UNIT, NEAR = 2.0**-8, 1.0 + 2.0**-17


def gamma(count: int) -> float:
    return count * UNIT / (1.0 - count * UNIT)


def depth(inner: int) -> int:
    """Roundings of a matrix product that is added up in chunks, and subtracted."""
    return min(inner, check.CHUNK) + inner // check.CHUNK + 2


Spans = Sequence[tuple[int, int]]


def counted(rows: list[np.ndarray], spans: Spans, factors: list[np.ndarray], g: float) -> float:
    """Bound on ``|g I - T T^T - L L^T|`` by the blocks' lengths and the roundings of each."""
    assert check.UNIT == UNIT  # which lengths take into account as well
    count, width = len(rows), max(high for _, high in spans)
    wide = [
        np.pad(r, ((0, 0), (low, width - high))) for r, (low, high) in zip(rows, spans, strict=True)
    ]
    lower: dict[tuple[int, int], np.ndarray] = {}
    sums = [0.0] * count
    for i in range(count):
        met = [max(spans[i][0], spans[j][0]) < min(spans[i][1], spans[j][1]) for j in range(i)]
        first = met.index(True) if True in met else i
        for j in range(first, i + 1):
            shared = slice(max(spans[i][0], spans[j][0]), min(spans[i][1], spans[j][1]))
            a, b = wide[i][:, shared], wide[j][:, shared]
            e = (g * np.eye(len(a)) if i == j else 0.0) - a @ b.T
            inner = max(0, shared.stop - shared.start)
            error = gamma(depth(inner)) * check.length(a) * check.length(b)
            error += UNIT * max(abs(np.diagonal(e)), default=0.0)
            size, roundings = check.length(e), 1
            for k in range(j):
                if (i, k) in lower and (j, k) in lower:
                    e = e - lower[i, k] @ lower[j, k].T
                    size += check.length(lower[i, k]) * check.length(lower[j, k])
                    roundings += depth(lower[i, k].shape[1])
            lower[i, j] = factors[i] if i == j else e @ np.linalg.inv(factors[j]).T
            size += check.length(lower[i, j]) * check.length(lower[j, j])
            roundings += depth(len(factors[j]))
            error += check.length(e - lower[i, j] @ lower[j, j].T) + gamma(roundings) * size
            for row in {i, j}:
                sums[row] += error
    return max(sums)


@pytest.mark.parametrize("spans", [
    [(0, 4)], [(0, 4), (0, 4)], [(0, 4), (0, 4), (0, 4)], [(0, 3), (1, 4), (2, 5)],
    [(0, 3), (3, 5), (4, 6)], [(2, 5), (0, 3), (1, 6)], [(0, 2), (2, 4), (4, 6), (5, 7)],
    [(0, 6), (1, 3), (2, 4), (0, 1), (5, 7)],
])  # fmt: skip
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("chunk", [2, 512])
def test_every_rounding_is_counted_once(
    spans: Spans, order: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small integers, and factors whose inverses are dyadic: no operation rounds. A unit so large
    that no term is lost beside the others."""
    monkeypatch.setattr(check, "UNIT", UNIT)
    monkeypatch.setattr(check, "CHUNK", chunk)
    rng = np.random.default_rng(len(spans))
    rows = [rng.integers(-3, 4, (order, high - low)).astype(float) for low, high in spans]
    factors = [np.diag(2.0 ** rng.integers(2, 4, order)) for _ in spans]
    for factor in factors:
        factor += np.tril(np.ones((order, order)), -1) * 4.0
    kept = iter(factors)
    monkeypatch.setattr(np.linalg, "cholesky", lambda e: next(kept))
    exact = counted(rows, spans, factors, 64.0)
    described = ([order] * len(rows), [*spans], lambda i: rows[i] * 8.0)
    found = check.residual(described, 64.0, 3, "here")
    assert exact <= found <= exact * NEAR


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("line", [1, 6])
def test_norms_are_proved_in_blocks_that_overlap(
    seed: int, line: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "LINE", line)
    node, _ = drawn(5 * seed)  # without a border
    rng = np.random.default_rng(seed)
    shape = (node["out"][0], node["in"][0] // node["groups"], *node["kernel"])
    weight = rng.standard_normal(shape)
    taps, ends = check.stencil(node)[0], (node["in"][1:], node["out"][1:])
    exact = convolution_matrix(node, weight)
    m, n = (len(exact) // node["groups"], exact.shape[1] // node["groups"])
    for g, kernel in enumerate(check.Weights({"w": weight}).kernel(node)):
        norm = svd_norm(exact[g * m : (g + 1) * m, g * n : (g + 1) * n])
        check.prove(check.banded(kernel, taps, *ends), norm * UP, "here", 0.0)
        if norm > 0.0:
            with pytest.raises(check.Finding, match="no proof"):
                check.prove(check.banded(kernel, taps, *ends), norm * BELOW, "here", 0.0)


def test_proofs_beyond_the_limit_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations: for every block its order and the square of those that it meets."""
    blocks: Any = (
        [2, 3, 4],
        [(0, 2), (1, 4), (4, 6)],
        lambda i: np.ones(([2, 3, 4][i], [2, 3, 2][i])),
    )
    work = 2 * 2**2 + 3 * (2 + 3) ** 2 + 4 * 4**2
    monkeypatch.setattr(check, "OPERATIONS", work + 1.0)
    check.prove(blocks, 100.0, "here", 0.0)
    monkeypatch.setattr(check, "OPERATIONS", float(work))
    with pytest.raises(check.Finding, match="limits") as found:
        check.prove(blocks, 100.0, "here", 0.0)
    assert found.value.kind == "limit"


@pytest.mark.parametrize(("z", "other", "error"), [
    # The logit less its error rounds up, and so does the gap, which is in a lower binade.
    ("0x1.0000000000001p+0", "0x1.8000080000000p-53", "0x1.ffffe00000000p-54"),
    # The difference rounds up, in a higher binade than both.
    ("0x1.ff72e6ea267dap+0", "-0x1.e16d65a89fe41p-7", "0x1.7f00000000000p-52"),
    ("0x1.fe40f9158c1cbp+0", "-0x1.da548f4ebb9e0p-6", "0x1.be80000000000p-51"),
    ("0x1.fea1201c16929p+0", "-0x1.18e7262724261p-6", "0x1.7f00000000000p-52"),
    # The other logit, in a higher binade, rounds down, and the gap up.
    ("-0x1.c206be59243f0p-4", "-0x1.05862666bd64bp+2", "0x1.e800000000000p-52"),
    ("-0x1.071ade48cb286p-1", "-0x1.0c943d947bffcp+2", "0x1.ab00000000000p-52"),
    ("-0x1.b4aa51ff12174p-2", "-0x1.03a7147a649a0p+2", "0x1.8e00000000000p-52"),
])  # fmt: skip
def test_one_step_down_is_not_enough_for_a_margin(z: str, other: str, error: str) -> None:
    numbers = [float.fromhex(text) for text in (z, other, error)]
    exact = Fraction(numbers[0]) - 2 * Fraction(numbers[2]) - Fraction(numbers[1])
    given = {"logits": [*numbers[:2], -9.0], "errors": numbers[2:], "radii": [0.0]}
    margin = float(exact) * (1.0 + 2.0**-51)
    for _ in range(12):
        margin = math.nextafter(margin, 0.0)
        assert Fraction(margin) <= exact or samples(**given, margins=[margin]) == ["margins"]
    assert samples(**given, margins=[margin]) == []


def test_a_claim_is_shown_by_what_is_left_and_no_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """``g`` and the residual, some units around the square of the claim less what is lost."""
    rng = np.random.default_rng(1)
    steps, square, sums = 0, Fraction(0), [Fraction(0)]

    def left(rows: Any, g: float, *_: Any) -> float:
        bound = float(square * (1 + Fraction(steps, 2**53)) - Fraction(g))
        sums.append(Fraction(g) + Fraction(bound))
        return bound

    monkeypatch.setattr(check, "residual", left)
    for trial in range(100):
        c, lost = float(rng.uniform(0.5, 1.0)), float(rng.uniform(0, 0.3)) * (trial % 2)
        square, largest = (Fraction(c) - Fraction(lost)) ** 2, -999
        for steps in range(-60, 6, 2):
            with contextlib.suppress(check.Finding):
                check.prove(np.eye(2), c, "here", lost)
                assert sums[-1] <= square
                largest = steps
        assert largest > -60


def test_stored_norms_leave_room_for_the_guess() -> None:
    """They are at least 1 + 2^-26 times the norm."""
    for norm in (1.0, 0.75, 3.0 * 2.0**500, 2.0**-500):
        check.prove(np.diag([norm, 0.0]), norm * (1.0 + 2.0**-26), "here", 0.0)


def test_distances_hold_errors_that_are_rounded_down() -> None:
    """A sum of errors that lies between two numbers, beside rows that are equal or are not."""
    error = np.array([1.0, 2.0**-53, 2.0**-53])
    for row in (0.0, 3.0 * 2.0**-60):
        found = check.apart(np.array([[0.0], [row], [0.0]]), error, 0)
        assert Fraction(float(found[1])) >= 1 + Fraction(1, 2**53) + Fraction(row)
        assert Fraction(float(found[2])) >= 1 + Fraction(1, 2**53)
    assert not check.apart(np.ones((3, 2)), np.zeros(3), 0).any()


def test_zero_is_the_norm_of_blocks_of_zeros_alone() -> None:
    for filled in ([], [0], [1], [0, 1]):
        made = [np.full((2, 2), 5e-324 * (i in filled)) for i in range(2)]
        blocks: Any = ([2, 2], [(0, 2), (1, 3)], made.__getitem__)
        if filled:
            with pytest.raises(check.Finding):
                check.prove(blocks, 0.0, "here", 0.0)
        else:
            check.prove(blocks, 0.0, "here", 0.0)


@pytest.mark.parametrize("c", [5.0, 1200.0, 2.0**-30])
@pytest.mark.parametrize("lost", [0.0, 0.25])
def test_symbols_lose_what_their_angles_and_sums_are_rounded_by(
    c: float, lost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An angle within 16 units, its cosine within 8, a product and a sum for every tap."""
    losses: list[tuple[float, float]] = []
    monkeypatch.setattr(check, "prove", lambda rows, c, where, lost: losses.append((c, lost)))
    kernel = np.array([300.0, 400.0, -500.0, 0.0, 600.0, 8.0]).reshape(2, 1, 3)
    power, total = -math.frexp(c)[1], 300.0 + math.hypot(400.0, 600.0) + math.hypot(500.0, 8.0)
    axes = check.stencil(loop(mode=None))[1]
    assert check.torus(axes, kernel, c, "w", lost * c, False)
    assert len(losses) == 4  # of 7 frequencies: others are conjugate
    for claim, found in losses:
        assert claim == math.ldexp(c, power)
        rounded = found - math.ldexp(lost * c, power)
        least = math.sqrt(2.0) * (3 + 24) * 2.0**-53 * math.ldexp(total, power)
        assert least * (lost == 0.0) <= rounded <= 4.0 * least + 2.0**-52


def test_radii_are_below_the_exact_ones_where_a_reach_weighs_most() -> None:
    """Reaches a little above a power of two and gaps a little below one."""
    rng = np.random.default_rng(2)
    error, accepted = 2.0**-54 * (1.0 - 2.0**-20), 0
    for _ in range(200):
        z = [1.0, -1.0 + float(rng.uniform(0, 2.0**-8)), -9.0]
        gap = Fraction(z[0]) - Fraction(z[1]) - 2 * Fraction(error)
        scale, far = rng.uniform(1.0, 1.0 + 2.0**-8, 2).tolist()
        limit = gap / (Fraction(scale) * Fraction(far))
        given = {"logits": z, "errors": [error], "scale": scale, "far": [0.0, far, far]}
        radius = math.nextafter(float(limit), 2.0)
        for _ in range(8):
            if not samples(**given, radii=[radius]):
                accepted += 1
                assert Fraction(radius) < limit
            radius = math.nextafter(radius, 0.0)
    assert accepted > 100


@pytest.mark.parametrize("power", [-400, -537, -538, -600, -1060])
def test_lengths_of_rows_far_below_the_largest(power: int) -> None:
    """Their squares underflow beside it: what they lose is less than what is added."""
    rows = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, -1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    rows[1:] *= 2.0**power
    found = check.length(rows, 1)
    for row, length in zip(rows.tolist(), found.tolist(), strict=True):
        assert Fraction(length) ** 2 >= sum(Fraction(v) ** 2 for v in row)
    assert found[3] == 0.0
