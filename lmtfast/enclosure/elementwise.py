# SPDX-License-Identifier: MIT
"""Error rules of nonlinearities: constant times the argument's error, plus the call's own rounding.

The own rounding rests on one assumption, written into every certificate (A5): float64 ``exp``,
``expm1``, ``log1p``, ``tanh``, ``erf``, ``atan``, ``sin`` and ``cos`` are accurate to 4 units in
the last place, or to 2^-1000 where they underflow. PyTorch takes them from SLEEF (1 ulp), MKL VML
in its high-accuracy mode (1 ulp), the C library or CUDA (2 ulp).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmtfast.enclosure.joining import EXTREMA
from lmtfast.enclosure.registry import Enclosed, ErrorCall, error_rule, rounded

# Roundings of a composite formula: one function of 4 ulp, its argument's and three operations.
FEW = 8.0
# A formula x * g(x) whose factor g, between -1.1 and 1.1, may cancel: absolute error relative to
# |x|.
GATED = 32.0
# Beyond this argument the reduction of sin and cos is not relied on.
LARGE_ANGLE = 2.0**20


@dataclass(frozen=True)
class Accuracy:
    """Own rounding of a function in float64: at most this many units, of 2^-53, of its value's
    size, of its argument's and of an absolute size, twice over as in :func:`rounded`."""

    value: float = 0.0
    argument: float = 0.0
    absolute: float = 0.0

    def bound(self, x: Tensor, y: Tensor) -> Tensor:
        parts = ((y, self.value), (x, self.argument), (torch.ones_like(y), self.absolute))
        found = [rounded(size, units) for size, units in parts if units]
        return sum(found[1:], found[0]) if found else torch.zeros_like(y)

    @property
    def exact(self) -> bool:
        return self == Accuracy()


ACCURACY: dict[str, Accuracy] = {
    "aten.relu.default": Accuracy(), "aten.relu6.default": Accuracy(),
    "aten.hardtanh.default": Accuracy(), "aten.abs.default": Accuracy(),
    "aten.clamp.default": Accuracy(), "aten.clamp_min.default": Accuracy(),
    "aten.clamp_max.default": Accuracy(),
    "aten.tanh.default": Accuracy(FEW), "aten.sigmoid.default": Accuracy(FEW),
    "aten.atan.default": Accuracy(FEW), "aten.erf.default": Accuracy(FEW),
    "aten.log_sigmoid.default": Accuracy(2 * FEW),
    # A value is at most 1, so an argument beyond LARGE_ANGLE pays for any error there.
    "aten.sin.default": Accuracy(FEW, 2.0**53 / LARGE_ANGLE),
    "aten.cos.default": Accuracy(FEW, 2.0**53 / LARGE_ANGLE),
    "aten.leaky_relu.default": Accuracy(2.0),
    # clamp(x + 3, 0, 6) / 6: the sum is at most 6 where it is not clamped.
    "aten.hardsigmoid.default": Accuracy(absolute=FEW),
    "aten.hardswish.default": Accuracy(argument=GATED),
    "aten.silu.default": Accuracy(argument=GATED), "aten.mish.default": Accuracy(argument=GATED),
    "aten.gelu.default": Accuracy(argument=GATED),
    "aten.elu.default": Accuracy(FEW), "aten.selu.default": Accuracy(FEW),
    "aten.celu.default": Accuracy(FEW),
    "aten.softplus.default": Accuracy(FEW), "aten.prelu.default": Accuracy(1.0),
    "aten._prelu_kernel.default": Accuracy(1.0),
}  # fmt: skip
SELECTIONS = (
    "aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default",
    "aten.max_pool2d_with_indices.default", "aten.max_pool3d_with_indices.default",
    "aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default",
    "aten.adaptive_max_pool3d.default",
    "aten.amax.default", "aten.amin.default", "aten.max.dim", "aten.min.dim",
    "aten.sort.default", "aten.sort.stable", "aten.topk.default",
)  # fmt: skip
EXPONENTIALS = ("aten.elu.default", "aten.selu.default", "aten.celu.default")


def accuracy(call: ErrorCall) -> Accuracy:
    """The call's own rounding; selections have none."""
    if call.target in SELECTIONS or call.target in EXTREMA:
        return Accuracy()
    if call.target not in ACCURACY:
        raise call.refused("its accuracy is not known")
    found = ACCURACY[call.target]
    if call.target == "aten.softplus.default":
        return replace(found, absolute=FEW / float(call["beta"]))
    if call.target not in EXPONENTIALS:
        return found
    # scale * alpha * expm1(input_scale * x): a factor of at most 1 for negative arguments.
    if not float(call.get("input_scale", 1.0)) > 0:
        raise call.refused(f"input_scale={call.get('input_scale')}")
    size = abs(float(call.get("alpha", 2.0)) * float(call.get("scale", 1.0)))
    return replace(found, absolute=FEW * size)


@error_rule(*(t for t in ACCURACY if "softplus" not in t and "prelu" not in t))
def elementwise(call: ErrorCall) -> Enclosed:
    value = call.run()
    own = accuracy(call).bound(call.source.value, value)
    if call.target in ("aten.sin.default", "aten.cos.default"):
        small = call.source.value.abs() <= LARGE_ANGLE
        own = torch.where(small, rounded(value, FEW), 2.0)
    return call.nonlinear(value, own)


@error_rule("aten.softplus.default")
def softplus(call: ErrorCall) -> Enclosed:
    # The real softplus, without the module's switch to the identity above the threshold.
    x, beta = call.source.value, float(call["beta"])
    positive = x.clamp_min(0.0)
    value = positive + torch.log1p(torch.exp(-(beta * x).abs())) / beta
    return call.nonlinear(value, accuracy(call).bound(x, value))


@error_rule("aten.prelu.default", "aten._prelu_kernel.default")
def prelu(call: ErrorCall) -> Enclosed:
    value = call.run()
    call.constant = max(1.0, float(call["weight"].abs().max()))
    return call.nonlinear(value, accuracy(call).bound(call.source.value, value))


# -- selections: every output is one input, chosen by value
# ------------------------------------------


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


@error_rule(*(t for t in SELECTIONS if "max_pool" in t))
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
