# SPDX-License-Identifier: MIT
"""Killed at any call, or on a disk that fails at any, nothing is lost and nothing is silent."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtfast.cli import main
from lmtfast.errors import WriteError
from lmtfast.files import write_atomically
from tests.soundness.fuzz_certificate import certificates

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux's LD_PRELOAD")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    words = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", library]
    subprocess.run([*words, source, "-ldl"], check=True)
    return library


def surveyed(shim: Path, folder: Path, kind: str, stride: int) -> dict[str, Any]:
    pytest.importorskip("typer", reason="the command line needs typer")
    words = [sys.executable, "-m", "tests.soundness.faults", str(folder), kind, str(stride)]
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    # Builds for CUDA, whose processes are forked after a backward pass here.
    if any("Autograd-and-Fork" in remark for remark in found["wrong"]):
        pytest.skip("this build of torch refuses backward passes in forked processes")
    return found


def test_twenty_points(shim: Path, tmp_path: Path) -> None:
    found = surveyed(shim, tmp_path / "run", "both", 35)
    assert found["wrong"] == []
    assert found["points"] >= 20


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stride"), [("kill", 1), ("fail", 2)])
def test_two_hundred_points(kind: str, stride: int, shim: Path, tmp_path: Path) -> None:
    found = surveyed(shim, tmp_path / "run", kind, stride)
    assert found["wrong"] == []
    assert found["points"] >= 200


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "certificate.npz"
    write_atomically(path, certificates()[0])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(WriteError, match="too large") as caught:
            write_atomically(path, certificates()[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == certificates()[0]
    assert [p.name for p in tmp_path.iterdir()] == ["certificate.npz"]


@pytest.mark.parametrize("name", ["missing/file.npz", "folder", "x" * 300])
def test_a_place_that_is_none_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match="at /.*Do this|at .*\n  Do this"):
        write_atomically(tmp_path / name, b"content")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder"]


def test_the_command_line_says_what_it_could_not_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer", reason="the command line needs typer")
    x = np.zeros((6, 4, 4), np.uint8)
    y = np.arange(6) % 2
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    (tmp_path / "run.toml").write_text('model = "digits"\nmethod = "plain"\nepochs = 1\n')
    words = ["train", "--config", tmp_path / "run.toml", "--data", tmp_path / "set.npz"]
    assert main([*map(str, words), "--out", str(tmp_path / "set.npz" / "run")]) == 2
    assert "WriteError: expected a place that can be written to" in capsys.readouterr().err
