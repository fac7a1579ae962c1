# SPDX-License-Identifier: MIT
"""An arithmetic that errs as far as the proofs allow, wherever that hides a norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmtfast.verified import arithmetic

UNIT = 2.0**-53
# Of the allowed error; the rest is left to what the processor's own sums round.
SHARE = 0.75
# Shorter sums have no room beside the processor's own rounding.
LEAST_TERMS = 4

# From a computed result and the largest error of each entry to the error that is made.
Aim = Callable[[Tensor, Tensor], Tensor]


def towards_zero(result: Tensor, reach: Tensor) -> Tensor:
    return -result.clamp(-reach, reach)


class HostileProducts(TorchFunctionMode):
    """Every float64 matrix product of k terms errs, entry by entry, by almost ``k u |A| |B|``.

    That is what a sum of k products in the worst order may do, so any proof that claims to hold
    for products summed in any order has to hold under it.

    Args:
        aim: Which error to make; by default every result shrinks as far as it may.
    """

    def __init__(self, aim: Aim = towards_zero) -> None:
        super().__init__()
        self.aim = aim

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.matmul:
            return self._spoiled(result, args[0], args[1])
        if func is torch.Tensor.addmm_:
            return self._spoiled(result, args[1], args[2])
        return result

    def _spoiled(self, result: Tensor, left: Tensor, right: Tensor) -> Tensor:
        terms = left.shape[-1]
        if result.dtype != torch.float64 or min(left.ndim, right.ndim) < 2 or terms < LEAST_TERMS:
            return result
        reach = SHARE * terms * UNIT * (left.abs() @ right.abs())
        return result.add_(self.aim(result, reach))


class HostileSums(TorchFunctionMode):
    """Every float64 sum of k nonnegative terms loses almost ``(k - 1) u`` of itself."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.sum or result.dtype != torch.float64 or not result.numel():
            return result
        terms = args[0].numel() // result.numel()
        return result * (1.0 - SHARE * (terms - 1) * UNIT) if terms >= LEAST_TERMS else result


@contextmanager
def hostile(aim: Aim = towards_zero) -> Iterator[None]:
    """Hostile products inside; the self-test, which multiplies integers, would notice them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "_self_test_once", lambda device: None)
        with HostileProducts(aim):
            yield
