# SPDX-License-Identifier: MIT
"""From a model to its :class:`~lmtfast.graph.BoundGraph`, through torch.export.

torch.export gives one flat program of functional ATen calls: module and functional forms, hooks and
parametrizations all arrive as the same few operations, with a symbolic batch size that a model
cannot branch on unnoticed. Each call is looked up in the rule table; a call without a rule stops
the trace.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmtfast.builder import GraphBuilder, Value
from lmtfast.errors import ArgumentError, UnsupportedLayerError
from lmtfast.exporting import ASSERTIONS, export_program
from lmtfast.graph import BATCH, BoundGraph, Derived, ParameterRef, Shape
from lmtfast.rules import MODULE_RULES, OPERATION_RULES, SINGLE, TracedCall
from lmtfast.weights import Weights, constant_ref, named_tensors


@dataclass(frozen=True)
class TracedModel:
    """A model's program and its bound graph. ``program`` computes what the graph bounds."""

    program: torch.export.ExportedProgram
    graph: BoundGraph


@dataclass(frozen=True)
class Unusable:
    """A result that is no Lipschitz function of the input (indices, statistics): refused on use."""

    target: str


def check_input_shape(input_shape: Sequence[int]) -> Shape:
    """The shape as a tuple of positive integers, without the batch dimension."""
    try:
        shape = tuple(int(n) for n in input_shape)
    except TypeError:
        shape = (-1,)
    if not shape or any(n <= 0 for n in shape):
        raise ArgumentError(
            "a shape without the batch dimension, for example (3, 32, 32)", repr(input_shape),
            "input_shape", "leave the batch size out and make every entry positive",
        )  # fmt: skip
    return shape


def trace_model(model: nn.Module, input_shape: Sequence[int]) -> TracedModel:
    """Export a model and apply the Lipschitz rules to every call."""
    shape = check_input_shape(input_shape)
    program = export_program(model, shape)
    # Rules find out on probes what a call does; a default device must not take part in that.
    with torch.device("cpu"):
        return TracedModel(program, ProgramWalk(model, program, shape).run())


class ProgramWalk:
    """One pass over a traced program that applies the rule of every call to a builder."""

    def __init__(
        self,
        model: nn.Module,
        program: torch.export.ExportedProgram,
        shape: Shape,
        builder: GraphBuilder | None = None,
    ) -> None:
        self.program, self.shape = program, shape
        self.builder = GraphBuilder(shape) if builder is None else builder
        self.weights = Weights(named_tensors(model))
        self.env: dict[torch.fx.Node, Any] = {}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.opaque: dict[torch.fx.Node, tuple[str, Value]] = {}

    def run(self) -> BoundGraph:
        signature = self.program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            names = [
                *signature.buffers_to_mutate.values(),
                *signature.user_inputs_to_mutate.values(),
            ]
            raise self._refuse("forward", f"it writes to {', '.join(map(str, names))}")
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, signature)
            elif node.op == "call_function":
                with torch.no_grad():
                    self.env[node] = self._call(node)
            elif node.op == "output":
                return self._output(node, signature)
            else:
                raise self._refuse(node.name, f"a node of kind {node.op}")
        raise self._refuse("forward", "it returns nothing")

    def _refuse(self, where: str, reason: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(
            "one tensor in, one tensor out, built from operations with a Lipschitz rule", reason,
            repr(where or "the model's forward"),
            "rewrite the part, or register a rule with lmtfast.register_rule",
        )  # fmt: skip

    def _placeholder(self, node: torch.fx.Node, signature: Any) -> None:
        name = node.name
        if name in signature.inputs_to_parameters:
            self.env[node] = ParameterRef(signature.inputs_to_parameters[name])
        elif name in signature.inputs_to_buffers:
            self.env[node] = ParameterRef(signature.inputs_to_buffers[name])
        elif name in signature.inputs_to_lifted_tensor_constants:
            tensor = self.program.constants[signature.inputs_to_lifted_tensor_constants[name]]
            self.env[node] = constant_ref(tensor)
        elif name in signature.user_inputs:
            self.batch = node.meta["val"].shape[0]
            self.env[node] = self.builder.input
        else:
            raise self._refuse(name, "an input that is neither the tensor nor a parameter")

    def _output(self, node: torch.fx.Node, signature: Any) -> BoundGraph:
        results: Any = node.args[0]
        if len(results) != 1 or not isinstance(results[0], torch.fx.Node):
            raise self._refuse("output", f"{len(results)} outputs")
        value = self._lookup(results[0], None)
        if not isinstance(value, Value):
            raise self._refuse("output", "the output does not depend on the input")
        return self.builder.finish(value)

    # -- one call ---------------------------------------------------------------------------------

    def _call(self, node: torch.fx.Node) -> Any:
        target = str(node.target)
        if target in ASSERTIONS:
            return None
        inside = self._registered_module(node)
        if inside is not None:
            entered = self._enter(node, *inside)
            if entered is not None:
                return entered
        if node.target is operator.getitem:
            source, index = self._lookup(node.args[0], node), node.args[1]
            if isinstance(source, Derived):
                return Derived("operator.getitem", (source, index))
            return source[index]
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._scalar(node)
        arguments = self._arguments(node)
        name = module_name(node)
        if target == "aten.sym_size.int":
            traced = isinstance(arguments["self"], Value)
            if traced and arguments["dim"] == 0:
                return BATCH
            raise self._refuse(name, "a size that is not known when tracing")
        if not any(_is_traced(a) for a in arguments.values()):
            return self._derived(node, target, arguments, name)
        rule = OPERATION_RULES.get(target)
        keyword_only = frozenset(a.name for a in node.target._schema.arguments if a.kwarg_only)
        call = TracedCall(
            self.builder, target, arguments, name, self._out_shapes(node, name),
            self.weights.__getitem__, keyword_only,
        )  # fmt: skip
        if rule is None:
            raise call.unsupported("there is no rule for it")
        for argument in node.target._schema.arguments:
            literal = arguments.get(argument.name)
            # Sizes and indices may be larger; what is computed with is held as a float64.
            counts = "int" in str(argument.type)
            if isinstance(literal, int) and not counts and float(literal) != literal:
                raise call.unsupported(f"the integer {literal}, which is no float64")
        if sum(map(_is_traced, arguments.values())) > 1 and target in SINGLE:
            raise call.unsupported("more than one argument depends on the input")
        result = rule(call)
        self._check_result(call, result, node.meta["val"])
        if isinstance(result, tuple):
            return tuple(Unusable(target) if part is None else part for part in result)
        return result

    def _check_result(self, call: TracedCall, result: Any, program: Any) -> None:
        parts = result if isinstance(result, tuple) else (result,)
        tensors = program if isinstance(program, (list, tuple)) else (program,)
        for part, shape, tensor in zip(parts, call.out_shapes, tensors, strict=False):
            if isinstance(part, Value) and part.shape != shape:
                raise call.unsupported(f"the rule gave shape {part.shape}, the program {shape}")
            # Any call may cast: sum and type_as do so without being asked for a cast.
            if isinstance(part, Value) and not tensor.is_floating_point():
                raise call.unsupported(f"a result of type {tensor.dtype} is not continuous")

    def _scalar(self, node: torch.fx.Node) -> Any:
        # Arithmetic on sizes that export left in the program: constants, or the batch size again.
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            return BATCH if str(size) == str(self.batch) else Unusable(str(node.target))
        args = [self._lookup(a, node) if isinstance(a, torch.fx.Node) else a for a in node.args]
        if any(isinstance(a, (Value, str)) for a in args):
            raise self._refuse(node.name, f"{node.target} on the batch size or a traced tensor")
        return node.target(*args)  # type: ignore[operator]

    def _arguments(self, node: torch.fx.Node) -> dict[str, Any]:
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        bound: dict[str, Any] = {}
        for i, argument in enumerate(schema):
            if i < len(node.args):
                bound[argument.name] = self._fill(node.args[i], node)
            elif argument.name in node.kwargs:
                bound[argument.name] = self._fill(node.kwargs[argument.name], node)
            elif argument.has_default_value():
                bound[argument.name] = argument.default_value
        return bound

    def _fill(self, item: Any, node: torch.fx.Node) -> Any:
        if isinstance(item, torch.fx.Node):
            return self._lookup(item, node)
        if isinstance(item, (list, tuple)):
            return tuple(self._fill(i, node) for i in item)
        return item

    def _lookup(self, source: Any, reader: torch.fx.Node | None) -> Any:
        """A node's value; a node inside a registered module counts as that module's output."""
        if source in self.opaque:
            path, value = self.opaque[source]
            inside = None if reader is None else self._registered_module(reader)
            if inside is not None and inside[0] == path:
                return value
            return self._leave(source, path, value)
        found = self.env[source]
        if isinstance(found, Unusable):
            raise self._refuse(
                source.name, f"a side result of {found.target}, such as indices or a size"
            )
        return found

    def _out_shapes(self, node: torch.fx.Node, name: str) -> tuple[Shape | None, ...]:
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            return (self._sample_shape(val, name, str(node.target)),)
        if not isinstance(val, (list, tuple)):
            raise self._refuse(name, f"{node.target} without a tensor result")
        # Side results such as saved statistics have no batch dimension; no rule may return them.
        return tuple(
            self._sample_shape(p, name, str(node.target))
            if isinstance(p, Tensor) and self._batched(p)
            else None
            for p in val
        )

    def _batched(self, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and str(tensor.shape[0]) == str(self.batch)

    def _sample_shape(self, tensor: Tensor, name: str, call: str) -> Shape:
        shape = tuple(tensor.shape)
        what = f"{call}: a tensor of shape {shape}"
        if not self._batched(tensor):
            raise self._refuse(name, f"{what}: the batch must stay dimension 0")
        if any(isinstance(n, torch.SymInt) for n in shape[1:]):
            raise self._refuse(name, f"{what}: only the batch size may vary")
        return tuple(int(n) for n in shape[1:])

    def _derived(
        self, node: torch.fx.Node, target: str, arguments: dict[str, Any], name: str
    ) -> Any:
        overload: Any = node.target
        if torch.Tag.nondeterministic_seeded in overload.tags or overload._schema.is_mutable:
            raise self._refuse(name, f"{target}, a random or mutating call on parameters")
        if BATCH in _flatten(tuple(arguments.values())):
            raise self._refuse(name, f"{target}, a constant whose shape depends on the batch size")
        args = tuple(self._freeze(self._fill(a, node)) for a in node.args)
        kwargs = tuple((k, self._freeze(self._fill(v, node))) for k, v in node.kwargs.items())
        return Derived(target, args, kwargs)

    def _freeze(self, item: Any) -> Any:
        return tuple(self._freeze(i) for i in item) if isinstance(item, (list, tuple)) else item

    # -- modules with a rule of their own ----------------------------------------------------------

    def _registered_module(self, node: torch.fx.Node) -> tuple[str, nn.Module] | None:
        """The outermost module with a rule of its own that the call lies in, and its key."""
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            module = self.modules.get(str(path).split("@")[0])
            if module is not None and type(module) in MODULE_RULES:
                return str(key), module
        return None

    def _enter(self, node: torch.fx.Node, key: str, module: nn.Module) -> Any:
        """Skip a call inside a registered module, remembering the module's one traced input."""
        traced: dict[int, Value] = {}
        for source in node.all_input_nodes:
            if source in self.opaque and self.opaque[source][0] == key:
                value = self.opaque[source][1]
            else:
                value = self._lookup(source, None)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Value):
                    traced[id(item)] = item
        known = [v for k, v in self.opaque.values() if k == key]
        traced.update((id(v), v) for v in known)
        if not traced:
            return None
        if len(traced) != 1:
            raise self._refuse(key, f"{type(module).__name__}: more than one traced input")
        (value,) = traced.values()
        self.opaque[node] = (key, value)
        return value

    def _leave(self, node: torch.fx.Node, key: str, value: Value) -> Value:
        if self.env.get(node) is not value:
            return self.env[node]
        module = self._registered_module(node)[1]  # type: ignore[index]
        if module._forward_hooks or module._forward_pre_hooks:
            raise self._refuse(key, f"{type(module).__name__}: hooks, which its rule cannot see")
        constant = float(MODULE_RULES[type(module)](module))
        if not 0.0 <= constant < float("inf"):
            raise self._refuse(key, f"the rule of {type(module).__name__} returned {constant}")
        shape = self._sample_shape(node.meta["val"], key, str(node.target))
        others = [n for n, (k, _) in self.opaque.items() if k == key and n is not node]
        if any(self.env.get(n) is not self.opaque[n][1] for n in others):
            raise self._refuse(key, f"{type(module).__name__}: more than one output")
        note = (module_name(node), type(module).__name__)
        self.env[node] = self.builder.nonlinear(value, constant, shape, note)
        return self.env[node]


def module_name(node: torch.fx.Node) -> str:
    """Qualified name of the module a traced call came from, parametrizations left out."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return (
        ""
        if path.startswith("_empty_nn_module")
        else path.split("@")[0].split(".parametrizations.")[0]
    )


def _flatten(item: Any) -> list[Any]:
    if isinstance(item, (list, tuple)):
        return [x for i in item for x in _flatten(i)]
    return [item]


def _is_traced(item: Any) -> bool:
    return any(isinstance(x, Value) for x in _flatten(item))
