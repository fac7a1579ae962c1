# SPDX-License-Identifier: MIT
"""One call of an error rule, without a model: the arguments and what they carry are chosen."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from lmtfast.builder import Base, Origin, Value
from lmtfast.enclosure.registry import ERROR_RULES, Enclosed, ErrorCall

UNIT = Fraction(1, 2**53)
# Beside a bound: how much larger than what is exactly needed it may be, relative and absolute.
LOOSE, TINY = 1 + Fraction(1, 2**40), Fraction(1, 2**900)


def fresh(*shape: int) -> Value:
    base = Base(Origin(), 0, shape)
    return Value(base, base)


def enclosed(
    value: Tensor, local: Tensor | float = 0.0, base: float = 0.0, traced: Value | None = None
) -> Enclosed:
    """Shapes ``(N, ...)``; an error per entry, and a length that every sample carries."""
    value = value.double()
    errors = torch.as_tensor(local, dtype=torch.float64).expand(value.shape).clone()
    lengths = torch.full((len(value),), base, dtype=torch.float64)
    return Enclosed(value, errors, lengths, traced or fresh(*value.shape[1:]))


def call_of(
    target: str,
    *positional: Any,
    constant: float | None = None,
    norm: Callable[[Value], float] | None = None,
    output: Value | None = None,
    **named: Any,
) -> ErrorCall:
    """The call of an overload; its result starts a base of its own unless ``output`` says more."""
    namespace, name, overload = target.split(".")
    operation = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(operation._schema.arguments):
        if i < len(positional):
            bound[argument.name] = positional[i]
        elif argument.name in named:
            bound[argument.name] = named[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return ErrorCall(target, operation, bound, "layer", output or fresh(1), constant, norm)


def result_of(target: str, *positional: Any, **named: Any) -> Any:
    return ERROR_RULES[target](call_of(target, *positional, **named))


def fractions(tensor: Tensor | float) -> list[Fraction]:
    return [Fraction(v) for v in torch.as_tensor(tensor, dtype=torch.float64).reshape(-1).tolist()]


def is_close_above(found: Tensor, least: list[Fraction]) -> bool:
    """No entry below what it has to be, and none far above."""
    pairs = zip(fractions(found), least, strict=True)
    return all(w <= f <= w * LOOSE + TINY for f, w in pairs)


def are_lengths(found: Tensor, squares: list[Fraction]) -> bool:
    """The same of the roots of sums of squares."""
    pairs = zip(fractions(found), squares, strict=True)
    return all(w <= f**2 <= w * LOOSE**2 + TINY for f, w in pairs)
