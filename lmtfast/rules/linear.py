# SPDX-License-Identifier: MIT
"""Linear layers: convolutions, matrices, batch norm in inference form, constant factors."""

from __future__ import annotations

import math
from typing import Any

from lmtfast.builder import Value
from lmtfast.graph import (
    BatchNormScale,
    Conv,
    Derived,
    Linear,
    Scale,
    Shape,
    WeightRef,
    number,
)  # fmt: skip
from lmtfast.rules.registry import REF_TYPES, TracedCall, operation_rule


def scaled(call: TracedCall, item: Any) -> float:
    """A Python number argument; refuses anything else."""
    if isinstance(item, bool) or not isinstance(item, (int, float)):
        raise call.unsupported(f"a factor of type {type(item).__name__}")
    if not math.isfinite(item):
        raise call.unsupported(f"a factor of {item}")
    return float(item)


def _per_axis(item: Any, axes: int) -> Shape:
    values = tuple(item) if isinstance(item, (list, tuple)) else (item,)
    return tuple(int(v) for v in (values * axes if len(values) == 1 else values))


@operation_rule(
    "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default",
    "aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding",
)  # fmt: skip
def conv(call: TracedCall) -> Value:
    value, weight = call.value("input"), call.weight("weight")
    _unbatched(call, value, weight)
    kernel = tuple(call.tensor(weight).shape[2:])
    axes = len(kernel)
    stride, dilation = _per_axis(call["stride"], axes), _per_axis(call["dilation"], axes)
    padding: tuple[tuple[int, int], ...]
    if call["padding"] == "valid":
        padding = ((0, 0),) * axes
    elif call["padding"] == "same":
        # torch pads the larger half on the high side.
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    else:
        padding = tuple((p, p) for p in _per_axis(call["padding"], axes))
    primitive = Conv(
        call.name,
        value.shape,
        call.out_shape,
        weight,
        kernel,
        stride,
        padding,
        dilation,
        call["groups"],
    )
    return call.builder.linear(value, primitive)


@operation_rule(
    "aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"
)
def conv_transpose(call: TracedCall) -> Value:
    value, weight = call.value("input"), call.weight("weight")
    _unbatched(call, value, weight)
    kernel = tuple(call.tensor(weight).shape[2:])
    axes = len(kernel)
    stride, dilation = _per_axis(call["stride"], axes), _per_axis(call["dilation"], axes)
    padding = tuple((p, p) for p in _per_axis(call["padding"], axes))
    primitive = Conv(
        call.name, value.shape, call.out_shape, weight, kernel, stride, padding, dilation,
        call["groups"], True, _per_axis(call["output_padding"], axes),
    )  # fmt: skip
    return call.builder.linear(value, primitive)


def _unbatched(call: TracedCall, value: Value, weight: WeightRef) -> None:
    if len(value.shape) != call.tensor(weight).ndim - 1:
        raise call.unsupported(f"an unbatched input of shape {value.shape}")


@operation_rule("aten.linear.default")
def linear(call: TracedCall) -> Value:
    return _matrix(call, call.value("input"), call.weight("weight"))


@operation_rule("aten.addmm.default")
def addmm(call: TracedCall) -> Value:
    # beta * bias + alpha * x @ mat2 with constant bias and mat2.
    call.weight("self")
    return _matrix(
        call, call.value("mat1"), _transposed(call.weight("mat2")), scaled(call, call["alpha"])
    )


@operation_rule("aten.mm.default", "aten.matmul.default", joins=True)
def matmul(call: TracedCall) -> Value:
    left, right = ("self", "mat2") if call.target.startswith("aten.mm") else ("self", "other")
    if isinstance(call[left], Value) and isinstance(call[right], Value):
        raise call.unsupported("a product of two traced tensors has no global constant")
    if not isinstance(call[left], Value):
        raise call.unsupported("only x @ W with a constant matrix W on the right is supported")
    weight = call.weight(right)
    if call.tensor(weight).ndim != 2:
        raise call.unsupported("the constant factor is not a matrix")
    return _matrix(call, call.value(left), _transposed(weight))


def _transposed(weight: WeightRef) -> WeightRef:
    if isinstance(weight, Derived) and weight.target == "aten.t.default":
        return weight.args[0]
    return Derived("aten.t.default", (weight,))


def _matrix(call: TracedCall, value: Value, weight: WeightRef, gain: float = 1.0) -> Value:
    if not value.shape or call.tensor(weight).ndim != 2:
        raise call.unsupported("it is not a matrix acting on the last dimension")
    primitive = Linear(call.name, value.shape, call.out_shape, weight, gain=gain)
    return call.builder.linear(value, primitive)


@operation_rule(
    "aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default",
    "aten.native_batch_norm.default", "aten.cudnn_batch_norm.default",
)  # fmt: skip
def batch_norm(call: TracedCall) -> Any:
    value = call.value("input")
    variance = call.get("running_var")
    if call.get("training", False) or not isinstance(variance, REF_TYPES):
        raise call.unsupported("batch statistics; a bound needs running statistics (model.eval())")
    weight = call["weight"]
    if weight is not None and not isinstance(weight, REF_TYPES):
        raise call.unsupported("its weight depends on the input")
    scale = BatchNormScale(weight, variance, float(call["eps"]), call.name)
    channels = call.tensor(variance).shape[0]
    broadcast = (channels,) + (1,) * (len(value.shape) - 1)
    primitive = Scale(call.name, value.shape, value.shape, scale, broadcast)
    result = call.builder.linear(value, primitive)
    return result if call.target == "aten.batch_norm.default" else (result, None, None)


@operation_rule("aten.mul.Tensor", "aten.mul.Scalar", joins=True)
def mul(call: TracedCall) -> Value:
    first, second = call["self"], call["other"]
    if isinstance(first, Value) and isinstance(second, Value):
        raise call.unsupported("a product of two traced tensors has no global constant")
    return _multiply(call, *((first, second) if isinstance(first, Value) else (second, first)))


@operation_rule("aten.div.Tensor", "aten.div.Scalar", joins=True)
def div(call: TracedCall) -> Value:
    if not isinstance(call["self"], Value):
        raise call.unsupported("division by a traced tensor has no global constant")
    if isinstance(call["other"], Value):
        raise call.unsupported("division by a traced tensor has no global constant")
    return _multiply(call, call["self"], call["other"], inverse=True)


@operation_rule("aten.neg.default")
def neg(call: TracedCall) -> Value:
    return _multiply(call, call.value("self"), -1.0)


def _multiply(call: TracedCall, value: Value, factor: Any, inverse: bool = False) -> Value:
    if value.shape != call.out_shape:
        raise call.unsupported(f"broadcasting a tensor of shape {value.shape} to {call.out_shape}")
    if not isinstance(factor, REF_TYPES):
        gain = scaled(call, factor)
        if inverse and gain == 0.0:
            raise call.unsupported("division by zero")
        # The reciprocal of a number rounds: keep it exact by dividing by a constant tensor.
        if inverse and math.frexp(gain)[0] not in (0.5, -0.5):
            factor = number(gain)
        else:
            gain = 1.0 / gain if inverse else gain
            return call.builder.linear(value, Scale(call.name, value.shape, value.shape, gain=gain))
    shape = tuple(call.tensor(factor).shape)
    # Leading ones are the batch dimension and what broadcasting adds.
    while len(shape) > len(value.shape) and shape[0] == 1:
        shape = shape[1:]
    if len(shape) > len(value.shape):
        raise call.unsupported(f"a factor of shape {shape} differs between the samples of a batch")
    primitive = Scale(call.name, value.shape, value.shape, factor, shape, inverse)
    return call.builder.linear(value, primitive)
