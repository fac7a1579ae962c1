# SPDX-License-Identifier: MIT
"""Error rules of linear calls: sums of products, batch norm, constant factors, averages, copies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmtfast.enclosure.registry import Enclosed, ErrorCall, error_rule, outward, rounded
from lmtfast.rules.copying import COPYING, IDENTITIES
from lmtfast.rules.pooling import AVERAGES
from lmtfast.verified.rounding import UNIT_ROUNDOFF


def _absolute(tensor: Any) -> Any:
    return tensor.abs() if isinstance(tensor, Tensor) else tensor


def _raised_bias(bias: Tensor | None) -> Any:
    """gamma |bias|, rounded up: a bias is one more term of the sum."""
    if bias is None:
        return None
    return lambda gamma: torch.nextafter(gamma * bias.abs(), torch.full((), math.inf).to(bias))


CONVOLUTIONS = (
    "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default",
    "aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding",
)  # fmt: skip
TRANSPOSED = (
    "aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input",
)  # fmt: skip
PRODUCTS = ("aten.mm.default", "aten.matmul.default")
BATCH_NORMS = (
    "aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default",
    "aten.native_batch_norm.default", "aten.cudnn_batch_norm.default",
)  # fmt: skip
FACTORS = (
    "aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar", "aten.neg.default",
)  # fmt: skip
PADS = ("aten.pad.default", "aten.constant_pad_nd.default")


@error_rule(*CONVOLUTIONS, "aten.linear.default")
def dense(call: ErrorCall) -> Enclosed:
    weight = call["weight"]
    count = math.prod(weight.shape[1:]) + 1
    return call.summed(count, {"weight": weight.abs(), "bias": _raised_bias(call.get("bias"))})


@error_rule(*TRANSPOSED)
def transposed(call: ErrorCall) -> Enclosed:
    weight = call["weight"]
    count = weight.shape[0] // call["groups"] * math.prod(weight.shape[2:]) + 1
    return call.summed(count, {"weight": weight.abs(), "bias": _raised_bias(call.get("bias"))})


@error_rule("aten.addmm.default")
def addmm(call: ErrorCall) -> Enclosed:
    matrix, bias = call["mat2"], call["self"]
    factors = {k: abs(call[k]) for k in ("alpha", "beta")}
    sizes = {"mat2": matrix.abs(), "self": _raised_bias(bias), **factors}
    return call.summed(matrix.shape[0] + 1, sizes)


@error_rule(*PRODUCTS)
def matmul(call: ErrorCall) -> Enclosed:
    key = "mat2" if call.target == "aten.mm.default" else "other"
    return call.summed(call[key].shape[0], {key: call[key].abs()})


@error_rule(*BATCH_NORMS)
def batch_norm(call: ErrorCall) -> Any:
    """(x - mean) * (weight / sqrt(var + eps)) + bias, the exact formula the bound folds."""
    source = call.source
    x = source.value
    shape = (1, -1, *(1,) * (x.ndim - 2))
    variance = call["running_var"]
    mean = call["running_mean"]
    weight, bias = call.get("weight"), call.get("bias")
    eps = call["epsilon"] if "epsilon" in call.arguments else call["eps"]
    root = torch.sqrt(variance + float(eps))
    gain = (torch.ones_like(root) if weight is None else weight) / root
    gain, mean = gain.reshape(shape), mean.reshape(shape)
    shifted = x - mean
    scaled = shifted * gain
    value = scaled if bias is None else scaled + bias.reshape(shape)
    # The gain went through four roundings (a sum, a faithful root that counts twice, a quotient),
    # the difference, the product and the sum one each.
    own = rounded(scaled, 8.0) + rounded(value) + gain.abs() * (shifted.abs() * 2 * UNIT_ROUNDOFF)
    local = outward(gain.abs() * source.local + own)
    result = call.linear(value, local)
    return result if call.target == "aten.batch_norm.default" else (result, None, None)


@error_rule(*FACTORS)
def scale(call: ErrorCall) -> Enclosed:
    if call.target == "aten.neg.default":
        return call.linear(call.run(), call.source.local)
    key = call.source_key
    other = "other" if key == "self" else "self"
    value = call.run()
    moved = call.run(lambda e: e.local, {other: _size(call[other])})
    return call.linear(value, outward(moved + rounded(value)))


def _size(item: Any) -> Any:
    if isinstance(item, (int, float)):
        return abs(item)
    return item if item.dtype == torch.bool else _absolute(item)


@error_rule(*AVERAGES)
def average(call: ErrorCall) -> Enclosed:
    overrides: dict[str, Any] = {"dtype": None} if "dtype" in call.arguments else {}
    call.arguments.update(overrides)
    return call.summed(_terms(call) + 2)


def _terms(call: ErrorCall) -> int:
    """Largest number of entries one output averages."""
    shape = call.source.value.shape
    if "kernel_size" in call.arguments:
        kernel = call["kernel_size"]
        axes = 3 if "3d" in call.target else 2 if "2d" in call.target else 1
        return math.prod(kernel * axes if len(kernel) == 1 else kernel)
    if "output_size" in call.arguments:
        size = call["output_size"]
        inner = shape[-len(size) :]
        return math.prod(-(-n // int(m)) + 1 for n, m in zip(inner, size, strict=True))
    dims = call["dim"]
    chosen = range(1, len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    return math.prod(shape[d] for d in chosen)


SLICES = (
    "aten.slice.Tensor", "aten.select.int", "aten.split.Tensor", "aten.split_with_sizes.default",
    "aten.chunk.default", "aten.unbind.int", "aten.index.Tensor", "aten.index_select.default",
)  # fmt: skip


@error_rule(*COPYING, *SLICES)
def copying(call: ErrorCall) -> Any:
    values, errors = call.run(), call.run(lambda e: e.local)
    if isinstance(values, (list, tuple)):
        if len(values) > 1 and any(v.numel() == 0 for v in values):
            # The other part is then the whole tensor, which starts no base of its own.
            raise call.refused("a part without entries")
        return tuple(call.linear(v, e) for v, e in zip(values, errors, strict=True))
    return call.linear(values, errors)


@error_rule(*PADS)
def pad(call: ErrorCall) -> Enclosed:
    # A constant border is exact.
    zero: dict[str, Any] = {}
    if call.target == "aten.constant_pad_nd.default" or call["mode"] == "constant":
        zero = {"value": 0.0}
    return call.linear(call.run(), call.run(lambda e: e.local, zero))


CASTS = ("aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.type_as.default")


@error_rule(*IDENTITIES, *CASTS)
def identity(call: ErrorCall) -> Enclosed:
    # Casts and dropout in eval mode are the identity of the real function.
    source = call.arguments["input" if "input" in call.arguments else "self"]
    assert isinstance(source, Enclosed)
    return Enclosed(source.value, source.local, call.carried(source))
