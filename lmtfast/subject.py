# SPDX-License-Identifier: MIT
"""What a certificate speaks of: a traced, checked and bounded model with its weights frozen."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmtfast.bound import LipschitzBound
from lmtfast.certificate_file import fingerprint
from lmtfast.composing import compose_up
from lmtfast.description import NetworkDescription, describe
from lmtfast.enclosure import LogitEnclosure
from lmtfast.errors import NotCertifiedError, ShapeError
from lmtfast.execution import Execution
from lmtfast.execution.recursion import ExecutionError, execution_error
from lmtfast.execution.steps import executed_program
from lmtfast.exporting import ASSERTIONS
from lmtfast.graph import Conv, Region
from lmtfast.guarantee import check_certifiable, plan_bound
from lmtfast.level import Level
from lmtfast.plan import BoundPlan, make_plan
from lmtfast.profiles import Profile
from lmtfast.tracing import TracedModel, trace_model
from lmtfast.verified.arithmetic import ensure_arithmetic
from lmtfast.verified.budget import Budget
from lmtfast.weights import constant_ref, named_tensors, weights_sha256

# float64 entries a chunk of samples may need at once, unfolded windows of a convolution included.
CHUNK_ENTRIES = 1 << 26
MAX_CHUNK = 256
COMPARED_INPUTS = (32, 7, 32)
# Module and traced program run the same calls: float noise stays far below this many roundings.
COMPARED_ROUNDINGS = 2.0**12
# With 16-bit weights that many roundings would excuse any difference.
COMPARED_DIFFERENCE = 2.0**-4


@dataclass(frozen=True)
class Subject:
    """A model ready to be certified: traced, checked, bounded, its weights frozen."""

    plan: BoundPlan
    fingerprint: str
    program_sha256: str
    description: NetworkDescription
    bound: LipschitzBound
    enclosure: LogitEnclosure
    weights_sha256: str
    device: torch.device
    chunk: int
    classes: int
    proof_device: str
    execution: Execution | None = None

    def execution_error(
        self, norms: Sequence[float], input_range: tuple[float, float]
    ) -> ExecutionError | None:
        """How far the execution can be from the exact function, from norms of the operators; None
        where the certificate does not speak of one."""
        if self.execution is None:
            return None
        graph = self.plan.graph
        return execution_error(
            json.loads(self.description.text)["executed"], self.description.arrays,
            compose_up(graph.tape, norms), self.execution.profile,
            entries=math.prod(graph.input_shape), input_range=input_range,
        )  # fmt: skip


def prepare(
    model: nn.Module,
    input_shape: Sequence[int],
    input_range: tuple[float, float],
    *,
    level: Level,
    method: str,
    budget: Budget | None = None,
    draw: str = "fresh",
    proof_device: str = "cpu",
    proofs: Mapping[str, str] | None = None,
    profile: Profile | None = None,
) -> Subject:
    """Trace, check and bound a model; the bound is computed once. ``proofs`` as for
    :func:`lmtfast.guarantee.plan_bound`; with ``profile``, its execution is prepared as well."""
    check_certifiable(model)
    device = next((t.device for t in named_tensors(model).values()), torch.device("cpu"))
    ensure_arithmetic(torch.device("cpu"))
    if device.type != "cpu":
        ensure_arithmetic(device)
    # A copy: nothing that happens to the model later can enter.
    tensors = {n: t.detach().clone() for n, t in named_tensors(model).items()}
    digest = weights_sha256(tensors)
    # Under autocast the program would round the weights themselves.
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        traced = trace_model(model, input_shape)
    output = traced.graph.output_shape
    if len(output) != 1:
        raise ShapeError(
            "one vector of logits per input", f"an output of shape {('N', *output)}",
            type(model).__name__, "flatten the output, or certify the classifier on top of it",
        )  # fmt: skip
    compare(model, traced, input_range)
    execution = None if profile is None else Execution(model, traced, profile, tensors)
    calls = None if execution is None else executed_program(execution)
    plan = make_plan(model, traced.graph, engine="operator", backend="reference")
    bound = plan_bound(
        plan, model, level=level, method=method, budget=budget, draw=draw,
        device=proof_device, proofs=proofs, tensors=tensors,
    )  # fmt: skip
    norms = {n: float(v) for n, v in bound.per_operator.items()}
    enclosure = LogitEnclosure(model, traced, norms=norms, tensors=tensors)
    program, description = program_sha256(plan, traced), describe(plan.graph, tensors, calls)
    return Subject(
        plan, fingerprint(program, description.text, digest), program, description, bound,
        enclosure, digest, device, chunk_size(traced), output[0],
        torch.device(proof_device).type, execution,
    )  # fmt: skip


def compare(model: nn.Module, traced: TracedModel, input_range: tuple[float, float]) -> None:
    """Refuse a model whose own forward disagrees with its traced program on fresh random inputs."""
    reference = next((t for t in named_tensors(model).values() if t.is_floating_point()), None)
    dtype = torch.get_default_dtype() if reference is None else reference.dtype
    device = torch.device("cpu") if reference is None else reference.device
    generator = torch.Generator()
    generator.seed()
    low, high = input_range
    program = traced.program.module()
    for count in COMPARED_INPUTS:
        uniform = torch.rand(
            (count, *traced.graph.input_shape),
            generator=generator,
            dtype=torch.float64,
            device="cpu",
        )
        x = (low + uniform * (high - low)).to(device, dtype)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            own, expected = model(x.clone()), program(x.clone())
        if isinstance(own, Tensor) and own.shape == expected.shape:
            own, expected = own.double(), expected.double()
            noise = min(COMPARED_ROUNDINGS * torch.finfo(dtype).eps, COMPARED_DIFFERENCE)
            difference = float((own - expected).abs().amax())
            if difference <= noise * float(expected.abs().amax()):
                continue
            got = f"outputs that differ by {difference:.3g}"
            if math.isnan(difference):
                got = "outputs that are not finite"
        else:
            got = f"an output of another kind or shape ({type(own).__name__})"
        raise NotCertifiedError(
            "a module that computes what its traced program computes", got,
            f"{type(model).__name__}, {count} random inputs in [{low!r}, {high!r}]",
            "remove overridden __call__, state that changes between calls and other Python tricks; "
            "for an overflow use float32 weights",
        )  # fmt: skip


def program_sha256(plan: BoundPlan, traced: TracedModel) -> str:
    """Hash of the plan and of every call of the program: the function but for its named tensors.

    The plan alone leaves out what moves no bound: shifts, slopes below one, clamping limits.
    """
    signature = traced.program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    numbers: dict[torch.fx.Node, int] = {}

    def plain(item: object) -> object:
        if isinstance(item, torch.fx.Node):
            return ("node", numbers[item])
        if isinstance(item, (list, tuple)):
            return tuple(map(plain, item))
        return "device" if isinstance(item, torch.device) else item

    lines: list[object] = [plan.fingerprint]
    for node in traced.program.graph.nodes:
        if str(node.target) in ASSERTIONS:
            continue
        numbers[node] = len(numbers)
        if node.name in lifted:
            lines.append(constant_ref(traced.program.constants[lifted[node.name]]))
        elif node.op == "placeholder":
            lines.append(("input", named.get(node.name)))
        else:
            arguments = sorted((k, plain(v)) for k, v in node.kwargs.items())
            lines.append((node.op, str(node.target), plain(node.args), arguments))
    return hashlib.sha256(repr(lines).encode()).hexdigest()


def chunk_size(traced: TracedModel) -> int:
    """Samples per chunk, from the largest tensor; the same for the same model everywhere."""
    largest = 1
    for node in traced.program.graph.nodes:
        parts = node.meta.get("val")
        for part in parts if isinstance(parts, (list, tuple)) else (parts,):
            if isinstance(part, Tensor) and part.ndim:
                largest = max(largest, 8 * math.prod(int(n) for n in part.shape[1:]))
    for region in (o for o in traced.graph.operators if isinstance(o, Region)):
        for op in (n.op for n in region.nodes):
            if isinstance(op, Conv):
                outputs = math.prod((op.in_shape if op.transposed else op.out_shape)[1:])
                channels = op.out_shape[0] if op.transposed else op.in_shape[0]
                largest = max(largest, 2 * channels * math.prod(op.kernel) * outputs)
    return max(1, min(MAX_CHUNK, CHUNK_ENTRIES // largest))
