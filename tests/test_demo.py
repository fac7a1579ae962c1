# SPDX-License-Identifier: MIT
"""The demonstration runs end to end, and its network is visibly more robust than the plain one."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("sklearn", reason="the demo's digits come with scikit-learn")

from lmtfast.certificate import load_certificate
from lmtfast.checkpoint import load_checkpoint
from lmtfast.demo import run_demo


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo"), epochs=4)


def test_the_margin_buys_certified_accuracy(result):
    lmt, plain = result.certificates["lmt"], result.certificates["plain"]
    assert lmt.level == plain.level == "rigorous"
    assert lmt.median_radius > 2 * plain.median_radius
    assert lmt.certified_accuracy(0.1) > plain.certified_accuracy(0.1) + 0.2


def test_every_file_is_there(result):
    names = {path.name for path in result.files}
    assert names >= {"certificate.npz", "plain.npz", "bounds.csv", "seconds.txt"}
    assert all(path.stat().st_size > 0 for path in result.files)
    folder = result.files[0].parent
    loaded = load_certificate(folder / "certificate.npz")
    assert loaded.median_radius == result.certificates["lmt"].median_radius
    assert load_checkpoint(folder / "lmt").epoch == 4
    rows = list(csv.DictReader((folder / "bounds.csv").open()))
    assert {row["network"] for row in rows} == {"lmt", "plain"}
    assert {row["level"] for row in rows} == {"rigorous"}
    assert "total" in (folder / "seconds.txt").read_text()


@pytest.mark.slow
def test_a_second_demo_replaces_the_first(result):
    folder = result.files[0].parent
    again = run_demo(folder, epochs=1)
    assert load_checkpoint(folder / "lmt").epoch == 1
    assert again.files == result.files
