# SPDX-License-Identifier: MIT
"""Simplifies a linear region: batch norms and factors into kernels, padding into convs, ``x +
conv(x)``.

Each rule replaces a pattern by one primitive that is the same linear map, so a region's norm never
changes; only reorderings at either end are dropped, which keep the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from lmtfast.graph import (
    Average,
    ChannelScale,
    Conv,
    Copy,
    Linear,
    Primitive,
    Region,
    RegionNode,
    Scale,
    Shape,
    number,
)  # fmt: skip


def fold(region: Region) -> Region:
    """The region with every folding rule applied until none applies."""
    while True:
        for rule in RULES:
            folded = rule(region)
            if folded is not None:
                region = folded
                break
        else:
            return region


def _consumers(region: Region, index: int) -> int:
    return sum(n.inputs.count(index) for n in region.nodes) + (index == len(region.nodes) - 1)


def _without(region: Region, drop: int, node: int, new: RegionNode) -> Region:
    """Remove node ``drop`` and put ``new`` in place of ``node`` (``new`` uses old indices)."""
    nodes = list(region.nodes)
    nodes[node] = new

    def renumber(i: int) -> int:
        return i - (i > drop)

    kept = [
        replace(n, inputs=tuple(renumber(i) for i in n.inputs))
        for j, n in enumerate(nodes)
        if j != drop
    ]
    return replace(region, nodes=tuple(kept))


def _merge(
    region: Region, merge: Callable[[Primitive, Primitive], Primitive | None]
) -> Region | None:
    """Apply ``merge(first, second)`` to the first chain of two primitives that it accepts."""
    for i, node in enumerate(region.nodes):
        if isinstance(node.op, str) or not node.inputs or node.inputs[0] < 0:
            continue
        j = node.inputs[0]
        first = region.nodes[j]
        if isinstance(first.op, str) or _consumers(region, j) != 1:
            continue
        merged = merge(first.op, node.op)
        if merged is not None:
            return _without(region, j, i, RegionNode(merged, first.inputs))
    return None


def _channel_scale(
    scale: Scale, channels: int, sample: Shape, axis: int
) -> tuple[ChannelScale, ...] | None:
    """The scale as a per-channel factor along ``axis`` of the sample, or None if it is not one."""
    if scale.ref is None:
        return ()
    shape = scale.broadcast
    full = (1,) * (len(sample) - len(shape)) + shape
    if all(n == 1 for n in full):
        return (ChannelScale(scale.ref, scale.inverse),)
    if full[axis] == channels and all(n == 1 for k, n in enumerate(full) if k != axis):
        return (ChannelScale(scale.ref, scale.inverse),)
    return None


def _scale_after(first: Primitive, second: Primitive) -> Primitive | None:
    if not (isinstance(first, (Conv, Linear)) and isinstance(second, Scale)):
        return None
    return _absorb(first, second, after=True)


def _scale_before(first: Primitive, second: Primitive) -> Primitive | None:
    if not (isinstance(first, Scale) and isinstance(second, (Conv, Linear))):
        return None
    return _absorb(second, first, after=False)


def _absorb(op: Conv | Linear, scale: Scale, *, after: bool) -> Primitive | None:
    """The kernel with a scale on its output or input channels folded in, or None."""
    sample = op.out_shape if after else op.in_shape
    axis = 0 if isinstance(op, Conv) else len(sample) - 1
    scales = _channel_scale(scale, sample[axis], sample, axis)
    if scales is None:
        return None
    gains = _gains(op, scale.gain)
    if gains is None:
        gains, scales = (op.gain, op.identity_gain), (*scales, _scalar(scale.gain))
    if scales and op.identity_gain:
        return None
    op = replace(op, gain=gains[0], identity_gain=gains[1])
    if after:
        return replace(op, row_scales=op.row_scales + scales)
    return replace(op, column_scales=scales + op.column_scales)


def _times(a: float, b: float) -> float | None:
    """The product if it needs no rounding: a factor that rounds must stay two factors."""
    product = a * b
    exact = math.isfinite(product) and Fraction(product) == Fraction(a) * Fraction(b)
    return product if exact else None


def _gains(op: Conv | Linear, factor: float) -> tuple[float, float] | None:
    """Gain and identity gain times a factor, where both products are exact."""
    gain, identity = _times(op.gain, factor), _times(op.identity_gain, factor)
    return None if gain is None or identity is None else (gain, identity)


def _scalar(factor: float) -> ChannelScale:
    return ChannelScale(number(factor))


def _factor(first: Primitive, second: Primitive) -> Primitive | None:
    """A plain factor next to another scale or an average."""
    for scale, other in ((first, second), (second, first)):
        if isinstance(scale, Scale) and scale.ref is None and isinstance(other, (Scale, Average)):
            gain, ends = _times(other.gain, scale.gain), (first.in_shape, second.out_shape)
            if gain is not None:
                return replace(other, gain=gain, in_shape=ends[0], out_shape=ends[1])
            if isinstance(other, Scale) and other.ref is None:
                return replace(other, ref=number(scale.gain))
    return None


def _pad_before(first: Primitive, second: Primitive) -> Primitive | None:
    """Zero or circular padding as a call of its own, in front of a conv."""
    if not (isinstance(first, Copy) and isinstance(second, Conv)) or second.transposed:
        return None
    if second.padding_mode != "zeros" or not first.call.target.startswith("aten.pad."):
        return None
    mode = first.call.args[2] if len(first.call.args) > 2 else "constant"
    flat = tuple(first.call.args[1])
    axes = len(second.kernel)
    if mode not in ("constant", "circular") or len(flat) > 2 * axes or min(flat) < 0:
        return None
    pairs = [(flat[2 * i], flat[2 * i + 1]) for i in range(len(flat) // 2)]
    pairs += [(0, 0)] * (axes - len(pairs))
    pairs.reverse()
    if mode == "circular":
        if any(low or high for low, high in second.padding):
            return None
        return replace(
            second, in_shape=first.in_shape, padding=tuple(pairs), padding_mode="circular"
        )
    added = tuple((a + c, b + d) for (a, b), (c, d) in zip(pairs, second.padding, strict=True))
    return replace(second, in_shape=first.in_shape, padding=added)


def _strip_ends(region: Region) -> Region | None:
    """Drop reorderings where the region begins or ends; orthogonal maps there keep the norm."""
    nodes = region.nodes
    if not nodes:
        return None
    last = nodes[-1]
    if isinstance(last.op, Copy) and last.op.bijective and last.inputs[0] == len(nodes) - 2:
        return replace(region, nodes=nodes[:-1], out_shape=last.op.in_shape)
    if isinstance(last.op, Copy) and last.op.bijective and last.inputs[0] == -1:
        return replace(region, nodes=(), out_shape=region.in_shape)
    readers = [i for i, n in enumerate(nodes) if -1 in n.inputs]
    if len(readers) == 1 and nodes[readers[0]].inputs == (-1,):
        op, i = nodes[readers[0]].op, readers[0]
        if isinstance(op, Copy) and op.bijective and i != len(nodes) - 1:
            kept = [
                replace(n, inputs=tuple(-1 if k == i else k - (k > i) for k in n.inputs))
                for j, n in enumerate(nodes)
                if j != i
            ]
            return replace(region, nodes=tuple(kept), in_shape=op.out_shape)
    return None


def _doubled(region: Region) -> Region | None:
    """``x + x`` is a factor of two."""
    for i, node in enumerate(region.nodes):
        if node.op == "add" and len(node.inputs) == 2 and node.inputs[0] == node.inputs[1]:
            j = node.inputs[0]
            shape = region.in_shape if j < 0 else _out_shape(region, j)
            double = RegionNode(Scale("x + x", shape, shape, gain=2.0), (j,))
            nodes = (*region.nodes[:i], double, *region.nodes[i + 1 :])
            return replace(region, nodes=nodes)
    return None


def _out_shape(region: Region, index: int) -> Shape:
    node = region.nodes[index]
    if isinstance(node.op, Primitive):
        return node.op.out_shape
    if node.op == "add":
        return region.in_shape if node.inputs[0] < 0 else _out_shape(region, node.inputs[0])
    shapes = [region.in_shape if i < 0 else _out_shape(region, i) for i in node.inputs]
    axis = node.axis
    return (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])


def _identity_sum(region: Region) -> Region | None:
    """``g x + conv(x)``: the identity joins the kernel's centre tap."""
    for i, node in enumerate(region.nodes):
        if node.op != "add" or len(node.inputs) != 2:
            continue
        for skip, branch in (node.inputs, node.inputs[::-1]):
            if branch < 0 or _consumers(region, branch) != 1:
                continue
            inner = region.nodes[branch]
            if skip != inner.inputs[0] or not isinstance(inner.op, (Conv, Linear)):
                continue
            identity = inner.op.identity_gain + 1.0
            exact = Fraction(identity) == Fraction(inner.op.identity_gain) + 1
            if exact and _has_centre(inner.op):
                merged = replace(inner.op, identity_gain=identity)
                return _without(region, branch, i, RegionNode(merged, inner.inputs))
    return None


def _has_centre(op: Conv | Linear) -> bool:
    if isinstance(op, Linear):
        return op.in_shape == op.out_shape
    if op.transposed or op.in_shape != op.out_shape:
        return False
    axes = zip(op.stride, op.padding, op.dilation, op.kernel, strict=True)
    return all(s == 1 and low % d == 0 and low // d < k for s, (low, _), d, k in axes)


RULES: tuple[Callable[[Region], Region | None], ...] = (
    lambda r: _merge(r, _scale_after),
    lambda r: _merge(r, _pad_before),
    lambda r: _merge(r, _factor),
    lambda r: _merge(r, _scale_before),
    _doubled,
    _identity_sum,
    _strip_ends,
)
