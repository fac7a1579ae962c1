# SPDX-License-Identifier: MIT
"""Who is timed: the library's registered backends, and the peers, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import lmtfast as lf
from benchmarks import loss_peers, peers
from benchmarks.pieces import (
    ComposeProblem,
    ComposeRunner,
    LibraryPairs,
    PairProblem,
    PlainPairs,
)
from benchmarks.problems import (
    BoundProblem,
    LossProblem,
    MarginLoss,
    PlainLoss,
    Runner,
    UnavailableError,
    reasons,
)
from lmtfast.backends import pair_norm, providing

PROBLEMS: dict[str, Callable[[str, torch.device], Any]] = {
    "bound": BoundProblem, "loss": LossProblem, "pairs": PairProblem, "compose": ComposeProblem,
}  # fmt: skip
ENGINES = ("operator", "symbol", "separable", "auto")
BACKENDS = ("reference", "native", "triton", "cuda")
HOST_ONLY = ("native",)


@dataclass(frozen=True)
class Provider:
    """One implementation of one operation.

    Attributes:
        name: What tables call it.
        op: The operation, a key of ``problems.PROBLEMS``.
        quantity: What it computes, where implementations differ: the engine, or another operator.
        make: Its runner for a problem.
        backend: The registered backend it needs, or None.
        capturable: Whether a CUDA graph can hold its step.
        copies: Whether it may be built many times for one case; compiling takes too long for that.
    """

    name: str
    op: str
    quantity: str
    make: Callable[[Any], Runner]
    backend: str | None = None
    capturable: bool = True
    copies: bool = True

    def runner(self, problem: Any) -> Runner:
        """The runner; raises :class:`UnavailableError` with the reason."""
        if self.backend is not None:
            status = lf.available_backends().get(self.backend)
            if status is None:
                raise UnavailableError("no backend of this name is registered")
            if not status.available:
                raise UnavailableError(status.reason)
            if self.backend in HOST_ONLY and problem.device.type != "cpu":
                raise UnavailableError("it computes on the CPU")
        with reasons():
            return self.make(problem)


def _library_bound(engine: str, backend: str) -> Provider:
    def make(problem: BoundProblem) -> Runner:
        return problem.bound(engine, backend)

    return Provider(f"lmtfast {engine} ({backend})", "bound", engine, make, backend)


def _peer(name: str, peer: type[peers.Peer], quantity: str, **traits: bool) -> Provider:
    def make(problem: BoundProblem) -> Runner:
        return peer(problem.model, problem.layers)

    return Provider(name, "bound", quantity, make, **traits)


def _library_loss(backend: str) -> Provider:
    def make(problem: LossProblem) -> Runner:
        return MarginLoss(problem, backend)

    return Provider(f"lmtfast ({backend})", "loss", "lmt++", make, backend)


def _library_pairs(backend: str) -> Provider:
    def make(problem: PairProblem) -> Runner:
        name = "pair_norm_forward"
        own = backend != "reference"
        return LibraryPairs(problem, providing(backend, name, "pair norms") if own else pair_norm)

    return Provider(f"lmtfast ({backend}) pairs", "pairs", "distances", make, backend)


def _plain_pairs(name: str, distances: loss_peers.Distances) -> Provider:
    def make(problem: PairProblem) -> Runner:
        return PlainPairs(problem, distances)

    return Provider(f"{name} pairs", "pairs", "distances", make)


def _library_tape(backend: str) -> Provider:
    def make(problem: ComposeProblem) -> Runner:
        if backend == "reference":
            return ComposeRunner(problem, problem.plan, None)
        module = providing(backend, "compose", "composing")
        return ComposeRunner(problem, problem.bounds.bound("auto", backend).bound.plan, module)

    return Provider(f"lmtfast ({backend}) tape", "compose", "tape", make, backend)


def _plain_loss(name: str, distances: loss_peers.Distances) -> Provider:
    def make(problem: LossProblem) -> Runner:
        return PlainLoss(problem, distances)

    return Provider(name, "loss", "lmt++", make)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        *(_library_bound(engine, backend) for engine in ENGINES for backend in BACKENDS),
        _peer("per layer", peers.PerLayer, "operator"),
        _peer("per layer, compiled", peers.CompiledPerLayer, "operator", copies=False),
        _peer("LiResNet, 10 iterations", peers.LiResNet, "operator"),
        _peer("LiResNet, 1 iteration", peers.LiResNetOnce, "operator"),
        _peer(
            "LiResNet, 10 iterations, compiled", peers.CompiledLiResNet, "operator", copies=False
        ),
        _peer("GloRo, 5 iterations", peers.GloRo, "operator", capturable=False),
        _peer("torch spectral_norm", peers.TorchSpectralNorm, "reshaped kernel"),
        _peer("Gram iteration", peers.GramIteration, "circular"),
        *(_library_loss(backend) for backend in BACKENDS),
        _plain_loss("plain, (N, K, D) differences", loss_peers.by_differences),
        _plain_loss("plain, K x K Gram", loss_peers.by_gram),
        _plain_loss("plain, N x K Gram rows", loss_peers.by_target_rows),
        *(_library_pairs(backend) for backend in BACKENDS),
        _plain_pairs("torch.cdist", lambda weight, classes: torch.cdist(weight[classes], weight)),
        _plain_pairs("plain, Gram rows", loss_peers.by_target_rows),
        *(_library_tape(backend) for backend in BACKENDS),
    )
}
