# SPDX-License-Identifier: MIT
"""Executions whose every call is rounded in the worst direction, and networks of width one.

No machine rounds like that, but the proof of ADR 0020 allows it: an entry y that a call stores may
be off by u |y|. With signs from the gradient, differences of logits move as far as they can.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmtfast.builder import Value
from lmtfast.enclosure import Enclosed, ErrorCall
from lmtfast.enclosure.elementwise import ACCURACY
from lmtfast.enclosure.joining import SUMS
from lmtfast.enclosure.linear import BATCH_NORMS, CONVOLUTIONS, FACTORS, PRODUCTS, TRANSPOSED
from lmtfast.execution import Execution
from lmtfast.rules.pooling import AVERAGES

ROUNDED = {
    *CONVOLUTIONS, *TRANSPOSED, *PRODUCTS, *BATCH_NORMS, *FACTORS, *AVERAGES, *SUMS,
    "aten.linear.default", "aten.addmm.default",
    *(name for name, accuracy in ACCURACY.items() if not accuracy.exact),
} - {"aten.neg.default"}  # fmt: skip


class WorstExecution(Execution):
    """An execution in float64 that moves every stored entry by a share of itself."""

    def call(self, node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> ErrorCall:
        found = super().call(node, env)
        self._target = found.target
        return found

    def _settled(self, result: Enclosed, traced: Value) -> Enclosed:
        value = result.value
        if self._target in ROUNDED:
            if self._signs:
                share = self.profile.unit * self._signs[len(self._stored)]
                value = value + share * value.abs()
            elif value.requires_grad:
                value.retain_grad()
            self._stored.append(value)
        return Enclosed(value, torch.zeros_like(value), value.new_zeros(len(value)), traced)

    def _logits(self, x: Tensor, signs: Sequence[Tensor] = ()) -> Tensor:
        self._signs, self._stored = signs, list[Tensor]()
        return self._run(x).value[0]

    def moved(self, x: Tensor, c: int, j: int) -> float:
        """How far roundings can move the difference of the logits c and j at one input."""
        unrounded = self._logits(x[None].double().requires_grad_())
        (unrounded[c] - unrounded[j]).backward()
        grads = (torch.zeros_like(v) if v.grad is None else v.grad for v in self._stored)
        signs = [g.sign() for g in grads]
        with torch.no_grad():
            rounded = self._logits(x[None].double(), signs)
            return float(abs((rounded[c] - rounded[j]) - (unrounded[c] - unrounded[j])))


Step = Callable[[Tensor], Tensor]


class Chain(nn.Module):
    """Steps of width one, where no inequality between lengths loses anything."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random, self.layers = random.Random(seed), nn.ModuleList()
        a, c = self.random.choice((0.3, -1.7, 3.0)), self.random.choice((0.3, -1.7, 300.0))
        f, g, h = (self.affine() for _ in range(3))
        self.steps: list[Step] = self.random.choices(
            [
                f, self.normalisation(), torch.relu, lambda x: x * a, lambda x: x / a,
                lambda x: x + c, lambda x: c - x, lambda x: nn.functional.leaky_relu(x, 0.3),
                lambda x: x + f(x).abs(), lambda x: x + g(x),
                lambda x: torch.sub(x, h(x), alpha=0.3), lambda x: x.add(x, alpha=0.3),
                lambda x: torch.cat([x, x * a], 1).mean(1, keepdim=True),
                lambda x: torch.cat([x, x.abs() * a], 1).sum(1, keepdim=True),
                lambda x: torch.maximum(x, h(x)),
                lambda x: x.expand(-1, 3).sum(1, keepdim=True),
                lambda x: nn.functional.pad(x, (1, 1), value=0.1).sum(1, keepdim=True),
            ],
            k=self.random.randint(1, 9),
        )  # fmt: skip
        self.head = nn.Linear(1, 2) if self.random.random() < 0.6 else None
        if self.head is not None:
            self.head.weight.data.copy_(torch.tensor([[1.0], [0.0]]))

    def affine(self) -> nn.Module:
        layer = nn.Linear(1, 1)
        with torch.no_grad():
            layer.weight.fill_(self.random.choice((1.0, 1.0003, 0.7, -1.3, 2.0, -0.1)))
            layer.bias.fill_(self.random.choice((0.0, 0.0, 3.0, -1000.0)))
        self.layers.append(layer)
        return layer

    def normalisation(self) -> nn.Module:
        layer = nn.BatchNorm1d(1)
        with torch.no_grad():
            layer.weight.fill_(self.random.choice((1.0, -2.0, 0.5)))
            layer.bias.fill_(self.random.choice((0.0, 5.0)))
            layer.running_mean.fill_(self.random.choice((0.0, -7.0, 0.3)))  # type: ignore[union-attr]
            layer.running_var.fill_(self.random.choice((1.0, 0.01, 2.0)))  # type: ignore[union-attr]
        self.layers.append(layer)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return torch.cat([x, x * 0.5], 1) if self.head is None else self.head(x)
