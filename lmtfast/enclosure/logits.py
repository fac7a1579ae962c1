# SPDX-License-Identifier: MIT
"""Runs a traced program in float64 with an error bound beside every tensor."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmtfast.builder import Base, Expression, GraphBuilder, Value
from lmtfast.composing import compose_up
from lmtfast.enclosure.registry import ERROR_RULES, Enclosed, ErrorCall, outward
from lmtfast.errors import NotCertifiedError
from lmtfast.exporting import ASSERTIONS
from lmtfast.graph import BATCH, Copy, Region, Scale, WeightRef
from lmtfast.rules.registry import REF_TYPES
from lmtfast.tracing import ProgramWalk, TracedModel, module_name
from lmtfast.verified.region import operator_norm_upper
from lmtfast.verified.rounding import mul_up
from lmtfast.weights import Weights, laid_out, named_tensors, on_host

INTEGERS = (torch.int64, torch.uint64)


class _Recorder(GraphBuilder):
    """A graph builder that remembers the constant of every nonlinear call, by the base it makes."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.constants: dict[Base, float] = {}

    def nonlinear(
        self, value: Value, constant: float, shape: tuple[int, ...], note: tuple[str, str]
    ) -> Value:
        result = super().nonlinear(value, constant, shape, note)
        self.constants[result.base] = constant
        return result


class LogitEnclosure:
    """Encloses the logits of the exact real function that a model's stored parameters define.

    Args:
        model: The model that was traced.
        traced: Its program.
        norms: Upper bounds of the operators' norms, by name, as in ``LipschitzBound.per_operator``.
            With them, errors travel from layer to layer as L2 lengths, and the enclosure stays
            tight in deep networks; without them, entry by entry.
        tensors: Parameters and buffers to use instead of the model's present ones.

    Raises:
        NotCertifiedError: A call has no error rule, or a module has a Lipschitz rule of its own.

    Guarantee:
        Rigorous under assumptions A1 to A5 of the certificate, and as good as ``norms``. Weights
        that parametrizations derive are taken as float64 computes them.

    Source:
        Higham (2002), Accuracy and Stability of Numerical Algorithms, 2nd edition, chapter 3.

    Example:
        >>> import torch
        >>> from lmtfast.tracing import trace_model
        >>> layer = torch.nn.Linear(2, 2).eval()
        >>> enclosure = LogitEnclosure(layer, trace_model(layer, (2,)))
        >>> value, error = enclosure(torch.ones(1, 2))
        >>> bool((error < 1e-12).all())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        traced: TracedModel,
        *,
        norms: Mapping[str, float] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        tensors = named_tensors(model) if tensors is None else tensors
        self.program, self.graph = traced.program, traced.graph
        self._builder = _Recorder(traced.graph.input_shape)
        shape = traced.graph.input_shape
        self._walk = ProgramWalk(model, traced.program, shape, self._builder)
        with on_host():
            self._walk.run()
        if self._walk.opaque:
            path = next(iter(self._walk.opaque.values()))[0]
            raise NotCertifiedError(
                "operations whose rounding error is known",
                "a module with a Lipschitz rule of its own",
                repr(path),
                "replace the module by built-in layers: its rule says nothing of rounding",
            )
        # On the CPU, as for the bound: derived weights are then the same numbers on every device.
        self._weights = Weights({n: laid_out(t) for n, t in tensors.items()}, dtype=torch.float64)
        self._placed: dict[tuple[WeightRef, torch.device], Tensor] = {}
        self._norms = None if norms is None else dict(norms)
        self._known: dict[int, float] = {}
        self._last_use = self._lifetimes()
        if self._norms is not None:
            self._read_tape()
        self._check_rules()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and error bounds of a batch. ``(N, ...)`` to two ``(N, K)``, float64.

        An error of infinity means that nothing is known, for example after an overflow.
        """
        with torch.no_grad(), on_host(), _plain_arithmetic(x.device):
            return self._run(x.detach().to(torch.float64).contiguous())

    @property
    def references(self) -> tuple[WeightRef, ...]:
        """Every tensor the program reads, derived ones included."""
        found = self._walk.env.values()
        return tuple(dict.fromkeys(r for r in found if isinstance(r, REF_TYPES)))

    # -- norms -----------------------------------------------------------------------------------

    def _read_tape(self) -> None:
        """Norms of every expression the graph closed, and of those a norm-preserving copy away."""
        for expression, index in self._builder._closed.values():
            norm = self._tape_value(index)
            below: Expression | Base = expression
            while True:
                self._known.setdefault(id(below), norm)
                if not isinstance(below, Expression) or not _isometric(below):
                    break
                below = below.inputs[0]

    def _tape_value(self, index: int) -> float:
        assert self._norms is not None
        for known in self._builder.operators:
            if known.name not in self._norms:
                self._norms[known.name] = operator_norm_upper(known, self._weights).upper
        sigmas = [self._norms[o.name] for o in self._builder.operators]
        return compose_up(self._builder.tape[: index + 1], sigmas)[index]

    def _region_norm(self, value: Value) -> float:
        if value.expression is value.base:
            return 1.0
        if id(value.expression) not in self._known:
            # A tensor the graph closed only together with what follows it.
            self._known[id(value.expression)] = self._tape_value(self._builder._norm(value))
        return self._known[id(value.expression)]

    def _output_norm(self, value: Value) -> float:
        """Norm of the last region: the head's times that of what lies between it and its base."""
        below: Expression | Base = value.expression
        while (
            isinstance(below, Expression)
            and id(below) not in self._known
            and len(below.inputs) == 1
        ):
            below = below.inputs[0]
        head = self.graph.head
        if (
            below is value.expression
            or head is None
            or not isinstance(self.graph.operators[head], Region)
        ):
            return self._region_norm(value)
        inner = 1.0 if isinstance(below, Base) else self._known[id(below)]
        assert self._norms is not None
        return mul_up(self._norms[self.graph.operators[head].name], inner)

    # -- the program -------------------------------------------------------------------------------

    def _lifetimes(self) -> dict[torch.fx.Node, list[torch.fx.Node]]:
        last: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in self.program.graph.nodes:
            for source in node.all_input_nodes:
                last[source] = node
        ends: dict[torch.fx.Node, list[torch.fx.Node]] = {}
        for source, node in last.items():
            ends.setdefault(node, []).append(source)
        return ends

    def _check_rules(self) -> None:
        for node in self.program.graph.nodes:
            if node.op == "call_function" and _traced(self._walk.env.get(node)) is not None:
                target = str(node.target)
                if node.target is not operator.getitem and target not in ERROR_RULES:
                    raise self._call(node, {}, 1).refused("there is no error rule for it")

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        env: dict[torch.fx.Node, Any] = {}
        for node in self.program.graph.nodes:
            if node.op == "output":
                (result,) = node.args[0]
                return self._finish(env[result])
            traced = self._walk.env.get(node)
            if node.op == "placeholder" and isinstance(traced, Value):
                env[node] = Enclosed(x, torch.zeros_like(x), x.new_zeros(len(x)), traced)
            elif node.target is operator.getitem and _traced(traced) is not None:
                env[node] = env[node.args[0]][node.args[1]]
            elif _traced(traced) is not None:
                call = self._call(node, env, len(x))
                env[node] = _attach(ERROR_RULES[call.target](call), traced)
            elif str(node.target) not in ASSERTIONS:
                env[node] = self._constant(traced, x)
            for source in self._last_use.get(node, ()):
                env.pop(source, None)
        raise AssertionError("a program without output")

    def _constant(self, item: Any, x: Tensor) -> Any:
        if item == BATCH:
            return len(x)
        if not isinstance(item, REF_TYPES):
            return item
        key = (item, x.device)
        if key not in self._placed:
            tensor = self._weights[item]
            integer = tensor.dtype in INTEGERS
            if integer and bool((tensor.double().abs() > 2.0**53).any()):
                raise NotCertifiedError(
                    "integer constants of at most 2^53, exact in float64", "a larger one",
                    type(self.program).__name__, "store the constant in floating point",
                )  # fmt: skip
            self._placed[key] = tensor.to(x.device)
        return self._placed[key]

    def _call(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any], batch: int) -> ErrorCall:
        def fill(item: Any) -> Any:
            if isinstance(item, torch.fx.Node):
                return env.get(item)
            return [fill(i) for i in item] if isinstance(item, (list, tuple)) else item

        bound: dict[str, Any] = {}
        for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if i < len(node.args):
                bound[argument.name] = fill(node.args[i])
            elif argument.name in node.kwargs:
                bound[argument.name] = fill(node.kwargs[argument.name])
            elif argument.has_default_value():
                bound[argument.name] = argument.default_value
        output = _traced(self._walk.env[node])
        assert output is not None
        return ErrorCall(
            str(node.target), node.target, bound, module_name(node), output,
            self._builder.constants.get(output.base),
            None if self._norms is None else self._region_norm,
        )  # fmt: skip

    def _finish(self, logits: Enclosed) -> tuple[Tensor, Tensor]:
        assert logits.traced is not None
        if self._norms is None:
            return logits.value, logits.local
        reached = outward(logits.base * self._output_norm(logits.traced))
        error = outward(logits.local + reached.reshape(-1, *(1,) * (logits.value.ndim - 1)))
        return logits.value, error.nan_to_num(nan=math.inf, posinf=math.inf)


def _traced(item: Any) -> Value | None:
    """The value, or the first one of a tuple of results."""
    if isinstance(item, tuple):
        return next((i for i in item if isinstance(i, Value)), None)
    return item if isinstance(item, Value) else None


def _attach(result: Any, traced: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_attach(r, t) for r, t in zip(result, traced, strict=False))
    if result is None:
        return None
    # Where the value overflowed nothing is known, whatever the error bound says.
    unknown = ~result.value.isfinite() | result.local.isnan()
    local = result.local.masked_fill(unknown, math.inf)
    return Enclosed(
        result.value, local, result.base.nan_to_num(nan=math.inf, posinf=math.inf), traced
    )


def _isometric(expression: Expression) -> bool:
    op = expression.op
    if isinstance(op, Copy):
        return op.bijective
    return isinstance(op, Scale) and op.ref is None and abs(op.gain) == 1.0


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Sums of products in some order: no autocast, and no cuDNN, which may choose an FFT."""
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=False):
        yield


def enclose(
    model: nn.Module,
    traced: TracedModel,
    x: Tensor,
    *,
    norms: Mapping[str, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of one batch and bounds on their errors; see :class:`LogitEnclosure`."""
    return LogitEnclosure(model, traced, norms=norms)(x)
