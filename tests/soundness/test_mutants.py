# SPDX-License-Identifier: MIT
"""The hunt kills a known mutant and lets an equivalent one live; its tables agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.soundness.mutant_operators import ROOT, Mutant
from tests.soundness.mutants import JUDGES, REASONS, RESULTS, SURVIVED, hunt, key_of, known, reasons

FILE = "lmtfast/radius.py"
JUDGE = (
    "tests/soundness/test_radius_rounding.py"
    "::test_canonical_bounds_of_denormal_numbers_are_not_below"
)
LINE = "        raised = math.ceil(math.ldexp(mantissa, CANONICAL_BITS))\n"
CHANGES = {
    "killed": LINE.replace("mantissa", "mantissa / 4"),
    "survived": LINE.replace("mantissa", "1.0 * mantissa"),
    "import": LINE.replace("(", "", 1),
    "timeout": "        while True:\n            pass\n",
}


def hunted(path: Path, outcomes: tuple[str, ...], right: str) -> subprocess.CompletedProcess[str]:
    """Changes of those outcomes, judged in a process that has not loaded the library."""
    call = f"t.hunted_here({str(path)!r}, {outcomes}, {right!r})"
    command = [sys.executable, "-c", f"from tests.soundness import test_mutants as t; {call}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def hunted_here(path: str, outcomes: tuple[str, ...], right: str) -> None:
    text = (ROOT / FILE).read_text(encoding="utf-8")
    assert text.count(LINE) == 1
    changes = [Mutant(FILE, 1, "by hand", LINE, name, 0, text.replace(LINE, CHANGES[name]))
               for name in outcomes]  # fmt: skip
    hunt(changes, (JUDGE,), text.replace(LINE, CHANGES[right]) if right else text, Path(path))


def found(path: Path) -> dict[str, str]:
    return {row["after"]: row["outcome"] for row in known(path).values()}


def test_a_bug_is_killed_and_an_equivalent_change_survives(tmp_path: Path) -> None:
    path = tmp_path / "mutants.csv"
    done = hunted(path, ("killed", "survived"), "")
    assert done.returncode == 0, done.stdout + done.stderr
    assert found(path) == {"killed": "killed", "survived": "survived"}
    (killed,) = [row for row in known(path).values() if row["outcome"] == "killed"]
    assert killed["by"].startswith(JUDGE)


@pytest.mark.slow
def test_what_does_not_start_or_end_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "mutants.csv"
    done = hunted(path, ("import", "timeout"), "survived")
    assert done.returncode == 0, done.stdout + done.stderr
    assert found(path) == {"import": "import", "timeout": "timeout"}


@pytest.mark.slow
def test_tests_that_fail_on_the_right_code_are_no_judges(tmp_path: Path) -> None:
    done = hunted(tmp_path / "mutants.csv", ("survived",), "killed")
    assert done.returncode == 1
    assert "fail on the unchanged lmtfast.radius" in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_survivor_is_explained_and_every_explanation_needed() -> None:
    rows = known(RESULTS)
    survivors = {key_of(row)[:3] for row in rows.values() if row["outcome"] == SURVIVED}
    assert survivors == set(reasons(REASONS))
    assert all(reasons(REASONS).values())
    assert {row["file"] for row in rows.values()} <= set(JUDGES)
    assert len(rows) >= 300
