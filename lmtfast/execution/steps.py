# SPDX-License-Identifier: MIT
"""A traced program as the steps that the error recursion reads: what each call scales, shifts and
rounds.

Steps refer to earlier ones by position; step 0 is the input. Kinds, with their details:

* ``map``, a linear call with a shift: ``factor`` times the length of ``array`` (``largest``: its
  largest entry; no array: 1) bounds the norm of the map of absolute values; ``diagonal`` maps act
  entry by entry or copy; ``terms`` counts the roundings of one entry in float64, ``before`` is
  subtracted first, ``shifts`` are added: (array, factor of its length).
* ``function``, a nonlinear call: its Lipschitz ``constant`` (or the learned ``slope``), the length
  of its value ``zero`` at the origin, and its own accuracy in units of 2^-52.
* ``add``, ``join`` (concatenation, entrywise extremes) and ``slice``; ``fresh`` says that linearity
  ends there.

``norm`` indexes the tape: the proved norm of the linear map from the last fresh tensor to this one.
``rounded`` counts roundings into storage, ``entries`` the result's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lmtfast.builder import Base, Expression, Value
from lmtfast.enclosure import ERROR_RULES, Enclosed, ErrorCall
from lmtfast.enclosure.elementwise import ACCURACY, SELECTIONS, accuracy
from lmtfast.enclosure.interpreter import first_value
from lmtfast.enclosure.joining import CONCATENATIONS, EXTREMA, SUMS
from lmtfast.enclosure.linear import (
    BATCH_NORMS,
    CASTS,
    CONVOLUTIONS,
    FACTORS,
    PADS,
    PRODUCTS,
    SLICES,
    TRANSPOSED,
)  # fmt: skip
from lmtfast.enclosure.registry import length_up
from lmtfast.execution.recorder import SourceRecorder
from lmtfast.execution.runner import Execution
from lmtfast.graph import (
    Average,
    ChannelScale,
    Conv,
    Copy,
    Instruction,
    Linear,
    Scale,
    Shape,
    WeightRef,
    number,
)  # fmt: skip
from lmtfast.rules.copying import COPYING, IDENTITIES
from lmtfast.rules.pooling import AVERAGES
from lmtfast.rules.registry import REF_TYPES
from lmtfast.verified.rounding import mul_up, sqrt_up
from lmtfast.weights import on_host

KNOWN = {
    *CONVOLUTIONS, *TRANSPOSED, *PRODUCTS, "aten.linear.default", "aten.addmm.default",
    *BATCH_NORMS, *FACTORS, *AVERAGES, *COPYING, *SLICES, *PADS, *IDENTITIES, *CASTS, *SUMS,
    *CONCATENATIONS, *EXTREMA, *SELECTIONS, *ACCURACY,
}  # fmt: skip
LINEAR = (Conv, Linear, Scale, Average)
# Exact in float64, but their limits need not be numbers of the storage.
LIMITED = (
    "aten.hardtanh.default", "aten.clamp.default", "aten.clamp_min.default",
    "aten.clamp_max.default",
)  # fmt: skip
# Float64 roundings of an entry, generously: batch norm (gain, difference, product, sum), a factor
# (a reciprocal, a product) and a sum of two scaled terms.
NORM_TERMS, FACTOR_TERMS, SUM_TERMS = 32, 8, 8


@dataclass(frozen=True)
class Step:
    """One step; ``details`` by the names in this module's docstring."""

    op: str
    inputs: tuple[int, ...]
    details: Mapping[str, Any]


@dataclass(frozen=True)
class ExecutedProgram:
    """Steps of a program.

    Attributes:
        steps: In order; the last is the output.
        head: The step that is the final linear layer, or None.
    """

    steps: tuple[Step, ...]
    head: int | None


class _StepWriter:
    def __init__(self, execution: Execution) -> None:
        assert isinstance(execution.builder, SourceRecorder)
        self.execution, self.recorder = execution, execution.builder
        self.steps: list[Step] = [Step("input", (), {})]
        self.expressions: list[Expression | Base | None] = [execution.builder.input.expression]
        self.at: dict[torch.fx.Node, Any] = {}

    def write(self) -> ExecutedProgram:
        for node, value in self.execution.walk.env.items():
            if node.op == "placeholder" and isinstance(value, Value):
                self.at[node] = 0
        for node, call in self.execution.calls():
            if call.target not in KNOWN:
                raise call.refused("what it rounds under a profile is not known")
            self._write_call(node, call)
        (output,) = next(n for n in self.execution.program.graph.nodes if n.op == "output").args[0]
        last = self._place(output)
        return self._closed(last)

    def _closed(self, last: int) -> ExecutedProgram:
        """Steps up to the output, with the tape's norms."""
        graph, head, at = self.execution.graph, None, last
        if graph.head is not None:
            while not (self.steps[at].op == "map" and not self.steps[at].details["diagonal"]):
                (at,) = self.steps[at].inputs
            head = at
        steps = []
        for i, (step, expression) in enumerate(
            zip(self.steps[: last + 1], self.expressions, strict=False)
        ):
            norm = self.recorder._closed.get(id(expression), (None, None))[1]
            if head is not None and i >= head:
                sigma = Instruction("sigma", (graph.head,))
                norm = graph.tape.index(sigma) if i == last else None
            linear = step.op in ("map", "add", "join") and not step.details.get("fresh")
            steps.append(replace(step, details={**step.details, "norm": norm}) if linear else step)
        return ExecutedProgram(tuple(steps), head)

    def _place(self, node: torch.fx.Node) -> int:
        """Step of a traced tensor; results taken from several are placed when first read."""
        if node not in self.at:
            source, index = node.args[0], node.args[1]
            self.at[node] = self.at[source][index]  # type: ignore[index]
        found = self.at[node]
        return int(found[0] if isinstance(found, tuple) else found)

    def _emit(
        self, op: str, inputs: Sequence[int], expression: Expression | Base | None, **details: Any
    ) -> int:
        self.steps.append(Step(op, tuple(inputs), details))
        self.expressions.append(expression)
        return len(self.steps) - 1

    # -- one call ----------------------------------------------------------------------------------

    def _write_call(self, node: torch.fx.Node, call: ErrorCall) -> None:
        result, known = self.execution.walk.env[node], self._known(node)
        if isinstance(result, tuple) and call.target in SLICES:
            self.at[node] = tuple(
                self._locate(v.expression, known, call) if isinstance(v, Value) else None
                for v in result
            )
            return
        value = first_value(result)
        assert value is not None
        expression = value.expression
        with_constant = call.target in EXTREMA and not self._several(call)
        if call.target in (*ACCURACY, *SELECTIONS) or with_constant:
            place = self._function(node, call, value)
        elif call.target in (*EXTREMA, *CONCATENATIONS, *SUMS) and self._several(call):
            place = self._joined(node, call, value)
        elif id(expression) not in known and isinstance(getattr(expression, "op", None), LINEAR):
            place = self._linear(node, call, expression)
        else:
            place = self._locate(expression, known, call)
            if shifts := self._shifts(call, value.shape):
                place = self._emit(
                    "map", (place,), expression, factor=1.0, array=None, largest=False,
                    diagonal=True, terms=SUM_TERMS, before=None, shifts=shifts, rounded=1,
                    entries=math.prod(value.shape),
                )  # fmt: skip
        self.at[node] = (place, None) if isinstance(result, tuple) else place

    def _several(self, call: ErrorCall) -> bool:
        return call.target in CONCATENATIONS or len(self._traced(call)) > 1

    @staticmethod
    def _traced(call: ErrorCall) -> list[torch.fx.Node]:
        """The traced arguments in order, also those in lists."""
        found: list[torch.fx.Node] = []
        for item in call.arguments.values():
            items = item if isinstance(item, list) else [item]
            found += [i for i in items if isinstance(i, torch.fx.Node)]
        return found

    def _value(self, node: torch.fx.Node) -> Value:
        value = first_value(self.execution.walk.env[node])
        assert value is not None
        return value

    def _known(self, node: torch.fx.Node) -> dict[int, int]:
        """Steps of a call's arguments by their expressions."""
        found: dict[int, int] = {}
        for source in node.all_input_nodes:
            if first_value(self.execution.walk.env.get(source)) is not None:
                found[id(self._value(source).expression)] = self._place(source)
        return found

    def _locate(self, item: Expression | Base, known: dict[int, int], call: ErrorCall) -> int:
        """The step of an expression that only moves, slices or scales what is known."""
        if id(item) in known:
            return known[id(item)]
        if isinstance(item, Base):
            source = self.recorder.sources.get(item)
            if source is None or source.kind != "slice":
                raise call.refused("it reads a tensor that is none of its arguments")
            parent = self._locate(source.values[0].expression, known, call)
            origin = item.origin
            span = [origin.axis, origin.start, origin.stop]
            place = self._emit("slice", (parent,), item, span=span)
        else:
            op = item.op
            if isinstance(op, Copy):
                factor, terms = sqrt_up(float(op.copies)), 0
            elif isinstance(op, Scale) and op.ref is None:
                factor, terms = abs(op.gain), FACTOR_TERMS
            else:
                raise call.refused("it does more than move entries")
            place = self._emit(
                "map", (self._locate(item.inputs[0], known, call),), item, factor=factor,
                array=None, largest=False, diagonal=True, terms=terms, before=None, shifts=[],
                rounded=0, entries=math.prod(item.shape),
            )  # fmt: skip
        known[id(item)] = place
        return place

    def _linear(self, node: torch.fx.Node, call: ErrorCall, expression: Any) -> int:
        op, entries = expression.op, math.prod(expression.shape)
        source = self._locate(expression.inputs[0], self._known(node), call)
        shifts = self._shifts(call, expression.shape)
        array: Any = None
        before, largest, rounded = None, False, 1
        if isinstance(op, (Conv, Linear)):
            taps = op.kernel if isinstance(op, Conv) else ()
            factor = mul_up(sqrt_up(float(math.prod(taps))), abs(op.gain))
            array, terms = ChannelScale(op.weight), self._terms(op)
        elif isinstance(op, Average):
            factor, terms = mul_up(op.norm, abs(op.gain)), math.prod(op.in_shape) + 2
        else:
            assert isinstance(op, Scale)
            factor, largest = abs(op.gain), True
            array = None if op.ref is None else ChannelScale(op.ref, op.inverse)
            exact = array is None and factor == 1.0 and not shifts
            terms, rounded = (0, 0) if exact else (FACTOR_TERMS, 1)
            if call.target in BATCH_NORMS:
                terms, mean = NORM_TERMS, call["running_mean"]
                before = (mean, _repeats(mean, self.execution, entries))
        return self._emit(
            "map", (source,), expression, factor=factor, array=array, largest=largest,
            diagonal=isinstance(op, Scale), terms=terms, before=before, shifts=shifts,
            rounded=rounded, entries=entries,
        )  # fmt: skip

    def _terms(self, op: Conv | Linear) -> int:
        if isinstance(op, Linear):
            return op.in_shape[-1] + 1
        shape = self.execution.weights[op.weight].shape
        inner = shape[0] // op.groups if op.transposed else shape[1]
        return inner * math.prod(op.kernel) + 1

    def _shifts(self, call: ErrorCall, shape: Shape) -> list[tuple[WeightRef, float]]:
        """Constants that the call adds, each with the root of how often it repeats an entry."""
        entries = math.prod(shape)
        found: list[Any] = []
        gain = 1.0
        if call.target == "aten.addmm.default":
            if (call["alpha"], call["beta"]) != (1, 1):
                raise call.refused(f"alpha={call['alpha']}, beta={call['beta']}")
            found = [call["self"]]
        elif call.target in SUMS:
            found, gain = [call["self"], call["other"]], max(1.0, abs(float(call["alpha"])))
        elif call.target in CONCATENATIONS:
            found = call["tensors"]
        elif call.target in PADS:
            found = [call.get("value")]
        elif call.get("bias") is not None:
            found = [call["bias"]]
        numbers = (float, int)
        refs = [number(float(i)) if isinstance(i, numbers) else i for i in found]
        return [
            (ref, mul_up(gain, _repeats(ref, self.execution, entries)))
            for ref, item in zip(refs, found, strict=True)
            if isinstance(ref, REF_TYPES) and not (isinstance(item, numbers) and item == 0)
        ]

    # -- joins and functions -----------------------------------------------------------------------

    def _joined(self, node: torch.fx.Node, call: ErrorCall, value: Value) -> int:
        traced = self._traced(call)
        fresh = value.expression is value.base
        parts: Sequence[Expression | Base]
        if isinstance(value.expression, Expression):
            parts = value.expression.inputs
        else:
            parts = [v.expression for v in self.recorder.sources[value.base].values]
        pair = self._value(traced[0]).pair if call.target in CONCATENATIONS else None
        joined = self.recorder.sources[value.base].values if fresh else ()
        if pair is not None and list(joined) == list(pair[1:]):
            inputs = self._sorted(traced)
            if len(inputs) == 1:
                return self._isometry(inputs[0], value)
        elif len(parts) != len(traced):
            raise call.refused("it joins other tensors than its arguments")
        else:
            inputs = []
            for argument, part in zip(traced, parts, strict=True):
                known = {id(self._value(argument).expression): self._place(argument)}
                inputs.append(self._locate(part, known, call))
        entries, op = math.prod(value.shape), "add" if call.target in SUMS else "join"
        shifts = [] if op == "add" or call.target in EXTREMA else self._shifts(call, value.shape)
        rounding = {"terms": SUM_TERMS, "rounded": 1} if op == "add" else {"shifts": shifts}
        parent = self._divided(inputs) if fresh and op == "join" and not shifts else None
        if parent is not None:
            return self._isometry(parent, value)
        return self._emit(op, inputs, value.expression, fresh=fresh, entries=entries, **rounding)

    def _isometry(self, parent: int, value: Value) -> int:
        """A step that moves no more than another does, and is exact."""
        return self._emit(
            "function", (parent,), value.expression, constant=1.0, slope=None, zero=0.0, value=0.0,
            argument=0.0, absolute=0.0, rounded=0, entries=math.prod(value.shape),
        )  # fmt: skip

    def _divided(self, inputs: Sequence[int]) -> int | None:
        """The step that all inputs are disjoint slices of, moved about at most: extremes and
        concatenations of such slices move no more than it does."""
        places, spans = set(), []
        for place in inputs:
            step = self.steps[place]
            while step.op == "map" and (step.details["factor"], step.details["terms"]) == (1.0, 0):
                step = self.steps[step.inputs[0]]
            if step.op != "slice":
                return None
            places.add((step.inputs[0], step.details["span"][0]))
            spans.append(step.details["span"][1:])
        spans.sort()
        apart = all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
        return next(iter(places))[0] if len(places) == 1 and apart else None

    def _sorted(self, traced: list[torch.fx.Node]) -> list[int]:
        """What a concatenation of max(a, b) and min(a, b) moves no more than: what the extremes
        read, where nothing was added to them."""
        places = [self._place(t) for t in traced]
        both = [self.steps[p] for p in places]
        plain = all(s.op in ("join", "function") for s in both)
        same = both[0].op == both[1].op and set(both[0].inputs) == set(both[1].inputs)
        return list(both[0].inputs) if plain and same else places

    def _function(self, node: torch.fx.Node, call: ErrorCall, value: Value) -> int:
        source = self.recorder.sources[value.base]
        if source.kind not in ("function", "slope") or value.expression is not value.base:
            raise call.refused("its Lipschitz rule is not that of a function")
        inputs = (self._locate(source.values[0].expression, self._known(node), call),)
        own = accuracy(call)
        constant = 1.0 if source.slope is not None else self.recorder.constants[value.base]
        return self._emit(
            "function", inputs, value.expression, constant=constant, slope=source.slope,
            zero=self._at_zero(node, own.exact), value=own.value, argument=own.argument,
            absolute=own.absolute, rounded=int(not own.exact or call.target in LIMITED),
            entries=math.prod(value.shape),
        )  # fmt: skip

    def _at_zero(self, node: torch.fx.Node, exact: bool) -> float:
        """Length of a function's value at the origin, rounded up."""
        env: dict[torch.fx.Node, Any] = {}
        for source in node.all_input_nodes:
            traced = first_value(self.execution.walk.env.get(source))
            if traced is None:
                item = self.execution.walk.env.get(source)
                env[source] = self.execution.constant(item, torch.zeros(1, dtype=torch.float64))
            else:
                zeros = torch.zeros((1, *traced.shape), dtype=torch.float64)
                env[source] = Enclosed(zeros, zeros, zeros.new_zeros(1), traced)
        call = self.execution.call(node, env)
        found = ERROR_RULES[call.target](call)
        found = found[0] if isinstance(found, tuple) else found
        if exact and not bool(found.value.any()):
            return 0.0
        return float(length_up(found.value.abs() + found.local)[0])


def _repeats(ref: WeightRef, execution: Execution, entries: int) -> float:
    """Root of how many entries of a result each entry of a constant reaches, rounded up."""
    count = max(1, execution.weights[ref].numel())
    return sqrt_up(float(-(-entries // count)))


def executed_program(execution: Execution) -> ExecutedProgram:
    """The steps of a program under a profile.

    Raises:
        NotCertifiedError: A call whose roundings under a profile are not known.

    Example:
        >>> from torch import nn
        >>> from lmtfast.profiles import get_profile
        >>> from lmtfast.tracing import trace_model
        >>> layer = nn.Linear(2, 2).eval()
        >>> execution = Execution(layer, trace_model(layer, (2,)), get_profile("fp64"))
        >>> [step.op for step in executed_program(execution).steps]
        ['input', 'map']
    """
    with torch.no_grad(), on_host():
        return _StepWriter(execution).write()
