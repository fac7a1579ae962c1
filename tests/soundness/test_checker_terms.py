# SPDX-License-Identifier: MIT
"""The checker's inequalities, each by exact rationals: what it accepts holds, and not by chance."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from lmtfast import check, check_execution

U = Fraction(1, 2**53)
NEAR = 1 + Fraction(1, 10**9)
INF, NAN = math.inf, math.nan


def squared(array: np.ndarray) -> Fraction:
    return sum((Fraction(v) ** 2 for v in array.reshape(-1).tolist()), Fraction(0))


def at_most(square: Fraction, found: float) -> bool:
    """Whether the root of the square is at most what was found, which is near."""
    return square <= Fraction(float(found)) ** 2 <= square * NEAR


@pytest.mark.parametrize("power", [-1000, -300, 0, 500, 1000])
@pytest.mark.parametrize("shape", [(1,), (3,), (4, 7), (40, 50)])
def test_lengths(shape: tuple[int, ...], power: int) -> None:
    rng = np.random.default_rng(power + 2000)
    for _ in range(5):
        array = np.ldexp(rng.standard_normal(shape), power)
        assert at_most(squared(array), check.length(array))
    # As many equal entries as there are: the sum may lose half a unit of itself for each.
    least = (1 + (math.prod(shape) // 2) * U) * math.isqrt(math.prod(shape))
    assert Fraction(float(check.length(np.ones(shape)))) >= least
    assert check.length(np.zeros(shape)) == check.length(np.zeros(0)) == 0.0


@pytest.mark.parametrize("count", [0, 1, 100, 10**9])
def test_gamma(count: int) -> None:
    exact = count * U / (1 - count * U)
    assert exact <= Fraction(check.gamma(count)) <= exact * (1 + Fraction(1, 2**19))


@pytest.mark.parametrize("inner", [1, check.CHUNK, check.CHUNK + 1, 3 * check.CHUNK, 5000])
def test_products_are_whole_and_count_their_roundings(inner: int) -> None:
    rng = np.random.default_rng(inner)
    a, b = (rng.integers(-9, 9, (3, inner)).astype(float) for _ in range(2))
    found, depth = check.product(a, b)
    assert np.array_equal(found, a @ b.T)
    # The roundings of a chunk, and one for each chunk added to the sum so far.
    assert depth >= min(inner, check.CHUNK) + -(-inner // check.CHUNK)


Factor = Callable[[np.ndarray], np.ndarray]


def proved(matrix: np.ndarray, order: int, g: float, factor: Factor | None = None) -> Fraction:
    """``g`` and what the checker adds to it, for a matrix in rows of blocks of that order."""
    count = len(matrix) // order
    rows = [matrix[i * order : (i + 1) * order] for i in range(count)]
    whole = ([order] * count, [(0, matrix.shape[1])] * count, rows.__getitem__)
    with pytest.MonkeyPatch.context() as patch:
        if factor is not None:
            patch.setattr(np.linalg, "cholesky", factor)
        with np.errstate(all="ignore"):
            found = check.residual(whole, g, 0, "here")
    return Fraction(g) + Fraction(found) if math.isfinite(found) else Fraction(2) ** 1100


def top(matrix: np.ndarray) -> Fraction:
    """Below the square of the norm, by nothing where the columns of the result are dyadic."""
    vector = np.linalg.svd(matrix)[0][:, 0]
    rows = [[Fraction(v) for v in row] for row in matrix.T.tolist()]
    given = [Fraction(float(v)) for v in vector]
    image = [sum(a * b for a, b in zip(row, given, strict=True)) for row in rows]
    return sum(v * v for v in image) / sum(v * v for v in given)


@pytest.mark.parametrize("order", [1, 2, 3, 6])
@pytest.mark.parametrize("relative", [2.0**-8, 2.0**-20, 2.0**-40])
@pytest.mark.parametrize("seed", range(3))
def test_no_factor_makes_a_low_guess_true(order: int, relative: float, seed: int) -> None:
    """Cholesky of a matrix that is as much larger as the guess is too low, and other factors."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((6, 8))
    square = top(matrix)
    g, genuine = float(square) * (1.0 - relative), np.linalg.cholesky
    lift = 2.0 * relative * float(square) + 1e-10

    def lifted(e: np.ndarray) -> np.ndarray:
        return genuine(e + lift * np.eye(len(e)))

    factors: list[Factor] = [lifted, lambda e: 1e-9 * np.eye(len(e))]
    factors += [lambda e: np.diag(np.sqrt(np.abs(np.diagonal(e)) + 1e-9))]
    for factor in factors:
        try:
            assert proved(matrix, order, g, factor) >= square
        except np.linalg.LinAlgError:
            assert factor is lifted


@pytest.mark.parametrize("order", [1, 2, 4])
def test_a_true_guess_is_shown_tightly(order: int) -> None:
    rng = np.random.default_rng(7)
    matrix = rng.standard_normal((8, 12))
    square = top(matrix)
    g = float(square) * (1 + 1e-6)
    assert square <= proved(matrix, order, g) <= square * (1 + Fraction(2, 10**6))
    with pytest.raises(np.linalg.LinAlgError):
        proved(matrix, order, float(square) * (1 - 1e-6))


def test_roundings_are_counted_where_nothing_else_is_left() -> None:
    """Integers whose factor is exact: the error is that of products, and of the diagonal."""
    lower = np.array([[4.0, 0, 0], [1, 5, 0], [-2, 3, 6]])
    matrix = np.array([[1.0, 2, -1, 0], [0, 1, 1, 3], [2, 0, 1, -1]])
    shifted = lower @ lower.T
    g = 64.0
    exact = g * np.eye(3) - matrix @ matrix.T
    found = proved(matrix, 3, g, lambda e: lower) - Fraction(g)
    residue = exact - shifted
    depth = 3  # a product and two sums
    least = U * Fraction(float(np.abs(np.diagonal(exact)).max()))
    least += 4 * U / (1 - 4 * U) * squared(matrix)
    sizes = Fraction(math.isqrt(int(squared(exact)))) + squared(lower)
    least += (depth + 1) * U / (1 - (depth + 1) * U) * sizes
    assert (found - least) ** 2 >= squared(residue)


@pytest.mark.parametrize("c", [1.0, 3.0, 2.0**-600, 2.0**600])
def test_a_claim_has_to_leave_room_for_what_is_lost(c: float) -> None:
    matrix = np.diag([0.5, 0.25]) * c
    check.prove(matrix, c, "here", 0.49 * check.GAP * c)
    for lost in (0.51 * check.GAP * c, 0.6 * c, c, 2.0 * c, INF, NAN):
        with pytest.raises(check.Finding):
            check.prove(matrix, c, "here", lost)


@pytest.mark.parametrize("matrix", [np.zeros((2, 3)), np.eye(2) * 5e-324])
def test_zero_is_the_norm_of_zero_alone(matrix: np.ndarray) -> None:
    if matrix.any():
        with pytest.raises(check.Finding):
            check.prove(matrix, 0.0, "here", 0.0)
    else:
        check.prove(matrix, 0.0, "here", 0.0)
        with pytest.raises(check.Finding):
            check.prove(matrix, 0.0, "here", 5e-324)
    check.prove(matrix, INF, "here", 0.0)


# -- what follows from norms
# ----------------------------------------------------------------------------------------


def test_tapes_are_composed_outward() -> None:
    rng = np.random.default_rng(3)
    exact: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
        "add": lambda a, b: (a + b) ** 2, "mul": lambda a, b: (a * b) ** 2,
        "max": lambda a, b: max(a, b) ** 2, "hypot": lambda a, b: a * a + b * b,
    }  # fmt: skip
    for _ in range(200):
        a, b = (2.0 ** rng.uniform(-300, 300, 2)).tolist()
        for name, meaning in exact.items():
            tape = [["sigma", 0], ["sigma", 1], [name, 0, 1], ["constant", (1.5).hex()]]
            found = check.compose(tape, [a, b])
            assert at_most(meaning(Fraction(a), Fraction(b)), found[2])
            assert Fraction(a) <= Fraction(found[0])
            assert found[3] == 1.5
    for name in ("add", "hypot", "mul", "max"):
        assert check.compose([["sigma", 0], ["sigma", 0], [name, 0, 1]], [0.0])[2] == 0.0
    assert check.compose([["sigma", 0], ["sigma", 1], ["mul", 0, 1]], [0.0, 3.0])[2] == 0.0
    vanished = check.compose([["sigma", 0], ["mul", 0, 0]], [2.0**-700])
    assert vanished[1] > 0.0


@pytest.mark.parametrize("tape", [
    [["sigma", 1]], [["sigma", -1]], [["add", 0, 0]], [["sigma", 0], ["add", 0, 1]],
    [["sigma", 0], ["add", 0]], [["sigma", 0], ["add", 0, 0, 0]], [["sigma", 0, 0]],
    [["sigma", 0], ["sub", 0, 0]], [["sigma", True]], [["sigma", 0], ["mul", 0, -1]],
])  # fmt: skip
def test_tapes_that_read_what_is_not_there_are_refused(tape: Any) -> None:
    with pytest.raises(check.Finding):
        check.compose(tape, [1.0])


@pytest.mark.parametrize("power", [-1060, -500, 0, 500])
def test_distances_of_rows(power: int) -> None:
    rng = np.random.default_rng(5)
    for width in (1, 2, 50):
        head = np.ldexp(rng.standard_normal((4, width)), power)
        head[3] = head[1]
        for error in (np.zeros(4), np.ldexp(rng.random(4), power - 3)):
            found = check.apart(head, error, 1)
            for j, value in enumerate(found.tolist()):
                square = sum(((Fraction(a) - Fraction(b)) ** 2
                              for a, b in zip(head[j].tolist(), head[1].tolist(), strict=True)),
                             Fraction(0))  # fmt: skip
                rounded = Fraction(float(error[j])) + Fraction(float(error[1]))
                if j == 1:
                    continue
                assert Fraction(value) >= rounded
                assert (Fraction(value) - rounded) ** 2 >= square
                if power >= -500 and j != 3:
                    assert (Fraction(value) / NEAR - rounded) ** 2 <= square * NEAR
            assert found[3] == 0.0 or error.any()


def samples(**fields: Any) -> list[str]:
    """What the checker says of samples; by default one of three classes, of margin 1."""
    given = {
        "labels": [0], "errors": [0.0], "logits": [1.0, 0.0, -5.0], "margins": [0.5],
        "predictions": [0], "radii": [0.25], "scale": 1.0, "far": [0.0, 2.0, 2.0], **fields,
    }  # fmt: skip
    kinds = {"labels": np.int64, "predictions": np.int64}
    names = ("labels", "errors", "logits", "margins", "predictions", "radii")
    by_role = dict(zip(check.ARRAYS, names, strict=True))
    arrays = {role: np.array(given[name], kinds.get(name, np.float64))
              for role, name in by_role.items()}  # fmt: skip
    radius, c, label = (arrays[check.ARRAYS[i]] for i in (5, 4, 0))
    right = int((c == label).sum())
    certified = int(((radius > 0) & (c == label)).sum())
    counts = {"certified": certified, "constant": int(np.isinf(radius).sum()),
              "refused": len(radius) - certified, "total": len(radius)}  # fmt: skip
    counts |= {"correct": right} if "label" in arrays else {}
    try:
        with np.errstate(all="ignore"):
            check.check_samples({"classes": 3, "counts": counts}, arrays, given["scale"],
                                lambda c: np.array(given["far"]), given.get("drift"))  # fmt: skip
    except check.Finding as finding:
        return [finding.where]
    return []


def test_samples_that_hold_are_accepted() -> None:
    assert samples() == []
    assert samples(radii=[math.nextafter(0.5, 0) * (1 - 1e-15)], margins=[1.0 - 1e-15]) == []
    assert samples(radii=[0.0], margins=[0.0]) == []
    assert samples(far=[0.0, 0.0, 0.0], radii=[INF]) == []
    assert samples(scale=0.0, radii=[INF]) == []


@pytest.mark.parametrize(("where", "fields"), [
    ("radii", {"radii": [0.5]}), ("radii", {"radii": [0.6]}), ("radii", {"radii": [INF]}),
    ("radii", {"radii": [-0.25]}), ("radii", {"radii": [NAN]}), ("radii", {"scale": 2.0}),
    ("radii", {"far": [0.0, 2.0, 24.0]}), ("radii", {"errors": [0.3]}),
    ("margins", {"margins": [1.0 + 2.0**-52]}), ("margins", {"margins": [-0.5]}),
    ("margins", {"margins": [0.0]}), ("margins", {"margins": [NAN]}),
    ("margins", {"errors": [0.26], "radii": [0.0]}),
    ("radii", {"radii": [0.25], "drift": lambda far, radius: np.full((1, 3), 0.5)}),
    ("radii", {"radii": [0.25], "drift": lambda far, radius: far * radius}),
    ("predictions", {"predictions": [1], "margins": [0.0], "radii": [0.0]}),
    ("arrays", {"predictions": [3], "margins": [0.0], "radii": [0.0]}),
    ("arrays", {"predictions": [-1]}), ("arrays", {"labels": [3]}), ("arrays", {"labels": [-1]}),
    ("arrays", {"logits": [1.0, 0.0]}), ("arrays", {"errors": [0.0, 0.0]}),
    ("margins", {"errors": [NAN], "radii": [0.0]}),
    ("margins", {"errors": [-1e-9], "radii": [0.0]}),
    ("margins", {"logits": [1.0, 0.0, NAN], "radii": [0.0]}),
    ("margins", {"logits": [INF, 0.0, 0.0], "radii": [0.0]}),
])  # fmt: skip
def test_samples_that_do_not_hold_are_refused(where: str, fields: dict[str, Any]) -> None:
    assert samples(**fields) == [where]


@pytest.mark.parametrize("seed", range(2))
def test_what_is_accepted_at_the_last_digit_holds(seed: int) -> None:
    """Radii and margins some units around the exact ones: accepted ones are below them."""
    rng = np.random.default_rng(seed)
    accepted = [0, 0]
    for _ in range(150):
        z, error = np.array([-0.4, -1.0, -1.05]) - 0.05 * rng.random(3), 1e-3 * rng.random()
        z = z if rng.random() < 0.5 else z * rng.uniform(0.1, 30)
        scale, far = float(rng.uniform(0.5, 3)), np.array([0.0, *rng.uniform(0.5, 2, 2)])
        low = Fraction(z[0]) - Fraction(error)
        margins = [low - Fraction(v) - Fraction(error) for v in z[1:]]
        reaches = [Fraction(scale) * Fraction(v) for v in far[1:]]
        least = min(margins)
        limit = min(m / r for m, r in zip(margins, reaches, strict=True))
        given = {"logits": z, "errors": [error], "scale": scale, "far": far}
        for steps in range(-24, 6, 2):
            margin = float(least) * (1 + steps * 2.0**-53)
            radius = float(limit) * (1 + steps * 2.0**-53)
            if not samples(**given, margins=[margin], radii=[0.0]):
                accepted[0] += 1
                assert Fraction(margin) <= least
            if not samples(**given, margins=[margin / 2], radii=[radius]):
                accepted[1] += 1
                assert Fraction(radius) < limit
    assert min(accepted) > 150


@pytest.mark.parametrize("name", ["terms", "rounded", "entries", "norm"])
def test_a_step_counts_in_whole_numbers_from_zero(name: str) -> None:
    """One rounding less than none would take an error back."""
    assert all(check_execution.sensible({name: n}) for n in (None, 0, 1, 2**40))
    assert not any(check_execution.sensible({name: n}) for n in (-1, -2, 1.0, True, "1", [1]))


@pytest.mark.parametrize("name", ["factor", "constant", "zero", "value", "argument", "absolute"])
def test_no_number_of_a_step_lowers_an_error(name: str) -> None:
    least = 5e-324
    assert all(check_execution.sensible({name: x.hex()}) for x in (0.0, least, 3.0, math.inf))
    for bad in (-least, -1.0, -math.inf, math.nan):
        assert not check_execution.sensible({name: bad.hex()})
        assert not check_execution.sensible({"shifts": [["a", least.hex()], ["b", bad.hex()]]})
        assert not check_execution.sensible({"before": ["a", bad.hex()]})
    assert check_execution.sensible({"shifts": [["a", least.hex()]], "before": ["a", (1.0).hex()]})
