# SPDX-License-Identifier: MIT
"""What the bound costs in a training step: the same step with and without it, interleaved.

    python -m benchmarks.training_step --device cuda --out DIR
    python -m benchmarks.training_step --suite quick

A step is forward in bfloat16 autocast, the loss, backward and SGD with momentum. ``plain`` is
cross-entropy; the others are the LMT++ loss with the bound of one engine, on the backend that the
library chooses or on the one named. On a GPU both clocks are read: events around a queued step
(what the device does) and the host's over several steps (what a user waits for).
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmtfast as lf
from benchmarks.machine import header
from benchmarks.networks import NETWORKS, build_network, layers_of
from benchmarks.piggy_back import PiggyBack
from benchmarks.problems import EPS, UnavailableError, reasons
from benchmarks.report import Row, text_table, write_rows
from benchmarks.run import first_line
from benchmarks.timing import Sampler, host_sampler, interleave, queued_sampler
from lmtfast.level import ESTIMATE

FILE = "training.csv"
STEPS = 4  # of a sample by the host's clock
# Lets backward reach the iterates where no sample has a margin, and so the loss no slope in them.
CARRIED = 1e-6


@dataclass(frozen=True)
class Variant:
    """A training step: without a bound, with an engine's, or with iterates that ride along."""

    name: str
    engine: str | None = None
    backend: str | None = None
    piggy_back: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class StepCase:
    """One network and batch size; the first variant is what overheads are taken to."""

    network: str
    batch: int
    variants: tuple[Variant, ...]
    suites: tuple[str, ...]

    @property
    def shape(self) -> str:
        return f"{self.network}, N = {self.batch}"


EAGER = (
    Variant("plain"),
    *(Variant(engine, engine) for engine in ("operator", "symbol", "separable", "auto")),
    Variant("auto (triton)", "auto", "triton"),
)
COMPILED = (
    Variant("plain, compiled", compiled=True),
    Variant("auto, compiled", "auto", compiled=True),
    Variant("piggy-back, compiled", piggy_back=True, compiled=True),
)
CASES = (
    *(StepCase("wrn-28-10", n, EAGER, ("gpu",)) for n in (128, 256, 512)),
    *(StepCase("resnet-50", n, EAGER, ("gpu",)) for n in (128, 256, 512)),
    StepCase("wrn-28-10", 256, COMPILED, ("compiled",)),
    StepCase("wrn-10-1", 4, (*EAGER, Variant("piggy-back", piggy_back=True)), ("quick",)),
)  # fmt: skip


class TrainingStep:
    """One variant at one batch of random images; calling it trains for one step."""

    def __init__(self, case: StepCase, variant: Variant, device: torch.device) -> None:
        network = NETWORKS[case.network]
        model = build_network(case.network).to(device)
        layers = layers_of(model, network.input_shape)
        self.device, self.bound, self.rider = device, None, None
        if variant.engine is not None:
            shape, backend = network.input_shape, variant.backend
            self.bound = lf.NetworkBound(model, shape, engine=variant.engine, backend=backend)
        if variant.piggy_back:
            self.rider = PiggyBack(model, layers)
            model = self.rider.network
        self.model = model.to(memory_format=torch.channels_last).train()
        weights = [p for n, p in model.named_parameters() if not n.endswith(".v")]
        self.optimizer = torch.optim.SGD(weights, lr=1e-4, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(case.batch, *network.input_shape, generator=generator)
        self.x = x.to(device, memory_format=torch.channels_last)
        head = model.get_submodule("head")
        assert isinstance(head, nn.Linear)
        self.head = head
        y = torch.randint(head.out_features, (case.batch,), generator=generator)
        self.y = y.to(device)
        self.loss: Callable[[], Tensor] = self._loss
        if variant.compiled:
            self.loss = torch.compile(self._loss, dynamic=False)

    def _loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            if self.rider is None:
                logits = self.model(self.x)
            else:
                logits, norms = self.rider(self.x)
        if self.rider is not None:
            features = norms.log().sum().exp()
            loss = lf.margin_cross_entropy(logits, self.y, _bound(features, self.head), eps=EPS)
            return loss + CARRIED * norms.log().sum()
        if self.bound is not None:
            return lf.margin_cross_entropy(logits, self.y, self.bound(), eps=EPS)
        return F.cross_entropy(logits.float(), self.y)

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        if self.rider is not None:
            self.rider.advance()
        self.optimizer.step()
        # Gradients stay where they are: a captured graph adds to the same memory.
        self.optimizer.zero_grad(set_to_none=False)
        return loss.detach()


def _bound(features: Tensor, head: nn.Linear) -> lf.LipschitzBound:
    return lf.LipschitzBound(
        total=features, features=features, per_operator={}, level=ESTIMATE,
        slack=float("nan"), method="piggy-back", head_weight=head.weight,
        classes=head.out_features,
    )  # fmt: skip


def samplers_of(step: TrainingStep) -> dict[str, Sampler]:
    """Clocks to sample a step with: the host's, and on a GPU the device's beside it."""
    if step.device.type == "cpu":
        return {"host": host_sampler(step)}

    def wall() -> float:
        # Several steps: the host may run ahead, as it does in training.
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / STEPS

    return {"events": queued_sampler([step]), "host": wall}


def run_case(case: StepCase, device: torch.device, seconds: float) -> list[Row]:
    """Rows of one case, per clock. A variant whose loss is not finite is red and has no time."""
    samplers: dict[str, dict[str, Sampler]] = {}
    refused: dict[str, tuple[str, str]] = {}
    torch.compiler.reset()
    for variant in case.variants:
        try:
            with reasons():
                step = TrainingStep(case, variant, device)
                losses = [float(step()) for _ in range(2)]
                if all(math.isfinite(loss) for loss in losses):
                    samplers[variant.name] = samplers_of(step)
                else:
                    refused[variant.name] = "red", f"losses {losses}"
        except UnavailableError as error:
            refused[variant.name] = "not available", str(error)
        except Exception as error:  # one variant that breaks must not hide the others
            refused[variant.name] = "failed", f"{type(error).__name__}: {first_line(error)}"
    clocks = ("host",) if device.type == "cpu" else ("events", "host")
    rows = []
    for clock in clocks:
        taken = interleave({name: s[clock] for name, s in samplers.items()}, seconds)
        baseline = taken.get(case.variants[0].name)
        for variant in case.variants:
            status, reason = refused.get(variant.name, ("ok", ""))
            fixed = ("training step", case.shape, f"bfloat16, {clock}", variant.name,
                     variant.engine or "", status, reason)  # fmt: skip
            samples = taken.get(variant.name)
            if samples is None:
                rows.append(Row(*fixed))
                continue
            times = (1e3 * samples.percentile(q) for q in (20, 50, 80))
            faster = None if baseline is None else baseline.median / samples.median
            rows.append(Row(*fixed, clock, len(samples.seconds), *times, faster))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--suite", default="gpu", choices=("gpu", "compiled", "quick"))
    parser.add_argument("--seconds", type=float, default=5.0, help="of samples, per case")
    parser.add_argument("--out", type=Path, help=f"folder for {FILE}; default: print only")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    head, rows = header(device), []
    for case in CASES:
        if options.suite not in case.suites:
            continue
        started = time.perf_counter()
        new = run_case(case, device, options.seconds)
        rows += new
        print(text_table(new), end="", flush=True)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
        if options.out is not None:
            write_rows(options.out / FILE, head, rows)  # after every case: a limit may strike
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
