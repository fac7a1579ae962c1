# SPDX-License-Identifier: MIT
"""The checker's operators against matrices made entry by entry: their images, blocks and norms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtfast import check
from tests.described_convolutions import convolution_matrix, described_convolution
from tests.oracles import svd_norm
from tests.soundness.certificates import ONE, UP, ZERO, linear

Json = dict[str, Any]
Arrays = dict[str, np.ndarray]
MODES = (None, None, "circular", "reflect", "replicate")
BELOW = 1.0 - 2.0**-29


def whole(region: Json, arrays: Arrays) -> np.ndarray:
    """The matrix that the checker reads from a description."""
    units = np.eye(math.prod(region["in"])).reshape(-1, *region["in"])
    return check.image(region, check.Weights(arrays), units).reshape(len(units), -1).T


def refused(region: Json, c: float, arrays: Arrays) -> list[str]:
    found: list[check.Finding] = []
    with np.errstate(all="ignore"), check.collecting(found, "w"):
        check.check_norm(region, c, arrays)
    return [f.kind for f in found]


def region(nodes: list[Json], start: list[int], out: list[int]) -> Json:
    return {"name": "w", "in": start, "out": out, "nodes": nodes}


def alone(node: Json) -> Json:
    return region([node], node["in"], node["out"])


def drawn(seed: int) -> tuple[Json, np.ndarray]:
    """A convolution and a kernel of small integers."""
    node, shape = described_convolution(seed, MODES, longest=11)
    return node, np.random.default_rng(seed).integers(-4, 5, shape).astype(float)


@pytest.mark.parametrize("seed", range(50))
def test_convolutions_are_read_and_proved_as_they_are(seed: int) -> None:
    node, weight = drawn(seed)
    exact = convolution_matrix(node, weight)
    assert np.array_equal(whole(alone(node), {"w": weight}), exact)
    norm = svd_norm(exact)
    assert refused(alone(node), norm * UP, {"w": weight}) == []
    assert refused(alone(node), norm * BELOW, {"w": weight}) == ["claim"] * (norm > 0.0)


@pytest.mark.parametrize("seed", range(40))
def test_blocks_are_the_matrix_in_lines_of_its_smaller_side(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (1, 4, check.LINE)[seed % 3]
    monkeypatch.setattr(check, "LINE", line)
    node, weight = drawn(seed)
    groups, ends = node["groups"], (node["in"][1:], node["out"][1:])
    kernels = check.Weights({"w": weight}).kernel(node)
    assert len(kernels) == groups
    m, n = (node[k][0] // groups * math.prod(node[k][1:]) for k in ("out", "in"))
    exact = convolution_matrix(node, weight).reshape(groups, m, groups, n)
    taps = check.stencil(node)[0]
    for g, kernel in enumerate(kernels):
        assert not exact[np.arange(groups) != g, :, g].any()
        orders, spans, make = check.banded(kernel, taps, *ends)
        found = np.zeros((sum(orders), max(m, n)))
        for i, (low, high) in enumerate(spans):
            rows = slice(sum(orders[:i]), sum(orders[: i + 1]))
            found[rows, low:high] = make(i)
        assert len(found) == min(m, n)
        inner = [math.prod(e) for e in (ends if m > n else ends[::-1])]
        channels = [len(found) // inner[0], found.shape[1] // inner[1]]
        ordered = found.reshape(inner[0], channels[0], inner[1], channels[1])
        ordered = ordered.transpose(1, 0, 3, 2).reshape(found.shape)
        assert np.array_equal(ordered if m <= n else ordered.T, exact[g, :, g])
        # As few blocks as reach that order, of whole lines; each as wide as what it reads.
        small = ends[0] if m > n else ends[1]
        width = math.prod(small[1:]) * channels[0]
        assert len(orders) == -(-small[0] // -(-line // width))
        for i, (low, high) in enumerate(spans):
            read = np.flatnonzero(np.abs(make(i)).sum(0))
            assert not len(read) or (low <= low + read[0] and low + read[-1] < high <= max(m, n))


def loop(**changes: Any) -> Json:
    """One channel on a circle of 6 places, taps on both neighbours."""
    node = drawn(0)[0] | {
        "in": [1, 6], "out": [1, 6], "kernel": [3], "stride": [1], "dilation": [1], "groups": 1,
        "padding": [[1, 1]], "centre": [1], "mode": "circular",
    }  # fmt: skip
    return node | changes


@pytest.mark.parametrize("change", [
    {"stride": [0]}, {"stride": [-1]}, {"dilation": [0]}, {"dilation": [-1]}, {"in": [1, 2**31]},
    {"padding": [[2**31, 0]]}, {"padding": [[-(2**31), 0]]}, {"out": [1, 2**31]},
])  # fmt: skip
def test_geometries_of_no_convolution_are_refused(change: Json) -> None:
    for mode in (None, "circular"):
        with pytest.raises(check.Finding, match="steps above 0"):
            check.stencil({**loop(), "mode": mode, **change})


@pytest.mark.parametrize(("change", "extents", "stride", "repeats"), [
    ({}, (6, 6), 1, (1, 2, True)),
    ({"mode": None}, (6, 6), 1, (1, 1, False)),
    ({"mode": "reflect"}, (8, 6), 1, (2, 2, False)),
    ({"mode": "replicate"}, (8, 6), 1, (2, 2, False)),
    ({"mode": "replicate", "padding": [[3, 1]], "out": [1, 8]}, (10, 8), 1, (4, 4, False)),
    # More outputs than the circle has places, and a border that goes around twice.
    ({"padding": [[3, 1]], "out": [1, 8]}, (6, 8), 1, (2, 2, True)),
    ({"padding": [[6, 1]]}, (6, 6), 1, (1, 3, True)),
    # Strides that divide the circle, or that take some of its outputs.
    ({"padding": [[0, 2]], "stride": [2], "out": [1, 3]}, (6, 3), 2, (1, 2, True)),
    ({"padding": [[0, 2]], "stride": [2], "out": [1, 2]}, (6, 2), 1, (1, 2, True)),
    ({"stride": [5], "out": [1, 2]}, (6, 2), 1, (1, 2, True)),
    ({"padding": [[1, 6]], "stride": [5], "out": [1, 3]}, (6, 3), 1, (2, 3, True)),
    # Reads beyond the border close no circle; at its last place they do.
    ({"stride": [5], "out": [1, 3]}, (8, 3), 5, (2, 2, False)),
    ({"padding": [[0, 1]]}, (7, 6), 1, (2, 2, False)),
    ({"padding": [[0, 1]], "out": [1, 5]}, (6, 5), 1, (1, 2, True)),
    ({"padding": [[0, 1]], "dilation": [2], "out": [1, 3]}, (6, 3), 1, (1, 2, True)),
    ({"padding": [[0, 1]], "dilation": [2], "out": [1, 4]}, (7, 4), 1, (2, 2, False)),
])  # fmt: skip
def test_how_often_borders_repeat(
    change: Json, extents: tuple[int, int], stride: int, repeats: tuple[int, int, bool]
) -> None:
    node = loop(**change)
    taps, (n, m, k, s, p, d), *found = check.stencil(node)
    assert (*map(int, found[:2]), found[2]) == repeats
    assert (*n, *m, *k, *s, *d) == (*extents, 3, stride, *node["dilation"])
    # In front of a border that is read there is none.
    assert [*p] == ([node["padding"][0][0]] if repeats[2] or not node["mode"] else [0])
    assert len(taps) == 3


@pytest.mark.parametrize(("sides", "step"), [((6, 6), 2), ((6, 5), 1), ((5, 6), 1), ((5, 5), 1)])
def test_strides_have_to_divide_every_circle(sides: tuple[int, int], step: int) -> None:
    node = loop(
        **{"in": [1, *sides], "out": [1, 3, 3], "kernel": [3, 3], "stride": [2, 2],
           "dilation": [1, 1], "padding": [[1, 1], [1, 1]], "centre": [1, 1]}
    )  # fmt: skip
    _, axes, times, _, around = check.stencil(node)
    assert (axes[3].tolist(), times, around) == ([step, step], 1, True)


def circle(node: Json, kernel: np.ndarray, sizes: list[int]) -> float:
    """Norm of the convolution of circles with so many outputs, and inputs as strides ask for."""
    fine = [n * s for n, s in zip(sizes, node["stride"], strict=True)]
    found = np.zeros((*sizes, len(kernel), *fine, kernel.shape[1]))
    for o in np.ndindex(*sizes):
        for i, t in enumerate(np.ndindex(*node["kernel"])):
            rules = zip(o, t, node["stride"], node["padding"], node["dilation"], fine, strict=True)
            place = tuple((s * a - low + d * b) % n for a, b, s, (low, _), d, n in rules)
            found[(*o, slice(None), *place, slice(None))] += kernel[:, :, i]
    return svd_norm(found.reshape(math.prod(sizes) * len(kernel), -1))


# Of 12 and 19 no tap meets an input.
@pytest.mark.parametrize("seed", sorted({*range(25)} - {12, 19}))
def test_the_torus_shows_the_norm_of_the_least_circle(seed: int) -> None:
    """Random kernels: on another circle the norm is another."""
    rng = np.random.default_rng(seed)
    axes = 1 + seed % 2
    kernel, dilation = rng.integers(1, 4, axes).tolist(), rng.integers(1, 3, axes).tolist()
    stride, low = rng.integers(1, 4, axes).tolist(), rng.integers(0, 5 - axes, axes).tolist()
    sides, out = rng.integers(2, 7, axes).tolist(), rng.integers(1, 12 // axes, axes).tolist()
    weight = rng.standard_normal((2, 1 + seed % 3, math.prod(kernel)))
    node = {"in": [3, *sides], "out": [2, *out], "kernel": kernel, "dilation": dilation,
            "stride": stride, "padding": [[p, 9] for p in low]}  # fmt: skip
    large = [-(-n // s) for n, s in zip(sides, stride, strict=True)]
    moves = [[(d * t - p) // s for d, t, p, s in zip(dilation, at, low, stride, strict=True)]
             for at in np.ndindex(*kernel)]  # fmt: skip
    met = [all(-m < q < n for q, m, n in zip(move, out, large, strict=True)) for move in moves]
    seen = np.array([move for move, some in zip(moves, met, strict=True) if some])
    seen = seen.reshape(-1, axes).astype(int)
    sizes = [max(n - seen[:, a].min(initial=0), m + seen[:, a].max(initial=0))
             for a, (n, m) in enumerate(zip(large, out, strict=True))]  # fmt: skip
    grid = check.stencil(node)[1]
    for around, truth in (
        (False, circle(node, weight * met, sizes)), (True, circle(node, weight, large)),
    ):  # fmt: skip
        for c, lost, holds in (
            (truth * UP, 0.0, True), (truth * BELOW, 0.0, False), (truth * 0.5, 0.0, False),
            (truth * UP, truth * 2.0**-28, True), (truth * UP, truth * 2.0**-26, False),
        ):  # fmt: skip
            with np.errstate(all="ignore"):
                shown = check.torus(grid, weight, c, "w", lost, around)
            assert shown == (holds or truth == 0.0)


# -- weights


def safetensors(entries: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], low: int, high: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [low, high]}


def test_weights_of_checkpoints_are_read_as_they_are(tmp_path: Path) -> None:
    values = {
        "F64": np.array([[1.5, -2.0], [2.0**-1074, 3.0]]), "F32": np.float32([0.1, 2.0**-149]),
        "F16": np.float16([0.1, -65504.0, 2.0**-24]), "I64": np.array([-3, 2**40]),
        "I32": np.int32([-7]), "BF16": np.uint16([0x3F80, 0xC049, 0x0001]),
    }  # fmt: skip
    entries: dict[str, Any] = {"__metadata__": {"a": "b"}, "u": entry("U8", [2], 0, 2)}
    data = b"ab"
    for dtype, value in values.items():
        span = [len(data), len(data) + value.nbytes]
        entries[f"model/{dtype}"] = entry(dtype, [*value.shape], *span)
        data += value.tobytes()
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(entries, data))
    read = check.read_weights(path)
    values["BF16"] = np.array([1.0, -3.140625, 2.0**-133])
    assert {n: (a.dtype, a.tolist()) for n, a in read.items()} == {
        n: (np.dtype("<f8"), a.astype("<f8").tolist()) for n, a in values.items()
    }


def test_weights_are_not_read_over_and_over(tmp_path: Path) -> None:
    """No more bytes in all than the file has."""
    path = tmp_path / "w.safetensors"
    entries = {str(i): entry("F64", [100], 0, 800) for i in range(2)}
    for size, fits in ((1592, False), (1600, True)):
        text = len(safetensors(entries, b""))
        path.write_bytes(safetensors(entries, bytes(size - text)))
        assert len(path.read_bytes()) == size
        if fits:
            assert len(check.read_weights(path)) == 2
        else:
            with pytest.raises(check.Finding, match="overlap"):
                check.read_weights(path)


def test_factors_are_resolved_as_they_are_described() -> None:
    arrays = {"a": np.array([4.0, -2.0]), "v": np.array([15.0, 3.0]), "w": np.array([8.0, -6.0])}
    variance: Json = {"variance": {"array": "v"}, "eps": ONE, "weight": None}
    for ref, exact in (
        ({"array": "a"}, [4.0, -2.0]),
        ({"ref": {"array": "a"}, "inverse": False}, [4.0, -2.0]),
        ({"ref": {"array": "a"}, "inverse": True}, [0.25, -0.5]),
        (variance, [0.25, 0.5]), ({**variance, "weight": {"array": "w"}}, [2.0, -3.0]),
        ({"ref": {**variance, "weight": {"array": "w"}}, "inverse": True}, [0.5, -1.0 / 3.0]),
    ):  # fmt: skip
        assert check.Weights(arrays).get(ref).tolist() == exact
        assert check.Weights(arrays, True).get(ref).tolist() == np.abs(exact).tolist()
    negative = {"v": np.array([-0.75])}  # a sum, not a sum of sizes
    assert check.Weights(negative, True).get(variance).tolist() == [2.0]


def test_the_spread_is_that_of_all_factors() -> None:
    weights = check.Weights({"a": np.array([2.0**-3, 0.0, -(2.0**5)]), "b": np.array([2.0**4] * 2)})
    weights.get({"array": "a"})
    assert weights.spread == 8.0
    weights.get({"array": "b"})
    assert weights.spread == 12.0
    weights.get({"ref": {"array": "b"}, "inverse": True})
    assert weights.spread == 20.0
    assert check.Weights({}).note(np.zeros(3)).tolist() == [0.0] * 3


def scaled(power: int, gain: int) -> list[str]:
    """What is found of an operator of norm 2^(power + gain)."""
    described = linear("w", 2, 2, gain=(2.0**gain).hex())
    return refused(described, 2.0 ** (power + gain) * UP, {"w": np.eye(2) * 2.0**power})


def test_products_that_may_leave_the_range_are_left_to_others() -> None:
    assert scaled(-449, -450) == scaled(449, 450) == scaled(-1000, 0) == []
    assert scaled(-450, -450) == scaled(450, 450) == ["limit"]


def factor(name: str) -> Json:
    return {"ref": {"array": name}, "inverse": False}


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_kernels_have_all_their_factors(kind: str) -> None:
    """Rows, columns, a gain and the identity, of small integers: nothing is rounded."""
    rng = np.random.default_rng(1)
    groups, taps = (1, 1) if kind == "linear" else (2, 3)
    weight = rng.integers(-4, 5, (groups, 3, 3, taps)).astype(float)
    rows, columns = (rng.integers(1, 5, 3 * groups).astype(float) for _ in "ab")
    arrays = {
        "w": weight.reshape(3 * groups, 3, taps),
        "r": rows,
        "c": columns,
        "s": np.array([3.0]),
    }
    node = {
        "op": kind, "in": [3 * groups, 5], "out": [3 * groups, 5], "gain": (-2.0).hex(),
        "identity": (7.0).hex(), "weight": {"array": "w"},
        "rows": [factor("r"), factor("s")], "columns": [factor("c")], "inputs": [-1],
    }  # fmt: skip
    node |= {"groups": 2, "kernel": [3], "centre": [2]} if kind == "conv" else {}
    node |= {"in": [3], "out": [3]} if kind == "linear" else {}
    sides = rows.reshape(groups, 3, 1, 1) * columns.reshape(groups, 1, 3, 1)
    eye = np.zeros_like(weight)
    eye[:, [0, 1, 2], [0, 1, 2], 2 if kind == "conv" else 0] = 7.0
    assert np.array_equal(check.Weights(arrays).kernel(node), -6.0 * weight * sides + eye)
    found = check.Weights(arrays, True)
    assert np.array_equal(found.kernel(node), 6.0 * np.abs(weight) * sides + eye)
    small = math.log2(np.abs(weight[weight != 0]).max())
    factors = [math.log2(a.max()) for a in (rows, columns, np.array(3.0 * 2.0 * 7.0))]
    # Powers of two that decide how arrays are scaled: logarithms, which round.
    np.testing.assert_allclose(found.spread, small + sum(factors))
    plain = [{**node, "rows": [], "columns": [], "gain": ONE, "identity": ZERO}]
    plain += [plain[0] | {"gain": (2.0).hex()}, plain[0] | {"identity": ONE}]
    plain += [plain[0] | {"rows": node["rows"]}, plain[0] | {"columns": node["columns"]}, node]
    # A sum, a root twice, two quotients, a cast and two products; gain and identity.
    least = [0, 2, 2, 18, 10, 26]
    for n, count in zip(plain, least, strict=True):
        assert count <= check.roundings(n) <= 1.5 * count
    assert check.roundings({"op": "add"}) > 0
