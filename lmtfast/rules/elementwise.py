# SPDX-License-Identifier: MIT
"""Nonlinearities with their exact global Lipschitz constants, rounded up to a double."""

from __future__ import annotations

import math
from fractions import Fraction

from lmtfast.builder import Value
from lmtfast.rules.registry import TracedCall, operation_rule

# Largest slopes, from the zero of the second derivative (40 digits), rounded up:
# GELU: Phi(sqrt 2) + sqrt(2) phi(sqrt 2) = (1 + erf(1)) / 2 + exp(-1) / sqrt(pi).
GELU_SLOPE = 1.1289041451851550
GELU_TANH_SLOPE = 1.1289930686587720  # at x = 1.41850...
SILU_SLOPE = 1.0998393201288670  # at x = 2.39935...
MISH_SLOPE = 1.0884981612517280  # at x = 1.49057...
SELU_SLOPE = 1.7580993408473770  # scale * alpha, Klambauer et al. (2017)

CONSTANT_ONE = (
    "aten.relu.default", "aten.relu6.default", "aten.tanh.default", "aten.hardtanh.default",
    "aten.abs.default", "aten.sin.default", "aten.cos.default", "aten.atan.default",
    "aten.log_sigmoid.default", "aten.clamp_min.default", "aten.clamp_max.default",
    "aten.erf.default",
)  # fmt: skip


def _apply(call: TracedCall, constant: float) -> Value:
    value = call.value("self")
    rule = call.target.split(".")[1]
    return call.builder.nonlinear(value, constant, call.out_shape, (call.name, rule))


@operation_rule(*CONSTANT_ONE[:-1])
def one(call: TracedCall) -> Value:
    return _apply(call, 1.0)


@operation_rule("aten.erf.default")
def erf(call: TracedCall) -> Value:
    return _apply(call, math.nextafter(2.0 / math.sqrt(math.pi), math.inf))


@operation_rule("aten.clamp.default")
def clamp(call: TracedCall) -> Value:
    return _apply(call, 1.0)


@operation_rule("aten.sigmoid.default")
def sigmoid(call: TracedCall) -> Value:
    return _apply(call, 0.25)


@operation_rule("aten.hardsigmoid.default")
def hardsigmoid(call: TracedCall) -> Value:
    return _apply(call, math.nextafter(1.0 / 6.0, math.inf))


@operation_rule("aten.hardswish.default")
def hardswish(call: TracedCall) -> Value:
    return _apply(call, 1.5)


@operation_rule("aten.silu.default")
def silu(call: TracedCall) -> Value:
    return _apply(call, SILU_SLOPE)


@operation_rule("aten.mish.default")
def mish(call: TracedCall) -> Value:
    return _apply(call, MISH_SLOPE)


@operation_rule("aten.gelu.default")
def gelu(call: TracedCall) -> Value:
    slopes = {"none": GELU_SLOPE, "tanh": GELU_TANH_SLOPE}
    if call["approximate"] not in slopes:
        raise call.unsupported(f"approximate={call['approximate']!r}")
    return _apply(call, slopes[call["approximate"]])


@operation_rule("aten.selu.default")
def selu(call: TracedCall) -> Value:
    return _apply(call, SELU_SLOPE)


@operation_rule("aten.leaky_relu.default")
def leaky_relu(call: TracedCall) -> Value:
    return _apply(call, max(1.0, abs(float(call["negative_slope"]))))


@operation_rule("aten.elu.default")
def elu(call: TracedCall) -> Value:
    # Slope `scale` for x > 0; scale * alpha * input_scale just below zero.
    alpha, scale, input_scale = (Fraction(call[k]) for k in ("alpha", "scale", "input_scale"))
    if input_scale < 0:
        raise call.unsupported(f"input_scale={call['input_scale']} has no global constant")
    return _apply(call, _round_up(abs(scale) * max(Fraction(1), abs(alpha) * input_scale)))


def _round_up(exact: Fraction) -> float:
    nearest = float(exact)
    return nearest if Fraction(nearest) >= exact else math.nextafter(nearest, math.inf)


@operation_rule("aten.celu.default")
def celu(call: TracedCall) -> Value:
    # max(0, x) + min(0, alpha (exp(x / alpha) - 1)): slope 1 from both sides of zero for alpha > 0;
    # for alpha < 0 the exponential grows without bound.
    if not float(call["alpha"]) > 0:
        raise call.unsupported(f"alpha={call['alpha']} has no global constant")
    return _apply(call, 1.0)


@operation_rule("aten.softplus.default")
def softplus(call: TracedCall) -> Value:
    # The call switches to the identity where beta x > threshold, a jump of
    # log1p(exp(-threshold)) / beta: a rounding error only if both bounds below hold.
    beta, threshold = float(call["beta"]), float(call["threshold"])
    if not (0 < beta < math.inf and threshold >= 20.0 and beta * threshold >= 20.0):
        raise call.unsupported(
            f"beta={beta}, threshold={threshold}: no global constant unless beta > 0, and the "
            "switch to the identity is a visible jump unless threshold and beta * threshold "
            "are at least 20"
        )
    return _apply(call, 1.0)


@operation_rule("aten.prelu.default", "aten._prelu_kernel.default")
def prelu(call: TracedCall) -> Value:
    return call.builder.learned_slope(
        call.value("self"), call.name or "prelu", call.weight("weight")
    )


@operation_rule("aten.sort.default", "aten.sort.stable", "aten.topk.default")
def sort(call: TracedCall) -> tuple[Value, None]:
    # Sorting is a selection of permutations, each an isometry; the values are continuous in x.
    value = call.value("self")
    rank = len(value.shape) + 1
    if call["dim"] % rank == 0:
        raise call.unsupported("it mixes the samples of a batch (dim 0)")
    name = (call.name, call.target.split(".")[1])
    return call.builder.nonlinear(value, 1.0, call.out_shape, name), None
