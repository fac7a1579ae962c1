# SPDX-License-Identifier: MIT
"""Many weight sets at ``rigorous``, each bound judged exactly; a public counter keeps the tally.

    python -m tests.soundness.soak --small 1000000 --medium 10000 --seed 1

The counter (``benchmarks/results/soak/counter.jsonl``) holds one line per stretch of work; it is
written whole or not at all, and a run goes on behind the last line of its seed. The seed and the
number of the plan determine every weight. If a bound is below the truth, the line has ``findings``
and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmtfast as lf
from benchmarks.machine import ROOT, output, processor
from lmtfast.guarantee import plan_bound
from lmtfast.level import RIGOROUS
from tests.cases import Parallel
from tests.soundness.rayleigh import bareiss_accepts, judge
from tests.soundness.sites import COMPOSITES, Site, larger_conv, linear, small_conv
from tests.soundness.weight_sets import GENERATORS

COUNTER = ROOT / "benchmarks" / "results" / "soak" / "counter.jsonl"
SMALL = 32  # the smaller side of a small set's matrix
# By elimination as well: one in so many sets, fewer of the large ones, whose numbers grow long.
BAREISS_EVERY, BAREISS_SIDE, BAREISS_LARGE = 50, 16, 500
STRETCH = 240.0  # seconds between lines of the counter


# Proofs that stop a little or far above the norm by design; their excess is counted apart.
LOOSE = ("banded", "composition", "torus")


@dataclass(frozen=True)
class Plan:
    """Sites that are traced and bounded together.

    Attributes:
        method: As in :func:`lmtfast.certified_bound`.
        blocks, rounds: Generators are drawn anew for every block, weights for every round.
    """

    sites: tuple[Site, ...]
    method: str
    blocks: int
    rounds: int


def _matrices(rng: random.Random) -> Plan:
    sides = [(rng.randint(1, SMALL), rng.randint(1, SMALL)) for _ in range(36)]
    sides += [(n, n) for n in (1, 2, 4, 8, 16, 32, rng.randint(3, 31), rng.randint(3, 31))]
    long = [(rng.randint(1, 6), int(2 ** rng.uniform(5, 9))) for _ in range(4)]
    sides += [side if rng.random() < 0.5 else side[::-1] for side in long]
    return Plan(tuple(linear(m, n) for m, n in sides), "auto", 40, 40)


def _convs(rng: random.Random, count: int) -> list[Site]:
    found: list[Site] = []
    while len(found) < count:
        site = small_conv(rng.randrange(1 << 30))
        if 0 < min(site.pattern.rows, site.pattern.columns) <= SMALL:
            found.append(site)
    return found


def _small(rng: random.Random, number: int) -> Plan:
    turn = number % 6
    if turn == 3:
        return Plan(tuple(_convs(rng, 32)), "auto", 20, 25)
    if turn == 4:
        return Plan(tuple(make(rng) for make in COMPOSITES for _ in range(3)), "auto", 8, 25)
    if turn == 5:
        return Plan(tuple(_convs(rng, 8)), rng.choice(("banded", "torus")), 8, 25)
    return _matrices(rng)


def _medium(rng: random.Random, number: int) -> Plan:
    sites = []
    for _ in range(6):
        most = 12 if rng.random() < 0.1 else 9.5
        if number % 5 == 4:
            sites.append(larger_conv(rng, int(2 ** rng.uniform(6, most))))
            continue
        short = int((SMALL + 1) * 2 ** min(4.95, rng.expovariate(1.2)))
        long = min(1024, int(short * 2 ** abs(rng.gauss(0, 1))))
        sites.append(linear(*((short, long) if rng.random() < 0.5 else (long, short))))
    return Plan(tuple(sites), "auto", 10, 4)


SIZES: dict[str, Callable[[random.Random, int], Plan]] = {"small": _small, "medium": _medium}


@dataclass
class Tally:
    """What a stretch of one size has seen."""

    size: str
    seed: int
    first: int
    plans: int = 0
    count: int = 0
    exact: int = 0
    unbounded: int = 0
    unsound: int = 0
    seconds: float = 0.0
    generators: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    excess: dict[str, float] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> str:
        excess = {name: float(f"{value:.3g}") for name, value in sorted(self.excess.items())}
        return json.dumps(
            _header() | vars(self) | {"seconds": round(self.seconds), "excess": excess}
        )


def _header() -> dict[str, Any]:
    """Date, the commit that last changed the library, versions, and the machine in words."""
    changed = output("git", "status", "--porcelain", "--untracked-files=no", "--", "lmtfast")
    commit = output("git", "log", "-1", "--format=%H", "--", "lmtfast") or "unknown"
    name, flags = processor()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit + (" with local changes" if changed else ""),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__
        },
        "machine": f"{name}, {os.cpu_count()} cores, {' '.join(flags)}",
    }  # fmt: skip


def _draw(site: Site, name: str, rng: np.random.Generator, rounds: int) -> list[torch.Tensor]:
    shapes = [tuple(site.module.get_parameter(w).shape) for w in site.weights]
    return [
        GENERATORS[name](rng, rounds, s[0], int(np.prod(s[1:]))).reshape(rounds, *s) for s in shapes
    ]


def run_plan(tally: Tally, number: int, until: float = math.inf) -> None:
    """Draw, bound and judge the sets of one plan; after that moment, only its first block."""
    choice = random.Random(f"{tally.seed} {tally.size} {number}")
    plan = SIZES[tally.size](choice, number)
    net = Parallel(list(plan.sites)).eval()
    traced = lf.trace(net, (net.length,))
    assert [o.in_shape for o in traced.operators] == [s.shape for s in plan.sites]
    rng = np.random.default_rng([tally.seed, number, len(tally.size)])
    for block in range(plan.blocks):
        if block and time.monotonic() > until:
            break
        names = [choice.choice(site.generators or tuple(GENERATORS)) for site in plan.sites]
        drawn = [
            _draw(s, name, rng, plan.rounds) for s, name in zip(plan.sites, names, strict=True)
        ]
        bounds, methods = [], []
        for r in range(plan.rounds):
            tensors = dict(net.named_parameters()) | dict(net.named_buffers())
            for i, (site, weights) in enumerate(zip(plan.sites, drawn, strict=True)):
                tensors |= {
                    f"layers.{i}.{w}": t[r] for w, t in zip(site.weights, weights, strict=True)
                }
            bound = plan_bound(traced, net, level=RIGOROUS, method=plan.method, tensors=tensors)
            bounds.append(list(bound.per_operator.values()))
            methods.append(list(bound.methods.values()))
        for i, (site, name) in enumerate(zip(plan.sites, names, strict=True)):
            values, column = site.values(drawn[i]), np.array([row[i] for row in bounds])
            used = [row[i] for row in methods]
            _count(
                tally, site, name, used, values, column, {"plan": number, "block": block, "site": i}
            )
    tally.plans += 1


def _count(
    tally: Tally, site: Site, name: str, used: Sequence[str], values: np.ndarray,
    bounds: np.ndarray, where: dict[str, int],
) -> None:  # fmt: skip
    verdicts = judge(site.pattern, values, bounds)
    below = verdicts.unsound.copy()
    side = min(site.pattern.rows, site.pattern.columns)
    every = BAREISS_EVERY if side <= BAREISS_SIDE else BAREISS_LARGE
    for r, bound in enumerate(bounds.tolist()):
        if side <= SMALL and (tally.count + r) % every == 0 and bound < np.inf:
            tally.exact += 1
            below[r] |= not bareiss_accepts(site.pattern, values[r], bound)
    for r, (method, excess) in enumerate(zip(used, verdicts.excess.tolist(), strict=True)):
        if below[r]:
            finding = {"round": r, "generator": name, "method": method, "bound": bounds[r].hex()}
            tally.findings.append(where | finding)
        elif excess < np.inf:
            row = f"any, by {method}" if method in LOOSE else name
            tally.excess[row] = max(tally.excess.get(row, 0.0), excess)
    tally.count += len(bounds)
    tally.unbounded += int(np.isinf(bounds).sum())
    tally.unsound += int(below.sum())
    tally.generators[name] += len(bounds)
    tally.kinds[site.kind] += len(bounds)
    tally.methods.update(used)


def lines(counter: Path) -> Iterator[dict[str, Any]]:
    """Every line of the counter file."""
    if counter.exists():
        yield from map(json.loads, counter.read_text(encoding="utf-8").splitlines())


def total(counter: Path, size: str) -> str:
    """One line on everything that the counter has seen of a size."""
    found = [line for line in lines(counter) if line["size"] == size]
    count, exact, unsound = (sum(line[k] for line in found) for k in ("count", "exact", "unsound"))
    return f"{count} sets, {exact} by Bareiss as well, {unsound} unsound"


def append(counter: Path, tally: Tally) -> None:
    """One write and a sync: a line is there whole or not at all."""
    counter.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (tally.line() + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def run_stretch(counter: Path, size: str, seed: int, wanted: int, seconds: float) -> Tally:
    """Go on behind the last line of this seed for some time, or until so many sets are counted."""
    done = [line for line in lines(counter) if line["size"] == size and line["seed"] == seed]
    tally = Tally(size, seed, max((d["first"] + d["plans"] for d in done), default=0))
    left = wanted - sum(d["count"] for d in done)
    start = time.monotonic()
    while tally.count < left and tally.seconds < seconds and not tally.unsound:
        run_plan(tally, tally.first + tally.plans, start + seconds)
        tally.seconds = time.monotonic() - start
    if tally.plans:
        append(counter, tally)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=0, help="small sets of this seed, in all")
    parser.add_argument("--medium", type=int, default=0, help="medium sets of this seed, in all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--counter", type=Path, default=COUNTER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in SIZES:
        print(f"{size} so far: {total(options.counter, size)}", flush=True)
    end = time.monotonic() + options.seconds
    open_sizes = ["small", "medium"]
    while open_sizes and time.monotonic() < end:
        size = open_sizes.pop(0)
        wanted = getattr(options, size)
        seconds = min(STRETCH, end - time.monotonic())
        tally = run_stretch(options.counter, size, options.seed, wanted, seconds)
        if tally.plans == 0:
            continue
        open_sizes.append(size)
        rate = tally.count / tally.seconds
        print(
            f"{size}: {tally.count} sets in {tally.seconds:.0f} s ({rate:.0f}/s), "
            f"{tally.exact} by Bareiss, {tally.unsound} unsound", flush=True,
        )  # fmt: skip
        if tally.unsound:
            print(json.dumps(tally.findings, indent=1), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
