# SPDX-License-Identifier: MIT
"""What one step of each engine costs, layer by layer and for whole networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import host_sampler, interleave
from lmtfast.engines import ENGINES
from lmtfast.estimation import NetworkBound
from lmtfast.models import build_model

# Layers of one shape in one network: the cost of a call is shared among its layers.
COPIES = 8
CHANNELS = (16, 64, 256)
SIZES = (4, 8, 16, 32)
SECONDS = 0.4
COST_COLUMNS = (
    "backend", "threads", "subject", "channels", "size", "positions", "engine", "engines",
    "forward_ms", "step_ms", "step_p20_ms", "step_p80_ms", "rescan_ms",
)  # fmt: skip
NETWORKS: Mapping[str, tuple[str, tuple[int, ...], Mapping[str, Any]]] = {
    "mnist": ("kolter-wong", (1, 28, 28), {}),
    "wrn-16-1": ("wide-resnet", (3, 32, 32), {"depth": 16, "width": 1}),
    "wrn-16-4": ("wide-resnet", (3, 32, 32), {"depth": 16, "width": 4}),
    "wrn-28-10": ("wide-resnet", (3, 32, 32), {"depth": 28, "width": 10}),
}


class Beside(nn.Module):
    """Equal 3 x 3 convolutions side by side: every one an operator of its own."""

    def __init__(self, channels: int, copies: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(copies)]
        self.convs = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        total = self.convs[0](x).relu()
        for conv in self.convs[1:]:
            total = total + conv(x).relu()
        return total


def calls(bound: NetworkBound, model: nn.Module) -> tuple[Callable[[], object], ...]:
    """One step without a gradient, and one whose gradient is added to every ``.grad``."""
    scale = 1.0 / float(bound(update=False).total.detach())

    def forward() -> object:
        with torch.no_grad():
            return bound()

    def step() -> object:
        model.zero_grad(set_to_none=True)
        return (bound().total * scale).backward()

    return forward, step


def costs_of(
    model: nn.Module,
    shape: tuple[int, ...],
    engines: tuple[str, ...],
    backend: str,
    *,
    copies: int = 1,
    seconds: float = SECONDS,
    rescan: bool = True,
) -> Iterator[dict[str, Any]]:
    """Milliseconds per step and copy of every engine, taken in turns."""
    bounds = {e: NetworkBound(model, shape, engine=e, backend=backend) for e in engines}
    samplers = {}
    for name, bound in bounds.items():
        for kind, call in zip(("forward", "step"), calls(bound, model), strict=True):
            samplers[f"{name} {kind}"] = host_sampler(call)
    taken = interleave(samplers, seconds)
    for name, bound in bounds.items():
        step = taken[f"{name} step"]
        started = time.perf_counter()
        if rescan:  # hundreds of steps long: once is enough
            bound.rescan()
        searched = time.perf_counter() - started
        yield {
            "backend": backend, "threads": torch.get_num_threads(), "engine": name,
            "engines": bound.plan.method,
            "forward_ms": 1e3 * taken[f"{name} forward"].median / copies,
            "step_ms": 1e3 * step.median / copies,
            "step_p20_ms": 1e3 * step.percentile(20) / copies,
            "step_p80_ms": 1e3 * step.percentile(80) / copies,
            "rescan_ms": 1e3 * searched / copies if rescan else "",
        }  # fmt: skip


def measure(backend: str) -> Iterator[tuple[dict[str, str], list[dict[str, Any]]]]:
    """What identifies a group of rows of ``costs.csv``, and the group: shapes, then networks."""
    for channels in CHANNELS:
        for size in SIZES:
            # A step on a wide or large layer outlasts a call's overhead without company.
            copies = COPIES if channels <= 64 and size <= 16 else 2
            model, shape = Beside(channels, copies), (channels, size, size)
            place = {"subject": "layer", "channels": str(channels), "size": str(size)}
            rows = costs_of(model, shape, ENGINES, backend, copies=copies, rescan=False)
            yield place, [{**place, "positions": size * size, **row} for row in rows]
    for name, (builder, shape, options) in NETWORKS.items():
        model = build_model(builder, input_shape=shape, classes=10, options=options)
        small = sum(p.numel() for p in model.parameters()) < 1 << 20
        rows = costs_of(
            model, shape, (*ENGINES, "auto"), backend, seconds=4 * SECONDS, rescan=small
        )
        yield {"subject": name}, [{"subject": name, **row} for row in rows]
