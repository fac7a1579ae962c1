# SPDX-License-Identifier: MIT
"""Common architectures trace as they are, and no Jacobian is ever longer than their bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast.tracing import trace_model
from tests.networks import ARCHITECTURES, IMAGE, LiResNet, Nested, WideResNet, randomised, steepest

# A Jacobian in float64 is off by its own rounding; the bound gets no allowance beyond it.
ROUNDING = 1e-12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_jacobian_exceeds_the_rigorous_bound(name: str) -> None:
    model = randomised(ARCHITECTURES[name](), seed=len(name))
    bound = lf.certified_bound(model, IMAGE)
    assert math.isfinite(bound.total)
    assert bound.head_weight is not None
    assert bound.head_weight.shape[0] == 3
    best, pairs = steepest(model, IMAGE)
    assert best * (1 - ROUNDING) <= bound.total
    assert bool((pairs * (1 - ROUNDING) <= bound.pairs).all())
    assert bool((bound.pairs <= math.sqrt(2) * bound.total * (1 + 1e-9)).all())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_features_bound_what_the_head_reads(name: str) -> None:
    model = randomised(ARCHITECTURES[name](), seed=1)
    bound = lf.certified_bound(model, IMAGE)
    assert bound.head_weight is not None
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = next(m for m in reversed(heads) if m.out_features == 3)
    assert torch.equal(bound.head_weight, head.weight.detach())
    head.weight.data = torch.eye(head.in_features, dtype=torch.float64)
    head.bias.data = torch.zeros(head.in_features, dtype=torch.float64)
    head.out_features = head.in_features
    best, _ = steepest(model, IMAGE)
    assert best * (1 - ROUNDING) <= bound.features


def test_one_operator_per_linear_region() -> None:
    plan = lf.trace(WideResNet(), IMAGE)
    kinds = {o.name: o.kind for o in plan.operators}
    # conv1 of a block is one operator with the batch norm behind it.
    assert "1.conv1+1.bn2" in kinds or "1.conv1" in kinds
    assert all(kind in ("conv", "linear", "scale", "composite") for kind in kinds.values())
    residual = [o for o in lf.trace(LiResNet(), IMAGE).operators if o.name.endswith("conv")]
    assert [o.primitive.identity_gain for o in residual] == [1.0, 1.0]


def test_disjoint_branches_take_the_maximum() -> None:
    graph = trace_model(Nested(), IMAGE).graph
    assert any(step.op == "max" for step in graph.tape)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(10))
def test_no_jacobian_exceeds_the_bound_over_many_weights(name: str, seed: int) -> None:
    model = randomised(ARCHITECTURES[name](), seed=100 + seed)
    best, pairs = steepest(model, IMAGE, points=40, seed=seed)
    bound = lf.certified_bound(model, IMAGE)
    assert best * (1 - ROUNDING) <= bound.total
    assert bool((pairs * (1 - ROUNDING) <= bound.pairs).all())
