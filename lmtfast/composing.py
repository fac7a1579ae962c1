# SPDX-License-Identifier: MIT
"""Runs a bound's tape: over tensors for training, over floats rounded outward for certificates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmtfast.graph import Instruction
from lmtfast.verified.rounding import add_up, hypot_up, mul_up


def compose(tape: Sequence[Instruction], sigmas: Tensor) -> list[Tensor | float]:
    """Value of every instruction; differentiable in ``sigmas``. Shape ``(R,)``."""
    sigma = sigmas.unbind()

    def hypot(a: Any, b: Any) -> Any:
        # vector_norm has the subgradient 0 at the origin, where hypot would give NaN.
        return torch.linalg.vector_norm(torch.stack((as_scalar(a, sigmas), as_scalar(b, sigmas))))

    def largest(a: Any, b: Any) -> Any:
        return torch.maximum(as_scalar(a, sigmas), as_scalar(b, sigmas))

    return _run(tape, sigma, lambda a, b: a * b, lambda a, b: a + b, hypot, largest)


@torch.enable_grad()
def compose_with_jacobian(
    tape: Sequence[Instruction], sigmas: Tensor, outputs: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Values of some instructions ``(n,)`` and their derivatives in ``sigmas``, ``(n, R)``."""
    leaf = sigmas.detach().requires_grad_()
    results = compose(tape, leaf)
    values = [as_scalar(results[i], leaf) for i in outputs]
    rows = [
        torch.autograd.grad(v, leaf, retain_graph=True)[0] if v.requires_grad else leaf.detach() * 0
        for v in values
    ]
    return torch.stack(values).detach(), torch.stack(rows)


def compose_up(tape: Sequence[Instruction], sigmas: Sequence[float]) -> list[float]:
    """Value of every instruction, rounded up at each one: upper bounds in, upper bounds out."""
    return _run(tape, sigmas, mul_up, add_up, hypot_up, max)


def _run(
    tape: Sequence[Instruction],
    sigma: Sequence[Any],
    mul: Callable[[Any, Any], Any],
    add: Callable[[Any, Any], Any],
    hypot: Callable[[Any, Any], Any],
    largest: Callable[[Any, Any], Any],
) -> list[Any]:
    binary = {"mul": mul, "add": add, "hypot": hypot, "max": largest}
    values: list[Any] = []
    for step in tape:
        if step.op == "constant":
            values.append(step.args[0])
        elif step.op == "sigma":
            values.append(sigma[step.args[0]])
        else:
            a, b = (values[i] for i in step.args)
            values.append(binary[step.op](a, b))
    return values


def as_scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A tape value as a 0-dim tensor."""
    return value if isinstance(value, Tensor) else like.new_full((), float(value))


SQRT2_UP = math.nextafter(math.sqrt(2.0), math.inf)
