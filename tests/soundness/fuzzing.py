# SPDX-License-Identifier: MIT
"""Runs a fuzz target for long and appends what it did to a public file.

``python -m tests.soundness.fuzzing certificate --engine atheris --inputs 300000`` from the root of
the repository. ``mutation`` draws from a committed generator and repeats; ``atheris`` (libFuzzer,
guided by the coverage of the readers) takes the same mutations and its own. Every input is also
timed, in seconds of the thread's CPU time, so that a paused machine is no hang.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.metadata
import mmap
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lmtfast.errors import MissingDependencyError
from tests.soundness.mutation import bytes_edited

ROOT = Path(__file__).resolve().parents[2]
COUNTER = ROOT / "benchmarks" / "results" / "fuzz" / "counter.csv"
COLUMNS = (
    "date", "commit", "target", "engine", "version", "inputs", "accepted", "seconds", "crashes",
)  # fmt: skip
MOST_SECONDS = 1.0
# A typed error may have any cause in a parser, but not one of these: they are faults of our code.
FAULTS = (AssertionError, NameError, SystemError)


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Args:
        seeds: Valid files.
        mutate: Another file from one.
        judge: Asserts every property for the bytes; whether they were accepted.
        instrumented: Modules whose coverage guides atheris.
    """

    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]
    judge: Callable[[bytes], bool]
    instrumented: tuple[str, ...]

    def mutant(self, content: bytes, choice: random.Random) -> bytes:
        """The structured mutation, or plain bytes where an earlier one left no structure."""
        try:
            return self.mutate(content, choice)
        except Exception:
            return bytes_edited(content, choice)

    def check(self, content: bytes) -> bool:
        """Judge one input, and that it took no longer than it may."""
        began = time.thread_time()
        accepted = self.judge(content)
        spent = time.thread_time() - began
        assert spent <= MOST_SECONDS, f"{spent:.1f} s for {len(content)} bytes"
        return accepted

    def inputs(self, seed: str) -> Any:
        """Mutants without end, the same for a seed: of a seed file, or of an earlier mutant."""
        pool, choice = self.seeds(), random.Random(seed)
        whole = len(pool)
        yield from pool
        while True:
            content = self.mutant(choice.choice(pool), choice)
            if choice.random() < 0.02:  # some mutants have descendants
                pool = [*pool[:whole], *pool[whole:][-60:], content]
            yield content


def judged(error: BaseException) -> None:
    """Raise what the reader's own code is to blame for."""
    cause = error.__cause__ or error.__context__ or error
    if isinstance(cause, FAULTS):
        raise cause


def target(name: str) -> Target:
    from tests.soundness import fuzz_certificate, fuzz_checkpoint

    return {**fuzz_certificate.TARGETS, **fuzz_checkpoint.TARGETS}[name]


def mutated(name: str, count: int, seed: str) -> tuple[int, int, int]:
    """Inputs, accepted ones and crashes of this module's own engine, which stops at a crash."""
    made, accepted = target(name), 0
    for done, content in zip(range(count), made.inputs(f"{name} {seed}"), strict=False):
        try:
            accepted += made.check(content)
        except Exception:
            kept = Path(tempfile.gettempdir()) / f"crash-{name}"
            kept.write_bytes(content)
            sys.stderr.write(f"{traceback.format_exc()}\n{kept}: input {done} of seed {seed}\n")
            return done + 1, accepted, 1
    return count, accepted, 0


def atheris_library() -> Any:
    """The fuzzing engine.

    Raises:
        MissingDependencyError: atheris is not installed.
    """
    try:
        return importlib.import_module("atheris")
    except ImportError as error:
        raise MissingDependencyError(
            "atheris", "not installed", "--engine atheris", 'pip install "lmtfast[fuzz]"'
        ) from error


def guided(name: str, count: int, seed: str, tally: mmap.mmap) -> None:
    """libFuzzer's loop; does not return. The tally holds inputs and accepted ones."""
    atheris = atheris_library()
    made = target(name)
    for module in made.instrumented:
        loaded: Any = importlib.import_module(module)
        for key, value in vars(loaded).items():
            if getattr(value, "__module__", "") == module and hasattr(value, "__code__"):
                setattr(loaded, key, atheris.instrument_func(value))
    done = [0, 0]

    def one(content: bytes) -> None:
        accepted = made.check(content)
        done[0], done[1] = done[0] + 1, done[1] + accepted
        tally[:16] = done[0].to_bytes(8, "little") + done[1].to_bytes(8, "little")

    def custom(content: bytes, most: int, number: int) -> bytes:
        choice = random.Random(number)
        if choice.random() < 0.3:
            return bytes(atheris.Mutate(content, most))
        return made.mutant(content, choice)[:most]

    with tempfile.TemporaryDirectory() as corpus:
        for i, content in enumerate(made.seeds()):
            (Path(corpus) / f"seed{i}").write_bytes(content)
        words = [
            f"-runs={count}", f"-seed={int.from_bytes(seed.encode(), 'big') % 2**31 + 1}",
            "-max_len=65536", "-timeout=60", "-rss_limit_mb=4096", "-len_control=0", corpus,
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *words], one, custom_mutator=custom)
        atheris.Fuzz()


def run(name: str, engine: str, count: int, seed: str) -> dict[str, Any]:
    """One row of the public file."""
    began = time.perf_counter()
    if engine == "atheris":
        atheris_library()
        version = importlib.metadata.version("atheris")
        with tempfile.TemporaryFile() as file:
            file.truncate(16)
            words = [
                sys.executable,
                "-m",
                __spec__.name,
                name,
                "--inputs",
                str(count),
                "--seed",
                seed,
            ]
            words += ["--tally", str(file.fileno())]
            done = subprocess.run(words, check=False, cwd=ROOT, pass_fds=[file.fileno()])
            crashes = int(done.returncode != 0)
            file.seek(0)
            inputs, accepted = (int.from_bytes(file.read(8), "little") for _ in range(2))
    else:
        version = "1"
        inputs, accepted, crashes = mutated(name, count, seed)
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": commit.stdout.strip(),
        "target": name, "engine": engine, "version": version, "inputs": inputs,
        "accepted": accepted, "seconds": round(time.perf_counter() - began), "crashes": crashes,
    }  # fmt: skip


def record(row: dict[str, Any], path: Path = COUNTER) -> None:
    """Append a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fuzz a reader.")
    parser.add_argument("target")
    parser.add_argument("--engine", choices=("mutation", "atheris"), default="mutation")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--out", type=Path, default=COUNTER)
    parser.add_argument("--tally", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tally is not None:
        guided(options.target, options.inputs, options.seed, mmap.mmap(options.tally, 16))
        return 0
    row = run(options.target, options.engine, options.inputs, options.seed)
    record(row, options.out)
    sys.stdout.write(f"{row}\n")
    return int(row["crashes"] > 0)


if __name__ == "__main__":
    sys.exit(main())
