# SPDX-License-Identifier: MIT
"""Error rules of joins: sums and differences, concatenation, entrywise extremes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmtfast.enclosure.registry import (
    Enclosed,
    ErrorCall,
    error_rule,
    length_up,
    outward,
    rounded,
)  # fmt: skip


def _value(item: Any) -> Any:
    return item.value if isinstance(item, Enclosed) else item


SUMS = (
    "aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar",
    "aten.rsub.Tensor", "aten.rsub.Scalar",
)  # fmt: skip
CONCATENATIONS = ("aten.cat.default", "aten.concat.default", "aten.stack.default")
EXTREMA = (
    "aten.maximum.default", "aten.minimum.default", "aten.max.other", "aten.min.other",
)  # fmt: skip


@error_rule(*SUMS)
def add(call: ErrorCall) -> Enclosed:
    alpha = abs(float(call["alpha"]))
    first, second = call["self"], call["other"]
    # rsub scales its first argument, the others their second.
    weights = (alpha, 1.0) if call.target.startswith("aten.rsub") else (1.0, alpha)
    value = call.run()
    local = rounded(value)
    carried: list[Tensor] = []
    for item, weight in zip((first, second), weights, strict=True):
        if weight != 1.0:
            scaled = _value(item) * weight
            scaled = scaled if isinstance(scaled, Tensor) else torch.full_like(value, scaled)
            local = local + rounded(scaled)
        if isinstance(item, Enclosed):
            local = local + weight * item.local
            carried.append(_broadcast(call, item, value) * weight)
    traced = [i for i in (first, second) if isinstance(i, Enclosed)]
    if call.region_norm is None or all(_same_base(call, t) for t in traced):
        return Enclosed(value, outward(local), traced[0].base)
    return Enclosed(value, outward(local), outward(sum(carried[1:], carried[0])))


def _broadcast(call: ErrorCall, item: Enclosed, value: Tensor) -> Tensor:
    """Length of the carried error, times the root of how often broadcasting repeats an entry."""
    copies = max(1, value[:1].numel() // max(1, item.value[:1].numel()))
    carried = call.carried(item)
    return carried if copies == 1 else outward(carried * math.sqrt(copies))


def _same_base(call: ErrorCall, item: Enclosed) -> bool:
    return item.traced is not None and item.traced.base is call.output.base


@error_rule(*CONCATENATIONS)
def cat(call: ErrorCall) -> Enclosed:
    parts = call["tensors"]
    traced = [p for p in parts if isinstance(p, Enclosed)]
    errors = [p.local if isinstance(p, Enclosed) else torch.zeros_like(p) for p in parts]
    value, local = call.run(), call.run(None, {"tensors": errors})
    if call.region_norm is None or all(_same_base(call, t) for t in traced):
        return Enclosed(value, local, traced[0].base)
    return Enclosed(value, local, _root_of_squares([call.carried(t) for t in traced]))


def _root_of_squares(lengths: list[Tensor]) -> Tensor:
    return lengths[0] if len(lengths) == 1 else length_up(torch.stack(lengths, 1))


@error_rule(*EXTREMA)
def extremum(call: ErrorCall) -> Enclosed:
    traced = [a for a in (call["self"], call["other"]) if isinstance(a, Enclosed)]
    value = call.run()
    if call.region_norm is None:
        local = torch.zeros_like(value)
        for item in traced:
            local = torch.maximum(local, item.local)
        return Enclosed(value, local, traced[0].base)
    # The entrywise extreme moves no more than the pair of its arguments.
    lengths = []
    for item in traced:
        copies = max(1, value[:1].numel() // max(1, item.value[:1].numel()))
        whole = length_up(item.local) + call.carried(item)
        lengths.append(outward(whole * math.sqrt(copies)))
    return Enclosed(value, torch.zeros_like(value), _root_of_squares(lengths))
