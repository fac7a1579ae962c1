# SPDX-License-Identifier: MIT
"""How long a call takes: interleaved samples, on the CPU and on a GPU.

Variants take turns, so a slow minute of the machine is every variant's. On a GPU a sample is one
replay of a CUDA graph that holds one call on each of several copies of the data, together larger
than the L2 cache; a call that cannot be captured is timed between events, queued behind a spin that
outlasts the host's work, so that the host is not what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]
Sampler = Callable[[], float]

MIN_SAMPLE_SECONDS, MAX_REPEATS = 5e-3, 10
MIN_ROUNDS, MAX_ROUNDS = 5, 50
# A variant that takes more than this share of the time for one sample gets three.
SLOW_SHARE, SLOW_ROUNDS = 0.1, 3


@dataclass(frozen=True)
class Samples:
    """Seconds per call."""

    seconds: tuple[float, ...]

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.seconds, q))

    @property
    def median(self) -> float:
        return self.percentile(50)


def host_sampler(call: Call) -> Sampler:
    """Wall-clock seconds per call; short calls are repeated within a sample."""
    call()
    start = time.perf_counter()
    call()
    repeats = max(1, round(MIN_SAMPLE_SECONDS / (time.perf_counter() - start)))

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    return sample


def graph_sampler(calls: list[Call], pool: object = None) -> Sampler:
    """Seconds per call of one replay of all calls in a CUDA graph; raises if one resists.

    Short calls are repeated within the graph. ``pool`` (``torch.cuda.graph_pool_handle()``) lets
    the graphs of several variants, which never run at once, use the same memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        start = time.perf_counter()
        for call in calls:
            call()
        stream.synchronize()
        once = time.perf_counter() - start
    torch.cuda.current_stream().wait_stream(stream)
    repeats = max(1, min(MAX_REPEATS, round(MIN_SAMPLE_SECONDS / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls * repeats:
            call()
    return _between_events(graph.replay, len(calls) * repeats)


def queued_sampler(calls: list[Call]) -> Sampler:
    """Seconds per call between two events, queued while the device spins."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    # Twice the host's time at 2 GHz, the highest clock of these devices or near it.
    cycles = int(2 * host * 2e9)

    def run() -> None:
        for call in calls:
            call()

    return _between_events(run, len(calls), cycles)


def _between_events(run: Call, calls: int, spin: int = 1_000_000) -> Sampler:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        torch.cuda.synchronize()
        torch.cuda._sleep(spin)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    sample()
    return sample


def interleave(samplers: Mapping[str, Sampler], seconds: float) -> dict[str, Samples]:
    """Samples of every variant, taken in turns within about ``seconds``, at least five each.

    The slowest get three: they decide nothing, and would leave no time for the others.
    """
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    started = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        if turn == SLOW_ROUNDS and len(names) > 1:
            fast = [n for n in names if max(taken[n]) < SLOW_SHARE * seconds]
            names = fast or names
        # A different one first each time: whoever follows a large working set pays for it.
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            taken[name].append(samplers[name]())
        elapsed = time.perf_counter() - started
        if turn + 1 >= MIN_ROUNDS and elapsed * (turn + 2) / (turn + 1) > seconds:
            break
    return {name: Samples(tuple(values)) for name, values in taken.items()}
