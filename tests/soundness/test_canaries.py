# SPDX-License-Identifier: MIT
"""At least sixty seeded bugs in the trusted core, each of which a named test must notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.seeding import MODULES
from tests.soundness import checker_canaries, claim_canaries, proof_canaries
from tests.soundness.canary import Canary

ROOT = Path(__file__).resolve().parents[2]
CANARIES = (*proof_canaries.CANARIES, *claim_canaries.CANARIES, *checker_canaries.CANARIES)


def seeded(canary: Canary) -> str:
    return (ROOT / canary.file).read_text(encoding="utf-8").replace(canary.right, canary.wrong)


def judged(folder: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """The tests on the modules in the folder, up to the first failure."""
    command = [
        sys.executable, "-m", "pytest", "-p", "tests.seeding", "-p", "no:cacheprovider", "-q", "-x",
        "--show-capture=no", *tests,
    ]  # fmt: skip
    environment = {**os.environ, MODULES: str(folder)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_there_are_sixty_and_each_still_fits() -> None:
    assert len({canary.name for canary in CANARIES}) == len(CANARIES) >= 60
    for canary in CANARIES:
        text = (ROOT / canary.file).read_text(encoding="utf-8")
        assert text.count(canary.right) == 1, f"{canary.file} has not one {canary.right!r}"
        compile(seeded(canary), canary.file, "exec")
        for test in canary.tests:
            file, _, function = test.partition("::")
            body = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {function}(" in body if function else "def test_" in body, test


@pytest.mark.slow
@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name)
def test_a_canary_is_noticed(canary: Canary, tmp_path: Path) -> None:
    module = canary.file.removesuffix(".py").replace("/", ".")
    (tmp_path / f"{module}.py").write_text(seeded(canary), encoding="utf-8")
    result = judged(tmp_path, canary.tests)
    report = result.stdout[-3000:] + result.stderr[-1000:]
    # A failed assertion: never a suite that could not start or had nothing to run.
    assert result.returncode == 1, report
    assert "FAILED" in result.stdout, report


@pytest.mark.slow
def test_nothing_objects_without_a_canary(tmp_path: Path) -> None:
    """The same command on the same modules passes, so that only the canary can make it fail."""
    single = tuple(dict.fromkeys(t for c in CANARIES for t in c.tests if "::" in t))
    result = judged(tmp_path, single)
    assert result.returncode == 0, result.stdout[-3000:]
