# SPDX-License-Identifier: MIT
"""The power iterates of a network in one packed buffer: the only mutable numerics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn


class PowerState(nn.Module):
    """Iterates of all operators, saved and loaded like any module's buffers.

    Args:
        sizes: Number of entries per operator.
        dtype: float32, or float64 for float64 weights.
        device: Where the weights are.
        seed: Seed of the Gaussian start.

    Guarantee:
        None. The iterates only ever produce estimates; certificates do not read them.
    """

    iterates: Tensor
    steps: Tensor

    def __init__(
        self, sizes: Sequence[int], *, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.offsets = (0, *accumulate(self.sizes))
        packed = torch.zeros(self.offsets[-1], dtype=dtype, device=device)
        self.register_buffer("iterates", packed)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.reseed(seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PowerState:
        """Follow a module that is moved, but stay float32 where it becomes float16 or bfloat16."""
        super()._apply(fn, recurse)
        if self.iterates.dtype in (torch.float16, torch.bfloat16):
            self.iterates = self.iterates.float()
        return self

    def reseed(self, seed: int) -> None:
        """Start again from independent Gaussian vectors of unit length."""
        generator = torch.Generator("cpu").manual_seed(seed)
        parts = []
        for size in self.sizes:
            part = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
            parts.append(part / part.norm().clamp_min(torch.finfo(torch.float64).tiny))
        packed = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device="cpu")
        if not self.iterates.is_meta:
            self.iterates.copy_(packed)
            self.steps.zero_()

    def slice(self, index: int) -> Tensor:
        """The iterate of one operator, a view. Shape ``(sizes[index],)``."""
        return self.iterates[self.offsets[index] : self.offsets[index + 1]]

    @torch.no_grad()
    def advance(self, iterates: Tensor) -> None:
        """Replace all iterates in one write. Shape ``(sum(sizes),)``."""
        self.iterates.copy_(iterates)
        self.steps.add_(1)
