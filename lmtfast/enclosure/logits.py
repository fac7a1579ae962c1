# SPDX-License-Identifier: MIT
"""Runs a traced program in float64 with an error bound beside every tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lmtfast.builder import Base, Expression, Value
from lmtfast.composing import compose_up
from lmtfast.enclosure.interpreter import ProgramInterpreter
from lmtfast.enclosure.registry import Enclosed, outward
from lmtfast.graph import Copy, Region, Scale
from lmtfast.tracing import TracedModel
from lmtfast.verified.region import operator_norm_upper
from lmtfast.verified.rounding import mul_up


class LogitEnclosure(ProgramInterpreter):
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
        self._norms = None if norms is None else dict(norms)
        super().__init__(model, traced, tensors)
        self._known: dict[int, float] = {}
        if self._norms is not None:
            self._read_tape()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and error bounds of a batch. ``(N, ...)`` to two ``(N, K)``, float64.

        An error of infinity means that nothing is known, for example after an overflow.
        """
        return self._finish(self.run(x.detach().to(torch.float64).contiguous()))

    # -- norms -----------------------------------------------------------------------------------

    def _read_tape(self) -> None:
        """Norms of every expression the graph closed, and of those a norm-preserving copy away."""
        for expression, index in self.builder._closed.values():
            norm = self._tape_value(index)
            below: Expression | Base = expression
            while True:
                self._known.setdefault(id(below), norm)
                if not isinstance(below, Expression) or not _isometric(below):
                    break
                below = below.inputs[0]

    def _tape_value(self, index: int) -> float:
        assert self._norms is not None
        for known in self.builder.operators:
            if known.name not in self._norms:
                self._norms[known.name] = operator_norm_upper(known, self.weights).upper
        sigmas = [self._norms[o.name] for o in self.builder.operators]
        return compose_up(self.builder.tape[: index + 1], sigmas)[index]

    def _region_norm(self, value: Value) -> float:
        if value.expression is value.base:
            return 1.0
        if id(value.expression) not in self._known:
            # A tensor the graph closed only together with what follows it.
            self._known[id(value.expression)] = self._tape_value(self.builder._norm(value))
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

    def _norm_source(self) -> Callable[[Value], float] | None:
        return None if self._norms is None else self._region_norm

    def _settled(self, result: Enclosed, traced: Value) -> Enclosed:
        # Where the value overflowed nothing is known, whatever the error bound says.
        unknown = ~result.value.isfinite() | result.local.isnan()
        local = result.local.masked_fill(unknown, math.inf)
        base = result.base.nan_to_num(nan=math.inf, posinf=math.inf)
        return Enclosed(result.value, local, base, traced)

    def _finish(self, logits: Enclosed) -> tuple[Tensor, Tensor]:
        assert logits.traced is not None
        if self._norms is None:
            return logits.value, logits.local
        reached = outward(logits.base * self._output_norm(logits.traced))
        error = outward(logits.local + reached.reshape(-1, *(1,) * (logits.value.ndim - 1)))
        return logits.value, error.nan_to_num(nan=math.inf, posinf=math.inf)


def _isometric(expression: Expression) -> bool:
    op = expression.op
    if isinstance(op, Copy):
        return op.bijective
    return isinstance(op, Scale) and op.ref is None and abs(op.gain) == 1.0


def enclose(
    model: nn.Module,
    traced: TracedModel,
    x: Tensor,
    *,
    norms: Mapping[str, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of one batch and bounds on their errors; see :class:`LogitEnclosure`."""
    return LogitEnclosure(model, traced, norms=norms)(x)
