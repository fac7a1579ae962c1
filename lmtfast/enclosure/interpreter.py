# SPDX-License-Identifier: MIT
"""Runs a traced program call by call, each through its error rule, in float64."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmtfast.builder import Base, GraphBuilder, Value
from lmtfast.enclosure.registry import ERROR_RULES, Enclosed, ErrorCall
from lmtfast.errors import NotCertifiedError
from lmtfast.exporting import ASSERTIONS
from lmtfast.graph import BATCH, WeightRef
from lmtfast.rules.registry import REF_TYPES
from lmtfast.tracing import ProgramWalk, TracedModel, module_name
from lmtfast.weights import Weights, laid_out, named_tensors, on_host

INTEGERS = (torch.int64, torch.uint64)


class Recorder(GraphBuilder):
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


class ProgramInterpreter:
    """One traced program with its weights frozen in float64, run on batches.

    Args:
        model: The model that was traced.
        traced: Its program.
        tensors: Parameters and buffers to use instead of the model's present ones.

    Raises:
        NotCertifiedError: A call has no error rule, or a module has a Lipschitz rule of its own.
    """

    # Whether calls carry errors beside their values.
    bounded = True

    def __init__(
        self, model: nn.Module, traced: TracedModel, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        tensors = named_tensors(model) if tensors is None else tensors
        self.program, self.graph = traced.program, traced.graph
        self.builder = self._recorder(traced.graph.input_shape)
        self.walk = ProgramWalk(model, traced.program, traced.graph.input_shape, self.builder)
        with on_host():
            self.walk.run()
        if self.walk.opaque:
            path = next(iter(self.walk.opaque.values()))[0]
            raise NotCertifiedError(
                "operations whose rounding error is known",
                "a module with a Lipschitz rule of its own",
                repr(path),
                "replace the module by built-in layers: its rule says nothing of rounding",
            )
        # On the CPU, as for the bound: derived weights are then the same numbers on every device.
        self.weights = Weights({n: laid_out(t) for n, t in tensors.items()}, dtype=torch.float64)
        self._placed: dict[tuple[WeightRef, torch.device], Tensor] = {}
        self._last_use = self._lifetimes()
        self._check_rules()

    def _recorder(self, input_shape: tuple[int, ...]) -> Recorder:
        return Recorder(input_shape)

    @property
    def references(self) -> tuple[WeightRef, ...]:
        """Every tensor the program reads, derived ones included."""
        found = self.walk.env.values()
        return tuple(dict.fromkeys(r for r in found if isinstance(r, REF_TYPES)))

    def calls(self) -> Iterator[tuple[torch.fx.Node, ErrorCall]]:
        """Every call on a traced tensor; its traced arguments are graph nodes, constants weight
        references."""
        env = {n: v if first_value(v) is None else n for n, v in self.walk.env.items()}
        for node in self.program.graph.nodes:
            called = node.op == "call_function" and node.target is not operator.getitem
            if called and first_value(self.walk.env.get(node)) is not None:
                yield node, self.call(node, env)

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
        for _, call in self.calls():
            if call.target not in ERROR_RULES:
                raise call.refused("there is no error rule for it")

    def run(self, x: Tensor) -> Enclosed:
        """The result on a float64 batch; cuDNN, which may choose an FFT, and autocast are off."""
        with (
            torch.no_grad(),
            on_host(),
            torch.autocast(x.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=False),
        ):
            return self._run(x)

    def _run(self, x: Tensor) -> Enclosed:
        env: dict[torch.fx.Node, Any] = {}
        for node in self.program.graph.nodes:
            if node.op == "output":
                (result,) = node.args[0]
                found: Enclosed = env[result]
                return found
            traced = self.walk.env.get(node)
            if node.op == "placeholder" and isinstance(traced, Value):
                env[node] = Enclosed(x, torch.zeros_like(x), x.new_zeros(len(x)), traced)
            elif node.target is operator.getitem and first_value(traced) is not None:
                env[node] = env[node.args[0]][node.args[1]]
            elif first_value(traced) is not None:
                call = self.call(node, env)
                env[node] = self._settled_all(ERROR_RULES[call.target](call), traced)
            elif str(node.target) not in ASSERTIONS:
                env[node] = self.constant(traced, x)
            for source in self._last_use.get(node, ()):
                env.pop(source, None)
        raise AssertionError("a program without output")

    def _settled_all(self, result: Any, traced: Any) -> Any:
        if isinstance(result, tuple):
            pairs = zip(result, traced, strict=False)
            return tuple(self._settled_all(r, t) for r, t in pairs)
        return None if result is None else self._settled(result, traced)

    def _settled(self, result: Enclosed, traced: Value) -> Enclosed:
        """What becomes of a call's result before other calls read it."""
        return Enclosed(result.value, result.local, result.base, traced)

    def constant(self, item: Any, x: Tensor) -> Any:
        """A weight reference as a tensor beside ``x``; anything else as it is."""
        if item == BATCH:
            return len(x)
        if not isinstance(item, REF_TYPES):
            return item
        key = (item, x.device)
        if key not in self._placed:
            tensor = self.weights[item]
            integer = tensor.dtype in INTEGERS
            if integer and bool((tensor.double().abs() > 2.0**53).any()):
                raise NotCertifiedError(
                    "integer constants of at most 2^53, exact in float64", "a larger one",
                    type(self.program).__name__, "store the constant in floating point",
                )  # fmt: skip
            self._placed[key] = tensor.to(x.device)
        return self._placed[key]

    def call(self, node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> ErrorCall:
        """One call of the program with its arguments taken from ``env``."""

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
        output = first_value(self.walk.env[node])
        assert output is not None
        return ErrorCall(
            str(node.target), node.target, bound, module_name(node), output,
            self.builder.constants.get(output.base), self._norm_source(), self.bounded,
        )  # fmt: skip

    def _norm_source(self) -> Callable[[Value], float] | None:
        """Where rules find the norm from a tensor's base to it; None carries errors by entry."""
        return None


def first_value(item: Any) -> Value | None:
    """The value, or the first one of a tuple of results."""
    if isinstance(item, tuple):
        return next((i for i in item if isinstance(i, Value)), None)
    return item if isinstance(item, Value) else None
