# SPDX-License-Identifier: MIT
"""Parts of a training step timed alone: pair distances of a head, and composing the norms."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

import lmtfast as lf
from benchmarks.loss_peers import Distances
from benchmarks.problems import BoundProblem, Solved, with_gradients
from lmtfast.composing import compose_with_jacobian
from lmtfast.plan import BoundPlan


class PairProblem:
    """Distances of U rows of a head to all K, named ``U x K x D``; with a gradient of ones."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.n, self.k, self.d = (int(part) for part in shape.split(" x "))
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.head = torch.randn(self.k, self.d, generator=generator).to(device)
        self.classes = torch.randperm(self.k, generator=generator)[: self.n].to(device)

    def leaf(self, dtype: torch.dtype) -> Tensor:
        return with_gradients({"head": self.head.to(dtype, copy=True)})["head"]

    @functools.cached_property
    def solved(self) -> Solved:
        """The definition in float64, from differences, class by class."""
        leaf, rows = self.leaf(torch.float64), []
        for c in self.classes.tolist():
            squares = (leaf[c] - leaf).square().sum(1)
            own = torch.arange(self.k, device=self.device) == c
            row = squares.masked_fill(own, 1.0).sqrt().masked_fill(own, 0.0)
            row.sum().backward()
            rows.append(row.detach())
        return Solved({"head": leaf}, torch.stack(rows))


class PairRunner:
    """Base: distances and the gradient of their sum."""

    def __init__(self, problem: PairProblem) -> None:
        self.problem, self.parameters = problem, {"head": problem.leaf(torch.float32)}

    def read(self, result: Tensor) -> Tensor:
        # A row's distance to itself is zero, which has no relative error; cdist leaves rounding.
        return result.scatter(1, self.problem.classes[:, None], 1.0)

    def twin(self) -> Solved:
        return self.problem.solved


class LibraryPairs(PairRunner):
    """A backend's pair distances and their vector-Jacobian product."""

    def __init__(self, problem: PairProblem, module: ModuleType) -> None:
        super().__init__(problem)
        self.module = module

    def forward(self) -> Tensor:
        with torch.no_grad():
            norms: Tensor = self.module.pair_norm_forward(
                self.parameters["head"], self.problem.classes
            )
            return norms

    def gradient(self) -> Tensor:
        head, norms = self.parameters["head"], self.forward()
        with torch.no_grad():
            assert head.grad is not None
            head.grad += self.module.pair_norm_vjp(
                head, self.problem.classes, norms, torch.ones_like(norms)
            )
        return norms

    def clone(self) -> LibraryPairs:
        return LibraryPairs(self.problem, self.module)


class PlainPairs(PairRunner):
    """The same under autograd, by one way to the distances."""

    def __init__(self, problem: PairProblem, distances: Distances) -> None:
        super().__init__(problem)
        self.distances = distances

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.distances(self.parameters["head"], self.problem.classes)

    def gradient(self) -> Tensor:
        norms = self.distances(self.parameters["head"], self.problem.classes)
        norms.sum().backward()
        return norms.detach()

    def clone(self) -> PlainPairs:
        return PlainPairs(self.problem, self.distances)


class ComposeProblem:
    """The bound of a network from given norms, and its derivative in each."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.bounds, self.device = BoundProblem(shape, device), device
        self.plan = lf.trace(self.bounds.model, self.bounds.network.input_shape)
        self.sigmas = torch.linspace(0.5, 1.5, len(self.plan.operators)).to(device)


class ComposeRunner:
    """The tape on one backend: the reference's one small operation at a time, or one call."""

    parameters: dict[str, Tensor]

    def __init__(self, problem: ComposeProblem, plan: BoundPlan, module: ModuleType | None) -> None:
        self.problem, self.plan, self.module = problem, plan, module
        self.sigmas, self.parameters = problem.sigmas, {}

    def gradient(self) -> tuple[Tensor, Tensor]:
        if self.module is None:
            graph = self.plan.graph
            return compose_with_jacobian(graph.tape, self.sigmas, (graph.features, graph.total))
        values, jacobian = self.module.compose(self.plan.table, self.sigmas)
        return values, jacobian

    forward = gradient

    def read(self, result: tuple[Tensor, Tensor]) -> Tensor:
        # Plus one: an exact zero, such as the head's share in the features, has no relative error.
        return torch.cat([part.flatten() for part in result]) + 1.0

    def clone(self) -> ComposeRunner:
        return ComposeRunner(self.problem, self.plan, self.module)

    def twin(self) -> ComposeRunner:
        other = ComposeRunner(self.problem, self.plan, None)
        other.sigmas = self.sigmas.double()
        return other
