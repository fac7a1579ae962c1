# SPDX-License-Identifier: MIT
"""The launches of a Triton step and of its gradient, however many operators there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmtfast import backends
from lmtfast.graph import Linear, ParameterRef
from lmtfast.table import OperatorTable
from tests.conftest import TRITON_DEVICE
from tests.spectral_cases import CASES, Network, conv, diagonal, diagonals, matrix, scaled

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
WITH_MATRICES = {
    "head": CASES["plain"] + matrix("head", 10, 7),
    "scaled head": CASES["plain"] + scaled(matrix("head", 10, 7)),
    "heads": CASES["heads"],
    "diagonals": diagonals() + matrix("head", 10, 7),
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


def assert_launches(network: Network, engine: str, runs: list[str], launched: list[str]) -> None:
    """Those of the engines that run a network; gradients in scales come with the last one."""
    for k, update in enumerate((True, False)):
        launched.clear()
        table, tensors = step(network, engine, update=update)
        assert launched == [name for e in runs for name in STEPS[e][k]]
    launched.clear()
    gradient(table, tensors)
    assert launched == [*(n for e in runs for n in GRADIENTS[e][:-1]), "symbol_gradient"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", STEPS)
def test_launches_of_a_network(name: str, engine: str, launched: list[str]) -> None:
    assert_launches(NETWORKS[name], engine, [engine], launched)


@pytest.mark.parametrize("name", WITH_MATRICES)
def test_matrices_take_no_launch_of_their_own_beside_symbol(name: str, launched: list[str]) -> None:
    assert_launches(WITH_MATRICES[name], "symbol", ["symbol"], launched)


def test_launches_of_matrices_beside_other_operators(launched: list[str]) -> None:
    network = WITH_MATRICES["heads"]
    matrices = [r for r in network.regions if isinstance(r.primitive, Linear)]
    assert_launches(Network(matrices, network.tensors), "symbol", ["operator"], launched)
    assert_launches(network, "separable", ["operator", "separable"], launched)
    # A circular convolution that makes its input smaller is none of symbol's.
    shrinking = conv(
        "shrinking", (4, 5, 3, 3), (6, 7), padding=((1, 0), (0, 1)), padding_mode="circular"
    )
    assert_launches(network + shrinking, "symbol", ["operator", "symbol"], launched)


@pytest.mark.parametrize("update", [True, False])
def test_launches_of_diagonal_maps_alone(update: bool, launched: list[str]) -> None:
    ref = ParameterRef("factor")
    network = diagonal("a", {ref: torch.ones(5)}, ref, 5) + diagonal("b", {}, ref, 5)
    gradient(*step(network, "symbol", update=update))
    assert launched == ["symbol_prepare", "symbol_gradient"]
