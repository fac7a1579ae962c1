# SPDX-License-Identifier: MIT
"""The checker's images and norms: every kind of node, and what its roundings take off a claim."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtfast import check
from tests.oracles import svd_norm
from tests.soundness.certificates import HEAD, ONE, Header, linear, weights_of
from tests.soundness.test_checker_files import found
from tests.soundness.test_checker_operators import (
    BELOW,
    UP,
    Arrays,
    Json,
    alone,
    factor,
    loop,
    refused,
    region,
    whole,
)  # fmt: skip

NEAR = 1.0 + 2.0**-47


def random_input(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(-9, 9, (2, *shape)).astype(float)


def images(nodes: list[Json], x: np.ndarray, arrays: Arrays | None = None) -> np.ndarray:
    return check.image({"nodes": nodes}, check.Weights(arrays or {}), x)


def test_images_of_every_kind_of_node() -> None:
    x = random_input(2, 4)
    double: Json = {"op": "add", "inputs": [-1, -1]}
    assert np.array_equal(images([], x), x)
    assert np.array_equal(images([double], x), 2.0 * x)
    # Values of earlier nodes, more than two of them, and none of what is not named.
    assert np.array_equal(images([double, {"op": "add", "inputs": [0, -1, 0]}], x), 5.0 * x)
    for axis in (0, 1):
        joined = images([double, {"op": "concat", "inputs": [0, -1], "axis": axis}], x)
        assert np.array_equal(joined, np.concatenate([2.0 * x, x], axis + 1))
    scale: Json = {"op": "scale", "inputs": [-1], "in": [2, 4], "out": [2, 4], "gain": (-3.0).hex()}
    scale |= {"ref": None, "inverse": False, "shape": [1]}
    assert np.array_equal(images([scale], x), -3.0 * x)
    scale |= {"ref": {"array": "a"}, "shape": [2, 1]}
    a = np.array([4.0, -2.0])
    assert np.array_equal(images([scale], x, {"a": a}), -3.0 * x * a[:, None])
    inverted = images([scale | {"inverse": True}], x, {"a": a})
    assert np.array_equal(inverted, -3.0 * x / a[:, None])
    copies: Json = {"op": "copy", "inputs": [-1], "in": [2, 4], "out": [2, 3]}
    copies["runs"] = [[0, 2, 2], [-1, 0, 2], [7, -1, 2]]
    exact = x.reshape(2, 8)[:, [0, 2, 0, 0, 7, 6]]
    exact[:, 2:4] = 0.0
    assert np.array_equal(images([copies], x), exact.reshape(2, 2, 3))
    averages: Json = {
        "op": "average",
        "inputs": [-1],
        "in": [2, 4],
        "out": [4],
        "gain": (8.0).hex(),
    }
    averages["windows"] = [[[0, 1, 1], [0, 2, 2]], [[0, 3, 4], [2, 4, 2]]]
    over = np.stack([x[:, 0], (x[:, 0] + x[:, 1]) / 2.0], 1)
    exact = np.stack([over[..., :3].sum(-1) / 4.0, over[..., 2:].sum(-1) / 2.0], -1)
    assert np.array_equal(images([averages], x), 8.0 * exact.reshape(2, 4))
    node = linear("w", 3, 4)["nodes"][0]
    weight = np.arange(12.0).reshape(3, 4)
    assert np.array_equal(images([node], x, {"w": weight}), x @ weight.T)


def scale(gain: float, array: np.ndarray | None = None) -> tuple[Json, Arrays]:
    node: Json = {
        "op": "scale", "inputs": [-1], "in": [2, 2], "out": [2, 2], "gain": gain.hex(),
        "ref": None if array is None else {"array": "a"}, "inverse": False, "shape": [2, 1],
    }  # fmt: skip
    return alone(node), {} if array is None else {"a": array}


CONSTANTS: list[tuple[Json, Arrays, float]] = [
    (*scale(-3.0), 3.0), (*scale(0.25, np.array([2.0, -4.0])), 1.0),
    (*scale(2.0**-600, np.array([2.0**-100, 0.0])), 2.0**-700),
    ({"name": "w", "slope": {"array": "a"}}, {"a": np.array([0.5, -0.25])}, 1.0),
    ({"name": "w", "slope": {"array": "a"}}, {"a": np.array([0.5, -3.0, 2.0])}, 3.0),
    ({"name": "w", "slope": {"array": "a"}}, {"a": np.zeros(0)}, 1.0),
    ({"name": "w", "copies": 9}, {}, 3.0), ({"name": "w", "copies": 1}, {}, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("described", "arrays", "norm"), CONSTANTS)
def test_constants_are_at_least_what_they_describe(
    described: Json, arrays: Arrays, norm: float
) -> None:
    assert refused(described, norm * NEAR, arrays) == []
    for c in (norm, norm * (1.0 - 2.0**-50), norm * 0.5, 0.0, -norm, math.nan):
        assert refused(described, c, arrays) == ["claim"]


def composite() -> tuple[Json, Arrays]:
    """``conv(x) + 3 x``, averaged, then a matrix."""
    rng = np.random.default_rng(0)
    node = loop(mode=None) | {"weight": {"array": "k"}}
    nodes: list[Json] = [
        node, {**scale(3.0)[0]["nodes"][0], "in": [1, 6], "out": [1, 6], "shape": [1]},
        {"op": "add", "inputs": [0, 1]},
        {"op": "average", "inputs": [2], "in": [1, 6], "out": [3], "gain": ONE,
         "windows": [[[0, 1, 1]], [[0, 2, 2], [2, 4, 2], [4, 6, 2]]]},
        linear("w", 4, 3)["nodes"][0] | {"inputs": [3]},
    ]  # fmt: skip
    weights = {"k": rng.standard_normal((1, 1, 3)), "w": rng.standard_normal((4, 3))}
    return region(nodes, [1, 6], [4]), weights


def test_composites_are_proved_whole() -> None:
    described, arrays = composite()
    exact = whole(described, arrays)
    kernel = sum(arrays["k"][0, 0, i] * np.eye(6, k=i - 1) for i in range(3)) + 3.0 * np.eye(6)
    mean = np.kron(np.eye(3), [0.5, 0.5])
    # The matrix that the norm is taken of, by another way; not the bound.
    np.testing.assert_allclose(exact, arrays["w"] @ mean @ kernel, rtol=1e-14, atol=1e-14)
    norm = svd_norm(exact)
    assert refused(described, norm * UP, arrays) == []
    assert refused(described, norm * BELOW, arrays) == ["claim"]
    nothing = region([], [3], [3])
    assert refused(nothing, 1.0 * UP, {}) == []
    assert refused(nothing, BELOW, {}) == ["claim"]


def test_composites_of_many_inputs_are_put_together() -> None:
    """More unit vectors than are taken at once."""
    weight = np.random.default_rng(2).standard_normal((1, 2100))
    double: Json = {"op": "add", "inputs": [0, 0]}
    described = region([linear("w", 1, 2100)["nodes"][0], double], [2100], [1])
    norm = 2.0 * float(np.linalg.norm(weight))
    assert refused(described, norm * UP, {"w": weight}) == []
    assert refused(described, norm * BELOW, {"w": weight}) == ["claim"]


def test_composites_beyond_the_limit_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    described, arrays = composite()
    norm = svd_norm(whole(described, arrays)) * UP
    monkeypatch.setattr(check, "ENTRIES", 24)
    assert refused(described, norm, arrays) == []
    monkeypatch.setattr(check, "ENTRIES", 23)
    assert refused(described, norm, arrays) == ["limit"]
    assert refused({"name": "w", "opaque": "a call"}, math.inf, {}) == ["limit"]


# -- what roundings take off


class Proofs:
    """Notes the claims that are asked for, and shows them all: those of the torus as told."""

    def __init__(self, patch: pytest.MonkeyPatch, by_torus: bool) -> None:
        self.claims: list[tuple[float, float]] = []
        self.torus: list[tuple[float, float, bool]] = []
        self.by_torus = by_torus
        patch.setattr(check, "prove", lambda rows, c, where, lost: self.claims.append((c, lost)))
        patch.setattr(check, "torus", self.on_torus)

    def on_torus(
        self, axes: Any, kernel: Any, c: float, where: str, lost: float, around: bool
    ) -> bool:
        self.torus.append((c, lost, around))
        return self.by_torus


@pytest.fixture(params=[False, True])
def proofs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Proofs:
    return Proofs(monkeypatch, request.param)


def test_a_matrix_loses_what_its_kernel_is_rounded_by(proofs: Proofs) -> None:
    weight = np.array([[3.0, 0.0], [0.0, -4.0]])
    arrays = {"w": weight, "r": np.array([2.0, -1.0])}
    assert refused(linear("w", 2, 2), 7.0, arrays) == []
    assert proofs.claims == [(7.0, 0.0)]
    scaled = linear("w", 2, 2)
    scaled["nodes"][0]["rows"] = [factor("r")]
    assert refused(scaled, 7.0, arrays) == []
    (c, lost), length = proofs.claims[-1], math.hypot(6.0, 4.0)
    assert c == 7.0
    assert 10 * check.UNIT * length <= lost <= 15 * check.UNIT * length


@pytest.mark.parametrize(("change", "times", "copies"), [
    ({"mode": None}, 1, 1), ({"mode": "reflect"}, 2, 2), ({}, 1, 2),
    ({"padding": [[3, 1]], "out": [1, 8]}, 2, 2), ({"padding": [[6, 1]]}, 1, 3),
])  # fmt: skip
@pytest.mark.parametrize("scaled", [False, True])
def test_a_convolution_loses_that_and_the_taps_that_meet(
    change: Json, times: int, copies: int, scaled: bool, proofs: Proofs
) -> None:
    """Per tap the length of its entries; on circles whose outputs repeat a claim is smaller."""
    node = loop(**{"mode": "circular", **change}) | {
        "in": [2, 6],
        "out": [2, *loop(**change)["out"][1:]],
    }
    node |= {"groups": 2, "rows": [factor("r")] if scaled else []}
    arrays = {"w": np.array([3.0, 1.0, -2.0, 4.0, -1.0, 0.0]).reshape(2, 1, 3), "r": np.ones(1)}
    total = 5.0 + math.sqrt(2.0) + 2.0
    assert refused(alone(node), 8.0, arrays) == []
    assert len(proofs.torus) == 2
    assert proofs.claims == [] if proofs.by_torus else [(8.0, proofs.torus[0][1])] * 2
    terms = (10 if scaled else 0) + (3 if copies > 1 else 0)
    around = node.get("mode") == "circular"
    for c, lost, round_about in proofs.torus:
        assert c**2 * times < 64.0 <= c**2 * times * (1.0 + 2.0**-48)
        least = terms * check.UNIT * total * math.sqrt(copies)
        assert least <= lost <= 1.5 * least
        assert round_about == around


def test_taps_that_meet_nothing_are_no_operator(proofs: Proofs) -> None:
    node = loop(mode=None, padding=[[9, 0]], out=[1, 4])
    assert refused(alone(node), 0.0, {"w": np.ones((1, 1, 3))}) == []
    assert (proofs.torus, proofs.claims) == ([], [(0.0, 0.0)])
    assert refused(alone(loop(mode=None)), 1.0, {"w": np.zeros((1, 1, 3))}) == []
    assert (proofs.torus, proofs.claims[1:]) == ([], [(1.0, 0.0)])


def test_a_composite_loses_the_roundings_of_all_its_nodes(proofs: Proofs) -> None:
    described, arrays = composite()
    units = np.eye(6).reshape(-1, 1, 6)
    sizes = check.image(described, check.Weights(arrays, True), units)
    length = math.sqrt(float(np.square(sizes).sum()))
    assert refused(described, 9.0, arrays) == []
    described["nodes"][0]["rows"] = [factor("r")]
    assert refused(described, 9.0, arrays | {"r": np.ones(1)}) == []
    for (c, lost), more in zip(proofs.claims, (0, 10), strict=True):
        # Products and sums: a kernel, a factor, a sum, two windows with a gain, a matrix.
        count = 6 + 1 + 1 + 4 + 6 + more
        assert c == 9.0
        assert count * check.UNIT * length <= lost
    assert proofs.claims[1][1] >= proofs.claims[0][1] + 10 * check.UNIT * length
    wide = region([linear("w", 1, 400)["nodes"][0], {"op": "add", "inputs": [0, 0]}], [400], [1])
    assert refused(wide, 9.0, {"w": np.ones((1, 400))}) == []
    assert proofs.claims[2][1] >= 800 * check.UNIT * 40.0


def test_a_composite_that_cancels_loses_as_much(proofs: Proofs) -> None:
    """``x - x``: nothing is left of two terms, whose roundings are."""
    minus = {**scale(-1.0)[0]["nodes"][0], "in": [4], "out": [4], "shape": [1]}
    described = region([minus, {"op": "add", "inputs": [-1, 0]}], [4], [4])
    assert not whole(described, {}).any()
    assert refused(described, 1.0, {}) == []
    assert proofs.claims[0][1] >= 2 * check.UNIT * 4.0
    assert refused(region([{"op": "add", "inputs": [-1] * 99}], [4], [4]), 1.0, {}) == []
    assert proofs.claims[1][1] >= 98 * check.UNIT * 2.0 * 99.0


def test_extreme_factors_are_looked_for_in_all_that_is_not_plain(proofs: Proofs) -> None:
    tiny, weight = (2.0**-450).hex(), {"w": np.full((1, 1, 3), 2.0**-450)}
    for node in (loop(mode=None), loop()):
        assert refused(alone(node), 1.0, weight) == []
        assert refused(alone(node | {"gain": tiny}), 1.0, weight) == ["limit"]
    node = linear("w", 1, 3)["nodes"][0]
    both = region([node, {"op": "scale", "inputs": [0], "in": [1], "out": [1], "gain": tiny,
                          "ref": None, "inverse": False, "shape": [1]}], [3], [1])  # fmt: skip
    assert refused(both, 1.0, {"w": np.full((1, 3), 2.0**-449)}) == []
    assert refused(both, 1.0, {"w": np.full((1, 3), 2.0**-450)}) == ["limit"]


def test_rows_are_rounded_by_as_much_as_their_parts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head whose weight and identity cancel: rounding is that of both, not of their sum."""

    def cancelled(header: Header, _: Arrays, weights: Arrays) -> None:
        header["network"]["operators"][1]["nodes"][0]["identity"] = (-64.0).hex()
        weights["head"] = HEAD + 64.0 * np.eye(3, 4)
        weights_of(header, weights)

    errors, apart = [], check.apart
    monkeypatch.setattr(check, "apart", lambda h, e, c: (errors.append(e), apart(h, e, c))[1])
    assert found(tmp_path, cancelled) == []
    assert len(errors) == 3
    assert all((error >= 2 * check.UNIT * 128.0).all() for error in errors)
