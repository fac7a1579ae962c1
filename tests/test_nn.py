# SPDX-License-Identifier: MIT
"""The library's own layers: what they compute, and the constants tracing gives them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast.errors import ArgumentError, ShapeError
from lmtfast.nn import GroupSort, MinMax, Normalize


@pytest.mark.parametrize("layer", [MinMax(), GroupSort(2), GroupSort(3), GroupSort(6)])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 3, 4)])
def test_sorting_layers_are_isometries_of_constant_one(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    x, y = torch.randn(2, 50, *shape, dtype=torch.float64)
    assert torch.equal(layer(x).sort(1).values, x.sort(1).values)
    moved = (layer(x) - layer(y)).flatten(1).norm(dim=1)
    # Both sides round: 40 entries' worth of double roundings is what an exact tie may show.
    assert bool((moved <= (x - y).flatten(1).norm(dim=1) * (1 + 40 * 2.0**-52)).all())
    assert lf.certified_bound(layer.eval(), shape).total == 1.0


def test_normalisation_alone_is_one_over_the_smallest_deviation() -> None:
    layer = Normalize([0.1, 0.2], [0.5, 0.25]).eval()
    total = lf.certified_bound(layer, (2, 3, 3)).total
    assert 4.0 <= total < 4.0 * (1 + 1e-12)


def test_normalisation_joins_the_convolution_behind_it() -> None:
    model = nn.Sequential(Normalize([0.1, 0.2], [0.5, 0.25]), nn.Conv2d(2, 3, 3, padding=1)).eval()
    (operator,) = lf.trace(model, (2, 6, 6)).operators
    assert operator.kind == "conv"
    scaled = model[1].weight.detach() / torch.tensor([0.5, 0.25]).reshape(1, 2, 1, 1)
    joint = lf.conv_spectral_norm(scaled, (2, 6, 6), padding=1).total
    total = lf.certified_bound(model, (2, 6, 6)).total
    assert total == pytest.approx(joint, rel=1e-6)
    assert total < 4.0 * lf.conv_spectral_norm(model[1].weight, (2, 6, 6), padding=1).total


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="multiple of 2"):
        MinMax()(torch.zeros(1, 3))
    with pytest.raises(ShapeError, match="multiple of 4"):
        GroupSort(4)(torch.zeros(1, 6))
    with pytest.raises(ArgumentError, match="positive group size"):
        GroupSort(0)
    for mean, std in (([0.0], [0.0]), ([0.0], [1.0, 1.0]), ([0.0], [float("nan")])):
        with pytest.raises(ArgumentError, match="positive deviation"):
            Normalize(mean, std)
