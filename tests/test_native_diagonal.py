# SPDX-License-Identifier: MIT
"""Scales that stand alone: their norms and gradients come with the compiled step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmtfast.backends import native, native_spectral
from lmtfast.engines.network import spectral_step, spectral_vjp
from lmtfast.errors import ShapeError
from lmtfast.graph import BatchNormScale, ParameterRef, Region, RegionNode, Scale, WeightRef
from lmtfast.table import FIELDS
from tests.spectral_cases import Network, randn, scaled
from tests.spectral_cases import conv as convolution

pytestmark = pytest.mark.skipif(not native.available()[0], reason="the extension is not built")

SHAPE = (5, 3, 4)
WEIGHT, VARIANCE = ParameterRef("weight"), ParameterRef("variance")


def scale(
    tensors: dict[WeightRef, Tensor], ref: WeightRef, broadcast: tuple[int, ...] = (5, 1, 1),
    inverse: bool = False, gain: float = 1.0,
) -> Network:  # fmt: skip
    op = Scale("scale", SHAPE, SHAPE, ref, broadcast, inverse, gain)
    return Network([Region("scale", SHAPE, SHAPE, (RegionNode(op, (-1,)),))], tensors)


def vector(*values: float) -> dict[WeightRef, Tensor]:
    return {WEIGHT: torch.tensor(values)}


VARIANCES = {VARIANCE: torch.tensor([0.5, 2.0, 0.25, 4.0, 1.0])}
CASES = {
    "batch norm": scale(
        vector(0.5, -3.0, 1.0, 0.25, -0.5) | VARIANCES, BatchNormScale(WEIGHT, VARIANCE, 1e-5, "n")
    ),
    "batch norm without weight": scale(VARIANCES, BatchNormScale(None, VARIANCE, 1e-3, "n")),
    "factor": scale(vector(0.5, -3.0, 1.0, 0.25, 3.0), WEIGHT),
    "divisor": scale(vector(0.5, -3.0, 1.0, -0.25, 3.0), WEIGHT, inverse=True),
    "gain": scale(vector(0.5, -3.0, 1.0, 0.25, 3.5), WEIGHT, gain=-0.3),
    "one number": scale({WEIGHT: torch.tensor(-1.5)}, WEIGHT, ()),
    "zeros": scale(vector(0.0, 0.0, 0.0, 0.0, 0.0), WEIGHT),
    "division by zero": scale(vector(1.0, 0.0, 2.0, 1.0, 1.0), WEIGHT, inverse=True),
    "infinite": scale(vector(1.0, -torch.inf, 2.0, 1.0, 1.0), WEIGHT),
    "bfloat16": scale({WEIGHT: randn(5, seed=1).bfloat16()}, WEIGHT),
    "float16": scale({WEIGHT: randn(5, 1, 1, seed=1).half()}, WEIGHT),
}


def step(network: Network, backend: str, grad: float = 2.0) -> tuple[Tensor, list[Tensor | None]]:
    plan = network.plan("operator", backend)
    assert plan.uncompiled == (() if backend == "native" else (0,))
    tensors, state = network.values(plan), torch.zeros(plan.table.state_size)
    found = spectral_step(plan, state, tensors, update=True)
    grads = spectral_vjp(
        plan, tensors, found.saved, found.rest, torch.tensor([grad]), [True] * len(tensors)
    )
    assert found.iterates.shape == (0,)
    return found.sigmas, grads


@pytest.mark.parametrize("case", CASES)
def test_the_norm_and_its_gradient_are_the_reference_s(case: str) -> None:
    sigmas, grads = step(CASES[case], "native")
    expected, goals = step(CASES[case], "reference")
    torch.testing.assert_close(sigmas, expected, rtol=2e-7, atol=0.0)
    for grad, goal in zip(grads, goals, strict=True):
        assert grad is not None
        assert goal is not None
        assert grad.dtype == goal.dtype
        if case != "division by zero":  # where the gradient is not defined
            torch.testing.assert_close(grad, goal, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("place", range(5))
def test_nan_is_the_norm(place: int) -> None:
    values = torch.tensor([1.0, 2.0, 3.0, torch.inf, 5.0])
    values[place] = torch.nan
    assert step(scale({WEIGHT: values}, WEIGHT), "native")[0].isnan().all()


def test_a_scale_per_entry_stays_with_the_reference() -> None:
    """It may be of a dtype that a backend takes for weights."""
    network = scale({WEIGHT: randn(*SHAPE, seed=1)}, WEIGHT, SHAPE)
    plan = network.plan("operator", "native")
    assert plan.uncompiled == (0,)
    found = spectral_step(plan, torch.zeros(0), network.values(plan), update=True)
    assert found.sigmas == network.tensors[WEIGHT].abs().max()


def test_a_scale_among_convolutions() -> None:
    first, last = (
        convolution("a", (5, 3, 3, 3), (6, 6)),
        scaled(convolution("b", (4, 5, 3, 3), (6, 6))),
    )
    network = first + CASES["batch norm"] + last
    plan, other = (network.plan("symbol", b) for b in ("native", "reference"))
    assert plan.uncompiled == ()
    tensors = network.values(plan)
    state = randn(plan.table.state_size, seed=3)
    found = spectral_step(plan, state, tensors, update=True)
    expected = spectral_step(other, state, tensors, update=True)
    torch.testing.assert_close(found.sigmas, expected.sigmas, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.iterates, expected.iterates, rtol=1e-3, atol=1e-4)
    grad, wanted = torch.tensor([1.0, 2.0, 3.0]), [True] * len(tensors)
    grads = spectral_vjp(plan, tensors, found.saved, found.rest, grad, wanted)
    goals = spectral_vjp(other, tensors, expected.saved, expected.rest, grad, wanted)
    for got, goal in zip(grads, goals, strict=True):
        assert got is not None
        assert goal is not None
        torch.testing.assert_close(got, goal, rtol=1e-3, atol=1e-5 * goal.abs().max().item())


@pytest.mark.parametrize(
    ("field", "value"), [("kind", 3), ("rows", 0), ("rows", 6), ("row_scale", 1), ("row_scale", -1)]
)
def test_a_row_outside_the_scales_is_refused(field: str, value: int) -> None:
    network = CASES["factor"]
    plan = network.plan("operator", "native")
    row = list(plan.table.rows[0])
    row[FIELDS.index(field)] = value
    table = replace(plan.table, rows=(tuple(row),))
    with pytest.raises(ValueError, match=f"rows.{field if field == 'kind' else 'row_scale'}"):
        native_spectral.spectral_step(table, network.values(plan), torch.zeros(0), update=True)


def test_a_diagonal_has_no_product() -> None:
    network = CASES["factor"]
    plan = network.plan("operator", "native")
    with pytest.raises(ShapeError, match="stencil"):
        native_spectral.row_matvec(plan.table, 0, network.values(plan), torch.zeros(60))
