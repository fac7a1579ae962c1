# SPDX-License-Identifier: MIT
"""Power iteration's Triton products: exact on small integers, for every geometry."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lmtfast import backends
from lmtfast.backends import reference
from lmtfast.backends.reference import Leaves
from lmtfast.errors import DtypeError, ShapeError
from tests.conftest import TRITON_DEVICE
from tests.interpreter import swift
from tests.spectral_cases import CASES, Network, conv
from tests.test_native_operator import EDGES, EXACT, integers, random_network

pytest.importorskip("triton", reason="triton is not installed")

# Two dozen groups of one channel take the interpreter minutes; a few are among CASES.
NETWORKS = CASES | {name: n for name, n in EDGES.items() if name != "depthwise_large"}
# Sums longer than a block, more rows and positions than a tile, and the adjoint's classes.
BRIEF = (
    "rows_and_columns", "uneven", "dilated", "transposed_groups", "circular_strided",
    "volume_strided", "wide, bfloat16, tap-major",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quickly() -> Iterator[None]:
    with swift():
        yield


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in BRIEF))
        for name in EXACT
        if name in NETWORKS
    ],
)
def test_products_of_integers_are_exact(name: str) -> None:
    assert_exact(NETWORKS[name])


@pytest.mark.slow
def test_products_of_random_geometries_are_exact() -> None:
    networks = [n for n in map(random_network, range(30)) if n is not None]
    assert len(networks) > 15
    for network in networks:
        assert_exact(network)


def assert_exact(network: Network) -> None:
    """All three products of one operator with small integers equal those in float64."""
    from lmtfast.backends import triton_operator as products

    network = network.map(lambda w: torch.empty_like(w).copy_(integers(tuple(w.shape), 1)))
    plan = network.plan("operator", "triton")
    region, tensors = network.regions[0], [t.to(TRITON_DEVICE) for t in network.values(plan)]
    leaves = {ref: t.double() for ref, t in network.tensors.items()}
    v = integers(reference.vector_shape(region), 2)
    image = reference.matvec(region, Leaves(leaves), v.double())
    u = integers(tuple(image.shape), 3)
    given_u, given_v = u.to(TRITON_DEVICE), v.to(TRITON_DEVICE)
    got = products.row_matvec(plan.table, 0, tensors, given_v)
    assert torch.equal(got.cpu().double(), image.flatten())
    back = products.row_rmatvec(plan.table, 0, tensors, given_u)
    want = reference.rmatvec(region, Leaves(leaves), u.double())
    assert torch.equal(back.cpu().double(), want.flatten())
    saved = products.saved_pair(plan.table, 0, tensors, given_u, given_v)
    (gradient,) = backends.backend_module("triton").spectral_vjp(
        plan.table, tensors, saved, torch.ones(1, device=TRITON_DEVICE), [True]
    )
    (expected,) = reference.weight_vjp(region, leaves, u.double(), v.double()).values()
    rounded = expected.to(gradient.dtype).double()
    assert torch.equal(gradient.cpu().double(), rounded.reshape(gradient.shape))


def test_a_row_of_a_network_is_that_operator() -> None:
    from lmtfast.backends import triton_operator as products

    network = CASES["scaled"] + conv("beside", (4, 5, 3, 3), (6, 5))
    plan = network.plan("operator", "triton")
    tensors = [t.to(TRITON_DEVICE) for t in network.values(plan)]
    weights = Leaves({ref: t.double() for ref, t in network.tensors.items()})
    for row, region in enumerate(network.regions):
        v = torch.randn(region.in_shape)
        image = products.row_matvec(plan.table, row, tensors, v.to(TRITON_DEVICE))
        want = reference.matvec(region, weights, v.double()).flatten()
        torch.testing.assert_close(image.cpu().double(), want, rtol=1e-5, atol=1e-5)


def test_rows_refuse_what_they_cannot_read() -> None:
    from lmtfast.backends import triton_operator as products

    network = CASES["plain"]
    plan = network.plan("operator", "triton")
    tensors = [t.to(TRITON_DEVICE) for t in network.values(plan)]
    v = torch.zeros(network.regions[0].in_shape, device=TRITON_DEVICE)
    for wrong, error in ((v.double(), DtypeError), (v[1:], ShapeError)):
        with pytest.raises(error) as raised:
            products.row_matvec(plan.table, 0, tensors, wrong)
        assert "Do this" in str(raised.value)
    with pytest.raises(ShapeError) as raised:
        products.row_matvec(plan.table, 1, tensors, v)
    assert "Do this" in str(raised.value)
