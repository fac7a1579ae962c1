# SPDX-License-Identifier: MIT
r"""Blocks of the Gram matrix of a zero-padded convolution, along one axis of its image.

``out[o] = sum_t W_t x[s o - p + d t]`` per axis, x zero outside its extent. Either Gram matrix is
block-banded along any axis: T^T T over input positions a, a' that some output reads together, and
T T^T over output positions that read a common input. With ``taps(a)`` the pairs (tap t, position b
of the other side) that connect a to the other side, and V_t = W_t^T or W_t,

.. math::  G_{aa'} = \sum_{b} V_{t(a,b)} V_{t(a',b)}^T ,

so every entry is a sum of a few of the T^2 products ``V_t V_t'^T``, which are formed once. A
product errs by at most gamma(K) |V_t| |V_t'|^T, K its inner dimension, and at most T of them meet
in one entry: with r rows of taps in a block, |G_hat - G|_F <= gamma(K + T) |A_i|_F |A_j|_F, where
row block i of A holds each tap at most once per position: |A_i|_F^2 <= positions(i) |W|_F^2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtfast.verified.banded import (
    SMALLEST_BLOCK,
    proof_bytes,
    proof_operations,
    squared_norm_upper,
)
from lmtfast.verified.rounding import (
    UNDERFLOW,
    add_up,
    ensure_arithmetic,
    frobenius_up,
    gamma_up,
    mul_up,
    prescale,
    prescale_loss,
    require_float64,
    scale_up,
    sqrt_up,
)

# Position to tap, per position of one side.
Reach = list[dict[int, int]]
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Geometry:
    """A zero-padded convolution of one group; one number per axis.

    Attributes:
        in_extent, out_extent: Positions of the input and of the output.
        kernel, stride, dilation: As usual.
        padding: Zeros in front of the input.
    """

    in_extent: tuple[int, ...]
    out_extent: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    def reach(self, axis: int, outputs: bool) -> Reach:
        """For every position of a side, the taps that connect it and where they lead."""
        found: Reach = [{} for _ in range((self.out_extent if outputs else self.in_extent)[axis])]
        for o in range(self.out_extent[axis]):
            for t in range(self.kernel[axis]):
                i = self.stride[axis] * o - self.padding[axis] + self.dilation[axis] * t
                if 0 <= i < self.in_extent[axis]:
                    if outputs:
                        found[o][i] = t
                    else:
                        found[i][o] = t
        return found

    @property
    def unread(self) -> bool:
        """Whether no output reads anything but padding, or there is none."""
        return not all(any(self.reach(axis, outputs=True)) for axis in range(len(self.kernel)))


def shared_taps(reach: Reach) -> dict[tuple[int, int], Pairs]:
    """Pairs of taps that lead from two positions to a common one, for every such two positions."""
    readers: dict[int, list[tuple[int, int]]] = {}
    for a, taps in enumerate(reach):
        for b, t in taps.items():
            readers.setdefault(b, []).append((a, t))
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for group in readers.values():
        for (a, t), (other, u) in itertools.product(group, repeat=2):
            found.setdefault((a, other), []).append((t, u))
    return {key: tuple(sorted(pairs)) for key, pairs in found.items()}


@dataclass(frozen=True)
class BandedForm:
    """A side and an axis to cut a convolution's Gram matrix along.

    Attributes:
        outputs: Whether it is T T^T.
        axis: The axis whose positions are numbered into blocks.
        merged: Positions per block.
        orders: Order of every diagonal block.
        bandwidth: Blocks (i, j) vanish for ``|i - j|`` above it.
        operations: Floating-point operations of one factorisation with its residual.
        memory: Bytes held at once.
    """

    outputs: bool
    axis: int
    merged: int
    orders: list[int]
    bandwidth: int
    operations: float
    memory: float


def banded_form(geometry: Geometry, rows: int, channels: int) -> BandedForm:
    """The cheapest way to cut the Gram matrix of a convolution with ``(rows, channels)`` taps."""
    forms = itertools.product((False, True), range(len(geometry.kernel)))
    return min((_form(geometry, rows, channels, o, a) for o, a in forms), key=_cost)


def _cost(form: BandedForm) -> float:
    return form.operations


def _form(geometry: Geometry, rows: int, channels: int, outputs: bool, axis: int) -> BandedForm:
    extent = geometry.out_extent if outputs else geometry.in_extent
    line = (rows if outputs else channels) * math.prod(extent) // max(1, extent[axis])
    pairs = shared_taps(geometry.reach(axis, outputs))
    width = max((abs(a - b) for a, b in pairs), default=0)
    merged = min(max(1, -(-SMALLEST_BLOCK // max(1, line))), max(1, extent[axis]))
    orders = [
        line * (min(start + merged, extent[axis]) - start)
        for start in range(0, extent[axis], merged)
    ]
    bandwidth = min(-(-width // merged), max(0, len(orders) - 1))
    taps = math.prod(geometry.kernel)
    gram = 8.0 * (taps * (rows if outputs else channels)) ** 2
    return BandedForm(
        outputs, axis, merged, orders, bandwidth, proof_operations(orders, bandwidth),
        proof_bytes(orders or [0], bandwidth) + gram,
    )  # fmt: skip


class ConvolutionGram:
    """Blocks of T T^T or T^T T of one convolution, assembled as they are asked for.

    Args:
        weight: ``(rows, channels, k...)``, float64, prescaled.
        geometry: Its positions.
        form: Side, axis and size of the blocks.
    """

    def __init__(self, weight: Tensor, geometry: Geometry, form: BandedForm) -> None:
        axes = [form.axis, *(a for a in range(len(geometry.kernel)) if a != form.axis)]
        self.orders, self.bandwidth, self._form = form.orders, form.bandwidth, form
        reaches = [geometry.reach(a, form.outputs) for a in axes]
        self._rows = shared_taps(reaches[0])
        extents = [len(r) for r in reaches]
        kernel = [geometry.kernel[a] for a in axes]
        self._extent, self._line = extents[0], math.prod(extents[1:])
        self._places = _places(reaches[1:], kernel[1:])
        acting = weight.permute(0, 1, *(2 + a for a in axes))
        acting = acting if form.outputs else acting.transpose(0, 1)
        self._order, inner = acting.shape[:2]
        taps = acting.flatten(2).permute(2, 0, 1).reshape(-1, inner)  # (T * order, inner)
        self._products = (taps @ taps.mT).view(
            kernel[0], math.prod(kernel[1:]), self._order, kernel[0], -1, self._order
        )
        count = math.prod(kernel)
        self._gamma, self._squares = gamma_up(inner + count), frobenius_up(weight)
        self._lost = 2.0 * inner * count

    def _positions(self, block: int) -> range:
        start = block * self._form.merged
        return range(start, min(start + self._form.merged, self._extent))

    def block(self, i: int, j: int) -> Tensor:
        """G_ij, ``(orders[i], orders[j])``; index: position along the axis, the others, channel."""
        here, there = self._positions(i), self._positions(j)
        c, x = self._order, self._line
        result = self._products.new_zeros(len(here), x, c, len(there), x, c)
        for (m, a), (n, b) in itertools.product(enumerate(here), enumerate(there)):
            pairs = self._rows.get((a, b))
            if pairs is None:
                continue
            found = self._products[pairs[0][0], :, :, pairs[0][1]]  # (T', c, T', c)
            for t, u in pairs[1:]:
                found = found + self._products[t, :, :, u]
            for group, (rows, columns) in self._places.items():
                value = found[group[0][0], :, group[0][1]]
                for t, u in group[1:]:
                    value = value + found[t, :, u]
                result[m, rows, :, n, columns, :] = value
        return result.view(self.orders[i], self.orders[j])

    def error(self, i: int, j: int) -> float:
        """See the module; underflow of a product adds at most UNDERFLOW per product and entry."""
        positions = [len(self._positions(k)) * self._line for k in (i, j)]
        size = mul_up(mul_up(self._squares, self._squares), sqrt_up(float(math.prod(positions))))
        entries = sqrt_up(float(self.orders[i]) * float(self.orders[j]))
        return add_up(mul_up(self._gamma, size), mul_up(mul_up(self._lost, entries), UNDERFLOW))


def _places(reaches: Sequence[Reach], kernel: Sequence[int]) -> dict[Pairs, tuple[Tensor, Tensor]]:
    """Pairs of positions on the other axes by the pairs of taps they share, all numbers flat."""
    extents = [len(r) for r in reaches]
    found: dict[Pairs, list[tuple[int, int]]] = {}
    for rows, columns, pairs in _joint([shared_taps(r) for r in reaches], extents, kernel):
        found.setdefault(pairs, []).append((rows, columns))
    return {
        pairs: (torch.tensor([a for a, _ in at]), torch.tensor([b for _, b in at]))
        for pairs, at in found.items()
    }


def _joint(
    axes: Sequence[dict[tuple[int, int], Pairs]], extents: Sequence[int], kernel: Sequence[int]
) -> Iterator[tuple[int, int, Pairs]]:
    """Products over the axes of :func:`shared_taps`."""
    for chosen in itertools.product(*(axis.items() for axis in axes)):
        row = column = 0
        pairs: list[tuple[int, int]] = [(0, 0)]
        for ((a, b), some), n, k in zip(chosen, extents, kernel, strict=True):
            row, column = row * n + a, column * n + b
            pairs = [(t * k + p, u * k + q) for t, u in pairs for p, q in some]
        yield row, column, tuple(pairs)


def convolution_norm_upper(
    kernels: Sequence[Tensor], geometry: Geometry, *, estimate: float
) -> float:
    """Bound the norm of a zero-padded convolution by banded proofs, one per group.

    Args:
        kernels: The groups' weights, ``(rows, channels, k...)`` each, float64.
        geometry: Positions, the same for all groups.
        estimate: What the norm of the whole is believed to be; not trusted.

    Returns:
        The bound; infinite where every guess was refused. Relative excess below 1e-6 where the
        estimate is good to 1e-7.

    Raises:
        DtypeError: A weight is not float64.
        NonFiniteError: NaN or infinity among the weights.
        NotCertifiedError: The process does not compute in IEEE 754 double precision.

    Guarantee:
        Rigorous; assumptions as for :func:`lmtfast.verified.matrix.matrix_norm_upper`.

    Source:
        The proof in :mod:`lmtfast.verified.banded`; Rump, BIT 51 (2011) 367-384.
    """
    weight = torch.stack(list(kernels))
    require_float64(weight, "weight")
    ensure_arithmetic(weight.device)
    scaled, exponent = prescale(weight)
    if scaled.numel() == 0 or not bool(scaled.any()) or geometry.unread:
        return 0.0
    form = banded_form(geometry, *scaled.shape[1:3])
    believed = math.ldexp(estimate, -exponent)
    squared = 0.0
    for kernel in scaled:
        if bool(kernel.any()):
            gram = ConvolutionGram(kernel, geometry, form)
            squared = max(squared, squared_norm_upper(gram, believed * believed))
    # What prescaling lost is a kernel whose norm is at most the sum over its taps.
    taps = math.prod(geometry.kernel)
    lost = mul_up(float(taps), prescale_loss(weight.numel()))
    return scale_up(add_up(sqrt_up(squared), lost), exponent)


__all__ = ["BandedForm", "ConvolutionGram", "Geometry", "banded_form", "convolution_norm_upper"]
