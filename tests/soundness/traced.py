# SPDX-License-Identifier: MIT
"""One network traced once and certified again and again while its weights change in place."""

from __future__ import annotations

from torch import Tensor, nn

from lmtfast.bound import LipschitzBound
from lmtfast.certification import ERROR_FACTOR
from lmtfast.enclosure import LogitEnclosure
from lmtfast.guarantee import plan_bound
from lmtfast.level import Level
from lmtfast.plan import make_plan
from lmtfast.radius import radius_lower
from lmtfast.tracing import trace_model


class Traced:
    """The steps of ``certify`` without tracing."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        self.model, self.shape = model.eval(), shape
        self.traced = trace_model(model, shape)
        graph = self.traced.graph
        self.plan = make_plan(model, graph, engine="operator", backend="reference")

    def bound(self, level: str = "rigorous", method: str = "auto") -> LipschitzBound:
        return plan_bound(self.plan, self.model, level=Level(level), method=method)

    def radii(
        self, x: Tensor, *, level: str = "rigorous", shrink: float = 1.0
    ) -> list[tuple[int, float]]:
        """Class and radius of every input; ``shrink`` seeds a constant that is too small."""
        bound = self.bound(level=level)
        norms = {name: float(v) for name, v in bound.per_operator.items()}
        enclosed = LogitEnclosure(self.model, self.traced, norms=norms)
        value, error = enclosed(x.reshape(-1, *self.shape))
        scale = float(bound.features if bound.head_weight is not None else bound.total) * shrink
        found = radius_lower(value, ERROR_FACTOR * error, bound, scale=scale)
        return list(zip(found[0].tolist(), found[1].tolist(), strict=True))
