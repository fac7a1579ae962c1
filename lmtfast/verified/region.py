# SPDX-License-Identifier: MIT
"""Verified norms of traced regions: dense where that fits, on the torus or by composition where
not.

Every path ends in a proof over float64 matrices; this file only turns a region into such matrices
and bounds what the turning rounds. Weights are float32 or narrower values held exactly in float64,
or float64 values; scales such as folded batch norms are rounded, and that is added outward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lmtfast.backends.reference import (
    Leaves,
    effective_weight,
    matvec,
    region_apply,
    rmatvec,
    vector_shape,
)  # fmt: skip
from lmtfast.errors import ArgumentError, NotCertifiedError
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
    Slope,
    weight_refs,
)  # fmt: skip
from lmtfast.verified.lanczos import fresh_generator, top_eigenvalue
from lmtfast.verified.matrix import NormEnclosure, enclosure, matrix_norm_upper
from lmtfast.verified.rounding import (
    add_up,
    div_up,
    frobenius_up,
    gamma_up,
    hypot_up,
    magnitude,
    mul_up,
    sqrt_up,
)  # fmt: skip
from lmtfast.verified.torus import circular_norm_upper, polyphase, torus_norm_upper
from lmtfast.weights import Weights

METHODS = ("auto", "dense", "torus")
# A Gram of this order takes about a minute on two cores, and its matrix at most one gigabyte.
DENSE_ORDER = 4096
DENSE_ENTRIES = 1 << 27
# Roundings a scale may have gone through, seven: batch norm (add, a root that counts twice,
# divide), reciprocal, cast, gain.
SCALE_ROUNDINGS = 8
# Products of weights must stay clear of the underflow threshold 2^-1022 and of overflow.
SAFE_EXPONENT = 900
LOWER_STEPS = 20


def operator_norm_upper(
    operator: Operator, weights: Weights, *, method: str = "auto"
) -> NormEnclosure:
    """Bound the norm of one operator of a plan from above, floating point included.

    Args:
        operator: A region or slope of a :class:`~lmtfast.graph.BoundGraph`.
        weights: Resolved in float64.
        method: ``"auto"`` takes the dense proof where it is affordable and the torus or the
            composition of smaller proofs elsewhere; ``"dense"`` and ``"torus"`` insist.

    Returns:
        The enclosure; ``method`` names the proof that was used.

    Raises:
        ArgumentError: Unknown method, or a method that cannot treat the operator.
        NonFiniteError: NaN or infinity among the weights.
        NotCertifiedError: Weights so extreme that folding them could underflow or overflow.

    Guarantee:
        Rigorous; assumptions as for :func:`lmtfast.verified.matrix.matrix_norm_upper`.

    Source:
        Dense: Rump, BIT 51 (2011). Torus: the lemma in :mod:`lmtfast.verified.torus`.

    Example:
        See :func:`lmtfast.certified_bound`.
    """
    if method not in METHODS:
        raise ArgumentError(
            f"one of {', '.join(METHODS)}", repr(method), "method", "pick one of these"
        )
    check_weights(operator, weights)
    if isinstance(operator, Slope):
        return _exactly(max(1.0, float(weights[operator.ref].abs().max())), "maximum")
    if isinstance(operator.primitive, Scale):
        return _diagonal(operator.primitive, weights)
    return _region(operator, weights, method)


def check_weights(operator: Operator, weights: Weights) -> None:
    """Refuse NaN, infinity and batch-norm gains that folding rounds away."""
    for ref in weight_refs(operator):
        magnitude(weights[ref].double(), f"a weight of {operator.name!r}")
        if isinstance(ref, BatchNormScale) and ref.weight is not None:
            vanished = (weights[ref].abs() < 2.0**-SAFE_EXPONENT) & (weights[ref.weight] != 0)
            if bool(vanished.any()):
                raise _extreme(operator.name)


def product_error_up(
    region: Region,
    weights: Weights,
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
) -> float:
    """Bound on ``|fl(A x) - A x| / (|A| |x|)`` for the region and its adjoint; infinite if unknown.

    With M the map of absolute weights, a product errs by at most ``gamma |M| |x|`` in length, and
    |M| is at most the root of its largest row sum times its largest column sum. A computed image
    ``y`` of ``x``, less that error, bounds |A| from below.
    """
    sizes = [s[s > 0] for node in region.nodes for s in _factors(node.op, weights)]
    logs = [abs(math.frexp(float(e))[1]) for s in sizes if s.numel() for e in torch.aminmax(s)]
    if sum(logs) > SAFE_EXPONENT:
        return math.inf
    positive, majorants = absolute(region, weights)
    ones = torch.ones((1, *region.in_shape), dtype=torch.float64)
    with torch.enable_grad():
        ones.requires_grad_()
        rows = region_apply(positive, majorants, ones)
        (columns,) = torch.autograd.grad(rows.sum(), ones)
    # A tensor with several readers collects their gradients: one more rounding each.
    depth = sum(_depth(n.op) + _adjoint_depth(n.op) + len(region.nodes) for n in region.nodes)
    size = sqrt_up(mul_up(float(rows.detach().amax()), float(columns.amax())))
    absolute_error = mul_up(gamma_up(depth), mul_up(size, 1.0 + 4.0 * gamma_up(depth)))
    x = torch.randn(ones.shape, dtype=torch.float64, generator=fresh_generator())
    for _ in range(LOWER_STEPS):
        x = adjoint(apply(x))
        if not 0.0 < float(x.abs().amax()) < math.inf:
            return math.inf
        x = x / x.abs().amax()
    lower = float(apply(x).norm() / x.norm()) * (1.0 - 2.0**-20) - absolute_error
    return div_up(absolute_error, lower) if 0.0 < lower < math.inf else math.inf


def _adjoint_depth(op: Primitive | str) -> int:
    """As :func:`_depth`, for the adjoint."""
    if isinstance(op, Conv):
        return math.prod(op.kernel) * op.out_shape[0] // op.groups + weight_roundings(op)
    if isinstance(op, Linear):
        return op.out_shape[-1] + weight_roundings(op)
    if isinstance(op, Average):
        return math.prod(op.out_shape) + 4
    if isinstance(op, Copy):
        return op.copies + 2
    return _depth(op)


def _region(region: Region, weights: Weights, method: str) -> NormEnclosure:
    in_range = _in_range(region, weights)
    op = region.primitive
    if isinstance(op, Linear) and in_range:
        return _matrix(op, weights)
    affordable = in_range and _fits(region)
    if affordable and method != "torus":
        return _dense(region, weights)
    if isinstance(op, Conv) and in_range and method != "dense":
        return _torus(region, op, weights)
    if op is None and method != "dense":
        return _composed(region, weights, method)
    if not in_range:
        raise _extreme(region.name)
    raise ArgumentError(
        f"an operator of order at most {DENSE_ORDER} with at most {DENSE_ENTRIES} entries",
        f"{math.prod(region.out_shape)} x {math.prod(region.in_shape)} at {region.name!r}",
        f"method={method!r}", "use method='auto'",
    )  # fmt: skip


def _extreme(name: str) -> NotCertifiedError:
    return NotCertifiedError(
        f"weights whose products stay within 2^+-{SAFE_EXPONENT}", "more extreme ones", repr(name),
        "rescale the layer (a power of two is exact)",
    )  # fmt: skip


def _exactly(upper: float, method: str) -> NormEnclosure:
    return enclosure(upper, upper, method)


def _diagonal(op: Scale, weights: Weights) -> NormEnclosure:
    assert op.ref is not None
    entries = weights[op.ref].double()
    entries = entries.reciprocal() if op.inverse else entries
    largest = magnitude(entries, f"the scale of {op.name!r}")
    # mul_up alone covers a product below the normal range, which no relative error does.
    upper = mul_up(mul_up(largest, 1.0 + 2.0 * SCALE_ROUNDINGS * 2.0**-53), abs(op.gain))
    return enclosure(upper, largest * abs(op.gain), "maximum")


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


def _depth(op: Primitive | str) -> int:
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


def _in_range(region: Region, weights: Weights) -> bool:
    """Whether no product of weights along the region can underflow or overflow."""
    low = high = 0
    for node in region.nodes:
        for size in _factors(node.op, weights):
            size = size[size > 0]
            if size.numel():
                low += min(0, math.frexp(float(size.min()))[1])
                high += max(0, math.frexp(float(size.max()))[1])
    op = region.primitive
    if isinstance(op, (Conv, Linear)) and weight_roundings(op) == 0:
        return True
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


def _fits(region: Region) -> bool:
    rows, columns = math.prod(region.out_shape), math.prod(region.in_shape)
    return min(rows, columns) <= DENSE_ORDER and rows * columns <= DENSE_ENTRIES


def _matrix(op: Linear, weights: Weights) -> NormEnclosure:
    matrix = effective_weight(op, weights)
    return matrix_norm_upper(matrix, entry_error=_entry_error(op, weights))


def _entry_error(op: Conv | Linear, weights: Weights) -> float:
    """Frobenius bound of the rounding in the acting kernel, summed over taps."""
    count = weight_roundings(op)
    if count == 0:
        return 0.0
    majorant = _majorant(op, weights)
    taps = majorant.reshape(*majorant.shape[:2], -1).sum(-1)
    return mul_up(gamma_up(2 * count + taps.numel()), frobenius_up(taps))


def _majorant(op: Conv | Linear, weights: Weights) -> Tensor:
    region = Region(op.name, op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))
    positive, sizes = absolute(region, weights)
    kernel = positive.primitive
    assert isinstance(kernel, (Conv, Linear))
    return effective_weight(kernel, sizes)


def materialise(region: Region, weights: Weights) -> Tensor:
    """The region's matrix, computed on the unit vectors. Shape ``(outputs, inputs)``, float64."""
    columns, rows = math.prod(region.in_shape), math.prod(region.out_shape)
    matrix = torch.empty(rows, columns, dtype=torch.float64)
    width = max(1, min(columns, (1 << 22) // max(1, rows)))
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        basis = torch.zeros(stop - start, columns, dtype=torch.float64)
        basis[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        image = region_apply(region, weights, basis.reshape(-1, *region.in_shape))
        matrix[:, start:stop] = image.reshape(stop - start, rows).T
    return matrix


def _dense(region: Region, weights: Weights) -> NormEnclosure:
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
    depth = 2 * sum(_depth(n.op) for n in region.nodes)
    return mul_up(gamma_up(depth), frobenius_up(materialise(positive, sizes)))


def _torus(region: Region, op: Conv, weights: Weights) -> NormEnclosure:
    weight = effective_weight(op, weights)
    in_size, out_size = op.in_shape[1:], op.out_shape[1:]
    if op.transposed:
        # The adjoint of the convolution with the same weight, from our output to our input.
        in_size, out_size = out_size, in_size
    upper = 0.0
    for kernel in weight.chunk(op.groups):
        if op.padding_mode == "circular":
            bound = _circular(op, kernel, in_size, out_size)
        else:
            taps, coarse = polyphase(
                kernel, stride=op.stride, padding=op.padding, dilation=op.dilation
            )
            bound = torus_norm_upper(
                taps, input_extent=coarse(in_size), output_extent=out_size
            ).upper
        upper = max(upper, bound)
    upper = add_up(upper, _entry_error(op, weights))
    return enclosure(upper, lanczos_norm(region, weights), "torus")


def _circular(
    op: Conv, kernel: Tensor, in_size: tuple[int, ...], out_size: tuple[int, ...]
) -> float:
    """Exact on its own grid where the wrap is once around; else stride 1 times repeated outputs."""
    full = [
        n + low + high - d * (k - 1)
        for n, (low, high), d, k in zip(in_size, op.padding, op.dilation, op.kernel, strict=True)
    ]
    whole = all(f == n and n % s == 0 for f, n, s in zip(full, in_size, op.stride, strict=True))
    stride = op.stride if whole else (1,) * len(in_size)
    taps, coarse = polyphase(kernel, stride=stride, padding=op.padding, dilation=op.dilation)
    upper = circular_norm_upper(taps, extent=coarse(in_size)).upper
    if whole:
        return upper
    repeats = math.prod(-(-max(f, 1) // n) for f, n in zip(full, in_size, strict=True))
    del out_size
    return mul_up(upper, sqrt_up(float(repeats)))


def lanczos_norm(region: Region, weights: Weights, steps: int = 40) -> float:
    """Estimate of the region's norm from below, for reporting the slack alone."""
    shape = vector_shape(region)

    def gram(x: Tensor) -> Tensor:
        image = matvec(region, weights, x.reshape(shape))
        return rmatvec(region, weights, image).reshape(1, -1)

    value, _ = top_eigenvalue(gram, 1, math.prod(shape), steps=steps, tolerance=1e-9)
    return math.sqrt(max(0.0, float(value.reshape(-1)[0])))


def _composed(region: Region, weights: Weights, method: str) -> NormEnclosure:
    """Bounds of the parts, composed as the tape would: products, sums, roots of sums of squares."""
    bounds: list[float] = []
    for node in region.nodes:
        inputs = [1.0 if i < 0 else bounds[i] for i in node.inputs]
        if node.op == "add":
            total = 0.0
            for value in inputs:
                total = add_up(total, value)
            bounds.append(total)
        elif node.op == "concat":
            bounds.append(hypot_up(*inputs))
        else:
            assert isinstance(node.op, Primitive)
            bounds.append(mul_up(_part(node.op, weights, method), inputs[0]))
    upper = bounds[-1]
    return enclosure(upper, lanczos_norm(region, weights), "composition")


def _part(op: Primitive, weights: Weights, method: str) -> float:
    if isinstance(op, Copy):
        return sqrt_up(float(op.copies))
    if isinstance(op, Average):
        return mul_up(op.norm, abs(op.gain))
    if isinstance(op, Scale):
        return abs(op.gain) if op.ref is None else _diagonal(op, weights).upper
    region = Region(op.name, op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))
    return _region(region, weights, method).upper
