# SPDX-License-Identifier: MIT
"""Random networks: no local slope, found at random or by ascent, is steeper than the bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lmtfast as lf
from tests.networks import jacobian, steepest
from tests.random_networks import RandomNetwork

# Rounding of a Jacobian in float64. The bound itself gets no allowance.
ROUNDING = 1e-12
CASES, MANY = 40, 1000


def ascend(model: nn.Module, shape: tuple[int, ...], steps: int = 15) -> float:
    """Climb to a point where the Jacobian is long: gradient ascent on its Frobenius norm."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    best = 0.0
    for _ in range(steps):
        x = x.detach().requires_grad_()
        rows = [
            torch.autograd.grad(y, x, create_graph=True, allow_unused=True)[0]
            for y in model(x.unsqueeze(0)).reshape(-1)
        ]
        size = sum((r.square().sum() for r in rows if r is not None), torch.zeros(()))
        best = max(best, float(torch.linalg.matrix_norm(jacobian(model, x.detach()), 2)))
        if not size.requires_grad:
            break
        (slope,) = torch.autograd.grad(size, x, allow_unused=True)
        if slope is None or not bool(slope.any()):
            break
        x = x + 0.3 * slope / slope.norm()
    return best


def assert_bounded(seed: int, points: int = 10, climb: bool = False) -> None:
    model = RandomNetwork(seed)
    bound = lf.certified_bound(model, model.shape)
    best, pairs = steepest(model, model.shape, points, seed)
    if climb:
        best = max(best, ascend(model, model.shape))
    story = (seed, model.shape, model.names, model.tail)
    assert best * (1 - ROUNDING) <= bound.total, story
    if bound.classes is not None:
        assert bool((pairs * (1 - ROUNDING) <= bound.pairs).all()), story
    if bound.head_weight is not None and model.head is not None:
        feature_best, _ = steepest(Body(model), model.shape, points, seed)
        assert feature_best * (1 - ROUNDING) <= bound.features, story


class Body(nn.Module):
    def __init__(self, model: RandomNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.body(x)


@pytest.mark.parametrize("start", range(0, CASES, 10))
def test_no_slope_exceeds_the_bound(start: int) -> None:
    for seed in range(start, start + 10):
        assert_bounded(seed, climb=seed % 4 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(CASES, MANY, 20))
def test_no_slope_exceeds_the_bound_in_a_long_search(start: int) -> None:
    for seed in range(start, start + 20):
        assert_bounded(seed, points=20, climb=True)
