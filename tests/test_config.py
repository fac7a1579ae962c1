# SPDX-License-Identifier: MIT
"""Configurations: refusals that name the key, schedules, fingerprints, shipped recipes."""

from __future__ import annotations

import json
import pickle

import pytest

from lmtfast.config import OUTSIDE_FINGERPRINT, TrainConfig, from_mapping, load_config
from lmtfast.errors import ConfigError
from lmtfast.recipes import load_recipe, recipe_names


def test_toml_round_trip(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'method = "plain"\nepochs = 3\nlr = 1\nlr_milestones = [1, 2]\n'
        "[model_options]\nhidden = 7\nchannels = [4, 8]\n"
    )
    config = load_config(path)
    assert config.lr == 1.0
    assert isinstance(config.lr, float)
    assert config.lr_milestones == (1, 2)
    assert config.model_options["channels"] == (4, 8)
    assert from_mapping(json.loads(config.canonical()), where="here") == config


def test_unknown_keys_are_named_and_the_legal_ones_listed():
    with pytest.raises(ConfigError, match="'epoch', 'learning_rate'") as caught:
        from_mapping({"epoch": 1, "learning_rate": 1, "seed": 1}, where="run.toml")
    assert "weight_decay" in str(caught.value)
    assert "run.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.0),
        ("epochs", True),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", "fast"),
        ("lr", float("nan")),
        ("lr_factor", -1),
        ("eps", -0.1),
        ("eps", float("inf")),
        ("seed", -1),
        ("momentum", 1.0),
        ("method", "lmt++"),
        ("optimizer", "rmsprop"),
        ("engine", "fast"),
        ("batch_norm", "frozen"),
        ("eps_schedule", "cosine"),
        ("model", 3),
        ("model_options", [1]),
        ("lr_milestones", [2, 1]),
        ("lr_milestones", [0]),
        ("lr_milestones", 3),
        ("certify_radii", [-1.0]),
        ("input_range", [1.0, 0.0]),
        ("input_range", [0.0]),
    ],
)
def test_illegal_values_name_their_key(key, value):
    with pytest.raises(ConfigError, match=key):
        from_mapping({key: value}, where="run.toml")


def test_files_that_are_not_toml_are_refused(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_config(path)
    path.write_text("epochs = = 3")
    with pytest.raises(ConfigError, match="TOML"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="readable"):
        load_config(path)


def test_linear_schedule_is_the_papers():
    config = TrainConfig(eps=1e-2, eps_schedule="linear", eps_start=1e-5, eps_ramp_epochs=5)
    for epoch, expected in ((0, 1e-5), (1, 0.002008), (2.5, 0.005005), (4.999, 0.009998)):
        assert config.eps_at(epoch) == pytest.approx(expected, rel=1e-6)
    assert config.eps_at(5) == config.eps_at(100) == 1e-2


def test_a_linear_schedule_needs_a_length():
    with pytest.raises(ConfigError, match="eps_ramp_epochs"):
        TrainConfig(eps_schedule="linear")


def test_learning_rate_falls_at_each_milestone():
    config = TrainConfig(lr=0.01, lr_milestones=(80, 120))
    rates = [config.lr_at(e) for e in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_fingerprint_ignores_where_the_run_happens_and_nothing_else():
    base = TrainConfig()
    other = {
        "method": "plain",
        "model": "digits",
        "model_options": {"hidden": 3},
        "input_range": (0.0, 2.0),
        "optimizer": "sgd",
        "eps_schedule": "linear",
        "scaling": "lmt",
        "engine": "symbol",
        "batch_norm": "batch",
        "certify_radii": (3.0,),
        "lr_milestones": (3,),
        "data": "digits",
        "device": "cuda",
    }
    for key in base.to_dict():
        value = other.get(key)
        if value is None:
            value = getattr(base, key) + (0.5 if isinstance(getattr(base, key), float) else 1)
        if key in ("momentum",):
            value = 0.5
        extra = {"eps_ramp_epochs": 2.0} if key == "eps_schedule" else {}
        same = TrainConfig(**{key: value, **extra}).fingerprint() == base.fingerprint()
        assert same == (key in OUTSIDE_FINGERPRINT), key


def test_configurations_are_frozen_hashable_and_picklable():
    config = TrainConfig(model_options={"hidden": 3})
    with pytest.raises(AttributeError):
        config.epochs = 3
    with pytest.raises(TypeError):
        config.model_options["hidden"] = 4
    assert hash(config) == hash(TrainConfig(model_options={"hidden": 3}))
    assert pickle.loads(pickle.dumps(config)) == config


def test_recipes_load_and_name_no_path():
    assert set(recipe_names()) == {"mnist-lmt", "mnist-plain", "digits-lmt", "digits-plain"}
    for name in recipe_names():
        config = load_recipe(name)
        assert config.data == ("digits" if name.startswith("digits") else "")
        assert config.method == name.rpartition("-")[2]


def test_mnist_recipes_are_the_papers_experiment():
    lmt, plain = load_recipe("mnist-lmt"), load_recipe("mnist-plain")
    assert (lmt.eps, lmt.lr, lmt.batch_size, lmt.epochs) == (1.0, 1e-3, 50, 20)
    assert (lmt.scaling, lmt.engine, lmt.optimizer, lmt.weight_decay) == (
        "lmt++",
        "operator",
        "adam",
        0.0,
    )
    same = set(lmt.to_dict()) - {"method"}
    assert all(getattr(lmt, key) == getattr(plain, key) for key in same)


def test_unknown_recipes_list_the_known_ones():
    with pytest.raises(ConfigError, match="mnist-lmt"):
        load_recipe("imagenet")
