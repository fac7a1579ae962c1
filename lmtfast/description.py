# SPDX-License-Identifier: MIT
"""A bound's graph as canonical JSON: all that an independent checker needs beside the weights.

Written with every certificate of schema 2 and read by :mod:`lmtfast.check`, which knows no torch.
Floats are hexadecimal, tensors are named and hashed, and calls that copy or average are written as
what they do: where every entry comes from, and which window every entry averages.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmtfast.certificate_file import canonical_json
from lmtfast.execution import Execution
from lmtfast.execution.steps import ExecutedProgram, executed_program
from lmtfast.files import write_atomically
from lmtfast.graph import (
    INPUT,
    Average,
    BatchNormScale,
    BoundGraph,
    ChannelScale,
    ConstantRef,
    Conv,
    Copy,
    Derived,
    Instruction,
    Linear,
    Operator,
    ParameterRef,
    Primitive,
    Region,
    RegionNode,
    Scale,
    Shape,
    Slope,
    WeightRef,
)  # fmt: skip
from lmtfast.profiles import IDEAL, profile_of
from lmtfast.rules.copying import execute
from lmtfast.tracing import trace_model
from lmtfast.weights import Weights, named_tensors

# Copies of more pieces have no description.
MAX_RUNS = 1 << 14
WEIGHT_REFS = (ParameterRef, ConstantRef, BatchNormScale, Derived)
Json = dict[str, Any]


def array_sha256(array: np.ndarray) -> str:
    """Hash of an array's values as little-endian float64, whatever dtype they are stored in."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<f8").tobytes()).hexdigest()


@dataclass(frozen=True)
class NetworkDescription:
    """A network as the checker reads it.

    Attributes:
        text: Canonical JSON.
        arrays: Every array it names, float64; parameters under their own names.
    """

    text: str
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the arrays as an ``.npz`` file for ``python -m lmtfast.check``."""
        content = io.BytesIO()
        arrays: Any = {name: self.arrays[name] for name in sorted(self.arrays)}
        np.savez(content, **arrays)
        return write_atomically(Path(path), content.getbuffer())


class _Unknown(Exception):
    """A primitive that has no description; the text says why."""


class _Writer:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        floats = {n: t.detach().cpu() for n, t in tensors.items()}
        self.weights, self._parameters = Weights(floats, dtype=torch.float64), tuple(tensors)
        self.arrays: dict[str, np.ndarray] = {}
        self._names: dict[WeightRef, str] = {}

    # -- tensors -----------------------------------------------------------------------------------

    def ref(self, ref: WeightRef) -> Json:
        if isinstance(ref, BatchNormScale):
            weight = None if ref.weight is None else self.ref(ref.weight)
            return {"eps": ref.eps.hex(), "variance": self.ref(ref.variance), "weight": weight}
        value = self.weights[ref].detach().double().cpu().numpy()
        if ref not in self._names:
            self._names[ref] = ref.name if isinstance(ref, ParameterRef) else self._unnamed(ref)
        self.arrays[self._names[ref]] = np.ascontiguousarray(value, dtype="<f8")
        return {"array": self._names[ref]}

    def _unnamed(self, ref: WeightRef) -> str:
        """A name that no parameter has and no other array was given."""
        kind = "derived" if isinstance(ref, Derived) else "constant"
        taken = {*self._parameters, *self._names.values()}
        return next(n for i in itertools.count() if (n := f"{kind}/{i}") not in taken)

    def scales(self, scales: tuple[ChannelScale, ...]) -> list[Json]:
        return [{"inverse": s.inverse, "ref": self.ref(s.ref)} for s in scales]

    def detail(self, item: Any) -> Any:
        """Any detail of a step as JSON."""
        if isinstance(item, ChannelScale):
            return self.scales((item,))[0]
        if isinstance(item, WEIGHT_REFS):
            return self.ref(item)
        if isinstance(item, (list, tuple)):
            return [self.detail(i) for i in item]
        return item.hex() if isinstance(item, float) else item

    # -- operators ---------------------------------------------------------------------------------

    def operator(self, operator: Operator) -> Json:
        if isinstance(operator, Slope):
            return {"name": operator.name, "slope": self.ref(operator.ref)}
        operator = bordered_region(operator)
        alone = operator.primitive
        if isinstance(alone, Copy):
            return {"copies": alone.copies, "name": operator.name}
        if isinstance(alone, Conv) and alone.transposed:
            operator = adjoint_region(operator, alone)
        try:
            nodes = [self.node(node) for node in operator.nodes]
        except _Unknown as unknown:
            return {"name": operator.name, "opaque": str(unknown)}
        return {
            "in": list(operator.in_shape), "name": operator.name, "nodes": nodes,
            "out": list(operator.out_shape),
        }  # fmt: skip

    def node(self, node: RegionNode) -> Json:
        if isinstance(node.op, Primitive):
            return {"inputs": list(node.inputs), **self.primitive(node.op)}
        axis = {"axis": node.axis} if node.op == "concat" else {}
        return {"inputs": list(node.inputs), "op": node.op, **axis}

    def primitive(self, op: Primitive) -> Json:
        found: Json = {"in": list(op.in_shape), "out": list(op.out_shape)}
        if isinstance(op, (Conv, Linear)):
            found |= {
                "columns": self.scales(op.column_scales), "gain": op.gain.hex(),
                "identity": op.identity_gain.hex(), "rows": self.scales(op.row_scales),
                "weight": self.ref(op.weight),
            }  # fmt: skip
        if isinstance(op, Conv):
            if op.transposed:
                raise _Unknown(f"{op.name!r}, a transposed convolution inside a composite")
            lows = zip(op.padding, op.dilation, strict=True)
            border = {} if op.padding_mode == "zeros" else {"mode": op.padding_mode}
            return found | border | {
                "centre": [low // d for (low, _), d in lows], "dilation": list(op.dilation),
                "groups": op.groups, "kernel": list(op.kernel), "op": "conv",
                "padding": [list(p) for p in op.padding], "stride": list(op.stride),
            }  # fmt: skip
        if isinstance(op, Linear):
            return found | {"op": "linear"}
        if isinstance(op, Scale):
            ref = None if op.ref is None else self.ref(op.ref)
            return found | {
                "gain": op.gain.hex(), "inverse": op.inverse, "op": "scale", "ref": ref,
                "shape": list(op.broadcast),
            }  # fmt: skip
        if isinstance(op, Copy):
            return found | {"op": "copy", "runs": copy_runs(op)}
        assert isinstance(op, Average)
        return found | {"gain": op.gain.hex(), "op": "average", "windows": average_windows(op)}


def adjoint_region(region: Region, op: Conv) -> Region:
    """The convolution that a transposed one is the adjoint of: its norm is the same."""
    forward = replace(
        op, in_shape=op.out_shape, out_shape=op.in_shape, transposed=False, output_padding=(),
        row_scales=op.column_scales, column_scales=op.row_scales,
    )  # fmt: skip
    nodes = (RegionNode(forward, (-1,)),)
    return Region(region.name, region.out_shape, region.in_shape, nodes)


def bordered_region(region: Region) -> Region:
    """A reflected, replicated or circular border and the convolution behind it as one node."""
    copy, conv = (node.op for node in region.nodes) if len(region.nodes) == 2 else (None, None)
    if not isinstance(copy, Copy) or not isinstance(conv, Conv):
        return region
    kind, *args = copy.call.target.split(".")[1].split("_")[0], *copy.call.args[1:]
    modes = {"reflection": "reflect", "replication": "replicate", "pad": (*args, None, None)[1]}
    mode = modes.get(kind)
    bare = not conv.transposed and conv.padding_mode == "zeros" and not any(map(any, conv.padding))
    if not bare or mode not in ("circular", "reflect", "replicate"):
        return region
    padding = tuple(zip(args[0][::2], args[0][1::2], strict=True))[::-1]
    if len(padding) != len(conv.kernel) or min(args[0]) < 0:
        return region
    joined = replace(conv, in_shape=copy.in_shape, padding=padding, padding_mode=mode)
    return replace(region, nodes=(RegionNode(joined, (-1,)),))


def copy_runs(op: Copy) -> list[list[int]]:
    """Where every output entry comes from, as runs (start, step, count); zeros start at -1."""
    numbered = torch.arange(1, math.prod(op.in_shape) + 1, dtype=torch.float64)
    index = execute(op.call, numbered.reshape(1, *op.in_shape)).reshape(-1).long().numpy() - 1
    runs: list[list[int]] = []
    for value in index.tolist():
        if runs:
            start, step, count = runs[-1]
            if count == 1 and (start < 0) == (value < 0):
                runs[-1] = [start, value - start, 2]
                continue
            if value == start + step * count and (value < 0) == (start < 0):
                runs[-1][2] += 1
                continue
        if len(runs) == MAX_RUNS:
            raise _Unknown(f"{op.name!r} copies in more than {MAX_RUNS} runs")
        runs.append([value, 0, 1])
    return runs


def average_windows(op: Average) -> list[list[list[int]]]:
    """Per axis of the input and output position: start, stop and divisor of its window."""
    windows = _windows(op)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((2, *op.in_shape), generator=generator, dtype=torch.float64)
    y = x
    for axis, rows in enumerate(windows):
        parts = [y.narrow(axis + 1, a, b - a).sum(axis + 1) / c for a, b, c in rows]
        y = torch.stack(parts, axis + 1)
    expected = execute(op.call, x)
    if not torch.allclose(y.reshape(expected.shape), expected, rtol=1e-9, atol=1e-12):
        raise _Unknown(f"{op.name!r} averages in a way that windows do not describe")
    return windows


def _windows(op: Average) -> list[list[list[int]]]:
    kind, args, shape = op.call.target.split(".")[1], op.call.args[1:], op.in_shape
    assert op.call.args[0] == INPUT
    whole = [[[i, i + 1, 1] for i in range(n)] for n in shape]
    if kind in ("mean", "sum"):
        axes = {int(d) % (len(shape) + 1) - 1 for d in args[0]}
        divisor = [n if kind == "mean" else 1 for n in shape]
        return [[[0, n, divisor[a]]] if a in axes else whole[a] for a, n in enumerate(shape)]
    axes_count = int(kind[-2])
    spatial = shape[-axes_count:]
    rows = whole[: len(shape) - axes_count]
    if "adaptive" in kind:
        for n, m in zip(spatial, op.out_shape[-axes_count:], strict=True):
            ends = [(o * n // m, -(-(o + 1) * n // m)) for o in range(m)]
            rows.append([[a, b, b - a] for a, b in ends])
        return rows
    given: list[Any] = [*args, *_POOL_DEFAULTS[len(args) :]]
    kernel, stride, padding, _, include, override = given
    for a, (n, m) in enumerate(zip(spatial, op.out_shape[-axes_count:], strict=True)):
        k, s, p = _at(kernel, a), _at(stride or kernel, a), _at(padding, a)
        found = []
        for o in range(m):
            start, stop = o * s - p, min(o * s - p + k, n + p)
            count = stop - start if include else min(stop, n) - max(start, 0)
            if override is not None:
                count = int(override) if a == 0 else 1
            found.append([max(start, 0), min(stop, n), count])
        rows.append(found)
    return rows


_POOL_DEFAULTS = (None, (), (0,), False, True, None)


def _at(items: Any, axis: int) -> int:
    """One number per axis, or one for all."""
    items = items if isinstance(items, (tuple, list)) else (items,)
    return int(items[axis] if len(items) > 1 else items[0])


def _instruction(step: Instruction) -> list[Any]:
    args = [float(a).hex() for a in step.args] if step.op == "constant" else list(step.args)
    return [step.op, *args]


def describe(
    graph: BoundGraph, tensors: Mapping[str, Tensor], executed: ExecutedProgram | None = None
) -> NetworkDescription:
    """The description of a traced network with these parameters and buffers, and of the calls it
    executes where a certificate speaks of an execution."""
    with torch.no_grad():
        writer = _Writer(tensors)
        operators = [writer.operator(o) for o in graph.operators]
        calls = {}
        if executed is not None:
            steps = [
                {
                    "inputs": list(s.inputs),
                    "op": s.op,
                    **{k: writer.detail(v) for k, v in s.details.items()},
                }
                for s in executed.steps
            ]
            calls["executed"] = {"head": executed.head, "steps": steps}
    head = graph.head
    if head is not None:
        last = graph.operators[head]
        assert isinstance(last, Region)
        assert isinstance(last.primitive, Linear)
    shapes: dict[str, tuple[Shape, str]] = {
        n: (a.shape, array_sha256(a)) for n, a in writer.arrays.items()
    }
    text = canonical_json(
        {
            **calls, "features": graph.features, "head": head, "input": list(graph.input_shape),
            "operators": operators, "tape": [_instruction(s) for s in graph.tape],
            "total": graph.total,
            "weights": {n: [list(shape), digest] for n, (shape, digest) in shapes.items()},
        }
    )  # fmt: skip
    return NetworkDescription(text, writer.arrays)


def save_weights(
    model: nn.Module,
    path: str | Path,
    *,
    input_shape: Sequence[int],
    semantics: str = IDEAL,
) -> Path:
    """Write the arrays that :mod:`lmtfast.check` reads beside a certificate, as ``.npz``.

    Args:
        model: The certified network, in eval mode.
        path: File to write.
        input_shape: Shape of one input, as for :func:`lmtfast.certify`.
        semantics: As for :func:`lmtfast.certify`; what is executed has more arrays.

    Returns:
        The path. A checkpoint serves as well, unless the network computes weights from parameters
        (parametrizations) or reads tensors written into its code.

    Raises:
        UnsupportedLayerError: A part has no Lipschitz rule.

    Example:
        >>> import torch
        >>> save_weights(torch.nn.Linear(2, 2).eval(), "w.npz", input_shape=(2,))  # doctest: +SKIP
        PosixPath('w.npz')
    """
    traced, profile = trace_model(model, input_shape), profile_of(semantics)
    calls = None if profile is None else executed_program(Execution(model, traced, profile))
    return describe(traced.graph, named_tensors(model), calls).save(path)
