# SPDX-License-Identifier: MIT
"""Checkpoints: complete, atomic, and refused when damaged."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
import torch

from lmtfast import checkpoint as module
from lmtfast.checkpoint import (
    Checkpoint,
    check_resumable,
    has_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from lmtfast.config import TrainConfig
from lmtfast.errors import ConfigError, MissingDependencyError
from lmtfast.models import build_model

CONFIG = TrainConfig(model="digits", epochs=3, model_options={"hidden": 6, "channels": [2, 3]})


def network():
    return build_model("digits", input_shape=(1, 8, 8), classes=4, options=CONFIG.model_options)


def make(epoch, **changes):
    model = network()
    tensors = {f"model/{n}": t for n, t in model.state_dict().items()}
    tensors |= {
        "bound/v": torch.randn(5),
        "rng/cpu": torch.get_rng_state(),
        "losses": torch.randn(3),
        "optimizer/scalar/step": torch.tensor(4.0),
        "half": torch.randn(3, 2).bfloat16(),
        "empty": torch.zeros(0),
    }
    fields = {
        "config": CONFIG,
        "epoch": epoch,
        "step": 3 * epoch,
        "input_shape": (1, 8, 8),
        "classes": 4,
        "dataset": "toy",
        "dataset_digest": "ab" * 32,
        "history": [{"epoch": e + 1, "train_loss": 0.1 + e / 3} for e in range(epoch)],
        "tensors": tensors,
    }
    return Checkpoint(**(fields | changes))


def test_round_trip_is_exact(tmp_path):
    saved = make(2)
    path = save_checkpoint(tmp_path, saved)
    loaded = load_checkpoint(path)
    assert loaded.config == saved.config
    assert loaded.history == saved.history
    assert (loaded.epoch, loaded.step, loaded.input_shape) == (2, 6, (1, 8, 8))
    assert set(loaded.tensors) == set(saved.tensors)
    for name, tensor in saved.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor), name


def test_model_is_rebuilt_in_evaluation_mode_without_touching_the_generator(tmp_path):
    saved = make(1)
    save_checkpoint(tmp_path, saved)
    before = torch.get_rng_state()
    model = load_checkpoint(tmp_path).model()
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved.tensors[f"model/{name}"])


def test_the_newest_two_are_kept(tmp_path):
    for epoch in (1, 2, 9, 10):
        save_checkpoint(tmp_path, make(epoch))
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == ["epoch-000009.safetensors", "epoch-000010.safetensors"]
    assert load_checkpoint(tmp_path).epoch == 10


@pytest.mark.parametrize("where", [0, 4, 40, 0.5, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, where):
    path = save_checkpoint(tmp_path, make(1))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(where * len(raw)) if isinstance(where, float) else where])
    with pytest.raises(ConfigError, match=r"epoch-000001\.safetensors"):
        load_checkpoint(tmp_path)


def test_one_changed_byte_anywhere_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, make(1))
    raw = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, len(raw), (60,), generator=generator).tolist()
    for position in [*range(0, 12), *positions, len(raw) - 1]:
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        with pytest.raises(ConfigError, match="intact"):
            load_checkpoint(path)


def test_the_previous_file_is_used_only_when_asked(tmp_path, caplog):
    save_checkpoint(tmp_path, make(1))
    newest = save_checkpoint(tmp_path, make(2))
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(ConfigError, match="allow_previous"):
        load_checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert load_checkpoint(tmp_path, allow_previous=True).epoch == 1
    assert "epoch-000002" in caplog.text


def test_when_all_are_damaged_asking_does_not_help(tmp_path):
    for epoch in (1, 2):
        save_checkpoint(tmp_path, make(epoch)).write_bytes(b"")
    with pytest.raises(ConfigError, match="epoch-000001"):
        load_checkpoint(tmp_path, allow_previous=True)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, make(1))

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, make(2))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path).epoch == 1
    save_checkpoint(tmp_path, make(2))
    assert not [f for f in tmp_path.iterdir() if f.name.endswith(".part")]


def test_directories_without_checkpoints(tmp_path):
    assert not has_checkpoint(tmp_path)
    assert not has_checkpoint(tmp_path / "missing")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.safetensors"):
        with pytest.raises(ConfigError, match="none"):
            load_checkpoint(path)


def test_a_foreign_model_is_not_imported_unasked(tmp_path):
    config = TrainConfig(model="os:system", model_options={"command": "exit 1"})
    save_checkpoint(tmp_path, make(1, config=config))
    loaded = load_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="import_model"):
        loaded.model()


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    wider = TrainConfig(model="digits", model_options={"hidden": 7, "channels": [2, 3]})
    save_checkpoint(tmp_path, make(1, config=wider))
    with pytest.raises(ConfigError, match="fit"):
        load_checkpoint(tmp_path).model()


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_optimizer_state_survives(tmp_path, kind):
    def run(steps, model, optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 1, 8, 8)).square().mean().backward()
            optimizer.step()

    def start():
        torch.manual_seed(0)
        model = network()
        params = list(model.parameters())
        if kind == "adam":
            return model, torch.optim.Adam(params, lr=0.1, fused=True)
        return model, torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True)

    model, optimizer = start()
    run(3, model, optimizer)
    names = {p: n for n, p in model.named_parameters()}
    tensors = {f"model/{n}": t for n, t in model.state_dict().items()}
    saved = make(1, tensors=tensors | optimizer_tensors(optimizer, names))
    save_checkpoint(tmp_path, saved)
    run(2, model, optimizer)

    again, optimizer_again = start()
    loaded = load_checkpoint(tmp_path)
    again.load_state_dict(loaded.group("model"))
    parameters = [n for n, _ in again.named_parameters()]
    restore_optimizer(optimizer_again, parameters, loaded.group("optimizer"))
    run(2, again, optimizer_again)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resuming_refuses_another_run():
    saved = make(2)
    same = {"digest": "ab" * 32}
    check_resumable(saved, CONFIG, **same)
    check_resumable(saved, TrainConfig(**{**CONFIG.to_dict(), "epochs": 9}), **same)
    with pytest.raises(ConfigError, match=r"lr = 0\.5 instead of 0\.001"):
        check_resumable(saved, TrainConfig(**{**CONFIG.to_dict(), "lr": 0.5}), **same)
    with pytest.raises(ConfigError, match="at least 2 epochs"):
        check_resumable(saved, TrainConfig(**{**CONFIG.to_dict(), "epochs": 1}), **same)
    with pytest.raises(ConfigError, match="data"):
        check_resumable(saved, CONFIG, digest="cd" * 32)


def test_missing_safetensors_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingDependencyError, match="safetensors"):
        module.save_checkpoint(tmp_path, make(1))


def test_no_unpickling_in_the_module():
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert "torch.load" not in source
    assert "import pickle" not in source
