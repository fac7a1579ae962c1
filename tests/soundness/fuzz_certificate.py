# SPDX-License-Identifier: MIT
"""Fuzz targets: the two readers of certificates, and the checker's reader of weights.

Any bytes give a whole certificate or a CertificateError; what is accepted encodes to the same
bytes; what the checker accepts the library loads, and what the library loads the checker reads.
"""

from __future__ import annotations

import functools
import io
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lmtfast as lf
from lmtfast import check
from lmtfast.certificate import load_certificate
from lmtfast.certificate_file import canonical_json, encode
from lmtfast.description import save_weights
from lmtfast.errors import CertificateError
from tests.soundness.fuzzing import FAULTS, Target, judged
from tests.soundness.mutation import (
    certificate_edited,
    resealed,
    safetensors_packed,
    safetensors_parts,
    text_edited,
    zip_edited,
)
from tests.test_check_tampering import packed

SHAPE = (2,)


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Where inputs are put; removed with the process."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


def put(content: bytes, name: str) -> Path:
    path = Path(folder().name) / name
    path.write_bytes(content)
    return path


@functools.cache
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()


@functools.cache
def certificates() -> tuple[bytes, ...]:
    """With labels, without, without inputs, and of schema 1."""
    x = torch.tensor([[0.1, 0.9], [0.7, 0.2], [0.5, 0.5]])
    y = torch.tensor([0, 1, 1])
    made = [
        lf.certify(network(), data, input_shape=SHAPE, input_range=(0, 1))
        for data in ((x, y), x, (x[:0], y[:0]))
    ]
    old = dict.fromkeys(("logit_error", "logits", "network", "program_sha256"))
    fields = {f: getattr(made[0], f) for f in made[0].__dataclass_fields__}
    return (*(encode(c) for c in made), encode(lf.Certificate(**{**fields, **old})))


@functools.cache
def weights() -> Path:
    return save_weights(network(), Path(folder().name) / "weights.npz", input_shape=SHAPE)


def second_reader(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What the checker reads, or None if it refuses."""
    try:
        return check.read_certificate(content)
    # The checker has one handler for whatever a file makes its parsers raise.
    except Exception as error:
        if isinstance(error, FAULTS):
            raise
        return None


def without_remarks(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """The same certificate where what claims nothing, and the checker does not read, is in order.

    If it then loads, the two readers differed in remarks alone.
    """
    rows = [[name, "any", norm] for name, _, norm in header["operators"]]
    remarks = {"slack": "nan", "head_sha256": "none", "versions": {}, "seal": "", "operators": rows}
    remarks |= {"assumptions": header["assumptions"][:5], "method": "any"}
    header = {**header, **remarks, "requested_method": "any"}
    return packed(resealed(header, arrays), arrays)


def judge_certificate(content: bytes) -> bool:
    path = put(content, "certificate.npz")
    read = second_reader(content)
    try:
        certificate = load_certificate(path)
    except CertificateError as error:
        judged(error)
        if read is not None and check.check(path, weights()) == []:
            load_certificate(put(without_remarks(*read), "certificate.npz"))
        return False
    assert encode(certificate) == content
    if certificate.schema == 1:
        assert read is None
        return True
    assert read is not None, "the library loads what the checker cannot read"
    header, arrays = read
    assert canonical_json(header["network"]) == certificate.network
    for name, array in arrays.items():
        stored = getattr(certificate, name)
        assert stored is not None
        assert array.tobytes() == stored.tobytes()
    for name in ("level", "norm", "semantics", "classes", "weights_sha256", "fingerprint"):
        assert header[name] == getattr(certificate, name)
    for name in ("features", "total", "delta"):
        assert float.fromhex(header[name]) == getattr(certificate, name)
    return True


def judge_weights(content: bytes) -> bool:
    path = put(content, "any.npz")
    try:
        found = check.read_weights(path)
    except Exception as error:
        if isinstance(error, FAULTS):
            raise
        return False
    # float64 takes at most four times what a half takes, and nothing is read twice.
    assert sum(a.nbytes for a in found.values()) <= 8 * len(content)
    return True


def weight_files() -> list[bytes]:
    arrays = {"a": np.ones((2, 3)), "b": np.ones(2, "<f4"), "c": np.arange(3)}
    np.savez(buffer := io.BytesIO(), **arrays)
    entries, data = {}, b""
    for name, (dtype, array) in zip(("F64", "F32", "I64"), arrays.items(), strict=True):
        span = [len(data), len(data) + array.nbytes]
        entries[f"model/{dtype}"] = {
            "dtype": name, "shape": list(array.shape), "data_offsets": span,
        }  # fmt: skip
        data += array.tobytes()
    return [buffer.getvalue(), safetensors_packed(json.dumps(entries), data)]


def weights_edited(content: bytes, choice: random.Random) -> bytes:
    if content[:2] == b"PK":
        return zip_edited(content, choice)
    outer, data = safetensors_parts(content)
    return safetensors_packed(text_edited(json.dumps(outer), choice), data)


TARGETS = {
    "certificate": Target(
        lambda: list(certificates()), certificate_edited, judge_certificate,
        ("lmtfast.certificate_file", "lmtfast.certificate", "lmtfast.check"),
    ),
    "weights": Target(weight_files, weights_edited, judge_weights, ("lmtfast.check",)),
}  # fmt: skip
