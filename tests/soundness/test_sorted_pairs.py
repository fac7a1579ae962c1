# SPDX-License-Identifier: MIT
"""A maximum beside a minimum is a sorted pair, of constant 1, only if both are of the same tensors.

Whatever stands between the second tensor and the minimum, the bound holds: sqrt(2) where it is
anything but a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmtfast as lf

SHAPE = (2, 2, 2)
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda b: b,
    "clone": lambda b: b.clone(),
    "expanded": lambda b: b.expand(-1, 1, 2, 2),
    "dropout": lambda b: F.dropout(b, 0.5, False),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda b: b.transpose(2, 3),
    "permuted": lambda b: b.permute(0, 1, 3, 2),
    "flipped": lambda b: b.flip(2),
    "rolled": lambda b: b.roll(1, 2),
    "turned": lambda b: torch.rot90(b, 1, (2, 3)),
    "indexed": lambda b: b[:, :, [1, 0]],
    "negated": lambda b: -b,
    "constant added": lambda b: b + 1,
    "constant subtracted": lambda b: b - 1,
    "from a constant": lambda b: 5 - b,
    "in place": lambda b: b.clone().add_(3),
    "padded": lambda b: F.pad(b[:, :, :, :1], (1, 0)),
    "clamped": lambda b: b.clamp(-1, 1),
    "lower triangle": lambda b: b.tril(),
}


class Pair(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        parts = torch.maximum(a, b), torch.minimum(a, self.between(b))
        return torch.cat(parts, 1).flatten(1)


def steepest(model: nn.Module, points: int = 12) -> float:
    """Largest norm of a Jacobian at random points, each the network's slope around it."""
    generator = torch.Generator().manual_seed(1)
    inputs = 3 * torch.randn(points, 1, *SHAPE, dtype=torch.float64, generator=generator)
    slopes = [torch.autograd.functional.jacobian(model, x).reshape(8, 8) for x in inputs]
    return max(float(torch.linalg.matrix_norm(j, 2)) for j in slopes)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_the_same_tensor(name: str) -> None:
    assert lf.certified_bound(Pair(COPIES[name]).eval(), SHAPE).total == 1.0


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_another(name: str) -> None:
    model = Pair(OTHERS[name]).eval()
    # Entries of a Jacobian are 0 and 1 or -1: rounding of its norm is far below 1/8.
    assert lf.certified_bound(model, SHAPE).total >= 1.4142135 >= steepest(model) - 0.125 > 1.125
