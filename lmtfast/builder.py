# SPDX-License-Identifier: MIT
"""The algebra of traced values: grows linear regions and writes the tape.

A traced tensor is a :class:`Value`: a linear expression over a *base*, the last point where
linearity ended. A base knows its Lipschitz constant ``rel`` relative to an *origin*: the network's
input, or one slice of an earlier tensor. Branches over pairwise disjoint slices of one tensor may
then share its sensitivity (maximum) instead of adding it up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmtfast.folding import fold
from lmtfast.graph import (
    Average,
    BoundGraph,
    Conv,
    Copy,
    Instruction,
    Linear,
    Operator,
    Primitive,
    Region,
    RegionNode,
    Scale,
    Shape,
    Slope,
    WeightRef,
)  # fmt: skip


@dataclass(eq=False)
class Origin:
    """The input, or the entries ``start:stop`` of dimension ``axis`` of the tensor ``parent``."""

    parent: Value | None = None
    axis: int = 0
    start: int = 0
    stop: int = 0

    def depth(self) -> int:
        return 0 if self.parent is None else 1 + self.parent.base.origin.depth()


@dataclass(eq=False)
class Base:
    """A tensor at which a linear region starts: ``rel`` is a tape index, relative to ``origin``."""

    origin: Origin
    rel: int
    shape: Shape


@dataclass(eq=False)
class Expression:
    """A node of a linear expression: a primitive, ``"add"`` or ``"concat"`` over its inputs."""

    op: Primitive | str
    inputs: tuple[Expression | Base, ...]
    shape: Shape
    axis: int = 0


@dataclass(eq=False)
class Value:
    """A traced tensor. ``pair`` remembers ("maximum" | "minimum", a, b) for the MinMax pattern."""

    base: Base
    expression: Expression | Base
    pair: tuple[str, Value, Value] | None = field(default=None, repr=False)

    @property
    def shape(self) -> Shape:
        return self.expression.shape


class GraphBuilder:
    """Collects operators and tape while the rules walk the traced program."""

    def __init__(self, input_shape: Shape) -> None:
        self.operators: list[Operator] = []
        self.tape: list[Instruction] = []
        self.notes: list[tuple[str, str, float]] = []
        self._index: dict[Any, int] = {}
        self._closed: dict[int, tuple[Any, int]] = {}
        self._names: set[str] = set()
        self.input = self._from_base(Base(Origin(), self.constant(1.0), tuple(input_shape)))

    def _emit(self, op: str, *args: Any) -> int:
        key = Instruction(op, args)
        if key not in self._index:
            self._index[key] = len(self.tape)
            self.tape.append(key)
        return self._index[key]

    def constant(self, value: float) -> int:
        return self._emit("constant", float(value))

    def _is_one(self, index: int) -> bool:
        return self.tape[index] == Instruction("constant", (1.0,))

    def mul(self, a: int, b: int) -> int:
        if self._is_one(a):
            return b
        return a if self._is_one(b) else self._emit("mul", *sorted((a, b)))

    def reduce(self, op: str, terms: Sequence[int]) -> int:
        """Left fold of ``add``, ``hypot`` or ``max`` over tape indices."""
        result = terms[0]
        for term in terms[1:]:
            result = result if op == "max" and term == result else self._emit(op, result, term)
        return result

    @staticmethod
    def _from_base(base: Base) -> Value:
        return Value(base, base)

    def new_base(self, origin: Origin, rel: int, shape: Shape) -> Value:
        return self._from_base(Base(origin, rel, tuple(shape)))

    def linear(self, value: Value, primitive: Primitive) -> Value:
        """Append a linear primitive to a value's region."""
        if not isinstance(primitive, Primitive):
            raise TypeError(primitive)
        return Value(value.base, Expression(primitive, (value.expression,), primitive.out_shape))

    def rel(self, value: Value) -> int:
        """Close the value's region; its Lipschitz constant relative to the base's origin."""
        return self.mul(value.base.rel, self._norm(value))

    def nonlinear(
        self, value: Value, constant: float, shape: Shape, note: tuple[str, str]
    ) -> Value:
        """A map with a global Lipschitz constant: ends the region and starts a new base."""
        self.notes.append((*note, constant))
        rel = self.mul(self.rel(value), self.constant(constant))
        return self.new_base(value.base.origin, rel, shape)

    def learned_slope(self, value: Value, name: str, ref: WeightRef) -> Value:
        slope = Slope(self._unique(name), value.shape, value.shape, ref)
        rel = self.mul(self.rel(value), self._sigma(slope))
        return self.new_base(value.base.origin, rel, value.shape)

    def slice(self, value: Value, axis: int, start: int, stop: int) -> Value:
        """Entries ``start:stop`` of one dimension: a new origin, so disjoint slices can share."""
        if start == 0 and stop == value.shape[axis]:
            return value
        shape = (*value.shape[:axis], stop - start, *value.shape[axis + 1 :])
        return self.new_base(Origin(value, axis, start, stop), self.constant(1.0), shape)

    def add(self, values: Sequence[Value]) -> Value:
        """Sum. Over one base it stays linear; otherwise the constants add up."""
        if all(v.base is values[0].base for v in values):
            expression = Expression("add", tuple(v.expression for v in values), values[0].shape)
            return Value(values[0].base, expression)
        origin, rels = self._common(values)
        return self.new_base(origin, self.reduce("add", rels), values[0].shape)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Concatenation: linear over one base, maximum over disjoint slices, else root of sum."""
        length = sum(v.shape[axis] for v in values)
        shape = (*values[0].shape[:axis], length, *values[0].shape[axis + 1 :])
        rivals = self._sorted_pair(values)
        if rivals is not None:
            joint = self.joint(rivals)
            return self.new_base(joint[0], joint[1], shape)
        if all(v.base is values[0].base for v in values):
            parts = tuple(v.expression for v in values)
            return Value(values[0].base, Expression("concat", parts, shape, axis))
        origin, rel = self.joint(values)
        return self.new_base(origin, rel, shape)

    def joint(self, values: Sequence[Value]) -> tuple[Origin, int]:
        """Constant of the map to all values at once, with its origin."""
        if self._disjoint(values):
            parent = values[0].base.origin.parent
            assert parent is not None
            largest = self.reduce("max", [self.rel(v) for v in values])
            return parent.base.origin, self.mul(self.rel(parent), largest)
        origin, rels = self._common(values)
        return origin, self.reduce("hypot", rels)

    def extremum(self, kind: str, a: Value, b: Value, name: str) -> Value:
        """Entrywise maximum or minimum of two tensors: no steeper than the pair of them."""
        origin, rel = self.joint((a, b))
        self.notes.append((name, kind, 1.0))
        result = self.new_base(origin, rel, a.shape)
        result.pair = (kind, a, b)
        return result

    @staticmethod
    def _sorted_pair(values: Sequence[Value]) -> tuple[Value, Value] | None:
        # Concatenating max(a, b) and min(a, b) only sorts each pair: 1-Lipschitz in (a, b) jointly.
        pairs = [v.pair for v in values]
        if len(pairs) != 2 or pairs[0] is None or pairs[1] is None:
            return None
        (kind_1, a, b), (kind_2, c, d) = pairs[0], pairs[1]
        return (a, b) if kind_1 != kind_2 and {id(a), id(b)} == {id(c), id(d)} else None

    @staticmethod
    def _disjoint(values: Sequence[Value]) -> bool:
        origins = [v.base.origin for v in values]
        first = origins[0]
        if first.parent is None or any(
            o.parent is not first.parent or o.axis != first.axis for o in origins
        ):
            return False
        spans = sorted((o.start, o.stop) for o in origins)
        return all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))

    def _common(self, values: Sequence[Value]) -> tuple[Origin, list[int]]:
        # Lift every constant to the nearest origin all values share.
        states = [(v.base.origin, self.rel(v)) for v in values]
        while any(origin is not states[0][0] for origin, _ in states):
            deepest = max(origin.depth() for origin, _ in states)
            lifted = []
            for origin, rel in states:
                if origin.depth() == deepest and origin.parent is not None:
                    parent = origin.parent
                    lifted.append((parent.base.origin, self.mul(rel, self.rel(parent))))
                else:
                    lifted.append((origin, rel))
            states = lifted
        return states[0][0], [rel for _, rel in states]

    def _sigma(self, operator: Operator) -> int:
        self.operators.append(operator)
        return self._emit("sigma", len(self.operators) - 1)

    def _norm(self, value: Value) -> int:
        key = id(value.expression)
        if key not in self._closed:
            # The expression is kept alive so that its id stays its own.
            self._closed[key] = (value.expression, self._close(value))
        return self._closed[key][1]

    def _close(self, value: Value) -> int:
        if value.expression is value.base:
            return self.constant(1.0)
        region = fold(_region(value))
        known = region_norm(region)
        if known is not None:
            if region.nodes:
                self.notes.append((region.name, region.kind, known))
            return self.constant(known)
        key = ("region", region)
        if key not in self._index:
            named = Region(
                self._unique(region.name), region.in_shape, region.out_shape, region.nodes
            )
            self._index[key] = self._sigma(named)
        return self._index[key]

    def _unique(self, name: str) -> str:
        # A module may itself be called "a#2".
        name = name or "model"
        numbered = (name if i == 1 else f"{name}#{i}" for i in itertools.count(1))
        unique = next(n for n in numbered if n not in self._names)
        self._names.add(unique)
        return unique

    def finish(self, output: Value) -> BoundGraph:
        """Close the network at its output, splitting off a final Linear as the head."""
        head: int | None = None
        top = output.expression
        body = output
        while isinstance(top, Expression) and _keeps_classes(top):
            if isinstance(top.op, Linear) and len(top.shape) == 1 and len(top.op.in_shape) == 1:
                below = top.inputs[0]
                body = Value(output.base, below)
                # The scales that follow the head belong to its rows.
                above = Value(
                    cut := Base(Origin(), 0, below.shape), _rebase(output.expression, below, cut)
                )
                region = fold(_region(above))
                if isinstance(region.primitive, Linear):
                    key = ("region", region)
                    if key not in self._index:
                        name = self._unique(region.name)
                        named = Region(name, region.in_shape, region.out_shape, region.nodes)
                        self._index[key] = self._sigma(named)
                    head = self.tape[self._index[key]].args[0]
                break
            top = top.inputs[0]
        if head is None:
            body = output
        features = self._absolute(body)
        total = features if head is None else self.mul(features, self._emit("sigma", head))
        return BoundGraph(
            self.input.shape, output.shape, tuple(self.operators), tuple(self.tape),
            features, total, head, tuple(self.notes),
        )  # fmt: skip

    def _absolute(self, value: Value) -> int:
        rel, origin = self.rel(value), value.base.origin
        while origin.parent is not None:
            rel = self.mul(rel, self.rel(origin.parent))
            origin = origin.parent.base.origin
        return rel


def _rebase(expression: Expression | Base, cut: Expression | Base, base: Base) -> Expression | Base:
    if expression is cut:
        return base
    assert isinstance(expression, Expression)
    inputs = tuple(_rebase(i, cut, base) for i in expression.inputs)
    return Expression(expression.op, inputs, expression.shape, expression.axis)


def _region(value: Value) -> Region:
    """The expression as a program in topological order."""
    order: list[Expression] = []
    position: dict[int, int] = {id(value.base): -1}
    stack: list[tuple[Expression | Base, bool]] = [(value.expression, False)]
    while stack:
        node, expanded = stack.pop()
        if id(node) in position or isinstance(node, Base):
            continue
        if expanded:
            position[id(node)] = len(order)
            order.append(node)
        else:
            stack.append((node, True))
            stack.extend((i, False) for i in node.inputs)
    nodes = tuple(RegionNode(e.op, tuple(position[id(i)] for i in e.inputs), e.axis) for e in order)
    names = [n.op.name for n in nodes if isinstance(n.op, Primitive) and _weighty(n.op)]
    names = names or [n.op.name for n in nodes if isinstance(n.op, Primitive)]
    name = "+".join(dict.fromkeys(filter(None, names)))
    return Region(name, value.base.shape, value.expression.shape, nodes)


def _keeps_classes(expression: Expression) -> bool:
    # What may stand between the head's Linear and the logits without reordering the classes.
    op = expression.op
    return isinstance(op, (Linear, Scale)) or (isinstance(op, Copy) and op.ordered)


def _weighty(op: Primitive) -> bool:
    return isinstance(op, (Conv, Linear))


def region_norm(region: Region) -> float | None:
    """The norm of a region without weights that has a closed form, rounded up, else None."""
    if not region.nodes:
        return 1.0
    op = region.primitive
    if isinstance(op, Copy):
        return math.nextafter(math.sqrt(op.copies), math.inf) if op.copies > 1 else float(op.copies)
    if isinstance(op, Average):
        return op.norm if abs(op.gain) == 1.0 else math.nextafter(op.norm * abs(op.gain), math.inf)
    if isinstance(op, Scale) and op.ref is None:
        return abs(op.gain)
    return None
