# SPDX-License-Identifier: MIT
"""Regions written out: as one matrix, and line by line. Small integers, so that both are exact."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtfast.backends.reference import Leaves, region_apply
from lmtfast.graph import (
    INPUT,
    Average,
    Call,
    Conv,
    Copy,
    Linear,
    Region,
    RegionNode,
    Scale,
)  # fmt: skip
from lmtfast.verified import composite, dense
from lmtfast.verified.banded import proof_bytes, proof_operations
from lmtfast.verified.dense import dense_norm_upper, materialise
from lmtfast.verified.matrix import NormEnclosure
from lmtfast.verified.rounding import UNDERFLOW
from tests.oracles import norm_is_at_most
from tests.soundness.test_proof_terms import gamma, squared
from tests.soundness.test_weight_error import ROWS, R, V, W


def integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def copied(shape: tuple[int, ...], out: tuple[int, ...], target: str, *args: Any) -> Copy:
    return Copy("copy", shape, out, Call(target, (INPUT, *args)), 1, True, True)


def single(op: Any) -> Region:
    return Region("region", op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))


IMAGE = (2, 6, 4)
CONV = Conv("conv", IMAGE, (3, 6, 4), W, (3, 2), (1, 1), ((1, 1), (0, 1)), (1, 1), 1)
AROUND = replace(CONV, padding_mode="circular")
STRIDED = replace(CONV, out_shape=(3, 3, 2), stride=(2, 2))
TURNED = copied(IMAGE, (2, 4, 6), "aten.permute.default", [0, 1, 3, 2])
LINEAR = Linear("linear", (5,), (7,), V)
FACTOR = Scale("factor", (3, 6, 4), (3, 6, 4), R, (3, 1, 1))
MEAN = Average("mean", (3, 6, 4), (3, 6, 1), Call("aten.mean.dim", (INPUT, [3], True)), 1.0)
FLAT_OUT = copied((3, 6, 4), (72,), "aten.flatten.using_ints", 1)
AROUND_TURNED = replace(AROUND, in_shape=(2, 4, 6), out_shape=(3, 4, 6))
WEIGHTS = Leaves({W: integers(3, 2, 3, 2), V: integers(7, 5), R: integers(3) + 4.0})


def chain(*ops: Any) -> Region:
    nodes = tuple(RegionNode(op, (i - 1,)) for i, op in enumerate(ops))
    return Region("region", ops[0].in_shape, ops[-1].out_shape, nodes)


def residual() -> Region:
    square = replace(CONV, in_shape=(3, 6, 4), kernel=(3, 3), padding=((1, 1), (1, 1)))
    nodes = (RegionNode(square, (-1,)), RegionNode("add", (-1, 0)))
    return Region("region", (3, 6, 4), (3, 6, 4), nodes)


SQUARE_WEIGHTS = Leaves({W: integers(3, 3, 3, 3)})
JOINED = Region(
    "region", (5,), (10,),
    (RegionNode(copied((5,), (5,), "aten.flip.default", [1]), (-1,)),
     RegionNode("concat", (-1, 0))),
)  # fmt: skip


REGIONS: dict[str, tuple[Region, Leaves]] = {
    "linear": (single(LINEAR), WEIGHTS),
    "convolution": (single(CONV), WEIGHTS),
    "around": (single(AROUND), WEIGHTS),
    "strided": (single(STRIDED), WEIGHTS),
    "residual": (residual(), SQUARE_WEIGHTS),
    "pooled": (chain(CONV, FACTOR, MEAN), WEIGHTS),
    "turned": (single(TURNED), WEIGHTS),
    "joined": (JOINED, WEIGHTS),
}


# -- as one matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGIONS)
def test_columns_are_images_of_unit_vectors(name: str) -> None:
    region, weights = REGIONS[name]
    matrix = materialise(region, weights)
    size = math.prod(region.in_shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *region.in_shape)
    images = [region_apply(region, weights, v[None]).reshape(-1) for v in basis]
    assert torch.equal(matrix, torch.stack(images, 1))


def test_wide_matrices_are_made_in_parts() -> None:
    """More entries than are made at once: the identity, row by row."""
    region = single(copied((2100,), (2100, 1), "aten.unsqueeze.default", 2))
    assert torch.equal(materialise(region, WEIGHTS), torch.eye(2100, dtype=torch.float64))


def test_matrices_without_rows_or_columns() -> None:
    for rows, columns in ((0, 3), (3, 0), (0, 0)):
        op = Linear("linear", (columns,), (rows,), V)
        matrix = materialise(single(op), Leaves({V: torch.zeros(rows, columns).double()}))
        assert matrix.shape == (rows, columns)


def stored() -> Iterator[tuple[Region, bool]]:
    """Regions, and whether nothing rounds where they meet unit vectors."""
    yield single(CONV), True
    yield single(STRIDED), True
    yield single(AROUND), False
    yield single(replace(CONV, gain=0.3)), False
    yield single(replace(CONV, row_scales=ROWS)), False
    yield single(replace(AROUND, row_scales=ROWS)), False
    yield single(TURNED), True
    yield JOINED, True
    yield chain(CONV, FLAT_OUT), False
    yield chain(TURNED, AROUND_TURNED), False
    yield residual(), False
    yield single(FACTOR), False
    yield single(MEAN), False


@pytest.mark.parametrize("case", range(13))
def test_only_what_rounds_nowhere_is_taken_as_exact(
    case: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    region, exact = list(stored())[case]
    seen: list[tuple[Tensor, float]] = []

    def noted(matrix: Tensor, *, entry_error: float) -> NormEnclosure:
        seen.append((matrix, entry_error))
        return NormEnclosure(0.0, 0.0, "noted", 0.0)

    monkeypatch.setattr(dense, "matrix_norm_upper", noted)
    weights = SQUARE_WEIGHTS if any(n.op == "add" for n in region.nodes) else WEIGHTS
    dense_norm_upper(region, weights)
    ((matrix, error),) = seen
    assert torch.equal(matrix, materialise(region, weights))
    assert error == 0.0 if exact else error > 0.0
    if not exact:
        # At least one rounding of every entry.
        assert gamma(1) ** 2 * squared(matrix) <= Fraction(error) ** 2


@pytest.mark.parametrize("name", ["linear", "strided", "joined"])
def test_the_dense_proof_is_of_that_matrix(name: str) -> None:
    region, weights = REGIONS[name]
    found = dense_norm_upper(region, weights)
    assert norm_is_at_most(materialise(region, weights).numpy(), found.upper)
    assert found.upper <= float(torch.linalg.matrix_norm(materialise(region, weights), 2)) * 1.0001


@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (3, 5), (1, 1)])
def test_the_cost_of_a_dense_proof(rows: int, columns: int) -> None:
    region = single(Linear("linear", (columns,), (rows,), V))
    m, n = min(rows, columns), max(rows, columns)
    assert dense.dense_operations(region) == 1.25 * m * m * n + 1.5 * m**3
    assert dense.dense_bytes(region) == 8.0 * (2 * m * n + 5 * m * m)


# -- line by line ----------------------------------------------------------------------------------


def lines(shape: tuple[int, ...]) -> Tensor:
    """The line of every entry of an image."""
    if len(shape) < 2:
        return torch.zeros(math.prod(shape), dtype=torch.long)
    counts = torch.arange(shape[1]).reshape(1, -1, *(1,) * (len(shape) - 2))
    return counts.expand(shape).reshape(-1)


def positive(region: Region, weights: Leaves) -> Tensor:
    """The matrix of the region with weights and factors that cannot cancel."""
    nodes = tuple(replace(n, op=replace(n.op, gain=1.0)) if hasattr(n.op, "gain") else n
                  for n in region.nodes)  # fmt: skip
    ones = {ref: weights[ref].abs() + 1.0 for ref in (W, V, R) if ref in weights._cache}
    return materialise(replace(region, nodes=nodes), Leaves(ones))


NEGATIVE = chain(replace(CONV, gain=-0.5), replace(FACTOR, gain=-1.0), replace(MEAN, gain=-3.0))
APART = single(replace(CONV, kernel=(1, 1), padding=((0, 0), (0, 0)), out_shape=(3, 6, 4)))
SKIPPING = single(replace(CONV, kernel=(2, 1), padding=((0, 0), (0, 0)), dilation=(4, 1),
                          out_shape=(3, 2, 4)))  # fmt: skip
SEQUENCE = Conv("conv", (2, 6), (3, 6), W, (3,), (1,), ((1, 1),), (1,), 1)
LINED = {
    **REGIONS,
    "negative": (NEGATIVE, WEIGHTS),
    "apart": (APART, Leaves({W: integers(3, 2, 1, 1)})),
    "skipping": (SKIPPING, Leaves({W: integers(3, 2, 2, 1)})),
    "flattened": (chain(CONV, FLAT_OUT), WEIGHTS),
    "one axis": (single(SEQUENCE), Leaves({W: integers(3, 2, 3)})),
}


@pytest.mark.parametrize("name", LINED)
def test_lines_reach_what_their_entries_reach(name: str) -> None:
    region, weights = LINED[name]
    found = composite.line_reach(region, weights)
    rows, columns = lines(region.out_shape), lines(region.in_shape)
    expected = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1, dtype=torch.bool)
    for i, j in positive(region, weights).nonzero().tolist():
        expected[rows[i], columns[j]] = True
    assert torch.equal(found, expected)


def entries_of(shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    where = torch.arange(math.prod(shape)).reshape(shape if len(shape) > 1 else (1, 1, *shape))
    return where[:, start:stop].reshape(-1)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("smallest", [1, 20, 256])
@pytest.mark.parametrize("name", LINED)
def test_blocks_are_the_gram_matrix_of_the_lines(
    name: str, smallest: int, outputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composite, "SMALLEST_BLOCK", smallest)
    monkeypatch.setattr(composite, "CHUNK", 5 * 48)
    region, weights = LINED[name]
    reach = composite.line_reach(region, weights)
    form = composite._form(region, reach if outputs else reach.T, outputs)
    shape = region.out_shape if outputs else region.in_shape
    matrix = materialise(region, weights)
    side = matrix if outputs else matrix.T
    count = composite.line_count(shape)
    line = math.prod(shape) // count
    assert sum(form.orders) == math.prod(shape)
    assert min(form.orders[:-1], default=smallest) >= min(smallest, math.prod(shape))
    assert max(form.orders) < smallest + line
    gram = composite.CompositeGram(region, weights, form, 3)
    rows = [side[entries_of(shape, s, min(s + form.merged, count))]
            for s in range(0, count, form.merged)]  # fmt: skip
    assert [len(r) for r in rows] == gram.orders == form.orders
    reached = False
    for i in range(len(rows)):
        for j in range(i + 1):
            exact = rows[i] @ rows[j].T
            if i - j > gram.bandwidth:
                assert not exact.any()
                continue
            reached |= i - j == gram.bandwidth
            assert torch.equal(gram.block(i, j), exact / 64.0)
            # A product of n terms, each of which may underflow.
            inner = side.shape[1]
            least = gamma(inner) ** 2 * squared(rows[i]) * squared(rows[j]) / 64**2
            error = Fraction(gram.error(i, j))
            assert least <= error**2 <= least * (1 + Fraction(1, 10**9)) + Fraction(1, 2**1800)
            assert error**2 >= (inner * Fraction(UNDERFLOW)) ** 2 * len(rows[i]) * len(rows[j])
    assert reached


def test_blocks_may_be_asked_for_in_any_order() -> None:
    region, weights = LINED["convolution"]
    form = composite._form(region, composite.line_reach(region, weights).T, False)
    form = replace(form, merged=1, reach=composite.line_reach(region, weights).T, orders=[8] * 6,
                   bandwidth=2)  # fmt: skip
    whole = composite.CompositeGram(region, weights, form, 0)
    first = [whole.block(i, 0) for i in range(3)]
    whole.block(5, 5)
    for found, i in zip(first, range(3), strict=True):
        assert torch.equal(whole.block(i, 0), found)
        assert whole.error(i, 0) > 0.0


def test_at_least_one_entry_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    region, weights = LINED["strided"]
    form = composite.composite_form(region, weights)
    found = composite.CompositeGram(region, weights, form, 0).block(0, 0)
    monkeypatch.setattr(composite, "CHUNK", 1)
    assert torch.equal(composite.CompositeGram(region, weights, form, 0).block(0, 0), found)


@pytest.mark.parametrize("name", LINED)
def test_the_cheaper_side_is_taken(name: str) -> None:
    region, weights = LINED[name]
    reach = composite.line_reach(region, weights)
    sides = [composite._form(region, reach if outputs else reach.T, outputs)
             for outputs in (False, True)]  # fmt: skip
    found = composite.composite_form(region, weights)
    assert found.operations == min(side.operations for side in sides)
    assert composite.least_operations(region) <= found.operations
    for form in sides:
        assert form.operations > proof_operations(form.orders, form.bandwidth)
        assert form.memory > proof_bytes(form.orders, form.bandwidth)


def test_the_least_cost_is_that_of_separate_lines() -> None:
    region = single(replace(CONV, out_shape=(3, 3, 2), stride=(2, 2)))
    sides = [proof_operations([8] * 6, 0), proof_operations([6] * 3, 0)]
    assert composite.least_operations(region) == min(sides)
