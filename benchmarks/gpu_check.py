# SPDX-License-Identifier: MIT
"""Everything there is to check and measure on a GPU machine, in one run of under ten minutes.

    python -m benchmarks.gpu_check --out DIR
    python -m benchmarks.gpu_check --device cpu --quick --out DIR    the same stages, tiny, no GPU

Builds the extension offline, runs the GPU tests, times the benchmark and the training step,
profiles, and lets compute-sanitizer watch every kernel. Each stage is a process with a time budget;
one that fails is reported and the others run. DIR gets at most eight files; the last lines printed
are those of its ``summary.md``. Needs torch, triton, pytest, cmake, pybind11 and setuptools.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import output
from benchmarks.report import FILE as SPEED
from benchmarks.report import read_rows

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
CUDA_BIN = "/usr/local/cuda/bin"
TRAINING = "training.csv"
SUMMARY = "summary.md"
MINUTES = 9.5
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: What the summary calls it.
        command: Arguments; empty where the stage cannot run.
        seconds: Its budget.
        log: File in the output folder that its output is appended to.
        proof: Pattern that its output must contain to count as done.
        environment: Variables added to the process's own.
        reason: Why it cannot run.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    log: str
    proof: str
    environment: dict[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: ``done``, ``failed``, ``out of time`` or ``left out``."""

    stage: Stage
    status: str
    remark: str
    seconds: float


def find(tool: str) -> str | None:
    """Path of a CUDA tool."""
    return shutil.which(tool) or shutil.which(tool, path=CUDA_BIN)


def build_stage(device: str) -> Stage:
    """An editable build without a network; for this GPU's architecture where nvcc is found."""
    if device == "cpu":
        show = "import lmtfast as lf; print(*lf.available_backends().values(), sep='\\n')"
        return Stage("build (as installed)", (PYTHON, "-c", show), 60, "log.txt", "reference")
    pip = (PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v")
    nvcc = find("nvcc")
    capability = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    number = capability.splitlines()[0].replace(".", "") if capability else "90"
    # The 90a set has instructions that sm_90 lacks; other devices run their plain set.
    architecture = "90a-real" if number == "90" else f"{number}-real"
    options = f"-DLMTFAST_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={architecture}"
    environment = {"CMAKE_ARGS": options if nvcc else "-DLMTFAST_CUDA=OFF"}
    if nvcc:
        environment["CUDACXX"] = nvcc
    name = f"build with nvcc, sm_{number}" if nvcc else "build without CUDA kernels: no nvcc"
    done = "Successfully installed lmtfast"
    return Stage(name, (*pip, "--editable", "."), 100, "log.txt", done, environment)


def sanitizer_stage(tool: str, device: str, seconds: float) -> Stage:
    """One compute-sanitizer tool over the kernel tour."""
    found = find("compute-sanitizer")
    name, log = f"sanitizer {tool}", "checks.txt"
    if device == "cpu" or found is None:
        reason = "no GPU" if device == "cpu" else "compute-sanitizer is not on this machine"
        return Stage(name, (), seconds, log, "", reason=reason)
    tour = (PYTHON, "-m", "benchmarks.kernel_tour", "--device", "cuda")
    command = (found, "--tool", tool, "--error-exitcode", "1", "--print-limit", "20", *tour)
    # Every tensor gets an allocation of its own, so that the tool sees where it ends.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    proof = r": ran\b(?s:.*)(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)"
    return Stage(name, command, seconds, log, proof, environment)


def stages(device: str, quick: bool, out: Path) -> list[tuple[Stage, ...]]:
    """All stages in order; those of one group run side by side and are not timed ones."""
    where = ("--device", device)
    small = ("--suite", "quick") if quick else ()

    def module(name: str, *arguments: str) -> tuple[str, ...]:
        return (PYTHON, "-m", f"benchmarks.{name}", *where, *arguments)

    pytest = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10")
    # Those of the compiled backends run on the GPU where there is one, without a mark.
    chosen: dict[str, tuple[str, ...]] = {
        "marked gpu": ("tests", "-m", "gpu"),
        "of triton and cuda": ("tests", "-k", "triton or cuda"),
    }
    if device == "cpu":
        chosen = {"of the floor": ("tests/test_benchmarks.py", "-k", "floor")}
    tests = [
        Stage(f"tests {name}", (*pytest, *selection), 100, "checks.txt", r"\d+ passed")
        for name, selection in chosen.items()
    ]
    speed = module("run", *small, "--seconds", "1" if quick else "60", "--out", str(out))
    training = module("training_step", *small, "--out", str(out))
    slow = ("--suite", "compiled", "--out", str(out / "compiled"))
    profile = module("kernel_profile", *small, "--out", str(out))
    groups = [
        (build_stage(device),),
        (
            *tests,
            # Fills Triton's cache for the stages that follow.
            Stage("every kernel once", module("kernel_tour"), 100, "log.txt", r": ran\b"),
        ),
        (Stage("benchmark", speed, 150, "log.txt", "for the whole run"),),
        (Stage("training step", training, 90, "log.txt", r"plain +[\d.]+"),),
        tuple(sanitizer_stage(tool, device, 90) for tool in TOOLS),
        (Stage("profile", profile, 30, "log.txt", "launches"),),
    ]  # fmt: skip
    if not quick:
        late = (("training step", "training_step", "x "), ("benchmark", "run", "whole run"))
        groups += [
            (Stage(f"{name}, compiled", module(file, *slow), 90, "log.txt", proof),)
            for name, file, proof in late
        ]
    return groups


def run_group(group: Sequence[Stage], limit: float, out: Path) -> Iterator[Outcome]:
    """Start all stages of a group, wait for each within its budget and the limit, keep the logs."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(i)) for i in range(len(group))]
        processes = [
            start(stage, file) if stage.command and limit > 0 else None
            for stage, file in zip(group, files, strict=True)
        ]
        for stage, file, process in zip(group, files, processes, strict=True):
            if process is None:
                yield Outcome(stage, "left out", stage.reason or "no time was left", 0.0)
                continue
            try:
                process.wait(max(0.0, min(stage.seconds, limit) - (time.monotonic() - started)))
                late = False
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                late = True
            seconds = time.monotonic() - started
            text = file.read_text(encoding="utf-8", errors="replace")
            with (out / stage.log).open("a", encoding="utf-8") as log:
                log.write(f"===== {stage.name}\n{text}\n")
            yield judged(stage, text, None if late else process.returncode, seconds)


def start(stage: Stage, file: Path) -> subprocess.Popen[bytes]:
    """The stage's process, in a session of its own so that its children can be ended with it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
    with file.open("wb") as out:
        return subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def judged(stage: Stage, text: str, code: int | None, seconds: float) -> Outcome:
    """The outcome, from the exit status and what the stage had to print."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1][:150] if lines else "no output"
    if code is None:
        return Outcome(stage, "out of time", last, seconds)
    if code:
        return Outcome(stage, "failed", f"exit status {code}: {last}", seconds)
    if not re.search(stage.proof, text):
        return Outcome(stage, "failed", f"its output lacks {stage.proof!r}: {last}", seconds)
    return Outcome(stage, "done", last, seconds)


def speed_lines(path: Path) -> Iterator[str]:
    """One line per case and mode: the first implementation, and ours."""
    cases: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in read_rows(path)[1]:
        cases.setdefault((row["op"], row["shape"], row["mode"]), []).append(row)
    for case, rows in cases.items():
        shown = [r for r in rows if r["status"] == "ok"]
        first = [r for r in shown if r is rows[0]]
        ours = [
            r for r in shown if "lmtfast" in r["provider"] and "(reference)" not in r["provider"]
        ]
        parts = [f"{r['provider']} {float(r['median_ms']):.3g} ms" for r in first]
        for r in ours:
            light = f", {float(r['share_of_light']):.0%} of light" if r["share_of_light"] else ""
            faster = f", {float(r['times_faster']):.3g}x" if r["times_faster"] else ""
            parts.append(f"{r['provider']} {float(r['median_ms']):.3g} ms{faster}{light}")
        red = [r["provider"] for r in rows if r["status"] in ("red", "failed")]
        parts += [f"RED OR FAILED: {', '.join(red)}"] if red else []
        yield f"{' '.join(case)}: {'; '.join(parts)}"


def training_lines(path: Path) -> Iterator[str]:
    """One line per network and batch size: each variant's time over the one without a bound."""
    cases: dict[str, list[dict[str, str]]] = {}
    for row in read_rows(path)[1]:
        cases.setdefault(f"{row['shape']}, {row['mode']}", []).append(row)
    for shape, rows in cases.items():
        parts = [
            f"{r['provider']} {float(r['median_ms']):.4g} ms ({1 / float(r['times_faster']):.4f})"
            if r["status"] == "ok" and r["times_faster"] else f"{r['provider']} {r['status']}"
            for r in rows
        ]  # fmt: skip
        yield f"{shape}: {'; '.join(parts)}"


def summary(outcomes: Sequence[Outcome], out: Path, seconds: float) -> str:
    """The stages, then one line per case."""
    lines = [f"# GPU check: {seconds:.0f} s", "", "| stage | status | seconds | remark |"]
    lines += ["| --- | --- | --- | --- |"]
    for o in outcomes:
        remark = o.remark.replace("|", "/")
        lines.append(f"| {o.stage.name} | {o.status} | {o.seconds:.0f} | {remark} |")
    for title, path, read in (
        ("Benchmark", out / SPEED, speed_lines),
        ("Training step, over the one without a bound", out / TRAINING, training_lines),
        ("Training step, compiled", out / "compiled" / TRAINING, training_lines),
        ("Benchmark, compiled", out / "compiled" / SPEED, speed_lines),
    ):
        if path.exists():
            lines += ["", f"## {title}", "", *(f"- {line}" for line in read(path))]
    return "\n".join(lines) + "\n"


def check(groups: Sequence[Sequence[Stage]], out: Path, minutes: float) -> list[Outcome]:
    """Run the groups one after the other within the time, and write the summary after each."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcomes: list[Outcome] = []
    for group in groups:
        for outcome in run_group(group, 60 * minutes - (time.monotonic() - started), out):
            outcomes.append(outcome)
            text = f"{outcome.stage.name}: {outcome.status}, {outcome.seconds:.0f} s"
            print(f"{text}: {outcome.remark}", flush=True)
        text = summary(outcomes, out, time.monotonic() - started)
        (out / SUMMARY).write_text(text, encoding="utf-8")
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    outcomes = check(stages(options.device, options.quick, out), out, options.minutes)
    print((out / SUMMARY).read_text(encoding="utf-8"))
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
