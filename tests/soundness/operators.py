# SPDX-License-Identifier: MIT
"""A linear operator with the exact square of its norm: what the tables of this folder hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from lmtfast.backends.reference import Leaves
from lmtfast.graph import Linear, Region, RegionNode
from tests.cases import CONVS, TRANSPOSED
from tests.engine_cases import REF, conv_region, weights_of
from tests.oracles import conv_matrix, norm_is_at_most, rayleigh_exceeds, svd_norm

# Up to so many rows or columns, an operator without a known norm is judged completely.
EXACT_SIZE = 12


@dataclass(frozen=True)
class Construction:
    """A matrix, or a convolution of inputs ``shape``, and the exact square of its norm.

    Attributes:
        name: What it is, for messages.
        weight: ``(m, n)``, or a kernel as torch has it. Float64.
        shape: Of one input: ``(n,)`` for a matrix.
        options: Geometry of the convolution, as ``tests.oracles.conv_matrix`` takes it.
        square: Exact square of the norm, or None where the oracles alone judge.
        dtype: The narrowest dtype that holds the weight.
    """

    name: str
    weight: np.ndarray = field(repr=False)
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    square: Fraction | None = None
    dtype: torch.dtype = torch.float64

    def matrix(self) -> np.ndarray:
        """The operator's matrix. Exact: sums meet only where padding folds dyadic taps."""
        if self.weight.ndim == 2:
            return self.weight
        return conv_matrix(self.weight, self.shape, **self.options)

    def understated_by(self, bound: float) -> bool:
        """Whether ``bound`` is below the norm: decided, or beyond EXACT_SIZE proved by a witness.

        No tolerance: rationals against the known square, integers otherwise.
        """
        if math.isinf(bound):
            return bound < 0
        if self.square is not None:
            return bound < 0 or Fraction(bound) ** 2 < self.square
        matrix = self.matrix()
        if min(matrix.shape) <= EXACT_SIZE:
            return not norm_is_at_most(matrix, bound)
        return rayleigh_exceeds(matrix, bound)

    def within(self, bound: float, excess: float) -> bool:
        """Whether ``bound`` is at most ``1 + excess`` times the norm."""
        if self.square is not None:
            return Fraction(bound) <= 0 or (
                Fraction(bound) ** 2 <= self.square * (1 + Fraction(excess)) ** 2
            )
        return bound <= svd_norm(self.matrix()) * (1 + excess)

    def region(self) -> tuple[Region, Leaves]:
        """The operator as a traced network would hold it, and its weight."""
        weight = torch.from_numpy(self.weight)
        if self.weight.ndim == 2:
            op = Linear("matrix", (weight.shape[1],), (weight.shape[0],), REF)
            return Region("matrix", op.in_shape, op.out_shape, (RegionNode(op, (-1,)),)), (
                weights_of(weight)
            )
        axes = self.weight.ndim - 2
        given = dict(self.options)
        pads = _per_axis(given.pop("padding", 0), axes)
        given["padding"] = tuple(p if isinstance(p, tuple) else (p, p) for p in pads)
        for key in ("stride", "dilation", "output_padding"):
            if key in given:
                given[key] = _per_axis(given[key], axes)
        return conv_region(weight, self.shape, **given), weights_of(weight)

    @property
    def traceable_only(self) -> bool:
        """Whether padding is a map of its own, so that there is no single primitive."""
        return self.options.get("padding_mode", "zeros") in ("reflect", "replicate")

    def module(self) -> nn.Module:
        """The operator as a layer of ``dtype``, in eval mode."""
        weight = torch.from_numpy(self.weight)
        if self.weight.ndim == 2:
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            return _with(layer, weight, self.dtype)
        given, axes = dict(self.options), self.weight.ndim - 2
        groups, transposed = given.get("groups", 1), given.pop("transposed", False)
        pads = _per_axis(given.pop("padding", 0), axes)
        uneven = [p for p in reversed(pads) if isinstance(p, tuple)]
        given["padding"] = 0 if uneven else pads
        c0, c1 = weight.shape[:2]
        ends = (c0, c1 * groups) if transposed else (c1 * groups, c0)
        kind = (TRANSPOSED if transposed else CONVS)[axes]
        layer = _with(kind(*ends, weight.shape[2:], bias=False, **given), weight, self.dtype)
        if not uneven:
            return layer
        border = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d}[axes]
        return nn.Sequential(border([n for p in uneven for n in p], 0.0), layer).eval()


def _per_axis(value: Any, axes: int) -> tuple:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _with(layer: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    layer = layer.to(dtype).eval()
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert torch.equal(layer.weight.detach().double(), weight), "the dtype rounds the weight"
    return layer


def dense(name: str, weight: Any, square: Fraction | int | None = None, **fields: Any) -> Any:
    """A matrix of the table."""
    weight = np.ascontiguousarray(weight, dtype=np.float64)
    known = None if square is None else Fraction(square)
    return Construction(name, weight, (weight.shape[1],), {}, known, **fields)


def conv(
    name: str, weight: Any, shape: tuple[int, ...], square: Fraction | int | None, **options: Any
) -> Construction:
    """A convolution of the table."""
    weight = np.ascontiguousarray(weight, dtype=np.float64)
    known = None if square is None else Fraction(square)
    return Construction(name, weight, shape, options, known)
