# SPDX-License-Identifier: MIT
"""One compiled call for operators of different engines, some of which share a weight."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lmtfast import backends
from lmtfast.backends.reference import Leaves
from lmtfast.engines import get_engine
from lmtfast.graph import Linear, Region
from lmtfast.table import build_table
from tests.spectral_cases import CASES, Network, conv, matrix, randn, scaled
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


def matrices() -> Network:
    """One alone, one with scales, one whose weight serves twice, with and without scales."""
    shared = scaled(matrix("shared", 9, 9), identity=0.5)
    network = uses(6) + matrix("plain", 13, 40) + scaled(matrix("scaled", 34, 7)) + shared
    return network + matrix("shared", 9, 9) + CASES["transposed"]


def heads() -> Network:
    """Matrices: one row, one column, rows of several tiles, scales and identity, bfloat16, zero."""
    return (
        matrix("long_head", 5, 2100).map(Tensor.bfloat16) + matrix("row", 1, 33)
        + matrix("column", 35, 1) + matrix("odd", 37, 13) + matrix("tall_head", 700, 3)
        + scaled(matrix("scaled_head", 9, 9), gain=2.0, identity=1.0)
        + scaled(matrix("scaled_half", 11, 6)).map(Tensor.bfloat16)
        + matrix("zero", 6, 10).map(torch.zeros_like)
    )  # fmt: skip


def convolutions() -> Network:
    return conv("strided_first", (6, 5, 3, 3), (7, 5), stride=(2, 1)) + CASES["identity_groups"]


HEADS = ("operator",) * len(heads().regions)
MIXED = {
    "uses": (uses(2), ("separable", "operator", "symbol")),
    "several": (
        several(), ("operator", "separable", "symbol", "separable", "operator", "symbol"),
    ),
    "several others": (
        several(), ("symbol", "operator", "separable", "operator", "symbol", "separable"),
    ),
    "heads": (heads() + convolutions(), (*HEADS, "separable", "separable")),
    "heads of two": (convolutions() + heads(), ("symbol", "separable", *HEADS)),
    "matrices": (
        matrices(), ("operator", "symbol", "separable", *["operator"] * 4, "symbol"),
    ),
    "matrices without symbol": (
        matrices(), ("operator", "separable", "separable", *["operator"] * 5),
    ),
}  # fmt: skip


class Mixed:
    """A network on one backend, each operator by an engine of its own."""

    def __init__(self, provider: Provider, network: Network, engines: Sequence[str]) -> None:
        plan = network.plan("operator", provider.backend)
        graph, module = plan.graph, backends.backend_module(provider.backend)
        assert all(isinstance(region, Region) for region in network.regions)
        self.network, self.slots, self.module = network, plan.slots, module
        self.engines = [get_engine(name) for name in engines]
        self.sizes = [
            e.state_size(r) for e, r in zip(self.engines, network.regions, strict=True)
        ]  # fmt: skip
        self.table = build_table(
            graph.operators, graph.tape, (graph.features, graph.total),
            slots={ref: i for i, ref in enumerate(plan.slots)}, engines=engines,
            state_sizes=self.sizes, compiled=module.STEPS,
        )  # fmt: skip
        assert len(self.table.compiled) == len(engines)
        self.device = provider.device
        self.tensors = [t.to(provider.device) for t in network.values(plan)]

    def start(self) -> Tensor:
        return torch.randn(sum(self.sizes), generator=torch.Generator().manual_seed(3))

    def step(self, state: Tensor, *, update: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        given = state.to(self.device)
        found = self.module.spectral_step(self.table, self.tensors, given, update=update)
        return found[0].cpu(), found[1].cpu(), found[2]

    def vjp(self, saved: Tensor, grad: Tensor) -> list[Tensor]:
        wanted = [True] * len(self.tensors)
        given = grad.to(self.device)
        found = self.module.spectral_vjp(self.table, self.tensors, saved, given, wanted)
        return [g.cpu() for g in found]


def each(*cases: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("provider", "case"),
        [
            pytest.param(
                p, case, id=f"{p.backend}-{case}",
                marks=[pytest.mark.slow] * (p.slow and case not in ("uses", "matrices")),
            )
            for p in dict.fromkeys(p for p, _ in PAIRS) for case in cases
        ],
    )  # fmt: skip


@each(*MIXED)
def test_a_call_of_several_engines(provider: Provider, case: str) -> None:
    with provider.using():
        run = Mixed(provider, *MIXED[case])
        network, state = run.network, run.start()
        sigmas, new, saved = run.step(state)
        grad = randn(len(run.engines), seed=3)
        grads = run.vjp(saved, grad)
    leaves = {ref: t.double() for ref, t in network.tensors.items()}
    weights = Leaves(leaves)
    total = {ref: torch.zeros_like(t) for ref, t in leaves.items()}
    parts = zip(state.split(run.sizes), new.split(run.sizes), strict=True)
    for i, (before, after) in enumerate(parts):
        region, engine = network.regions[i], run.engines[i]
        want = engine.step(region, weights, before.double(), update=True)
        assert sigmas[i].item() == pytest.approx(want.sigma.item(), rel=1e-5)
        reached = engine.step(region, weights, after.double(), update=False).sigma
        goal = engine.step(region, weights, want.state, update=False).sigma
        assert reached.item() == pytest.approx(goal.item(), rel=1e-4)
        variables = {ref: t.clone().requires_grad_() for ref, t in leaves.items()}
        for ref, part in engine.vjp(region, variables, want.saved).items():
            total[ref] += grad[i].double() * part
    for ref, tensor, got in zip(run.slots, run.tensors, grads, strict=True):
        coarse = 1e-2 if tensor.dtype == torch.bfloat16 else 1e-4
        scale = total[ref].abs().max().item()
        assert_close(got.double(), total[ref], rtol=coarse, atol=coarse * scale)


@each("several", "heads", "heads of two")
def test_operators_of_several_engines_do_not_disturb_one_another(
    provider: Provider, case: str
) -> None:
    """Each has the bits that it has alone, also beside weights that are not finite; a matrix that
    other launches run then only has the numbers."""
    network, engines = MIXED[case]
    spoilt = network.regions[0].primitive.weight  # type: ignore[union-attr]
    tensors = dict(network.tensors) | {spoilt: network.tensors[spoilt] * torch.nan}
    with provider.using():
        run = Mixed(provider, Network(network.regions, tensors), engines)
        state = run.start()
        for update in (True, False):
            sigmas, new, _ = run.step(state, update=update)
            assert sigmas[0].isnan()
            if update and engines[0] == "operator":
                before, after = (x[: run.sizes[0]] for x in (state, new))
                assert_close(after / after.norm(), before / before.norm())
            for i, part in enumerate(state.split(run.sizes)):
                region = network.regions[i]
                alone = Mixed(provider, Network([region], tensors), engines[i : i + 1])
                want = alone.step(part, update=update)
                # Triton runs a matrix in symbol's launches where there are any, else in its own.
                moves = provider.backend == "triton" and "symbol" in engines
                slack = 1e-6 if moves and isinstance(region.primitive, Linear) else 0.0
                assert_close(sigmas[i], want[0][0], rtol=slack, atol=0, equal_nan=True)
                if update:
                    assert_close(new.split(run.sizes)[i], want[1], rtol=0, atol=slack)
