# SPDX-License-Identifier: MIT
"""Certificates as data and as files: statistics, round trip, damage, disagreement."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast import verification
from lmtfast.certificate import Certificate, load_certificate
from lmtfast.certificate_file import canonical_json, encode
from lmtfast.errors import ArgumentError, CertificateError, LmtfastError
from lmtfast.files import write_atomically
from lmtfast.verification import verify_certificate

SHAPE = (4,)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


@pytest.fixture(scope="module")
def data(network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.rand(21, 4)
    y = network(x).argmax(1)
    y[::5] = (y[::5] + 1) % 3
    return x, y


@pytest.fixture(scope="module")
def certificate(network: nn.Module, data: Any) -> Certificate:
    return lf.certify(network, data, input_shape=SHAPE, input_range=(0, 1))


@pytest.fixture
def saved(certificate: Certificate, tmp_path: Path) -> Path:
    return certificate.save(tmp_path / "certificate.npz")


# What files of schema 1 do not have.
UNDESCRIBED: dict[str, Any] = dict.fromkeys(("logit_error", "logits", "network", "program_sha256"))


def with_radii(certificate: Certificate, radii: list[float], right: list[bool]) -> Certificate:
    count = len(radii)
    return dataclasses.replace(
        certificate,
        prediction=np.zeros(count),
        prediction_radius=np.array(radii),
        margin_lower=np.ones(count),
        label=np.array([0 if r else 1 for r in right]),
        **UNDESCRIBED,
    )


# -- statistics


def test_misclassified_inputs_count_as_zero_in_the_median(certificate: Certificate) -> None:
    made = with_radii(certificate, [0.5, 0.9, 0.7, 0.8, 0.6], [True, False, False, False, True])
    assert made.median_radius == 0.0
    assert made.radius.tolist() == [0.5, 0.0, 0.0, 0.0, 0.6]
    made = with_radii(certificate, [0.5, 0.9, 0.7, 0.8], [True, False, True, True])
    assert made.median_radius == (0.5 + 0.7) / 2
    assert (made.n_total, made.n_correct, made.n_certified, made.n_constant) == (4, 3, 3, 0)


def test_certified_accuracy_is_strict(certificate: Certificate) -> None:
    made = with_radii(certificate, [0.5, 0.5, 0.25, 0.0], [True] * 4)
    assert made.certified_accuracy(0.5) == 0.0
    assert made.certified_accuracy(math.nextafter(0.5, 0)) == 0.5
    assert made.certified_accuracy(0) == 0.75
    for eps in (-0.1, float("nan")):
        with pytest.raises(ArgumentError):
            made.certified_accuracy(eps)


def test_infinite_radii_are_flagged_as_constant(certificate: Certificate) -> None:
    made = with_radii(certificate, [math.inf, math.inf, 0.1], [True, False, True])
    assert made.n_constant == 2
    assert made.counts == {"certified": 2, "constant": 2, "refused": 1, "total": 3, "correct": 2}
    assert made.median_radius == 0.1


def test_without_labels_statistics_say_what_is_missing(certificate: Certificate) -> None:
    bare = dataclasses.replace(certificate, label=None)
    asks: list[Callable[[], Any]] = [
        lambda: bare.radius,
        lambda: bare.correct,
        lambda: bare.median_radius,
        lambda: bare.n_correct,
        lambda: bare.certified_accuracy(0.1),
        lambda: bare.to_tsv("never.tsv"),
    ]
    for ask in asks:
        with pytest.raises(ArgumentError, match="labels"):
            ask()
    assert "correct" not in bare.counts
    assert bare.n_certified == int((bare.prediction_radius > 0).sum())


def test_arrays_and_fields_are_frozen(certificate: Certificate) -> None:
    with pytest.raises(ValueError, match="read-only"):
        certificate.prediction_radius[0] = 9.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.level = "rigorous"  # type: ignore[misc]


def test_counts_add_up_for_random_results(certificate: Certificate) -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        n = int(generator.integers(0, 12))
        radii = generator.choice([0.0, 0.1, 1.0, math.inf], n)
        made = with_radii(certificate, radii.tolist(), generator.choice([True, False], n).tolist())
        counts = made.counts
        assert counts["certified"] + counts["refused"] == counts["total"] == n
        assert counts["certified"] <= counts["correct"] <= n


# -- files


def same(a: Certificate, b: Certificate) -> bool:
    return encode(a) == encode(b)


def test_round_trip(certificate: Certificate, saved: Path) -> None:
    loaded = load_certificate(saved)
    assert same(loaded, certificate)
    assert loaded.radius.tolist() == certificate.radius.tolist()
    assert loaded.header == certificate.header
    bare = dataclasses.replace(certificate, label=None)
    assert load_certificate(bare.save(saved)).label is None


def test_bytes_repeat(
    certificate: Certificate, network: nn.Module, data: Any, tmp_path: Path
) -> None:
    again = lf.certify(network, data, input_shape=SHAPE, input_range=(0, 1))
    first, second = certificate.save(tmp_path / "a.npz"), again.save(tmp_path / "b.npz")
    assert first.read_bytes() == second.read_bytes()


def test_numpy_reads_the_file_without_pickle(certificate: Certificate, saved: Path) -> None:
    with np.load(saved, allow_pickle=False) as archive:
        assert archive["prediction_radius"].tolist() == certificate.prediction_radius.tolist()
        header = json.loads(bytes(archive["header"]))
    assert float.fromhex(header["features"]) == certificate.features
    assert header["level"] == "rigorous"
    assert [float.fromhex(v) for v in header["input_range"]] == [0.0, 1.0]
    assert any(a.startswith("A1") for a in header["assumptions"])


def test_empty_and_special_values_round_trip(certificate: Certificate, tmp_path: Path) -> None:
    empty = with_radii(certificate, [], [])
    assert math.isnan(empty.median_radius)
    assert math.isnan(empty.certified_accuracy(0.1))
    assert load_certificate(empty.save(tmp_path / "empty.npz")).n_total == 0
    odd = dataclasses.replace(
        with_radii(certificate, [math.inf, 5e-324], [True, True]), slack=math.nan
    )
    assert same(load_certificate(odd.save(tmp_path / "odd.npz")), odd)


def test_tsv(certificate: Certificate, tmp_path: Path) -> None:
    lines = certificate.to_tsv(tmp_path / "c.tsv").read_text().splitlines()
    assert lines[0] == "idx\tlabel\tpredict\tradius\tcorrect"
    for i, line in enumerate(lines[1:]):
        index, label, predict, radius, correct = line.split("\t")
        assert int(index) == i
        assert float(radius) == certificate.prediction_radius[i]
        assert (int(label) == int(predict)) == bool(int(correct)) == bool(certificate.correct[i])


def test_every_single_byte_flip_is_refused(certificate: Certificate, saved: Path) -> None:
    content = saved.read_bytes()
    choice = random.Random(0)
    positions = choice.sample(range(len(content)), min(600, len(content)))
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << choice.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(CertificateError):
            load_certificate(saved)


def test_truncation_and_appended_bytes_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for cut in [0, 1, 4, 30, *range(50, len(content), 97)]:
        saved.write_bytes(content[:cut])
        with pytest.raises(CertificateError):
            load_certificate(saved)
    for extra in (b"\0", b"PK", content):
        saved.write_bytes(content + extra)
        with pytest.raises(CertificateError):
            load_certificate(saved)


def rewrite(path: Path, edit: Callable[[dict[str, bytes]], None]) -> None:
    """Write the file again with changed members, the zip itself in order."""
    with zipfile.ZipFile(path) as archive:
        parts = {i.filename: archive.read(i) for i in archive.infolist()}
    edit(parts)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(parts):
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, parts[name])
    path.write_bytes(buffer.getvalue())


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0))
    return buffer.getvalue()


def resealed(text: str) -> str:
    """The text with the seal of what it says, so that something else must betray it."""
    try:
        header = json.loads(text)
        old = header.pop("seal")
    except (ValueError, TypeError, RecursionError):
        return text
    return text.replace(old, hashlib.sha256(canonical_json(header).encode()).hexdigest())


def edit_text(path: Path, change: Callable[[str], str]) -> None:
    def edit(parts: dict[str, bytes]) -> None:
        text = bytes(np.load(io.BytesIO(parts["header.npy"]))).decode()
        changed = change(text)
        assert changed != text
        changed = resealed(changed)
        parts["header.npy"] = npy(np.frombuffer(changed.encode(), np.uint8))

    rewrite(path, edit)


# What makes a header ambiguous is in test_check.py, for both readers.
TEXTS = {
    "unknown schema": lambda t: t.replace('"schema":2', '"schema":3'),
    "schema as text": lambda t: t.replace('"schema":2', '"schema":"2"'),
    "another schema's keys": lambda t: t.replace('"schema":2', '"schema":1'),
    "level estimate": lambda t: t.replace('"level":"rigorous"', '"level":"estimate"'),
    "level probabilistic": lambda t: t.replace('"level":"rigorous"', '"level":"probabilistic"'),
    "semantics": lambda t: t.replace('"semantics":"ideal"', '"semantics":"executed"'),
    "norm": lambda t: t.replace('"norm":"l2"', '"norm":"linf"'),
    "fewer classes": lambda t: t.replace('"classes":3', '"classes":1'),
    "counts": lambda t: t.replace('"total":21', '"total":22'),
    "certified count": lambda t: t.replace('"certified":', '"certified":1'),
    "empty range": lambda t: t.replace(
        '["0x0.0p+0","0x1.0000000000000p+0"]', '["0x0.0p+0","0x0.0p+0"]'
    ),
    "infinite range": lambda t: t.replace('["0x0.0p+0"', '["-inf"'),
    "decimal float": lambda t: t.replace('["0x0.0p+0"', '["0.0"'),
    "shape": lambda t: t.replace('"input_shape":[4]', '"input_shape":[]'),
    "negative shape": lambda t: t.replace('"input_shape":[4]', '"input_shape":[-4]'),
}


@pytest.mark.parametrize("name", TEXTS)
def test_header_edits_are_refused(name: str, saved: Path) -> None:
    edit_text(saved, TEXTS[name])
    with pytest.raises(CertificateError):
        load_certificate(saved)


def test_array_edits_are_refused(saved: Path, certificate: Certificate) -> None:
    content = saved.read_bytes()
    bigger = certificate.prediction_radius * 2

    def swap(name: str, value: bytes) -> Callable[[dict[str, bytes]], None]:
        return lambda parts: parts.__setitem__(name, value)

    edits: list[Callable[[dict[str, bytes]], Any]] = [
        swap("prediction_radius.npy", npy(bigger)),
        swap("prediction_radius.npy", npy(bigger.astype(np.float32))),
        swap("prediction_radius.npy", npy(bigger[:-1])),
        swap("prediction_radius.npy", npy(np.array([None], dtype=object))),
        swap("extra.npy", npy(bigger)),
        swap("readme.txt", b"hello"),
        swap("header.npy", b"\x93NUMPY\x01\x00\xff\xff{"),
        swap("header.npy", npy(np.zeros((2, 2), np.uint8))),
        lambda parts: parts.pop("margin_lower.npy"),
        lambda parts: parts.pop("header.npy"),
        lambda parts: parts.pop("label.npy"),
    ]
    for edit in edits:
        saved.write_bytes(content)
        rewrite(saved, edit)
        with pytest.raises(CertificateError):
            load_certificate(saved)


def test_what_was_edited_is_named(saved: Path, certificate: Certificate) -> None:
    content, bigger = saved.read_bytes(), npy(certificate.prediction_radius * 2)
    rewrite(saved, lambda parts: parts.update({"prediction_radius.npy": bigger}))
    with pytest.raises(CertificateError, match="another hash of the array prediction_radius"):
        load_certificate(saved)
    saved.write_bytes(content)
    edit_text(saved, lambda t: t.replace('"schema":2', '"schema":2,"schema":2'))
    with pytest.raises(CertificateError, match="a key occurs twice"):
        load_certificate(saved)


def test_other_files_are_refused(tmp_path: Path) -> None:
    compressed = tmp_path / "compressed.npz"
    np.savez_compressed(compressed, header=np.zeros(10**7, np.uint8))
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, header=np.array([{"a": 1}], dtype=object))
    for path in (compressed, pickled, tmp_path / "absent.npz", tmp_path):
        with pytest.raises(CertificateError):
            load_certificate(path)


def test_saving_replaces_the_file_or_leaves_it(
    certificate: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = certificate.save(tmp_path / "c.npz")
    before = path.read_bytes()

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"half")
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"half")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]


# -- verification


def test_a_certificate_verifies(certificate: Certificate, network: nn.Module, data: Any) -> None:
    assert verify_certificate(certificate, network) == []
    assert verify_certificate(certificate, network, data) == []
    certificate.verify(network, data)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=4)
    assert verify_certificate(certificate, network, loader) == []


def test_looser_claims_verify(certificate: Certificate, network: nn.Module, data: Any) -> None:
    smaller = dataclasses.replace(certificate, prediction_radius=certificate.prediction_radius / 2)
    assert verify_certificate(smaller, network, data) == []


FORGERIES: dict[str, Callable[[Certificate], dict[str, Any]]] = {
    "radii": lambda c: {"prediction_radius": c.prediction_radius * (1 + 1e-6)},
    "one radius": lambda c: {
        "prediction_radius": np.where(np.arange(21) == 7, 9.0, c.prediction_radius)
    },
    "margins": lambda c: {"margin_lower": c.margin_lower * (1 + 1e-9)},
    "predictions": lambda c: {"prediction": (c.prediction + 1) % 3},
    "labels": lambda c: {"label": c.prediction},
    "features": lambda c: {"features": c.features * (1 - 1e-6)},
    "total": lambda c: {"total": c.total / 2},
    "an operator": lambda c: {"operators": tuple((n, m, x / 2) for n, m, x in c.operators)},
    "no operators": lambda c: {"operators": ()},
    "one more operator": lambda c: {"operators": (*c.operators, ("ghost", "cholesky", 1.0))},
    "fingerprint": lambda c: {"fingerprint": "0" * 64},
    "weights": lambda c: {"weights_sha256": "0" * 64},
    "head": lambda c: {"head_sha256": "0" * 64},
    "classes": lambda c: {"classes": 4},
}


@pytest.fixture
def prepared_once(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace and one bound for all forgeries: only the comparison is under test there."""
    key = "rigorous"
    if key not in PREPARED:
        PREPARED[key] = verification.prepare(
            network, SHAPE, (0.0, 1.0), level=lf.Level("rigorous"), method="auto"
        )
    monkeypatch.setattr(verification, "prepare", lambda *_, **__: PREPARED[key])


PREPARED: dict[str, Any] = {}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_fields_are_found(
    name: str, certificate: Certificate, network: nn.Module, data: Any, prepared_once: None
) -> None:
    forged = dataclasses.replace(certificate, **FORGERIES[name](certificate))
    assert verify_certificate(forged, network, data) != []
    with pytest.raises(CertificateError, match="verify"):
        forged.verify(network, data)


def test_other_weights_data_and_networks_are_found(
    certificate: Certificate, network: nn.Module, data: Any
) -> None:
    x, y = data
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    assert "weights" in verify_certificate(certificate, other, data)[0]
    other.load_state_dict(network.state_dict())
    assert verify_certificate(certificate, other, data) == []
    with torch.no_grad():
        other[0].weight[0, 0] = torch.nextafter(other[0].weight[0, 0], torch.tensor(9.0))
    assert "weights" in verify_certificate(certificate, other, data)[0]
    assert verify_certificate(certificate, network, (x[:-1], y[:-1])) != []
    assert verify_certificate(certificate, network, (x.flip(0), y.flip(0))) != []
    # The same weights under another forward.
    twisted = nn.Sequential(network[0], nn.Tanh(), network[2]).eval()
    assert any("fingerprint" in f for f in verify_certificate(certificate, twisted, data))


def test_verification_of_a_training_model_is_refused(
    certificate: Certificate, network: nn.Module
) -> None:
    network.train()
    try:
        with pytest.raises(LmtfastError):
            certificate.verify(network)
    finally:
        network.eval()


def test_plot(certificate: Certificate, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = certificate.plot(tmp_path / "curve.png")
    assert Path(path).stat().st_size > 1000
