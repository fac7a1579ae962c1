# SPDX-License-Identifier: MIT
"""Scales that stand alone, on every backend that compiles steps: norms and gradients come along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmtfast import backends
from lmtfast.backends import native_spectral
from lmtfast.engines.network import spectral_step, spectral_vjp
from lmtfast.errors import ShapeError
from lmtfast.graph import BatchNormScale, ChannelScale, Conv, ParameterRef, Region, RegionNode
from lmtfast.plan import BoundPlan
from lmtfast.table import CLOSED_FORM, FIELDS
from tests.spectral_cases import Network, conv, diagonal, diagonals, randn
from tests.test_contract_spectral import PAIRS, Provider

PROVIDERS = list(dict.fromkeys(p for p, _ in PAIRS))
WEIGHT, OTHER, VARIANCE = (ParameterRef(name) for name in ("weight", "other", "variance"))
NORM = BatchNormScale(WEIGHT, VARIANCE, 1e-5, "norm")
VARIANCES = {VARIANCE: torch.tensor([0.5, 2.0, 0.25, 4.0, 1.0])}

each_provider = pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: p.backend)
each_engine = pytest.mark.parametrize(
    ("provider", "engine"), [pytest.param(p, e, id=f"{p.backend}-{e}") for p, e in PAIRS]
)


@pytest.fixture(autouse=True)
def _using(provider: Provider) -> Iterator[None]:
    with provider.using():
        yield


def factor(values: Tensor, **options: object) -> Network:
    return diagonal("factor", {WEIGHT: values}, WEIGHT, values.numel(), **options)  # type: ignore[arg-type]


def norm(values: Tensor) -> Network:
    return diagonal("norm", {WEIGHT: values} | VARIANCES, NORM, 5)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values)


WIDE = randn(1000, seed=2)
CASES = {
    "batch norm": norm(numbers(0.5, -3.0, 1.0, 0.25, -0.5)),
    "batch norm without weight": diagonal(
        "bare", VARIANCES, BatchNormScale(None, VARIANCE, 1e-3, "bare"), 5
    ),
    "factor": factor(numbers(0.5, -3.0, 1.0, 0.25, 2.0)),
    "divisor": factor(numbers(0.5, -3.0, 1.0, -0.25, 3.0), inverse=True),
    "gain": factor(numbers(0.5, -3.0, 1.0, 0.25, 3.5), gain=-0.3),
    "one channel": factor(numbers(-0.25)),
    "one number": diagonal("number", {WEIGHT: torch.tensor(-1.5)}, WEIGHT),
    "a thousand channels": factor(WIDE),
    "the last of a thousand": factor(torch.cat((WIDE[1:], numbers(-9.0)))),
    "first of equals": factor(numbers(0.5, -3.0, 1.0, 3.0, -3.0)),
    "equals far apart": factor(WIDE.clamp(-1.0, 1.0)),
    "zeros": factor(torch.zeros(300)),
    "minus zeros": factor(-torch.zeros(5)),
    "zero among others": factor(numbers(0.0, -0.0, -1.0)),
    "subnormal": factor(numbers(1e-45, -3e-45, 1e-42, 0.0)),
    "huge": factor(numbers(1e38, -3e38, 2e38)),
    "division by zero": factor(numbers(1.0, 0.0, 2.0, 1.0, 1.0), inverse=True),
    "infinite": factor(numbers(1.0, -torch.inf, 2.0, 1.0, torch.inf)),
    "bfloat16": factor(randn(5, seed=1).bfloat16()),
    "bfloat16 gain, float32 variance": norm(randn(5, seed=1).bfloat16()),
    "float16": diagonal("half", {WEIGHT: randn(5, 1, 1, seed=1).half()}, WEIGHT, 5),
    "one factor twice": factor(WIDE) + diagonal("again", {}, WEIGHT, 1000, inverse=True),
    "one variance twice": norm(numbers(0.5, -3.0, 1.0, 0.25, -0.5))
    + diagonal("bare", {}, BatchNormScale(None, VARIANCE, 1e-3, "bare"), 5)
    + diagonal("variance", {}, VARIANCE, 5),
}  # fmt: skip


class Step:
    """One step of a network and its gradient on a backend."""

    def __init__(self, network: Network, provider: Provider | None, engine: str) -> None:
        backend, device = (provider.backend, provider.device) if provider else ("reference", "cpu")
        self.plan: BoundPlan = network.plan(engine, backend)
        self.tensors = [t.to(device) for t in network.values(self.plan)]
        parts = [randn(n, seed=i) for i, n in enumerate(self.plan.state_sizes)]
        state = torch.cat([p / p.norm() if p.numel() else p for p in parts]).to(device)
        self.found = spectral_step(self.plan, state, self.tensors, update=True)
        self.sigmas, self.iterates = self.found.sigmas.cpu(), self.found.iterates.cpu()

    def vjp(self, grad: Tensor, wanted: list[bool] | None = None) -> list[Tensor | None]:
        grads = spectral_vjp(
            self.plan, self.tensors, self.found.saved, self.found.rest,
            grad.to(self.found.sigmas.device), wanted or [True] * len(self.tensors),
        )  # fmt: skip
        return [None if g is None else g.cpu() for g in grads]


def assert_same_gradients(
    got: list[Tensor | None], want: list[Tensor | None], rtol: float, atol: float = 0.0
) -> None:
    for a, b in zip(got, want, strict=True):
        assert a is not None
        assert b is not None
        assert a.dtype == b.dtype
        coarse = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(a.dtype, rtol)
        torch.testing.assert_close(a, b, rtol=coarse, atol=atol * b.abs().max().item())


@each_provider
@pytest.mark.parametrize("case", CASES)
def test_the_norm_and_its_gradient_are_the_reference_s(provider: Provider, case: str) -> None:
    network = CASES[case]
    mine, reference = (Step(network, p, "operator") for p in (provider, None))
    assert mine.plan.uncompiled == ()
    assert mine.iterates.shape == (0,)
    torch.testing.assert_close(mine.sigmas, reference.sigmas, rtol=2e-7, atol=0.0)
    if case == "division by zero":  # where the gradient is not defined
        return
    grad = randn(len(network.regions), seed=3)
    assert_same_gradients(mine.vjp(grad), reference.vjp(grad), rtol=1e-6)


@each_provider
@pytest.mark.parametrize("place", [0, 3, 299])
def test_nan_is_the_norm(provider: Provider, place: int) -> None:
    values = torch.arange(300.0)
    values[5] = torch.inf
    values[place] = -torch.nan
    assert Step(factor(values), provider, "operator").sigmas.isnan().all()


@each_provider
def test_the_gradient_is_that_of_one_entry(provider: Provider) -> None:
    step = Step(CASES["equals far apart"], provider, "operator")
    first = int((WIDE.abs() >= 1).nonzero()[0])
    for grad in (2.0, torch.inf):
        (got,) = step.vjp(numbers(grad))
        want = torch.zeros(1000)
        want[first] = grad * WIDE[first].sign()
        assert got is not None
        assert torch.equal(got, want)


@each_provider
def test_gradients_accumulate(provider: Provider) -> None:
    """A step may be used twice: what each use adds is the same as in one."""
    step = Step(CASES["one variance twice"], provider, "operator")
    uses = numbers(1.0, 0.0, 0.0), numbers(0.0, 2.0, -1.0)
    parts = [step.vjp(grad) for grad in uses]
    total = [a + b for a, b in zip(*parts, strict=True) if a is not None and b is not None]
    assert_same_gradients(step.vjp(sum(uses, torch.zeros(3))), total, rtol=1e-6)


@each_engine
def test_diagonals_among_operators(provider: Provider, engine: str) -> None:
    network = diagonals()
    mine, reference = (Step(network, p, engine) for p in (provider, None))
    assert mine.plan.uncompiled == ()
    torch.testing.assert_close(mine.sigmas, reference.sigmas, rtol=1e-5, atol=0.0)
    grad = randn(len(network.regions), seed=4)
    want = mine.vjp(grad)
    assert_same_gradients(want, reference.vjp(grad), rtol=1e-3, atol=1e-4)
    count = len(mine.tensors)
    for i in range(1 if provider.slow else count):
        some = mine.vjp(grad, [j != i for j in range(count)])
        assert some[i] is None
        assert all(torch.equal(a, b) for a, b in zip(some, want, strict=True) if a is not None)  # type: ignore[arg-type]
    again = Step(network, provider, engine)
    assert torch.equal(again.sigmas, mine.sigmas)
    assert all(torch.equal(a, b) for a, b in zip(again.vjp(grad), want, strict=True))  # type: ignore[arg-type]


@each_engine
def test_operators_run_elsewhere_stay_as_they_are(provider: Provider, engine: str) -> None:
    """A diagonal map has no weight, though its row's slot is the first tensor's."""
    op = conv("elsewhere", (3, 3, 3, 3), (6, 6)).regions[0].primitive
    assert isinstance(op, Conv)
    twice = Region("twice", op.in_shape, op.out_shape, (RegionNode(op, (-1,)),) * 2)
    network = Network([twice], {op.weight: randn(3, 3, 3, 3, seed=5)}) + CASES["batch norm"]
    step = Step(network, provider, engine)
    assert step.plan.uncompiled == (0,)
    assert step.plan.slots[0] == op.weight
    module = backends.backend_module(provider.backend)
    grads = module.spectral_vjp(
        step.plan.table, step.tensors, step.found.saved, torch.ones(2, device=provider.device),
        [True] * len(step.tensors),
    )  # fmt: skip
    assert (grads[0] == 0).all()
    (alone,) = Step(CASES["batch norm"], provider, engine).sigmas
    assert step.sigmas[1] == alone


def weights_that_scale() -> dict[str, Network]:
    """Networks in which one tensor is a weight and a scale."""
    values = randn(5, 1, 1, 1, seed=6)
    map_of = conv("depthwise", (5, 1, 1, 1), (3, 3), groups=5).regions[0].primitive
    assert isinstance(map_of, Conv)
    op = replace(map_of, weight=WEIGHT)
    own = replace(op, row_scales=(ChannelScale(WEIGHT),))
    plain, scaled = (
        Network([Region("map", o.in_shape, o.out_shape, (RegionNode(o, (-1,)),))], {WEIGHT: values})
        for o in (op, own)
    )
    alone = diagonal("alone", {}, WEIGHT, 5)
    return {"before": plain + alone, "after": alone + plain, "own": scaled}


@each_engine
@pytest.mark.parametrize("case", weights_that_scale())
def test_a_weight_that_scales_as_well(provider: Provider, engine: str, case: str) -> None:
    """Whichever comes first: its gradient is that of all uses."""
    network = weights_that_scale()[case]
    mine, reference = (Step(network, p, engine) for p in (provider, None))
    torch.testing.assert_close(mine.sigmas, reference.sigmas, rtol=1e-5, atol=0.0)
    grad = randn(len(network.regions), seed=3)
    assert_same_gradients(mine.vjp(grad), reference.vjp(grad), rtol=1e-3, atol=1e-4)


@each_provider
def test_gradients_may_be_modified_in_place(provider: Provider) -> None:
    """Which autograd allows nobody with a view that was made without a graph."""
    step = Step(CASES["one variance twice"], provider, "operator")
    with torch.no_grad():
        grads = step.vjp(torch.ones(3))
    assert grads
    for g in grads:
        assert g is not None
        assert not g._is_view()


@each_provider
def test_a_scale_per_entry_stays_with_the_reference(provider: Provider) -> None:
    """It may be of a dtype that a backend takes for weights."""
    assert CLOSED_FORM in backends.steps(provider.backend)
    values = randn(5, 3, 4, seed=1)
    network = CASES["factor"]
    op = replace(network.regions[0].primitive, broadcast=(5, 3, 4))  # type: ignore[arg-type]
    region = Region("entries", op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))
    step = Step(Network([region], {WEIGHT: values}), provider, "operator")
    assert step.plan.uncompiled == (0,)
    assert step.sigmas == values.abs().max()


@pytest.mark.parametrize(
    "provider", [p for p in PROVIDERS if p.backend != "triton"], ids=lambda p: p.backend
)
@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("kind", 3, "kind"), ("groups", 0, "groups"), ("rows", 0, "row_scale"),
        ("rows", 6, "row_scale"), ("row_scale", 1, "row_scale"), ("row_scale", -1, "row_scale"),
    ],
)  # fmt: skip
def test_a_row_outside_the_scales_is_refused(
    provider: Provider, field: str, value: int, named: str
) -> None:
    """By the compiled cores, which others call as well."""
    network = CASES["factor"]
    plan = network.plan("operator", provider.backend)
    row = list(plan.table.rows[0])
    row[FIELDS.index(field)] = value
    table = replace(plan.table, rows=(tuple(row),))
    module = backends.backend_module(provider.backend)
    with pytest.raises(ValueError, match=f"rows.{named}"):
        module.spectral_step(table, network.values(plan), torch.zeros(0), update=True)


@pytest.mark.parametrize("provider", PROVIDERS[:1], ids=lambda p: p.backend)
def test_a_diagonal_has_no_product(provider: Provider) -> None:
    network = CASES["factor"]
    plan = network.plan("operator", provider.backend)
    with pytest.raises(ShapeError, match="stencil"):
        native_spectral.row_matvec(plan.table, 0, network.values(plan), torch.zeros(60))
