# SPDX-License-Identifier: MIT
"""Fuzz targets: checkpoints, configurations and data sets.

Any bytes give a whole object or the library's typed error. An accepted checkpoint saves and loads
as itself, and its network is built or refused; an accepted configuration survives its own JSON.
"""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import torch

from lmtfast import checkpoint
from lmtfast.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lmtfast.config import TrainConfig, from_mapping, parse_config
from lmtfast.data import load_dataset
from lmtfast.errors import ConfigError, LmtfastError
from lmtfast.models import build_model
from lmtfast.recipes import load_recipe
from tests.soundness.fuzz_certificate import folder, put
from tests.soundness.fuzzing import Target, judged
from tests.soundness.mutation import bytes_edited, checkpoint_edited, toml_edited, zip_edited

CONFIG = TrainConfig(model="digits", epochs=3, model_options={"hidden": 2, "channels": [1, 1]})
INPUT = (1, 2, 2)


@functools.cache
def checkpoints() -> tuple[bytes, ...]:
    options = CONFIG.model_options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model("digits", input_shape=INPUT, classes=2, options=options)
    tensors = {f"model/{n}": t for n, t in model.state_dict().items()}
    tensors |= {"losses": torch.ones(1), "rng/cpu": torch.arange(8, dtype=torch.uint8)}
    saved = Checkpoint(
        CONFIG, 1, 1, INPUT, 2, "toy", "ab" * 32, [{"epoch": 1, "train_loss": 0.5}], tensors
    )
    path = save_checkpoint(Path(folder().name) / "seeds", saved)
    return (path.read_bytes(),)


def checksum(text: str, content: bytes) -> str:
    return checkpoint._checksum(text, checkpoint._safetensors().load(content))


def same(a: Checkpoint, b: Checkpoint) -> bool:
    names = ("config", "epoch", "step", "input_shape", "classes", "dataset", "dataset_digest")
    return (
        all(getattr(a, n) == getattr(b, n) for n in names)
        and json.dumps(a.history) == json.dumps(b.history)
        and a.tensors.keys() == b.tensors.keys()
        and checkpoint._checksum("", a.tensors) == checkpoint._checksum("", b.tensors)
    )


def judge_checkpoint(content: bytes) -> bool:
    path = put(content, "any.safetensors")
    try:
        loaded = load_checkpoint(path)
    except ConfigError as error:
        judged(error)
        return False
    assert all(type(n) is int and n > 0 for n in (*loaded.input_shape, loaded.classes))
    assert len(loaded.history) == loaded.epoch
    assert loaded.step >= 0
    again = Path(folder().name) / "again"
    assert same(load_checkpoint(save_checkpoint(again, loaded)), loaded)
    shutil.rmtree(again)
    try:
        model = loaded.model()
    except LmtfastError:
        return True
    for name, tensor in model.state_dict().items():
        assert tensor.numpy().tobytes() == loaded.tensors[f"model/{name}"].numpy().tobytes()
    return True


def judge_config(content: bytes) -> bool:
    try:
        config = parse_config(content.decode("utf-8", "replace"), where="fuzz")
    except ConfigError as error:
        judged(error)
        return False
    assert from_mapping(json.loads(config.canonical()), where="again") == config
    assert hash(config) == hash(from_mapping(config.to_dict(), where="again"))
    assert len(config.fingerprint()) == 64
    for epoch in (0, 1, 7, config.epochs):
        assert math.isfinite(config.lr_at(epoch))
        try:
            assert config.eps_at(epoch) >= 0
        except LmtfastError:
            return True
    return True


def judge_data(content: bytes) -> bool:
    path = put(content, "data.npz")
    try:
        data = load_dataset(path)
    except LmtfastError as error:
        judged(error)
        return False
    assert len(data.x_train) == len(data.y_train) > 0
    assert bool(data.x_train.isfinite().all())
    return True


def config_files() -> list[bytes]:
    texts = []
    for name in ("digits-lmt", "mnist-plain"):
        values = load_recipe(name).to_dict() | {"model_options": {}}
        rows = {k: v for k, v in values.items() if k != "model_options"}
        text = "".join(f"{k} = {json.dumps(v)}\n" for k, v in rows.items())
        texts.append(f"{text}[model_options]\nhidden = 7\nchannels = [4, 8]\n".encode())
    return texts


def data_files() -> list[bytes]:
    path = Path(folder().name) / "seed.npz"
    x, y = np.zeros((3, 4, 4), np.uint8), np.array([0, 1, 1])
    np.savez(path, x_train=x, y_train=y, x_test=x[:1], y_test=y[:1])
    return [path.read_bytes()]


def data_edited(content: bytes, choice: random.Random) -> bytes:
    return zip_edited(content, choice) if choice.random() < 0.7 else bytes_edited(content, choice)


TARGETS = {
    "checkpoint": Target(
        lambda: list(checkpoints()), lambda b, c: checkpoint_edited(b, c, checksum),
        judge_checkpoint, ("lmtfast.checkpoint", "lmtfast.config"),
    ),
    "config": Target(
        config_files, toml_edited, judge_config, ("lmtfast.config", "tomllib._parser")
    ),
    "data": Target(data_files, data_edited, judge_data, ("lmtfast.data",)),
}  # fmt: skip
