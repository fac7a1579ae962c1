# SPDX-License-Identifier: MIT
"""Ways a certificate could have been wrong, each closed once and kept closed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.errors import ArgumentError, NotCertifiedError, UnsupportedLayerError
from lmtfast.verification import verify_certificate
from tests.cases import Lambda

RANGE = (0.0, 1.0)


def certify(model: nn.Module, data: Any, shape: tuple[int, ...] = (3,), **options: Any) -> Any:
    return lf.certify(model.eval(), data, input_shape=shape, input_range=RANGE, **options)


# -- inputs
# ----------------------------------------------------------------------------------------


def test_a_loader_may_reuse_its_memory():
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        x, y = torch.empty(2, 3), torch.empty(2, dtype=torch.int64)
        for k in range(3):
            yield x.fill_(k / 4), y.fill_(k)

    model = nn.Linear(3, 3)
    copies = [(x.clone(), y.clone()) for x, y in batches()]
    reused, apart = certify(model, batches()), certify(model, copies)
    np.testing.assert_array_equal(reused.margin_lower, apart.margin_lower)
    np.testing.assert_array_equal(reused.label, [0, 0, 1, 1, 2, 2])


def test_python_floats_keep_their_digits():
    rows = [[0.1, 0.2, 0.3], [0.7, 0.8, 0.9]]
    model = nn.Linear(3, 3).double()
    exact = torch.tensor(rows, dtype=torch.float64)
    np.testing.assert_array_equal(
        certify(model, [(rows, [0, 1])]).margin_lower, certify(model, exact).margin_lower
    )


# -- the function that is certified
# ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_forward_that_differs_from_its_trace_is_refused(dtype: torch.dtype):
    def forward(module: Any, x: Tensor) -> Tensor:
        y = module.layer(x)
        return y if torch.compiler.is_exporting() else -y

    with pytest.raises(NotCertifiedError):
        certify(Lambda(forward, layer=nn.Linear(3, 3)).to(dtype), torch.rand(2, 3))


CONSTANTS = {
    "shift": lambda c: Lambda(lambda m, x: m.layer(x - c), layer=nn.Linear(3, 3)),
    "slope": lambda c: nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(c)),
    "limit": lambda c: nn.Sequential(nn.Hardtanh(-c, c), nn.Linear(3, 3)),
    "tensor": lambda c: Lambda(lambda m, x: m.layer(x) + torch.tensor([c, 0, 0]),
                               layer=nn.Linear(3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_in_code_are_part_of_the_fingerprint(name: str):
    one, other = CONSTANTS[name](0.25).eval(), CONSTANTS[name](0.75).eval()
    other.load_state_dict(one.state_dict())
    certificate = certify(one, torch.rand(2, 3))
    assert verify_certificate(certificate, one) == []
    assert any("fingerprint" in f for f in verify_certificate(certificate, other))


def test_nearest_upsampling_whose_indices_depend_on_the_precision_is_refused():
    x = torch.arange(2.0).reshape(1, 1, 2)
    unlike = [
        m for m in range(1, 200)
        if not torch.equal(F.interpolate(x, size=m).double(), F.interpolate(x.double(), size=m))
    ]  # fmt: skip
    for size in unlike[:2]:
        with pytest.raises(UnsupportedLayerError, match="float32"):
            lf.trace(nn.Upsample(size=size), (1, 2))
    lf.trace(nn.Upsample(size=6), (1, 2))


# -- weights
# ---------------------------------------------------------------------------------------


def test_derived_weights_are_computed_in_float64():
    def spectrum(module: Any, x: Tensor) -> Tensor:
        return F.linear(x, torch.fft.irfft(module.weight, n=3))

    def cast(module: Any, x: Tensor) -> Tensor:
        return F.linear(x.float(), module.weight.float())

    def made(module: Any, x: Tensor) -> Tensor:
        return module.layer(x * (torch.ones(3) * 0.1))

    models = [
        Lambda(spectrum, weight=nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))),
        Lambda(cast, weight=nn.Parameter(torch.randn(3, 3).bfloat16())),
        Lambda(made, layer=nn.Linear(3, 3)),
    ]
    for model in models:
        certificate = certify(model, torch.rand(2, 3))
        assert verify_certificate(certificate, model) == []
        assert any("parametrizations" in a for a in certificate.assumptions)


def test_a_mask_of_booleans_and_derived_biases():
    model = Lambda(
        lambda m, x: F.linear(x * m.mask, m.weight, m.bias * 3.0),
        mask=torch.tensor([True, False, True]), weight=nn.Parameter(torch.randn(3, 3)),
        bias=nn.Parameter(torch.randn(3)),
    )  # fmt: skip
    certificate = certify(model, torch.rand(2, 3))
    assert any("parametrizations" in a for a in certificate.assumptions)


def test_integers_beyond_float64_are_refused():
    model = Lambda(lambda m, x: m.layer(x) + m.big, layer=nn.Linear(3, 3),
                   big=torch.tensor([2**60 + 1, 0, 0]))  # fmt: skip
    with pytest.raises(NotCertifiedError, match="integer"):
        certify(model, torch.rand(2, 3))


def test_an_empty_part_of_a_split_is_refused():
    def forward(module: Any, x: Tensor) -> Tensor:
        return module.head(torch.split(module.layer(x), [0, 3], dim=1)[1])

    with pytest.raises((NotCertifiedError, UnsupportedLayerError)):
        certify(Lambda(forward, layer=nn.Linear(3, 3), head=nn.Linear(3, 3)), torch.rand(2, 3))


# -- probabilistic bounds
# --------------------------------------------------------------------------


def test_cancelling_weights_do_not_fool_the_moment_bound():
    # (1 + e)(1 - e) x - x = -e^2 x, of which float64 products see nothing.
    first, second = (nn.Linear(1, 1, bias=False).double() for _ in range(2))
    nn.init.constant_(first.weight, 1 + 2.0**-52)
    nn.init.constant_(second.weight, 1 - 2.0**-52)
    model = Lambda(lambda m, x: m.second(m.first(x)) - x, first=first, second=second).eval()
    for level in ("rigorous", "probabilistic"):
        assert lf.certified_bound(model, (1,), level=level).total >= 2.0**-104


@pytest.mark.parametrize("level", ["rigorous", "probabilistic"])
def test_batch_norm_gains_that_vanish_are_refused(level: str):
    model = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False), nn.BatchNorm1d(2)).double().eval()
    nn.init.constant_(model[1].weight, 5e-324)
    model[1].running_var.fill_(1e10)
    with pytest.raises(NotCertifiedError):
        lf.certified_bound(model, (1, 3), level=level)


def test_weights_near_underflow_keep_a_probabilistic_bound():
    model = nn.Conv1d(1, 1, 1, bias=False).double().eval()
    nn.init.constant_(model.weight, 2.0**-1070)
    assert lf.certified_bound(model, (1, 3), level="probabilistic").total >= 2.0**-1070


# -- verification
# ----------------------------------------------------------------------------------


def test_verification_reads_every_claim():
    model, x = nn.Linear(3, 3), torch.rand(4, 3)
    certificate = certify(model, (x, torch.tensor([0, 1, 2, 0])))
    assert verify_certificate(certificate, model, (x, certificate.label)) == []
    slightly = tuple((n, m, v * (1 - 2.0**-24)) for n, m, v in certificate.operators)
    claims: list[dict[str, Any]] = [
        {"assumptions": ()}, {"norm": "linf"}, {"operators": slightly},
    ]  # fmt: skip
    for claim in claims:
        assert verify_certificate(dataclasses.replace(certificate, **claim), model) != []
    with pytest.raises(ArgumentError, match="semantics"):
        verify_certificate(dataclasses.replace(certificate, semantics="executed"), model)
    # Labels nobody checked.
    assert any("labels" in f for f in verify_certificate(certificate, model, x))


def test_an_average_whose_divisor_rounds_to_a_power_of_two() -> None:
    divisor = 2**54 - 1
    model = nn.AvgPool2d(1, divisor_override=divisor).eval()
    for options in ({}, {"budget": lf.Budget(0.0)}, {"method": "dense"}, {"method": "banded"}):
        bound = lf.certified_bound(model, (1, 2, 2), **options)
        assert Fraction(bound.total) * divisor >= 1
    assert lf.certified_bound(nn.AvgPool2d(2).eval(), (3, 32, 32)).total == 0.5
