# SPDX-License-Identifier: MIT
"""How far executions of a network can be from its exact real function, over a whole ball.

Every length is affine in the radius of the ball and rounded outward, ``constant + slope * radius``.
Two lengths belong to every tensor: its *error*, the distance of the executed tensor from the exact
one at the same input, and its *size*, the length of the executed tensor. ADR 0020 has the proof.

A tensor is ``R(b) + s + l``: ``R`` linear with the norm ``norm``, ``b`` the executed tensor where
linearity last ended, ``s`` a constant of length at most ``shift``, and ``l`` the rounding since. Of
``l``, ``local`` bounds a part by length; the rest are ``pending`` roundings of entries to storage,
each relative to its entry, which factors per entry carry along: what the network's own norm bounds
need not be bounded layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lmtfast.profiles import Profile
from lmtfast.verified.rounding import (
    UNDERFLOW,
    add_up,
    div_down,
    frobenius_up,
    gamma_up,
    hypot_up,
    mul_up,
    sqrt_up,
    sub_down,
)  # fmt: skip

# Covers roundings of roundings: of an entry that is itself off by a rounding, fewer than 16 times.
COMPOUND = 1.0 + 2.0**-19
MAX_PENDING = 16
# Numbers beyond this part of the largest one are not relied on.
HEADROOM = 1.0 - 2.0**-10
# Scales of batch norms went through at most seven roundings.
SCALE_MARGIN = 1.0 + 2.0**-48
UNIT = 2.0**-52


@dataclass(frozen=True)
class Affine:
    """A nonnegative length, at most ``constant + slope * radius``."""

    constant: float = 0.0
    slope: float = 0.0

    def __add__(self, other: Affine) -> Affine:
        return Affine(add_up(self.constant, other.constant), add_up(self.slope, other.slope))

    def __rmul__(self, factor: float) -> Affine:
        return Affine(mul_up(factor, self.constant), mul_up(factor, self.slope))

    def hypot(self, other: Affine) -> Affine:
        return Affine(hypot_up(self.constant, other.constant), hypot_up(self.slope, other.slope))

    def maximum(self, other: Affine) -> Affine:
        return Affine(max(self.constant, other.constant), max(self.slope, other.slope))


@dataclass(frozen=True)
class Lengths:
    """Error and size of a tensor."""

    error: Affine = Affine()
    size: Affine = Affine()

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths(self.error + other.error, self.size + other.size)

    def __rmul__(self, factor: float) -> Lengths:
        return Lengths(factor * self.error, factor * self.size)

    def hypot(self, other: Lengths) -> Lengths:
        return Lengths(self.error.hypot(other.error), self.size.hypot(other.size))


@dataclass(frozen=True, eq=False)
class Rounded:
    """A tensor of the executed program, as this module's docstring has it; ``base`` are the lengths
    of the tensor where linearity last ended."""

    base: Lengths
    unit: float
    norm: float = 1.0
    shift: float = 0.0
    local: Affine = Affine()
    pending: int = 0
    pending_shift: float = 0.0

    @property
    def rounding(self) -> Affine:
        """Length of all rounding since the base."""
        relative = mul_up(float(self.pending), self.norm) * self.base.size
        stored = mul_up(COMPOUND, self.unit) * (relative + Affine(self.pending_shift))
        # Entries whose rounding is pending are themselves off by the rounding before them.
        return self.local + mul_up(float(self.pending), 2.0 * self.unit) * self.local + stored

    @property
    def lengths(self) -> Lengths:
        rounding = self.rounding
        return self.norm * self.base + Lengths(rounding, rounding + Affine(self.shift))


@dataclass(frozen=True)
class ExecutionError:
    """What separates an execution's logits from the exact ones at any point of a ball.

    For inputs at most ``r`` from one in the declared range, executed and exact logits differ by
    ``W e + e'``: ``W`` the head (the identity without one), ``||e|| <= features(r)`` and
    ``||e'|| <= logits(r)``.

    Attributes:
        features, logits: These lengths.
        whole: Bound on the length of ``W e + e'``.
        largest_radius: Up to this radius nothing overflows.
    """

    features: Affine
    logits: Affine
    whole: Affine
    largest_radius: float

    def widened(self, factor: float) -> ExecutionError:
        """All bounds larger by a factor."""
        radius = div_down(self.largest_radius, factor)
        return ExecutionError(
            factor * self.features, factor * self.logits, factor * self.whole, radius
        )


@dataclass
class _Recursion:
    arrays: Mapping[str, np.ndarray]
    tape: Sequence[float]
    profile: Profile
    reach: float
    tensors: list[Rounded] = field(default_factory=list)
    peak: Affine = Affine()

    # -- arrays ------------------------------------------------------------------------------------

    def _ref(self, ref: Any) -> torch.Tensor:
        if "array" in ref:
            return torch.from_numpy(np.array(self.arrays[ref["array"]], dtype=np.float64))
        root = torch.sqrt(self._ref(ref["variance"]) + float.fromhex(ref["eps"]))
        return (self._ref(ref["weight"]) if ref["weight"] else torch.ones_like(root)) / root

    def _factor(self, step: Any) -> float:
        """Bound on the norm of a map of absolute values."""
        factor, item = float.fromhex(step["factor"]), step["array"]
        if item is None:
            return factor
        tensor = self._ref(item["ref"])
        tensor = tensor.reciprocal() if item["inverse"] else tensor
        size = float(tensor.abs().amax()) if step["largest"] else frobenius_up(tensor)
        return mul_up(mul_up(factor, size), SCALE_MARGIN)

    def _length(self, item: Any) -> float:
        ref, repeats = item
        return mul_up(float.fromhex(repeats), frobenius_up(self._ref(ref)))

    def _shift(self, step: Any) -> float:
        total = 0.0
        for item in step["shifts"]:
            total = add_up(total, self._length(item))
        return total

    # -- steps -------------------------------------------------------------------------------------

    def underflow(self, step: Any) -> Affine:
        """Bound on what every entry may lose besides relative roundings."""
        each = add_up(self.profile.underflow, mul_up(float(step.get("terms", 1) + 8), UNDERFLOW))
        return Affine(mul_up(sqrt_up(float(step["entries"])), each))

    def linear(self, step: Any) -> Rounded:
        (source,) = (self.tensors[i] for i in step["inputs"])
        factor, shift = self._factor(step), self._shift(step)
        if step["before"] is not None:
            shift = add_up(shift, mul_up(factor, self._length(step["before"])))
        size = factor * source.lengths.size + Affine(shift)
        self.peak = self.peak.maximum(size)
        made = Affine()
        if step["terms"]:
            made = mul_up(COMPOUND, gamma_up(step["terms"] + 8)) * size + self.underflow(step)
        norm = self._norm(step, mul_up(factor, source.norm))
        total = add_up(mul_up(factor, source.shift), shift)
        kept = step["diagonal"] and source.pending < MAX_PENDING - 1
        local = source.local if kept else source.rounding
        return Rounded(
            source.base, self.profile.unit, norm, total, factor * local + made,
            step["rounded"] + (source.pending if kept else 0),
            add_up(mul_up(factor, source.pending_shift) if kept else 0.0, total * step["rounded"]),
        )  # fmt: skip

    def _norm(self, step: Any, otherwise: float) -> float:
        return otherwise if step["norm"] is None else min(otherwise, self.tape[step["norm"]])

    def function(self, step: Any) -> Rounded:
        (source,) = (self.tensors[i] for i in step["inputs"])
        constant = float.fromhex(step["constant"])
        if step["slope"] is not None:
            constant = max(constant, float(self._ref(step["slope"]).abs().amax()))
        value, argument, absolute, zero = (
            float.fromhex(step[k]) for k in ("value", "argument", "absolute", "zero")
        )
        before = source.lengths.size
        size = constant * before + Affine(zero)
        self.peak = self.peak.maximum(size)
        root = sqrt_up(float(step["entries"]))
        made = UNIT * (value * size + argument * before + Affine(mul_up(absolute, root)))
        if step["rounded"]:
            made = made + mul_up(COMPOUND, self.profile.unit) * (size + made)
        if step["rounded"] or value or argument or absolute:
            made = made + self.underflow(step)
        own = Lengths(made, made + Affine(zero))
        return Rounded(constant * source.lengths + own, self.profile.unit)

    def add(self, step: Any) -> Rounded:
        sources = [self.tensors[i] for i in step["inputs"]]
        size = Affine()
        for source in sources:
            size = size + source.lengths.size
        self.peak = self.peak.maximum(size)
        made = mul_up(COMPOUND, gamma_up(step["terms"] + 8)) * size + self.underflow(step)
        if step["fresh"]:
            stored = made + mul_up(COMPOUND, self.profile.unit) * (size + made)
            total = Lengths(stored, stored)
            for source in sources:
                total = total + source.lengths
            return Rounded(total, self.profile.unit)
        norm, shift, local = 0.0, 0.0, made
        for source in sources:
            norm, shift = add_up(norm, source.norm), add_up(shift, source.shift)
            local = local + source.rounding
        base = same_base(sources)
        return Rounded(base, self.profile.unit, self._norm(step, norm), shift, local, 1, shift)

    def join(self, step: Any) -> Rounded:
        sources = [self.tensors[i] for i in step["inputs"]]
        constants = Lengths(Affine(), Affine(self._shift(step)))
        if not step["fresh"]:
            local, base = Affine(), same_base(sources)
            for source in sources:
                local = local.hypot(source.rounding)
            norm = hypot_up(*(s.norm for s in sources))
            shift = hypot_up(*(s.shift for s in sources))
            return Rounded(base, self.profile.unit, self._norm(step, norm), shift, local)
        total = Lengths()
        for source in sources:
            total = total.hypot(source.lengths)
        return Rounded(total + constants, self.profile.unit)

    def slice(self, step: Any) -> Rounded:
        (parent,) = (self.tensors[i] for i in step["inputs"])
        return Rounded(parent.lengths, self.profile.unit)

    def run(self, program: Any) -> ExecutionError:
        kinds = {
            "map": self.linear, "function": self.function, "add": self.add, "join": self.join,
            "slice": self.slice,
        }  # fmt: skip
        begin = Lengths(Affine(), Affine(self.reach, 1.0))
        self.tensors.append(Rounded(begin, self.profile.unit))
        self.peak = begin.size
        features: Affine | None = None
        for i, step in enumerate(program["steps"][1:], 1):
            if i == program["head"]:
                (below,) = step["inputs"]
                lengths = self.tensors[below].lengths
                features = lengths.error
                cut = Lengths(Affine(), lengths.size)
                self.tensors[below] = Rounded(cut, self.profile.unit)
            self.tensors.append(kinds[step["op"]](step))
            self.peak = self.peak.maximum(self.tensors[-1].lengths.size)
        last = self.tensors[-1]
        limit = mul_up(self.profile.largest, HEADROOM)
        room = div_down(max(0.0, sub_down(limit, self.peak.constant)), self.peak.slope)
        if features is None:
            error = last.lengths.error
            return ExecutionError(error, Affine(), error, room)
        whole = last.norm * features + last.rounding
        return ExecutionError(features, last.rounding, whole, room)


def same_base(tensors: Sequence[Rounded]) -> Lengths:
    """The base of tensors that stay linear in one."""
    base = tensors[0].base
    if any(t.base is not base for t in tensors):
        raise ValueError("a sum that is said to be linear joins tensors of several bases")
    return base


def execution_error(
    program: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    tape: Sequence[float],
    profile: Profile,
    *,
    entries: int,
    input_range: tuple[float, float],
) -> ExecutionError:
    """Bound how far executions under a profile are from the exact real function.

    Args:
        program: The steps, as a network's description writes them.
        arrays: The arrays it names.
        tape: Value of every instruction of the bound's tape, from guaranteed norms.
        profile: The profile.
        entries: Entries of one input.
        input_range: Range of the centres.

    Guarantee:
        As good as the norms behind ``tape``: any execution that conforms to the profile, in any
        order of summation, at any point of a ball around any input in the range.

    Source:
        Murray (2026), arXiv:2603.13334, for networks of dense layers; ADR 0020 for this form.

    Example:
        >>> from lmtfast.profiles import PROFILES
        >>> program = {"head": None, "steps": [{"op": "input", "inputs": []}]}
        >>> execution_error(
        ...     program, {}, [], PROFILES["fp64"], entries=4, input_range=(0.0, 1.0)
        ... ).features
        Affine(constant=0.0, slope=0.0)
    """
    reach = mul_up(sqrt_up(float(entries)), max(map(abs, input_range)))
    return _Recursion(arrays, tape, profile, reach).run(program)
