# SPDX-License-Identifier: MIT
"""Times the library beside its peers: a gate first, then interleaved samples, then a CSV.

python -m benchmarks.run                     every CPU case
python -m benchmarks.run --suite quick       tiny shapes, seconds: shows that it runs
python -m benchmarks.run --device cuda       every GPU case
python -m benchmarks.run --list              what there is to run
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, Case, memory_limit, work
from benchmarks.gate import Verdict, judge
from benchmarks.machine import Ceilings, header, measure_ceilings
from benchmarks.memory import device_extra, measure_in_subprocess
from benchmarks.problems import Runner, UnavailableError, reasons
from benchmarks.providers import PROBLEMS, PROVIDERS, Provider
from benchmarks.report import FILE, Row, text_table, write_rows
from benchmarks.timing import (
    Sampler,
    Samples,
    graph_sampler,
    host_sampler,
    interleave,
    queued_sampler,
)

# The copies of the data that a GPU sample goes through exceed the L2 cache this many times.
CACHES, MAX_COPIES = 3, 64


class CaseRun:
    """One case on one device: runners that passed the gate, and why the others did not."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        # Graphs of earlier cases count against the limit beyond which torch stops compiling.
        torch.compiler.reset()
        self.problem: Any = PROBLEMS[case.op](case.shape, device)
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.runners: dict[str, list[Runner]] = {}
        self.verdicts: dict[str, Verdict] = {}
        self.refused: dict[str, tuple[str, str]] = {}
        for name in case.providers:
            self._admit(name)

    def _admit(self, name: str) -> None:
        # One implementation that breaks must not hide the others: hence any exception.
        try:
            with reasons():
                copies = self._copies(PROVIDERS[name])
                # The last copy: one that shares its data with another shows as wrong.
                verdict = judge(copies[-1], self.device.type, self.case.modes)
        except UnavailableError as error:
            self.refused[name] = "not available", str(error)
        except Exception as error:
            self.refused[name] = "failed", f"{type(error).__name__}: {first_line(error)}"
        else:
            self.verdicts[name] = verdict
            if verdict.green:
                self.runners[name] = copies
            else:
                self.refused[name] = "red", str(verdict)

    def _copies(self, provider: Provider) -> list[Runner]:
        runner = provider.runner(self.problem)
        if self.device.type == "cpu" or not provider.copies:
            return [runner]
        moved = work(self.problem, self.case.modes[0], "symbol")
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        wanted = -(-CACHES * cache // max(1, int(moved.moved) if moved else 1))
        return [runner, *(runner.clone() for _ in range(min(MAX_COPIES, wanted) - 1))]

    def sampler(self, name: str, mode: str) -> tuple[Sampler, str]:
        """What takes one sample, and the clock it reads."""
        calls = [getattr(runner, mode) for runner in self.runners[name]]
        if self.device.type == "cpu":
            return host_sampler(calls[0]), "host"
        if PROVIDERS[name].capturable:
            try:
                return graph_sampler(calls, self.pool), "graph"
            except RuntimeError:
                torch.cuda.synchronize(self.device)
        return queued_sampler(calls), "events"

    def rows(self, mode: str, ceilings: Ceilings, seconds: float) -> list[Row]:
        """Samples of all variants in turns, then one row per provider in the case's order."""
        samplers, clocks = {}, {}
        for name in list(self.runners):
            try:
                samplers[name], clocks[name] = self.sampler(name, mode)
            except Exception as error:
                self.refused[name] = "failed", f"{type(error).__name__}: {first_line(error)}"
                del self.runners[name]
        # The collector would stop whichever variant happens to run.
        gc.collect()
        gc.disable()
        try:
            taken = interleave(samplers, seconds)
        finally:
            gc.enable()
        baseline = next((taken[n].median for n in self.case.providers if n in taken), None)
        return [
            self._row(name, mode, ceilings, clocks.get(name, ""), taken.get(name), baseline)
            for name in self.case.providers
        ]

    def _row(
        self,
        name: str,
        mode: str,
        ceilings: Ceilings,
        clock: str,
        samples: Samples | None,
        baseline: float | None,
    ) -> Row:
        case, provider, verdict = self.case, PROVIDERS[name], self.verdicts.get(name)
        status, reason = self.refused.get(name, ("ok", ""))
        fixed = (case.op, case.shape, mode, name, provider.quantity, status)
        errors = (None, None) if verdict is None else (verdict.values, verdict.gradients)
        if samples is None:
            return Row(*fixed, reason, value_error=errors[0], gradient_error=errors[1])
        least = work(self.problem, mode, provider.quantity)
        light = None if least is None else ceilings.seconds(least.moved, least.operations)
        note = str(getattr(self.runners[name][0], "note", ""))
        extra, limit = None, None
        if case.memory:
            try:
                extra, limit = self._extra_bytes(name), memory_limit(self.problem)
            except Exception as error:
                note = f"memory not measured: {first_line(error)}"
        return Row(
            *fixed, note, clock, len(samples.seconds), 1e3 * samples.percentile(20),
            1e3 * samples.median, 1e3 * samples.percentile(80),
            None if baseline is None else baseline / samples.median,
            None if light is None else 1e3 * light,
            None if light is None else light / samples.median, *errors, extra, limit,
        )  # fmt: skip

    def _extra_bytes(self, name: str) -> int:
        if self.device.type == "cuda":
            return device_extra(self.runners[name][0])
        return measure_in_subprocess(self.case.shape, name)


def first_line(error: Exception) -> str:
    """The part of a message that fits into a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def run(
    cases: Sequence[Case], device: torch.device, ceilings: Ceilings, seconds: float
) -> Iterator[list[Row]]:
    """Rows of each case, printed as they come; ``seconds`` of samples are shared out."""
    shares = sum(case.share for case in cases)
    for case in cases:
        started = time.perf_counter()
        prepared = CaseRun(case, device)
        print(f"\n{case.name}: prepared in {time.perf_counter() - started:.1f} s", flush=True)
        for mode in case.modes:
            part = seconds * case.share / shares / len(case.modes)
            rows = prepared.rows(mode, ceilings, part)
            print(text_table(rows), end="", flush=True)
            yield rows
        del prepared
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def chosen_cases(suite: str, only: str) -> list[Case]:
    """Cases of a suite whose name contains the text."""
    return [case for case in CASES if suite in case.suites and only in case.name]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--suite", choices=("cpu", "gpu", "compiled", "quick"), help="default: by device"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all samples together")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help=f"folder for {FILE}; default: print only")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    suite = options.suite or {"cpu": "cpu", "cuda": "gpu"}[options.device]
    cases = chosen_cases(suite, options.only)
    if options.list:
        for case in cases:
            print(case.name, *case.modes, *case.providers, sep="\n    ")
        return
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    head = header(device)
    ceilings = measure_ceilings(device, quick=suite == "quick")
    head["copy"] = f"{ceilings.copy / 1e9:.1f} GB/s, read and written, measured"
    head["matmul"] = f"{ceilings.matmul / 1e9:.0f} GFLOP/s in {ceilings.label}, measured"
    print(*(f"{key}: {value}" for key, value in head.items()), sep="\n", flush=True)
    rows: list[Row] = []
    for new in run(cases, device, ceilings, options.seconds):
        rows += new
        head["seconds"] = f"{time.perf_counter() - started:.0f} for the whole run"
        if options.out is not None:
            write_rows(options.out / FILE, head, rows)  # after every case: a limit may strike
    print(f"\nseconds: {head['seconds']}")


if __name__ == "__main__":
    main()
