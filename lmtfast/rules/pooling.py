# SPDX-License-Identifier: MIT
"""Pooling and reductions. Constants count the windows that really exist (ceil_mode included)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lmtfast.builder import Value
from lmtfast.graph import Average
from lmtfast.rules.copying import execute, frozen_call
from lmtfast.rules.registry import TracedCall, operation_rule

AVERAGES = (
    "aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default",
    "aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default",
    "aten.adaptive_avg_pool3d.default", "aten._adaptive_avg_pool2d.default",
    "aten._adaptive_avg_pool3d.default", "aten.mean.dim", "aten.sum.dim_IntList",
)  # fmt: skip


@operation_rule(*AVERAGES)
def average(call: TracedCall) -> Value:
    """Schur's test: the norm of a nonnegative matrix is at most sqrt(max row sum x max column sum).

    It is exact where windows do not overlap, and equals ``sqrt(n) / sqrt(k)`` of the paper's table.
    """
    key = "self" if "self" in call.arguments else "input"
    value = call.value(key)
    overrides = {"dtype": None} if call.get("dtype") is not None else {}
    divisor = call.get("divisor_override")
    if divisor is not None and divisor <= 0:
        raise call.unsupported(f"divisor_override={divisor}")
    frozen = frozen_call(call, key, **overrides)
    probe = torch.ones((2, *value.shape), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        rows = execute(frozen, probe)
        if tuple(rows.shape) != (2, *call.out_shape):
            raise call.unsupported("it reduces over the batch dimension")
        (columns,) = torch.autograd.grad(rows[0].sum(), probe)
    if not torch.equal(columns[1], torch.zeros_like(columns[1])):
        raise call.unsupported("it mixes the samples of a batch")
    schur = math.sqrt(float(rows.max()) * float(columns[0].max()))
    # Sums of at most `entries` terms: relative error below entries * 2^-52, rounded up generously.
    entries = math.prod(value.shape) + math.prod(call.out_shape) + 16
    norm = math.nextafter(schur * (1.0 + entries * 2.0**-51), math.inf)
    if math.frexp(schur)[0] == 0.5 and _short_fractions(call, value.shape, entries):
        norm = schur  # a 2 x 2 average is exactly 1/2
    primitive = Average(call.name, value.shape, call.out_shape, frozen, norm)
    return call.builder.linear(value, primitive)


def _short_fractions(call: TracedCall, shape: Sequence[int], entries: int) -> bool:
    """Whether Schur's bound is a power of two if it comes out as one.

    Windows of one size have sums of denominator at most q, so the bound's square differs from a
    power of two by at least 1 / q^2, relatively, or not at all; rounding moves it by less than
    entries * 2^-50.
    """
    kernel, divisor = call.get("kernel_size"), call.get("divisor_override")
    if "adaptive" in call.target:
        sizes = zip(reversed(shape), reversed(call.out_shape), strict=False)
        if any(m == 0 or n % m for n, m in sizes):
            return False
    if divisor is not None:
        q = int(divisor)
    elif kernel is not None:
        q = max([kernel] if isinstance(kernel, int) else kernel) ** 3
    else:
        q = math.prod(shape) // max(1, math.prod(call.out_shape))
    return q * q * entries < 2**50


def _windows(
    length: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int
) -> int:
    """How many windows the most covered entry of one axis lies in."""
    counts = [0] * length
    for o in range(outputs):
        for t in range(kernel):
            i = o * stride - padding + t * dilation
            if 0 <= i < length:
                counts[i] += 1
    return max(counts, default=0)


def _maximum(call: TracedCall, value: Value, overlaps: Sequence[int]) -> Value:
    # Thm 3 of the paper: n windows per entry give the constant sqrt(n).
    n = math.prod(max(1, m) for m in overlaps)
    root = math.isqrt(n)
    constant = float(root) if root * root == n else math.nextafter(math.sqrt(n), math.inf)
    name = (call.name, call.target.split(".")[1])
    return call.builder.nonlinear(value, constant, call.out_shape, name)


def _batched_image(call: TracedCall) -> tuple[Value, int]:
    """The input and its number of spatial axes; torch would take a lower rank for one sample."""
    value, axes = call.value("self"), int(call.target.split("pool")[1][0])
    if len(value.shape) != axes + 1:
        raise call.unsupported(f"an unbatched input of shape {value.shape}")
    return value, axes


@operation_rule(
    "aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default",
    "aten.max_pool2d_with_indices.default", "aten.max_pool3d_with_indices.default",
)  # fmt: skip
def max_pool(call: TracedCall) -> Value | tuple[Value, None]:
    value, axes = _batched_image(call)

    def per_axis(key: str, default: Sequence[int]) -> list[int]:
        items = list(call[key]) or list(default)
        return items * axes if len(items) == 1 else items

    kernel = per_axis("kernel_size", ())
    stride = per_axis("stride", kernel)
    padding, dilation = per_axis("padding", ()), per_axis("dilation", ())
    lengths, outputs = value.shape[1:], call.out_shape[1:]
    overlaps = [
        _windows(*axis)
        for axis in zip(lengths, outputs, kernel, stride, padding, dilation, strict=True)
    ]
    result = _maximum(call, value, overlaps)
    return (result, None) if "with_indices" in call.target else result


@operation_rule(
    "aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default",
    "aten.adaptive_max_pool3d.default",
)  # fmt: skip
def adaptive_max_pool(call: TracedCall) -> tuple[Value, None]:
    value, _ = _batched_image(call)
    overlaps = []
    for length, outputs in zip(value.shape[1:], call.out_shape[1:], strict=True):
        counts = [0] * length
        for o in range(outputs):
            for i in range(o * length // outputs, -(-(o + 1) * length // outputs)):
                counts[i] += 1
        overlaps.append(max(counts))
    return _maximum(call, value, overlaps), None


@operation_rule("aten.amax.default", "aten.amin.default", "aten.max.dim", "aten.min.dim")
def extreme(call: TracedCall) -> Value | tuple[Value, None]:
    value = call.value("self")
    rank = len(value.shape) + 1
    dims = call["dim"] if isinstance(call["dim"], (list, tuple)) else [call["dim"]]
    if not dims or any(d % rank == 0 for d in dims):
        raise call.unsupported("it reduces over the batch dimension")
    name = (call.name, call.target.split(".")[1])
    result = call.builder.nonlinear(value, 1.0, call.out_shape, name)
    return (result, None) if call.target.endswith(".dim") else result
