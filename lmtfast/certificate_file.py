# SPDX-License-Identifier: MIT
"""The bytes of a certificate file: a zip of npy arrays (``.npz``) and one canonical JSON header.

One certificate has exactly one byte string. The loader parses strictly, checks hashes and counts,
and then compares the file with what the parsed certificate would be written as. Schema 2 adds the
enclosed logits and the network's description, so that a checker can judge it; files of schema 1
load as they always did.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lmtfast.level import Level
from lmtfast.profiles import IDEAL, SEMANTICS

if TYPE_CHECKING:
    from lmtfast.certificate import Certificate

HEADER = "header"
DTYPES = {
    "label": "<i8", "logit_error": "<f8", "logits": "<f8", "margin_lower": "<f8",
    "prediction": "<i8", "prediction_radius": "<f8",
}  # fmt: skip
OPTIONAL = {1: {"label", "logit_error", "logits"}, 2: {"label"}}
FLOATS = ("delta", "features", "slack", "total")
STRINGS = (
    "fingerprint", "head_sha256", "level", "method", "norm", "requested_method", "semantics",
    "weights_sha256",
)  # fmt: skip
OTHERS = ("assumptions", "classes", "input_range", "input_shape", "operators", "versions")
KEYS = {"arrays", "counts", "schema", *FLOATS, *STRINGS, *OTHERS}
KEYS_OF = {1: KEYS, 2: {*KEYS, "network", "program_sha256", "seal"}}
MAX_HEADER_BYTES = 1 << 26


def canonical_json(item: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces, ASCII."""
    return json.dumps(item, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def fingerprint(program_sha256: str, network: str, weights_sha256: str) -> str:
    """What names a certified network: its program, its description and its weights."""
    identity = canonical_json([program_sha256, json.loads(network), weights_sha256])
    return hashlib.sha256(identity.encode("ascii")).hexdigest()


def encode(certificate: Certificate) -> bytes:
    """The file of a certificate."""
    arrays = {}
    for name in DTYPES:
        if (array := getattr(certificate, name)) is not None:
            arrays[name] = _npy(array.astype(DTYPES[name]).reshape(-1))
    header: dict[str, Any] = {
        "arrays": {n: hashlib.sha256(b).hexdigest() for n, b in arrays.items()},
        "assumptions": list(certificate.assumptions),
        "classes": certificate.classes,
        "counts": certificate.counts,
        "input_range": [x.hex() for x in certificate.input_range],
        "input_shape": list(certificate.input_shape),
        "operators": [[n, m, x.hex()] for n, m, x in certificate.operators],
        "schema": certificate.schema,
        "versions": dict(certificate.versions),
        **{k: getattr(certificate, k).hex() for k in FLOATS},
        **{k: getattr(certificate, k) for k in STRINGS},
    }
    if certificate.network is not None:
        header["network"] = json.loads(certificate.network)
        header["program_sha256"] = certificate.program_sha256
        header["seal"] = _sha256(canonical_json(header))
    text = canonical_json(header)
    arrays[HEADER] = _npy(np.frombuffer(text.encode("ascii"), dtype=np.uint8))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            info = zipfile.ZipInfo(f"{name}.npy")
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, arrays[name])
    return buffer.getvalue()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(
        buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False
    )
    return buffer.getvalue()


def decode(content: bytes) -> dict[str, Any]:
    """Fields of the certificate in a file; ValueError or KeyError for anything out of order."""
    parts = _members(content)
    text = bytes(_array(parts[HEADER], "|u1"))
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError("a header of more than 64 MiB")
    header = json.loads(
        text.decode("ascii"), object_pairs_hook=unique, parse_float=_no_float,
        parse_constant=_no_float,
    )  # fmt: skip
    schema = header.get("schema") if isinstance(header, dict) else None
    if type(schema) is not int or schema not in KEYS_OF:
        raise ValueError(f"a schema other than {sorted(KEYS_OF)}")
    if set(header) != KEYS_OF[schema]:
        raise ValueError(f"header keys {sorted(set(header) ^ KEYS_OF[schema])}")
    names = set(parts) - {HEADER}
    hashes = header["arrays"]
    if set(hashes) != names or not set(DTYPES) - OPTIONAL[schema] <= names <= set(DTYPES):
        raise ValueError(f"arrays {sorted(names)}")
    for name in names:
        if hashlib.sha256(parts[name]).hexdigest() != hashes[name]:
            raise ValueError(f"another hash of the array {name}")
    found: dict[str, Any] = {n: _array(parts[n], DTYPES[n]) for n in names}
    for name in OPTIONAL[schema]:
        found.setdefault(name, None)
    found.update({k: _float(header[k]) for k in FLOATS})
    found.update({k: _kind(header[k], str) for k in STRINGS})
    found["level"] = Level(found["level"], found.pop("delta"))
    found["assumptions"] = tuple(_kind(a, str) for a in _kind(header["assumptions"], list))
    found["classes"] = _kind(header["classes"], int)
    found["input_range"] = tuple(_float(x) for x in _kind(header["input_range"], list))
    found["input_shape"] = tuple(_kind(n, int) for n in _kind(header["input_shape"], list))
    found["operators"] = tuple(
        (_kind(n, str), _kind(m, str), _float(x)) for n, m, x in _kind(header["operators"], list)
    )
    found["versions"] = {k: _kind(v, str) for k, v in _kind(header["versions"], dict).items()}
    found["network"] = found["program_sha256"] = None
    if schema == 2:
        _check_sealed(header)
        found["network"] = canonical_json(_kind(header["network"], dict))
        found["program_sha256"] = _kind(header["program_sha256"], str)
    _check(found)
    if found["logits"] is not None:
        found["logits"] = found["logits"].reshape(-1, found["classes"])
    return found


def _check_sealed(header: Mapping[str, Any]) -> None:
    """Refuse a header whose seal or fingerprint is not its own."""
    rest = {k: v for k, v in header.items() if k != "seal"}
    if header["seal"] != _sha256(canonical_json(rest)):
        raise ValueError("another seal than the header's")
    parts = (header["program_sha256"], canonical_json(header["network"]), header["weights_sha256"])
    if header["fingerprint"] != fingerprint(*parts):
        raise ValueError("another fingerprint than the network's")


def _members(content: bytes) -> dict[str, bytes]:
    """Stored members of the archive by array name."""
    parts: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name in parts or name not in {*DTYPES, HEADER} or info.filename == name:
                    raise ValueError(f"an unexpected or repeated member {info.filename!r}")
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(content):
                    raise ValueError(f"a compressed member {info.filename!r}")
                parts[name] = archive.read(info)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, OSError) as error:
        raise ValueError(f"not a whole zip file: {error}") from error
    return parts


def _array(data: bytes, dtype: str) -> np.ndarray:
    """A vector, whose npy header is compared and never parsed."""
    array = np.frombuffer(data[10 + int.from_bytes(data[8:10], "little") :], dtype=dtype)
    if _npy(array) != data:
        raise ValueError(f"another npy header than that of {len(array)} numbers of dtype {dtype}")
    return array


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for json.loads that refuses what two readers may understand differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_float(text: str) -> Any:
    raise ValueError(f"the number {text}: floats are written in hexadecimal")


def _kind(item: Any, kind: type) -> Any:
    if type(item) is not kind:
        raise ValueError(f"{type(item).__name__} in place of {kind.__name__}")
    return item


def _float(item: Any) -> float:
    value = float.fromhex(_kind(item, str))
    if value.hex() != item:
        raise ValueError(f"the number {item!r} in another than its canonical form")
    return value


def _check(found: Mapping[str, Any]) -> None:
    """Refuse fields that contradict each other."""
    radius, margin, prediction = (
        found[k] for k in ("prediction_radius", "margin_lower", "prediction")
    )
    arrays = [found[k] for k in DTYPES if found[k] is not None and k != "logits"]
    described = found["network"] is not None
    low, high = found["input_range"]
    rules = {
        "arrays of different lengths": len({len(a) for a in arrays}) == 1,
        "a level that certifies nothing": found["level"] != "estimate",
        "unknown semantics or norm": found["semantics"] in SEMANTICS and found["norm"] == "l2",
        "semantics without the calls they speak of": (
            (found["semantics"] != IDEAL) == ("executed" in json.loads(found["network"] or "{}"))
        ),
        "no classes": found["classes"] >= 1,
        "an input shape": bool(found["input_shape"]) and min(found["input_shape"], default=0) > 0,
        "an input range": math.isfinite(low) and math.isfinite(high) and low < high,
        "a negative or undefined bound": all(
            x >= 0 for x in (found["features"], found["total"], *(o[2] for o in found["operators"]))
        ),
        "a prediction that is no class": bool(
            ((prediction >= 0) & (prediction < found["classes"])).all()
        ),
        "a radius that is negative or undefined": bool((radius >= 0).all()),
        "a margin that is negative or undefined": bool((margin >= 0).all()),
        "a radius without a margin": bool((margin[radius > 0] > 0).all()),
        "a hash": all(_is_hash(found[k]) for k in ("fingerprint", "weights_sha256")),
        "a hash of the head": found["head_sha256"] == "none" or _is_hash(found["head_sha256"]),
    }
    if described != (found["logits"] is not None) or described != (
        found["logit_error"] is not None
    ):
        rules["logits without a network, or a network without logits"] = False
    elif described:
        rules["logits of another number"] = len(found["logits"]) == len(radius) * found["classes"]
        rules["logits or errors that are NaN"] = not bool(
            np.isnan(found["logits"]).any() or not (found["logit_error"] >= 0).all()
        )
    if found["label"] is not None:
        label = found["label"]
        inside = bool(((label >= 0) & (label < found["classes"])).all())
        rules["a label that is no class"] = inside
    if wrong := [name for name, holds in rules.items() if not holds]:
        raise ValueError("; ".join(wrong))


def _is_hash(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
