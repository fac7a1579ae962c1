# SPDX-License-Identifier: MIT
"""What folding scales into weights, and applying a region, can round."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lmtfast.backends.reference import Leaves, effective_weight, region_apply
from lmtfast.errors import NotCertifiedError
from lmtfast.graph import (
    Average,
    BatchNormScale,
    Conv,
    Copy,
    Linear,
    Operator,
    Primitive,
    Region,
    RegionNode,
    Scale,
    weight_refs,
)  # fmt: skip
from lmtfast.verified.lanczos import fresh_generator
from lmtfast.verified.rounding import (
    div_up,
    frobenius_up,
    gamma_up,
    magnitude,
    mul_up,
    sqrt_up,
)  # fmt: skip
from lmtfast.weights import Weights

# Roundings a scale may have gone through, seven: batch norm (add, a root that counts twice,
# divide), reciprocal, cast, gain.
SCALE_ROUNDINGS = 8
# Products of weights must stay clear of the underflow threshold 2^-1022 and of overflow.
SAFE_EXPONENT = 900
LOWER_STEPS = 20


def check_weights(operator: Operator, weights: Weights) -> None:
    """Refuse NaN, infinity and batch-norm gains that folding rounds away."""
    for ref in weight_refs(operator):
        magnitude(weights[ref].double(), f"a weight of {operator.name!r}")
        if isinstance(ref, BatchNormScale) and ref.weight is not None:
            vanished = (weights[ref].abs() < 2.0**-SAFE_EXPONENT) & (weights[ref.weight] != 0)
            if bool(vanished.any()):
                raise extreme(operator.name)


def extreme(name: str) -> NotCertifiedError:
    """The refusal of weights whose products leave the range of float64."""
    return NotCertifiedError(
        f"weights whose products stay within 2^+-{SAFE_EXPONENT}", "more extreme ones", repr(name),
        "rescale the layer (a power of two is exact)",
    )  # fmt: skip


def weight_roundings(op: Conv | Linear) -> int:
    """Roundings between the stored weights and an entry of the acting kernel; 0 if it is stored."""
    scales = len(op.row_scales) + len(op.column_scales)
    plain = not scales and op.gain == 1.0 and op.identity_gain == 0.0
    return 0 if plain else (SCALE_ROUNDINGS + 1) * scales + 3


def absolute(region: Region, weights: Weights) -> tuple[Region, Weights]:
    """The region with all weights and factors replaced by their absolute values."""
    nodes = []
    for node in region.nodes:
        op = node.op
        if isinstance(op, (Conv, Linear)):
            op = replace(op, gain=abs(op.gain), identity_gain=abs(op.identity_gain))
        elif isinstance(op, (Scale, Average)):
            op = replace(op, gain=abs(op.gain))
        nodes.append(replace(node, op=op))
    leaves = {ref: weights[ref].double().abs() for ref in weight_refs(region)}
    return replace(region, nodes=tuple(nodes)), Leaves(leaves)


def product_error_up(
    region: Region,
    weights: Weights,
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
) -> float:
    """Bound on ``|fl(A x) - A x| / (|A| |x|)`` for the region and its adjoint; infinite if unknown.

    The absolute error of :func:`applying_error_up`, over a lower bound on |A|: a computed image
    ``y`` of ``x``, less that error.
    """
    sizes = [s[s > 0] for node in region.nodes for s in _factors(node.op, weights)]
    logs = [abs(math.frexp(float(e))[1]) for s in sizes if s.numel() for e in torch.aminmax(s)]
    if sum(logs) > SAFE_EXPONENT:
        return math.inf
    absolute_error = applying_error_up(region, weights)
    x = weights.zeros(1, *region.in_shape)
    x.normal_(generator=fresh_generator(x.device))
    for _ in range(LOWER_STEPS):
        x = adjoint(apply(x))
        if not 0.0 < float(x.abs().amax()) < math.inf:
            return math.inf
        x = x / x.abs().amax()
    lower = float(apply(x).norm() / x.norm()) * (1.0 - 2.0**-20) - absolute_error
    return div_up(absolute_error, lower) if 0.0 < lower < math.inf else math.inf


def applying_error_up(region: Region, weights: Weights) -> float:
    """Bound on ``|fl(A x) - A x| / |x|``, and on the norm of the region's computed matrix less A.

    With M the matrix of the region with absolute weights, a product errs by at most
    ``gamma M |x|``, entry by entry, in the region as in its adjoint, and the norm of M is at most
    the root of its largest row sum times its largest column sum. Nothing may underflow or overflow:
    see :func:`in_range`.
    """
    positive, majorants = absolute(region, weights)
    ones = weights.zeros(1, *region.in_shape) + 1.0
    with torch.enable_grad():
        ones.requires_grad_()
        rows = region_apply(positive, majorants, ones)
        (columns,) = torch.autograd.grad(rows.sum(), ones)
    # A tensor with several readers collects their gradients: one more rounding each.
    depth = sum(depth_of(n.op) + _adjoint_depth(n.op) + len(region.nodes) for n in region.nodes)
    size = sqrt_up(mul_up(float(rows.detach().amax()), float(columns.amax())))
    return mul_up(gamma_up(depth), mul_up(size, 1.0 + 4.0 * gamma_up(depth)))


def depth_of(op: Primitive | str) -> int:
    """Roundings one entry of the materialised map can go through in one node."""
    if isinstance(op, Conv):
        return math.prod(op.kernel) * op.in_shape[0] // op.groups + weight_roundings(op)
    if isinstance(op, Linear):
        return op.in_shape[-1] + weight_roundings(op)
    if isinstance(op, Scale):
        return SCALE_ROUNDINGS + 2
    if isinstance(op, Average):
        return math.prod(op.in_shape) + 4
    return 2


def _adjoint_depth(op: Primitive | str) -> int:
    """As :func:`depth_of`, for the adjoint."""
    if isinstance(op, Conv):
        return math.prod(op.kernel) * op.out_shape[0] // op.groups + weight_roundings(op)
    if isinstance(op, Linear):
        return op.out_shape[-1] + weight_roundings(op)
    if isinstance(op, Average):
        return math.prod(op.out_shape) + 4
    if isinstance(op, Copy):
        return op.copies + 2
    return depth_of(op)


def entry_error(op: Conv | Linear, weights: Weights) -> float:
    """Frobenius bound of the rounding in the acting kernel, summed over taps."""
    count = weight_roundings(op)
    if count == 0:
        return 0.0
    sizes = majorant(op, weights)
    taps = sizes.reshape(*sizes.shape[:2], -1).sum(-1)
    return mul_up(gamma_up(2 * count + taps.numel()), frobenius_up(taps))


def majorant(op: Conv | Linear, weights: Weights) -> Tensor:
    """The acting kernel of the absolute weights."""
    region = Region(op.name, op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))
    positive, sizes = absolute(region, weights)
    kernel = positive.primitive
    assert isinstance(kernel, (Conv, Linear))
    return effective_weight(kernel, sizes)


def in_range(region: Region, weights: Weights) -> bool:
    """Whether no product of weights along the region can underflow or overflow."""
    op = region.primitive
    if isinstance(op, (Conv, Linear)) and weight_roundings(op) == 0:
        return True
    low = high = 0
    for node in region.nodes:
        for size in _factors(node.op, weights):
            size = size[size > 0]
            if size.numel():
                low += min(0, math.frexp(float(size.min()))[1])
                high += max(0, math.frexp(float(size.max()))[1])
    # Scales appear as reciprocals too, so both sides count together.
    return high - low < SAFE_EXPONENT


def _factors(op: Primitive | str, weights: Weights) -> list[Tensor]:
    """Sizes of everything a node multiplies with, as often as it does."""
    refs = [op.weight] if isinstance(op, (Conv, Linear)) else []
    if isinstance(op, (Conv, Linear)):
        refs += [s.ref for s in op.row_scales + op.column_scales]
    elif isinstance(op, Scale) and op.ref is not None:
        refs = [op.ref]
    names = ("gain", "identity_gain")
    gains = torch.tensor([getattr(op, name, 0.0) for name in names], dtype=torch.float64)
    return [weights[ref].double().abs() for ref in refs] + list(gains.abs())
