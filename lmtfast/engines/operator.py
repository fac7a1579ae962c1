# SPDX-License-Identifier: MIT
"""Engine ``operator``: power iteration on the true zero-padded, strided operator.

The method of the LMT paper (Alg. 2), on the layer's real height and width and with batch norm
folded in: ``u = A v / ||A v||``, ``v <- A^T u / ||A^T u||``. The paper reads ``sigma = ||A v||``
before the step, this reads ``||A^T u||`` at its end (docs/adr/0013). A lower estimate of the
spectral norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lmtfast.backends import reference
from lmtfast.engines.step import Saved, Step, length, unit
from lmtfast.graph import Region, Shape, WeightRef
from lmtfast.verified.lanczos import top_eigenvector
from lmtfast.weights import Weights

# Relative error of sigma^2 at which Lanczos stops: far below what a training step changes.
RESCAN_TOLERANCE = 1e-9


@dataclass(frozen=True)
class OperatorEngine:
    """The engine over one backend's ``matvec``, ``rmatvec`` and ``weight_vjp``."""

    backend: ModuleType = reference
    name: str = "operator"

    def refusal(self, region: Region) -> str | None:
        """Why the engine cannot run the region, or None: it can run every region."""
        return None

    def state_size(self, region: Region) -> int:
        """Entries of the iterate ``v``: one input of the operator."""
        return reference.entries(region)

    def saved_shapes(self, region: Region) -> tuple[Shape, ...]:
        """Shapes of the image ``u`` and of the iterate ``v``."""
        v = reference.vector_shape(region)
        return (region.out_shape if v == region.in_shape else region.out_shape[-1:], v)

    def step(self, region: Region, weights: Weights, state: Tensor, *, update: bool) -> Step:
        """One power step on the packed iterate; returns sigma, the new iterate and ``(u, v)``.

        With ``update``, sigma is read at the end of the step: ``||A^T u||`` is never below
        ``||A v||`` and costs nothing more, since ``A^T u`` is the new iterate anyway. Without, it
        is ``||A v||``.
        """
        v = unit(state).reshape(reference.vector_shape(region))
        image = self.backend.matvec(region, weights, v)
        u = unit(image)
        if not update:
            return Step(length(image), state, (u, v))
        back = self.backend.rmatvec(region, weights, u)
        # Weights that are zero now (a residual branch at its start) must not end the iteration.
        v = torch.where((back != 0).any(), unit(back), v)
        return Step(length(back), v.reshape(-1), (u, v))

    def rescan(self, region: Region, weights: Weights, state: Tensor) -> Tensor:
        """A converged iterate from a fresh start, by Lanczos on ``A^T A``; syncs with the host."""
        shape = reference.vector_shape(region)

        def gram(x: Tensor) -> Tensor:
            image = self.backend.matvec(region, weights, x.reshape(shape))
            back: Tensor = self.backend.rmatvec(region, weights, image)
            return back.reshape(1, -1)

        return top_eigenvector(
            gram, state.numel(), dtype=state.dtype, device=state.device, tolerance=RESCAN_TOLERANCE
        )

    def vjp(
        self, region: Region, tensors: dict[WeightRef, Tensor], saved: Saved
    ) -> dict[WeightRef, Tensor]:
        """Gradient of sigma in the weights: ``u v^T`` seen through the operator."""
        u, v = saved
        gradients: dict[WeightRef, Tensor] = self.backend.weight_vjp(region, tensors, u, v)
        return gradients
