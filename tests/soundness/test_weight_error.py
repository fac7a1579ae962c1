# SPDX-License-Identifier: MIT
"""What folding and applying may round, counted by hand and by the nonzeros of the matrices."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtfast.backends.reference import Leaves, region_apply
from lmtfast.errors import NonFiniteError, NotCertifiedError
from lmtfast.graph import (
    INPUT,
    Average,
    BatchNormScale,
    Call,
    ChannelScale,
    Conv,
    Copy,
    Linear,
    ParameterRef,
    Region,
    RegionNode,
    Scale,
)  # fmt: skip
from lmtfast.verified import weight_error
from lmtfast.verified.dense import materialise
from lmtfast.verified.weight_error import (
    applying_error_up,
    check_weights,
    depth_of,
    entry_error,
    in_range,
    product_error_up,
    weight_roundings,
)
from tests.oracles import rayleigh_exceeds

U = Fraction(1, 2**53)
# A stored batch-norm gain, its reciprocal, cast and own gain are off by so many roundings.
STORED = 7
W, V, R, C, G = (ParameterRef(name) for name in "wvrcg")


def gamma(count: int) -> Fraction:
    return count * U / (1 - count * U)


def dense(rows: int, columns: int, **fields: Any) -> Linear:
    return Linear("layer", (columns,), (rows,), W, **fields)


def conv(groups: int = 1, kernel: tuple[int, ...] = (3, 2), **fields: Any) -> Conv:
    extent = (7, 6)
    out = tuple(n - k + 1 for n, k in zip(extent, kernel, strict=True))
    return Conv("layer", (2 * groups, *extent), (3 * groups, *out), W, kernel, (1, 1),
                ((0, 0), (0, 0)), (1, 1), groups, **fields)  # fmt: skip


def region(op: Any) -> Region:
    return Region(op.name, op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))


def leaves(op: Any, seed: int = 0, **sizes: int) -> Leaves:
    """Random weights ``w``, and channel scales of the sizes asked for."""
    generator = torch.Generator().manual_seed(seed)
    shape = ((op.out_shape[0], op.in_shape[0]) if isinstance(op, Linear)
             else (op.out_shape[0], op.in_shape[0] // op.groups, *op.kernel))  # fmt: skip
    made: dict[Any, Tensor] = {W: torch.randn(shape, dtype=torch.float64, generator=generator)}
    for name, size in sizes.items():
        made[ParameterRef(name)] = torch.randn(size, dtype=torch.float64, generator=generator)
    return Leaves(made)


ROWS, COLUMNS = (ChannelScale(R),), (ChannelScale(C),)


@pytest.mark.parametrize("fields", [
    {}, {"gain": 3.0}, {"identity_gain": 0.5}, {"row_scales": ROWS}, {"column_scales": COLUMNS},
    {"row_scales": ROWS * 2, "column_scales": COLUMNS, "gain": -0.3, "identity_gain": 1.0},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_folding_is_counted_rounding_by_rounding(kind: str, fields: dict[str, Any]) -> None:
    if kind == "conv":
        op: Any = replace(conv(), out_shape=(2, 5, 5), **fields)
        if op.identity_gain:
            op = replace(op, kernel=(3, 3), padding=((1, 1), (1, 1)), out_shape=op.in_shape)
    else:
        op = dense(4, 4, **fields)
    weights = leaves(op, r=op.out_shape[0], c=op.in_shape[0])
    scales = len(op.row_scales) + len(op.column_scales)
    count = scales * (STORED + 1) + (op.gain != 1.0) + (op.identity_gain != 0.0)
    found = entry_error(op, weights)
    if count == 0:
        assert found == 0.0
        assert weight_roundings(op) == 0
        return
    assert weight_roundings(op) >= count
    exact = folded_sizes(op, weights)
    least = gamma(count) ** 2 * sum(v * v for v in exact)
    assert least <= Fraction(found) ** 2 <= least * 10**4


def folded_sizes(op: Any, weights: Leaves) -> list[Fraction]:
    """Absolute folded entries, exactly, added over the taps."""
    table = weights[W].abs().reshape(op.out_shape[0], op.in_shape[0], -1)
    found = []
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            value = sum((Fraction(v) for v in table[i, j].tolist()), Fraction(0))
            for scale in op.row_scales:
                value *= abs(Fraction(float(weights[scale.ref][i])))
            for scale in op.column_scales:
                value *= abs(Fraction(float(weights[scale.ref][j])))
            found.append(value * abs(Fraction(op.gain)) + (i == j) * Fraction(op.identity_gain))
    return found


OPERATIONS: dict[str, Any] = {
    "linear": dense(3, 5), "wide": dense(7, 2), "conv": conv(), "groups": conv(groups=2),
    "column": conv(kernel=(4, 1)), "pointwise": conv(kernel=(1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_sum_has_at_most_as_many_roundings_as_is_said(name: str) -> None:
    """A row of k nonzeros costs a product and k - 1 sums; the adjoint sums columns."""
    op = OPERATIONS[name]
    weights = leaves(op)
    nonzero = materialise(region(op), weights) != 0
    forward, backward = (int(nonzero.sum(axis).max()) for axis in (1, 0))
    assert forward <= depth_of(op) <= forward + 2
    assert backward <= weight_error._adjoint_depth(op) <= backward + 2


def test_scales_count_into_the_depth() -> None:
    for plain in (dense(3, 5), conv()):
        scaled = replace(plain, row_scales=ROWS, gain=0.5)
        for depth in (depth_of, weight_error._adjoint_depth):
            assert depth(scaled) - depth(plain) == weight_roundings(scaled) >= STORED + 2
    factor = Scale("factor", (3,), (3,), R, (3,))
    assert min(depth_of(factor), weight_error._adjoint_depth(factor)) >= STORED + 2
    mean = Average("mean", (2, 4), (2, 1), Call("aten.mean.dim", (INPUT, [2], True)), 1.0)
    assert depth_of(mean) >= 4 + 1
    assert weight_error._adjoint_depth(mean) >= 1 + 1


def never_below(matrix: Tensor, upper: float) -> bool:
    witness = torch.linalg.eigh(matrix @ matrix.mT)[1][:, -1] @ matrix
    return not rayleigh_exceeds(matrix.numpy(), upper, witness.numpy())


@pytest.mark.parametrize("name", ["linear", "wide", "conv", "groups"])
@pytest.mark.parametrize("seed", range(3))
def test_applying_errs_by_gamma_times_the_absolute_matrix(name: str, seed: int) -> None:
    op = OPERATIONS[name]
    weights = leaves(op, seed)
    absolute = materialise(region(op), weights).abs()
    found = applying_error_up(region(op), weights)
    depth = int((absolute != 0).sum(1).max())
    assert never_below(absolute, float(Fraction(found) / gamma(depth)) * (1 + 2.0**-50))
    assert found <= 8.0 * float(gamma(depth)) * absolute.sum(0).max() ** 0.5 * (
        absolute.sum(1).max() ** 0.5 + 1.0
    )


def test_a_chain_adds_the_roundings_of_its_nodes() -> None:
    first, second = dense(4, 3), replace(dense(2, 4), weight=V)
    weights = Leaves({W: torch.ones(4, 3).double(), V: torch.ones(2, 4).double()})
    chain = Region("chain", (3,), (2,), (RegionNode(first, (-1,)), RegionNode(second, (0,))))
    # The product has entries 4; each node's sums err on what the others make.
    least = gamma(3 + 4) * 4 * math.isqrt(6 * 10**16) / 10**8
    assert least <= Fraction(applying_error_up(chain, weights)) <= 8 * least


@pytest.mark.parametrize("seed", range(3))
def test_the_relative_error_is_over_a_lower_bound(seed: int) -> None:
    op = dense(6, 4)
    weights = leaves(op, seed)
    matrix = weights[W]
    found = product_error_up(region(op), weights, lambda x: x @ matrix.mT, lambda y: y @ matrix)
    absolute_error = applying_error_up(region(op), weights)
    # |A| <= norm, so the error over any lower bound of |A| is at least the error over the norm.
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert absolute_error / norm * (1 - 1e-12) <= found <= absolute_error / norm * 1.5


@pytest.mark.parametrize("wrong", [0.0, math.nan, math.inf])
def test_images_that_are_no_numbers_prove_nothing(wrong: float) -> None:
    op = dense(3, 3)
    found = product_error_up(region(op), leaves(op), lambda x: x * wrong, lambda y: y)
    assert found == math.inf


def powers(low: int, high: int) -> Leaves:
    return Leaves({W: torch.tensor([[2.0**low, 2.0**high]], dtype=torch.float64),
                   R: torch.full((1,), 0.5, dtype=torch.float64)})  # fmt: skip


@pytest.mark.parametrize(("low", "high", "safe"), [
    (-1, -1, True), (-898, 0, True), (-899, 0, False), (0, 897, True), (0, 898, False),
    (-449, 449, True), (-450, 449, False),
])  # fmt: skip
def test_products_stay_clear_of_both_ends(low: int, high: int, safe: bool) -> None:
    op = dense(1, 2, row_scales=ROWS)
    assert in_range(region(op), powers(low, high)) is safe
    # A kernel that acts as it is stored is multiplied with nothing before it is scaled.
    assert in_range(region(dense(1, 2)), powers(low, high))


def test_factors_count_as_often_as_they_are_met() -> None:
    two = replace(dense(1, 2, row_scales=ROWS * 2))
    weights = Leaves(
        {W: torch.ones(1, 2).double(), R: torch.full((1,), 2.0**449, dtype=torch.float64)}
    )
    assert in_range(region(dense(1, 2, row_scales=ROWS)), weights)
    assert not in_range(region(two), weights)
    for gain in (2.0**500, -(2.0**500)):
        assert not in_range(region(replace(dense(1, 2, row_scales=ROWS), gain=gain)), weights)
    scale = Scale("factor", (1,), (1,), R, (1,), gain=2.0**500)
    assert not in_range(region(scale), weights)
    assert in_range(region(replace(scale, gain=1.0)), weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    op = dense(2, 2, row_scales=ROWS)
    for ref in (W, R):
        weights = leaves(op, r=2)
        weights[ref].view(-1)[-1] = bad
        with pytest.raises(NonFiniteError):
            check_weights(region(op), weights)
    check_weights(region(op), leaves(op, r=2))


@pytest.mark.parametrize(("gain", "weight", "refused"), [
    (2.0**-900, 1.0, False), (2.0**-901, 1.0, True), (0.0, 1.0, True), (0.0, 0.0, False),
    (-(2.0**-901), -1.0, True), (1.0, 1.0, False), (0.0, 5e-324, True),
])  # fmt: skip
def test_gains_that_folding_rounds_away_are_refused(
    gain: float, weight: float, refused: bool
) -> None:
    ref = BatchNormScale(G, V, 1e-5, "norm")
    op = dense(2, 2, row_scales=(ChannelScale(ref),))
    pairs = ([[1.0, 1.0], [1.0, 1.0]], [1.0, gain], [1.0, weight])
    given = (torch.tensor(p, dtype=torch.float64) for p in pairs)
    weights = Leaves(dict(zip((W, ref, G), given, strict=True)))
    if refused:
        with pytest.raises(NotCertifiedError, match="rescale"):
            check_weights(region(op), weights)
    else:
        check_weights(region(op), weights)


def test_regions_are_applied_as_materialised() -> None:
    for name in ("linear", "conv", "groups"):
        op = OPERATIONS[name]
        weights = leaves(op)
        x = torch.randn(2, *op.in_shape, dtype=torch.float64)
        image = region_apply(region(op), weights, x).flatten(1)
        torch.testing.assert_close(image, x.flatten(1) @ materialise(region(op), weights).mT)


def chained(*ops: Any) -> Region:
    nodes = tuple(RegionNode(op, (i - 1,)) for i, op in enumerate(ops))
    return Region("chain", ops[0].in_shape, ops[-1].out_shape, nodes)


def test_factors_below_zero_count_by_their_size() -> None:
    """Uneven rows and columns, of which the smallest would be taken for the largest."""
    op = dense(4, 4)
    uneven = torch.tensor([1.0, 2.0, 3.0, 9.0], dtype=torch.float64)
    weights = Leaves({W: torch.outer(uneven, uneven), R: -uneven})
    scale = Scale("factor", (4,), (4,), R, (4,), gain=0.5)
    mean = Average("sum", (4,), (1,), Call("aten.sum.dim_IntList", (INPUT, [1], True)), 2.0, 0.5)
    for last in (scale, mean, replace(op, gain=0.5)):
        found = applying_error_up(chained(op, last), weights)
        assert found == applying_error_up(chained(op, replace(last, gain=-0.5)), weights)
        exact = weight_error.absolute(chained(op, replace(last, gain=-0.5)), weights)
        size = materialise(*exact)
        assert bool((size >= 0.0).all())
        assert never_below(size, found / float(gamma(4)))


@pytest.mark.parametrize("count", [1, 2, 8, 40])
def test_every_sum_of_a_long_region_counts(count: int) -> None:
    """x added to itself again and again: count roundings of an identity times count + 1."""
    nodes = [RegionNode("add", (-1, -1))]
    nodes += [RegionNode("add", (i, -1)) for i in range(count - 1)]
    long = Region("long", (3,), (3,), tuple(nodes))
    found = Fraction(applying_error_up(long, Leaves({})))
    assert gamma(count) * (count + 1) <= found <= gamma((count + 4) * count) * (count + 2)


def test_the_last_axis_is_the_one_that_is_summed() -> None:
    op = Linear("layer", (2, 30), (2, 5), W)
    assert depth_of(op) == 30
    assert weight_error._adjoint_depth(op) == 5


@pytest.mark.parametrize("copies", [1, 7])
def test_the_adjoint_of_copies_adds_them(copies: int) -> None:
    op = Copy("copy", (3,), (3, copies), Call("aten.expand.default", (INPUT,)), copies, False, True)
    assert copies - 1 <= weight_error._adjoint_depth(op) <= copies + 2
    assert 0 <= depth_of(op) <= 2
