# SPDX-License-Identifier: MIT
"""Where the time of a step goes: kernels launched, how often, and their time on the device.

    python -m benchmarks.kernel_profile --device cuda --out DIR

One gradient step per case and implementation of ours, under torch's profiler; on the CPU the
operations of torch stand in for kernels.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import CASES, Case
from benchmarks.problems import Runner, UnavailableError, reasons
from benchmarks.providers import PROBLEMS, PROVIDERS
from benchmarks.run import first_line

FILE = "profile.csv"
FIELDS = ("op", "shape", "provider", "kernel", "launches", "microseconds", "share")
PROFILED = {"gpu": ("bound wrn-28-10", "loss 256 x 1000 x 2048"), "quick": ("loss 64 x 200 x 256",)}
STEPS = 3


def kernels(runner: Runner, device: torch.device) -> list[tuple[str, int, float]]:
    """Name, launches per step and microseconds per step, the longest first."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    runner.gradient()
    with profile(activities=[activity]) as recorded:
        for _ in range(STEPS):
            runner.gradient()
        if on_gpu:
            torch.cuda.synchronize()
    found = []
    for event in recorded.key_averages():
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if time > 0:
            found.append((event.key, round(event.count / STEPS), time / STEPS))
    return sorted(found, key=lambda kernel: -kernel[2])


def rows_of(case: Case, device: torch.device) -> list[dict[str, object]]:
    """One row per kernel of every implementation of ours."""
    problem, rows = PROBLEMS[case.op](case.shape, device), []
    for name in case.providers:
        if PROVIDERS[name].backend in (None, "reference"):
            continue
        try:
            with reasons():
                found = kernels(PROVIDERS[name].runner(problem), device)
        except UnavailableError as error:
            print(f"{name}: not available: {error}")
            continue
        except Exception as error:  # one that breaks must not hide the others
            print(f"{name}: failed: {type(error).__name__}: {first_line(error)}")
            continue
        total = sum(time for _, _, time in found)
        print(f"{case.name}: {name}: {sum(n for _, n, _ in found)} launches, {total:.0f} us")
        for kernel, launches, time in found:
            values = (case.op, case.shape, name, kernel, launches, f"{time:.1f}",
                      f"{time / total:.3f}")  # fmt: skip
            rows.append(dict(zip(FIELDS, values, strict=True)))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_profile", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--suite", default="gpu", choices=sorted(PROFILED))
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {FILE}")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for case in CASES:
            if case.name in PROFILED[options.suite]:
                writer.writerows(rows_of(case, torch.device(options.device)))
                file.flush()


if __name__ == "__main__":
    main()
