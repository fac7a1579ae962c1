# SPDX-License-Identifier: MIT
"""Joins: addition, subtraction, concatenation, stacking, entrywise extremes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmtfast.builder import Value
from lmtfast.graph import BATCH, INPUT, Call, Scale
from lmtfast.rules.copying import copy
from lmtfast.rules.linear import scaled
from lmtfast.rules.registry import REF_TYPES, TracedCall, operation_rule


def _gain(call: TracedCall, value: Value, gain: float) -> Value:
    if gain == 1.0:
        return value
    return call.builder.linear(value, Scale(call.name, value.shape, value.shape, gain=gain))


def _broadcast(call: TracedCall, value: Value) -> Value:
    """Repeat a traced tensor to the shape the result has."""
    if value.shape == call.out_shape:
        return value
    arguments = (INPUT, (BATCH, *call.out_shape))
    if len(value.shape) != len(call.out_shape):
        raise call.unsupported(f"broadcasting a tensor of shape {value.shape} to {call.out_shape}")
    return copy(call.builder, value, Call("aten.expand.default", arguments), call.name, call)


def _sum(call: TracedCall, first: Any, second: Any, signs: tuple[float, float]) -> Value:
    parts = [
        _gain(call, _broadcast(call, v), sign)
        for v, sign in zip((first, second), signs, strict=True)
        if isinstance(v, Value)
    ]
    if len(parts) > 1:
        return call.builder.add(parts)
    # A constant summand shifts the function and changes no difference. But the sum is another
    # tensor: max(a, b + 1) and min(a, b) do not sort (a, b).
    return replace(parts[0])


@operation_rule("aten.add.Tensor", "aten.add.Scalar", joins=True)
def add(call: TracedCall) -> Value:
    return _sum(call, call["self"], call["other"], (1.0, _number(call, "alpha")))


@operation_rule("aten.sub.Tensor", "aten.sub.Scalar", joins=True)
def sub(call: TracedCall) -> Value:
    return _sum(call, call["self"], call["other"], (1.0, -_number(call, "alpha")))


@operation_rule("aten.rsub.Tensor", "aten.rsub.Scalar", joins=True)
def rsub(call: TracedCall) -> Value:
    return _sum(call, call["self"], call["other"], (-_number(call, "alpha"), 1.0))


def _number(call: TracedCall, key: str) -> float:
    return scaled(call, call[key])


@operation_rule("aten.cat.default", "aten.concat.default", "aten.stack.default", joins=True)
def cat(call: TracedCall) -> Value:
    parts = call["tensors"]
    stacking = call.target.startswith("aten.stack")
    rank = len(call.out_shape) + 1
    axis = call["dim"] % rank - 1
    if axis < 0:
        raise call.unsupported("it joins along the batch dimension")
    values = [v for v in parts if isinstance(v, Value)]
    if not all(isinstance(v, (Value, *REF_TYPES)) for v in parts):
        raise call.unsupported("a part is neither traced nor constant")
    if stacking:
        arguments = (INPUT, axis + 1)
        values = [copy(call.builder, v, Call("aten.unsqueeze.default", arguments), call.name, call,
                       keep_pair=True) for v in values]  # fmt: skip
    if len(values) == len(parts):
        return call.builder.concat(values, axis)
    # Constant parts change no difference, but they keep their place in the result's shape.
    origin, rel = call.builder.joint(values)
    return call.builder.new_base(origin, rel, call.out_shape)


@operation_rule(
    "aten.maximum.default", "aten.minimum.default", "aten.max.other", "aten.min.other",
    joins=True,
)  # fmt: skip
def extremum(call: TracedCall) -> Value:
    kind = {"max": "maximum", "min": "minimum"}.get(n := call.target.split(".")[1], n)
    a, b = call["self"], call["other"]
    if isinstance(a, Value) and isinstance(b, Value):
        return call.builder.extremum(kind, _broadcast(call, a), _broadcast(call, b), call.name)
    value = _broadcast(call, a if isinstance(a, Value) else b)
    return call.builder.nonlinear(value, 1.0, call.out_shape, (call.name, kind))
