# SPDX-License-Identifier: MIT
"""Error rules of nonlinearities: constant times the argument's error, plus the call's own rounding.

The own rounding rests on one assumption, written into every certificate (A5): float64 ``exp``,
``expm1``, ``log1p``, ``tanh``, ``erf``, ``atan``, ``sin`` and ``cos`` are accurate to 4 units in
the last place, or to 2^-1000 where they underflow. PyTorch takes them from SLEEF (1 ulp), MKL VML
in its high-accuracy mode (1 ulp), the C library or CUDA (2 ulp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmtfast.enclosure.registry import Enclosed, ErrorCall, error_rule, rounded

# Roundings of a composite formula: one function of 4 ulp, its argument's and three operations.
FEW = 8.0
# A formula x * g(x) whose factor g, between -1.1 and 1.1, may cancel: absolute error relative to
# |x|.
GATED = 32.0
# Beyond this argument the reduction of sin and cos is not relied on.
LARGE_ANGLE = 2.0**20

Accuracy = Callable[[ErrorCall, Tensor, Tensor], Tensor]


def _exact(call: ErrorCall, x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(y)


def _relative(ulps: float) -> Accuracy:
    return lambda call, x, y: rounded(y, ulps)


def _gated(call: ErrorCall, x: Tensor, y: Tensor) -> Tensor:
    return rounded(x, GATED)


def _angle(call: ErrorCall, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x.abs() > LARGE_ANGLE, 2.0, rounded(y, FEW))


def _hardsigmoid(call: ErrorCall, x: Tensor, y: Tensor) -> Tensor:
    # clamp(x + 3, 0, 6) / 6: the sum is at most 6 where it is not clamped.
    return rounded(torch.ones_like(y), FEW)


def _exponential(call: ErrorCall, x: Tensor, y: Tensor) -> Tensor:
    # scale * alpha * expm1(input_scale * x): a factor of at most 1 for negative arguments.
    size = abs(float(call.get("alpha", 2.0)) * float(call.get("scale", 1.0)))
    if not float(call.get("input_scale", 1.0)) > 0:
        raise call.refused(f"input_scale={call.get('input_scale')}")
    return rounded(y, FEW) + rounded(torch.full_like(y, size), FEW)


ACCURACY: dict[str, Accuracy] = {
    "aten.relu.default": _exact, "aten.relu6.default": _exact, "aten.hardtanh.default": _exact,
    "aten.abs.default": _exact, "aten.clamp.default": _exact, "aten.clamp_min.default": _exact,
    "aten.clamp_max.default": _exact,
    "aten.tanh.default": _relative(FEW), "aten.sigmoid.default": _relative(FEW),
    "aten.atan.default": _relative(FEW), "aten.erf.default": _relative(FEW),
    "aten.log_sigmoid.default": _relative(2 * FEW),
    "aten.sin.default": _angle, "aten.cos.default": _angle,
    "aten.leaky_relu.default": _relative(2.0),
    "aten.hardsigmoid.default": _hardsigmoid, "aten.hardswish.default": _gated,
    "aten.silu.default": _gated, "aten.mish.default": _gated, "aten.gelu.default": _gated,
    "aten.elu.default": _exponential, "aten.selu.default": _exponential,
    "aten.celu.default": _exponential,
}  # fmt: skip


@error_rule(*ACCURACY)
def elementwise(call: ErrorCall) -> Enclosed:
    value = call.run()
    return call.nonlinear(value, ACCURACY[call.target](call, call.source.value, value))


@error_rule("aten.softplus.default")
def softplus(call: ErrorCall) -> Enclosed:
    # The real softplus, without the module's switch to the identity above the threshold.
    x, beta = call.source.value, float(call["beta"])
    positive = x.clamp_min(0.0)
    value = positive + torch.log1p(torch.exp(-(beta * x).abs())) / beta
    own = rounded(value, FEW) + rounded(torch.full_like(x, 1.0 / beta), FEW)
    return call.nonlinear(value, own)


@error_rule("aten.prelu.default", "aten._prelu_kernel.default")
def prelu(call: ErrorCall) -> Enclosed:
    value = call.run()
    call.constant = max(1.0, float(call["weight"].abs().max()))
    return call.nonlinear(value, rounded(value))


# -- selections: every output is one input, chosen by value
# ------------------------------------------


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


MAX_POOLS = (
    "aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default",
    "aten.max_pool2d_with_indices.default", "aten.max_pool3d_with_indices.default",
    "aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default",
    "aten.adaptive_max_pool3d.default",
)  # fmt: skip


@error_rule(*MAX_POOLS)
def max_pool(call: ErrorCall) -> Any:
    result = call.run()
    value = _first(result)
    # |max a - max b| <= max |a - b| over the same window.
    chosen = call.nonlinear(value, torch.zeros_like(value), _first(call.run(lambda e: e.local)))
    return (chosen, None) if isinstance(result, (tuple, list)) else chosen


@error_rule("aten.amax.default", "aten.amin.default", "aten.max.dim", "aten.min.dim")
def extreme(call: ErrorCall) -> Any:
    result = call.run()
    value = _first(result)
    spread = call.source.local.amax(dim=call["dim"], keepdim=call["keepdim"])
    chosen = call.nonlinear(value, torch.zeros_like(value), spread)
    return (chosen, None) if isinstance(result, (tuple, list)) else chosen


@error_rule("aten.sort.default", "aten.sort.stable", "aten.topk.default")
def sort(call: ErrorCall) -> Any:
    # The k-th largest moves by no more than the largest change of any entry.
    value = call.run()[0]
    spread = call.source.local.amax(dim=call["dim"], keepdim=True).expand_as(value)
    return call.nonlinear(value, torch.zeros_like(value), spread), None
