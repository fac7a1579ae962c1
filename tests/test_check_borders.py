# SPDX-License-Identifier: MIT
"""The checker on convolutions behind circular, reflected and replicated borders."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmtfast as lf
from lmtfast import check
from lmtfast.description import describe
from lmtfast.radius import canonical_up
from lmtfast.tracing import trace_model
from lmtfast.weights import named_tensors
from tests.described_convolutions import convolution_matrix, described_convolution
from tests.networks import randomised
from tests.oracles import rayleigh_exceeds, svd_norm
from tests.test_check import made
from tests.test_check_tampering import parts_of, sealed

MODES = ("circular", "reflect", "replicate")
UP = 1.0 + 2.0**-25


def drawn(seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """A convolution behind a border and its weight."""
    node, shape = described_convolution(seed, MODES, longest=9)
    return node, np.random.default_rng(seed).standard_normal(shape)


def accepted(node: dict[str, Any], weight: np.ndarray, c: float) -> bool:
    region = {"name": "w", "in": node["in"], "out": node["out"], "nodes": [node]}
    found: list[check.Finding] = []
    with np.errstate(all="ignore"), check.collecting(found, "w"):
        check.check_norm(region, c, {"w": weight})
    return not found


@pytest.mark.parametrize("seed", range(48))
def test_norms_are_those_of_the_matrix_entry_by_entry(seed: int) -> None:
    node, weight = drawn(seed)
    norm = svd_norm(convolution_matrix(node, weight))
    assert accepted(node, weight, norm * UP)
    for factor in (1.0 - 2.0**-29, 1.0 - 1e-6, 0.9, 0.5, 0.0):
        assert not accepted(node, weight, norm * factor)


@pytest.mark.parametrize("seed", range(30))
def test_with_other_geometry_only_what_holds_is_accepted(seed: int) -> None:
    """A border that is read beyond its end closes no circle, whatever the description says."""
    node, weight = drawn(seed)
    choice, largest = random.Random(seed), 0.0
    for _ in range(3):
        forged = {k: [*v] if isinstance(v, list) else v for k, v in node.items()}
        field = choice.choice(("in", "out", "stride", "dilation", "padding"))
        at = choice.randrange(field in ("in", "out"), len(forged[field]))
        value, step = forged[field][at], choice.choice([-1, 1, 2])
        forged[field][at] = [value[0] + step, value[1]] if field == "padding" else value + step
        if accepted(forged, weight, math.inf):
            # The norm by the description's own words: its image of every unit vector.
            region = {"nodes": [forged]}
            units = np.eye(math.prod(forged["in"])).reshape(-1, *forged["in"])
            image = check.image(region, check.Weights({"w": weight}), units)
            exact = image.reshape(len(units), -1)
            largest = svd_norm(exact)
            for factor in (1.0 - 2.0**-29, 0.9, 0.6):
                assert not accepted(forged, weight, largest * factor) or largest == 0.0
            assert not (accepted(forged, weight, largest) and rayleigh_exceeds(exact, largest))


def test_outputs_beyond_the_border_are_on_no_circle() -> None:
    """Taps 1 and -1 on a circle of one place cancel; where the second finds no place, 1 is left."""
    node, weight = drawn(0)[0], np.array([[[1.0, -1.0]]])
    node |= {
        "in": [1, 1], "kernel": [2], "stride": [1], "dilation": [1], "padding": [[0, 1]],
        "groups": 1, "centre": [0], "mode": "circular",
    }  # fmt: skip
    assert accepted(node | {"out": [1, 1]}, weight, 2.0**-8)
    assert accepted(node | {"out": [1, 2]}, weight, 1.0 + 2.0**-20)
    for c in (2.0**-8, 0.5, 1.0 - 2.0**-30):
        assert not accepted(node | {"out": [1, 2]}, weight, c)


# -- what the library writes


class Sum(nn.Module):
    """A composite with a border inside, and the identity in a circular kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.around = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
        self.mirror = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
        self.wide = nn.Conv2d(2, 2, 5, padding=2, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.around(x)
        return self.mirror(torch.tanh(x)) + 0.5 * self.wide(torch.tanh(x))


class Padded(nn.Module):
    def __init__(self, mode: str, pads: tuple[int, ...]) -> None:
        super().__init__()
        self.mode, self.pads, self.conv = mode, pads, nn.Conv2d(2, 3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pads, self.mode))


def convolution(mode: Any, axes: int, **options: Any) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d)[axes - 1]
    return kind(4, 6, 3, padding_mode=mode, **options)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "circular, strided": (convolution("circular", 2, padding=1, stride=2), (4, 7, 6)),
    "reflect, grouped": (convolution("reflect", 2, padding=2, dilation=2, groups=2), (4, 5, 6)),
    "replicate, one axis": (convolution("replicate", 1, padding=2, stride=2), (4, 9)),
    "pad of its own": (Padded("replicate", (1, 0, 0, 2)), (2, 6, 5)),
    "module": (nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(2, 3, 3)), (2, 5, 6)),
    "batch norm": (
        nn.Sequential(convolution("circular", 2, padding=1), nn.BatchNorm2d(6)), (4, 5, 7),
    ),
    "sum": (Sum(), (2, 6, 5)),
}  # fmt: skip


def operators(model: nn.Module, shape: tuple[int, ...], **options: Any) -> Any:
    """Descriptions of the operators with the norms that a certificate states, and the arrays."""
    bound = lf.certified_bound(model, shape, **options)
    described = describe(trace_model(model, shape).graph, named_tensors(model))
    norms = [canonical_up(float(x)) for x in bound.per_operator.values()]
    found = json.loads(described.text)["operators"]
    return [*zip(found, norms, strict=True)], described.arrays


@pytest.mark.parametrize("name", LAYERS)
def test_norms_of_the_library_are_accepted_and_lower_ones_are_not(name: str) -> None:
    torch.manual_seed(5)
    layer, shape = LAYERS[name]
    model = randomised(layer).double().eval()
    found, arrays = operators(model, shape)
    x = torch.randn(3, *shape, dtype=torch.float64)
    assert any("mode" in node for region, _ in found for node in region["nodes"])
    assert name == "sum" or [len(region["nodes"]) for region, _ in found] == [1]
    for region, norm in found:
        check.check_norm(region, norm, arrays)
        units = np.eye(math.prod(region["in"])).reshape(-1, *region["in"])
        whole = check.image(region, check.Weights(arrays), units).reshape(len(units), -1)
        for factor in (1.0 - 1e-6, 1.0 - 2.0**-29):
            with pytest.raises(check.Finding, match="no proof"):
                check.check_norm(region, svd_norm(whole) * factor, arrays)
    if len(found) == 1:  # the description says what torch computes, up to the constant part
        image = check.image(found[0][0], check.Weights(arrays), x.numpy())
        with torch.no_grad():
            exact = model(x) - model(torch.zeros_like(x))
        assert np.allclose(image, exact.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "stride"), [("circular", 1), ("circular", 2), ("reflect", 1), ("replicate", 1)]
)
def test_claims_by_the_torus_need_no_matrix(
    mode: Any, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond what a composite may have: 8 channels on 33 x 32 positions."""
    torch.manual_seed(stride)
    model = randomised(nn.Conv2d(8, 8, 3, stride, 1, padding_mode=mode)).eval()
    ((region, norm),), arrays = operators(model, (8, 33, 32), budget=lf.Budget(0.0))
    assert math.prod(region["in"]) ** 2 > check.ENTRIES
    monkeypatch.setattr(check, "banded", None)
    check.check_norm(region, norm, arrays)
    with pytest.raises(TypeError):  # the torus shows no less, and the matrix is asked for
        check.check_norm(region, norm * (1.0 - 1e-6), arrays)


def test_certificates(tmp_path: Path) -> None:
    torch.manual_seed(6)
    layers = [nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, 2, 1, padding_mode="reflect"), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, 1, 1, padding_mode="replicate"), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4 * 4 * 3, 3))
    _, path, weights, _, _ = made(randomised(model), (2, 7, 5), tmp_path)
    assert [str(f) for f in check.check(path, weights)] == []
    header, arrays = parts_of(path)
    for row in header["operators"]:
        stated = row[2]
        row[2] = (float.fromhex(stated) * (1.0 - 1e-6)).hex()
        path.write_bytes(sealed(header, arrays))
        assert [f.where for f in check.check(path, weights)] == [row[0]]
        row[2] = stated
