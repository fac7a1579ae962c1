# SPDX-License-Identifier: MIT
"""Random networks with every kind of join, slice and shared module, for the composition rules."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[list[Tensor]], Tensor]
SHAPES = ((4,), (6,), (2, 4), (4, 3), (3, 5))


def _activation(rng: random.Random) -> nn.Module:
    return rng.choice(
        [nn.ReLU(), nn.Tanh(), nn.LeakyReLU(-1.7), nn.Sigmoid(), nn.GELU(), nn.ELU(1.5), nn.SiLU(),
         nn.Softplus(), nn.Mish(), nn.SELU(), nn.Hardswish(), nn.LeakyReLU(2.5)]
    )  # fmt: skip


class RandomNetwork(nn.Module):
    """A straight-line program: every step reads earlier tensors; a head may follow."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.shape = rng.choice(SHAPES)
        self.modules_used = nn.ModuleList()
        self.steps: list[Step] = []
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = [self.shape]
        length = rng.randint(1, 9)
        while len(self.steps) < length:
            self._grow(rng.choice(GROWTHS))
        self.head: nn.Linear | None = None
        self.tail = ""
        if rng.random() < 0.6:
            self.head = nn.Linear(math.prod(self.shapes[-1]), rng.randint(2, 4)).double()
            self.tail = rng.choice(["", "", "scale", "per class", "negate", "double"])
            self.per_class = nn.Parameter(torch.randn(self.head.out_features).double())
        self.eval()

    def _grow(self, growth: Callable[[RandomNetwork, int], Step | None]) -> None:
        source = self.rng.randrange(max(0, len(self.shapes) - 4), len(self.shapes))
        step = growth(self, source)
        if step is None:
            return
        self.steps.append(step)
        self.names.append(f"{growth.__name__}({source})")
        with torch.no_grad():
            result = self.body(torch.zeros(2, *self.shape, dtype=torch.float64))
        self.shapes.append(tuple(result.shape[1:]))

    def add(self, module: nn.Module) -> nn.Module:
        module = module.double().eval()
        self.modules_used.append(module)
        return module

    def alike(self, source: int) -> int:
        return self.rng.choice([j for j, s in enumerate(self.shapes) if s == self.shapes[source]])

    def axis(self, source: int) -> int:
        return self.rng.randrange(len(self.shapes[source])) + 1

    def body(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step(values))
        return values[-1]

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.head is None:
            return y
        y = self.head(y.flatten(1))
        if self.tail == "scale":
            return y * 0.3
        if self.tail == "per class":
            return y * self.per_class
        if self.tail == "negate":
            return -y / 3
        return y + y if self.tail == "double" else y


def linear(net: RandomNetwork, i: int) -> Step:
    width = net.shapes[i][-1]
    layer = net.add(nn.Linear(width, net.rng.choice((width, net.rng.randint(1, 5)))))
    return lambda v: layer(v[i])


def activation(net: RandomNetwork, i: int) -> Step:
    layer = net.add(_activation(net.rng))
    return lambda v: layer(v[i])


def shared(net: RandomNetwork, i: int) -> Step | None:
    width = net.shapes[i][-1]
    fits = [m for m in net.modules_used if isinstance(m, nn.Linear) and m.in_features == width]
    if not fits:
        return None
    layer = net.rng.choice(fits)
    return lambda v: layer(v[i])


def combine(net: RandomNetwork, i: int) -> Step:
    j, a = net.alike(i), net.rng.choice((1.0, 2.0, -0.5, 0.3))
    kind = net.rng.choice(("add", "sub", "maximum", "minimum", "weighted"))
    if kind == "weighted":
        return lambda v: torch.add(0.7 * v[i], v[j], alpha=a)
    return lambda v: getattr(torch, kind)(v[i], v[j])


def concatenate(net: RandomNetwork, i: int) -> Step | None:
    axis, shape = net.axis(i), net.shapes[i]
    fits = [
        j for j, s in enumerate(net.shapes)
        if len(s) == len(shape)
        and all(a == b for k, (a, b) in enumerate(zip(s, shape, strict=True)) if k != axis - 1)
    ]  # fmt: skip
    others = [net.rng.choice(fits) for _ in range(net.rng.choice((1, 1, 2)))]
    if sum(net.shapes[j][axis - 1] for j in (i, *others)) > 10:
        return None
    return lambda v: torch.cat([v[j] for j in (i, *others)], axis)


def cut(net: RandomNetwork, i: int) -> Step:
    axis = net.axis(i)
    size = net.shapes[i][axis - 1]
    start = net.rng.randrange(size)
    stop = net.rng.randint(start + 1, size)
    return lambda v: v[i].narrow(axis, start, stop - start)


def min_max(net: RandomNetwork, i: int) -> Step | None:
    j, axis = net.alike(i), net.axis(i)
    if net.shapes[i][axis - 1] > 5:
        return None
    # No sorted pair where a constant comes between: both halves then grow along the same way.
    c = net.rng.choice((0.0, 0.0, 1.5))
    return lambda v: torch.cat([torch.maximum(v[i], v[j] + c), torch.minimum(v[j], v[i])], axis)


def branches(net: RandomNetwork, i: int) -> Step | None:
    """Two or three branches over slices that touch, overlap or nest."""
    axis = net.axis(i)
    size = net.shapes[i][axis - 1]
    if size < 2:
        return None
    cut_at = net.rng.randrange(1, size)
    second = max(0, cut_at - net.rng.choice((0, 0, 1)))
    f, g = net.add(_activation(net.rng)), net.add(_activation(net.rng))
    a, b = net.rng.choice((1.0, 2.0, -3.0)), net.rng.choice((1.0, 0.5, 4.0))
    joined, nested = net.rng.random() < 0.6, net.rng.random() < 0.4

    def step(v: Sequence[Tensor]) -> Tensor:
        left, right = v[i].narrow(axis, 0, cut_at), v[i].narrow(axis, second, size - second)
        if nested and size - second > 1:
            half = (size - second) // 2
            inner = torch.cat(
                [
                    f(right.narrow(axis, 0, half)),
                    right.narrow(axis, half, size - second - half) * b,
                ],
                axis,
            )
            return torch.cat([g(a * left), inner], axis)
        left, right = f(a * left), b * g(right)
        if joined:
            return torch.cat([right, left], axis)
        width = min(left.shape[axis], right.shape[axis])
        return torch.maximum(left.narrow(axis, 0, width), right.narrow(axis, 0, width))

    return step


def factor(net: RandomNetwork, i: int) -> Step:
    a = net.rng.choice((2.0, -1.0, 0.3, 0.1, 1.5))
    return net.rng.choice([lambda v: v[i] * a, lambda v: v[i] / (3 * a), lambda v: -v[i]])


def per_entry(net: RandomNetwork, i: int) -> Step:
    shape = net.shapes[i]
    ones = (1,) * (len(shape) - 1)
    shape = net.rng.choice((shape, (*ones, shape[-1]), (shape[0], *ones)))
    scale = net.add(_Tensor(torch.randn(shape)))
    return lambda v: v[i] * scale.value


def shift(net: RandomNetwork, i: int) -> Step:
    a = net.rng.choice((0.0, 1.0, -2.5))
    offset = net.add(_Tensor(torch.randn(net.shapes[i])))
    return net.rng.choice(
        [lambda v: v[i] + a, lambda v: a - v[i], lambda v: v[i] + offset.value, lambda v: v[i] - a]
    )


def clip(net: RandomNetwork, i: int) -> Step:
    a = net.rng.choice((0.0, 0.7, -0.2))
    offset = net.add(_Tensor(torch.randn(net.shapes[i])))
    return net.rng.choice(
        [
            lambda v: v[i].clamp(a - 1, a),
            lambda v: torch.maximum(v[i], offset.value),
            lambda v: torch.minimum(offset.value, v[i]),
            lambda v: v[i].clamp(min=a),
        ]
    )


def reorder(net: RandomNetwork, i: int) -> Step:
    axis = net.axis(i)
    if len(net.shapes[i]) == 2 and net.rng.random() < 0.4:
        return lambda v: v[i].transpose(1, 2)
    return net.rng.choice([lambda v: v[i].flip(axis), lambda v: v[i].roll(1, axis)])


def convolve(net: RandomNetwork, i: int) -> Step | None:
    if len(net.shapes[i]) != 2:
        return None
    channels, length = net.shapes[i]
    kernel, pad, stride = net.rng.randint(1, 3), net.rng.randint(0, 2), net.rng.choice((1, 1, 2))
    groups = net.rng.choice([g for g in (1, 2, 3) if channels % g == 0])
    mode = net.rng.choice(("zeros", "zeros", "circular", "reflect", "replicate"))
    pad = pad if mode == "zeros" else min(pad, length - 1)
    if length + 2 * pad < kernel:
        return None
    layer = net.add(
        nn.Conv1d(channels, channels, kernel, stride, pad, 1, groups, padding_mode=mode)
    )
    same = stride == 1 and 2 * pad == kernel - 1
    if same and net.rng.random() < 0.5:
        return lambda v: v[i] + layer(v[i])
    return lambda v: layer(v[i])


def pool(net: RandomNetwork, i: int) -> Step | None:
    if len(net.shapes[i]) != 2 or net.shapes[i][1] < 3:
        return None
    size, stride, pad = net.rng.choice((2, 3)), net.rng.choice((1, 2)), net.rng.choice((0, 1))
    ceil = net.rng.random() < 0.5
    layer = net.rng.choice(
        [nn.AvgPool1d(size, stride, pad, ceil), nn.MaxPool1d(size, stride, pad, ceil_mode=ceil)]
    )
    return lambda v: layer(v[i])


def broadcast(net: RandomNetwork, i: int) -> Step | None:
    if len(net.shapes[i]) != 2:
        return None
    axis = net.axis(i)
    return net.rng.choice(
        [
            lambda v: v[i] + v[i].narrow(axis, 0, 1),
            lambda v: v[i] - v[i].mean(axis, keepdim=True),
            lambda v: v[i] + v[i].amax(axis, keepdim=True),
            lambda v: torch.maximum(v[i], v[i].narrow(axis, 0, 1)),
        ]
    )


def pick(net: RandomNetwork, i: int) -> Step:
    axis = net.axis(i)
    size = net.shapes[i][axis - 1]
    where = torch.tensor([net.rng.randrange(size) for _ in range(net.rng.randint(1, 4))])
    return lambda v: v[i].index_select(axis, where)


def normalise(net: RandomNetwork, i: int) -> Step:
    layer = nn.BatchNorm1d(net.shapes[i][0], affine=net.rng.random() < 0.7)
    assert layer.running_var is not None
    layer.running_var.uniform_(0.05, 3.0)
    if layer.affine:
        nn.init.normal_(layer.weight)
    net.add(layer)
    return lambda v: layer(v[i])


def order(net: RandomNetwork, i: int) -> Step:
    axis = net.axis(i)
    return lambda v: v[i].sort(axis)[0]


def swap_halves(net: RandomNetwork, i: int) -> Step | None:
    if net.shapes[i][0] < 2:
        return None

    def step(v: Sequence[Tensor]) -> Tensor:
        a, b = v[i].chunk(2, 1)
        return torch.cat([torch.relu(b), 2 * a, torch.relu(a)], 1)

    return step


def stacked_pair(net: RandomNetwork, i: int) -> Step | None:
    j = net.alike(i)
    if net.shapes[i][0] > 5:
        return None
    return lambda v: torch.stack([torch.maximum(v[i], v[j]), torch.minimum(v[i], v[j])], 2).flatten(
        1, 2
    )


def border(net: RandomNetwork, i: int) -> Step | None:
    if not 1 < net.shapes[i][-1] < 8:
        return None
    low, high = net.rng.choice((0, 1)), net.rng.choice((0, 1, -1))
    return lambda v: F.pad(v[i], (low, high))


def prelu(net: RandomNetwork, i: int) -> Step:
    layer = nn.PReLU(net.shapes[i][0])
    nn.init.normal_(layer.weight, std=1.3)
    net.add(layer)
    return lambda v: layer(v[i])


class _Tensor(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


GROWTHS: tuple[Callable[[RandomNetwork, int], Step | None], ...] = (
    linear, linear, linear, activation, activation, shared, combine, combine, combine, concatenate,
    concatenate, cut, cut, cut, min_max, branches, branches, branches, factor, per_entry, shift,
    clip, reorder, convolve, convolve, pool, broadcast, pick, normalise, order, swap_halves,
    stacked_pair, border, prelu,
)  # fmt: skip
