# SPDX-License-Identifier: MIT
"""The command line: every command end to end, its exit codes, and its refusals."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("typer", reason="the command line needs typer")

from lmtfast.certificate import load_certificate
from lmtfast.cli import INSTALL_HINT, main
from lmtfast.recipes import recipe_names

CONFIG = """
method = "lmt"
model = "digits"
epochs = 2
batch_size = 25
eps = 0.1
lr = 5e-3
certify_radii = [0.05, 0.1]
[model_options]
channels = [3, 4]
hidden = 8
"""
COMMANDS = ("demo", "train", "certify", "verify", "bound", "info")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Data, a configuration and a trained run."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    templates = rng.integers(0, 200, (3, 8, 8))
    y = np.arange(130) % 3
    x = (templates[y] + rng.integers(0, 56, (130, 8, 8))).astype(np.uint8)
    np.savez(folder / "set.npz", x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])
    (folder / "run.toml").write_text(CONFIG)
    words = ["train", "--config", folder / "run.toml", "--data", folder / "set.npz"]
    assert main([*map(str, words), "--out", str(folder / "run")]) == 0
    return folder


def run(*words):
    return main([str(word) for word in words])


def test_help_teaches_every_command(capsys):
    assert run("--help") == 0
    overview = capsys.readouterr().out
    assert all(command in overview for command in COMMANDS)
    for command in COMMANDS:
        assert run(command, "--help") == 0
        assert f"lmtfast {command}" in " ".join(capsys.readouterr().out.split())


def test_help_imports_no_torch():
    code = (
        "import sys; from lmtfast.cli import main; main(['train', '--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["train", "--no-such-option"],
        ["train"],
        ["train", "--recipe", "mnist-lmt", "--config", "x.toml"],
        ["train", "--recipe", "no-such-recipe"],
        ["train", "--recipe", "mnist-lmt"],
        ["train", "--recipe", "mnist-lmt", "--data", "no-such-file.npz"],
        ["train", "--recipe", "digits-lmt", "--epochs", "0"],
        ["certify", "no-such-checkpoint"],
        ["certify", "no-such-checkpoint", "--level", "estimate"],
        ["verify", "no-such.npz", "--checkpoint", "no-such-checkpoint"],
        ["bound", "no_such_module:build", "--input-shape", "3,8,8"],
        ["bound", "torch.nn:ReLU"],
        ["bound", "torch.nn:ReLU", "--input-shape", "3x8"],
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_to_do(words, capsys):
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.strip()
    assert "Traceback" not in captured.err + captured.out


def test_a_recipe_without_data_asks_for_it(capsys):
    assert run("train", "--recipe", "mnist-lmt") == 2
    assert "--data" in capsys.readouterr().err


def test_an_unknown_recipe_lists_the_known_ones(capsys):
    assert run("train", "--recipe", "imagenet") == 2
    error = capsys.readouterr().err
    assert all(name in error for name in recipe_names())


def test_missing_typer_prints_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert run("info") == 2
    assert capsys.readouterr().err == INSTALL_HINT


def test_train_leaves_a_run_that_resumes(workspace, tmp_path, capsys):
    words = ["train", "--config", workspace / "run.toml", "--data", workspace / "set.npz"]
    assert run(*words, "--out", workspace / "run") == 2
    assert "resume" in capsys.readouterr().err
    assert run(*words, "--epochs", 1, "--out", tmp_path) == 0
    assert run(*words, "--out", tmp_path, "--resume") == 0
    assert "test accuracy" in capsys.readouterr().out
    for name in ("losses.csv", "config.json"):
        assert (tmp_path / name).read_text() == (workspace / "run" / name).read_text()


def test_bound_of_a_checkpoint(workspace, tmp_path, capsys):
    table = tmp_path / "layers.csv"
    assert run("bound", workspace / "run", "--engine", "operator", "--csv", table) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("conv1", "conv2", "fc1", "fc2", "Cor. 1", "Cisse"))
    rows = {row["name"]: row for row in csv.DictReader(table.open())}
    assert list(rows) == ["conv1", "conv2", "fc1", "fc2"]
    assert rows["conv2"]["in_shape"] == "3x8x8"
    for name in ("conv1", "conv2"):
        norm, corollary, cisse = (float(rows[name][k]) for k in ("norm", "corollary_1", "cisse"))
        assert norm <= corollary <= cisse * (1 + 1e-12)
    # a 4 x 4 kernel with stride 2 overlaps four times, Cisse et al. count its sixteen entries
    assert float(rows["conv2"]["cisse"]) == pytest.approx(2 * float(rows["conv2"]["corollary_1"]))
    assert rows["fc1"]["corollary_1"] == ""


def test_bound_of_an_importable_factory_in_the_working_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "mynets_for_cli.py").write_text(
        "import torch\n"
        "def build():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())\n"
        "    with torch.no_grad():\n"
        "        model[0].weight.copy_(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["bound", "mynets_for_cli:build", "--input-shape", "3", "--level", "rigorous"]
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert "rigorous" in out
    assert " 4 " in out


def test_info_lists_versions_and_backends(capsys):
    assert run("info") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("torch", "safetensors", "reference", "native"))


def test_module_entry_point():
    words = [sys.executable, "-m", "lmtfast", "train", "--bad-option"]
    assert subprocess.run(words, capture_output=True).returncode == 2


@pytest.fixture(scope="module")
def certificate(workspace):
    path = workspace / "certificate.npz"
    words = ["certify", workspace / "run", "--data", workspace / "set.npz", "--out", path]
    assert run(*words, "--plot", workspace / "curve.png") == 0
    return path


def test_certify_writes_what_verify_confirms(workspace, certificate, capsys):
    loaded = load_certificate(certificate)
    assert loaded.level == "rigorous"
    assert len(loaded.radius) == 30
    assert loaded.median_radius > 0.0
    assert (workspace / "curve.png").stat().st_size > 5000
    words = ["verify", certificate, "--checkpoint", workspace / "run"]
    assert run(*words, "--data", workspace / "set.npz") == 0
    assert "verified" in capsys.readouterr().out


def test_check_confirms_it_from_the_checkpoint_alone(workspace, certificate, tmp_path, capsys):
    capsys.readouterr()
    assert run("check", certificate, workspace / "run") == 0
    assert "accepted" in capsys.readouterr().out
    words = ["certify", workspace / "run", "--data", workspace / "set.npz", "--limit", 3]
    few, weights = tmp_path / "few.npz", tmp_path / "weights.npz"
    assert run(*words, "--out", few, "--weights", weights) == 0
    assert run("check", few, weights) == 0
    assert run("check", certificate, weights) == 0
    assert run("check", weights, weights) == 1
    assert run("check", certificate, tmp_path) == 2


def test_certify_prints_the_radii_asked_for(workspace, tmp_path, capsys):
    words = ["certify", workspace / "run", "--data", workspace / "set.npz", "--limit", 5]
    assert run(*words, "--radius", 0.07, "--out", tmp_path / "few.npz") == 0
    out = capsys.readouterr().out
    assert "CRA@0.07[rigorous, ideal]" in out
    assert len(load_certificate(tmp_path / "few.npz").radius) == 5
    words = ["verify", tmp_path / "few.npz", "--checkpoint", workspace / "run"]
    assert run(*words, "--data", workspace / "set.npz") == 0


def test_a_hashed_draw_repeats(workspace, tmp_path):
    words = ["certify", workspace / "run", "--data", workspace / "set.npz", "--limit", 3]
    words += ["--level", "probabilistic", "--draw", "hash", "--out"]
    assert run(*words, tmp_path / "a.npz") == run(*words, tmp_path / "b.npz") == 0
    first, second = (load_certificate(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert 0.0 < first.level.delta <= 2.0**-100
    assert (first.radius == second.radius).all()
    assert run(*words, tmp_path / "c.npz", "--delta", 0.01) == 2


def test_where_to_prove_is_checked_before_proving(workspace, tmp_path, capsys):
    words = ["certify", workspace / "run", "--data", workspace / "set.npz", "--out", tmp_path / "a"]
    assert run(*words, "--device", "abacus") == 2
    assert "abacus" in capsys.readouterr().err


def test_another_network_or_other_data_exits_with_1(workspace, certificate, tmp_path, capsys):
    words = ["train", "--config", workspace / "run.toml", "--data", workspace / "set.npz"]
    assert run(*words, "--epochs", 1, "--seed", 1, "--out", tmp_path / "other") == 0
    capsys.readouterr()
    assert run("verify", certificate, "--checkpoint", tmp_path / "other") == 1
    assert "not verified" in capsys.readouterr().out

    with np.load(workspace / "set.npz") as stored:
        arrays = dict(stored)
    arrays["x_test"] = arrays["x_test"][::-1]
    np.savez(tmp_path / "reversed.npz", **arrays)
    words = ["verify", certificate, "--checkpoint", workspace / "run"]
    assert run(*words, "--data", tmp_path / "reversed.npz") == 1


def test_a_damaged_certificate_exits_with_1(workspace, certificate, tmp_path):
    raw = bytearray(certificate.read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "damaged.npz").write_bytes(raw)
    assert run("verify", tmp_path / "damaged.npz", "--checkpoint", workspace / "run") == 1
