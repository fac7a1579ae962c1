# SPDX-License-Identifier: MIT
"""Execution profiles: what ``run`` computes and refuses, and certificates that speak of it."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lmtfast as lf
from lmtfast import check
from lmtfast.certificate import Certificate
from lmtfast.description import save_weights
from lmtfast.errors import (
    ArgumentError,
    CertificateError,
    InputDomainError,
    NotCertifiedError,
    TrainModeError,
)
from lmtfast.execution.recursion import _Recursion
from lmtfast.models import run
from lmtfast.profiles import PROFILES, REFUSED, get_profile, profile_of
from lmtfast.tables import certificate_table
from tests.cases import Lambda
from tests.networks import MinMax, randomised

STORED = "executed(fp32a64)"


class Network(nn.Module):
    """A convolution with batch norm, MinMax, a residual sum, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.again = MinMax(), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        x = (x + torch.tanh(self.again(x))).relu()
        return self.head(nn.functional.avg_pool2d(x, 3).flatten(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(5)
    return randomised(Network()).float().eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand((4, 1, 6, 6), generator=torch.Generator().manual_seed(5))


def certified(model: nn.Module, x: Tensor, semantics: str = STORED) -> Certificate:
    y = torch.zeros(len(x), dtype=torch.int64)
    return lf.certify(
        model, (x, y), input_shape=(1, 6, 6), input_range=(0.0, 1.0), semantics=semantics
    )


@pytest.fixture(scope="module")
def certificate(model: nn.Module, x: Tensor) -> Certificate:
    return certified(model, x)


# -- run ---------------------------------------------------------------------------------------


def test_a_linear_layer_is_rounded_once() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 5).eval(), torch.randn(3, 7)
    found = run(layer, x)
    assert found.dtype == torch.float32
    for sample, row in zip(x.tolist(), found.tolist(), strict=True):
        for w, b, value in zip(layer.weight.tolist(), layer.bias.tolist(), row, strict=True):
            exact = Fraction(b) + sum(
                Fraction(p) * Fraction(q) for p, q in zip(w, sample, strict=True)
            )
            # Float64 errs by far less than half a step of float32, but may tip a tie.
            step = Fraction(float(np.spacing(np.float32(abs(value)))))
            assert abs(Fraction(value) - exact) <= step * Fraction(1001, 2000)


def test_float64_is_stored_as_it_is(model: nn.Module, x: Tensor) -> None:
    wide = randomised(Network()).double().eval()
    logits = run(wide, x.double(), profile="fp64")
    assert logits.dtype == torch.float64
    assert bool(((logits - wide(x.double())).abs() <= 1e-12).all())
    assert not torch.equal(run(model, x).double(), run(model, x, profile="fp64"))


def test_values_count_and_not_dtypes(model: nn.Module, x: Tensor) -> None:
    expected = run(model, x)
    wide = randomised(Network())
    wide.load_state_dict(model.state_dict())
    assert torch.equal(run(wide.double().eval(), x), expected)
    half = randomised(Network()).to(torch.bfloat16).eval()
    assert torch.equal(run(half, x), run(half.float(), x))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_settings_of_float32_change_nothing(
    precision: str, model: nn.Module, x: Tensor
) -> None:
    expected, before = run(model, x), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(run(model, x), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", [*REFUSED, "float32", "TF32"])
def test_executions_without_a_profile_are_refused_by_name(name: str) -> None:
    with pytest.raises(NotCertifiedError, match=name):
        get_profile(name)
    with pytest.raises(NotCertifiedError, match=name):
        profile_of(f"executed({name})")


@pytest.mark.parametrize("name", ["executed", "exact", "executed(fp32a64", "executed()", ""])
def test_other_semantics_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError):
        profile_of(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_refused(dtype: torch.dtype, model: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", dtype=dtype):
        with pytest.raises(NotCertifiedError, match="autocast"):
            run(model, x)
        with pytest.raises(NotCertifiedError, match="autocast"):
            certified(model, x)


def test_what_storage_does_not_represent_is_refused(x: Tensor) -> None:
    layer = nn.Linear(2, 2).double().eval()
    with torch.no_grad():
        layer.weight.fill_(0.1)
    point = torch.full((1, 2), 0.5)
    with pytest.raises(NotCertifiedError, match="weight"):
        run(layer, point)
    assert run(layer, point, profile="fp64").dtype == torch.float64
    bent = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).eval()
    with pytest.raises(NotCertifiedError, match="parametrization"):
        run(bent, point)
    with pytest.raises(InputDomainError):
        run(layer.float(), torch.full((1, 2), 0.1, dtype=torch.float64))
    with pytest.raises(InputDomainError):
        run(layer, torch.full((1, 2), torch.nan))
    with pytest.raises(TrainModeError):
        run(nn.Linear(2, 2), point)


def test_casts_to_sixteen_bits_are_refused() -> None:
    model = Lambda(lambda m, x: m.layer(x.half().float()), layer=nn.Linear(2, 2)).eval()
    with pytest.raises(NotCertifiedError, match="cast"):
        run(model, torch.ones(1, 2))


# -- certificates --------------------------------------------------------------------------------


def test_radii_are_a_little_below_the_ideal_ones(
    certificate: Certificate, model: nn.Module, x: Tensor
) -> None:
    ideal = certified(model, x, "ideal")
    share = certificate.prediction_radius / ideal.prediction_radius
    assert ((share > 0.9) & (share < 1.0)).all()
    assert certificate.semantics == STORED
    assert certificate.claim == f"rigorous, {STORED}"
    assert np.array_equal(certificate.logits, run(model, x).double().numpy())
    assert np.array_equal(certificate.prediction, run(model, x).argmax(1).numpy())
    assert any(a.startswith("A6") for a in certificate.assumptions)


def test_files_and_both_readers_agree(
    certificate: Certificate, model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    path = certificate.save(tmp_path / "c.npz")
    loaded = lf.load_certificate(path)
    loaded.verify(model, (x, torch.zeros(len(x), dtype=torch.int64)))
    weights = save_weights(model, tmp_path / "w.npz", input_shape=(1, 6, 6), semantics=STORED)
    assert check.check(path, weights) == []


def test_the_checker_judges_executions_wherever_its_two_files_lie(
    certificate: Certificate, model: nn.Module, tmp_path: Path
) -> None:
    folder = Path(check.__file__).parent
    for name in ("check.py", "check_execution.py"):
        shutil.copy(folder / name, tmp_path / name)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "import torch" not in text
        assert "import lmtfast" not in text
        assert "from lmtfast" not in text
    weights = save_weights(model, tmp_path / "w.npz", input_shape=(1, 6, 6), semantics=STORED)
    path = certificate.save(tmp_path / "c.npz")
    done = subprocess.run(
        [sys.executable, "-I", "check.py", str(path), str(weights)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "accepted" in done.stdout) == (0, True), done.stdout


def forged(certificate: Certificate, **fields: Any) -> Certificate:
    return dataclasses.replace(certificate, **fields)


def test_radii_of_the_exact_function_are_no_executed_ones(
    certificate: Certificate, model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    ideal = certified(model, x, "ideal")
    weights = save_weights(model, tmp_path / "w.npz", input_shape=(1, 6, 6), semantics=STORED)
    larger = forged(certificate, prediction_radius=ideal.prediction_radius)
    found = check.check(larger.save(tmp_path / "c.npz"), weights)
    assert [f.kind for f in found] == ["claim"]
    with pytest.raises(CertificateError, match="radii"):
        larger.verify(model, x)
    other = certificate.logits + np.eye(len(x), 3)  # type: ignore[operator]
    with pytest.raises(CertificateError, match="enclosures"):
        forged(certificate, logits=other).verify(model, x)


def test_a_certificate_may_not_change_its_semantics(
    certificate: Certificate, model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    ideal = certified(model, x, "ideal")
    for one, semantics in (
        (certificate, "ideal"),
        (ideal, STORED),
        (certificate, "executed(fp16)"),
    ):
        path = forged(one, semantics=semantics).save(tmp_path / "c.npz")
        with pytest.raises(CertificateError):
            lf.load_certificate(path)


def test_biases_belong_to_the_checked_weights(
    certificate: Certificate, model: nn.Module, tmp_path: Path
) -> None:
    other = randomised(Network())
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.again.bias.add_(1.0)  # type: ignore[union-attr]
    weights = save_weights(
        other.float().eval(), tmp_path / "w.npz", input_shape=(1, 6, 6), semantics=STORED
    )
    found = check.check(certificate.save(tmp_path / "c.npz"), weights)
    assert "again.bias" in str(found[0])


def test_tables_name_what_they_count_and_mix_nothing(
    certificate: Certificate, model: nn.Module, x: Tensor
) -> None:
    table = certificate_table({"a": certificate}, [0.141], title="")
    assert any(f"CRA@0.141[rigorous, {STORED}]" in str(c) for c in table.columns[0].cells)
    several = {"a": certificate, "b": certified(model, x, "ideal")}
    with pytest.raises(ArgumentError, match="ideal"):
        certificate_table(several, [0.1], title="")


def test_executed_radii_are_finite_even_of_constant_networks() -> None:
    layer = nn.Linear(2, 2).eval()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([1.0, 0.0]))
    for profile in PROFILES.values():
        found = lf.certify(
            layer, torch.rand(1, 2), input_shape=(2,), input_range=(0.0, 1.0),
            semantics=profile.semantics,
        )  # fmt: skip
        assert 0.0 < found.prediction_radius[0] < profile.largest


@pytest.mark.parametrize("affine", [True, False])
def test_gains_of_batch_norms_are_those_of_their_formula(affine: bool) -> None:
    """A variance as small as what is added to it, so that the sign of that is seen."""
    arrays = {"v": np.array([0.25, 0.0, 3.0]), "w": np.array([1.5, -0.3, 7.0])}
    step = {"variance": {"array": "v"}, "weight": {"array": "w"} if affine else None,
            "eps": (0.25).hex()}  # fmt: skip
    found = _Recursion(arrays, [], PROFILES["fp32a64"], 1.0)._ref(step).tolist()
    for gain, variance, weight in zip(found, arrays["v"], arrays["w"], strict=True):
        square = Fraction(float(weight) if affine else 1.0) ** 2
        ratio = Fraction(gain) ** 2 * (Fraction(float(variance)) + Fraction(1, 4)) / square
        assert abs(ratio - 1) < Fraction(1, 2**49)
        assert (gain < 0) == (affine and weight < 0)


@pytest.mark.parametrize("value", [0.1, 1.0])
def test_inputs_of_executed_certificates_are_representable(value: float) -> None:
    layer, x = nn.Linear(2, 2).eval(), torch.full((1, 2), value, dtype=torch.float64)
    options: dict[str, Any] = {"input_shape": (2,), "input_range": (0.0, 1.0)}
    if value == 1.0:
        assert lf.certify(layer, x, semantics=STORED, **options).n_total == 1
    else:
        with pytest.raises(InputDomainError, match="float32"):
            lf.certify(layer, x, semantics=STORED, **options)
