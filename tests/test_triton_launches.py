# SPDX-License-Identifier: MIT
"""The launches of a Triton step and of its gradient, however many operators there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmtfast import backends
from lmtfast.graph import ParameterRef
from lmtfast.table import OperatorTable
from tests.conftest import TRITON_DEVICE
from tests.spectral_cases import CASES, Network, diagonal, diagonals

pytest.importorskip("triton", reason="triton is not installed")

# Where a step moves iterates, where it only reads sigmas, and of the gradient.
STEPS = {
    "symbol": (["symbol_prepare", "symbol_pass", "symbol_finish"],) * 2,
    "separable": (
        ["separable_prepare", "separable_image", "separable_adjoint"],
        ["separable_prepare", "separable_image"],
    ),
    "operator": (
        ["operator_pack", "operator_product", "operator_product"],
        ["operator_pack", "operator_product"],
    ),
}
GRADIENTS = {
    "symbol": ["symbol_gradient"],
    "separable": ["separable_overlap", "separable_gradient", "symbol_gradient"],
    "operator": ["operator_gradient", "symbol_gradient"],
}
NETWORKS = {"scaled": CASES["scaled"], "many": CASES["many"], "diagonals": diagonals()}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched; none of them runs."""
    jit, names = pytest.importorskip("triton.runtime.jit"), list[str]()
    monkeypatch.setattr(
        jit.KernelInterface, "__getitem__",
        lambda kernel, grid: lambda *_, **__: names.append(kernel.__name__),
    )  # fmt: skip
    return names


def step(network: Network, engine: str, *, update: bool) -> tuple[OperatorTable, list[Tensor]]:
    plan = network.plan(engine, "triton")
    assert len(plan.table.compiled) == len(network.regions)
    tensors = [t.to(TRITON_DEVICE) for t in network.values(plan)]
    state = torch.ones(plan.table.state_size, device=TRITON_DEVICE)
    backends.backend_module("triton").spectral_step(plan.table, tensors, state, update=update)
    return plan.table, tensors


def gradient(table: OperatorTable, tensors: list[Tensor]) -> None:
    saved, grad = (torch.ones(n, device=TRITON_DEVICE) for n in (table.saved_size, len(table.rows)))
    module = backends.backend_module("triton")
    module.spectral_vjp(table, tensors, saved, grad, [True] * len(tensors))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", STEPS)
def test_launches_of_a_network(name: str, engine: str, launched: list[str]) -> None:
    for update, names in zip((True, False), STEPS[engine], strict=True):
        launched.clear()
        table, tensors = step(NETWORKS[name], engine, update=update)
        assert launched == names
    launched.clear()
    gradient(table, tensors)
    assert launched == GRADIENTS[engine]


@pytest.mark.parametrize("update", [True, False])
def test_launches_of_diagonal_maps_alone(update: bool, launched: list[str]) -> None:
    ref = ParameterRef("factor")
    network = diagonal("a", {ref: torch.ones(5)}, ref, 5) + diagonal("b", {}, ref, 5)
    gradient(*step(network, "symbol", update=update))
    assert launched == ["symbol_prepare", "symbol_gradient"]
