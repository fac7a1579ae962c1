# SPDX-License-Identifier: MIT
"""The stand-alone checker: what it accepts, what it refuses, and that it shares nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmtfast as lf
from lmtfast import check
from lmtfast.description import save_weights
from lmtfast.errors import CertificateError
from lmtfast.verification import verify_certificate
from tests.networks import ResNet, WideResNet, randomised
from tests.test_check_tampering import packed, parts_of

ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "benchmarks" / "results" / "mnist-lmt" / "certificate.npz"


class Residual(nn.Module):
    """``x + conv(x)``, a shortcut of its own, and a circular border with the identity in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.round = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
        self.down, self.skip = nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(2, 3, 1, 2)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x + self.first(x))
        x = F.relu(x + self.round(x))
        x = F.relu(self.norm(self.down(x) + 0.5 * self.skip(x)))
        return self.head(x.flatten(1))


class Pooled(nn.Module):
    """No head: the logits are means of a convolution that reads copies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat(1, 2, 1, 1).relu()).mean((2, 3))


def tail(channels: int, size: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.Flatten(), nn.Linear(channels * size * size, 3)]


def nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    image, sequential = (2, 6, 6), nn.Sequential
    derived = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    return {
        "dense": (sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (4,)),
        "one class": (sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)), (4,)),
        "conv": (sequential(nn.Conv2d(2, 3, 3, padding=1), *tail(3, 6)), image),
        "several blocks": (sequential(nn.Conv2d(2, 8, 3, padding=1), *tail(8, 12)), (2, 12, 12)),
        "pointwise": (sequential(nn.Conv2d(2, 3, 1), *tail(3, 6)), image),
        "strided": (sequential(nn.Conv2d(2, 3, 3, 2, 1, bias=False), *tail(3, 3)), image),
        "grouped": (
            sequential(nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2), *tail(4, 6)), image,
        ),
        "transposed": (
            sequential(
                nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1, groups=2), nn.BatchNorm2d(4),
                *tail(4, 12),
            ), image,
        ),
        "batch norm": (
            sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3),
                       *tail(3, 4)), image,
        ),
        "circular": (
            sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), *tail(3, 6)), image,
        ),
        "reflect": (
            sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), *tail(3, 6)), image,
        ),
        "slope": (
            sequential(nn.Conv2d(2, 3, 3), nn.PReLU(3), nn.AvgPool2d(3, 2, 1), *tail(3, 2)), image,
        ),
        "one axis": (
            sequential(nn.Conv1d(2, 3, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2),
                       nn.Flatten(), nn.Linear(24, 3)), (2, 8),
        ),
        "derived weight": (sequential(derived, nn.ReLU(), nn.Linear(5, 3)), (4,)),
        "residual": (Residual(), image),
        "no head": (Pooled(), image),
        "resnet": (ResNet(), (1, 8, 8)),
        "wide resnet": (WideResNet(), (1, 6, 6)),
    }  # fmt: skip


def made(model: nn.Module, shape: tuple[int, ...], folder: Path, count: int = 7) -> Any:
    """A certificate of random inputs with its file and its weights file."""
    model = model.float().eval()
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::3] = 0
    certificate = lf.certify(model, (x, y), input_shape=shape, input_range=(0, 1))
    weights = save_weights(model, folder / "weights.npz", input_shape=shape)
    return certificate, certificate.save(folder / "certificate.npz"), weights, model, (x, y)


@pytest.mark.parametrize("name", nets())
def test_what_the_library_writes_is_accepted(name: str, tmp_path: Path) -> None:
    model, shape = nets()[name]
    certificate, path, weights, model, data = made(randomised(model), shape, tmp_path)
    assert [str(f) for f in check.check(path, weights)] == []
    assert verify_certificate(certificate, model, data) == []
    assert certificate.n_certified > 0
    # The radii are not accepted for want of looking: a hair more is refused.
    if name != "one class":
        longer = np.nextafter(certificate.prediction_radius * (1 + 2.0**-28), np.inf)
        grown = dataclasses.replace(certificate, prediction_radius=longer).save(
            tmp_path / "grown.npz"
        )
        assert [f.where for f in check.check(grown, weights)] == ["radii"]


def test_no_inputs_and_no_labels(tmp_path: Path) -> None:
    model, shape = nets()["dense"]
    _, path, weights, model, _ = made(model, shape, tmp_path, 0)
    assert [str(f) for f in check.check(path, weights)] == []
    bare = lf.certify(model, torch.rand(3, 4), input_shape=shape, input_range=(0, 1))
    assert check.check(bare.save(tmp_path / "bare.npz"), weights) == []
    # An input whose logits are unknown may claim nothing, and then is no obstacle.
    blank = {"logits": np.zeros((3, 3)), "logit_error": np.full(3, math.inf)}
    nothing = dict.fromkeys(("prediction_radius", "margin_lower"), np.zeros(3))
    unknown = dataclasses.replace(bare, **blank, **nothing)
    assert check.check(unknown.save(tmp_path / "unknown.npz"), weights) == []
    claiming = dataclasses.replace(bare, **blank)
    assert check.check(claiming.save(tmp_path / "claiming.npz"), weights) != []


def test_norms_below_the_truth_are_refused_by_one_part_in_ten_million(tmp_path: Path) -> None:
    for name in ("several blocks", "transposed", "residual"):
        model, shape = nets()[name]
        certificate, _, weights, _, _ = made(randomised(model), shape, tmp_path, 2)
        for i, (operator, method, norm) in enumerate(certificate.operators):
            rows = list(certificate.operators)
            rows[i] = (operator, method, norm * (1 - 2.0**-21))
            lower = dataclasses.replace(certificate, operators=tuple(rows)).save(
                tmp_path / "lower.npz"
            )
            assert operator in [f.where for f in check.check(lower, weights)], (name, operator)


def described(matrix: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    node = {
        "op": "linear", "in": [matrix.shape[1]], "out": [len(matrix)], "rows": [], "columns": [],
        "gain": (1.0).hex(), "identity": (0.0).hex(), "weight": {"array": "w"}, "inputs": [-1],
    }  # fmt: skip
    return {"name": "w", "in": node["in"], "out": node["out"], "nodes": [node]}, {"w": matrix}


@pytest.mark.parametrize("power", range(1, 6))
def test_one_float_below_an_exactly_known_norm_is_refused(power: int) -> None:
    hadamard = np.ones((1, 1))
    for _ in range(2 * power):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    region, arrays = described(hadamard)
    norm = 2.0**power
    check.check_norm(region, norm * (1 + 2.0**-25), arrays)
    for c in (math.nextafter(norm, 0), norm * (1 - 2.0**-30), norm / 2, 0.0, math.nan):
        with pytest.raises(check.Finding) as found:
            check.check_norm(region, c, arrays)
        assert found.value.kind == "claim"


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-540, 1.0, 2.0**500, 2.0**1000])
def test_plain_weights_of_any_scale_are_proved(scale: float) -> None:
    region, arrays = described(np.diag([3.0, 4.0]) * scale)
    check.check_norm(region, 4.0 * scale * (1 + 2.0**-25), arrays)
    with pytest.raises(check.Finding):
        check.check_norm(region, 4.0 * scale * (1 - 2.0**-40), arrays)


@pytest.mark.parametrize("seed", range(12))
def test_convolution_norms_are_those_of_the_materialised_map(seed: int) -> None:
    """Against the singular values of torch's own convolution, geometry at random."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 3))
    kernel, stride, dilation = rng.integers(1, 4, 2), rng.integers(1, 3, 2), rng.integers(1, 3, 2)
    padding, extent = rng.integers(0, 3, 2), rng.integers(6, 12, 2)
    weight = torch.from_numpy(rng.standard_normal((3 * groups, 2, *kernel)))
    units = torch.eye(2 * groups * int(extent.prod()), dtype=torch.float64)
    units = units.reshape(-1, 2 * groups, *map(int, extent))
    image = F.conv2d(
        units, weight, None, stride.tolist(), padding.tolist(), dilation.tolist(), groups
    )
    norm = float(torch.linalg.matrix_norm(image.flatten(1), 2))
    node = {
        "op": "conv", "in": list(units.shape[1:]), "out": list(image.shape[1:]), "rows": [],
        "columns": [], "gain": (1.0).hex(), "identity": (0.0).hex(), "weight": {"array": "w"},
        "inputs": [-1], "groups": groups, "kernel": kernel.tolist(), "stride": stride.tolist(),
        "padding": [[int(p), int(p)] for p in padding], "dilation": dilation.tolist(),
        "centre": [0, 0],
    }  # fmt: skip
    region = {"name": "w", "in": node["in"], "out": node["out"], "nodes": [node]}
    arrays = {"w": weight.numpy()}
    check.check_norm(region, norm * (1 + 2.0**-25), arrays)
    with pytest.raises(check.Finding):
        check.check_norm(region, norm * (1 - 2.0**-30), arrays)
    # Any other way through the proof, forced: as a composite.
    double = {"op": "add", "inputs": [0, 0]}
    twice = {**region, "nodes": [node, double]}
    check.check_norm(twice, 2 * norm * (1 + 2.0**-25), arrays)
    with pytest.raises(check.Finding):
        check.check_norm(twice, 2 * norm * (1 - 2.0**-30), arrays)


def test_operators_beyond_the_limits_are_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    region, arrays = described(np.eye(8))
    monkeypatch.setattr(check, "OPERATIONS", 100.0)
    with pytest.raises(check.Finding, match="within this checker's limits") as found:
        check.check_norm(region, 2.0, arrays)
    assert found.value.kind == "limit"
    with pytest.raises(check.Finding, match="unheard of") as found:
        check.check_norm({"name": "x", "opaque": "unheard of"}, 2.0, {})
    assert found.value.kind == "limit"
    node = {**region["nodes"][0], "gain": (2.0**-500).hex()}
    with pytest.raises(check.Finding, match="extreme") as found:
        check.check_norm({**region, "nodes": [node]}, 2.0, {"w": np.eye(8) * 2.0**-500})
    assert found.value.kind == "limit"


# -- files


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, shape = nets()["dense"]
    return made(randomised(model), shape, tmp_path_factory.mktemp("dense"))


def safetensors(arrays: dict[str, tuple[str, np.ndarray]]) -> bytes:
    entries, data = {}, b""
    for name, (dtype, array) in arrays.items():
        span = [len(data), len(data) + array.nbytes]
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    header = json.dumps({"__metadata__": {"a": "b"}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + data


def test_weights_are_read_from_checkpoints(dense: Any, tmp_path: Path) -> None:
    _, path, _, model, _ = dense
    stored = {f"model/{n}": ("F32", t.numpy()) for n, t in model.state_dict().items()}
    stored["rng/state"] = ("U8", np.zeros(3, np.uint8))
    weights = tmp_path / "epoch.safetensors"
    weights.write_bytes(safetensors(stored))
    assert check.check(path, weights) == []
    halves = np.array([0x3F80, 0xC000], "<u2")
    weights.write_bytes(safetensors({"a": ("BF16", halves), "b": ("F16", np.ones(2, "<f2"))}))
    assert check.read_weights(weights)["a"].tolist() == [1.0, -2.0]


def test_other_weights_are_refused(dense: Any, tmp_path: Path) -> None:
    _, path, weights, _, _ = dense
    with np.load(weights) as stored:
        arrays = dict(stored)
    name = sorted(arrays)[0]
    for change in (lambda a: np.nextafter(a, 9.0), lambda a: -a, lambda a: a.T, lambda a: a[:-1]):
        np.savez(tmp_path / "other.npz", **{**arrays, name: change(arrays[name])})
        assert [f.kind for f in check.check(path, tmp_path / "other.npz")] == ["file"]
    np.savez(tmp_path / "less.npz", **{k: v for k, v in arrays.items() if k != name})
    for other in (tmp_path / "less.npz", path, tmp_path / "absent", tmp_path):
        assert check.check(path, other) != []


def test_certificates_of_schema_1_have_nothing_to_check(dense: Any) -> None:
    assert lf.load_certificate(OLD).schema == 1
    (finding,) = check.check(OLD, dense[2])
    assert "schema 2; got 1;" in str(finding)


def test_sizes(dense: Any, tmp_path: Path) -> None:
    """Far below 1 MB for a network, and 8 K + 40 bytes for an input with its label."""
    model = randomised(ResNet(10)).float().eval()
    sizes = []
    for count in (1, 201):
        certificate, path, *_ = made(model, (1, 8, 8), tmp_path, count)
        sizes.append(path.stat().st_size)
    assert sizes[0] < 20_000
    assert (sizes[1] - sizes[0]) / 200 <= 8 * 10 + 40 + 1


TEXTS: dict[str, Callable[[str], str]] = {
    "duplicate key": lambda t: t.replace('"schema":2', '"schema":2,"schema":2'),
    "duplicate key inside": lambda t: t.replace('"tape":', '"tape":[],"tape":', 1),
    "huge number": lambda t: t.replace('"classes":3', '"classes":1e400'),
    "float": lambda t: t.replace('"classes":3', '"classes":3.0'),
    "float inside": lambda t: t.replace('"head":1', '"head":1.0'),
    "NaN": lambda t: t.replace('"classes":3', '"classes":NaN'),
    "infinity": lambda t: t.replace('"head":1', '"head":-Infinity'),
    "spaces": lambda t: t.replace('"schema":2', '"schema": 2'),
    "escape": lambda t: t.replace('"level"', '"\\u006cevel"'),
    "order": lambda t: t.replace('"level":"rigorous",', "").replace("{", '{"level":"rigorous",', 1),
    "trailing": lambda t: t + " ",
    "upper case": lambda t: t.replace("0x1.", "0X1.", 1),
    "another schema": lambda t: t.replace('"schema":2', '"schema":3'),
    "true": lambda t: t.replace('"schema":2', '"schema":true'),
    "unknown key": lambda t: t.replace('"schema":2', '"schema":2,"zeta":0'),
    "missing key": lambda t: t.replace('"norm":"l2",', ""),
    "a list": lambda t: f"[{t}]",
    "deep": lambda t: "[" * 100_000 + t,
    "decimal": lambda t: t.replace('"delta":"0x0.0p+0"', '"delta":"0.0"'),
    "empty": lambda t: "",
}


@pytest.mark.parametrize("name", TEXTS)
def test_ambiguous_headers_are_refused_by_both_readers(
    name: str, dense: Any, tmp_path: Path
) -> None:
    header, arrays = parts_of(dense[1])
    text = TEXTS[name](check.canonical(header))
    assert text != check.canonical(header)
    try:  # with a seal that fits what a careless reader would understand
        seal = check.sha256(
            check.canonical({k: v for k, v in json.loads(text).items() if k != "seal"})
        )
        text = text.replace(header["seal"], seal)
    except (ValueError, AttributeError, RecursionError):
        pass
    path = tmp_path / "c.npz"
    path.write_bytes(packed(text, arrays))
    with pytest.raises(CertificateError):
        lf.load_certificate(path)
    assert [f.kind for f in check.check(path, dense[2])] == ["file"]


# -- alone


def alone(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)


def test_it_imports_neither_torch_nor_the_rest_of_the_library(dense: Any, tmp_path: Path) -> None:
    code = (
        "import sys, lmtfast.check as c\n"
        f"assert c.check({str(dense[1])!r}, {str(dense[2])!r}) == []\n"
        "print(*sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'lmtfast', 'scipy')))"
    )
    assert alone("-c", code).stdout.split() == ["lmtfast", "lmtfast.check"]
    copy = tmp_path / "copied.py"
    copy.write_bytes((ROOT / "lmtfast" / "check.py").read_bytes())
    done = alone("-I", str(copy), str(dense[1]), str(dense[2]))
    assert done.returncode == 0
    assert "accepted" in done.stdout
    assert "not checked (lmtfast verify does)" in done.stdout
    assert alone("-m", "lmtfast.check", str(dense[1])).returncode == 2
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(dense[1].read_bytes()[:-1])
    done = alone(str(ROOT / "lmtfast" / "check.py"), str(damaged), str(dense[2]))
    assert done.returncode == 1
    assert "Do this:" in done.stdout


def test_it_stays_short() -> None:
    assert len((ROOT / "lmtfast" / "check.py").read_text().splitlines()) <= 500


def test_a_norm_that_overflows_the_proof_is_refused(tmp_path: Path) -> None:
    """Scaled by a tiny claim the matrix overflows; NaN in some rows of blocks must not be lost."""
    layer = nn.Conv2d(1, 1, (4, 1), stride=(2, 1), padding=(3, 0), bias=False)
    layer.weight.data.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 4, 1))
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 256, 3)).eval()
    region = first_operator(model, (1, 9, 256), tmp_path)
    for claim in (2.0**-1060, 2.0**-600, 2.0**-100, 0.5, 1.0 - 2.0**-20):
        with pytest.raises(check.Finding), np.errstate(all="ignore"):
            check.check_norm(region[0], claim, region[1])
    check.check_norm(region[0], 1.0 + 2.0**-20, region[1])


def first_operator(
    model: nn.Module, shape: tuple[int, ...], folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first operator's description and the weights, as the checker reads them."""
    x = torch.rand(3, *shape)
    certificate = lf.certify(model, x, input_shape=shape, input_range=(0, 1))
    saved = certificate.save(folder / "c.npz")
    header, _ = check.read_certificate(Path(saved).read_bytes())
    weights = save_weights(model, folder / "w.npz", input_shape=shape)
    assert check.check(saved, weights) == []
    return header["network"]["operators"][0], check.read_weights(Path(weights))


def test_a_tap_that_meets_padding_alone_has_norm_zero(tmp_path: Path) -> None:
    layer = nn.Conv2d(2, 3, 1, stride=(1, 3), padding=(0, 2))
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).eval()
    first_operator(model, (2, 2, 1), tmp_path)
    assert lf.certified_bound(model, (2, 2, 1)).features == 0.0


@pytest.mark.parametrize("change", [{"stride": [0, 0]}, {"dilation": [0, 0]}, {"stride": [-1, 1]}])
def test_steps_that_no_convolution_has_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 3)).eval()
    region, arrays = first_operator(model, (1, 4, 4), tmp_path)
    region["nodes"][0].update(change)
    with pytest.raises(check.Finding, match="steps"):
        check.check_norm(region, 1e6, arrays)
