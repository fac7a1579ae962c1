# SPDX-License-Identifier: MIT
"""Mutations that know a file's structure, so that they get past its hashes and seals."""

from __future__ import annotations

import functools
import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from lmtfast import check
from tests.test_check_tampering import encoded, packed, parts_of_bytes, recounted

Choice = random.Random
DEEP = "[" * 3000 + "]" * 3000
# Literals that two JSON readers may understand differently, and values of other kinds.
LITERALS = (
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e5", "1.0", "-0", "-0.0", "00", "01",
    "+1", "0x10", "true", "null", "9" * 30, "9" * 5000, "-1", "[]", "{}", '""', '"\\ud800"',
    '"\\u0000"', '"0x1p+2000"', '"NaN"', '"nan"', '"inf"', '"1e400"', "[[]]", '{"a":1,"a":2}', DEEP,
    "'x'", "\\u0031", '"\x01"', "1_000", "0b1", ".5", "5.", "1E400", "\ufeff1", "[1,]", "//",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 255, 2**31, 2**63, 2**64, 10**30, 0.5, "", "x", "nan", "inf",
    "0x0.0p+0", "-0x0.0p+0", "0x1.0000000000000p+0", "0x1p0", "0X1P0", "-inf", "0x1p+2000", "1e400",
    "0" * 64, "g" * 64, "é", "\ud800", "none", "rigorous", "estimate", "os:system", [], {}, [[]],
    [1], [0, 0], ["a", "b", "c"], {"a": 1}, [None] * 3, {"array": "w"}, "x" * 1000,
)  # fmt: skip
NUMBERS = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e308, np.nan, np.inf, -np.inf)
NPY_HEADERS = (
    "{'descr': '<f8', 'fortran_order': False, 'shape': (3L,), }", "{'descr': (", "(" * 500, "'''",
    "{'descr': '<f8'*3, 'fortran_order': False, 'shape': (1,), }", "\x00", "{[]: 1}",
    "{'descr': ',', 'fortran_order': False, 'shape': (1,), }", "  {\n 'a'\n 'b'",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "{'descr': '\\d'}",
    "{'descr': '<f8', 'fortran_order': True, 'shape': (3,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (-3,), }",
    "{'descr': '|V99999999999', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (3,), }", "-" * 9000,
    "__import__('os').abort()",
)  # fmt: skip


def bytes_edited(content: bytes, choice: Choice) -> bytes:
    """Bits flipped, and pieces removed, repeated, or overwritten."""
    found = bytearray(content)
    for _ in range(choice.choice((1, 1, 2, 8))):
        size, kind = len(found), choice.randrange(6)
        at = choice.randrange(size + 1)
        end = min(size, at + choice.choice((1, 2, 4, 8, 40, 400)))
        if kind == 0 and size:
            found[min(at, size - 1)] ^= 1 << choice.randrange(8)
        elif kind == 1:
            found[at:end] = choice.randbytes(end - at)
        elif kind == 2:
            del found[at:end]
        elif kind == 3:
            found[at:at] = found[at:end]
        elif kind == 4:
            value = choice.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, size))
            found[at : at + 8] = value.to_bytes(8, "little")
        elif choice.random() < 0.2:
            del found[at:]
    return bytes(found)


def leaves(item: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value, as a container and a key."""
    keys: Any = range(len(item)) if isinstance(item, list) else sorted(item)
    found = [(item, key) for key in keys]
    for key in keys:
        if isinstance(item[key], (list, dict)):
            found += leaves(item[key])
    return found


def field_edited(header: Any, choice: Choice) -> None:
    """One value replaced, removed, repeated, or put under another name."""
    item, key = choice.choice(leaves(header))
    kind = choice.randrange(6)
    if kind == 0:
        del item[key]
    elif kind == 1 and isinstance(item, list):
        item.insert(key, item[key])
    elif kind == 1:
        item[choice.choice(("x", f"{key}2", ""))] = item[key]
    elif kind == 2 and isinstance(item[key], int):
        item[key] += choice.choice((-2, -1, 1, 2))
    else:
        item[key] = choice.choice(VALUES)


def text_edited(text: str, choice: Choice) -> str:
    """JSON text that another reader may understand, or understand differently."""
    kind = choice.randrange(7)
    if kind == 0:  # a key twice
        at = choice.choice([i for i, c in enumerate(text) if c == "{"])
        return f'{text[: at + 1]}"{choice.choice(("schema", "a", "level"))}":0,{text[at + 1 :]}'
    marks = [i for i, c in enumerate(text) if c in ',:[]{}"']
    at = choice.choice(marks)
    if kind == 1:
        return (
            text[:at] + choice.choice((" ", "\n", "\t", "\r", "\f", "\ufeff", "/**/")) + text[at:]
        )
    if kind == 2:
        return text[: at + 1] + choice.choice(LITERALS) + text[at + 1 :]
    if kind == 3:  # a value becomes a literal
        ends = [i for i, c in enumerate(text) if c == ":"]
        at = choice.choice(ends) + 1
        end = min(i for i in (text.find(c, at) for c in ",}") if i >= 0)
        return text[:at] + choice.choice(LITERALS) + text[end:]
    if kind == 4:  # a letter becomes an escape
        letters = [i for i, c in enumerate(text) if c.isalpha()]
        at = choice.choice(letters)
        return f"{text[:at]}\\u{ord(text[at]):04x}{text[at + 1 :]}"
    if kind == 5:
        return choice.choice(("[" + text + "]", text + text, text + "\n", "\ufeff" + text, DEEP))
    return text[:at] + text[at + 1 :]


def array_edited(array: np.ndarray, choice: Choice) -> np.ndarray:
    """Another value, length, dtype or shape."""
    kind, array = choice.randrange(6), array.copy()
    if kind <= 2 and array.size:
        value: Any = choice.choice(NUMBERS if array.dtype.kind == "f" else (-1, 0, 1, 2, 2**62))
        array.reshape(-1)[choice.randrange(array.size)] = value
    elif kind == 3:
        array = array[:-1] if choice.random() < 0.5 else np.append(array, array[:1])
    elif kind == 4:
        array = array.astype(choice.choice(("<f4", ">f8", "<i4", "|u1", "<c16", "|b1")))
    else:
        array = array.reshape(choice.choice(((-1, 1), (1, -1))))
    return array


def resealed(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """Canonical text with hashes and, where the schema has one, a seal that fit."""
    header["arrays"] = {n: check.sha256(encoded(a)) for n, a in arrays.items()}
    if "seal" in header:
        del header["seal"]
        header["seal"] = check.sha256(check.canonical(header))
    return check.canonical(header)


def zip_edited(content: bytes, choice: Choice) -> bytes:
    """The same members in an archive that is not the one the library writes."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(i.filename, archive.read(i)) for i in archive.infolist()]
    kind, at = choice.randrange(9), choice.randrange(len(parts))
    name, data = parts[at]
    if kind == 0:
        choice.shuffle(parts)
    elif kind == 1:
        other = choice.choice(("extra.npy", "../header.npy", "header", "/etc/x.npy", "é.npy", ""))
        parts.append((choice.choice((name, other)), data))
    elif kind == 2:
        del parts[at]
    elif kind == 3:
        parts[at] = (name, data[: choice.randrange(len(data) + 1)])
    elif kind == 4:
        text = choice.choice(NPY_HEADERS).encode("latin1")
        version = choice.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\xff\xff"))
        size = struct.pack("<H" if version[:1] == b"\x01" else "<I", len(text))
        parts[at] = (name, b"\x93NUMPY" + version + size + text + data[128:])
    elif kind == 5:
        parts[at] = (name, data[:128] + data[128:] * 2)
    pressed = choice.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    buffer = io.BytesIO()
    buffer.write(b"junk" * (kind == 6))
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(buffer, "a" if kind == 6 else "w") as archive,
    ):
        warnings.simplefilter("ignore")  # a name twice is meant
        for name, data in parts:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, 0o644 << 16
            info.extra = b"\x01\x00\x08\x00" + b"\xff" * 8 if kind == 7 else b""
            info.compress_type = pressed if kind == 8 else zipfile.ZIP_STORED
            archive.comment = b"x" * (kind == 7)
            archive.writestr(info, data)
    return buffer.getvalue()


@functools.lru_cache(128)
def parts(content: bytes) -> tuple[str, dict[str, np.ndarray]]:
    """Canonical header and arrays of a certificate; mutants of one parent share the work."""
    header, arrays = parts_of_bytes(content)
    return check.canonical(header), arrays


def certificate_edited(content: bytes, choice: Choice) -> bytes:
    """A certificate file with one or several edits, mostly sealed again."""
    kind = choice.randrange(10)
    if kind < 3:
        return bytes_edited(content, choice)
    if kind < 5:
        return zip_edited(content, choice)
    text, stored = parts(content)
    header, arrays = json.loads(text), dict(stored)
    if kind < 7:
        text = text_edited(text, choice)
    else:
        for _ in range(choice.choice((1, 1, 2, 4))):
            if choice.random() < 0.6:
                field_edited(header, choice)
            else:
                name = choice.choice(sorted(arrays))
                arrays[name] = array_edited(arrays[name], choice)
        if choice.random() < 0.7 and "label" in arrays:
            recounted((header, arrays))
        text = resealed(header, arrays)
    content = packed(text, arrays)
    return bytes_edited(content, choice) if choice.random() < 0.05 else content


def safetensors_parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def safetensors_packed(text: str, data: bytes, length: int | None = None) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def checkpoint_edited(
    content: bytes, choice: Choice, checksum: Callable[[str, bytes], str]
) -> bytes:
    """A checkpoint with edits of its header, its tensors' header or its bytes.

    ``checksum`` gives the checksum of a text and the tensors of a file.
    """
    kind = choice.randrange(10)
    if kind < 2:
        return bytes_edited(content, choice)
    outer, data = safetensors_parts(content)
    meta = outer["__metadata__"]
    if kind < 5:
        header = json.loads(meta["lmtfast"])
        for _ in range(choice.choice((1, 1, 2))):
            field_edited(header, choice)
        meta["lmtfast"] = json.dumps(header, sort_keys=True)
    elif kind == 5:
        meta["lmtfast"] = text_edited(meta["lmtfast"], choice)
    elif kind == 6:
        field_edited(outer, choice)
    elif kind == 7:  # a tensor under another name, of another shape or dtype
        name = choice.choice([n for n in outer if n != "__metadata__"])
        entry = outer[name]
        entry["dtype"] = choice.choice(("F32", "F64", "I32", "U8", "BF16", "BOOL", "C64"))
        entry["shape"] = choice.choice((entry["shape"], entry["shape"][::-1], [], [0], [-1]))
    elif kind == 8:
        length = choice.choice((None, None, 0, 7, 2**31, 2**63, 2**64 - 1))
        return safetensors_packed(text_edited(json.dumps(outer), choice), data, length)
    else:
        data = bytes_edited(data, choice)
    content = safetensors_packed(json.dumps(outer), data)
    outer["__metadata__"]["sha256"] = checksum(meta["lmtfast"], content)
    return safetensors_packed(json.dumps(outer), data)


def toml_edited(content: bytes, choice: Choice) -> bytes:
    """TOML with values, keys and tables exchanged."""
    if choice.random() < 0.3:
        return bytes_edited(content, choice)
    lines = content.decode("utf-8", "replace").splitlines() or [""]
    odd = (
        "1e400", "nan", "-inf", "9" * 400, "9" * 5000, "0x" + "f" * 300, "2024-01-01", "07:32:00",
        "1979-05-27T07:32:00Z", "[" * 2000, "{a=" * 900, '"x"', "'''", "true", "-1", "0", "1e308",
        "[1, 2, 1]", "[[1], [2]]", "[0.0, 1.0]", "{}", '"\\ud800"', '"os:system"', "1_000", "[nan]",
        "18446744073709551616", "9223372036854775807", "[inf, inf]", "5e-324", '"symbol"', '"log"',
    )  # fmt: skip
    keys = (
        "epochs", "lr", "lr_factor", "lr_milestones", "eps", "eps_schedule", "eps_ramp_epochs",
        "seed", "model", "model_options", "input_range", "certify_radii", "method", "momentum",
        "a.b", "eps_start", "engine", "device", "x" * 50, ".".join("a" * 300),
    )  # fmt: skip
    for _ in range(choice.choice((1, 1, 2, 4))):
        at = choice.randrange(len(lines))
        kind = choice.randrange(6)
        if kind == 0:
            del lines[at]
            lines = lines or [""]
        elif kind == 1:
            lines.insert(at, choice.choice(("[model_options]", "[[a]]", "[a.b]", "#", "\x00")))
        elif kind == 2:
            lines[at] = f"{lines[at].partition('=')[0]}= {choice.choice(odd)}"
        else:
            lines.insert(at, f"{choice.choice(keys)} = {choice.choice(odd)}")
    return "\n".join(lines).encode("utf-8", "surrogatepass")
