# SPDX-License-Identifier: MIT
"""One compiled call for operators of different engines, some of which share a weight."""

from __future__ import annotations

import pytest
import torch

from lmtfast import backends
from lmtfast.backends.reference import Leaves
from lmtfast.engines import get_engine
from lmtfast.graph import Region
from lmtfast.table import build_table
from tests.spectral_cases import CASES, Network, conv, scaled
from tests.test_contract_spectral import PAIRS, Provider


def uses(rows: int) -> Network:
    """Three uses of one weight."""
    return (
        conv("first", (rows, rows, 3, 3), (5, 4))
        + conv("first", (rows, rows, 3, 3), (5, 6), stride=(2, 1))
        + conv("first", (rows, rows, 3, 3), (7, 5), dilation=(1, 2))
    )


def several() -> Network:
    """With scales, a transposed and a depthwise convolution behind them."""
    network = uses(6) + scaled(conv("second", (4, 3, 3, 3), (6, 5))) + CASES["transposed"]
    return network + conv("depthwise_last", (3, 1, 3, 3), (4, 4), groups=3)


MIXED = {
    "uses": (uses(2), ("separable", "operator", "symbol")),
    "several": (
        several(), ("operator", "separable", "symbol", "separable", "operator", "symbol"),
    ),
    "several others": (
        several(), ("symbol", "operator", "separable", "operator", "symbol", "separable"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("provider", "case"),
    [
        pytest.param(
            p, case, id=f"{p.backend}-{case}",
            marks=[pytest.mark.slow] * (p.slow and case != "uses"),
        )
        for p in dict.fromkeys(p for p, _ in PAIRS) for case in MIXED
    ],
)  # fmt: skip
def test_a_call_of_several_engines(provider: Provider, case: str) -> None:
    network, engines = MIXED[case]
    with provider.using():
        plan = network.plan("operator", provider.backend)
        module = backends.backend_module(provider.backend)
        running = [get_engine(name) for name in engines]
        assert all(isinstance(region, Region) for region in network.regions)
        sizes = [e.state_size(r) for e, r in zip(running, network.regions, strict=True)]
        graph = plan.graph
        table = build_table(
            graph.operators, graph.tape, (graph.features, graph.total),
            slots={ref: i for i, ref in enumerate(plan.slots)}, engines=engines, state_sizes=sizes,
            compiled=module.STEPS,
        )  # fmt: skip
        assert len(table.compiled) == len(engines)
        tensors = [t.to(provider.device) for t in network.values(plan)]
        generator = torch.Generator().manual_seed(3)
        state = torch.randn(sum(sizes), generator=generator)
        sigmas, new, saved = module.spectral_step(
            table, tensors, state.to(provider.device), update=True
        )
        grad = torch.randn(len(engines), generator=generator)
        grads = module.spectral_vjp(
            table, tensors, saved, grad.to(provider.device), [True] * len(tensors)
        )
    leaves = {ref: t.double() for ref, t in network.tensors.items()}
    weights = Leaves(leaves)
    total = {ref: torch.zeros_like(t) for ref, t in leaves.items()}
    parts = zip(state.split(sizes), new.cpu().split(sizes), strict=True)
    for i, (before, after) in enumerate(parts):
        region, engine = network.regions[i], running[i]
        want = engine.step(region, weights, before.double(), update=True)
        assert sigmas[i].item() == pytest.approx(want.sigma.item(), rel=1e-5)
        reached = engine.step(region, weights, after.double(), update=False).sigma
        goal = engine.step(region, weights, want.state, update=False).sigma
        assert reached.item() == pytest.approx(goal.item(), rel=1e-4)
        variables = {ref: t.clone().requires_grad_() for ref, t in leaves.items()}
        for ref, part in engine.vjp(region, variables, want.saved).items():
            total[ref] += grad[i].double() * part
    for ref, got in zip(plan.slots, grads, strict=True):
        scale = total[ref].abs().max().item()
        torch.testing.assert_close(got.cpu().double(), total[ref], rtol=1e-4, atol=1e-4 * scale)
