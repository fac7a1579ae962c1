# SPDX-License-Identifier: MIT
"""The static half of a bound: graph, operator table, engines and backend, chosen once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import nn

from lmtfast.backends import steps
from lmtfast.engines import ENGINES, choose_engine, get_engine
from lmtfast.errors import StalePlanError
from lmtfast.graph import (
    BatchNormScale,
    BoundGraph,
    Operator,
    Region,
    WeightRef,
    leaf_refs,
    weight_refs,
)
from lmtfast.table import CLOSED_FORM, OperatorTable, build_table
from lmtfast.tracing import trace_model
from lmtfast.weights import named_tensors

Signature = tuple[tuple[str, str], ...]


def model_signature(model: nn.Module) -> Signature:
    """What tracing depends on besides tensor values: modules, their classes, tensor shapes."""
    modules = [(n, type(m).__qualname__) for n, m in model.named_modules(remove_duplicate=False)]
    tensors = [(n, str(tuple(t.shape))) for n, t in named_tensors(model).items()]
    return (*modules, *tensors)


@dataclass(frozen=True)
class BoundPlan:
    """A traced network, ready to be bounded. Frozen, hashable, picklable; holds no tensors.

    Attributes:
        graph: Operators and the tape that composes their norms.
        slots: Every tensor the operators read, in the order the engines receive them; a batch
            norm's gain stands as its weight and its variance.
        table: Packed rows of the operators and their buckets of equal shape.
        engines: Name of the engine per operator; ``closed form`` where none is needed.
        reasons: Why that engine, per operator.
        state_sizes: Entries of the iterate, per operator.
        backend: Name of the backend.
        backend_reason: Why that backend.
        signature: Modules and tensor shapes of the model when it was traced.

    Guarantee:
        None by itself; a plan is what the guarantees speak of.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> plan = lf.trace(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()), (4,))
        >>> [operator.name for operator in plan.operators]
        ['0']
    """

    graph: BoundGraph
    slots: tuple[WeightRef, ...]
    table: OperatorTable
    engines: tuple[str, ...]
    reasons: tuple[str, ...]
    state_sizes: tuple[int, ...]
    backend: str
    backend_reason: str
    signature: Signature

    def __deepcopy__(self, memo: object) -> BoundPlan:
        """Itself: a plan is a value."""
        return self

    @property
    def operators(self) -> tuple[Operator, ...]:
        return self.graph.operators

    @cached_property
    def state_offsets(self) -> tuple[int, ...]:
        """Where each operator's iterate starts in the packed buffer, and the buffer's end."""
        return (0, *accumulate(self.state_sizes))

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Number of every operator by name."""
        return {operator.name: i for i, operator in enumerate(self.operators)}

    @cached_property
    def methods(self) -> Mapping[str, str]:
        """Engine by operator name."""
        return dict(zip(self.index, self.engines, strict=True))

    @cached_property
    def method(self) -> str:
        """One line: how the norms are estimated."""
        return "power iteration, " + "/".join(sorted(set(self.engines)))

    @cached_property
    def batch_norms(self) -> tuple[BatchNormScale, ...]:
        """Every batch norm whose gain is folded into an operator."""
        refs = (ref for operator in self.operators for ref in weight_refs(operator))
        return tuple(dict.fromkeys(r for r in refs if isinstance(r, BatchNormScale)))

    @cached_property
    def head_slots(self) -> tuple[tuple[WeightRef, int], ...]:
        """What the head's matrix is computed from, with its slot."""
        if self.graph.head is None:
            return ()
        wanted = leaf_refs(self.operators[self.graph.head])
        return tuple((ref, i) for i, ref in enumerate(self.slots) if ref in wanted)

    @cached_property
    def uncompiled(self) -> tuple[int, ...]:
        """Operators that the reference engines run one by one."""
        compiled = set(self.table.compiled)
        return tuple(i for i in range(len(self.operators)) if i not in compiled)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything the bound depends on except tensor values."""
        content = repr((self.graph, self.slots, self.engines, self.backend, self.signature))
        return hashlib.sha256(content.encode()).hexdigest()

    def check_fresh(self, model: nn.Module) -> None:
        """Raise :class:`StalePlanError` if the model's structure is no longer the traced one."""
        now = model_signature(model)
        if now != self.signature:
            changed = sorted(set(now) ^ set(self.signature))[:3]
            raise StalePlanError(
                "the modules and tensor shapes that were traced",
                ", ".join(f"{name}: {kind}" for name, kind in changed)
                or "another order of modules",
                type(model).__name__,
                "trace the model again (make a new NetworkBound) after changing its structure",
            )

    def __str__(self) -> str:
        rows = [("region", "kind", "in", "out", "bucket", "engine", "backend", "rule")]
        buckets = self.table.buckets
        compiled = set(self.table.compiled)
        for i, op in enumerate(self.operators):
            shapes = ("x".join(map(str, op.in_shape)), "x".join(map(str, op.out_shape)))
            backend = self.backend if i in compiled else "reference"
            where = (str(buckets[i]), self.engines[i], backend)
            rows.append((op.name, op.kind, *shapes, *where, _rule(op)))
        rows += [
            (n or "forward", rule, "", "", "", "", "", f"{c:.6g}")
            for n, rule, c in self.graph.notes
        ]
        widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        head = "none" if self.graph.head is None else self.operators[self.graph.head].name
        lines.append(
            f"{len(self.operators)} operators in {self.table.n_buckets} buckets; head: {head}; "
            f"backend: {self.backend} ({self.backend_reason}); input {self.graph.input_shape}; "
            f"fingerprint {self.fingerprint[:12]}"
        )
        return "\n".join(lines)


def _rule(operator: Operator) -> str:
    if not isinstance(operator, Region):
        return "max(1, max|a|)"
    names = [n.op if isinstance(n.op, str) else type(n.op).__name__.lower() for n in operator.nodes]
    op = operator.primitive
    if op is None:
        return " > ".join(names)
    parts = [names[0]]
    for attribute, label in (("row_scales", "row scale"), ("column_scales", "column scale")):
        if getattr(op, attribute, ()):
            parts.append(label)
    if getattr(op, "identity_gain", 0.0):
        parts.append("identity")
    return " + ".join(parts)


def make_plan(
    model: nn.Module,
    graph: BoundGraph,
    *,
    engine: str,
    backend: str,
    backend_reason: str = "as requested",
) -> BoundPlan:
    """Collect the weights, build the table and choose an engine per operator."""
    slots: dict[WeightRef, int] = {}
    for operator in graph.operators:
        for ref in leaf_refs(operator):
            slots.setdefault(ref, len(slots))
    chosen = [
        choose_engine(o, engine)
        if isinstance(o, Region) and o.kind != "scale"
        else (CLOSED_FORM, "maximum of entries")
        for o in graph.operators
    ]
    engines, reasons = tuple(c[0] for c in chosen), tuple(c[1] for c in chosen)
    sizes = [
        get_engine(name).state_size(o) if isinstance(o, Region) and name in ENGINES else 0
        for o, name in zip(graph.operators, engines, strict=True)
    ]
    table = build_table(
        graph.operators, graph.tape, (graph.features, graph.total), slots=slots, engines=engines,
        state_sizes=sizes, compiled=steps(backend),
    )  # fmt: skip
    return BoundPlan(
        graph, tuple(slots), table, engines, reasons, tuple(sizes), backend, backend_reason,
        model_signature(model),
    )  # fmt: skip


def trace(model: nn.Module, input_shape: Sequence[int]) -> BoundPlan:
    """Trace a model into the plan its Lipschitz bound is computed from.

    Every call of the model's inference form is looked up in the rule table; a call without a rule,
    or with an argument its rule does not cover, is refused by name. Nothing ever counts as 1 by
    default.

    Args:
        model: Any ``torch.nn.Module`` from one tensor to one tensor. Traced in eval mode, whatever
            its present mode, which is restored. Parameters may be on the meta device.
        input_shape: Shape of one input, without the batch dimension.

    Returns:
        The plan; ``print(plan)`` lists one line per region.

    Raises:
        UnsupportedLayerError: A call has no rule, or the model cannot be exported.
        ArgumentError: ``input_shape`` is not a shape.

    Guarantee:
        The graph's composition is an upper bound wherever its operator norms are.

    Source:
        Composition rules: Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, section 5 and appendix
            B.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
        >>> print(lf.trace(model, (3, 8, 8)).operators[0].kind)
        conv
    """
    return make_plan(
        model, trace_model(model, input_shape).graph, engine="auto", backend="reference",
        backend_reason="a plan without a bound",
    )  # fmt: skip
