# SPDX-License-Identifier: MIT
"""Kills or fails a training and a certification at one file-system call, and looks what is left.

Runs as a process of its own, with ``faults.c`` preloaded: ``python -m tests.soundness.faults FOLDER
KIND STRIDE``. After one import it forks for every point, so that a point costs a training of five
epochs of a tiny network, or the writing of a certificate. Prints one JSON object: points tried, and
what was wrong.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import errno
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmtfast import certification, description, estimation, training
from lmtfast.certificate import load_certificate
from lmtfast.check import check
from lmtfast.checkpoint import has_checkpoint, load_checkpoint
from lmtfast.cli import main

CONFIG = """
method = "lmt"
model = "digits"
epochs = 5
batch_size = 20
eps = 0.1
[model_options]
channels = [2, 2]
hidden = 3
"""
COUNT, KILL_BEFORE, KILL_AFTER, FAIL_ONCE, FAIL_EVER_AFTER = range(5)
KILLS = ((KILL_BEFORE, 0), (KILL_AFTER, 0))
FAILURES = (
    (FAIL_ONCE, errno.EIO), (FAIL_EVER_AFTER, errno.ENOSPC), (FAIL_EVER_AFTER, errno.EDQUOT),
    (FAIL_EVER_AFTER, errno.EROFS),
)  # fmt: skip
KINDS = {"kill": KILLS, "fail": FAILURES, "both": KILLS + FAILURES}


class Scenario:
    """A command that writes files, and what must hold of them after it was stopped anywhere."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.data, self.config = folder / "set.npz", folder / "run.toml"

    def prepare(self) -> None:
        """The state before the command."""
        shutil.rmtree(self.out, ignore_errors=True)

    def words(self) -> list[str]:
        raise AssertionError

    def intact(self, calls: int) -> list[str]:
        """What is wrong with what is left after that many calls."""
        raise AssertionError

    def finished(self) -> list[str]:
        """What is wrong after the command was repeated."""
        raise AssertionError


class Training(Scenario):
    """Five epochs; the reference run tells after how many calls an epoch was saved."""

    def reference(self) -> int:
        self.prepare()
        self.saved_at: list[int] = []
        save = training.save_checkpoint

        def noted(*arguments: Any) -> Path:
            path = save(*arguments)
            self.saved_at.append(SHIM.faults_calls())
            return path

        training.save_checkpoint = noted
        SHIM.faults_arm(str(self.out).encode(), 0, COUNT, 0)
        assert run(self.words()) == 0
        calls = int(SHIM.faults_calls())
        SHIM.faults_arm(b"", 0, COUNT, 0)
        training.save_checkpoint = save
        self.expected = self.state()
        return calls

    def words(self) -> list[str]:
        words = ["train", "--config", str(self.config), "--data", str(self.data)]
        words += ["--out", str(self.out)]
        return [*words, "--resume"] if has_checkpoint(self.out) else words

    def state(self) -> dict[str, Any]:
        """All that a run leaves but how long it took."""
        saved = load_checkpoint(self.out)
        rows = list(csv.DictReader((self.out / "history.csv").open()))
        return {
            "tensors": {n: t.numpy().tobytes() for n, t in saved.tensors.items()},
            "history": [{k: v for k, v in row.items() if k != "seconds"} for row in saved.history],
            "table": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
            "losses": (self.out / "losses.csv").read_bytes(),
            "config": (self.out / "config.json").read_bytes(),
            "names": sorted(p.name for p in self.out.iterdir()),
        }

    def intact(self, calls: int) -> list[str]:
        done = sum(at < calls for at in self.saved_at)
        files = sorted(self.out.glob("epoch-*")) if self.out.exists() else []
        found = [load_checkpoint(f).epoch for f in files]  # raises if one is not whole
        wrong = [] if max(found, default=0) >= done else [f"epochs {found} after {done}"]
        if len(found) < min(done, 2):
            wrong.append(f"only {found} kept after {done}")
        for name in training.FILES:
            path = self.out / name
            if path.exists() and not path.read_bytes().endswith(b"\n"):
                wrong.append(f"{name} is cut")
        return wrong

    def finished(self) -> list[str]:
        state = self.state()
        return [f"another {k}" for k, v in self.expected.items() if state[k] != v]


class Certifying(Scenario):
    """A certificate and its weights, written over those of another radius list."""

    NAMES = ("certificate.npz", "weights.npz")

    def reference(self) -> int:
        self.checkpoint = self.folder / "trained"
        words = ["train", "--config", str(self.config), "--data", str(self.data)]
        assert run([*words, "--out", str(self.checkpoint), "--epochs", "1"]) == 0
        self.out.mkdir(exist_ok=True)
        assert run([*self.words(), "--limit", "3"]) == 0
        self.before = {n: (self.out / n).read_bytes() for n in self.NAMES}
        SHIM.faults_arm(str(self.out).encode(), 0, COUNT, 0)
        assert run(self.words()) == 0
        calls = int(SHIM.faults_calls())
        SHIM.faults_arm(b"", 0, COUNT, 0)
        self.after = {n: (self.out / n).read_bytes() for n in self.NAMES}
        assert self.before["certificate.npz"] != self.after["certificate.npz"]
        return calls

    def prepare(self) -> None:
        super().prepare()
        self.out.mkdir()
        for name, content in self.before.items():
            (self.out / name).write_bytes(content)

    def words(self) -> list[str]:
        words = ["certify", str(self.checkpoint), "--data", str(self.data)]
        return [*words, "--out", str(self.out / self.NAMES[0]), "--weights",
                str(self.out / self.NAMES[1])]  # fmt: skip

    def intact(self, calls: int) -> list[str]:
        wrong = []
        for name in self.NAMES:
            if (self.out / name).read_bytes() not in (self.before[name], self.after[name]):
                wrong.append(f"{name} is neither the old nor the new one")
        load_certificate(self.out / self.NAMES[0])
        return wrong

    def finished(self) -> list[str]:
        wrong = [n for n in self.NAMES if (self.out / n).read_bytes() != self.after[n]]
        found = check(*(self.out / n for n in self.NAMES))
        return [f"another {n}" for n in wrong] + [str(f) for f in found]


def remember(module: Any, name: str, key: Callable[..., Any]) -> None:
    """Compute once what writes nothing: tracing takes ten times as long as the training here."""
    function, known = getattr(module, name), {}

    def remembered(*arguments: Any, **options: Any) -> Any:
        at = key(*arguments, **options)
        if at not in known:
            known[at] = function(*arguments, **options)
        return known[at]

    setattr(module, name, remembered)


def run(words: list[str]) -> int:
    """The command line, in silence."""
    with contextlib.redirect_stdout(io.StringIO()), open(os.devnull, "w") as nothing:
        from lmtfast import progress

        progress.console.file = nothing
        return main(words)


def struck(scenario: Scenario, point: int, how: int, error: int) -> tuple[int, str]:
    """Wait status and error text of the command in a process of its own."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        code = 99
        try:
            text = io.StringIO()
            with contextlib.redirect_stderr(text):
                words = scenario.words()
                SHIM.faults_arm(str(scenario.out).encode(), point, how, error)
                code = run(words)
            os.write(writer, text.getvalue().encode()[:4000])
        except BaseException as stray:
            os.write(writer, repr(stray).encode()[:4000])
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    return os.waitpid(child, 0)[1], text


def tried(scenario: Scenario, point: int, how: int, error: int) -> list[str]:
    """Everything that is wrong at one point."""
    scenario.prepare()
    status, text = struck(scenario, point, how, error)
    wrong = []
    if how in (KILL_BEFORE, KILL_AFTER):
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            wrong.append(f"not killed: {status} {text}")
    else:
        if os.WEXITSTATUS(status) != 2 or not text.startswith("WriteError: expected"):
            wrong.append(f"exit {os.WEXITSTATUS(status)}: {text}")
        left = [p.name for p in scenario.out.glob(".*.tmp")] if scenario.out.exists() else []
        if left and error != errno.EROFS:
            wrong.append(f"left behind: {left}")
    wrong += scenario.intact(point)
    if run(scenario.words()) != 0:
        return [*wrong, "cannot be repeated"]
    return wrong + scenario.finished()


def survey(folder: Path, kind: str, stride: int) -> dict[str, Any]:
    """Every ``stride``-th point of both scenarios, in every way of the kind."""
    x = np.random.default_rng(0).integers(0, 255, (50, 4, 4), dtype=np.uint8)
    y = np.arange(50) % 3
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "set.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    (folder / "run.toml").write_text(CONFIG)
    scenarios: list[Callable[[Path], Any]] = [Training, Certifying]
    points = turn = 0
    found = []
    for make in scenarios:
        scenario = make(folder / make.__name__)
        scenario.folder.mkdir()
        scenario.data, scenario.config = folder / "set.npz", folder / "run.toml"
        for point in range(1, scenario.reference() + 1):
            for how, error in KINDS[kind]:
                turn += 1
                if turn % stride == 0:
                    points += 1
                    wrong = tried(scenario, point, how, error)
                    where = f"{make.__name__} call {point} mode {how} errno {error}"
                    found += [f"{where}: {w}" for w in wrong]
    return {"points": points, "wrong": found}


SHIM = ctypes.CDLL(None)
remember(estimation, "trace_model", lambda model, shape: shape)
remember(description, "trace_model", lambda model, shape: shape)
remember(certification, "certify", lambda model, data, **_: len(data[0]))

if __name__ == "__main__":
    torch.set_num_threads(1)
    SHIM.faults_calls.restype = ctypes.c_long
    SHIM.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    report = survey(Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3]))
    sys.stdout.write(json.dumps(report) + "\n")
