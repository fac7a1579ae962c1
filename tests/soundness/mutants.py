# SPDX-License-Identifier: MIT
"""The mutation score of the trusted core: small bugs by the hundred, each of which a test must see.

    pip install -e '.[dev,mutation]'
    python -m tests.soundness.mutants lmtfast/radius.py --sample 40 --seed 1

Without files it prints the score. Every mutant is judged in a child of a process that has loaded
everything but the library, so that it costs the tests and not the start. A mutant is killed by a
failed test, or when the changed module cannot be imported or does not end; these are counted apart.
What is known stands in ``benchmarks/results/mutants/mutants.csv``, and a run goes on where it
stopped; ``survivors.csv`` says of every survivor why it is harmless.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import hypothesis
import mpmath
import numpy
import pytest
import torch

from tests.seeding import MODULES, SeededModules
from tests.soundness.mutant_operators import ROOT, Mutant, mutants

LOADED = (hypothesis, mpmath, numpy, torch)  # once, for all children
RESULTS = ROOT / "benchmarks" / "results" / "mutants" / "mutants.csv"
REASONS = RESULTS.with_name("survivors.csv")
COLUMNS = ("file", "line", "operator", "before", "after", "number", "outcome", "by", "seconds")
SURVIVED, KILLED, UNIMPORTABLE, ENDLESS = "survived", "killed", "import", "timeout"
# Processor time of a child: so often what the right code takes, and the start; then it is endless.
PATIENCE, GRACE = 1.5, 4
MEMORY = 8 << 30

_DIRECT = "tests/test_verified_rounding.py"
_TERMS = "tests/soundness/test_proof_terms.py"
_HOSTILE = "tests/soundness/test_hostile_arithmetic.py"
_MATRIX = "tests/test_verified_matrix.py"
_RECURSION = "tests/soundness/test_recursion_terms.py"
_OPERATORS = "tests/soundness/test_operator_terms.py"
_ENCLOSURE = "tests/soundness/test_enclosure"
_NETWORKS = (
    "tests/soundness/test_hostile_enclosure.py", "tests/test_enclosure.py",
    "-k", "not tight and not assumed and not tiny",
)  # fmt: skip
_REGIONS = "tests/soundness/test_region_matrices.py"
_NO_TRACES = ("-k", "not estimates_of_operators")
# What judges a file: the cheapest and most telling first. Slow tests do not take part.
JUDGES: dict[str, tuple[str, ...]] = {
    "lmtfast/radius.py": (
        "tests/soundness/test_radius_rounding.py", "tests/test_radius.py",
        "tests/soundness/test_ties.py",
    ),
    "lmtfast/verified/rounding.py": (_DIRECT, _TERMS, _MATRIX, _HOSTILE, *_NO_TRACES),
    "lmtfast/verified/residual.py": (_TERMS, _MATRIX, _HOSTILE, *_NO_TRACES),
    "lmtfast/verified/matrix.py": (_TERMS, _MATRIX, _DIRECT, _HOSTILE, *_NO_TRACES),
    "lmtfast/enclosure/joining.py": (f"{_ENCLOSURE}_joins.py", *_NETWORKS),
    "lmtfast/enclosure/elementwise.py": (f"{_ENCLOSURE}_functions.py", *_NETWORKS),
    "lmtfast/enclosure/linear.py": (f"{_ENCLOSURE}_linear.py", *_NETWORKS),
    "lmtfast/enclosure/registry.py": (
        f"{_ENCLOSURE}_linear.py", f"{_ENCLOSURE}_joins.py", f"{_ENCLOSURE}_functions.py",
        *_NETWORKS,
    ),
    "lmtfast/enclosure/logits.py": (f"{_ENCLOSURE}_norms.py", *_NETWORKS),
    "lmtfast/check.py": tuple(
        f"tests/soundness/test_checker_{name}.py"
        for name in ("files", "norms", "proofs", "operators", "terms")
    ),
    # Tests through check.py load the file beside it, so they do not judge a changed one.
    "lmtfast/check_execution.py": (_RECURSION, "tests/soundness/test_checker_terms.py"),
    "lmtfast/execution/recursion.py": (_RECURSION, "tests/test_execution.py"),
    "lmtfast/verified/arithmetic.py": (
        "tests/soundness/test_arithmetic_probes.py", _DIRECT,
        "tests/soundness/test_precision_settings.py",
    ),
    "lmtfast/verified/weight_error.py": (
        "tests/soundness/test_weight_error.py", "tests/test_verified_banded.py",
    ),
    **dict.fromkeys(
        (f"lmtfast/verified/{name}.py" for name in ("banded", "convolution")),
        (_OPERATORS, "tests/test_verified_banded.py", _HOSTILE, *_NO_TRACES),
    ),
    **dict.fromkeys(
        (f"lmtfast/verified/{name}.py" for name in ("torus", "polyphase")),
        (_OPERATORS, "tests/test_verified_torus.py", _HOSTILE, *_NO_TRACES),
    ),
    "lmtfast/verified/composite.py": (
        _REGIONS, _OPERATORS, "tests/test_verified_banded.py", _HOSTILE, *_NO_TRACES),
    "lmtfast/verified/dense.py": (_REGIONS, _OPERATORS, "tests/test_verified_banded.py"),
    "lmtfast/verified/moment.py": (
        _OPERATORS, "tests/test_verified_moment.py", "tests/test_draws.py",
    ),
}  # fmt: skip


class Verdict(NamedTuple):
    outcome: str
    by: str  # the test that failed, or what the import raised
    seconds: float  # processor time


class Witness:
    """Notes the first failure of a run of pytest."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def _child(module: str, folder: Path, tests: tuple[str, ...]) -> None:
    """Never returns: the first line of the verdict file is the outcome, the second the cause."""
    verdict, code = folder / "verdict", 0
    try:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ[MODULES] = str(folder)
        sys.meta_path.insert(0, SeededModules(folder))
        try:
            found = importlib.import_module(module).__file__
        except (Exception, SystemExit) as error:
            verdict.write_text(f"{UNIMPORTABLE}\n{type(error).__name__}: {error}")
            return
        assert Path(str(found)).parent == folder, f"{found} is not the changed module"
        witness = Witness()
        command = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--show-capture=no"]
        done = pytest.main([*command, *tests], plugins=[witness])
        if done == pytest.ExitCode.OK:
            verdict.write_text(f"{SURVIVED}\n")
        elif done == pytest.ExitCode.TESTS_FAILED and witness.failed:
            verdict.write_text(f"{KILLED}\n{witness.failed}")
        elif done == pytest.ExitCode.INTERRUPTED:
            verdict.write_text(f"{UNIMPORTABLE}\nwhile tests were collected")
        else:
            code = 70
    except BaseException:
        code = 70
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)


def judge(module: str, source: str, tests: tuple[str, ...], seconds: float) -> Verdict:
    """Runs the tests on the module with that source, in a child.

    Raises:
        RuntimeError: pytest ended neither well nor with a failed test.
    """
    assert not any(m.split(".")[0] == "lmtfast" for m in sys.modules), "the library is loaded"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.setsid()
            whole = int(seconds) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            _child(module, folder, tests)
        status, usage = _waited(child, 10 * seconds + 60)
        spent = usage.ru_utime + usage.ru_stime
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU):
            return Verdict(ENDLESS, f"{spent:.0f} s of processor time", spent)
        if os.WIFSIGNALED(status):
            return Verdict(KILLED, f"signal {os.WTERMSIG(status)}", spent)
        if os.WEXITSTATUS(status):
            text = (folder / "output").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"no verdict on {module}: {text[-3000:]}")
        outcome, _, by = (folder / "verdict").read_text().partition("\n")
        return Verdict(outcome, " ".join(by.split())[:160], spent)


def _waited(child: int, seconds: float) -> tuple[int, resource.struct_rusage]:
    """Waits for a child, and ends it and its own children if it neither computes nor ends."""
    end = time.monotonic() + seconds
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            end += seconds
        time.sleep(0.02)


Rows = dict[tuple[str, str, str, int], dict[str, str]]


def key_of(row: dict[str, str]) -> tuple[str, str, str, int]:
    return (row["file"], row["before"], row["after"], int(row["number"]))


def known(path: Path) -> Rows:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        return {key_of(row): row for row in csv.DictReader(stream)}


def keep(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(
            rows, key=lambda k: (k[0], int(rows[k]["line"]), k)))  # fmt: skip
    beside.replace(path)


def hunt(todo: Sequence[Mutant], tests: tuple[str, ...], text: str, path: Path) -> None:
    """Judge mutants of one file, whose text is right, and keep every verdict.

    Raises:
        RuntimeError: The tests fail on the right code, so that they would prove nothing.
    """
    if not todo:
        return
    module = module_of(todo[0].file)
    right = judge(module, text, tests, 600)
    if right.outcome != SURVIVED:
        raise RuntimeError(f"{tests} fail on the unchanged {module}: {right}")
    print(f"{todo[0].file}: {len(todo)} mutants, {right.seconds:.1f} s on the right code")
    limit = PATIENCE * right.seconds + GRACE
    for mutant in todo:
        verdict = judge(module, mutant.source, tests, limit)
        values = (mutant.file, mutant.line, mutant.operator, mutant.before, mutant.after,
                  mutant.number, verdict.outcome, verdict.by, f"{verdict.seconds:.1f}")  # fmt: skip
        rows = known(path)  # another run may have judged another file
        rows[mutant.key] = dict(zip(COLUMNS, map(str, values), strict=True))
        keep(path, rows)
        if verdict.outcome == SURVIVED:
            print(f"{mutant.line}: {mutant.before}\n   -> {mutant.after}", flush=True)


def reasons(path: Path) -> dict[tuple[str, str, str], str]:
    """Why a survivor is harmless, by file and change."""
    with path.open(newline="", encoding="utf-8") as stream:
        return {(r["file"], r["before"], r["after"]): r["why"] for r in csv.DictReader(stream)}


def report() -> None:
    rows, why = known(RESULTS), reasons(REASONS)
    total: Counter[str] = Counter()
    for file in sorted({row["file"] for row in rows.values()}, key=list(JUDGES).index):
        mine = [row for row in rows.values() if row["file"] == file]
        count = Counter(row["outcome"] for row in mine)
        count["unexplained"] = sum(row["outcome"] == SURVIVED and key_of(row)[:3] not in why
                                   for row in mine)  # fmt: skip
        count["all"] = len(mine)
        total.update(count)
        print(_line(file, count))
    print(_line("all", total))


def _line(name: str, count: Counter[str]) -> str:
    dead = count["all"] - count[SURVIVED]
    return (
        f"{name}: {dead} of {count['all']} killed ({count[UNIMPORTABLE]} at import,"
        f" {count[ENDLESS]} endless), {count[SURVIVED]} survived,"
        f" {count['unexplained']} of them unexplained"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--sample", type=int, help="so many mutants of each file, not all")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--again", action="store_true", help="judge only survivors, again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    gc.freeze()
    for file in options.files:
        rows = known(RESULTS)
        if options.again:
            outcomes = [(m, rows.get(m.key, {}).get("outcome")) for m in mutants(file)[0]]
            todo = [m for m, outcome in outcomes if outcome == SURVIVED]
        else:
            found, count = mutants(file, options.sample, options.seed)
            print(f"{file}: {len(found)} of {count} mutants drawn")
            todo = [m for m in found if m.key not in rows]
        hunt(todo, JUDGES[file], (ROOT / file).read_text(encoding="utf-8"), RESULTS)
    if not options.files:
        report()


if __name__ == "__main__":
    main()
