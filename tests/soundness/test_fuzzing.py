# SPDX-License-Identifier: MIT
"""A small part of the fuzzing that repeats, two readers on ambiguous files, and the counter."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import sys
import zipfile
from datetime import date
from pathlib import Path

import numpy as np
import pytest

import lmtfast as lf
from lmtfast import check
from lmtfast.config import load_config
from lmtfast.errors import CertificateError, ConfigError, MissingDependencyError
from tests.soundness import fuzz_certificate, fuzz_checkpoint
from tests.soundness.fuzz_certificate import (
    certificates,
    judge_certificate,
    put,
    second_reader,
    weights,
)
from tests.soundness.fuzzing import COLUMNS, COUNTER, Target, atheris_library, main, mutated
from tests.soundness.mutation import LITERALS, parts, text_edited
from tests.test_check_tampering import packed, sealed

TARGETS = {**fuzz_certificate.TARGETS, **fuzz_checkpoint.TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_hundred_inputs_break_nothing(name: str) -> None:
    inputs, accepted, crashes = mutated(name, 400, "suite")
    assert crashes == 0
    assert inputs == 400
    assert accepted >= len(TARGETS[name].seeds())


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_twenty_thousand_inputs_break_nothing(name: str) -> None:
    assert mutated(name, 20_000, "slow")[2] == 0


def test_every_seed_is_accepted_and_mutants_repeat() -> None:
    for target in TARGETS.values():
        assert all(target.check(content) for content in target.seeds())
        first, second = (target.inputs("again") for _ in range(2))
        assert [next(first) for _ in range(30)] == [next(second) for _ in range(30)]


def test_a_reader_that_breaks_is_noticed(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    def fails(content: bytes) -> bool:
        if len(content) != 3:
            raise KeyError("unseen")
        return True

    broken = Target(lambda: [b"abc"], lambda content, choice: content + b"d", fails, ())
    monkeypatch.setitem(fuzz_certificate.TARGETS, "broken", broken)
    assert mutated("broken", 10, "0") == (2, 1, 1)
    assert "KeyError: 'unseen'" in capfd.readouterr().err


def ambiguous(content: bytes, choice: random.Random) -> bytes:
    """A header that two readers may understand differently, sealed for the lenient one."""
    text, arrays = parts(content)
    changed = text_edited(text, choice)
    old = json.loads(text)["seal"]
    try:
        header = {k: v for k, v in json.loads(changed).items() if k != "seal"}
        changed = changed.replace(old, check.sha256(check.canonical(header)))
    except (ValueError, AttributeError, RecursionError):
        pass
    return packed(changed, dict(arrays))


def test_two_readers_agree_on_five_hundred_ambiguous_files() -> None:
    """Duplicate keys, 1e400, NaN, spaces, escapes, other prints of a number: neither reads them."""
    choice = random.Random("ambiguous")
    refused = 0
    for trial in range(500):
        content = ambiguous(certificates()[trial % 3], choice)
        if content not in certificates():
            refused += not judge_certificate(content)
    assert refused >= 480


def test_literals_are_refused_wherever_a_number_stands() -> None:
    text, arrays = parts(certificates()[0])
    for literal in LITERALS:
        for key in ("classes", "schema"):
            changed = re.sub(rf'"{key}":\d', lambda _, k=key, v=literal: f'"{k}":{v}', text)
            content = packed(changed, dict(arrays))
            with pytest.raises(CertificateError):
                lf.load_certificate(put(content, "literal.npz"))
            assert second_reader(content) is None


NPY = {
    "unfinished": "{'descr': (", "no dtype": "{'descr': ',',", "string": "'''",
    "old": "{'descr': 1L",
}  # fmt: skip


@pytest.mark.parametrize("name", NPY)
def test_array_headers_are_compared_and_never_parsed(name: str) -> None:
    """NumPy's parser raises TokenError and SyntaxError, and warns, for these."""
    content, header = certificates()[0], b"{'descr': '|u1'"
    forged, whole = NPY[name][:15].ljust(15).encode(), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(whole, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info).replace(header, forged))
    found = content.replace(header, forged)
    assert found != content
    for damaged in (found, whole.getvalue()):
        with pytest.raises(CertificateError):
            lf.load_certificate(put(damaged, "header.npz"))
        assert second_reader(damaged) is None


def test_the_checker_inflates_nothing(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, header=np.zeros(1 << 20, np.uint8))
    for certificate, arrays in ((bomb, weights()), (put(certificates()[0], "whole.npz"), bomb)):
        (finding,) = check.check(certificate, arrays)
        assert "stored members" in str(finding)
    entry = {"dtype": "F16", "shape": [500], "data_offsets": [0, 1000]}
    header = json.dumps({f"model/{i}": entry for i in range(100)}).encode()
    raw = len(header).to_bytes(8, "little") + header + bytes(1000)
    (finding,) = check.check(put(certificates()[0], "whole.npz"), put(raw, "same.safetensors"))
    assert "do not overlap" in str(finding)


def test_a_radius_without_a_margin_is_refused_by_both() -> None:
    text, arrays = parts(certificates()[0])
    changed = {**arrays, "margin_lower": np.zeros(3)}
    assert (arrays["prediction_radius"] > 0).any()
    path = put(sealed(json.loads(text), changed), "marginless.npz")
    with pytest.raises(CertificateError, match="a radius without a margin"):
        lf.load_certificate(path)
    assert [f.where for f in check.check(path, weights())] == ["margins"]


CONFIGS = {
    "a long number": "lr = " + "9" * 400, "a longer number": "lr = " + "9" * 5000,
    "hexadecimal": "eps = 0x" + "f" * 300, "nested lists": "a = " + "[" * 9000,
    "nested tables": "model_options = " + "{a=" * 5000, "a long key": "a." * 30_000 + "b = 1",
    "a date": "model_options = {a = 2024-01-01}", "no number": "model_options = {a = nan}",
    "a seed": "seed = 18446744073709551616",
    "a deep option": "model_options.a = [[[[[[[[[1]]]]]]]]]",
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configurations_are_refused_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(CONFIGS[name])
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_config(path)
    assert fuzz_checkpoint.TARGETS["config"].check(CONFIGS[name].encode()) is False


def test_the_counter_is_whole() -> None:
    with COUNTER.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    for row in rows:
        assert date.fromisoformat(row["date"]) <= date(9999, 1, 1)
        assert re.fullmatch(r"[0-9a-f]{12}", row["commit"])
        assert row["target"] in TARGETS
        assert row["engine"] in ("atheris", "mutation")
        assert 0 < int(row["accepted"]) <= int(row["inputs"])
        assert int(row["seconds"]) >= 0
        assert int(row["crashes"]) == 0
    assert sum(int(row["inputs"]) for row in rows) >= 1_000_000


def test_a_run_appends_a_row(tmp_path: Path) -> None:
    out = tmp_path / "counter.csv"
    for seed in ("1", "2"):
        assert main(["config", "--inputs", "50", "--seed", seed, "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["inputs"] for row in rows] == ["50", "50"]


def test_the_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "atheris", None)
    with pytest.raises(MissingDependencyError, match=r"lmtfast\[fuzz\]"):
        atheris_library()
