# SPDX-License-Identifier: MIT
"""Certificates made by hand: honest ones are accepted, those with one number a hair off are not.

Forgers seal again and name the network that the file now describes.
"""

from __future__ import annotations

import io
import json
import math
import runpy
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtfast import check
from tests.soundness.certificates import (
    FEATURES,
    FIRST,
    HAIR,
    HEAD,
    INF,
    ONE,
    TOTAL,
    ZERO,
    Arrays,
    Header,
    honest,
    linear,
    signed,
    weights_of,
)
from tests.test_check_tampering import encoded, packed, sealed

Edit = Callable[[Header, Arrays, Arrays], Any]


def found(folder: Path, edit: Edit | None = None, keep: bool = False) -> list[str]:
    """Kinds and places of what the checker finds; ``keep`` leaves the honest fingerprint."""
    header, arrays, weights = honest()
    name = signed(header)["fingerprint"]
    if edit is not None:
        edit(header, arrays, weights)
    header = header | {"fingerprint": name} if keep else signed(header)
    (folder / "c.npz").write_bytes(sealed(header, arrays))
    np.savez(folder / "w.npz", **weights)
    return [f"{f.kind} {f.where}" for f in check.check(folder / "c.npz", folder / "w.npz")]


def put(*path: Any) -> Edit:
    """Puts the last item into the header, where the others lead."""
    *steps, last, item = path

    def edit(header: Header, *_: Arrays) -> None:
        place: Any = header
        for step in steps:
            place = place[step]
        place[last] = item

    return edit


def array(name: str, i: int, value: float) -> Edit:
    return lambda header, arrays, _: arrays[name].__setitem__(i, value)


def raised(name: str, i: int) -> Edit:
    def edit(_: Header, arrays: Arrays, __: Arrays) -> None:
        arrays[name][i] *= 1.0 + 2.0**-38

    return edit


def both(*edits: Edit) -> Edit:
    return lambda *parts: [edit(*parts) for edit in edits]


def counts(**changes: int) -> Edit:
    return lambda header, *_: header["counts"].update(changes)


def unlabelled(header: Header, arrays: Arrays, _: Arrays) -> None:
    del arrays["label"], header["counts"]["correct"]
    header["counts"] |= {"certified": 3, "refused": 1}


def no_head(scale: float) -> Edit:
    """Without a head rows count as sqrt(2) apart and the whole constant holds."""

    def edit(header: Header, arrays: Arrays, _: Arrays) -> None:
        header["network"]["head"] = None
        gaps = np.array([1.0, 1.75, 1.5, 0.0])
        arrays["prediction_radius"] = gaps / (math.sqrt(2.0) * TOTAL) * scale

    return edit


def no_operators(header: Header, arrays: Arrays, weights: Arrays) -> None:
    """A network that is constant: nothing moves its logits."""
    weights.clear()
    network = header["network"]
    network |= {"operators": [], "tape": [["constant", ZERO]], "features": 0, "total": 0}
    network |= {"head": None, "weights": {}}
    header |= {"operators": [], "features": ZERO, "total": ZERO}
    arrays["prediction_radius"] = np.array([INF, INF, INF, 0.0])
    header["counts"]["constant"] = 3


def single(header: Header, arrays: Arrays, weights: Arrays) -> None:
    """One class: nothing can be predicted instead, whatever moves."""
    weights["head"] = HEAD[1:2]
    weights_of(header, weights)
    header["classes"], header["network"]["operators"][1] = 1, linear("head", 1, 4)
    zeros = np.zeros(4)
    arrays |= {"logits": zeros, "prediction": zeros.astype("<i8"), "label": zeros.astype("<i8")}
    arrays |= {"margin_lower": zeros + INF, "prediction_radius": zeros + INF}
    header["counts"] |= {"certified": 4, "constant": 4, "correct": 4, "refused": 0}


def extra(header: Header, arrays: Arrays, weights: Arrays) -> None:
    weights["none of the network's"] = np.ones(3)


def opposite(distance: float) -> Edit:
    """Rows 4 apart whose absolute values are equal; the first radius as for that distance."""

    def edit(header: Header, arrays: Arrays, weights: Arrays) -> None:
        weights["head"] = np.array([[2.0, 0, 0, 0], [-2.0, 0, 0, 0], [0, 0, 0, 0]])
        weights_of(header, weights)
        radius = np.array([1.0 / distance, 1.75 / 2.0, 1.5 / 2.0, 0.0]) / FEATURES
        arrays["prediction_radius"] = radius * [1.0, *[1.0 - 2.0**-40] * 3]

    return edit


ACCEPTED: dict[str, Edit | None] = {
    "honest": None, "without labels": unlabelled, "without a head": no_head(1.0 - 2.0**-40),
    "without operators": no_operators, "one class": single, "other arrays": extra,
    "probabilistic": both(put("level", "probabilistic"), put("delta", (2.0**-30).hex())),
    "likely to fail": both(put("level", "probabilistic"), put("delta", HAIR.hex())),
    "more assumptions": lambda header, *_: header["assumptions"].append("A7: more"),
    "larger constants": both(put("operators", 1, 2, (4.5).hex()), put("total", (9.5).hex())),
    "equal constants": put("features", FEATURES.hex()),
    "infinite constants": both(
        put("operators", 0, 2, "inf"), put("features", "inf"), put("total", "inf"),
        lambda _, arrays, __: arrays["prediction_radius"].fill(0.0), counts(certified=0, refused=4),
    ),
    "rows on both sides": opposite(4.0 * (1.0 + 2.0**-40)),
    "logits that are not known": array("logit_error", 3, INF),
    "a negative range": put("input_range", ["-0x1.0000000000000p+0", ZERO]),
    "no inputs": lambda header, arrays, _: (
        arrays.update({n: a[:0] for n, a in arrays.items()}),
        header["counts"].update(dict.fromkeys(header["counts"], 0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_honest_certificates_are_accepted(name: str, tmp_path: Path) -> None:
    assert found(tmp_path, ACCEPTED[name]) == []


def less(*path: Any) -> Edit:
    """The float below a float of the header."""

    def edit(header: Header, *_: Arrays) -> None:
        place: Any = header
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = math.nextafter(float.fromhex(place[path[-1]]), -INF).hex()

    return edit


def weight(change: Callable[[Arrays], Any], named: bool = False) -> Edit:
    """Changes weights; ``named``: the description names the changed ones."""

    def edit(header: Header, _: Arrays, weights: Arrays) -> None:
        change(weights)
        if named:
            weights_of(header, weights)

    return edit


def convolved(header: Header, _: Arrays, weights: Arrays) -> None:
    """The head as a convolution of one place and one tap, which has a norm but no rows."""
    region = header["network"]["operators"][1]
    region["nodes"][0] |= {
        "op": "conv", "in": [4, 1], "out": [3, 1], "kernel": [1], "stride": [1], "groups": 1,
        "padding": [[0, 0]], "dilation": [1], "centre": [0],
    }  # fmt: skip


def zero_weight(header: Header, _: Arrays, weights: Arrays) -> None:
    weights_of(header, weights | {"zero": np.zeros(1)})


def probability(level: str, delta: float) -> Edit:
    return both(put("level", level), put("delta", delta.hex()))


SAMPLES = {
    **{f"radius {i}": ("radii", raised("prediction_radius", i)) for i in range(3)},
    "radius of no margin": ("radii", array("prediction_radius", 3, 5e-324)),
    **{f"margin {i}": ("margins", raised("margin_lower", i)) for i in range(3)},
    "a negative margin": ("margins", array("margin_lower", 3, -0.5)),
    "radius of rows on both sides": ("radii", opposite(4.0 * (1.0 - 2.0**-38))),
    "margin 3": ("margins", array("margin_lower", 3, 5e-324)),
    "prediction": ("predictions", array("prediction", 3, 1)),
    "certified": ("counts", counts(certified=3)), "constant": ("counts", counts(constant=1)),
    "correct": ("counts", counts(correct=4)), "refused": ("counts", counts(refused=1)),
    "total": ("counts", counts(total=5)), "more counts": ("counts", counts(more=0)),
    "radii without a head": ("radii", no_head(1.0 + 2.0**-38)),
    "features that are assumed smaller": ("radii", put("features", (4.0).hex())),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_claims_on_inputs_that_are_a_hair_too_large_are_refused(name: str, tmp_path: Path) -> None:
    where, edit = SAMPLES[name]
    assert found(tmp_path, edit) == [f"claim {where}".replace("claim counts", "file counts")]


E = "file header"
HEADERS: dict[str, tuple[list[str], Edit]] = {
    "rigorous, but a probability": ([E], probability("rigorous", 2.0**-1074)),
    "probabilistic, but certain": ([E], probability("probabilistic", 0.0)),
    "sure to fail": ([E], probability("probabilistic", 1.0)),
    "a negative probability": ([E], probability("probabilistic", -(2.0**-30))),
    "an infinite probability": ([E], probability("probabilistic", INF)),
    "another level": ([E], put("level", "estimated")),
    "another norm": ([E], put("norm", "linf")),
    "classes that are no number": ([E], put("classes", True)),
    "fewer assumptions": ([E], lambda h, *_: h["assumptions"].pop()),
    "assumptions in another order": ([E], lambda h, *_: h["assumptions"].reverse()),
    "the fifth assumption": ([E], put("assumptions", 4, "A6: so")),
    "another input": ([E], put("input_shape", [5])),
    "no range": ([E], put("input_range", [ONE, ONE])),
    "a range upside down": ([E], put("input_range", [ONE, ZERO])),
    "a range without end": ([E], put("input_range", [ZERO, "inf"])),
    "a range without start": ([E], put("input_range", ["-inf", ZERO])),
    "NaN": ([E], put("total", "nan")),
    "decimal": ([E], put("total", "9.0")),
    "another form of a float": ([E], put("total", "0x1.2p+3")),
    "a number that is none": ([E], put("delta", 0)),
    "a key too few": ([E], lambda h, *_: h.pop("slack")),
    "a key too many": ([E], put("more", 1)),
    "the first schema": ([E], put("schema", 1)),
    "a schema that is equal": ([E], put("schema", True)),
    "features": (["claim features"], less("features")),
    "total": (["claim total"], less("total")),
    "first norm": (["claim first"], put("operators", 0, 2, (2.0 * HAIR).hex())),
    "last norm": (["claim head"], put("operators", 1, 2, (4.0 * HAIR).hex())),
    "both norms": (["claim first", "claim head"], both(
        put("operators", 0, 2, (2.0 * HAIR).hex()), put("operators", 1, 2, (4.0 * HAIR).hex()))),
    "norm of NaN": (["file first"], put("operators", 0, 2, "nan")),
    "a negative norm": (["file operators"], put("operators", 0, 2, (-2.0).hex())),
    "other names": (["file operators"], put("operators", 0, 0, "other")),
    "an operator without a norm": (["file operators"], lambda h, *_: h["operators"].pop()),
    "an operator that is not used": (["file operators"], put("network", "tape", 2, ["sigma", 0])),
    "an operator that is not described": (["file operators"],
                                          lambda h, *_: h["network"]["operators"].pop()),
    "a tape that reads what is not there": (["file add"], put("network", "tape", 3, ["add", 1, 4])),
    "a head of other classes": (["file head"], both(
        put("classes", 2), lambda _, a, __: a.update(logits=a["logits"][:8]))),
    "a head that is no matrix": (["file head"], convolved),
    "weights of other values": (["file first"], weight(lambda w: w.update(first=FIRST * HAIR))),
    "weights of another shape": (["file head"], weight(lambda w: w.update(head=HEAD.T))),
    "weights that are missing": (["file head"], weight(lambda w: w.pop("head"))),
    "a missing weight that is zero": (["file zero"], zero_weight),
    "weights without end": (["file head"], weight(
        lambda w: w.update(head=np.where(HEAD == 3.0, INF, HEAD)), named=True)),
    "samples": (["file arrays"], lambda _, a, __: a.update(label=a["label"][:3])),
    "logits": (["file arrays"], lambda _, a, __: a.update(logits=a["logits"][:-1])),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_what_the_header_says_by_a_hair_too_much_is_refused(name: str, tmp_path: Path) -> None:
    expected, edit = HEADERS[name]
    assert found(tmp_path, edit) == expected


@pytest.mark.parametrize("edit", [
    put("program_sha256", "2" * 64), put("weights_sha256", "2" * 64),
    put("network", "operators", 0, "nodes", 0, "gain", (0.5).hex()),
])  # fmt: skip
def test_the_fingerprint_is_that_of_what_is_described(edit: Edit, tmp_path: Path) -> None:
    assert found(tmp_path, edit, keep=True) == ["file fingerprint"]
    assert "file fingerprint" not in found(tmp_path, edit)


# -- executed semantics

STAND_IN = """
def drift(header, get, values, length):
    assert header["semantics"] == "executed(fp64)" and values[1] > 2.0
    assert float(length(get({"array": "head"}))) >= 5.0
    return lambda far, radius: FAR * far[None] * radius
"""


@pytest.mark.parametrize(("far", "expected"), [(0.0, []), (1e-6, ["claim radii"])])
def test_what_executions_move_comes_off_the_radii(
    far: float, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "check_execution.py").write_text(STAND_IN.replace("FAR", str(far)))
    monkeypatch.setattr(check, "__file__", str(tmp_path / "check.py"))
    assert found(tmp_path, put("semantics", "executed(fp64)")) == expected
    (tmp_path / "check_execution.py").unlink()
    assert found(tmp_path, put("semantics", "executed(fp64)")) == [f"file {tmp_path / 'c.npz'}"]
    assert found(tmp_path) == []


# -- the form of files


def files(folder: Path, content: bytes) -> list[str]:
    (folder / "c.npz").write_bytes(content)
    np.savez(folder / "w.npz", **honest()[2])
    return [f.kind for f in check.check(folder / "c.npz", folder / "w.npz")]


def honest_file() -> bytes:
    header, arrays, _ = honest()
    return sealed(signed(header), arrays)


def sealed_text(header: Header, arrays: Arrays) -> str:
    with np.load(io.BytesIO(sealed(header, arrays))) as stored:
        return bytes(stored["header"]).decode()


def zipped(members: list[tuple[str, bytes]], compressed: int = 0, system: int = 3) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", compressed) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr, info.compress_type = (
                system,
                0o644 << 16,
                compressed,
            )
            archive.writestr(info, content)
    return buffer.getvalue()


def of_file(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(n, archive.read(n)) for n in archive.namelist()]


def forms() -> dict[str, bytes]:
    whole = honest_file()
    parts = of_file(whole)
    label = next(content for name, content in parts if name == "label.npy")
    return {
        "inflated": zipped(parts, zipfile.ZIP_DEFLATED), "in another order": zipped(parts[::-1]),
        "of another system": zipped(parts, system=0), "one byte more": whole + b" ",
        "one byte less": whole[:-1], "in front": b" " + whole, "empty": b"", "no zip": b"PK",
        **{f"without {name}": zipped([p for p in parts if p[0] != f"{name}.npy"])
           for name in ("header", *check.ARRAYS)},
        "with another array": zipped(sorted([*parts, ("more.npy", label)])),
        "another type": zipped([(n, c.replace(b"<i8", b"<u8") if n == "label.npy" else c)
                                for n, c in parts]),
        "another shape": zipped([(n, c.replace(b"(4,), }", b"(2,2),}") if n == "label.npy" else c)
                                 for n, c in parts]),
        "more than the file holds": whole.replace((len(label)).to_bytes(4, "little"),
                                                  (2**30).to_bytes(4, "little")),
    }  # fmt: skip


@pytest.mark.parametrize("name", forms())
def test_files_of_another_form_are_refused(name: str, tmp_path: Path) -> None:
    assert files(tmp_path, honest_file()) == []
    assert forms()[name] != honest_file()
    assert files(tmp_path, forms()[name]) == ["file"]


TEXTS: dict[str, Callable[[str], str]] = {
    "order": lambda t: t.replace('"norm":"l2",', "").replace("{", '{"norm":"l2",', 1),
    "order inside": lambda t: t.replace('"certified":2,"constant":0', '"constant":0,"certified":2'),
    "a key twice": lambda t: t.replace('"norm":"l2"', '"norm":"l1","norm":"l2"'),
    "spaces": lambda t: t.replace('"norm":"l2"', '"norm": "l2"'),
    "no ASCII": lambda t: t.replace('"norm":"l2"', '"norm":"\u00e9"'),
    "an escape": lambda t: t.replace('"norm":"l2"', '"norm":"\\u006c2"'),
    "a decimal": lambda t: t.replace('"classes":3', '"classes":3.0'),
    "NaN": lambda t: t.replace('"classes":3', '"classes":NaN'),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_headers_of_another_form_are_refused(name: str, tmp_path: Path) -> None:
    """With a seal that fits what a careless reader would understand."""
    header, arrays, _ = honest()
    text = sealed_text(signed(header), arrays)
    assert files(tmp_path, packed(text, arrays)) == []
    forged = TEXTS[name](text)
    assert forged != text
    understood = {k: v for k, v in json.loads(forged).items() if k != "seal"}
    seal = check.sha256(check.canonical(understood))
    forged = forged.replace(json.loads(text)["seal"], seal)
    assert files(tmp_path, packed(forged, arrays)) == ["file"]


def test_hashes_and_the_seal_are_those_of_the_file(tmp_path: Path) -> None:
    header, arrays, _ = honest()
    header = signed(header)
    whole = {n: check.sha256(encoded(a)) for n, a in arrays.items()}
    for wrong in ({}, whole | {"label": "0" * 64}, whole | {"more": "0" * 64}):
        forged = {k: v for k, v in header.items() if k != "seal"} | {"arrays": wrong}
        forged["seal"] = check.sha256(check.canonical(forged))
        assert files(tmp_path, packed(check.canonical(forged), arrays)) == ["file"]
    forged = header | {"arrays": whole, "seal": "0" * 64}
    assert files(tmp_path, packed(check.canonical(forged), arrays)) == ["file"]


def test_the_command_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, weights = str(tmp_path / "c.npz"), str(tmp_path / "w.npz")
    assert found(tmp_path) == []
    assert check.main([certificate, weights]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f"accepted: {certificate}", check.NOT_CHECKED]
    assert found(tmp_path, less("features")) != []
    assert check.main([certificate, weights]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out[:-1]] == ["claim", "not accepted"]
    assert "Do this: do not use this file" in out[0]
    for words, code in (([certificate, weights], 1), ([certificate], 2)):
        monkeypatch.setattr(sys, "argv", ["check.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(check.__file__), run_name="__main__")
        assert ended.value.code == code
    assert check.main([certificate]) == check.main([certificate] * 3) == 2
    assert "usage" in capsys.readouterr().err
