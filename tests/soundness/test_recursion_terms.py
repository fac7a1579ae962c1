# SPDX-License-Identifier: MIT
"""The recursion over executions against its derivation (ADR 0020), in exact rationals.

Random programs whose lengths differ by many powers of two, so that every term is somewhere the
largest: the recursion may not be below the derivation, and not far above it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from lmtfast import check, check_execution
from lmtfast.execution.recursion import (
    HEADROOM,
    MAX_PENDING,
    Affine,
    execution_error,
)
from lmtfast.profiles import PROFILES, Profile

ZERO = Fraction(0)
ROOT2_DOWN = Fraction(math.isqrt(2 << 400), 1 << 200)
# The recursion covers roundings of roundings with 1 + 2^-19.
NEAR = 1 + Fraction(1, 2**16)
NARROW = Profile("narrow", "float32", 2.0**-24, 2.0**-150, 2.0**127)
# What is allowed for underflow may be more than is needed.
NOTHING = Fraction(1, 10**250)
# The checker is more generous, most of all with underflow.
LOOSER, LESS = 8, Fraction(1, 10**120)
PROFILES_TRIED = (PROFILES["fp32a64"], PROFILES["fp64"], NARROW)


def root(value: Fraction) -> Fraction:
    """Below the square root by less than 2^-150 of it."""
    shift = max(0, 160 + value.denominator.bit_length() - value.numerator.bit_length())
    return Fraction(math.isqrt((value.numerator << 2 * shift) // value.denominator), 1 << shift)


def length(entries: Sequence[Any]) -> Fraction:
    return root(sum((Fraction(v) ** 2 for v in entries), ZERO))


@dataclass(frozen=True)
class Line:
    """``constant + slope * radius``."""

    constant: Fraction = ZERO
    slope: Fraction = ZERO

    def __add__(self, other: Line) -> Line:
        return Line(self.constant + other.constant, self.slope + other.slope)

    def __rmul__(self, factor: Fraction) -> Line:
        return Line(factor * self.constant, factor * self.slope)

    def hypot(self, other: Line) -> Line:
        return Line(root(self.constant**2 + other.constant**2),
                    root(self.slope**2 + other.slope**2))  # fmt: skip

    def below(self, found: Affine) -> bool:
        """Whether the recursion's length covers this one, and is near."""
        pairs = ((self.constant, found.constant), (self.slope, found.slope))
        return all(exact <= Fraction(given) <= exact * NEAR + NOTHING
                   for exact, given in pairs)  # fmt: skip


@dataclass(frozen=True)
class Derived:
    """A tensor of the derivation, with the letters of the ADR."""

    unit: Fraction
    base_error: Line
    base_size: Line
    norm: Fraction = Fraction(1)
    shift: Fraction = ZERO
    local: Line = Line()
    pending: int = 0
    pending_shift: Fraction = ZERO

    @property
    def rounding(self) -> Line:
        """``l = local + u (k c s_b + shifts + k l)``, solved for l."""
        stored = self.pending * self.norm * self.base_size + Line(self.pending_shift)
        return 1 / (1 - self.pending * self.unit) * (self.local + self.unit * stored)

    @property
    def error(self) -> Line:
        return self.norm * self.base_error + self.rounding

    @property
    def size(self) -> Line:
        return self.norm * self.base_size + Line(self.shift) + self.rounding


def fresh(unit: Fraction, error: Line, size: Line) -> Derived:
    return Derived(unit, error, size)


class Derivation:
    """The proof's induction over the steps of a program."""

    def __init__(self, arrays: dict[str, np.ndarray], tape: list[float], profile: Profile) -> None:
        self.arrays, self.tape, self.profile = arrays, tape, profile
        self.unit = Fraction(profile.unit)
        self.sizes: list[Line] = []

    def underflow(self, step: Any) -> Line:
        each = Fraction(self.profile.underflow) + step.get("terms", 0) * Fraction(2) ** -1000
        return Line(root(Fraction(step["entries"])) * each)

    def gamma(self, terms: int) -> Fraction:
        u = Fraction(1, 2**53)
        return terms * u / (1 - terms * u)

    def shifts(self, items: Any) -> Fraction:
        return sum((Fraction(float.fromhex(n)) * length(self.arrays[ref["array"]])
                    for ref, n in items), ZERO)  # fmt: skip

    def closed(self, step: Any, otherwise: Fraction) -> Fraction:
        return (
            otherwise if step["norm"] is None else min(otherwise, Fraction(self.tape[step["norm"]]))
        )

    def map(self, step: Any, tensors: list[Derived]) -> Derived:
        source, item = tensors[step["inputs"][0]], step["array"]
        factor = Fraction(float.fromhex(step["factor"]))
        if item is not None:
            entries = [abs(Fraction(v)) for v in self.arrays[item["ref"]["array"]].tolist()]
            entries = [1 / v for v in entries] if item["inverse"] else entries
            factor *= max(entries) if step["largest"] else length(entries)
        shift = self.shifts(step["shifts"])
        if step["before"] is not None:
            shift += factor * self.shifts([step["before"]])
        size = factor * source.size + Line(shift)
        self.sizes.append(size)
        made = Line()
        if step["terms"]:
            made = self.gamma(step["terms"] + 8) * size + self.underflow(step)
        kept = step["diagonal"] and source.pending < MAX_PENDING - 1
        total = factor * source.shift + shift
        return Derived(
            self.unit, source.base_error, source.base_size,
            self.closed(step, factor * source.norm), total,
            factor * (source.local if kept else source.rounding) + made,
            step["rounded"] + (source.pending if kept else 0),
            (factor * source.pending_shift if kept else 0) + step["rounded"] * total,
        )  # fmt: skip

    def function(self, step: Any, tensors: list[Derived]) -> Derived:
        (source,) = (tensors[i] for i in step["inputs"])
        constant, value, argument, absolute, zero = (
            Fraction(float.fromhex(step[k]))
            for k in ("constant", "value", "argument", "absolute", "zero")
        )
        if step["slope"] is not None:
            slope = abs(self.arrays[step["slope"]["array"]]).max()
            constant = max(constant, Fraction(float(slope)))
        size = constant * source.size + Line(zero)
        self.sizes.append(size)
        entries = root(Fraction(step["entries"]))
        u = Fraction(1, 2**52)
        made = u * (value * size + argument * source.size + Line(absolute * entries))
        if step["rounded"]:
            made = made + self.unit * (size + made)
        if step["rounded"] or value or argument or absolute:
            made = made + self.underflow(step)
        return fresh(self.unit, constant * source.error + made,
                     constant * source.size + Line(zero) + made)  # fmt: skip

    def add(self, step: Any, tensors: list[Derived]) -> Derived:
        sources = [tensors[i] for i in step["inputs"]]
        size, error = Line(), Line()
        for source in sources:
            size, error = size + source.size, error + source.error
        self.sizes.append(size)
        made = self.gamma(step["terms"] + 8) * size + self.underflow(step)
        if step["fresh"]:
            stored = made + self.unit * (size + made)
            return fresh(self.unit, error + stored, size + stored)
        local, shift = made, sum((s.shift for s in sources), ZERO)
        for source in sources:
            local = local + source.rounding
        first = sources[0]
        norm = self.closed(step, sum((s.norm for s in sources), ZERO))
        return Derived(self.unit, first.base_error, first.base_size, norm, shift, local, 1, shift)

    def join(self, step: Any, tensors: list[Derived]) -> Derived:
        sources = [tensors[i] for i in step["inputs"]]
        if step["fresh"]:
            error, size = Line(), Line()
            for source in sources:
                error, size = error.hypot(source.error), size.hypot(source.size)
            return fresh(self.unit, error, size + Line(self.shifts(step["shifts"])))
        local, first = Line(), sources[0]
        for source in sources:
            local = local.hypot(source.rounding)
        norm = self.closed(step, root(sum((s.norm**2 for s in sources), ZERO)))
        shift = root(sum((s.shift**2 for s in sources), ZERO))
        return Derived(self.unit, first.base_error, first.base_size, norm, shift, local)

    def slice(self, step: Any, tensors: list[Derived]) -> Derived:
        (source,) = (tensors[i] for i in step["inputs"])
        return fresh(self.unit, source.error, source.size)

    def run(self, program: Any, entries: int, input_range: tuple[float, float]) -> list[Any]:
        """Lengths of features, logits and both, and the largest radius."""
        reach = root(Fraction(entries)) * max(abs(Fraction(v)) for v in input_range)
        tensors = [fresh(self.unit, Line(), Line(reach, Fraction(1)))]
        self.sizes.append(tensors[0].size)
        features = None
        for i, step in enumerate(program["steps"][1:], 1):
            if i == program["head"]:
                below = step["inputs"][0]
                features = tensors[below].error
                tensors[below] = fresh(self.unit, Line(), tensors[below].size)
            tensors.append(getattr(self, step["op"])(step, tensors))
            self.sizes.append(tensors[-1].size)
        last = tensors[-1]
        limit = Fraction(self.profile.largest) * Fraction(HEADROOM)
        constant, slope = (max(getattr(s, k) for s in self.sizes) for k in ("constant", "slope"))
        room = max(ZERO, limit - constant) / slope
        if features is None:
            return [last.error, Line(), last.error, room]
        return [features, last.rounding, last.norm * features + last.rounding, room]


class Drawn:
    """A random program: lengths and factors are powers of two times something between 1 and 2.

    ``start`` is the power of two of the first factor: storage underflows behind a small one, and
    overflows behind a large one.
    """

    def __init__(self, seed: int, spread: int, start: int = 0) -> None:
        self.rng, self.spread = random.Random(seed), spread
        self.arrays: dict[str, np.ndarray] = {}
        self.tape: list[float] = []
        self.steps: list[dict[str, Any]] = [{"op": "input", "inputs": []}]
        self.bases = [0]
        if start:
            self.steps.append({**self.map(), "factor": (2.0**start).hex()})
            self.bases.append(0)
        for _ in range(self.rng.randint(1, 7)):
            self.steps.append(self.step())
        body = len(self.steps)
        self.head = None
        if self.rng.random() < 0.6:
            self.steps.append(self.map(diagonal=False))
            self.bases.append(self.bases[-1])
            self.head = body
            if self.rng.random() < 0.5:
                self.steps.append(self.map())

    def number(self) -> float:
        return (1 + self.rng.random()) * 2.0 ** self.rng.randint(-self.spread, self.spread)

    def array(self) -> dict[str, str]:
        name = f"a{len(self.arrays)}"
        count = self.rng.randint(1, 4)
        self.arrays[name] = np.array(
            [self.number() * self.rng.choice((1, -1)) for _ in range(count)]
        )
        return {"array": name}

    def sum_of(self, chance: float) -> list[Any]:
        return [(self.array(), self.number().hex()) for _ in range(2) if self.rng.random() < chance]

    def norm(self) -> int | None:
        if self.rng.random() < 0.7:
            return None
        self.tape.append(self.number())
        return len(self.tape) - 1

    def step(self) -> dict[str, Any]:
        kind = self.rng.choice((self.map, self.map, self.map, self.function, self.add, self.join,
                                self.slice))  # fmt: skip
        found = kind()
        ends = found["op"] in ("function", "slice") or found.get("fresh", False)
        self.bases.append(len(self.steps) if ends else self.bases[found["inputs"][0]])
        return found

    @property
    def common(self) -> dict[str, Any]:
        return {"inputs": [len(self.steps) - 1], "entries": self.rng.randint(1, 9),
                "norm": self.norm()}  # fmt: skip

    def map(self, diagonal: bool | None = None) -> dict[str, Any]:
        choice = self.rng.random
        item = None
        if choice() < 0.6:
            item = {"ref": self.array(), "inverse": choice() < 0.3}
        return {
            "op": "map", "factor": self.number().hex(), "array": item, "largest": choice() < 0.5,
            "shifts": self.sum_of(0.4),
            "before": (self.array(), self.number().hex()) if choice() < 0.3 else None,
            "diagonal": choice() < 0.6 if diagonal is None else diagonal,
            "terms": self.rng.choice((0, 1, 30)), "rounded": self.rng.choice((0, 1, 1, 2)),
            **self.common,
        }  # fmt: skip

    def function(self) -> dict[str, Any]:
        def some() -> str:
            return (self.number() if self.rng.random() < 0.5 else 0.0).hex()

        return {
            "op": "function", "constant": self.number().hex(),
            "slope": self.array() if self.rng.random() < 0.3 else None,
            "value": some(), "argument": some(), "absolute": some(), "zero": some(),
            "rounded": self.rng.choice((0, 1)), **self.common,
        }  # fmt: skip

    def sources(self) -> tuple[list[int], bool]:
        last = len(self.steps) - 1
        same = [i for i, b in enumerate(self.bases) if b == self.bases[last]]
        if self.rng.random() < 0.6:
            return [last, *self.rng.sample(same, min(len(same), 1))], False
        return [last, self.rng.randrange(last + 1)], True

    def add(self) -> dict[str, Any]:
        inputs, ends = self.sources()
        return {"op": "add", "terms": self.rng.choice((2, 3)), "fresh": ends, **self.common,
                "inputs": inputs}  # fmt: skip

    def join(self) -> dict[str, Any]:
        inputs, ends = self.sources()
        shifts = self.sum_of(0.4) if ends else []
        return {"op": "join", "shifts": shifts, "fresh": ends, **self.common, "inputs": inputs}

    def slice(self) -> dict[str, Any]:
        return {"op": "slice", **self.common}


@pytest.mark.parametrize(("spread", "start"), [(0, 0), (3, 0), (30, 0), (1, -145), (1, 128)])
@pytest.mark.parametrize("profile", PROFILES_TRIED, ids=lambda p: p.name)
def test_the_recursion_covers_its_derivation(profile: Profile, spread: int, start: int) -> None:
    for seed in range(40):
        drawn = Drawn(seed, spread, start)
        program = {"head": drawn.head, "steps": drawn.steps}
        low, high = -drawn.number(), drawn.number()
        found = execution_error(program, drawn.arrays, drawn.tape, profile, entries=7,
                                input_range=(low, high))  # fmt: skip
        exact = Derivation(drawn.arrays, drawn.tape, profile).run(program, 7, (low, high))
        for line, given in zip(exact, (found.features, found.logits, found.whole), strict=False):
            assert line.below(given), (seed, line, given)
        assert Fraction(found.largest_radius) <= exact[3], seed
        assert exact[3] <= Fraction(found.largest_radius) * NEAR


@pytest.mark.parametrize(("spread", "start"), [(0, 0), (3, 0), (30, 0), (1, -145), (1, 128)])
@pytest.mark.parametrize("semantics", check_execution.PROFILES)
def test_the_checkers_recursion_covers_the_derivation(
    semantics: str, spread: int, start: int
) -> None:
    profile = PROFILES[semantics.removeprefix("executed(").removesuffix(")")]
    assert check_execution.PROFILES[semantics] == (profile.unit, profile.underflow, profile.largest)
    for seed in range(40):
        drawn = Drawn(seed, spread, start)
        program = {"head": drawn.head, "steps": drawn.steps}
        (low, high), arrays = (-drawn.number(), drawn.number()), drawn.arrays

        get = check.Weights(arrays).get
        made = check_execution.Recursion(
            check_execution.PROFILES[semantics], get, drawn.tape, check.length
        )
        found = made.run(program, math.sqrt(7) * max(-low, high), drawn.head is not None)
        derivation = Derivation(arrays, drawn.tape, profile)
        exact = derivation.run(program, 7, (low, high))
        peak = Line(*(max(getattr(s, k) for s in derivation.sizes) for k in ("constant", "slope")))
        for line, given in zip((exact[0], exact[1], peak), (*found, made.peak), strict=True):
            constant, slope = (Fraction(float(v)) * Fraction(check_execution.SAFE) for v in given)
            assert line.constant <= constant <= line.constant * LOOSER + LESS, seed
            assert line.slope <= slope <= line.slope * LOOSER + LESS, seed


@pytest.mark.parametrize("semantics", check_execution.PROFILES)
@pytest.mark.parametrize("start", [0, 110])
def test_the_checkers_drift_is_that_of_two_logits(semantics: str, start: int) -> None:
    """``P e_h(r) + sqrt(2) |l|(r)``, and no bound where a size at that radius overflows."""
    profile = PROFILES[semantics.removeprefix("executed(").removesuffix(")")]
    away, radius = np.array([0.0, 0.75, 2.0]), np.array([[1e-3], [1.0], [2.0**14], [2.0**1020]])
    overflowed = 0
    for seed in range(20):
        drawn = Drawn(seed, 1, start)
        program = {"head": drawn.head, "steps": drawn.steps}
        low, high, arrays = -drawn.number(), drawn.number(), drawn.arrays
        header = {"semantics": semantics, "assumptions": ["A1: x", "A6: y"],
                  "input_range": [low.hex(), high.hex()],
                  "network": {"input": [7], "executed": program, "head": drawn.head}}  # fmt: skip

        get = check.Weights(arrays).get
        with np.errstate(all="ignore"):
            found = check_execution.drift(header, get, drawn.tape, check.length)(away, radius)
        derivation = Derivation(arrays, drawn.tape, profile)
        features, rest, *_ = derivation.run(program, 7, (low, high))
        for row, (r,) in zip(found.tolist(), radius.tolist(), strict=True):
            peak = max(size.constant + Fraction(r) * size.slope for size in derivation.sizes)
            if peak > Fraction(profile.largest):
                assert row == [math.inf] * 3
                overflowed += 1
                continue
            for far, value in zip(away.tolist(), row, strict=True):
                least = Fraction(far) * (features.constant + Fraction(r) * features.slope)
                least += ROOT2_DOWN * (rest.constant + Fraction(r) * rest.slope)
                assert value == math.inf or least <= Fraction(value) <= least * LOOSER + LESS
    assert overflowed > 0


def test_roundings_to_storage_have_to_be_assumed() -> None:
    program = {"head": None, "steps": [{"op": "input", "inputs": []}]}
    header = {"semantics": "executed(fp32a64)", "assumptions": ["A1: x", "A5: y"],
              "input_range": [(0.0).hex(), (1.0).hex()],
              "network": {"input": [3], "executed": program, "head": None}}  # fmt: skip
    with pytest.raises(ValueError, match="assumed"):
        check_execution.drift(header, None, [], check.length)
    check_execution.drift({**header, "semantics": "executed(fp64)"}, None, [], check.length)
    check_execution.drift({**header, "assumptions": ["A6: y"]}, None, [], check.length)


@pytest.mark.parametrize("kind", ["add", "join"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0, 1)])
def test_linear_joins_of_several_bases_are_refused(kind: str, order: tuple[int, ...]) -> None:
    common = {"entries": 3, "norm": None}
    function = {"op": "function", "inputs": [0], "slope": None, "rounded": 1, **common}
    function |= {k: (1.0).hex() for k in ("constant", "value", "argument", "absolute", "zero")}
    last = {"op": kind, "inputs": list(order), "fresh": False, "terms": 2, "shifts": [], **common}
    program = {"head": None, "steps": [{"op": "input", "inputs": []}, function, last]}
    with pytest.raises(ValueError, match="bases"):
        execution_error(program, {}, [], PROFILES["fp64"], entries=3, input_range=(0.0, 1.0))
    checker = check_execution.Recursion(
        check_execution.PROFILES["executed(fp64)"], None, [], check.length
    )
    with pytest.raises(ValueError, match="bases"):
        checker.run(program, 1.0, False)
