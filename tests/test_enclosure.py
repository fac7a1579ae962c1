# SPDX-License-Identifier: MIT
"""Logit enclosures against 60-digit arithmetic: the exact value is inside, without tolerance."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from mpmath import mpf
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.enclosure import ERROR_RULES, LogitEnclosure, enclose
from lmtfast.errors import NotCertifiedError
from lmtfast.guarantee import plan_bound
from lmtfast.level import RIGOROUS
from lmtfast.models import build_model
from lmtfast.plan import make_plan
from lmtfast.rules.registry import MODULE_RULES, OPERATION_RULES
from lmtfast.tracing import TracedModel, trace_model
from tests.exact_networks import IMAGE, NETWORKS, evaluate, exact


def randomised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.running_mean.normal_()
                m.running_var.uniform_(0.01, 3.0)
                m.weight.normal_()
                m.bias.normal_()
            elif isinstance(m, nn.Linear):
                m.weight.mul_(2.0)
    return model.eval().to(dtype)


def certified_norms(model: nn.Module, traced: TracedModel) -> Mapping[str, Any]:
    plan = make_plan(model, traced.graph, engine="operator", backend="reference")
    return plan_bound(plan, model, level=RIGOROUS).per_operator


@functools.cache
def network(name: str) -> tuple[nn.Module, TracedModel, Mapping[str, Any]]:
    """One of the table, traced once for all tests, with guaranteed norms. Not to be changed."""
    shape, build = NETWORKS[name]
    torch.manual_seed(len(name))
    model = randomised(build(), torch.float32)
    traced = trace_model(model, shape)
    return model, traced, certified_norms(model, traced)


def check_inside(model: nn.Module, x: Tensor, value: Tensor, error: Tensor) -> None:
    for sample, v, e in zip(x, value, error, strict=True):
        truth = evaluate(model, exact(sample))
        for t, a, b in zip(truth.reshape(-1), v.tolist(), e.tolist(), strict=True):
            assert abs(t - mpf(a)) <= mpf(b)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exact_logits_lie_inside(name: str) -> None:
    model, traced, norms = network(name)
    shape = NETWORKS[name][0]
    x = torch.cat([torch.randn(2, *shape), 40 * torch.randn(1, *shape), torch.zeros(1, *shape)])
    for chosen in (None, norms):
        value, error = enclose(model, traced, x, norms=chosen)
        assert value.dtype == error.dtype == torch.float64
        check_inside(model, x, value, error)
        size = 1 + float(value.abs().max())
        assert float(error.max()) < 1e-9 * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_taken_exactly(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = randomised(NETWORKS["batch norm"][1](), dtype)
    x = torch.randn(2, *IMAGE, dtype=dtype)
    value, error = enclose(model, trace_model(model, IMAGE), x)
    check_inside(model, x, value, error)


@pytest.mark.parametrize("scale", [2.0**-140, 1e-30, 1e30, 1e60])
def test_extreme_scales(scale: float) -> None:
    torch.manual_seed(4)
    model = randomised(NETWORKS["mlp"][1](), torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[2].weight.div_(scale)
    x = torch.randn(3, 6, dtype=torch.float64)
    traced = trace_model(model, (6,))
    norms = certified_norms(model, traced)
    for chosen in (None, norms):
        value, error = enclose(model, traced, x, norms=chosen)
        check_inside(model, x, value, error)


def test_overflow_hidden_by_a_bounded_function_is_unknown() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Hardtanh(), nn.Linear(2, 2)).double().eval()
    with torch.no_grad():
        # 1.5e308 + 1.5e308 - 1.25e308 overflows on the way to 1.75e308 if the weights add first.
        model[0].weight.copy_(torch.tensor([[1.5e308, 1.5e308], [1.0, 1.0]], dtype=torch.float64))
        model[0].bias.copy_(torch.tensor([-1.25e308, 0.0], dtype=torch.float64))
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    value, error = enclose(model, trace_model(model, (2,)), x)
    assert value[0].isfinite().all()
    assert error[0].isinf().all() or math.isfinite(float(model[0](x)[0, 0]))
    assert error[1].isfinite().all()
    check_inside(model, x[1:], value[1:], error[1:])


def test_batches_do_not_leak_into_each_other() -> None:
    torch.manual_seed(0)
    model = randomised(NETWORKS["conv"][1](), torch.float64)
    x = torch.randn(3, *IMAGE, dtype=torch.float64)
    x[1, 0, 0, 0] = math.inf
    value, error = enclose(model, trace_model(model, IMAGE), x)
    assert error[1].isinf().any()
    check_inside(model, x[::2], value[::2], error[::2])


def test_catastrophic_cancellation_is_covered() -> None:
    """Paired weights of size 2^40: the logits lose forty bits, and the enclosure knows."""
    model = nn.Linear(4, 2).double().eval()
    with torch.no_grad():
        model.weight.copy_(
            torch.tensor([[2.0**40, -(2.0**40), 1.0, 0.0], [2.0**40, 0.0, -(2.0**40), 1.0]])
        )
        model.bias.fill_(1e6)
    torch.manual_seed(1)
    base = torch.rand(50, 1, dtype=torch.float64)
    x = base + 1e-12 * torch.randn(50, 4, dtype=torch.float64)
    value, error = enclose(model, trace_model(model, (4,)), x)
    check_inside(model, x, value, error)


def test_random_tiny_networks() -> None:
    for width in (1, 2, 5):
        torch.manual_seed(width)
        model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2)).double().eval()
        enclosures = LogitEnclosure(model, traced := trace_model(model, (3,)))
        assert traced.graph.head is not None
        x = torch.randn(100, 3, dtype=torch.float64) * 10.0 ** torch.randint(-5, 6, (100, 1))
        check_inside(model, x, *enclosures(x))


def test_tight_on_the_mnist_network() -> None:
    torch.manual_seed(0)
    model = build_model("kolter-wong", input_shape=(1, 28, 28), classes=10).eval()
    estimate = lf.NetworkBound(model, (1, 28, 28), engine="operator").converge(5)
    norms = {n: 1.1 * float(v) for n, v in estimate.per_operator.items()}
    x = torch.rand(8, 1, 28, 28)
    for chosen in (None, norms):
        value, error = enclose(model, trace_model(model, (1, 28, 28)), x, norms=chosen)
        assert float(error.max()) <= 1e-9 * float(value.abs().max())


def test_tight_in_a_deep_residual_network() -> None:
    """Entry by entry the error of a WRN-16-1 explodes; as a length it stays at rounding level
    times the bound, so that it costs a radius less than 1e-10."""
    torch.manual_seed(0)
    shape = (3, 8, 8)
    model = build_model(
        "wide-resnet", input_shape=shape, classes=10, options={"depth": 16, "width": 1}
    ).eval()
    bound = lf.NetworkBound(model, shape, engine="operator").converge(5)
    norms = {n: 1.2 * float(v) for n, v in bound.per_operator.items()}
    x = torch.rand(4, *shape)
    value, error = enclose(model, trace_model(model, shape), x, norms=norms)
    assert float(error.max()) <= 1e-10 * float(bound.total)
    plain = model(x).double()
    assert bool(((plain - value).abs() <= 1e-3 * value.abs().max()).all())


def test_parametrized_weights_are_taken_as_computed() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 2)).eval()
    x = torch.randn(3, 4)
    value, error = enclose(model, trace_model(model, (4,)), x)
    assert bool(((model(x).double() - value).abs() < 1e-5).all())
    assert bool((error < 1e-10).all())


class Wave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) * 0.5


def test_a_module_with_a_rule_of_its_own_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Wave(), nn.Linear(3, 2)).eval()
    lf.register_rule(Wave)(lambda module: 0.5)
    try:
        traced = trace_model(model, (3,))
        with pytest.raises(NotCertifiedError, match="rule of its own"):
            LogitEnclosure(model, traced)
    finally:
        MODULE_RULES.pop(Wave)


def test_an_operation_without_an_error_rule_is_refused() -> None:
    key = str(torch.ops.aten.special_erfc.default)

    class Erfc(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.erfc(x)

    lf.register_rule(torch.ops.aten.special_erfc.default)(
        lambda call: call.builder.nonlinear(call.value("self"), 1.2, call.out_shape, ("", "erfc"))
    )
    try:
        model = nn.Sequential(nn.Linear(3, 2), Erfc()).eval()
        with pytest.raises(NotCertifiedError, match="erfc"):
            LogitEnclosure(model, trace_model(model, (3,)))
    finally:
        OPERATION_RULES.pop(key)


def test_every_built_in_lipschitz_rule_has_an_error_rule() -> None:
    assert sorted(set(OPERATION_RULES) - set(ERROR_RULES)) == []


def test_functions_stay_within_the_assumed_accuracy() -> None:
    """A5 on this machine: a thousand arguments per function and range against 60 digits."""
    generator = torch.Generator().manual_seed(0)
    for spread in (1e-8, 1.0, 30.0):
        x = spread * torch.randn(1000, generator=generator, dtype=torch.float64)
        for function, oracle in (
            (torch.tanh, mpmath.tanh),
            (torch.exp, mpmath.exp),
            (torch.erf, mpmath.erf),
            (torch.log1p, None),
            (torch.expm1, mpmath.expm1),
            (torch.atan, mpmath.atan),
            (torch.sin, mpmath.sin),
            (torch.cos, mpmath.cos),
        ):
            argument = x.abs() if oracle is None else x
            for a, y in zip(argument.tolist(), function(argument).tolist(), strict=True):
                truth = (oracle or mpmath.log1p)(mpf(a))
                assert abs(mpf(y) - truth) <= 4 * mpf(2) ** -52 * abs(truth)


def test_no_cuda_library_is_asked_to_choose() -> None:
    seen: list[bool] = []
    model = nn.Linear(2, 2).eval()
    enclosure = LogitEnclosure(model, trace_model(model, (2,)))
    original = enclosure._run

    def spy(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(torch.backends.cudnn.enabled)
        return original(x)

    enclosure._run = spy  # type: ignore[method-assign]
    enclosure(torch.zeros(1, 2))
    assert seen == [False]
    assert F.relu(torch.zeros(1)).item() == 0.0


def test_calls_run_without_the_autocast_of_their_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves float64 alone today; an enclosure does not rest on that."""
    active = []
    own = ERROR_RULES["aten.relu.default"]

    def rule(call: Any) -> Any:
        active.append(torch.is_autocast_enabled("cpu"))
        return own(call)

    monkeypatch.setitem(ERROR_RULES, "aten.relu.default", rule)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    traced = trace_model(model, (2,))
    interpreter = LogitEnclosure(model, traced)
    with torch.autocast("cpu"):
        interpreter(torch.zeros(1, 2, dtype=torch.float64))
    assert active == [False]
