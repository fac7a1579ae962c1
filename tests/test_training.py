# SPDX-License-Identifier: MIT
"""The training loop: it learns, it is reproducible, it resumes bit for bit, it stops on NaN."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from torch import nn

from lmtfast.checkpoint import load_checkpoint
from lmtfast.config import TrainConfig
from lmtfast.data import Dataset
from lmtfast.errors import ConfigError, NonFiniteError
from lmtfast.estimation import NetworkBound
from lmtfast.recipes import load_recipe
from lmtfast.training import radius_estimate, train

SMALL = {
    "model": "digits",
    "model_options": {"channels": [3, 4], "hidden": 8},
    "batch_size": 16,
    "epochs": 3,
    "eps": 0.1,
    "lr": 5e-3,
    "log_every": 4,
}


def toy(samples=150, classes=3, seed=0):
    """Three noisy templates of 8 x 8 pixels."""
    generator = torch.Generator().manual_seed(seed)
    templates = torch.rand(classes, 1, 8, 8, generator=generator)
    y = torch.arange(samples) % classes
    noise = 0.2 * torch.rand(samples, 1, 8, 8, generator=generator)
    x = 0.8 * templates[y] + noise
    return Dataset(x[30:], y[30:], x[:30], y[:30], name="toy")


class Diverging(nn.Module):
    """Learns nothing; gives NaN in training mode after a number of calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        logits = self.head(x.flatten(1))
        if self.training:
            self.calls -= 1
            if self.calls < 0:
                return logits * float("nan")
        return logits


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize("method", ["plain", "lmt"])
def test_training_learns_and_reports(method):
    config = TrainConfig(method=method, **(SMALL | {"epochs": 8}))
    reports = []
    before = torch.get_rng_state()
    result = train(config, toy(), progress=lambda *report: reports.append(report))
    assert torch.equal(before, torch.get_rng_state())
    assert not result.model.training
    assert result.history[-1]["test_accuracy"] > 0.9
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert len(result.history) == 8
    assert len(result.losses) == 8 * 8
    assert reports[-1][0] == reports[-1][1] == 64
    assert sum("epoch" in row for _, _, row in reports) == 8
    assert result.checkpoint is None
    assert ("bound_estimate" in result.history[0]) == (method == "lmt")


def test_the_margin_loss_buys_radius():
    radii = {}
    for method in ("plain", "lmt"):
        config = TrainConfig(method=method, **(SMALL | {"epochs": 8, "eps": 0.5}))
        model = train(config, toy()).model
        bound = NetworkBound(model, (1, 8, 8)).converge(100)
        data = toy()
        with torch.no_grad():
            radii[method] = radius_estimate(model(data.x_test), data.y_test, bound).median()
    assert radii["lmt"] > 2 * radii["plain"]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lmt"},
        {"method": "plain", "optimizer": "sgd", "lr_milestones": [1]},
        {
            "method": "lmt",
            "optimizer": "sgd",
            "eps_schedule": "linear",
            "eps_ramp_epochs": 2.5,
            "scaling": "emma",
        },
        pytest.param(
            {
                "method": "lmt",
                "model": "wide-resnet",
                "model_options": {"depth": 10, "width": 1, "dropout": 0.3},
                "batch_norm": "batch",
                "engine": "symbol",
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["lmt", "plain-sgd", "ramp-emma", "wide-resnet-dropout"],
)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, changes):
    data = toy(100)
    config = TrainConfig(**(SMALL | changes))
    whole = train(config, data, out=tmp_path / "whole")
    first = TrainConfig(**(SMALL | changes | {"epochs": 2}))
    train(first, data, out=tmp_path / "parts")
    resumed = train(config, data, out=tmp_path / "parts", resume=True)
    assert torch.equal(whole.losses, resumed.losses)
    assert without_seconds(whole.history) == without_seconds(resumed.history)
    a, b = (load_checkpoint(tmp_path / d).tensors for d in ("whole", "parts"))
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_the_same_configuration_gives_the_same_run_and_another_seed_another():
    data = toy(80)
    runs = [train(TrainConfig(**SMALL, seed=s), data).losses for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_run_leaves_its_log(tmp_path):
    config = TrainConfig(**SMALL)
    result = train(config, toy(), out=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_dict()
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [float(r["train_loss"]) for r in rows] == [h["train_loss"] for h in result.history]
    losses = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert int(losses[-1]["step"]) == len(result.losses)
    assert result.checkpoint == tmp_path / "epoch-000003.safetensors"
    saved = load_checkpoint(tmp_path)
    assert any(n.startswith("bound/") for n in saved.tensors)
    for name, tensor in saved.model().state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name])


def test_a_directory_with_a_run_is_not_overwritten(tmp_path):
    data = toy(80)
    config = TrainConfig(**(SMALL | {"epochs": 1, "method": "plain"}))
    train(config, data, out=tmp_path)
    with pytest.raises(ConfigError, match="resume"):
        train(config, data, out=tmp_path)
    with pytest.raises(ConfigError, match="lr = "):
        train(
            TrainConfig(**(SMALL | {"method": "plain", "lr": 1.0})), data, out=tmp_path, resume=True
        )
    with pytest.raises(ConfigError, match="data"):
        train(config, toy(80, seed=1), out=tmp_path, resume=True)
    with pytest.raises(ConfigError, match="out"):
        train(config, data, resume=True)


def test_nan_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    data = toy(94)  # four steps of 16 per epoch
    config = TrainConfig(
        **(
            SMALL
            | {
                "method": "plain",
                "model": f"{__name__}:Diverging",
                "model_options": {"calls": 6},
            }
        )
    )
    with pytest.raises(NonFiniteError, match=r"step 7 \(epoch 2\)") as caught:
        train(config, data, out=tmp_path)
    assert "epoch-000001.safetensors" in str(caught.value)
    assert load_checkpoint(tmp_path).epoch == 1


def test_losses_are_fetched_once_per_log_every_steps(monkeypatch):
    fetches = []
    stack = torch.stack

    def counted(tensors, *args, **kwargs):
        fetches.append(len(tensors))
        return stack(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "stack", counted)
    train(TrainConfig(**(SMALL | {"method": "plain", "epochs": 1, "log_every": 5})), toy())
    assert fetches == [5, 3]


@pytest.mark.slow
def test_mnist_recipe_runs_an_epoch_on_generated_images():
    generator = torch.Generator().manual_seed(0)
    templates = torch.rand(10, 1, 28, 28, generator=generator)
    y = torch.arange(3000) % 10
    x = 0.8 * templates[y] + 0.2 * torch.rand(3000, 1, 28, 28, generator=generator)
    data = Dataset(x[:2500], y[:2500], x[2500:], y[2500:], name="templates")
    row = train(load_recipe("mnist-lmt", epochs=1), data).history[-1]
    assert row["test_accuracy"] > 0.9
    assert row["radius_estimate"] > 0.1
