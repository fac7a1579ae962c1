# SPDX-License-Identifier: MIT
"""The attacks of the libraries, refusals, and what the command line and the files show."""

from __future__ import annotations

import csv
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import lmtfast as lf
from benchmarks.attack_check import keep
from lmtfast.adversaries import ADVERSARIES, choose
from lmtfast.errors import ArgumentError, CertificateError, MissingDependencyError, TrainModeError
from lmtfast.plot import plot_certificates
from tests.attack_cases import NEWTON, attacked_net, certified, linear_net, needs, seeded, small_net

FOOLBOX = [n for n, a in ADVERSARIES.items() if a.library == "foolbox"]
ART = [n for n, a in ADVERSARIES.items() if a.library == "art"]


@pytest.fixture(scope="module")
def example():
    return attacked_net()


# -- refusals ----------------------------------------------------------------------------------


def test_refusals(example):
    net, x, y, certificate, _ = example
    other, *_ = small_net()
    other[0].weight.data.mul_(1.5)
    with pytest.raises(CertificateError, match="other weights"):
        lf.attack(other, certificate, (x, y), attacks=[NEWTON])
    with pytest.raises(CertificateError, match="12 certified inputs"):
        lf.attack(net, certificate, (x[:5], y[:5]), attacks=[NEWTON])
    with pytest.raises(TrainModeError):
        lf.attack(small_net()[0].train(), certificate, (x, y), attacks=[NEWTON])
    with pytest.raises(ArgumentError, match="slow_inputs"):
        lf.attack(net, certificate, (x, y), attacks=[NEWTON], slow_inputs=-1)
    for names in (["no-such-attack"], []):
        with pytest.raises(ArgumentError, match="deepfool, ddn, pgd"):
            lf.attack(net, certificate, (x, y), attacks=names)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    for names in (None, ["pgd"]):
        with pytest.raises(MissingDependencyError, match=r"lmtfast\[attack\]"):
            choose(names)
    monkeypatch.setitem(sys.modules, "foolbox", ModuleType("foolbox"))
    monkeypatch.setitem(sys.modules, "art.attacks.evasion", None)
    monkeypatch.setitem(sys.modules, "art", None)
    chosen, skipped = choose(None)
    assert [a.name for a in chosen] == FOOLBOX
    assert [name for name, _ in skipped] == ART
    with pytest.raises(MissingDependencyError, match="adversarial-robustness-toolbox"):
        choose(["square"])


# -- the libraries' attacks --------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FOOLBOX, *ART])
def test_every_attack_of_the_libraries(name, example):
    library = "art.attacks.evasion" if name in ART else "foolbox"
    needs(library)
    net, x, y, certificate, _ = example
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = ["deepfool", name] if ADVERSARIES[name].started else [name]
    one, two = (lf.attack(net, certificate, (x, y), attacks=first, slow_inputs=6) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert np.array_equal(one.distance, two.distance)
    row = one.rows[-1]
    assert row.inputs == (6 if ADVERSARIES[name].slow else 12)
    assert row.changed >= row.inputs // 2
    assert one.violations == ()
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_attacks_that_do_not_fit_are_listed(example):
    needs("art.attacks.evasion")
    net, x = linear_net(0), torch.zeros(2, 9)
    report = lf.attack(net, certified(net, x), x, attacks=["square", NEWTON])
    assert [r.name for r in report.rows] == ["newton"]
    assert dict(report.skipped)["square"].startswith("needs square images")


# -- the command line, the plot and the files --------------------------------------------------


def test_the_attacked_curve_is_drawn(example, tmp_path):
    *_, certificate, report = example
    plain = plot_certificates({"net": certificate}, tmp_path / "plain.png").read_bytes()
    path = plot_certificates({"net": certificate}, tmp_path / "both.png", attacked={"net": report})
    assert path.read_bytes() != plain


def test_the_files_of_a_run(example, tmp_path):
    *_, certificate, report = example
    keep(tmp_path, "net", certificate, report)
    (row,) = csv.DictReader((tmp_path / "attacks.csv").open())
    assert (row["name"], int(row["changed"])) == ("newton", report.rows[0].changed)
    gap = {float(r["share"]): r for r in csv.DictReader((tmp_path / "gap.csv").open())}
    assert float(gap[1.0]["certified/attacked"]) == pytest.approx(report.gap.max(), abs=1e-6)
    for point in csv.DictReader((tmp_path / "curve.csv").open()):
        assert float(point["certified"]) <= float(point["attacked"])
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A checkpoint's certificate command, without training: (words) to exit code."""
    pytest.importorskip("typer", reason="the command line needs typer")
    from lmtfast import checkpoint, commands
    from lmtfast.cli import main

    net, x, y = small_net()
    saved = SimpleNamespace(
        config=SimpleNamespace(
            data="", input_range=(-1.0, 1.0), method="lmt", certify_radii=(0.1,)
        ),
        input_shape=(1, 10, 10),
        model=lambda import_model: net,
    )
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *a, **k: saved)
    data = SimpleNamespace(x_test=x, y_test=y, input_range=(-1.0, 1.0), name="random")
    monkeypatch.setattr(commands, "_dataset", lambda *a: data)
    monkeypatch.setitem(ADVERSARIES, "newton", NEWTON)
    out = ["--out", str(tmp_path / "c.npz")]
    return lambda *words: main(["certify", "checkpoint", *out, *map(str, words)])


def test_certify_attacks_on_request(run, tmp_path, capsys):
    words = ["--attack", "--attack-with", "newton", "--attack-csv", tmp_path / "a.csv"]
    assert run(*words, "--plot", tmp_path / "curve.png") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0 proved changes of class" in text
    assert (tmp_path / "c.npz").exists()
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 13
    assert run("--attack-with", "newton") == 2
    assert run("--attack", "--attack-with", "no-such-attack") == 2


def test_a_violation_fails_the_run_and_leaves_no_certificate(run, tmp_path, monkeypatch, capsys):
    from lmtfast import certification

    honest = certification.certify
    monkeypatch.setattr(
        certification, "certify",
        lambda *a, **k: seeded(honest(*a, **k), np.full(12, 50.0)),
    )  # fmt: skip
    assert run("--attack", "--attack-with", "newton") == 1
    out = capsys.readouterr().out
    assert "ViolationError: expected no change of class" in out
    assert "Do this:" in out
    assert not (tmp_path / "c.npz").exists()
    assert len(np.load(tmp_path / "c.npz.violations.npz")["index"]) > 0
