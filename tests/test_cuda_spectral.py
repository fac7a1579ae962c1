# SPDX-License-Identifier: MIT
"""The spectral CUDA kernels, compiled for the CPU: launches, and every path a size chooses.

What their results are is in tests/test_contract_spectral.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

import lmtfast as lf
from lmtfast.backends import cuda_spectral
from lmtfast.backends.reference import Leaves
from lmtfast.engines import get_engine
from lmtfast.graph import Conv, ParameterRef, Region, RegionNode
from lmtfast.plan import BoundPlan
from lmtfast.table import CLOSED_FORM
from tests.networks import IMAGE, WideResNet
from tests.spectral_cases import (
    CASES,
    Network,
    conv,
    diagonal,
    diagonals,
    matrix,
    randn,
    scaled,
    tap_major,
)
from tests.test_contract_spectral import Provider
from tests.test_mixed_engines import MIXED, Mixed, heads

pytestmark = pytest.mark.usefixtures("emulated_cuda")

# Shared memory per block: more than rows here need, for one candidate, for x alone, none.
LIMITS = [227 << 10, 40 << 10, 16 << 10, 4 << 10]
LONG = {
    "one chunk": conv("one chunk", (9, 70, 3, 3), (4, 4)),
    "chunks": conv("chunks", (6, 150, 3, 3), (4, 4)),
    "chunks, tap-major": conv("chunks", (6, 152, 3, 3), (4, 4), stride=(2, 1)).map(tap_major),
    "chunks, bfloat16": conv("chunks", (5, 301, 3, 3), (4, 4)).map(torch.Tensor.bfloat16),
    "not held": conv("not held", (6, 769, 3, 3), (3, 3)),
    "matrix": matrix("matrix", 11, 6200),
    "matrix, bfloat16": matrix("matrix", 5, 12400).map(torch.Tensor.bfloat16),
}


@pytest.fixture
def core(emulated_cuda: ModuleType) -> Iterator[ModuleType]:
    yield emulated_cuda
    emulated_cuda.set_shared_limit(LIMITS[0])
    cuda_spectral.planned.cache_clear()


def start_of(network: Network, engine: str) -> tuple[BoundPlan, list[Tensor], Tensor]:
    plan = network.plan(engine, "cuda")
    parts = [randn(n, seed=i) for i, n in enumerate(plan.state_sizes)]
    return plan, network.values(plan), torch.cat([p / p.norm() for p in parts])


def count_step(core: ModuleType, network: Network, engine: str, *, update: bool) -> int:
    plan, tensors, state = start_of(network, engine)
    core.count_launches(reset=True)
    cuda_spectral.spectral_step(plan.table, tensors, state, update=update)
    return int(core.count_launches())


@pytest.mark.parametrize(
    ("engine", "read", "moved"), [("symbol", 3, 3), ("separable", 3, 3), ("operator", 2, 3)]
)
def test_launches_of_a_step(core: ModuleType, engine: str, read: int, moved: int) -> None:
    """However many operators there are."""
    for network in (CASES["plain"], CASES["many"], diagonals()):
        assert count_step(core, network, engine, update=True) == moved
        assert count_step(core, network, engine, update=False) == read


def alone() -> Network:
    ref = ParameterRef("factor")
    return diagonal("a", {ref: randn(700, seed=1)}, ref, 700) + diagonal("b", {}, ref, 700)


@pytest.mark.parametrize(
    ("network", "engine", "launches"),
    [
        (diagonals(), "symbol", 3),
        (diagonals(), "separable", 3),
        (heads() + diagonals(), "symbol", 3),
        (diagonals() + heads(), "separable", 3),
        (alone(), "symbol", 1),
    ],
    ids=["symbol", "separable", "symbol, heads", "separable, heads", "alone"],
)
def test_diagonal_maps_add_no_launch(
    core: ModuleType, network: Network, engine: str, launches: int
) -> None:
    """Nor does the order in which blocks run change a bit of what they add to shared tensors."""
    plan, tensors, state = start_of(network, engine)
    assert len(plan.table.compiled) == len(network.regions)
    grad, results = randn(len(network.regions), seed=7), []
    for order in (0, 1, 2):
        core.set_order(order)
        core.count_launches(reset=True)
        found = cuda_spectral.spectral_step(plan.table, tensors, state, update=True)
        assert core.count_launches(reset=True) == launches
        wanted = [True] * len(tensors)
        grads = cuda_spectral.spectral_vjp(plan.table, tensors, found[2], grad, wanted)
        assert core.count_launches() == 1
        results.append([*found, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["symbol", "separable"])
def test_launches_of_a_pre_activation_network(core: ModuleType, engine: str) -> None:
    """Three for all norms, matrices by power iteration included; one for the tape, one backward."""
    bound = lf.NetworkBound(WideResNet(), IMAGE, engine=engine, backend="cuda")
    assert bound.plan.uncompiled == ()
    assert set(bound.plan.engines) == {engine, "operator", CLOSED_FORM}
    core.count_launches(reset=True)
    total = bound().total
    assert core.count_launches(reset=True) == 3 + 1
    total.backward()
    assert core.count_launches() == 1


@pytest.mark.parametrize(
    ("case", "read", "moved", "backward"),
    [("heads", 3, 3, 1), ("heads of two", 3, 3, 1), ("several", 5, 7, 2)],
)
def test_launches_of_several_engines(
    core: ModuleType, case: str, read: int, moved: int, backward: int
) -> None:
    """Convolutions by the power iteration add theirs; the order of blocks changes no bit."""
    run, results = Mixed(Provider("cuda", "cpu"), *MIXED[case]), []
    state, grad = run.start(), randn(len(run.engines), seed=7)
    for order in (0, 1, 2):
        core.set_order(order)
        core.count_launches(reset=True)
        found = run.step(state)
        assert core.count_launches(reset=True) == moved
        still = run.step(state, update=False)
        assert core.count_launches(reset=True) == read
        grads = run.vjp(found[2], grad)
        assert core.count_launches() == backward
        results.append([*found, *still, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_launches_of_the_tape(core: ModuleType) -> None:
    plan, tensors, state = start_of(CASES["many"], "symbol")
    sigmas, _, _ = cuda_spectral.spectral_step(plan.table, tensors, state, update=True)
    core.count_launches(reset=True)
    cuda_spectral.compose(plan.table, sigmas)
    assert core.count_launches() == 1


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", LONG)
def test_every_share_of_shared_memory(core: ModuleType, name: str, limit: int) -> None:
    network = LONG[name]
    engine = "operator" if name.startswith("matrix") else "symbol"
    core.set_shared_limit(limit)
    cuda_spectral.planned.cache_clear()
    plan, tensors, state = start_of(network, engine)
    region, definition = network.regions[0], get_engine(engine)
    leaves = Leaves({ref: t.double() for ref, t in network.tensors.items()})
    want = definition.step(region, leaves, state.double(), update=True)
    sigmas, new, _ = cuda_spectral.spectral_step(plan.table, tensors, state, update=True)
    torch.testing.assert_close(sigmas[0].double(), want.sigma, rtol=1e-5, atol=0)
    got = definition.step(region, leaves, new.double(), update=False).sigma
    advanced = definition.step(region, leaves, want.state, update=False).sigma
    torch.testing.assert_close(got, advanced, rtol=1e-5, atol=0)


@pytest.mark.parametrize("limit", [*LIMITS[1:], 5 << 10])
def test_shares_of_many_operators(core: ModuleType, limit: int) -> None:
    """Candidates apart, identity and scales included: sigma and iterates as with all together."""
    network = (
        CASES["identity_groups"] + CASES["wide"] + scaled(conv("last", (40, 90, 3, 3), (4, 4)))
    )
    plan, tensors, state = start_of(network, "symbol")
    want = cuda_spectral.spectral_step(plan.table, tensors, state, update=True)
    core.set_shared_limit(limit)
    cuda_spectral.planned.cache_clear()
    got = cuda_spectral.spectral_step(plan.table, tensors, state, update=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def sharing() -> Network:
    """Two operators behind one batch norm and one scalar, and one with scales of its own."""
    first, second = (scaled(conv(name, (5, 4, 3, 3), (6, 5))) for name in ("first", "second"))
    op = second.regions[0].primitive
    assert isinstance(op, Conv)
    like = first.regions[0].primitive
    assert isinstance(like, Conv)
    op = replace(op, row_scales=like.row_scales)
    region = Region(op.name, op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))
    tensors = {op.weight: second.tensors[op.weight]} | {
        ref: t for ref, t in second.tensors.items() if str(ref).count("before")
    }
    return first + CASES["scaled_groups"] + Network([region], tensors)


def reshaped() -> Network:
    """One weight as a grouped and as a dense convolution."""
    grouped = conv("reshaped", (6, 3, 3, 3), (5, 4), groups=2)
    op = conv("reshaped", (6, 3, 3, 3), (5, 4)).regions[0].primitive
    assert isinstance(op, Conv)
    dense = Region("dense", op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))
    return Network([*grouped.regions, dense], grouped.tensors)


@pytest.mark.parametrize("engine", ["symbol", "separable", "operator"])
@pytest.mark.parametrize(
    ("network", "launches"),
    [(CASES["plain"], 1), (CASES["many"], 1), (CASES["tied"], 1), (sharing(), 1), (reshaped(), 2)],
    ids=["plain", "many", "tied", "sharing", "reshaped"],
)
def test_launches_of_a_gradient(
    core: ModuleType, network: Network, launches: int, engine: str
) -> None:
    plan, tensors, state = start_of(network, engine)
    _, _, saved = cuda_spectral.spectral_step(plan.table, tensors, state, update=False)
    grad = randn(len(network.regions), seed=7)
    wanted = [True] * len(tensors)
    core.count_launches(reset=True)
    found = cuda_spectral.spectral_vjp(plan.table, tensors, saved, grad, wanted)
    assert core.count_launches() == launches
    for seed in (1, 2):
        core.set_order(seed)
        again = cuda_spectral.spectral_vjp(plan.table, tensors, saved, grad, wanted)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    core.set_order(0)
    for a, b in zip(found, reference_vjp(network, engine, plan, state, grad), strict=True):
        assert a is not None
        scale = b.abs().max().item() + grad.abs().max().item() * 1e-2
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * scale)


def reference_vjp(
    network: Network, engine: str, plan: BoundPlan, state: Tensor, grad: Tensor
) -> list[Tensor]:
    definition = get_engine(engine)
    variables = {ref: t.double().requires_grad_() for ref, t in network.tensors.items()}
    total = {ref: torch.zeros_like(t) for ref, t in variables.items()}
    parts = state.double().split(list(plan.state_sizes))
    for i, (region, part) in enumerate(zip(network.regions, parts, strict=True)):
        leaves = Leaves({ref: t.detach() for ref, t in variables.items()})
        saved = definition.step(region, leaves, part, update=False).saved
        for ref, found in definition.vjp(region, variables, saved).items():
            total[ref] = total[ref] + grad[i].double() * found
    return [total[ref].detach() for ref in plan.slots]
