# SPDX-License-Identifier: MIT
"""Crafted checkpoints: nothing in them is executed, and none is used to go on training."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lmtfast as lf
from lmtfast import checkpoint
from lmtfast.check import read_weights
from lmtfast.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lmtfast.config import TrainConfig
from lmtfast.data import Dataset
from lmtfast.errors import CertificateError, ConfigError, NonFiniteError
from lmtfast.estimation import NetworkBound
from lmtfast.training import train
from tests.soundness.mutation import LITERALS, VALUES, safetensors_packed, safetensors_parts

CONFIG = TrainConfig(
    method="plain", model="digits", model_options={"channels": [2, 2], "hidden": 3}, epochs=1,
    batch_size=20,
)  # fmt: skip
MORE = replace(CONFIG, epochs=2)
NAME = "epoch-000001.safetensors"


def dataset() -> Dataset:
    x = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 3
    return Dataset(x, y, x[:10], y[:10], name="toy")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(CONFIG, dataset(), out=folder)
    return folder


class Gadget:
    """Unpickled, it leaves a file."""

    def __init__(self, kind: str, marker: Path) -> None:
        text = f"open({str(marker)!r}, 'w').close()"
        self.call = {
            "system": (os.system, (f"touch {marker}",)),
            "eval": (eval, (text,)),
            "exec": (exec, (text,)),
            "open": (open, (str(marker), "w")),
        }[kind]

    def __reduce__(self) -> Any:
        return self.call


def gadgets(good: bytes, marker: Path) -> Iterator[tuple[str, bytes]]:
    """Pickles as they are, in a zip as torch and NumPy write them, and inside a valid frame."""
    outer, data = safetensors_parts(good)
    for kind in ("system", "eval", "exec", "open"):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            raw = pickle.dumps(Gadget(kind, marker), protocol)
            yield f"pickle {kind} {protocol}", raw
            yield (
                f"pickle in the data {kind} {protocol}",
                safetensors_packed(json.dumps(outer), raw),
            )
            yield f"pickle as the header {kind} {protocol}", len(raw).to_bytes(8, "little") + raw
        torch.save(Gadget(kind, marker), buffer := io.BytesIO())
        yield f"torch {kind}", buffer.getvalue()
        torch.save(
            {"model": Gadget(kind, marker)}, buffer := io.BytesIO(),
            _use_new_zipfile_serialization=False,
        )  # fmt: skip
        yield f"old torch {kind}", buffer.getvalue()
        np.savez(buffer := io.BytesIO(), a=np.array([Gadget(kind, marker)], dtype=object))
        yield f"numpy {kind}", buffer.getvalue()


def framed(header: str, tensors: dict[str, torch.Tensor]) -> bytes:
    """A file whose checksum fits."""
    metadata = {"lmtfast": header, "sha256": checkpoint._checksum(header, tensors)}
    return checkpoint._safetensors().save(tensors, metadata)


def headers(good: bytes) -> Iterator[tuple[str, str]]:
    """Header texts that no run writes."""
    text = safetensors_parts(good)[0]["__metadata__"]["lmtfast"]
    header = json.loads(text)
    for key in header:
        for value in (None, [], {}, "x", -1, 0, 2.5, True, 10**30, [[]], {"a": 1}):
            label = key == "dataset" and type(value) is str  # names the data, and decides nothing
            if not label and (value != header[key] or type(value) is not type(header[key])):
                yield f"{key} = {value!r}", json.dumps({**header, key: value}, sort_keys=True)
        rest = {k: v for k, v in header.items() if k != key}
        yield f"no {key}", json.dumps(rest, sort_keys=True)
    for value in ([0], [-1, 4, 4], ["1"], [1.0, 4, 4], [True, 4, 4]):
        yield f"shape {value}", json.dumps({**header, "input_shape": value}, sort_keys=True)
    yield "twice", text.replace('{"classes"', '{"classes": 9, "classes"', 1)
    yield "spaces", text + " "
    for literal in LITERALS:
        yield f"epoch {literal[:20]}", text.replace('"epoch": 1,', f'"epoch": {literal},', 1)
    for name in ("os:system", "subprocess:run", "builtins:exec", "antigravity:x", "digits:x", ""):
        config = {**header["config"], "model": name}
        yield f"model {name}", json.dumps({**header, "config": config}, sort_keys=True)


def tensor_edits(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every tensor of another shape or dtype, missing, or beside one that nobody knows."""
    edits: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "one entry": lambda t: torch.zeros(1) if t.numel() != 1 else torch.zeros(2),
        "an axis more": lambda t: t[None],
        "flat": lambda t: t.reshape(-1) if t.ndim != 1 else t.reshape(1, -1),
        "doubles": lambda t: t.double(),
        "integers": lambda t: t.to(torch.int32),
        "complex": lambda t: t.to(torch.complex64),
    }
    for name, tensor in tensors.items():
        for edit, change in edits.items():
            changed = change(tensor)
            if changed.shape != tensor.shape or changed.dtype != tensor.dtype:
                yield f"{name}: {edit}", {**tensors, name: changed}
        if not name.startswith("optimizer"):
            yield f"no {name}", {n: t for n, t in tensors.items() if n != name}
    for name in ("model/extra", "optimizer/extra/exp_avg", "optimizer/fc1.weight/extra"):
        yield f"extra {name}", {**tensors, name: torch.zeros(3)}
    first = next(n for n in tensors if n.endswith("exp_avg"))
    yield "half a state", {n: t for n, t in tensors.items() if n != first}
    state = torch.zeros_like(tensors["rng/cpu"])
    yield "no generator's state", {**tensors, "rng/cpu": state}


def frames(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that are no checkpoint at all, or whose parts overlap."""
    outer, data = safetensors_parts(good)
    for length in (0, 1, 7, 2**31, 2**63 - 1, 2**63, 2**64 - 1, checkpoint.MAX_HEADER_BYTES + 1):
        yield f"length {length}", safetensors_packed(json.dumps(outer), data, length)
    yield "deep", safetensors_packed('{"__metadata__":' + "[" * 100_000, data)
    yield "two metadata", safetensors_packed('{"__metadata__":{},' + json.dumps(outer)[1:], data)
    yield "many", safetensors_packed('{"__metadata__":{}' + ',"a":{}' * 20_000 + "}", data)
    names = [n for n in outer if n != "__metadata__"]
    for name in names[:4]:
        for span in ([0, 4], [-4, 0], [0, 2**40], [2**63, 2**63 + 4], [8, 4], [0, 0]):
            entry = {**outer[name], "data_offsets": span}
            changed = json.dumps({**outer, name: entry})
            yield f"{name} at {span}", safetensors_packed(changed, data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(1 << 24))
    yield "bomb", buffer.getvalue()
    yield "nothing", b""
    yield "zeros", bytes(1 << 16)
    for value in VALUES:
        if value not in (True, 1):
            text = json.dumps({**outer, "__metadata__": value})
            yield f"metadata {value!r:.20}", safetensors_packed(text, data)


def crafted(good: Checkpoint, content: bytes, marker: Path) -> Iterator[tuple[str, bytes]]:
    text = safetensors_parts(content)[0]["__metadata__"]["lmtfast"]
    yield from gadgets(content, marker)
    yield from frames(content)
    for name, header in headers(content):
        yield name, framed(header, good.tensors)
    for name, tensors in tensor_edits(good.tensors):
        yield name, framed(text, {n: t.contiguous() for n, t in tensors.items()})


def test_no_crafted_file_is_executed_or_used(run: Path, tmp_path: Path) -> None:
    good, content = load_checkpoint(run), (run / NAME).read_bytes()
    marker, count, data = tmp_path / "executed", 0, dataset()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, crafted_file in crafted(good, content, marker):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / NAME).write_bytes(crafted_file)
        used = None
        with contextlib.suppress(ConfigError):
            used = train(MORE, data, out=tmp_path / "run", resume=True)
        assert used is None, name
        assert not marker.exists(), name
        count += 1
    assert count >= 400
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth < 128 * 1024, f"{growth} KiB more for files of a megabyte at most"


def test_the_uncrafted_file_is_used(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert len(train(MORE, dataset(), out=tmp_path / "run", resume=True).history) == 2


def test_gadgets_are_no_certificates_nor_weights(run: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "gadget.npz"
    for _, content in gadgets((run / NAME).read_bytes(), marker):
        path.write_bytes(content)
        with pytest.raises(CertificateError):
            lf.load_certificate(path)
        assert lf.check.check(path, path) != []
        assert not marker.exists()


def test_weights_that_are_no_numbers_are_never_certified(run: Path, tmp_path: Path) -> None:
    good = load_checkpoint(run)
    for value in (float("nan"), float("inf"), -float("inf")):
        tensors = {n: t.clone() for n, t in good.tensors.items()}
        tensors["model/fc1.weight"][0, 0] = value
        model = load_checkpoint(save_checkpoint(tmp_path, replace(good, tensors=tensors))).model()
        with pytest.raises(NonFiniteError):
            lf.certify(model, dataset().x_test, input_shape=(1, 4, 4), input_range=(0, 1))


def test_planted_iterates_change_no_certificate(run: Path, tmp_path: Path) -> None:
    """Iterates that say that every norm is zero: a certificate computes its own."""
    good = load_checkpoint(run)
    bound = NetworkBound(good.model(), (1, 4, 4))
    planted = {f"bound/{n}": torch.zeros_like(t) for n, t in bound.state_dict().items()}
    path = save_checkpoint(tmp_path, replace(good, tensors=good.tensors | planted))
    made = [
        lf.certify(c.model(), dataset().x_test, input_shape=(1, 4, 4), input_range=(0, 1))
        for c in (good, load_checkpoint(path))
    ]
    assert made[0].save(tmp_path / "a").read_bytes() == made[1].save(tmp_path / "b").read_bytes()
    assert set(read_weights(path)) >= set(read_weights(run / NAME))


SIZES: list[dict[str, Any]] = [
    {"config": replace(CONFIG, model_options={"hidden": 10**15, "channels": [2, 2]})},
    {"config": replace(CONFIG, model_options={"hidden": -1})},
    {"config": replace(CONFIG, model_options={"channels": "ab"})},
    {"config": replace(CONFIG, model="wide-resnet", model_options={"depth": 6 * 10**12 + 4})},
    {"config": replace(CONFIG, model="wide-resnet", model_options={"depth": 10, "width": 10**9})},
    {"config": replace(CONFIG, model="kolter-wong", model_options={"hidden": 10**12})},
    {"input_shape": (1, 2**31, 2**31)},
    {"input_shape": (4,)},
    {"classes": 2**50},
]


@pytest.mark.parametrize("change", SIZES)
def test_networks_beyond_their_tensors_are_never_built(change: dict[str, Any], run: Path) -> None:
    saved = replace(load_checkpoint(run), **change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ConfigError, lf.errors.ArgumentError)):
        saved.model()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
