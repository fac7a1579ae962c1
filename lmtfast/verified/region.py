# SPDX-License-Identifier: MIT
"""Verified norms of traced operators: which proof, and what it needs.

Exact up to rounding are a dense proof of the operator's matrix and a banded one along its image;
the cheaper is used where the budget pays for it. Elsewhere a convolution has its symbol's maximum
on the torus, and a composite the composition of its parts' bounds. This file only turns a region
into what the proofs read and adds what the turning rounds. Weights are float32 or narrower values
held exactly in float64, or float64 values; scales such as folded batch norms are rounded, and that
is added outward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lmtfast.backends.reference import effective_weight, matvec, rmatvec, vector_shape
from lmtfast.errors import ArgumentError
from lmtfast.graph import (
    Average,
    Conv,
    Copy,
    Linear,
    Operator,
    Primitive,
    Region,
    RegionNode,
    Scale,
    Slope,
)  # fmt: skip
from lmtfast.verified.banded import squared_norm_upper
from lmtfast.verified.budget import FREE_OPERATIONS, Allowance, Budget, Cost, share
from lmtfast.verified.composite import CompositeGram, composite_form, least_operations
from lmtfast.verified.convolution import Geometry, banded_form, convolution_norm_upper
from lmtfast.verified.dense import dense_bytes, dense_norm_upper, dense_operations
from lmtfast.verified.lanczos import top_eigenvalue
from lmtfast.verified.matrix import NormEnclosure, enclosure, matrix_norm_upper
from lmtfast.verified.rounding import (
    add_up,
    hypot_up,
    magnitude,
    mul_up,
    prescale_loss,
    scale_up,
    sqrt_up,
)  # fmt: skip
from lmtfast.verified.torus import circular_norm_upper, polyphase, torus_norm_upper
from lmtfast.verified.weight_error import (
    SCALE_ROUNDINGS,
    applying_error_up,
    check_weights,
    entry_error,
    extreme,
    in_range,
)  # fmt: skip
from lmtfast.weights import Weights

METHODS = ("auto", "dense", "banded", "torus")
# Steps and accuracy of the guess that a banded proof starts from: a refusal costs far more.
GUESS_STEPS, GUESS_TOLERANCE = 400, 1e-12
# An hour of two cores: beyond it a composite's band is not even looked at.
HOPELESS_OPERATIONS = 2.0**47


def operator_norm_upper(
    operator: Operator,
    weights: Weights,
    *,
    method: str = "auto",
    allowance: Allowance | None = None,
) -> NormEnclosure:
    """Bound the norm of one operator of a plan from above, floating point included.

    Args:
        operator: A region or slope of a :class:`~lmtfast.graph.BoundGraph`.
        weights: Resolved in float64.
        method: ``"auto"`` takes the cheaper of the dense and the banded proof where the allowance
            pays for it, and the torus or the composition of smaller proofs elsewhere; ``"dense"``,
            ``"banded"`` and ``"torus"`` insist.
        allowance: What an exact proof may cost; by default what a whole network's may.

    Returns:
        The enclosure; ``method`` names the proof that was used.

    Raises:
        ArgumentError: Unknown method, or a method that cannot treat the operator.
        NonFiniteError: NaN or infinity among the weights.
        NotCertifiedError: Weights so extreme that folding them could underflow or overflow.

    Guarantee:
        Rigorous; assumptions as for :func:`lmtfast.verified.matrix.matrix_norm_upper`.

    Source:
        Dense and banded: Rump, BIT 51 (2011), and :mod:`lmtfast.verified.banded`. Torus: the lemma
        in :mod:`lmtfast.verified.torus`.

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
    return _region(operator, weights, method, allowance or Allowance())


def allowances(
    operators: Sequence[Operator], weights: Weights, method: str, budget: Budget
) -> list[Allowance]:
    """A network's budget, shared among its operators: cheapest proofs first."""
    if method != "auto":
        return [Allowance(math.inf, budget.memory)] * len(operators)
    costs = [
        _cheapest(o, weights)[1] if isinstance(o, Region) and o.kind != "scale" else None
        for o in operators
    ]
    return share(budget, costs)


def _cheapest(region: Region, weights: Weights) -> tuple[str, Cost | None]:
    """The cheaper exact proof of a region, and what it costs.

    None where none is needed: matrices are always proved, single taps are matrices, and a circular
    convolution that goes around once is exact on its torus.
    """
    op = region.primitive
    if isinstance(op, Linear) or not in_range(region, weights):
        return "dense", None
    if isinstance(op, Conv) and (math.prod(op.kernel) == 1 if _plain(op) else _whole(op)):
        return "dense", None
    dense = _dense_cost(region)
    if dense.operations <= FREE_OPERATIONS:
        return "dense", dense
    banded = _banded_cost(region, weights)
    if banded is not None and banded.operations < dense.operations:
        return "banded", banded
    return "dense", dense


def _region(region: Region, weights: Weights, method: str, allowance: Allowance) -> NormEnclosure:
    op, ranged = region.primitive, in_range(region, weights)
    if isinstance(op, Linear) and ranged:
        matrix = effective_weight(op, weights)
        return matrix_norm_upper(matrix, entry_error=entry_error(op, weights))
    if ranged:
        if method == "auto" and isinstance(op, Conv) and _plain(op) and math.prod(op.kernel) == 1:
            return _pointwise(op, weights)
        proof = _exact_proof(region, weights, method, allowance)
        if proof is not None:
            return proof
        if method in ("auto", "torus") and isinstance(op, Conv):
            return _torus(region, op, weights)
    if op is None and method in ("auto", "torus"):
        return _composed(region, weights, method)
    if not ranged:
        raise extreme(region.name)
    raise ArgumentError(
        f"an operator whose proof holds at most {allowance.memory / 2**30:.3g} GiB",
        f"{math.prod(region.out_shape)} x {math.prod(region.in_shape)} at {region.name!r}",
        f"method={method!r}", "use method='auto', or a larger budget",
    )  # fmt: skip


def _exact_proof(
    region: Region, weights: Weights, method: str, allowance: Allowance
) -> NormEnclosure | None:
    """The dense or the banded proof, where it is wanted and paid for; None where not."""
    if method == "torus":
        return None
    name, cost = _cheapest(region, weights) if method == "auto" else (method, None)
    if method == "dense":
        cost = _dense_cost(region)
    elif method == "banded":
        cost = _banded_cost(region, weights)
    if cost is None or not allowance.pays(cost):
        return None
    if name == "dense":
        return dense_norm_upper(region, weights)
    found = _banded(region, weights)
    return found if found.upper < math.inf or method == "banded" else None


def _pointwise(op: Conv, weights: Weights) -> NormEnclosure:
    """A single tap moves its matrix from some positions to others, each at most once."""
    if _geometry(op).unread:
        return _exactly(0.0, "pointwise")
    kernels = effective_weight(op, weights).flatten(1)
    matrices = torch.stack(kernels.chunk(op.groups))
    found = matrix_norm_upper(matrices, entry_error=entry_error(op, weights))
    return replace(found, method="pointwise")


def _plain(op: Primitive | None) -> bool:
    return isinstance(op, Conv) and op.padding_mode == "zeros"


def _geometry(op: Conv) -> Geometry:
    """Of the forward stencil: a transposed convolution is its adjoint."""
    in_extent, out_extent = op.in_shape[1:], op.out_shape[1:]
    if op.transposed:
        in_extent, out_extent = out_extent, in_extent
    low = tuple(p for p, _ in op.padding)
    return Geometry(in_extent, out_extent, op.kernel, op.stride, op.dilation, low)


def _dense_cost(region: Region) -> Cost:
    return Cost(dense_operations(region), dense_bytes(region))


def _banded_cost(region: Region, weights: Weights) -> Cost | None:
    """What the banded proof costs; None where the operator has no image, or is not banded."""
    op = region.primitive
    if math.prod(region.in_shape) == 0 or math.prod(region.out_shape) == 0:
        return None
    if isinstance(op, Conv) and _plain(op):
        outputs, inputs = (
            (op.in_shape, op.out_shape) if op.transposed else (op.out_shape, op.in_shape)
        )
        form = banded_form(_geometry(op), outputs[0] // op.groups, inputs[0] // op.groups)
        return Cost(form.operations * op.groups, form.memory)
    if least_operations(region) > HOPELESS_OPERATIONS:
        return None
    composite = composite_form(region, weights)
    return Cost(composite.operations, composite.memory)


def _banded(region: Region, weights: Weights) -> NormEnclosure:
    estimate = lanczos_norm(region, weights, GUESS_STEPS, GUESS_TOLERANCE)
    op = region.primitive
    if isinstance(op, Conv) and _plain(op):
        kernels = effective_weight(op, weights).chunk(op.groups)
        upper = convolution_norm_upper(kernels, _geometry(op), estimate=estimate)
        upper = add_up(upper, entry_error(op, weights))
    elif isinstance(op, Conv) and not effective_weight(op, weights).any():
        # Wraps around zeros: no positive guess to prove.
        return _exactly(mul_up(entry_error(op, weights), sqrt_up(float(_repeats(op)))), "zero")
    else:
        exponent = math.frexp(estimate)[1] if 0.0 < estimate < math.inf else 0
        gram = CompositeGram(region, weights, composite_form(region, weights), exponent)
        squared = squared_norm_upper(gram, math.ldexp(estimate, -exponent) ** 2)
        # Scaling loses what falls below the normal range.
        lost = prescale_loss(math.prod(region.in_shape) * math.prod(region.out_shape))
        upper = scale_up(add_up(sqrt_up(squared), lost), exponent)
        upper = add_up(upper, applying_error_up(region, weights))
    return enclosure(upper, estimate, "banded")


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


def _torus(region: Region, op: Conv, weights: Weights) -> NormEnclosure:
    weight, geometry = effective_weight(op, weights), _geometry(op)
    repeats = sqrt_up(float(_repeats(op)))
    upper = 0.0
    for kernel in weight.chunk(op.groups):
        if op.padding_mode == "circular":
            bound = mul_up(_circular(op, kernel), repeats)
        else:
            taps, coarse = polyphase(
                kernel, stride=op.stride, padding=op.padding, dilation=op.dilation
            )
            bound = torus_norm_upper(
                taps,
                input_extent=coarse(geometry.in_extent),
                output_extent=geometry.out_extent,
            ).upper
        upper = max(upper, bound)
    upper = add_up(upper, mul_up(entry_error(op, weights), repeats))
    return enclosure(upper, lanczos_norm(region, weights), "torus")


def _stride_one_extents(op: Conv) -> list[int]:
    """Output positions per axis if the stride were one."""
    return [
        n + low + high - d * (k - 1)
        for n, (low, high), d, k in zip(
            op.in_shape[1:], op.padding, op.dilation, op.kernel, strict=True
        )
    ]


def _whole(op: Conv) -> bool:
    """Whether a circular convolution wraps around once, so that its own grid is exact."""
    full, extent = _stride_one_extents(op), op.in_shape[1:]
    return all(f == n and n % s == 0 for f, n, s in zip(full, extent, op.stride, strict=True))


def _repeats(op: Conv) -> int:
    """How often at most an output of a circular convolution of stride one appears in it."""
    if op.padding_mode != "circular" or _whole(op):
        return 1
    sizes = zip(_stride_one_extents(op), op.in_shape[1:], strict=True)
    return math.prod(-(-max(f, 1) // n) for f, n in sizes)


def _circular(op: Conv, kernel: Tensor) -> float:
    """Exact on its own grid where the wrap is once around; else of stride 1, not yet repeated."""
    extent = op.in_shape[1:]
    stride = op.stride if _whole(op) else (1,) * len(extent)
    taps, coarse = polyphase(kernel, stride=stride, padding=op.padding, dilation=op.dilation)
    return circular_norm_upper(taps, extent=coarse(extent)).upper


def lanczos_norm(
    region: Region, weights: Weights, steps: int = 40, tolerance: float = 1e-9
) -> float:
    """Estimate of the region's norm from below: a guess to prove, or to report the slack."""
    shape = vector_shape(region)
    # Images near one: their squares neither vanish nor overflow, whatever the weights' scale.
    size = float(matvec(region, weights, weights.zeros(*shape) + 1.0).abs().max())
    known = 0.0 < size < math.inf
    factor = math.ldexp(1.0, max(-1000, min(1000, -math.frexp(size)[1]))) if known else 1.0

    def gram(x: Tensor) -> Tensor:
        image = matvec(region, weights, x.reshape(shape)) * factor
        return rmatvec(region, weights, image).reshape(1, -1) * factor

    value, _ = top_eigenvalue(
        gram, 1, math.prod(shape), device=weights.device, steps=steps, tolerance=tolerance
    )
    return math.sqrt(max(0.0, float(value.reshape(-1)[0]))) / factor


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
    return _region(region, weights, method, Allowance(0.0)).upper
