# SPDX-License-Identifier: MIT
"""What every engine returns from one step, and the registry of engines."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from lmtfast.graph import Region, Shape, WeightRef
from lmtfast.weights import Weights

Saved: TypeAlias = tuple[Tensor, ...]


class Step(NamedTuple):
    """``sigma`` (0-dim), the packed state after the step, and what the gradient needs."""

    sigma: Tensor
    state: Tensor
    saved: Saved


class Engine(Protocol):
    """A way to estimate the spectral norm of a region with a warm state. A module or an object."""

    name: str

    def refusal(self, region: Region) -> str | None: ...

    def state_size(self, region: Region) -> int: ...

    def step(self, region: Region, weights: Weights, state: Tensor, *, update: bool) -> Step: ...

    def rescan(self, region: Region, weights: Weights, state: Tensor) -> Tensor: ...

    def saved_shapes(self, region: Region) -> tuple[Shape, ...]: ...

    def vjp(
        self, region: Region, tensors: dict[WeightRef, Tensor], saved: Saved
    ) -> dict[WeightRef, Tensor]: ...


def length(x: Tensor) -> Tensor:
    """``||x||`` without overflow or underflow of the squares, and without a host sync."""
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    safe = largest.where(largest > 0, 1.0)
    return safe * (x / safe).norm()


def unit(x: Tensor) -> Tensor:
    """``x / ||x||``; zero stays zero. No ``eps`` is added anywhere: it would shrink small norms."""
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    scaled = x / largest.where(largest > 0, 1.0)
    norm = scaled.norm()
    return scaled / norm.where(norm > 0, 1.0)
