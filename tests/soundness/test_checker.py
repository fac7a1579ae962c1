# SPDX-License-Identifier: MIT
"""The independent checker, read as an adversary: numbers at the ends of the range, forged files."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast import check
from lmtfast.description import save_weights
from tests.oracles import exact_sum_of_squares
from tests.test_check_tampering import parts_of, sealed

DENORMAL = 2.0**-1074
POWERS = (-1074, -1073, -1060, -1022, -600, -537, -40, 0, 500, 900)


def network(first: float, last: float) -> nn.Sequential:
    """Two inputs, two classes: the logits move by ``first * last * sqrt(2)`` per unit."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2, dtype=torch.float64) * first)
        model[2].weight.copy_(torch.tensor([[last, last], [0.0, 0.0]], dtype=torch.float64))
        model[2].bias.copy_(torch.tensor([1.0, 0.0]))
    return model.eval()


def written(model: nn.Module, folder: Path) -> tuple[Path, Path]:
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    certificate = lf.certify(model, x, input_shape=(2,), input_range=(0, 1))
    weights = save_weights(model, folder / "w.npz", input_shape=(2,))
    return certificate.save(folder / "c.npz"), weights


def forged(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    """The forger seals again and names the network that the file now describes."""
    identity = [header["program_sha256"], header["network"], header["weights_sha256"]]
    header["fingerprint"] = check.sha256(check.canonical(identity))
    path.write_bytes(sealed(header, arrays))
    return path


# -- numbers at the ends of the range


@pytest.mark.parametrize("power", POWERS)
def test_lengths_and_distances_are_never_below_the_exact_ones(power: int) -> None:
    rng = np.random.default_rng(abs(power))
    for _ in range(40):
        head = np.ldexp(rng.integers(-3, 4, (3, 4)).astype(float), power)
        head[rng.random(head.shape) < 0.3] = 0.0
        assert Fraction(float(check.length(head))) ** 2 >= exact_sum_of_squares(head)
        found = check.apart(head, np.zeros(3), 0)
        for row, distance in zip(head, found, strict=True):
            exact = exact_sum_of_squares(row - head[0])  # small integers: the difference is exact
            assert Fraction(float(distance)) ** 2 >= exact
            assert (distance == 0.0) == (exact == 0)


def test_a_radius_is_not_enlarged_by_distances_that_are_denormal(tmp_path: Path) -> None:
    """A length of sqrt(2) least numbers rounds to one; radii were accepted 1.4 times too large."""
    path, weights = written(network(2.0**1000, DENORMAL), tmp_path)
    assert check.check(path, weights) == []
    header, arrays = parts_of(path)
    most = 1.0 / (math.sqrt(2.0) * 2.0**-74)  # where the gap of 1 is used up
    arrays |= {
        "logits": np.array([1.0, 0.0]), "logit_error": np.zeros(1), "margin_lower": np.ones(1) / 2,
        "prediction": np.zeros(1, np.int64),
    }  # fmt: skip
    header["counts"] = {"certified": 1, "constant": 0, "refused": 0, "total": 1}
    for factor, accepted in ((0.4, True), (1.001, False), (1.2, False), (1.4, False)):
        arrays["prediction_radius"] = np.array([factor * most])
        found = check.check(forged(tmp_path / "f.npz", header, arrays), weights)
        assert [f.where for f in found] == ([] if accepted else ["radii"])


def test_rounded_rows_keep_their_error_where_its_square_underflows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = network(1.0, 2.0**-600)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.1 * self.parts(x)

    errors, apart = [], check.apart

    def seen(head: Any, error: Any, c: int) -> Any:
        errors.append(error)
        return apart(head, error, c)

    monkeypatch.setattr(check, "apart", seen)
    assert check.check(*written(Scaled().eval(), tmp_path)) == []
    (error,) = errors  # one rounding of a row (a, a), a = 0.1 * 2^-600
    assert error[0] >= 2.0**-53 * 0.1 * 2.0**-600
    assert error[1] == 0.0


@pytest.mark.parametrize("power", POWERS)
def test_constants_are_never_below_the_exact_ones(power: int) -> None:
    rng = np.random.default_rng(abs(power))
    for _ in range(40):
        norms = [math.ldexp(float(m), power) for m in rng.integers(0, 4, 3)]
        a, b, c = map(Fraction, norms)
        tape = [
            ["sigma", 0],
            ["sigma", 1],
            ["sigma", 2],
            ["mul", 0, 1],
            ["add", 1, 2],
            ["max", 3, 4],
        ]
        values = check.compose([*tape, ["hypot", 0, 2]], norms)
        assert [Fraction(v) for v in values[:3]] == [a, b, c]
        for value, exact in zip(values[3:6], (a * b, b + c, max(a * b, b + c)), strict=True):
            assert math.isinf(value) or Fraction(value) >= exact
            assert (value == 0.0) == (exact == 0)
        assert math.isinf(values[6]) or Fraction(values[6]) ** 2 >= a**2 + c**2


@pytest.mark.parametrize(("first", "last"), [(DENORMAL, 1.0), (2.0**-600, 2.0**-600)])
def test_certificates_of_tiny_constants_are_accepted(
    first: float, last: float, tmp_path: Path
) -> None:
    """Constants below 2^-1000 were refused, as if every product of norms underflowed."""
    assert [str(f) for f in check.check(*written(network(first, last), tmp_path))] == []


# -- forged files


def test_weights_that_the_description_does_not_hash_are_not_read(tmp_path: Path) -> None:
    """A forger who names no weights had any weights accepted as the certified ones."""
    path, weights = written(network(1.0, 1.0), tmp_path)
    header, arrays = parts_of(path)
    header["network"]["weights"] = {}
    assert check.check(forged(tmp_path / "f.npz", header, arrays), weights) != []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_have_no_infinite_norm_either(
    value: float, tmp_path: Path
) -> None:
    """An infinite norm needs no proof, and a head of equal rows would then never change."""
    path, weights = written(network(1.0, 0.0), tmp_path)
    header, arrays = parts_of(path)
    with np.load(weights) as stored:
        tensors = dict(stored)
    tensors["0.weight"][0, 0] = value
    np.savez(tmp_path / "v.npz", **tensors)
    entry = [[2, 2], check.sha256(tensors["0.weight"].astype("<f8").tobytes())]
    header["network"]["weights"]["0.weight"] = entry
    header["operators"][0][2] = header["features"] = header["total"] = math.inf.hex()
    found = check.check(forged(tmp_path / "f.npz", header, arrays), tmp_path / "v.npz")
    assert [f.where for f in found] == ["0.weight"]


def test_constants_of_functions_count_by_their_size() -> None:
    """A negative one would take away from a sum."""
    tape = [["constant", (-1.0).hex()], ["sigma", 0], ["add", 0, 1]]
    assert check.compose(tape, [1.0])[2] >= 2.0


def test_an_operator_of_no_kind_has_no_norm() -> None:
    with pytest.raises(KeyError):  # which is a finding to whoever checks a file
        check.check_norm({"name": "w"}, 10.0, {})
    check.check_norm({"name": "w", "copies": 4}, 2.0 * (1 + 2.0**-40), {})
    for copies in (4, 5):
        with pytest.raises(check.Finding):
            check.check_norm({"name": "w", "copies": copies}, math.nextafter(2.0, 0), {})


@pytest.mark.parametrize("change", [("model/w", "w"), ("w", "model/w"), ("w", "w")])
def test_weights_named_twice_are_those_that_the_hash_names(
    change: tuple[str, str], tmp_path: Path
) -> None:
    """Whichever of two a reader takes, only the certified values pass."""
    right, other = np.ones(2), np.zeros(2)
    for first, second in ((right, other), (other, right)):
        entries = ",".join(
            f'{json.dumps(n)}:{{"dtype":"F64","shape":[2],"data_offsets":[{i},{i + 16}]}}'
            for n, i in zip(change, (0, 16), strict=True)
        )
        text = ("{" + entries + "}").encode()
        content = len(text).to_bytes(8, "little") + text + first.tobytes() + second.tobytes()
        (tmp_path / "w.safetensors").write_bytes(content)
        found = check.read_weights(tmp_path / "w.safetensors")
        assert set(found) == {"w"}
        assert check.sha256(found["w"].tobytes()) == check.sha256(second.tobytes())
