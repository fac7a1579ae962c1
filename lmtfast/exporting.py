# SPDX-License-Identifier: MIT
"""A model as one flat program of functional ATen calls, the same for every batch size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lmtfast.errors import UnsupportedLayerError
from lmtfast.graph import Shape
from lmtfast.weights import constant_ref, named_tensors

# Checks that export inserts and that return nothing.
ASSERTIONS = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default")
WHOLE = 2**63 - 1


@contextmanager
def inference_mode_of(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode and every module back to its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _uncached() -> Iterator[None]:
    """Compute parametrized weights afresh: a cached one would be a constant of the program."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


def export_program(model: nn.Module, input_shape: Shape) -> torch.export.ExportedProgram:
    """The model in its inference form as functional ATen calls with a symbolic batch size."""
    reference = next((t for t in named_tensors(model).values() if t.is_floating_point()), None)
    dtype = reference.dtype if reference is not None else torch.get_default_dtype()
    device = reference.device if reference is not None else torch.device("cpu")
    example = torch.zeros((2, *input_shape), dtype=dtype, device=device)
    # Export by default assumes a batch of neither 0 nor 1, and a branch on one sample vanishes.
    every_size = torch.fx.experimental._config.patch(  # type: ignore[attr-defined]
        backed_size_oblivious=True
    )
    try:
        # Under autocast the program would hold casts of the weights, and bound the rounded ones.
        precise = torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
        modes = (inference_mode_of(model), torch.no_grad(), precise, _uncached())
        with ExitStack() as stack, warnings.catch_warnings():
            for mode in modes:
                stack.enter_context(mode)
            warnings.simplefilter("ignore")
            try:
                with every_size:
                    return _export(model, example, dynamic=True)
            except Exception:
                program = _export(model, example, dynamic=True)
                # The operations themselves asked for the assumption: compare with one sample.
                _check_single_sample(program, _export(model, example[:1].clone(), dynamic=False))
                return program
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedLayerError(
            "a model whose forward is one fixed program of its input tensor",
            f"{type(error).__name__}: {reason}",
            f"{type(model).__name__}.forward, input {('N', *input_shape)}",
            "remove control flow that depends on values or on the batch size, check input_shape; "
            "a part that cannot be exported can get its constant from lmtfast.register_rule",
        ) from error


def _export(model: nn.Module, example: Tensor, *, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    return program.run_decompositions({})


def _check_single_sample(
    program: torch.export.ExportedProgram, single: torch.export.ExportedProgram
) -> None:
    """Raise unless the program traced with one sample makes the same calls."""
    known: dict[torch.fx.Node, torch.fx.Node] = {}

    def passes(node: torch.fx.Node) -> bool:
        # Whether export copies memory or takes all samples of one depends on the batch size.
        whole = str(node.target) == "aten.slice.Tensor" and node.args[1:] == (0, 0, WHOLE)
        return whole or str(node.target) in ("aten.clone.default", "aten.contiguous.default")

    def skipped(node: torch.fx.Node) -> bool:
        return str(node.target) in ("aten.sym_size.int", *ASSERTIONS) or passes(node)

    def source(node: torch.fx.Node) -> torch.fx.Node:
        while passes(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.fx.Node):
            if isinstance(a.meta.get("val"), torch.SymInt):
                return bool(b == 1)
            return isinstance(b, torch.fx.Node) and known.get(source(a)) is source(b)
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and bool(a == b)

    def constant(of: torch.export.ExportedProgram, node: torch.fx.Node) -> Any:
        lifted = of.graph_signature.inputs_to_lifted_tensor_constants
        return constant_ref(of.constants[lifted[node.name]]) if node.name in lifted else None

    def agrees(a: torch.fx.Node, b: torch.fx.Node) -> bool:
        first, second = (str(n.target).replace("_unsafe_view", "view") for n in (a, b))
        known[a] = b
        return (
            a.op == b.op
            and (first == second or a.op == "output")
            and constant(program, a) == constant(single, b)
            and same(a.args, b.args)
            and a.kwargs.keys() == b.kwargs.keys()
            and all(same(a.kwargs[key], b.kwargs[key]) for key in a.kwargs)
        )

    left, right = ([n for n in of.graph.nodes if not skipped(n)] for of in (program, single))
    agree = len(left) == len(right) and all(map(agrees, left, right))
    if not agree:
        raise RuntimeError("the forward of one sample differs from that of several")
