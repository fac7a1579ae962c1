# SPDX-License-Identifier: MIT
"""The definition: every linear region as plain PyTorch, any device, any dtype.

Three functions make a backend: ``matvec`` (``u = A v``), ``rmatvec`` (``A^T u``) and ``weight_vjp``
(the gradient of ``<u, A v>`` in every weight of the operator).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtfast.graph import (
    Average,
    Conv,
    Copy,
    Linear,
    Operator,
    Primitive,
    Region,
    Scale,
    Shape,
    WeightRef,
)  # fmt: skip
from lmtfast.rules.copying import execute
from lmtfast.weights import Weights


def effective_weight(op: Conv | Linear, weights: Weights) -> Tensor:
    """The kernel or matrix that acts: scales, gain and identity folded in. Shape of the weight."""
    weight = weights[op.weight]
    rows, columns = (1, 0) if isinstance(op, Conv) and op.transposed else (0, 1)
    for scale in op.row_scales:
        weight = weight * _along(weights.channels(scale), weight, rows, op, output=True)
    for scale in op.column_scales:
        weight = weight * _along(weights.channels(scale), weight, columns, op, output=False)
    if op.gain != 1.0:
        weight = weight * op.gain
    if op.identity_gain != 0.0:
        weight = weight + op.identity_gain * identity_kernel(op, weight)
    return weight


def _along(factor: Tensor, weight: Tensor, axis: int, op: Conv | Linear, *, output: bool) -> Tensor:
    """The per-channel factor broadcast to the kernel; groups share the kernel's channel axis."""
    factor = factor.to(weight.dtype)
    ones = (1,) * (weight.ndim - 2)
    if factor.numel() == 1:
        return factor.reshape((1,) * weight.ndim)
    groups = op.groups if isinstance(op, Conv) else 1
    transposed = isinstance(op, Conv) and op.transposed
    if groups == 1:
        return factor.reshape((-1, 1, *ones) if axis == 0 else (1, -1, *ones))
    # Conv kernels are (C_out, C_in / G, ...); transposed ones (C_in, C_out / G, ...).
    if output != transposed:
        return factor.reshape(-1, 1, *ones)
    per_group = factor.reshape(groups, 1, -1)
    repeats = weight.shape[0] // groups
    return per_group.expand(groups, repeats, -1).reshape(weight.shape[0], -1, *ones)


def identity_kernel(op: Conv | Linear, weight: Tensor) -> Tensor:
    """The kernel of the identity map in the layout of ``weight``."""
    delta = torch.zeros_like(weight)
    channels = torch.arange(weight.shape[0], device=weight.device)
    if isinstance(op, Linear):
        delta.fill_diagonal_(1.0)
    else:
        centre = tuple(low // d for (low, _), d in zip(op.padding, op.dilation, strict=True))
        at = (channels, channels % weight.shape[1], *(torch.full_like(channels, c) for c in centre))
        delta.index_put_(at, delta.new_ones(()))
    return delta


def conv_apply(op: Conv, weight: Tensor, x: Tensor) -> Tensor:
    """The convolution of a batch. Shape ``(N, C_in, ...)`` to ``(N, C_out, ...)``."""
    symmetric = all(low == high for low, high in op.padding)
    padding = [low for low, _ in op.padding]
    if not op.transposed and (op.padding_mode == "circular" or not symmetric):
        flat = [p for pair in reversed(op.padding) for p in pair]
        x = F.pad(x, flat, mode="circular" if op.padding_mode == "circular" else "constant")
        padding = [0] * len(op.padding)
    output_padding = list(op.output_padding) or [0] * len(op.kernel)
    return torch.ops.aten.convolution(
        x, weight, None, list(op.stride), padding, list(op.dilation), op.transposed,
        output_padding, op.groups,
    )  # fmt: skip


def primitive_apply(op: Primitive, weights: Weights, x: Tensor) -> Tensor:
    """One linear call on a batch."""
    if isinstance(op, Conv):
        return conv_apply(op, effective_weight(op, weights), x)
    if isinstance(op, Linear):
        return F.linear(x, effective_weight(op, weights))
    if isinstance(op, Scale):
        if op.ref is None:
            return x * op.gain
        factor = weights[op.ref].to(x.dtype).reshape(op.broadcast)
        return (x / factor if op.inverse else x * factor) * op.gain
    if isinstance(op, Average):
        return execute(op.call, x) * op.gain
    assert isinstance(op, Copy)
    return execute(op.call, x)


def region_apply(region: Region, weights: Weights, x: Tensor) -> Tensor:
    """The whole region on a batch. Shape ``(N, *in_shape)`` to ``(N, *out_shape)``."""
    values: list[Tensor] = []
    for node in region.nodes:
        inputs = [x if i < 0 else values[i] for i in node.inputs]
        if node.op == "add":
            values.append(sum(inputs[1:], inputs[0]))
        elif node.op == "concat":
            values.append(torch.cat(inputs, dim=node.axis + 1))
        else:
            assert isinstance(node.op, Primitive)
            values.append(primitive_apply(node.op, weights, inputs[0]))
    return values[-1] if values else x


def region_adjoint(region: Region, weights: Weights, u: Tensor) -> Tensor:
    """The exact adjoint on a batch. Shape ``(N, *out_shape)`` to ``(N, *in_shape)``."""
    with torch.enable_grad():
        x = u.new_zeros((u.shape[0], *region.in_shape)).requires_grad_()
        (result,) = torch.autograd.grad(region_apply(region, weights, x), x, u)
    return result


def vector_shape(region: Region) -> Shape:
    """Shape of an iterate: a matrix that acts on every position needs one position only."""
    op = region.primitive
    return (op.in_shape[-1],) if isinstance(op, Linear) else region.in_shape


def matvec(region: Region, weights: Weights, v: Tensor) -> Tensor:
    """``A v`` for one vector. Shape ``vector_shape(region)`` to the image's shape."""
    return region_apply(region, weights, v.unsqueeze(0)).squeeze(0)


def rmatvec(region: Region, weights: Weights, u: Tensor) -> Tensor:
    """``A^T u``, the exact adjoint of :func:`matvec` with the input's own shape."""
    op = region.primitive
    if isinstance(op, Linear):
        return u @ effective_weight(op, weights)
    if isinstance(op, Conv) and _plain(op):
        x = u.new_zeros((1, *region.in_shape))
        return _backward(op, effective_weight(op, weights), u, x, (True, False))[0].squeeze(0)
    return region_adjoint(region, weights, u.unsqueeze(0)).squeeze(0)


def weight_vjp(
    region: Region, tensors: Mapping[WeightRef, Tensor], u: Tensor, v: Tensor
) -> dict[WeightRef, Tensor]:
    """Gradient of ``<u, A v>`` in each of the given weight tensors."""
    refs = list(tensors)
    with torch.enable_grad():
        leaves = {r: t.detach().to(u.dtype).requires_grad_() for r, t in tensors.items()}
        weights = Leaves(leaves)
        op = region.primitive
        if isinstance(op, Linear) or (isinstance(op, Conv) and _plain(op)):
            acting = effective_weight(op, weights)
            with torch.no_grad():
                if isinstance(op, Linear):
                    outer = torch.outer(u, v)
                else:
                    outer = _backward(op, acting, u, v.unsqueeze(0), (False, True))[1]
            grads = torch.autograd.grad(acting, [leaves[r] for r in refs], outer, allow_unused=True)
        else:
            image = region_apply(region, weights, v.unsqueeze(0)).squeeze(0)
            grads = torch.autograd.grad(image, [leaves[r] for r in refs], u, allow_unused=True)
    return {r: g for r, g in zip(refs, grads, strict=True) if g is not None}


class Leaves(Weights):
    """Weights given directly, by reference."""

    def __init__(self, leaves: Mapping[WeightRef, Tensor]) -> None:
        super().__init__({})
        self._cache = dict(leaves)


def _plain(op: Conv) -> bool:
    return op.padding_mode == "zeros" and all(low == high for low, high in op.padding)


def _backward(
    op: Conv, weight: Tensor, u: Tensor, x: Tensor, wanted: tuple[bool, bool]
) -> tuple[Any, ...]:
    # One call gives the exact adjoint for every stride and output padding, and the weight gradient.
    # PyTorch 2.13 gets the latter wrong for groups in float64 where a channels-last vector without
    # a batch axis meets a channels-last weight: hence contiguous.
    return torch.ops.aten.convolution_backward(
        u.contiguous().unsqueeze(0), x.contiguous(), weight, None, list(op.stride),
        [low for low, _ in op.padding], list(op.dilation), op.transposed,
        list(op.output_padding) or [0] * len(op.kernel), op.groups, (*wanted, False),
    )  # fmt: skip


def entries(operator: Operator) -> int:
    """Number of entries of an iterate."""
    return math.prod(vector_shape(operator)) if isinstance(operator, Region) else 0
