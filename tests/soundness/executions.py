# SPDX-License-Identifier: MIT
"""Other executions that conform to a profile, and a search for inputs that leave their class."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from lmtfast.judgement import squared_distance

Order = Callable[[np.ndarray], np.ndarray]


def summed(terms: Iterable[float]) -> float:
    """A sum from left to right, every addition rounded."""
    total = 0.0
    for term in terms:
        total = total + term
    return total


ORDERS: dict[str, Order] = {
    "as stored": lambda t: t,
    "backwards": lambda t: t[::-1],
    "small first": lambda t: t[np.argsort(np.abs(t), kind="stable")],
    "large first": lambda t: t[np.argsort(-np.abs(t), kind="stable")],
    "negative first": lambda t: np.sort(t),
    "shuffled": lambda t: np.array(random.Random(7).sample(t.tolist(), len(t))),
}


def executed(model: nn.Sequential, x: Tensor, order: Order, storage: type) -> np.ndarray:
    """Logits of one input through linear layers and ReLUs: every entry a float64 sum in one order,
    bias among its terms, rounded once to storage."""
    values = x.numpy().astype(storage).reshape(-1)
    for layer in model:
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().numpy().astype(np.float64)
            bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().numpy()
            products = weight * values.astype(np.float64)
            rows = np.concatenate([products, bias.astype(np.float64)[:, None]], 1)
            values = np.array([summed(order(row).tolist()) for row in rows]).astype(storage)
        elif isinstance(layer, nn.ReLU):
            values = np.maximum(values, storage(0))
        else:
            assert isinstance(layer, nn.Flatten)
    return np.asarray(values)


def keeps(logits: np.ndarray, own: int) -> bool:
    """Whether the class is kept strictly."""
    rivals = np.delete(logits, own)
    return bool(np.isfinite(logits).all() and (logits[own] > rivals).all())


def within(x: Tensor, direction: Tensor, radius: float, dtype: torch.dtype) -> Tensor:
    """The farthest representable point found along a direction whose exact distance is at most the
    radius."""
    scale = radius / float(direction.norm())
    point = (x + scale * direction).to(dtype).to(torch.float64)
    limit = Fraction(radius) ** 2
    while squared_distance(x, point) > limit:
        scale *= 1.0 - 2.0**-20
        point = (x + scale * direction).to(dtype).to(torch.float64)
    return point


def polished(
    x: Tensor,
    point: Tensor,
    slope: Tensor,
    radius: float,
    dtype: torch.dtype,
    flips: int = 12,
) -> list[Tensor]:
    """Rounding search of Jin, Ohrimenko and Rubinstein (arXiv:2205.10159): neighbours of a point by
    single steps of its coordinates that lower the margin and stay inside, judged in rationals."""
    found, limit, current = [point], Fraction(radius) ** 2, point
    order = torch.argsort(slope.abs().reshape(-1), descending=True)[:flips].tolist()
    for i in order:
        stored = current.to(dtype)
        step = torch.nextafter(stored, torch.full_like(stored, float("inf")))
        if slope.reshape(-1)[i] > 0:
            step = torch.nextafter(stored, torch.full_like(stored, -float("inf")))
        trial = current.reshape(-1).clone()
        trial[i] = step.reshape(-1)[i].to(torch.float64)
        trial = trial.reshape(current.shape)
        if squared_distance(x, trial) <= limit:
            current = trial
            found.append(trial)
    return found


def margin_slope(model: nn.Module, x: Tensor, own: int) -> Tensor:
    """Gradient of the smallest margin at a point, in float64."""
    point = x.clone().requires_grad_()
    logits = model(point[None])[0]
    rival = max((j for j in range(len(logits)) if j != own), key=lambda j: float(logits[j]))
    (slope,) = torch.autograd.grad(logits[own] - logits[rival], point)
    return slope
