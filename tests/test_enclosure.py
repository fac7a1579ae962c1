# SPDX-License-Identifier: MIT
"""Logit enclosures against 60-digit arithmetic: the exact value is inside, without tolerance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpmath import mp, mpf
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.enclosure import ERROR_RULES, LogitEnclosure, enclose
from lmtfast.errors import NotCertifiedError
from lmtfast.guarantee import plan_bound
from lmtfast.models import build_model
from lmtfast.plan import make_plan
from lmtfast.rules.registry import MODULE_RULES, OPERATION_RULES
from lmtfast.tracing import TracedModel, trace_model

mp.dps = 60

# -- the oracle: one sample, object arrays of 60-digit numbers
# ----------------------------------------


def exact(tensor: Tensor) -> np.ndarray:
    flat = [mpf(v) for v in tensor.detach().double().reshape(-1).tolist()]
    result = np.empty(len(flat), dtype=object)
    result[:] = flat
    return result.reshape(tuple(tensor.shape))


def moved(call: Callable[[Tensor], Tensor], x: np.ndarray) -> np.ndarray:
    """A call that only copies entries, carried out on their indices (0 stands for a zero)."""
    index = call(torch.arange(1, x.size + 1, dtype=torch.float64).reshape(1, *x.shape))[0].long()
    flat = np.concatenate([[mpf(0)], x.reshape(-1)])
    return flat[index.numpy()]


def convolved(x: np.ndarray, m: nn.Module) -> np.ndarray:
    """Convolution by its definition, on zero-padded input."""
    weight = exact(m.weight)
    axes = weight.ndim - 2
    pads = [(0, 0)] + [(p, p) for p in m.padding]
    x = np.pad(x, pads, constant_values=mpf(0))
    spans = [d * (k - 1) + 1 for d, k in zip(m.dilation, weight.shape[2:], strict=True)]
    size = [(n - s) // t + 1 for n, s, t in zip(x.shape[1:], spans, m.stride, strict=True)]
    out = np.empty((weight.shape[0], *size), dtype=object)
    per_group, per_out = weight.shape[1], weight.shape[0] // m.groups
    for o, *at in itertools.product(*map(range, out.shape)):
        g = o // per_out
        windows = [slice(a * t, a * t + s, d) for a, t, s, d in
                   zip(at, m.stride, spans, m.dilation, strict=True)]  # fmt: skip
        part = x[(slice(g * per_group, (g + 1) * per_group), *windows)]
        out[(o, *at)] = mpmath.fsum((part * weight[o]).reshape(-1))
    if m.bias is not None:
        out = out + exact(m.bias).reshape(-1, *(1,) * axes)
    return out


def conv_transposed(x: np.ndarray, m: nn.ConvTranspose2d) -> np.ndarray:
    """Scatter by definition; groups 1."""
    weight = exact(m.weight)
    (s, _), (p, _), (k, _), e = m.stride, m.padding, m.kernel_size, m.output_padding[0]
    n = x.shape[1]
    size = (n - 1) * s + k + e
    out = np.full((weight.shape[1], size, size), mpf(0), dtype=object)
    for i, a, b in itertools.product(range(x.shape[0]), range(n), range(n)):
        out[:, a * s : a * s + k, b * s : b * s + k] += weight[i] * x[i, a, b]
    out = out[:, p : size - p, p : size - p]
    return out + exact(m.bias).reshape(-1, 1, 1)


def normalised(x: np.ndarray, m: nn.BatchNorm2d) -> np.ndarray:
    shape = (-1, *(1,) * (x.ndim - 1))
    root = np.array([mpmath.sqrt(v + mpf(m.eps)) for v in exact(m.running_var)], dtype=object)
    gain = exact(m.weight) / root
    shifted = x - exact(m.running_mean).reshape(shape)
    return shifted * gain.reshape(shape) + exact(m.bias).reshape(shape)


def windows(x: np.ndarray, k: int, s: int) -> np.ndarray:
    size = [(n - k) // s + 1 for n in x.shape[1:]]
    out = np.empty((x.shape[0], *size), dtype=object)
    for c, i, j in itertools.product(*map(range, out.shape)):
        out[c, i, j] = x[c, i * s : i * s + k, j * s : j * s + k].reshape(-1)
    return out


def sigmoid(v: Any) -> Any:
    return 1 / (1 + mpmath.exp(-v))


def elu(v: Any, alpha: Any = 1) -> Any:
    return v if v > 0 else alpha * mpmath.expm1(v)


def gelu(v: Any) -> Any:
    return v * (1 + mpmath.erf(v / mpmath.sqrt(2))) / 2


def gelu_tanh(v: Any) -> Any:
    return v * (1 + mpmath.tanh(mpmath.sqrt(2 / mp.pi) * (v + mpf("0.044715") * v**3))) / 2


def clip(v: Any, low: Any, high: Any) -> Any:
    return min(max(v, mpf(low)), mpf(high))


SCALAR: dict[str, tuple[nn.Module, Callable[[Any], Any]]] = {
    "relu": (nn.ReLU(), lambda v: max(v, mpf(0))),
    "relu6": (nn.ReLU6(), lambda v: clip(v, 0, 6)),
    "hardtanh": (nn.Hardtanh(), lambda v: clip(v, -1, 1)),
    "tanh": (nn.Tanh(), mpmath.tanh),
    "sigmoid": (nn.Sigmoid(), sigmoid),
    "logsigmoid": (nn.LogSigmoid(), lambda v: -mpmath.log1p(mpmath.exp(-v))),
    "softplus": (nn.Softplus(), lambda v: mpmath.log1p(mpmath.exp(v))),
    "softplus beta": (nn.Softplus(beta=2.0), lambda v: mpmath.log1p(mpmath.exp(2 * v)) / 2),
    "silu": (nn.SiLU(), lambda v: v * sigmoid(v)),
    "mish": (nn.Mish(), lambda v: v * mpmath.tanh(mpmath.log1p(mpmath.exp(v)))),
    "gelu": (nn.GELU(), gelu),
    "gelu tanh": (nn.GELU(approximate="tanh"), gelu_tanh),
    "elu": (nn.ELU(0.7), lambda v: elu(v, mpf(0.7))),
    "celu": (nn.CELU(0.7), lambda v: max(v, mpf(0)) + min(mpf(0), mpf(0.7) * mpmath.expm1(v / mpf(0.7)))),
    "selu": (nn.SELU(), lambda v: mpf(1.0507009873554804934193349852946)
             * elu(v, mpf(1.6732632423543772848170429916717))),
    "leaky relu": (nn.LeakyReLU(0.2), lambda v: v if v > 0 else mpf(0.2) * v),
    "hardsigmoid": (nn.Hardsigmoid(), lambda v: clip(v + 3, 0, 6) / 6),
    "hardswish": (nn.Hardswish(), lambda v: v * clip(v + 3, 0, 6) / 6),
}  # fmt: skip


class Call(nn.Module):
    """A function of one tensor with its oracle."""

    def __init__(
        self, call: Callable[[Tensor], Tensor], oracle: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        super().__init__()
        self.call, self.oracle = call, oracle

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, kind: str = "add") -> None:
        super().__init__()
        self.branch, self.kind = branch, kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.kind == "cat":
            return torch.cat([x, y], 1)
        if self.kind == "maximum":
            return torch.maximum(x, y)
        if self.kind == "sub":
            return torch.sub(x, y, alpha=0.3)
        return x + y

    def oracle(self, x: np.ndarray) -> np.ndarray:
        y = evaluate(self.branch, x)
        if self.kind == "cat":
            return np.concatenate([x, y])
        if self.kind == "maximum":
            return np.maximum(x, y)
        return x - mpf(0.3) * y if self.kind == "sub" else x + y


def evaluate(m: nn.Module, x: np.ndarray) -> np.ndarray:
    if isinstance(m, nn.Sequential):
        for layer in m:
            x = evaluate(layer, x)
        return x
    if hasattr(m, "oracle"):
        return m.oracle(x)
    for module, function in SCALAR.values():
        if type(m) is type(module) and repr(m) == repr(module):
            return np.vectorize(function, otypes=[object])(x)
    if isinstance(m, nn.Linear):
        y = x @ exact(m.weight).T
        return y if m.bias is None else y + exact(m.bias)
    if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return convolved(x, m)
    if isinstance(m, nn.ConvTranspose2d):
        return conv_transposed(x, m)
    if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return normalised(x, m)
    if isinstance(m, nn.MaxPool2d):
        return np.vectorize(max, otypes=[object])(windows(x, m.kernel_size, m.stride))
    if isinstance(m, nn.AvgPool2d):
        mean = np.vectorize(lambda w: mpmath.fsum(w) / len(w), otypes=[object])
        return mean(windows(x, m.kernel_size, m.stride))
    if isinstance(m, nn.PReLU):
        slope = exact(m.weight).reshape(-1, *(1,) * (x.ndim - 1))
        return np.where(x > 0, x, x * slope)
    return moved(m, x)


def head(shape: tuple[int, ...], *layers: nn.Module) -> nn.Sequential:
    """The layers, flattened, with a linear head of three classes."""
    body = nn.Sequential(*layers)
    features = body.eval()(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


IMAGE = (2, 4, 4)
MATRIX = torch.full((3, 2), 0.3)


def networks() -> dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]]:
    conv = nn.Conv2d
    table: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
        "linear": ((6,), lambda: nn.Linear(6, 3)),
        "mlp": ((6,), lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))),
        "conv": (IMAGE, lambda: head(IMAGE, conv(2, 3, 3, padding=1), nn.ReLU())),
        "conv stride": (IMAGE, lambda: head(IMAGE, conv(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU())),
        "conv dilation": (IMAGE, lambda: head(IMAGE, conv(2, 2, 2, dilation=2), nn.ReLU())),
        "conv1d": ((2, 6), lambda: head((2, 6), nn.Conv1d(2, 3, 3), nn.ReLU())),
        "conv3d": ((1, 3, 3, 3), lambda: head((1, 3, 3, 3), nn.Conv3d(1, 2, 2), nn.ReLU())),
        "transposed": ((2, 3, 3), lambda: head((2, 3, 3), nn.ConvTranspose2d(2, 2, 3, 2, 1, 1), nn.ReLU())),
        "batch norm": (IMAGE, lambda: head(IMAGE, conv(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))),
        "batch norm 1d": ((6,), lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))),
        "max pool": (IMAGE, lambda: head(IMAGE, conv(2, 2, 1), nn.MaxPool2d(2, 1))),
        "average pool": (IMAGE, lambda: head(IMAGE, conv(2, 2, 1), nn.ReLU(), nn.AvgPool2d(3, 1))),
        "prelu": (IMAGE, lambda: head(IMAGE, conv(2, 2, 1), nn.PReLU(2, -1.5))),
        "residual": (IMAGE, lambda: head(IMAGE, Residual(nn.Sequential(conv(2, 2, 3, padding=1), nn.ReLU())))),
        "linear residual": (IMAGE, lambda: head(IMAGE, Residual(conv(2, 2, 3, padding=1)), nn.ReLU())),
        "difference": (IMAGE, lambda: head(IMAGE, Residual(nn.Sequential(conv(2, 2, 1), nn.Tanh()), "sub"))),
        "concatenation": (IMAGE, lambda: head(IMAGE, Residual(nn.Sequential(conv(2, 3, 1), nn.ReLU()), "cat"))),
        "maximum": (IMAGE, lambda: head(IMAGE, Residual(nn.Sequential(conv(2, 2, 1), nn.ReLU()), "maximum"))),
        "shuffle": ((4, 2, 2), lambda: head((4, 2, 2), nn.PixelShuffle(2), nn.ReLU(), nn.ZeroPad2d(1))),
        "reflect": (IMAGE, lambda: head(IMAGE, nn.ReflectionPad2d(1), conv(2, 2, 3), nn.ReLU())),
        "constants": (IMAGE, lambda: head(IMAGE, Call(lambda x: (x - 0.1307) / 0.3081, lambda x: (x - mpf(0.1307)) / mpf(0.3081)), conv(2, 2, 1), nn.ReLU(), Call(lambda x: 1.5 - x * 0.7, lambda x: mpf(1.5) - x * mpf(0.7)))),
        "sort": ((6,), lambda: nn.Sequential(nn.Linear(6, 8), Call(lambda x: x.sort(1)[0], lambda x: np.sort(x)), nn.Linear(8, 3))),
        "slices": ((6,), lambda: nn.Sequential(nn.Linear(6, 8), Call(lambda x: torch.cat([torch.maximum(x[:, :4], x[:, 4:]), torch.minimum(x[:, :4], x[:, 4:])], 1), lambda x: np.concatenate([np.maximum(x[:4], x[4:]), np.minimum(x[:4], x[4:])])), nn.Linear(8, 3))),
        "mean and sum": (IMAGE, lambda: nn.Sequential(conv(2, 3, 2), nn.ReLU(), Call(lambda x: x.mean((2, 3)) + x.sum((2, 3)), lambda x: x.reshape(3, -1).sum(1) * (1 + mpf(1) / 9)), nn.Linear(3, 3))),
        "matmul": ((2, 3), lambda: head((2, 3), Call(lambda x: x @ MATRIX, lambda x: x @ exact(MATRIX)), nn.ReLU())),
        "scale after head": ((4,), lambda: nn.Sequential(nn.Linear(4, 3), Call(lambda x: x * 0.1, lambda x: x * mpf(0.1)))),
        "no head": ((4,), lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh())),
    }  # fmt: skip
    for name, (module, _) in SCALAR.items():
        table[name] = (
            (5,), lambda module=module: nn.Sequential(nn.Linear(5, 6), module, nn.Linear(6, 3))
        )  # fmt: skip
    return table


NETWORKS = networks()


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
    return plan_bound(plan, model, level="rigorous").per_operator


def check_inside(model: nn.Module, x: Tensor, value: Tensor, error: Tensor) -> None:
    for sample, v, e in zip(x, value, error, strict=True):
        truth = evaluate(model, exact(sample))
        for t, a, b in zip(truth.reshape(-1), v.tolist(), e.tolist(), strict=True):
            assert abs(t - mpf(a)) <= mpf(b)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exact_logits_lie_inside(name: str) -> None:
    shape, build = NETWORKS[name]
    torch.manual_seed(len(name))
    model = randomised(build(), torch.float32)
    traced = trace_model(model, shape)
    norms = certified_norms(model, traced)
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
    model = build_model("wide-resnet", input_shape=shape, classes=10,
                        options={"depth": 16, "width": 1}).eval()  # fmt: skip
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
        for function, oracle in ((torch.tanh, mpmath.tanh), (torch.exp, mpmath.exp),
                                 (torch.erf, mpmath.erf), (torch.log1p, None),
                                 (torch.expm1, mpmath.expm1), (torch.atan, mpmath.atan),
                                 (torch.sin, mpmath.sin), (torch.cos, mpmath.cos)):  # fmt: skip
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
