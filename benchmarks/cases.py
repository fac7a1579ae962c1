# SPDX-License-Identifier: MIT
"""What is timed, as data: one row per case, and the least work each needs.

A new case is a row of ``CASES``; a new implementation, a row of ``providers.PROVIDERS``; a new
operation, a problem in ``providers.PROBLEMS`` and a branch of ``work``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.pieces import ComposeProblem, PairProblem
from benchmarks.problems import LossProblem
from benchmarks.providers import BACKENDS, ENGINES
from lmtfast.table import CANDIDATES, RANK

# Columns of the real product of a step: candidates, re and im, or patterns of an operator. ``auto``
# mixes engines.
COLUMNS = {"symbol": 2 * CANDIDATES, "separable": RANK, "auto": 2 * CANDIDATES}
FLOAT = 4


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        op: Key of ``providers.PROBLEMS``.
        shape: Name of a network, or ``N x K x D``.
        modes: ``forward`` (no gradient) and ``gradient`` (forward and backward).
        providers: Names from ``providers.PROVIDERS``; the first is what ratios are taken to.
        suites: Where it runs: ``cpu``, ``gpu``, ``compiled`` (slow to prepare), ``quick``.
        memory: Whether the extra peak memory of a gradient step is measured.
        share: Part of the time of a run that the case's samples may take, relative to the others.
    """

    op: str
    shape: str
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    suites: tuple[str, ...]
    memory: bool = False
    share: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


def _library(*engines: str, backends: tuple[str, ...] = BACKENDS) -> tuple[str, ...]:
    return tuple(f"lmtfast {engine} ({backend})" for engine in engines for backend in backends)


BOTH = ("forward", "gradient")
PEERS = (
    "per layer", "LiResNet, 10 iterations", "LiResNet, 1 iteration", "GloRo, 5 iterations",
    "torch spectral_norm",
)  # fmt: skip
COMPILED_PEERS = ("per layer, compiled", "LiResNet, 10 iterations, compiled")
# Without the reference, which is the definition and not meant to be fast.
KERNELS = tuple(backend for backend in BACKENDS if backend != "reference")
PLAIN = ("plain, K x K Gram", "plain, N x K Gram rows", "plain, (N, K, D) differences")
LOSSES = (*PLAIN, *(f"lmtfast ({backend})" for backend in BACKENDS))
PAIRS = ("torch.cdist pairs", "plain, Gram rows pairs",
         *(f"lmtfast ({backend}) pairs" for backend in BACKENDS))  # fmt: skip
TAPES = tuple(f"lmtfast ({backend}) tape" for backend in BACKENDS)

CASES = (
    # The bound step of whole networks, every engine and peer.
    Case("bound", "wrn-10-1", BOTH, ("per layer", *_library(*ENGINES)), ("quick",)),
    Case("bound", "wrn-16-4", BOTH, (*PEERS, "Gram iteration", *_library(*ENGINES)),
         ("cpu", "gpu")),
    *(Case("bound", "wrn-28-10", BOTH, (*PEERS, *more, *_library(*ENGINES)), (suite,), share=3.0)
      for suite, more in (("cpu", COMPILED_PEERS[:1]), ("gpu", ()))),
    Case("bound", "resnet-14", BOTH, ("per layer", *_library("auto")), ("quick",)),
    Case("bound", "resnet-50", BOTH, ("per layer", "LiResNet, 1 iteration",
                                      *_library(*ENGINES, backends=KERNELS)), ("cpu", "gpu")),
    Case("bound", "l2w8", BOTH, (*PEERS, *COMPILED_PEERS, "Gram iteration", *_library("symbol")),
         ("quick",)),
    Case("bound", "l12w512", BOTH, ("LiResNet, 10 iterations", "LiResNet, 1 iteration",
         "per layer", *_library(*ENGINES, backends=KERNELS)), ("cpu", "gpu"), share=2.0),
    # What takes a minute to compile.
    Case("bound", "wrn-28-10", BOTH, ("per layer", COMPILED_PEERS[0],
                                      *_library("auto", backends=KERNELS)), ("compiled",)),
    Case("bound", "l12w512", BOTH, ("LiResNet, 10 iterations", COMPILED_PEERS[1],
                                    *_library("auto", backends=KERNELS)), ("compiled",)),
    # Cost against image size.
    *(Case("bound", f"wrn-28-10 at {size}", ("forward",),
           (*peers, *_library("symbol", backends=KERNELS)), (suite,))
      for suite, size, peers in (
          ("cpu", 64, PEERS[:1]), ("cpu", 128, PEERS[:1]), ("cpu", 224, ()),
          ("gpu", 64, PEERS[:1]), ("gpu", 128, PEERS[:1]), ("gpu", 224, PEERS[:1]))),
    # Margin cross-entropy.
    Case("loss", "64 x 200 x 256", ("gradient",), LOSSES, ("quick",), memory=True),
    Case("loss", "256 x 10 x 2048", ("gradient",), LOSSES, ("cpu", "gpu"), memory=True),
    Case("loss", "256 x 1000 x 2048", ("gradient",), LOSSES, ("cpu", "gpu"), memory=True),
    Case("loss", "4096 x 1000 x 2048", ("gradient",), (*PLAIN[:2], *LOSSES[len(PLAIN):]), ("gpu",),
         memory=True),
    # Parts of the step.
    Case("pairs", "20 x 50 x 8", BOTH, PAIRS, ("quick",)),
    Case("pairs", "256 x 1000 x 2048", BOTH, PAIRS, ("cpu", "gpu")),
    Case("compose", "wrn-10-1", ("gradient",), TAPES, ("quick",)),
    Case("compose", "wrn-28-10", ("gradient",), TAPES, ("cpu", "gpu")),
    Case("loss", "1024 x 32768 x 2048", ("gradient",), LOSSES, ("cpu", "gpu"), memory=True),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Least bytes moved and operations done by one call."""

    moved: float
    operations: float


def work(problem: Any, mode: str, quantity: str) -> Work | None:
    """The floor of a case; None for a quantity that has none of its own.

    Bound step: the weights are read once; with a gradient, ``.grad`` is read and written. The
    operator engine multiplies twice per weight and position, three times with a gradient;
    ``symbol`` and ``separable`` twice per weight and column, with a gradient once more for two
    columns. ``auto`` mixes them; its floor is that of the cheaper ones.

    Loss: logits and head are read, their gradients read and written; three products of the present
    rows of the head with all of it. Pairs: the same without logits, with the distances written.
    """
    gradient = mode == "gradient"
    passes = 3 if gradient else 1
    if isinstance(problem, (LossProblem, PairProblem)):
        n, k, d = problem.n, problem.k, problem.d
        matrix = n * k * (passes if isinstance(problem, LossProblem) else 1)
        return Work(FLOAT * (matrix + k * d * passes), 2 * min(n, k) * k * d * passes)
    if isinstance(problem, ComposeProblem):
        return None
    weights = sum(layer.weights for layer in problem.layers)
    moved = FLOAT * weights * passes
    if quantity == "operator":
        products = sum(layer.products for layer in problem.layers)
        return Work(moved, 2 * products * (3 if gradient else 2))
    if quantity in COLUMNS:
        return Work(moved, 2 * weights * (2 * COLUMNS[quantity] + (2 if gradient else 0)))
    return None


def memory_limit(problem: LossProblem) -> int:
    """Four times the bytes of logits, head and pair distances of the present rows."""
    n, k, d = problem.n, problem.k, problem.d
    return 4 * FLOAT * (n * k + k * d + min(n, k) * k)
