# SPDX-License-Identifier: MIT
"""The operator engine's compiled products: exact on small integers, for every geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lmtfast import backends
from lmtfast.backends import native_spectral as native
from lmtfast.backends import reference
from lmtfast.backends.reference import Leaves
from lmtfast.errors import DtypeError, ShapeError
from lmtfast.plan import BoundPlan
from tests.engine_cases import REF, random_case
from tests.spectral_cases import CASES, Network, conv, matrix, tap_major

pytestmark = pytest.mark.skipif(
    not backends.available_backends()["native"].available, reason="the core is not built"
)

# Sizes that end tiles, panels, depths and blocks of the kernels in every way.
EDGES = {
    "below_a_tile": conv("below_a_tile", (3, 2, 3, 3), (5, 5)),
    "rows_and_columns": conv("rows_and_columns", (29, 31, 3, 3), (9, 7)),
    "deep": conv("deep", (17, 300, 1, 1), (4, 4)),
    "long_gradient": conv("long_gradient", (5, 3, 3, 3), (21, 25)),
    "many_rows": conv("many_rows", (700, 5, 1, 1), (3, 3)),
    "many_columns": conv("many_columns", (3, 40, 5, 5), (6, 6)),
    "pointwise_wide": conv("pointwise_wide", (20, 24, 1, 1), (19, 17)),
    "pointwise_strided": conv("pointwise_strided", (9, 8, 1, 1), (11, 9), stride=(2, 2)),
    "one_output": conv("one_output", (19, 23, 4, 4), (4, 4), padding=((0, 0), (0, 0))),
    "column_image": conv("column_image", (4, 5, 3, 1), (40, 1), padding=((1, 1), (0, 0))),
    "large_kernel": conv("large_kernel", (2, 3, 13, 11), (15, 14)),
    "depthwise_large": conv("depthwise_large", (24, 1, 5, 5), (17, 18), groups=24),
    "matrix_large": matrix("matrix_large", 70, 5000),
    "matrix_tall": matrix("matrix_tall", 900, 33),
}
NETWORKS = {**CASES, **EDGES} | {
    f"{name}, tap-major": EDGES[name].map(tap_major)
    for name in ("rows_and_columns", "one_output", "depthwise_large")
}
# Batch norms divide, so those operators have no integers.
EXACT = [
    name
    for name, network in NETWORKS.items()
    if len(network.regions) == 1 and not name.startswith(("scaled", "identity", "matrix_scaled"))
]


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    values = np.random.default_rng(seed).integers(-3, 4, shape)
    return torch.from_numpy(values).float()


def integral(network: Network) -> tuple[Network, BoundPlan, list[Tensor]]:
    """The network with small integers for weights, in the dtype and layout that it had."""
    network = network.map(lambda w: torch.empty_like(w).copy_(integers(tuple(w.shape), 1)))
    plan = network.plan("operator", "native")
    return network, plan, network.values(plan)


def random_network(seed: int) -> Network | None:
    rng = np.random.default_rng(seed)
    found = random_case(rng, 1 + seed % 3)
    if found is None:
        return None
    weight = found.weight.float()
    return Network([found.region], {REF: tap_major(weight) if seed % 2 else weight})


@pytest.mark.parametrize("name", EXACT)
def test_products_of_integers_are_exact(name: str) -> None:
    assert_exact(NETWORKS[name])


def test_products_of_random_geometries_are_exact() -> None:
    networks = [n for n in map(random_network, range(60)) if n is not None]
    assert len(networks) > 30
    for network in networks:
        assert_exact(network)


def assert_exact(network: Network) -> None:
    """All three products of one operator with small integers equal those in float64."""
    network, plan, tensors = integral(network)
    region = network.regions[0]
    leaves = {ref: t.double() for ref, t in network.tensors.items()}
    v_shape = reference.vector_shape(region)
    v = integers(v_shape, 2)
    image = reference.matvec(region, Leaves(leaves), v.double())
    u = integers(tuple(image.shape), 3)
    got = native.row_matvec(plan.table, 0, tensors, v)
    assert torch.equal(got.double(), image.flatten())
    back = native.row_rmatvec(plan.table, 0, tensors, u)
    want = reference.rmatvec(region, Leaves(leaves), u.double())
    assert torch.equal(back.double(), want.flatten())
    (gradient,) = native.row_weight_vjp(plan.table, 0, tensors, u, v, [True])
    (expected,) = reference.weight_vjp(region, leaves, u.double(), v.double()).values()
    assert gradient is not None
    rounded = expected.to(gradient.dtype).double()
    assert torch.equal(gradient.double(), rounded.reshape(gradient.shape))


@pytest.mark.parametrize("name", ["scaled", "scaled_groups", "scaled_transposed", "identity"])
def test_scaled_products_are_those_of_the_reference(name: str) -> None:
    network = CASES[name]
    plan = network.plan("operator", "native")
    tensors, region = network.values(plan), network.regions[0]
    leaves = {ref: t.double() for ref, t in network.tensors.items()}
    v, u = torch.randn(region.in_shape), torch.randn(region.out_shape)
    image = native.row_matvec(plan.table, 0, tensors, v).double()
    want = reference.matvec(region, Leaves(leaves), v.double())
    torch.testing.assert_close(image, want.flatten(), rtol=1e-5, atol=1e-5)
    back = native.row_rmatvec(plan.table, 0, tensors, u).double()
    want = reference.rmatvec(region, Leaves(leaves), u.double())
    torch.testing.assert_close(back, want.flatten(), rtol=1e-5, atol=1e-5)
    grads = native.row_weight_vjp(plan.table, 0, tensors, u, v, [True] * len(tensors))
    expected = reference.weight_vjp(region, leaves, u.double(), v.double())
    for ref, grad in zip(plan.slots, grads, strict=True):
        assert grad is not None
        scale = expected[ref].abs().max().item()
        torch.testing.assert_close(grad.double(), expected[ref], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["rows_and_columns", "pointwise_wide", "matrix_large"])
def test_rows_of_any_thread_count_are_the_same(name: str) -> None:
    network = EDGES[name]
    plan = network.plan("operator", "native")
    tensors, region = network.values(plan), network.regions[0]
    v = torch.randn(reference.vector_shape(region))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        u = native.row_matvec(plan.table, 0, tensors, v)
        back = native.row_rmatvec(plan.table, 0, tensors, u)
        (gradient,) = native.row_weight_vjp(plan.table, 0, tensors, u, v, [True])
        assert gradient is not None
        found.append((u, back, gradient))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", list(EDGES))
def test_steps_at_the_edges_of_blocks(name: str) -> None:
    """A step through the public entry point, so that its norms and its packing are covered too."""
    network = EDGES[name]
    plan = network.plan("operator", "native")
    tensors, region = network.values(plan), network.regions[0]
    weights = Leaves({ref: t.double() for ref, t in network.tensors.items()})
    state = torch.randn(plan.table.state_size)
    sigmas, new, saved = native.spectral_step(plan.table, tensors, state, update=True)
    v = state.double().reshape(reference.vector_shape(region))
    u = reference.matvec(region, weights, v / v.norm())
    back = reference.rmatvec(region, weights, u / u.norm())
    assert sigmas[0].item() == pytest.approx(back.norm().item(), rel=1e-5)
    unit = (back / back.norm()).flatten()
    torch.testing.assert_close(new.double(), unit, rtol=0, atol=1e-5)
    want = torch.cat(((u / u.norm()).flatten(), unit))
    torch.testing.assert_close(saved.double(), want, rtol=0, atol=1e-5)
    (gradient,) = native.spectral_vjp(plan.table, tensors, saved, torch.ones(1), [True])
    (expected,) = reference.weight_vjp(
        region, weights._cache, u / u.norm(), unit.reshape(v.shape)
    ).values()
    assert gradient is not None
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


def test_rows_refuse_what_they_cannot_read() -> None:
    network = EDGES["deep"]
    plan = network.plan("operator", "native")
    tensors = network.values(plan)
    v = torch.zeros(network.regions[0].in_shape)
    for wrong, error in ((v.double(), DtypeError), (v[1:], ShapeError)):
        with pytest.raises(error) as raised:
            native.row_matvec(plan.table, 0, tensors, wrong)
        assert "Do this" in str(raised.value)
    with pytest.raises(ShapeError) as raised:
        native.row_matvec(plan.table, 1, tensors, v)
    assert "Do this" in str(raised.value)
