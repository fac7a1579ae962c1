# SPDX-License-Identifier: MIT
"""The checker's torus: proves what the library claims by it, and nothing that is not so."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast import check
from lmtfast.description import save_weights
from lmtfast.verified.torus import polyphase, torus_norm_upper
from tests.networks import randomised
from tests.oracles import rayleigh_exceeds, svd_norm

UP, BELOW = 1.0 + 2.0**-26, 1.0 - 2.0**-28


def drawn(seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """A convolution's node and its kernel, geometry at random."""
    rng = np.random.default_rng(seed)
    axes = int(rng.integers(1, 3))
    kernel, dilation = rng.integers(1, 4, axes).tolist(), rng.integers(1, 3, axes).tolist()
    stride, extent = rng.integers(1, 4, axes).tolist(), rng.integers(5, 9, axes).tolist()
    padding = rng.integers(0, 4, (axes, 2)).tolist()
    spans = zip(extent, padding, dilation, kernel, stride, strict=True)
    out = [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in spans]
    groups, rows, columns = 1 + seed % 2, *rng.integers(1, 4, 2).tolist()
    weight = rng.standard_normal((groups * rows, columns, *kernel))
    node = {
        "op": "conv", "in": [groups * columns, *extent], "out": [groups * rows, *out], "rows": [],
        "columns": [], "gain": (1.0).hex(), "identity": (0.0).hex(), "weight": {"array": "w"},
        "inputs": [-1], "groups": groups, "kernel": kernel, "stride": stride, "padding": padding,
        "dilation": dilation, "centre": [0] * axes,
    }  # fmt: skip
    return node, weight


def matrix(node: dict[str, Any], kernel: np.ndarray) -> np.ndarray:
    """The map of one group, entry by entry, whatever the geometry says."""
    large, small = node["in"][1:], node["out"][1:]
    found = np.zeros((*small, kernel.shape[0], *large, kernel.shape[1]))
    taps = list(itertools.product(*map(range, node["kernel"])))
    for o in itertools.product(*map(range, small)):
        for i, t in enumerate(taps):
            rules = zip(o, t, node["stride"], node["padding"], node["dilation"], strict=True)
            p = tuple(s * a - low + d * b for a, b, s, (low, _), d in rules)
            if all(0 <= x < n for x, n in zip(p, large, strict=True)):
                found[(*o, slice(None), *p, slice(None))] += kernel[:, :, i]
    return found.reshape(math.prod(small) * kernel.shape[0], math.prod(large) * kernel.shape[1])


def claim_of(node: dict[str, Any], kernel: np.ndarray) -> float:
    """What the library's torus says of one group."""
    weight = torch.from_numpy(kernel.reshape(*kernel.shape[:2], *node["kernel"]))
    taps, coarse = polyphase(
        weight, stride=node["stride"], padding=node["padding"], dilation=node["dilation"]
    )
    return torus_norm_upper(
        taps, input_extent=coarse(node["in"][1:]), output_extent=node["out"][1:]
    ).upper


def shown(node: dict[str, Any], kernel: np.ndarray, c: float, lost: float = 0.0) -> bool:
    with np.errstate(all="ignore"):
        return check.torus(check.stencil(node)[1], kernel, c, "w", lost, False)


@pytest.mark.parametrize("seed", range(40))
def test_claims_of_the_library_are_shown_and_a_little_less_is_not(seed: int) -> None:
    node, weight = drawn(seed)
    for kernel in check.Weights({"w": weight}).kernel(node):
        claim, truth = claim_of(node, kernel), svd_norm(matrix(node, kernel))
        if claim == 0.0:
            assert truth == 0.0
            continue
        assert shown(node, kernel, claim * UP)
        assert not shown(node, kernel, claim * BELOW)
        assert not shown(node, kernel, truth * (1.0 - 2.0**-40))
        # What is lost elsewhere comes off the claim.
        assert shown(node, kernel, claim * UP, claim * 2.0**-29)
        assert not shown(node, kernel, claim * UP, claim * 2.0**-25)


@pytest.mark.parametrize("axes", [1, 2])
def test_one_float_below_an_exactly_known_symbol_is_refused(axes: int) -> None:
    """Nonnegative taps: the symbol is largest at frequency 0, where it is their sum."""
    ones = [1] * axes
    node = {
        "op": "conv", "in": [1, *[6] * axes], "out": [1, *[6] * axes], "kernel": [3] * axes,
        "stride": ones, "padding": [[1, 1]] * axes, "dilation": ones,
    }  # fmt: skip
    total, kernel = 4.0**axes, np.array([1.0, 2.0, 1.0])
    kernel = kernel if axes == 1 else np.outer(kernel, kernel)
    kernel = kernel.reshape(1, 1, -1)
    assert shown(node, kernel, total * UP)
    for c in (math.nextafter(total, 0.0), total * (1.0 - 2.0**-50), 0.5 * total, 0.0, math.nan):
        assert not shown(node, kernel, c)
    # The sign of the taps moves the maximum to half a turn, which an even circle has.
    node["out"] = node["in"] = [1, *[7] * axes]
    signs = np.array([-1.0, 1.0, -1.0])
    signs = signs if axes == 1 else np.outer(signs, signs)
    assert shown(node, kernel * signs.reshape(1, 1, -1), total * UP)
    assert not shown(node, kernel * signs.reshape(1, 1, -1), math.nextafter(total, 0.0))


@pytest.mark.parametrize("power", [-1060, -600, -100, 100, 600, 1000])
def test_scales(power: int) -> None:
    node, weight = drawn(7)
    kernel = check.Weights({"w": weight}).kernel(node)[0]
    claim = claim_of(node, kernel)
    scaled = np.ldexp(kernel, power)
    exact = np.array_equal(np.ldexp(scaled, -power), kernel)
    assert shown(node, scaled, math.ldexp(claim * UP, power)) or not exact
    assert not shown(node, scaled, math.ldexp(claim * (1.0 - 2.0**-10), power))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_never_shown(value: float) -> None:
    node, weight = drawn(4)
    weight.reshape(-1)[0] = value
    kernel = check.Weights({"w": weight}).kernel(node)[0]
    for c in (1e-3, 1.0, 1e300):
        assert not shown(node, kernel, c)


GEOMETRY = ("in", "out", "kernel", "stride", "padding", "dilation", "groups")


@pytest.mark.parametrize("seed", range(60))
def test_with_other_geometry_only_what_holds_is_accepted(seed: int) -> None:
    """Whatever the description says: an accepted norm is one of the map that it describes."""
    node, weight = drawn(seed)
    claim = max(claim_of(node, k) for k in check.Weights({"w": weight}).kernel(node)) * UP
    choice = random.Random(seed)
    for _ in range(4):
        forged = {k: [*v] if isinstance(v, list) else v for k, v in node.items()}
        field = choice.choice(GEOMETRY)
        if field == "groups":
            forged[field] = choice.choice([0, 1, 2, 3])
        else:
            at = choice.randrange(len(forged[field]))
            step = choice.choice([-2, -1, 1, 2])
            value = forged[field][at]
            forged[field][at] = [value[0] + step, value[1]] if field == "padding" else value + step
        region = {"name": "w", "in": forged["in"], "out": forged["out"], "nodes": [forged]}
        found: list[check.Finding] = []
        with np.errstate(all="ignore"), check.collecting(found, "w"):
            check.check_norm(region, claim, {"w": weight})
        if not found and math.prod(forged["out"]) * math.prod(forged["in"]):
            for kernel in check.Weights({"w": weight}).kernel(forged):
                assert not rayleigh_exceeds(matrix(forged, kernel), claim)


def certificate(tmp_path: Path, model: nn.Module, shape: tuple[int, ...], **options: Any) -> Any:
    model = randomised(model).float().eval()
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    made = lf.certify(model, x, input_shape=shape, input_range=(0, 1), **options)
    return made.save(tmp_path / "c.npz"), save_weights(
        model, tmp_path / "w.npz", input_shape=shape
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"method": "torus"}, {"level": "probabilistic"}])
def test_loose_certificates_need_no_other_proof(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = (
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 8 * 8, 3),
    )  # fmt: skip
    path, weights = certificate(tmp_path, nn.Sequential(*layers), (3, 8, 8), **options)
    if options.get("method") == "torus":
        monkeypatch.setattr(check, "banded", None)
    assert check.check(path, weights) == []


def test_a_grid_beyond_the_limit_is_left_to_the_other_proof() -> None:
    node, weight = drawn(3)
    kernel = check.Weights({"w": weight}).kernel(node)[0]
    claim = claim_of(node, kernel) * UP
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "OPERATIONS", 2.0**20)
        assert not shown(node, kernel, claim)
    assert shown(node, kernel, claim)
