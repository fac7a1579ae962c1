# SPDX-License-Identifier: MIT
"""Calls whose every output entry is one input entry or zero: views, pads, slices, repeats,
shuffles.

No formula per call: the call is executed once on the numbers 1..n, which shows where each entry
goes, that samples are not mixed, and how often the most copied entry occurs. Reflect, replicate and
circular padding, expand, repeat, nearest upsampling and pixel shuffle all come out exact this way.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lmtfast.builder import GraphBuilder, Value
from lmtfast.graph import BATCH, INPUT, Call, ConstantRef, Copy
from lmtfast.rules.registry import TracedCall, operation_rule
from lmtfast.weights import constant_ref, constant_tensor, operation

# aten.as_strided and aten.unfold are missing on purpose: overlapping memory is refused.
COPYING = (
    "aten.view.default", "aten._unsafe_view.default", "aten.reshape.default",
    "aten.flatten.using_ints", "aten.unflatten.int", "aten.permute.default",
    "aten.transpose.int", "aten.t.default", "aten.movedim.intlist", "aten.squeeze.default",
    "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze.default", "aten.expand.default",
    "aten.repeat.default", "aten.repeat_interleave.self_int", "aten.tile.default",
    "aten.flip.default", "aten.roll.default", "aten.pixel_shuffle.default",
    "aten.pixel_unshuffle.default", "aten.channel_shuffle.default", "aten.narrow.default",
    "aten.upsample_nearest1d.vec", "aten.upsample_nearest2d.vec", "aten.upsample_nearest3d.vec",
    "aten.upsample_nearest1d.default", "aten.upsample_nearest2d.default",
    "aten.upsample_nearest3d.default", "aten.swapaxes.default",
    "aten.native_channel_shuffle.default",
    "aten.reflection_pad1d.default", "aten.reflection_pad2d.default",
    "aten.replication_pad1d.default", "aten.replication_pad2d.default",
    "aten.rot90.default", "aten.tril.default", "aten.triu.default",
)  # fmt: skip

VIEWS = ("aten.view.default", "aten._unsafe_view.default")

IDENTITIES = (
    "aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default",
    "aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default",
    "aten.feature_alpha_dropout.default", "aten.lift_fresh_copy.default", "aten.positive.default",
)  # fmt: skip

INT64_MAX = 2**63 - 1
# Enough to see most mixing of samples; calls that could mix later ones are refused by argument.
SAMPLES = 5


def execute(call: Call, tensor: torch.Tensor) -> torch.Tensor:
    """Run a frozen call on a batch. Shape ``(N, ...)``."""

    def fill(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return [fill(a) for a in arg]
        if isinstance(arg, ConstantRef):
            return constant_tensor(arg).to(tensor.device)
        if isinstance(arg, str) and arg in (INPUT, BATCH):
            return tensor if arg == INPUT else tensor.shape[0]
        return arg

    # The program made memory contiguous for a view; here the strides may be others.
    target = "aten.reshape.default" if call.target in VIEWS else call.target
    result = operation(target)(
        *(fill(a) for a in call.args), **{k: fill(v) for k, v in call.kwargs}
    )
    return result[0] if isinstance(result, (tuple, list)) else result


def copy(
    builder: GraphBuilder,
    value: Value,
    frozen: Call,
    name: str,
    call: TracedCall,
    *,
    keep_pair: bool = False,
) -> Value:
    """Append a copying call, or refuse it if it turns out not to be one."""
    n = math.prod(value.shape)
    if n == 0:
        raise call.unsupported("the tensor has no entries")
    # Several samples: each must repeat the first with its own entries.
    numbered = torch.arange(1, SAMPLES * n + 1, dtype=torch.float64).reshape(SAMPLES, *value.shape)
    result = execute(frozen, numbered)
    if result.shape[0] != SAMPLES:
        raise call.unsupported("it moves the batch dimension")
    samples = result.reshape(SAMPLES, -1)
    first = samples[0]
    whole = bool((first == first.round()).all()) and bool(((first >= 0) & (first <= n)).all())
    offsets = n * torch.arange(SAMPLES, dtype=torch.float64).unsqueeze(1)
    if not whole or not torch.equal(torch.where(first == 0, first, first + offsets), samples):
        raise call.unsupported("it mixes the samples of a batch, or computes instead of copying")
    index = first.long()
    counts = torch.bincount(index, minlength=n + 1)[1:]
    copies = int(counts.max())
    ordered = index.numel() == n and torch.equal(index, torch.arange(1, n + 1))
    bijective = index.numel() == n and copies == 1 and int(counts.min()) == 1
    shape = tuple(result.shape[1:])
    if ordered and shape == value.shape:
        return value
    primitive = Copy(name, value.shape, shape, frozen, copies, bijective, ordered)
    moved = builder.linear(value, primitive)
    if keep_pair:
        moved.pair = value.pair
    return moved


def frozen_call(call: TracedCall, key: str, **override: Any) -> Call:
    """The call with its tensor argument ``key`` replaced by the placeholder."""
    arguments = {**call.arguments, key: INPUT, **override}
    for name, item in arguments.items():
        if isinstance(item, Value):
            raise call.unsupported(f"argument {name!r} depends on the input")

    def freeze(item: Any) -> Any:
        return tuple(freeze(i) for i in item) if isinstance(item, (list, tuple)) else item

    positional = tuple(freeze(v) for k, v in arguments.items() if k not in call.keyword_only)
    keywords = tuple((k, freeze(v)) for k, v in arguments.items() if k in call.keyword_only)
    return Call(call.target, positional, keywords)


@operation_rule(*COPYING)
def copying(call: TracedCall) -> Value:
    key = "self" if "self" in call.arguments else "input"
    value = call.value(key)
    rank = len(value.shape) + 1
    kind = call.target.split(".")[1]
    if kind in ("roll", "flip", "rot90") and any(d % rank == 0 for d in call["dims"] or (0,)):
        raise call.unsupported("it mixes the samples of a batch (dim 0)")
    if kind in ("tril", "triu") and rank < 3:
        raise call.unsupported("it treats the samples of a batch differently")
    frozen = frozen_call(call, key)
    if kind.startswith("upsample_nearest"):
        # The index floor(i * scale) is computed in the tensor's own precision.
        numbered = torch.arange(math.prod(value.shape), dtype=torch.float64) % 2.0**24
        numbered = numbered.reshape(1, *value.shape)
        if not torch.equal(execute(frozen, numbered), execute(frozen, numbered.float()).double()):
            raise call.unsupported("in float32 it copies other entries than in float64")
    return copy(call.builder, value, frozen, call.name, call)


@operation_rule(*IDENTITIES)
def identity(call: TracedCall) -> Value:
    # Dropout in eval mode is the identity; in training mode it has no place in a bound.
    if call.get("train"):
        raise call.unsupported("dropout is active; call model.eval() first")
    return call.value("input" if "input" in call.arguments else "self")


@operation_rule(
    "aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.type_as.default"
)
def cast(call: TracedCall) -> Value:
    # Between floating types a cast is the identity of the real function; to integers it is a jump.
    dtype = call.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        raise call.unsupported(f"a cast to {dtype} is not continuous")
    return call.value("self")


@operation_rule("aten.pad.default", "aten.constant_pad_nd.default")
def pad(call: TracedCall) -> Value:
    value = call.value("self")
    if any(call["pad"][2 * len(value.shape) :]):
        raise call.unsupported("it pads the batch dimension")
    fill = call.get("value")
    if fill is not None and not math.isfinite(fill):
        raise call.unsupported(f"padding with {fill}")
    # A constant border shifts the function: its linear part pads with zeros.
    zero: dict[str, Any] = {"value": None} if call.target == "aten.pad.default" else {"value": 0}
    frozen = frozen_call(call, "self", **zero)
    if call.target == "aten.constant_pad_nd.default":
        frozen = Call("aten.pad.default", (INPUT, frozen.args[1], "constant", None))
    return copy(call.builder, value, frozen, call.name, call)


@operation_rule("aten.slice.Tensor")
def slice_(call: TracedCall) -> Value:
    value = call.value("self")
    axis = call["dim"] % (len(value.shape) + 1) - 1
    start, stop, step = call["start"] or 0, call["end"], call["step"]
    if axis < 0:
        if start == 0 and step == 1 and (stop in (None, INT64_MAX, BATCH)):
            return value
        raise call.unsupported("it selects samples of the batch")
    length = value.shape[axis]
    start, stop, step = slice(start, length if stop is None else stop, step).indices(length)
    if step == 1:
        return call.builder.slice(value, axis, start, max(start, stop))
    return copy(call.builder, value, frozen_call(call, "self"), call.name, call)


@operation_rule("aten.select.int")
def select(call: TracedCall) -> Value:
    value = call.value("self")
    axis = call["dim"] % (len(value.shape) + 1) - 1
    if axis < 0:
        raise call.unsupported("it selects one sample of the batch")
    start = call["index"] % value.shape[axis]
    part = call.builder.slice(value, axis, start, start + 1)
    squeeze = Call("aten.squeeze.dim", (INPUT, axis + 1))
    return copy(call.builder, part, squeeze, call.name, call)


@operation_rule(
    "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int"
)
def split(call: TracedCall) -> tuple[Value, ...]:
    value = call.value("self")
    axis = call["dim"] % (len(value.shape) + 1) - 1
    if axis < 0:
        raise call.unsupported("it splits the batch")
    if call.target == "aten.unbind.int":
        sizes = [1] * value.shape[axis]
    else:
        sizes = [shape[axis] for shape in call.out_shapes if shape is not None]
    parts, start = [], 0
    for size in sizes:
        parts.append(call.builder.slice(value, axis, start, start + size))
        start += size
    if call.target == "aten.unbind.int":
        squeeze = Call("aten.squeeze.dim", (INPUT, axis + 1))
        parts = [copy(call.builder, p, squeeze, call.name, call) for p in parts]
    return tuple(parts)


@operation_rule("aten.index.Tensor", "aten.index_select.default")
def index(call: TracedCall) -> Value:
    # Constant indices only: an index computed from the input is not a linear map.
    key = "indices" if call.target == "aten.index.Tensor" else "index"
    items = call[key] if key == "indices" else [call[key]]
    if any(isinstance(i, Value) for i in items):
        raise call.unsupported("the index depends on the input")
    value = call.value("self")
    skipped = call["dim"] % (len(value.shape) + 1) if key == "index" else 0
    vectors = [(skipped + i, call.tensor(ref)) for i, ref in enumerate(items) if ref is not None]
    if len(vectors) != 1 or vectors[0][0] == 0 or vectors[0][1].ndim != 1:
        raise call.unsupported("only one constant index vector, not along the batch, is supported")
    axis, where = vectors[0]
    where = where.nonzero().reshape(-1) if where.dtype == torch.bool else where.long()
    where = where % value.shape[axis - 1]
    frozen = Call("aten.index_select.default", (INPUT, axis, constant_ref(where)))
    return copy(call.builder, value, frozen, call.name, call)
