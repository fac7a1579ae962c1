# SPDX-License-Identifier: MIT
"""What is timed: one problem per operation, which owns the data and makes the runners.

A runner is one implementation, ready to be called. ``forward`` and ``gradient`` do one step;
``read`` turns what they return into the numbers that are checked. ``parameters`` are the leaves
whose ``.grad`` a gradient step adds to. ``twin`` is the definition in float64 at the same point.
"""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn

import lmtfast as lf
from benchmarks.loss_peers import Distances, by_target_rows, extra_bytes, lmt_plus_plus
from benchmarks.networks import NETWORKS, build_network, layers_of
from lmtfast.errors import ArgumentError, BackendUnavailableError, DtypeError
from lmtfast.level import ESTIMATE
from lmtfast.tracing import TracedModel, trace_model

EPS = 36 / 255


class Runner(Protocol):
    """One implementation of one operation, at one point."""

    parameters: dict[str, Tensor]

    def forward(self) -> Any: ...

    def gradient(self) -> Any: ...

    def read(self, result: Any) -> Tensor: ...

    def twin(self) -> Any: ...

    def clone(self) -> Any: ...


class UnavailableError(Exception):
    """A provider cannot run here; the message says why."""


@contextmanager
def reasons() -> Iterator[None]:
    """Turns the library's refusals into :class:`UnavailableError`."""
    try:
        yield
    except (BackendUnavailableError, ArgumentError, DtypeError) as error:
        raise UnavailableError(" ".join(str(error).split())) from error


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def with_gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves, each with a gradient of zeros for the steps to add to, as a loss would leave."""
    for leaf in tensors.values():
        leaf.requires_grad_()
        leaf.grad = torch.zeros_like(leaf)
    return tensors


class BoundProblem:
    """One step of the bound of a network: every linear layer's norm, and their gradient."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.network, self.device = NETWORKS[shape], device
        self.model = build_network(shape).to(device)
        self.layers = layers_of(self.model, self.network.input_shape)

    @functools.cached_property
    def traced(self) -> TracedModel:
        return trace_model(self.model, self.network.input_shape)

    @functools.cache  # noqa: B019  (a problem lives as long as its case)
    def bound(self, engine: str, backend: str) -> BoundRunner:
        """The library's runner, made once."""
        model = copy.deepcopy(self.model)
        shape = self.network.input_shape
        # Tracing takes seconds and depends on the architecture alone.
        with mock.patch("lmtfast.estimation.trace_model", return_value=self.traced):
            bound = lf.NetworkBound(model, shape, engine=engine, backend=backend)
        if backend != "reference" and not bound.plan.table.compiled:
            raise UnavailableError("it runs no step of this network; the reference would")
        return BoundRunner(self, engine, model, bound)


class BoundRunner:
    """``lmtfast.NetworkBound`` with one engine on one backend."""

    def __init__(
        self, problem: BoundProblem, engine: str, model: nn.Module, bound: lf.NetworkBound
    ) -> None:
        self.problem, self.engine, self.model, self.bound = problem, engine, model, bound
        self.parameters = with_gradients(dict(model.named_parameters()))
        plan = bound.plan
        self.note = (
            f"{len(plan.uncompiled)} of {len(plan.operators)} operators run by the reference"
            if plan.table.compiled and plan.uncompiled
            else ""
        )

    def forward(self) -> lf.LipschitzBound:
        with torch.no_grad():
            return self.bound()

    def gradient(self) -> lf.LipschitzBound:
        result: lf.LipschitzBound = self.bound()
        result.total.backward()
        return result

    def read(self, result: lf.LipschitzBound) -> Tensor:
        return torch.stack([result.total, *result.per_operator.values()]).detach()

    def clone(self) -> BoundRunner:
        return BoundRunner(self.problem, self.engine, *copy.deepcopy((self.model, self.bound)))

    def twin(self) -> BoundRunner:
        reference = self.problem.bound(self.engine, "reference")
        model, bound = copy.deepcopy((reference.model, reference.bound))
        other = BoundRunner(self.problem, self.engine, model.double(), bound.double())
        bound.load_state_dict(self.bound.state_dict())
        return other


@dataclass(frozen=True)
class Solved:
    """A runner's answer, kept."""

    parameters: dict[str, Tensor]
    result: Tensor

    def forward(self) -> Tensor:
        return self.result

    def gradient(self) -> Tensor:
        return self.result


class LossProblem:
    """Margin cross-entropy of a batch, named ``N x K x D``; half of the samples are classified."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.n, self.k, self.d = (int(part) for part in shape.split(" x "))
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.target = torch.randint(self.k, (self.n,), generator=generator).to(device)
        logits = torch.randn(self.n, self.k, generator=generator)
        lift = 6.0 * torch.rand(self.n, 1, generator=generator)
        self.tensors = {
            "logits": logits.to(device).scatter_add(1, self.target[:, None], lift.to(device)),
            "head": torch.randn(self.k, self.d, generator=generator).to(device) / self.d**0.5,
            "features": torch.tensor(2.0, device=device),
        }

    def leaves(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return with_gradients({k: t.to(dtype, copy=True) for k, t in self.tensors.items()})

    @functools.cached_property
    def solved(self) -> Solved:
        """The definition in float64, computed once."""
        runner = PlainLoss(self, by_target_rows, torch.float64)
        return Solved(runner.parameters, runner.gradient())


class LossRunner:
    """Base: forward and backward of a scalar loss over the problem's leaves."""

    def __init__(self, problem: LossProblem, dtype: torch.dtype = torch.float32) -> None:
        self.problem, self.parameters = problem, problem.leaves(dtype)

    def loss(self) -> Tensor:
        raise AssertionError("every runner has a loss")

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.loss()

    def gradient(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def read(self, result: Tensor) -> Tensor:
        return result.reshape(1)

    def twin(self) -> Solved:
        return self.problem.solved


class MarginLoss(LossRunner):
    """``lmtfast.margin_cross_entropy`` on one backend."""

    def __init__(self, problem: LossProblem, backend: str, member: str = "lmt++") -> None:
        super().__init__(problem)
        self.backend, self.member = backend, member
        features = self.parameters["features"]
        self.bound = lf.LipschitzBound(
            total=features, features=features, per_operator={}, level=ESTIMATE,
            slack=math.nan, method="given", head_weight=self.parameters["head"], classes=problem.k,
        )  # fmt: skip

    def loss(self) -> Tensor:
        return lf.margin_cross_entropy(
            self.parameters["logits"], self.problem.target, self.bound, eps=EPS,
            scaling=self.member, backend=self.backend,
        )  # fmt: skip

    def clone(self) -> MarginLoss:
        return MarginLoss(self.problem, self.backend, self.member)


class PlainLoss(LossRunner):
    """The same loss in plain PyTorch, by one way to the pair distances."""

    def __init__(
        self, problem: LossProblem, distances: Distances, dtype: torch.dtype = torch.float32
    ) -> None:
        needed = extra_bytes(distances, problem.n, problem.k, problem.d)
        free = free_bytes(problem.device)
        if needed > free / 2:
            raise UnavailableError(
                f"its temporaries take {needed / 2**30:.0f} GiB of {free / 2**30:.0f} free"
            )
        super().__init__(problem, dtype)
        self.distances = distances

    def loss(self) -> Tensor:
        leaves, target = self.parameters, self.problem.target
        addition = EPS * leaves["features"] * self.distances(leaves["head"], target)
        return lmt_plus_plus(leaves["logits"], target, addition)

    def clone(self) -> PlainLoss:
        return PlainLoss(self.problem, self.distances)
