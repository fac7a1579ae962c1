# SPDX-License-Identifier: MIT
"""Small classifiers, bounds made by hand, exact radii of linear classifiers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.bound import LipschitzBound

UNIT = (0.0, 1.0)


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Module:
    matrix = torch.tensor(weight, dtype=torch.float64)
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        layer.weight.copy_(matrix)
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return layer.eval()


def certified(model: nn.Module, x: Any, y: Any = None, low_high: Any = UNIT, **options: Any) -> Any:
    shape = tuple(x.shape[1:])
    return lf.certify(model, (x, y), input_shape=shape, input_range=low_high, **options)


def hand_made(weight: Tensor, features: float = 1.0, **fields: Any) -> LipschitzBound:
    values: dict[str, Any] = {
        "total": features,
        "features": features,
        "per_operator": {},
        "level": "rigorous",
        "slack": 0.0,
        "method": "by hand",
        "head_weight": weight,
        "classes": weight.shape[0],
    }
    return LipschitzBound(**{**values, **fields})


def exact_radius_squared(weight: Tensor, bias: Tensor, x: Tensor) -> tuple[int, Fraction]:
    """Of a linear classifier: predicted class and squared distance to the nearest other class."""
    rows = [[Fraction(v) for v in row] for row in weight.tolist()]
    point = [Fraction(v) for v in x.tolist()]
    logits = [
        sum((a * b for a, b in zip(row, point, strict=True)), Fraction(v))
        for row, v in zip(rows, bias.tolist(), strict=True)
    ]
    best = max(range(len(rows)), key=lambda k: logits[k])
    squares = []
    for j, row in enumerate(rows):
        if j != best:
            length = sum((a - b) ** 2 for a, b in zip(rows[best], row, strict=True))
            squares.append((logits[best] - logits[j]) ** 2 / length)
    return best, min(squares)
