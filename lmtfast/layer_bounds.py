# SPDX-License-Identifier: MIT
"""What every layer contributes to a network's bound, beside two older bounds on its kernel."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from lmtfast.backends.reference import effective_weight
from lmtfast.bound import LipschitzBound
from lmtfast.closed_form import cisse, corollary_1, has_closed_form
from lmtfast.estimation import NetworkBound
from lmtfast.files import write_atomically
from lmtfast.graph import Conv, Operator, Region
from lmtfast.guarantee import check_certifiable, check_method, plan_bound
from lmtfast.level import Level
from lmtfast.plan import trace
from lmtfast.verified.budget import Budget
from lmtfast.weights import Weights, named_tensors

# From a cold start, the norms of the paper's network are within 0.1 % after 200 steps.
ESTIMATE_STEPS = 200


@dataclass(frozen=True)
class LayerBound:
    """One operator of a network.

    Args:
        name: Name of the operator in the plan.
        kind: Kind of the operator.
        in_shape: Shape it reads, without the batch.
        out_shape: Shape it writes.
        norm: Its spectral norm at the level of the table.
        method: How that was obtained.
        corollary_1: Cor. 1 of the LMT paper: root of the largest number of windows over one entry,
            times the norm of the kernel as a matrix. Convolutions only.
        cisse: The bound of Cisse et al.: root of the kernel's size instead. Convolutions only.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Cor. 1; Cisse et al. (2017),
        arXiv:1704.08847.
    """

    name: str
    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    norm: float
    method: str
    corollary_1: float | None
    cisse: float | None


@dataclass(frozen=True)
class LayerBounds:
    """All operators of a network, with the bound they compose to.

    Args:
        layers: One entry per operator, in the order of the plan.
        bound: The bound of the network.
        seconds: Time spent, tracing included.
    """

    layers: tuple[LayerBound, ...]
    bound: LipschitzBound
    seconds: float


def layer_bounds(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    level: str = "estimate",
    engine: str = "auto",
    method: str = "auto",
    budget: Budget | None = None,
) -> LayerBounds:
    """Bound every layer of a network.

    Args:
        model: A module of layers with a Lipschitz rule; evaluated with its running statistics.
        input_shape: Shape of one input.
        level: ``"estimate"`` runs 200 steps of ``engine`` from a cold start; the other levels are
            those of :func:`lmtfast.certified_bound` with ``method``.
        engine: Engine at level ``"estimate"``.
        method, budget: Method and its budget at the other levels.

    Raises:
        UnsupportedLayerError: A layer has no rule.

    Guarantee:
        Norms have the level asked for. Cor. 1 and Cisse are float64 singular values without a
        rounding analysis: estimates, for comparison.

    Example:
        >>> from lmtfast.models import build_model
        >>> model = build_model("digits", input_shape=(1, 8, 8), classes=10)
        >>> [layer.kind for layer in layer_bounds(model, (1, 8, 8)).layers]
        ['conv', 'conv', 'linear', 'linear']
    """
    started = time.perf_counter()
    asked = Level(level)
    if asked == "estimate":
        network = NetworkBound(model, input_shape, engine=engine)
        plan, bound = network.plan, network.converge(ESTIMATE_STEPS)
    else:
        check_method(method)
        check_certifiable(model)
        plan = trace(model, input_shape)
        bound = plan_bound(plan, model, level=asked, method=method, budget=budget)
    weights = Weights(named_tensors(model), dtype=torch.float64)
    layers = tuple(_layer(operator, bound, weights) for operator in plan.operators)
    return LayerBounds(layers, bound, time.perf_counter() - started)


def write_layers(path: str | Path, networks: Mapping[str, LayerBounds]) -> Path:
    """Write the layers of one or several networks, by name, as CSV."""
    columns = ["network", "level", *(f.name for f in fields(LayerBound))]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns)
    writer.writeheader()
    for network, result in networks.items():
        for layer in result.layers:
            row = asdict(layer) | {"network": network, "level": result.bound.level}
            for key in ("in_shape", "out_shape"):
                row[key] = "x".join(map(str, row[key]))
            writer.writerow(row)
    return write_atomically(Path(path), text.getvalue().encode())


@torch.no_grad()
def _layer(operator: Operator, bound: LipschitzBound, weights: Weights) -> LayerBound:
    conv = operator.primitive if isinstance(operator, Region) else None
    corollary = older = None
    if isinstance(conv, Conv) and has_closed_form(conv):
        kernel = effective_weight(conv, weights)
        corollary, older = corollary_1(conv, kernel), cisse(conv, kernel)
    return LayerBound(
        operator.name,
        operator.kind,
        operator.in_shape,
        operator.out_shape,
        float(bound.per_operator[operator.name]),
        bound.methods.get(operator.name, bound.method),
        corollary,
        older,
    )
