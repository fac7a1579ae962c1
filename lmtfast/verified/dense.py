# SPDX-License-Identifier: MIT
"""Regions small enough to be written out as a matrix and proved densely."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmtfast.backends.reference import region_apply
from lmtfast.graph import Conv, Copy, Primitive, Region
from lmtfast.verified.matrix import NormEnclosure, matrix_norm_upper
from lmtfast.verified.rounding import frobenius_up, gamma_up, mul_up
from lmtfast.verified.weight_error import absolute, depth_of, weight_roundings
from lmtfast.weights import Weights


def materialise(region: Region, weights: Weights) -> Tensor:
    """The region's matrix, computed on the unit vectors. Shape ``(outputs, inputs)``, float64."""
    columns, rows = math.prod(region.in_shape), math.prod(region.out_shape)
    matrix = weights.zeros(rows, columns)
    width = max(1, min(columns, (1 << 22) // max(1, rows)))
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        basis = weights.zeros(stop - start, columns)
        basis[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        image = region_apply(region, weights, basis.reshape(-1, *region.in_shape))
        matrix[:, start:stop] = image.reshape(stop - start, rows).T
    return matrix


def dense_norm_upper(region: Region, weights: Weights) -> NormEnclosure:
    """Bound the norm of a region by the dense proof of its matrix. Rigorous."""
    matrix = materialise(region, weights)
    op = region.primitive
    stored = isinstance(op, Conv) and weight_roundings(op) == 0
    if stored or all(isinstance(n.op, Copy) or n.op == "concat" for n in region.nodes):
        # On a unit vector every product has a factor 0 or 1 and every sum one nonzero term: exact,
        # unless several taps of a circular kernel meet in one entry.
        error = 0.0 if _one_tap_per_entry(op) else _materialising_error(region, weights)
    else:
        error = _materialising_error(region, weights)
    return matrix_norm_upper(matrix, entry_error=error)


def _one_tap_per_entry(op: Primitive | None) -> bool:
    return not (isinstance(op, Conv) and op.padding_mode == "circular")


def _materialising_error(region: Region, weights: Weights) -> float:
    """|M_hat - M| <= gamma_n |A_k| ... |A_1| entrywise, n the roundings along the longest path."""
    positive, sizes = absolute(region, weights)
    depth = 2 * sum(depth_of(n.op) for n in region.nodes)
    return mul_up(gamma_up(depth), frobenius_up(materialise(positive, sizes)))


def dense_operations(region: Region) -> float:
    """Floating-point operations of the proof: Gram matrix, factor, residual."""
    m, n = sorted((math.prod(region.out_shape), math.prod(region.in_shape)))
    return 1.25 * float(m) ** 2 * n + 1.5 * float(m) ** 3


def dense_bytes(region: Region) -> float:
    """Bytes held at once."""
    m, n = sorted((math.prod(region.out_shape), math.prod(region.in_shape)))
    return 8.0 * (2.0 * m * n + 5.0 * float(m) ** 2)
