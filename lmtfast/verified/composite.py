# SPDX-License-Identifier: MIT
r"""Blocks of the Gram matrix of any linear region, along the first axis of its image.

The region, or its adjoint, is applied to the unit vectors of one line of positions after the other,
which gives block columns T_i of its matrix (or rows); G_ij = T_i^T T_j. Which lines of the other
side a line can reach is found by the same region with ones for weights, where nothing cancels.
Outside, T_i is zero exactly, whatever a library kernel computed there, and blocks whose lines reach
nothing in common vanish.

What applying rounds is no matter of G but of T itself; the caller adds a bound on the norm of
(computed - exact) T to the norm that is proved for the computed one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmtfast.backends.reference import Leaves, region_adjoint, region_apply
from lmtfast.graph import Average, Conv, Linear, Region, Scale, Shape, weight_refs
from lmtfast.verified.banded import SMALLEST_BLOCK, proof_bytes, proof_operations
from lmtfast.verified.rounding import (
    UNDERFLOW,
    add_up,
    frobenius_up,
    gamma_up,
    mul_up,
    sqrt_up,
    times_power_of_two,
)  # fmt: skip
from lmtfast.weights import Weights

# Entries of unit vectors, or of their images, formed at once.
CHUNK = 1 << 22


def line_count(shape: Shape) -> int:
    """Lines of an image ``(channels, lines, ...)``; anything else is one line."""
    return shape[1] if len(shape) > 1 else 1


def by_lines(x: Tensor, shape: Shape) -> Tensor:
    """A batch of images as ``(N, channels, lines, rest)``."""
    channels = shape[0] if len(shape) > 1 else 1
    return x.reshape(x.shape[0], channels, line_count(shape), -1)


def line_reach(region: Region, weights: Weights) -> Tensor:
    """Which lines of the output can depend on which of the input. Shape ``(out, in)``, bool."""
    nodes = []
    for node in region.nodes:
        op = node.op
        if isinstance(op, (Conv, Linear)):
            op = replace(op, gain=1.0, identity_gain=float(op.identity_gain != 0.0))
        elif isinstance(op, (Scale, Average)):
            op = replace(op, gain=1.0)
        nodes.append(replace(node, op=op))
    ones = {r: torch.ones_like(weights[r], dtype=torch.float64) for r in weight_refs(region)}
    count = line_count(region.in_shape)
    basis = weights.zeros(count, *region.in_shape)
    rows = torch.arange(count)
    by_lines(basis, region.in_shape)[rows, :, rows] = 1.0
    image = region_apply(replace(region, nodes=tuple(nodes)), Leaves(ones), basis)
    return (by_lines(image, region.out_shape) > 0.0).any(-1).any(1).T


@dataclass(frozen=True)
class CompositeForm:
    """A side to cut a region's Gram matrix along.

    Attributes:
        outputs: Whether it is T T^T.
        merged: Lines per block.
        reach: Which lines of the other side each block reads. Shape ``(blocks, lines)``, bool.
        orders, bandwidth: As in :class:`~lmtfast.verified.banded.GramBlocks`.
        operations: Floating-point operations of making T and of one factorisation.
        memory: Bytes held at once.
    """

    outputs: bool
    merged: int
    reach: Tensor
    orders: list[int]
    bandwidth: int
    operations: float
    memory: float


def least_operations(region: Region) -> float:
    """What the proof takes if no two lines have anything in common."""
    found = math.inf
    for shape in (region.in_shape, region.out_shape):
        count = line_count(shape)
        found = min(found, proof_operations([math.prod(shape) // max(1, count)] * count, 0))
    return found


def composite_form(region: Region, weights: Weights) -> CompositeForm:
    """The cheaper side to cut the Gram matrix of a region along."""
    reach = line_reach(region, weights)
    forms = (_form(region, reach.T, False), _form(region, reach, True))
    return min(forms, key=lambda form: form.operations)


def _form(region: Region, reach: Tensor, outputs: bool) -> CompositeForm:
    shape = region.out_shape if outputs else region.in_shape
    other = region.in_shape if outputs else region.out_shape
    count = line_count(shape)
    line = math.prod(shape) // max(1, count)
    merged = min(max(1, -(-SMALLEST_BLOCK // max(1, line))), max(1, count))
    starts = range(0, count, merged)
    orders = [line * (min(s + merged, count) - s) for s in starts]
    blocks = torch.stack([reach[s : s + merged].any(0) for s in starts])
    common = (blocks.double() @ blocks.double().T) > 0.0
    i, j = common.nonzero().T
    bandwidth = int((i - j).abs().max()) if len(i) else 0
    products = sum(_operations(n.op) for n in region.nodes if isinstance(n.op, Conv))
    widest = int(blocks.sum(1).max()) * (math.prod(other) // max(1, line_count(other)))
    return CompositeForm(
        outputs, merged, blocks, orders, bandwidth,
        proof_operations(orders, bandwidth) + math.prod(shape) * products
        + 2.0 * widest * (bandwidth + 1) * sum(float(n) ** 2 for n in orders),
        proof_bytes(orders, bandwidth) + 8.0 * max(orders) * widest * (bandwidth + 2),
    )  # fmt: skip


def _operations(op: Conv) -> float:
    """Floating-point operations of one product with a convolution."""
    positions = math.prod((op.in_shape if op.transposed else op.out_shape)[1:])
    weights = op.in_shape[0] * op.out_shape[0] * math.prod(op.kernel) / op.groups
    return 2.0 * weights * positions


class CompositeGram:
    """Blocks of T T^T or T^T T of one region, computed as they are asked for.

    Args:
        region: The region.
        weights: Resolved in float64.
        form: Side and size of the blocks.
        exponent: T is scaled by two to minus this; nothing may overflow then.
    """

    def __init__(
        self, region: Region, weights: Weights, form: CompositeForm, exponent: int
    ) -> None:
        self.orders, self.bandwidth = form.orders, form.bandwidth
        self._region, self._weights, self._form = region, weights, form
        self._exponent = exponent
        self._made: dict[int, Tensor] = {}
        self._lengths: dict[int, float] = {}

    def _lines(self, i: int) -> Tensor:
        """T_i, ``(orders[i], lines, rest)``, zero where the block does not reach."""
        if i in self._made:
            return self._made[i]
        self._made = {k: t for k, t in self._made.items() if k >= i - self.bandwidth}
        region, form = self._region, self._form
        shape, other = region.in_shape, region.out_shape
        if form.outputs:
            shape, other = other, shape
        start = i * form.merged
        stop = min(start + form.merged, line_count(shape))
        index = by_lines(torch.arange(math.prod(shape)).reshape(1, *shape), shape)
        chosen = index[0, :, start:stop].reshape(-1)
        width = max(1, CHUNK // max(1, math.prod(region.in_shape), math.prod(region.out_shape)))
        parts = []
        for some in chosen.split(width):
            basis = self._weights.zeros(len(some), math.prod(shape))
            basis[torch.arange(len(some)), some] = 1.0
            basis = basis.reshape(-1, *shape)
            act = region_adjoint if form.outputs else region_apply
            image = by_lines(act(region, self._weights, basis), other)[:, :, form.reach[i]]
            parts.append(image.transpose(1, 2))
        made = times_power_of_two(torch.cat(parts), -self._exponent)
        full = made.new_zeros(len(chosen), line_count(other), made.shape[2] * made.shape[3])
        full[:, form.reach[i]] = made.flatten(2)
        self._made[i], self._lengths[i] = full, frobenius_up(full)
        return full

    def block(self, i: int, j: int) -> Tensor:
        """G_ij, ``(orders[i], orders[j])``."""
        left, right = self._lines(i), self._lines(j)
        common = self._form.reach[i] & self._form.reach[j]
        return left[:, common].flatten(1) @ right[:, common].flatten(1).mT

    def error(self, i: int, j: int) -> float:
        """A product of n terms errs by at most gamma(n) times the product of the lengths."""
        full = self._lines(i)
        inner = full.shape[1] * full.shape[2]
        entries = sqrt_up(float(self.orders[i]) * float(self.orders[j]))
        return add_up(
            mul_up(gamma_up(inner), mul_up(self._lengths[i], self._lengths[j])),
            mul_up(mul_up(2.0 * inner, entries), UNDERFLOW),
        )


__all__ = [
    "CompositeForm",
    "CompositeGram",
    "composite_form",
    "least_operations",
    "line_reach",
]
