# SPDX-License-Identifier: MIT
"""The table of error rules: how far the float64 result of one ATen call may be from the real one.

Parallel to :mod:`lmtfast.rules`. Nothing has a default: a call without an error rule is refused.

A traced tensor is a :class:`Enclosed`. Its computed value differs from the value of the exact real
function by ``d + R(b)``: ``|d| <= local`` in every entry, ``R`` the linear map from the last *base*
(the point where linearity ended), and ``||b||_2 <= base`` per sample. Without operator norms
nothing
ever ends: ``base`` stays 0 and ``local`` carries the whole error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lmtfast.builder import Value
from lmtfast.errors import NotCertifiedError
from lmtfast.rules.copying import VIEWS
from lmtfast.verified.rounding import UNDERFLOW, UNIT_ROUNDOFF, gamma_up

# 1 + 32 u: covers thirty roundings of an expression with nonnegative terms.
INFLATION = 1.0 + 2.0**-48


@dataclass(eq=False)
class Enclosed:
    """A computed tensor and what separates it from the exact one.

    Shapes ``(N, ...)``, ``(N, ...)`` and ``(N,)``; float64. ``traced`` is the same tensor in the
    bound graph.
    """

    value: Tensor
    local: Tensor
    base: Tensor
    traced: Value | None = field(default=None, repr=False)


def length_up(errors: Tensor) -> Tensor:
    """Upper bound on the L2 length of every sample's entries. ``(N, ...)`` to ``(N,)``."""
    flat = errors.reshape(errors.shape[0], -1)
    # A square, at most n additions, a faithful root that counts twice: n + 3 roundings, and three
    # more of this line, all doubled; lost squares are below 2^-1022.
    growth = 1.0 + (flat.shape[1] + 16) * 2.0**-52
    return flat.square().sum(1).sqrt() * growth + (flat.shape[1] + 1) * 2.0**-500


def outward(errors: Tensor) -> Tensor:
    """Raise a computed sum or product of few nonnegative terms above its exact value."""
    return errors * INFLATION + UNDERFLOW


@dataclass(eq=False)
class ErrorCall:
    """One call of the program as an error rule sees it.

    Attributes:
        target: Name of the ATen overload.
        operation: The overload.
        arguments: Every schema argument by name; traced tensors are :class:`Enclosed`, constants
            are float64 tensors.
        name: Qualified name of the module the call came from.
        output: The result in the bound graph (the first one of several).
        constant: Lipschitz constant the rule table gave to a nonlinear call.
        region_norm: Upper bound on the norm of the linear map from a tensor's base to it; None
            where errors are carried entry by entry.
        bounded: Whether errors are asked for; without, only values mean anything.
    """

    target: str
    operation: Any
    arguments: dict[str, Any]
    name: str
    output: Value
    constant: float | None
    region_norm: Callable[[Value], float] | None
    bounded: bool = True

    def __getitem__(self, key: str) -> Any:
        return self.arguments[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.arguments.get(key, default)

    @property
    def source(self) -> Enclosed:
        """The one traced argument of a call that has one."""
        found = [a for a in self.arguments.values() if isinstance(a, Enclosed)]
        if len(found) != 1:
            raise self.refused(f"{len(found)} traced arguments")
        return found[0]

    @property
    def source_key(self) -> str:
        return next(k for k, a in self.arguments.items() if isinstance(a, Enclosed))

    def run(
        self,
        part: Callable[[Enclosed], Tensor] | None = None,
        override: Mapping[str, Any] | None = None,
    ) -> Any:
        """Execute the call on one part of every traced tensor, with some arguments replaced."""

        def fill(item: Any) -> Any:
            if isinstance(item, Enclosed):
                return item.value if part is None else part(item)
            return [fill(i) for i in item] if isinstance(item, (list, tuple)) else item

        arguments = {**self.arguments, **(override or {})}
        schema = self.operation._schema.arguments
        keyword = {a.name for a in schema if a.kwarg_only}
        positional = [fill(v) for k, v in arguments.items() if k not in keyword]
        # The program made memory contiguous for a view; here the strides may be others.
        operation = torch.ops.aten.reshape.default if self.target in VIEWS else self.operation
        return operation(*positional, **{k: fill(v) for k, v in arguments.items() if k in keyword})

    def carried(self, source: Enclosed) -> Tensor:
        """Length of the error that reaches the result's base from a source's base, ``(N,)``."""
        assert source.traced is not None
        if self.region_norm is None or self.output.base is source.traced.base:
            return source.base
        return outward(source.base * self.region_norm(source.traced))

    def linear(self, value: Tensor, local: Tensor) -> Enclosed:
        """Result of a linear call with one traced argument."""
        return Enclosed(value, local, self.carried(self.source))

    def nonlinear(self, value: Tensor, rounding: Tensor, spread: Tensor | None = None) -> Enclosed:
        """Result of a call with a Lipschitz constant: ``rounding`` is the call's own error.

        ``spread`` bounds, entry by entry, how the argument's error moves the result; by default it
        is the constant times the argument's error at the same place.
        """
        source, constant = self.source, self.constant
        if constant is None or not math.isfinite(constant):
            raise self.refused("its Lipschitz constant is unknown")
        if self.region_norm is None:
            moved = constant * source.local if spread is None else spread
            return Enclosed(value, outward(moved + rounding), source.base)
        total = outward(constant * (length_up(source.local) + self.carried(source)))
        return Enclosed(value, rounding, total)

    def summed(self, count: int, absolute: Mapping[str, Any] | None = None) -> Enclosed:
        """A sum of at most ``count`` products with constant factors; ``absolute`` holds their sizes
        (a function of gamma for a term that is no product).

        With S the call on absolute values, ``|fl(y) - y| <= gamma S(|x|)`` for any order of
        summation (Higham, Accuracy and Stability, 2nd edition, equation 3.5), and the argument's
        error adds ``S(local)``. Both are one call on ``gamma |x| + local``, whose own rounding is
        the factor ``1 + 4 gamma`` (at most count + 4 roundings in the call and three around it).
        """
        if not self.bounded:
            value = self.run()
            return Enclosed(value, torch.zeros_like(value), self.source.base)
        source, gamma = self.source, gamma_up(count + 4)
        if gamma > 2.0**-10:
            raise self.refused(f"a sum of {count} terms")
        mixed = torch.nextafter(
            gamma * source.value.abs() + source.local, torch.full((), math.inf).to(source.value)
        )
        sizes = {k: v(gamma) if callable(v) else v for k, v in (absolute or {}).items()}
        majorant = self.run(None, {self.source_key: mixed, **sizes})
        local = majorant * (1.0 + 4.0 * gamma) + (count + 4) * UNDERFLOW
        return self.linear(self.run(), local)

    def refused(self, reason: str) -> NotCertifiedError:
        return NotCertifiedError(
            "operations whose rounding error is known",
            f"{self.target}: {reason}",
            repr(self.name or "the model's forward"),
            "replace the layer by built-in ones, or state the radius as an estimate "
            "(lmtfast.margin.prop2_radius)",
        )


ErrorRule: TypeAlias = Callable[[ErrorCall], Any]
ERROR_RULES: dict[str, ErrorRule] = {}


def error_rule(*targets: str) -> Callable[[ErrorRule], ErrorRule]:
    """Register the error rule of one or more ATen overloads."""

    def add(rule: ErrorRule) -> ErrorRule:
        for target in targets:
            if target in ERROR_RULES:
                raise RuntimeError(f"two error rules for {target}")
            ERROR_RULES[target] = rule
        return rule

    return add


def rounded(value: Tensor, ulps: float = 1.0) -> Tensor:
    """Error bound of ``ulps`` roundings that end at ``value``, underflow included."""
    return value.abs() * (2.0 * ulps * UNIT_ROUNDOFF) + UNDERFLOW
