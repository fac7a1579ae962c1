# SPDX-License-Identifier: MIT
"""The part of the checker that judges executed semantics (ADR 0020); NumPy alone, beside check.py.

Lengths over a ball are pairs: at radius 0, and per unit of radius. A tensor of the execution is
R(b) + s + l, with R linear of the norm given, b the tensor where linearity last ended, s a constant
and l rounding. Of l, ``local`` bounds a part by length; ``late`` roundings to storage are relative
to their entries, so factors per entry carry them along. Every quantity is a sum of products of
nonnegative numbers, fewer than 2^20 roundings deep: one factor at the end, SAFE, covers them all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Unit of the rounding to storage, its underflow, and the largest number relied on.
PROFILES = {
    "executed(fp64)": (0.0, 0.0, 2.0**960),
    "executed(fp32a64)": (2.0**-24, 2.0**-150, float.fromhex("0x1.fffffep+127")),
}
UNIT, SAFE = 2.0**-53, 1.0 + 2.0**-30
LOOSE = 1.0 + 2.0**-18  # roundings of entries that are rounded themselves, sixteen times at most
LATE = 15  # most roundings that are carried along
TINY = 2.0**-900  # what float64 may lose below its range
Array = Any  # np.ndarray


def sensible(step: Any) -> bool:
    """Whether no number of a step is negative: then none lowers an error."""
    names = ("factor", "constant", "zero", "value", "argument", "absolute")
    constants = [*step.get("shifts", ()), *([step["before"]] if step.get("before") else ())]
    floats = [step[n] for n in names if n in step] + [root for _, root in constants]
    counts = [step.get(n) or 0 for n in ("terms", "rounded", "entries", "norm")]
    counted = all(type(n) is int and n >= 0 for n in counts)
    return counted and all(float.fromhex(f) >= 0.0 for f in floats)


class Tensor:
    """A tensor of the execution; ``base`` has the lengths (error, size) of b."""

    def __init__(self, base: Any, unit: float) -> None:
        self.base, self.unit, self.norm, self.shift = np.array(base), unit, 1.0, 0.0
        self.local, self.late, self.late_shift = np.zeros(2), 0, 0.0

    def rounding(self) -> Array:
        stored = self.late * self.norm * self.base[1] + np.array([self.late_shift, 0.0])
        return (self.local + self.unit * stored) * LOOSE

    def lengths(self) -> Array:
        constant = np.array([[0.0, 0.0], [self.shift, 0.0]])
        return self.norm * self.base + self.rounding() + constant


class Recursion:
    """Runs the steps of a description; ``get`` resolves a factor, ``tape`` are proved norms."""

    def __init__(self, profile: Any, get: Any, tape: list[float], length: Any) -> None:
        (self.unit, self.lost, _), self.get, self.tape = profile, get, tape
        self.length = length
        self.tensors: list[Tensor] = []
        self.peak = np.zeros(2)

    def constants(self, items: Any) -> float:
        return sum(float.fromhex(root) * self.length(self.get(ref)) for ref, root in items)

    def seen(self, size: Array) -> Array:
        self.peak = np.maximum(self.peak, size)
        return size

    def map(self, step: Any, inputs: list[Tensor]) -> Tensor:
        (source,), array = inputs, step["array"]
        factor, rounded = float.fromhex(step["factor"]), int(step["rounded"])
        if array is not None:
            entries = np.abs(self.get(array))
            factor *= float(entries.max()) if step["largest"] else self.length(entries)
        before = [] if step["before"] is None else [step["before"]]
        shift = self.constants(step["shifts"]) + factor * self.constants(before)
        size = self.seen(factor * source.lengths()[1] + np.array([shift, 0.0]))
        kept = bool(step["diagonal"]) and source.late < LATE
        result = Tensor(source.base, self.unit)
        result.norm, result.shift = factor * source.norm, factor * source.shift + shift
        result.local = factor * (source.local if kept else source.rounding())
        if step["terms"]:
            result.local = result.local + self.made(step, size)
        result.late = rounded + source.late * kept
        result.late_shift = factor * source.late_shift * kept + rounded * result.shift
        return self.bounded(step, result)

    def made(self, step: Any, size: Array) -> Array:
        """Rounding of a call in float64, of entries with that many terms of that size."""
        count = step.get("terms", 1) + 8
        lost = math.sqrt(step["entries"]) * (self.lost + count * TINY)
        return count * UNIT / (1.0 - count * UNIT) * LOOSE * size + np.array([lost, 0.0])

    def bounded(self, step: Any, result: Tensor) -> Tensor:
        if step["norm"] is not None:
            result.norm = min(result.norm, self.tape[step["norm"]])
        return result

    def function(self, step: Any, inputs: list[Tensor]) -> Tensor:
        error, before = inputs[0].lengths()
        names = ("constant", "zero", "value", "argument", "absolute")
        constant, zero, value, argument, absolute = (float.fromhex(step[n]) for n in names)
        if step["slope"] is not None:
            constant = max(constant, float(np.abs(self.get(step["slope"])).max()))
        size = self.seen(constant * before + np.array([zero, 0.0]))
        own = value * size + argument * before
        made = 2.0 * UNIT * (own + np.array([absolute * math.sqrt(step["entries"]), 0.0]))
        if step["rounded"] or value or argument or absolute:
            made = made + self.made(step | {"terms": 0}, np.zeros(2))
        made = made + step["rounded"] * self.unit * LOOSE * (size + made)
        return Tensor([constant * error + made, size + made], self.unit)

    def add(self, step: Any, inputs: list[Tensor]) -> Tensor:
        every = sum(t.lengths() for t in inputs)
        size = self.seen(every[1])
        made = self.made(step, size)
        if step["fresh"]:
            made = made + self.unit * LOOSE * (size + made)
            return Tensor(every + made, self.unit)
        result = self.linear(inputs)
        result.norm, result.shift = sum(t.norm for t in inputs), sum(t.shift for t in inputs)
        result.local = sum((t.rounding() for t in inputs), made)
        result.late, result.late_shift = 1, result.shift
        return self.bounded(step, result)

    def join(self, step: Any, inputs: list[Tensor]) -> Tensor:
        def root(items: Any) -> Any:
            return np.sqrt(np.sum(np.square(np.array(list(items))), 0)) + 2.0**-500

        if step["fresh"]:
            error, size = root(t.lengths() for t in inputs)
            size = size + np.array([self.constants(step["shifts"]), 0.0])
            return Tensor([error, size], self.unit)
        result = self.linear(inputs)
        result.norm, result.shift = root((t.norm, t.shift) for t in inputs).tolist()
        result.local = root(t.rounding() for t in inputs)
        return self.bounded(step, result)

    def linear(self, inputs: list[Tensor]) -> Tensor:
        if any(not np.array_equal(t.base, inputs[0].base) for t in inputs):
            raise ValueError("a linear join of tensors with several bases")
        return Tensor(inputs[0].base, self.unit)

    def run(self, program: Any, reach: float, headed: bool) -> tuple[Array, Array]:
        """Lengths of the errors of the features and of the rest; without a head, of all."""
        kinds = {"map": self.map, "function": self.function, "add": self.add, "join": self.join}
        self.tensors = [Tensor([[0.0, 0.0], self.seen(np.array([reach, 1.0]))], self.unit)]
        features = None
        for i, step in enumerate(program["steps"][1:], 1):
            if not (all(0 <= k < i for k in step["inputs"]) and sensible(step)):
                raise ValueError("a step that reads a later one, or counts below zero")
            inputs = [self.tensors[k] for k in step["inputs"]]
            if i == program["head"]:
                features, size = inputs[0].lengths()
                inputs = [Tensor([np.zeros(2), size], self.unit)]
            if step["op"] == "slice":
                self.tensors.append(Tensor(inputs[0].lengths(), self.unit))
            else:
                self.tensors.append(kinds[step["op"]](step, inputs))
            self.seen(self.tensors[-1].lengths()[1])
        if (features is None) == headed:
            raise ValueError("a head in the network or in its steps alone")
        last = self.tensors[-1]
        return (last.lengths()[0], np.zeros(2)) if features is None else (features, last.rounding())


def drift(header: Any, get: Any, tape: list[float], length: Any) -> Any:
    """How far executions move the difference of two logits, at most: a function of the distance of
    the head's rows and of the radius; infinite where something may overflow. ``get`` resolves an
    array, ``length`` bounds its Frobenius norm."""
    semantics, network = header["semantics"], header["network"]
    if semantics == "executed(fp32a64)" and not any(a[:2] == "A6" for a in header["assumptions"]):
        raise ValueError("roundings to float32 are not assumed")
    profile, ends = PROFILES[semantics], [abs(float.fromhex(x)) for x in header["input_range"]]
    recursion = Recursion(profile, get, tape, length)
    reach = math.sqrt(math.prod(network["input"])) * max(ends)
    features, logits = recursion.run(network["executed"], reach, network["head"] is not None)
    peak, root = recursion.peak * SAFE, math.sqrt(2.0)

    def moved(away: Array, radius: Array) -> Array:
        far, rest, most = (a[0] + a[1] * radius for a in (features, logits, peak))
        return np.where(most <= profile[2], (far * away + rest * root) * SAFE, math.inf)

    return moved
