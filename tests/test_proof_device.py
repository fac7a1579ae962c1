# SPDX-License-Identifier: MIT
"""Proofs on another device: nothing stays behind on the CPU, and what cannot be trusted is refused.

Without a GPU the first half shows that every tensor is made where the weights are; the tests marked
gpu compare the norms themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import lmtfast as lf
from lmtfast import check
from lmtfast.certificate import ON_CUDA
from lmtfast.certification import assumptions
from lmtfast.description import save_weights
from lmtfast.errors import ArgumentError, BackendUnavailableError, NotCertifiedError
from lmtfast.guarantee import plan_bound
from lmtfast.level import Level
from lmtfast.plan import BoundPlan, make_plan
from lmtfast.subject import prepare
from lmtfast.tracing import trace_model
from lmtfast.verified import arithmetic
from lmtfast.weights import Weights

SHAPE = (2, 8, 8)
WAYS = [("auto", "rigorous"), ("torus", "rigorous"), ("banded", "rigorous"),
        ("dense", "rigorous"), ("auto", "probabilistic")]  # fmt: skip


class Mixed(nn.Module):
    """Operators of every kind: bands, a residual, a circular border, scales, a slope, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.down = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, 2, 1)
        self.round = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.up, self.slope = nn.ConvTranspose2d(4, 2, 2, 2), nn.PReLU(2)
        self.point, self.last = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.register_buffer("shift", torch.tensor([0.5, 2.0]).reshape(2, 1, 1))
        self.head = nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.norm((x + self.second(x)).relu()).relu()
        x = self.slope(self.up(self.round(self.down(x).relu()).relu()))
        return self.head((self.last(self.point(x)) * self.shift * 0.5).relu().flatten(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


class Placed(TorchFunctionMode):
    """Fails where a floating tensor is made without saying where."""

    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        if function in _device_constructors() and kwargs.get("device") is None:
            # Indices may be anywhere; single numbers and empty placeholders mix with any device.
            assert not made.is_floating_point() or made.numel() <= 2, function
        return made


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, BoundPlan]:
    model = network()
    graph = trace_model(model, SHAPE).graph
    return model, make_plan(model, graph, engine="operator", backend="reference")


@pytest.mark.parametrize(("method", "level"), WAYS)
def test_every_tensor_of_a_proof_is_made_where_the_weights_are(
    method: str, level: str, traced: tuple[nn.Module, BoundPlan]
) -> None:
    model, plan = traced
    arithmetic.ensure_arithmetic(torch.device("cpu"))  # makes probes of its own, once
    with Placed():
        bound = plan_bound(plan, model, level=Level(level), method=method)
    assert bound.total > 0.0


def test_weights_know_their_device() -> None:
    assert Weights({}).device == torch.device("cpu")
    assert Weights({"w": torch.zeros(2, device="meta")}).device == torch.device("meta")
    assert Weights({"w": torch.zeros(2, device="meta")}).zeros(3).device == torch.device("meta")


@pytest.mark.parametrize("device", ["meta", "mps", "nowhere", "xla", ""])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(ArgumentError, match="CUDA"):
        lf.certified_bound(nn.Linear(2, 2).eval(), (2,), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_and_no_fallback() -> None:
    for call in (lf.certified_bound, prepare):
        options: Any = {"device": "cuda"}
        if call is prepare:
            options = {"proof_device": "cuda", "level": Level("rigorous"), "method": "auto"}
        arguments = (nn.Linear(2, 2).eval(), (2,), *([(0.0, 1.0)] if call is prepare else []))
        with pytest.raises(BackendUnavailableError):
            call(*arguments, **options)


def test_a_certificate_says_that_a_gpu_proved_it() -> None:
    subject = prepare(network(), SHAPE, (0.0, 1.0), level=Level("rigorous"), method="torus")
    assert ON_CUDA not in assumptions(subject)
    object.__setattr__(subject, "proof_device", "cuda")
    assert assumptions(subject)[-1] == ON_CUDA


def strassen(a: Tensor, b: Tensor) -> Tensor:
    h = len(a) // 2
    a11, a12, a21, a22 = a[:h, :h], a[:h, h:], a[h:, :h], a[h:, h:]
    b11, b12, b21, b22 = b[:h, :h], b[:h, h:], b[h:, :h], b[h:, h:]
    m1, m2, m3 = (a11 + a22) @ (b11 + b22), (a21 + a22) @ b11, a11 @ (b12 - b22)
    m4, m5 = a22 @ (b21 - b11), (a11 + a12) @ b22
    m6, m7 = (a21 - a11) @ (b11 + b12), (a12 - a22) @ (b21 + b22)
    upper = torch.cat((m1 + m4 - m5 + m7, m3 + m5), 1)
    return torch.cat((upper, torch.cat((m2 + m4, m1 - m2 + m3 + m6), 1)))


def emulated(a: Tensor, b: Tensor) -> Tensor:
    """Rows and columns as integers of 60 bits beneath their largest entry: no row's own scale."""
    units = [t.abs().amax(d, keepdim=True) * 2.0**-60 for t, d in ((a, 1), (b, 0))]
    units = [u.where(u > 0, torch.ones_like(u)) for u in units]
    return ((a / units[0]).round() @ (b / units[1]).round()) * units[0] * units[1]


@pytest.mark.parametrize("product", [strassen, emulated])
def test_products_of_another_kind_are_detected(
    product: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = torch.ones(24, 24, dtype=torch.float64)
    arithmetic._check_products(one)
    own = torch.Tensor.__matmul__

    def other(a: Tensor, b: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", own)
            square = a.shape == b.shape and len(a) == 24
            return product(a, b) if square else own(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", other)
    with pytest.raises(NotCertifiedError):
        arithmetic._check_products(one)


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "level"), WAYS)
def test_norms_proved_on_a_gpu_are_those_of_the_cpu(method: str, level: str) -> None:
    model = network()
    found = {
        device: lf.certified_bound(model, SHAPE, method=method, level=level, device=device)
        for device in ("cpu", "cuda")
    }
    for name, norm in found["cpu"].per_operator.items():
        assert found["cuda"].methods[name] == found["cpu"].methods[name]
        # Other guesses and another draw; each is an upper bound of the same norm.
        slack = 1e-5 if level == "rigorous" else 0.2
        assert abs(found["cuda"].per_operator[name] - norm) <= slack * norm


@pytest.mark.gpu
def test_settings_for_single_precision_do_not_reach_the_proofs() -> None:
    model, before = network(), torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        bound = lf.certified_bound(model, SHAPE, device="cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    cpu = lf.certified_bound(model, SHAPE)
    assert bound.total == pytest.approx(cpu.total, rel=1e-5)


@pytest.mark.gpu
def test_a_certificate_proved_on_a_gpu_holds_on_the_cpu(tmp_path: Path) -> None:
    model, data = network(), torch.rand(4, *SHAPE)
    certificate = lf.certify(
        model, data, input_shape=SHAPE, input_range=(0, 1), method="torus", device="cuda"
    )
    certificate.verify(model, data)
    weights = save_weights(model, tmp_path / "w.npz", input_shape=SHAPE)
    assert check.check(certificate.save(tmp_path / "c.npz"), weights) == []
