# SPDX-License-Identifier: MIT
"""The one list of layers and geometries that the tests run through.

A :class:`Layer` is a module that is linear up to a constant, with its input shape; its dense
matrix comes from ``tests.oracles`` where there is an independent formula, else from the module's
own forward on unit vectors. Weights are multiples of 2^-8, so every sum of taps is exact and the
matrix is the operator, not a rounding of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.guarantee import plan_bound
from lmtfast.level import RIGOROUS
from tests.oracles import conv_matrix

Shape = tuple[int, ...]
MODES = ("circular", "reflect", "replicate")


def sampled(names: Iterable[str], step: int) -> list[Any]:
    """Parameters of a table: every ``step``-th runs by default, the others where slow ones do."""
    return [
        pytest.param(name, marks=pytest.mark.slow if i % step else ())
        for i, name in enumerate(names)
    ]


class Lambda(nn.Module):
    """A function of the module and the input, with named tensors and submodules."""

    def __init__(self, function: Callable[..., Tensor], **members: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, nn.Parameter):
                self.register_parameter(name, member)
            elif isinstance(member, Tensor):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Parallel(nn.Module):
    """Layers side by side, each on its own stretch of one vector: many cases in one trace."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer.build() for layer in layers)
        self.shapes = [layer.shape for layer in layers]

    @property
    def length(self) -> int:
        return sum(math.prod(s) for s in self.shapes)

    def forward(self, x: Tensor) -> Tensor:
        parts, start = [], 0
        for layer, shape in zip(self.layers, self.shapes, strict=True):
            stop = start + math.prod(shape)
            parts.append(layer(x[:, start:stop].unflatten(1, shape)).flatten(1))
            start = stop
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class Layer:
    """A case: ``build()`` gives a float64 module in eval mode, the same one at every call."""

    name: str
    build: Callable[[], nn.Module]
    shape: Shape
    matrix: Callable[[], np.ndarray] = field(repr=False)
    exact: bool = True  # whether the matrix holds the operator's entries without any rounding


def _belongs(name: str, layer: int) -> bool:
    stem = f"layers.{layer}"
    return all(part.split("#")[0].startswith((f"{stem}.", f"{stem}+")) or part.split("#")[0] == stem
               for part in name.split("+"))  # fmt: skip


def layer_bounds(layers: Sequence[Layer], *ways: Mapping[str, Any]) -> list[list[float]]:
    """The bounds of every layer from one trace: per way, the options of ``plan_bound``.

    A layer is a chain, so its bound is a product.
    """
    net = Parallel(list(layers)).eval()
    plan = lf.trace(net, (net.length,))
    notes = [(n, c) for n, _, c in plan.graph.notes]
    found = []
    for way in ways:
        norms = plan_bound(plan, net, **{"level": RIGOROUS, **way}).per_operator
        parts = (*norms.items(), *notes)
        found.append([math.prod(c for n, c in parts if _belongs(n, i)) for i in range(len(layers))])
    return found


def dyadic(shape: Shape, rng: random.Random) -> Tensor:
    """Random multiples of 2^-8 in (-2, 2)."""
    numbers = [rng.randrange(-511, 512) / 256 for _ in range(math.prod(shape))]
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


def unit_matrix(module: nn.Module, shape: Shape) -> np.ndarray:
    """Matrix of the linear part of a module, column by column, from its own forward."""
    n = math.prod(shape)
    with torch.no_grad():
        basis = torch.eye(n, dtype=torch.float64).reshape(n, *shape)
        offset = module(torch.zeros(1, *shape, dtype=torch.float64))
        return (module(basis) - offset).reshape(n, -1).T.numpy()


def _frozen(module: nn.Module, rng: random.Random) -> nn.Module:
    module = module.double().eval()
    for tensor in module.parameters():
        tensor.data.copy_(dyadic(tuple(tensor.shape), rng))
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(dyadic(tuple(buffer.shape), rng).abs() + 0.05)
    return module


def seen(name: str, module: nn.Module, shape: Shape, seed: int = 0, exact: bool = True) -> Layer:
    """A case whose matrix is read off the module's forward."""
    frozen = _frozen(module, random.Random(f"{name} {seed}"))
    return Layer(name, lambda: frozen, shape, lambda: unit_matrix(frozen, shape), exact)


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def random_conv(seed: int) -> Layer:
    """A convolution or its transpose with every option drawn, kernels larger than maps included."""
    rng = random.Random(seed)
    axes = rng.choices((1, 2, 3), (8, 12, 1))[0]
    largest = {1: 8, 2: 5, 3: 3}[axes]
    groups = rng.choice((1, 1, 1, 2, 3)) if axes < 3 else 1
    c_in, c_out = groups * rng.randint(1, 2), groups * rng.randint(1, 3)
    transposed = rng.random() < 0.25
    mode = "zeros" if transposed or rng.random() < 0.6 else rng.choice(MODES)
    while True:
        n = [rng.randint(1, largest) for _ in range(axes)]
        k = [rng.randint(1, 4) for _ in range(axes)]
        s, d = ([rng.randint(1, m) for _ in range(axes)] for m in (3, 2))
        p = [rng.randint(0, 3) for _ in range(axes)]
        extra = [rng.randrange(max(a, b)) if transposed else 0 for a, b in zip(s, d, strict=True)]
        largest_pad = {"circular": 0, "reflect": -1}.get(mode, 99)
        if any(pad > size + largest_pad for pad, size in zip(p, n, strict=True)):
            continue
        rows = zip(n, k, s, p, d, extra, strict=True)
        if transposed:
            out = [(m - 1) * t - 2 * q + e * (j - 1) + x + 1 for m, j, t, q, e, x in rows]
        else:
            out = [(m + 2 * q - e * (j - 1) - 1) // t + 1 for m, j, t, q, e, _ in rows]
        if all(1 <= m <= 16 for m in out):
            break
    geometry = {"stride": s, "padding": p, "dilation": d, "groups": groups}
    if transposed:
        module = TRANSPOSED[axes](c_in, c_out, k, output_padding=extra, **geometry)
    else:
        module = CONVS[axes](c_in, c_out, k, padding_mode=mode, **geometry)
    module = _frozen(module, rng)
    name = f"conv{axes}d#{seed} n={n} k={k} {geometry} {mode} {'T' * transposed}{extra}"
    shape = (c_in, *n)

    def matrix() -> np.ndarray:
        return conv_matrix(
            module.weight.detach().numpy(), shape, padding_mode=mode, transposed=transposed,
            output_padding=extra, **geometry,
        )  # fmt: skip

    return Layer(name, lambda: module, shape, matrix)


def _conv_bn(seed: int) -> Layer:
    rng = random.Random(1000 + seed)
    groups = rng.choice((1, 2))
    conv = rng.choice((nn.Conv2d, nn.ConvTranspose2d))
    c = 2 * groups
    module = nn.Sequential(
        conv(c, 4, 3, stride=rng.choice((1, 2)), padding=1, groups=groups),
        nn.BatchNorm2d(4, affine=rng.random() < 0.7),
    )
    # Batch norm rounds its gain, so the matrix is only as exact as float64.
    return seen(f"conv + batch norm #{seed}", module, (c, 5, 4), seed, exact=False)


def _columns(seed: int) -> Layer:
    rng = random.Random(seed)
    groups = rng.choice((1, 2))
    transposed = rng.random() < 0.5
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 2 * groups, 3, groups=groups)
    scale = nn.Parameter(torch.ones(4, 1, 1))
    module = Lambda(lambda m, x: m.conv(x * m.scale) * 0.5, conv=conv, scale=scale)
    return seen(f"scaled inputs #{seed}", module, (4, 4, 3), seed)


RANDOM_CONVS = tuple(random_conv(seed) for seed in range(240))

_id = nn.Identity
LINEAR = (
    *(_conv_bn(seed) for seed in range(10)),
    *(_columns(seed) for seed in range(10)),
    seen("linear", nn.Linear(7, 5), (7,)),
    seen("linear on a sequence", nn.Linear(5, 3), (4, 5)),
    seen("linear 1 x 1", nn.Linear(1, 1), (1,)),
    seen("chain of linears", nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 8)), (6,), exact=False),
    seen("linear + batch norm", nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (6,), 0, False),
    seen("batch norm", nn.BatchNorm2d(3), (3, 2, 2), 0, False),
    seen("batch norm on vectors", nn.BatchNorm1d(5, affine=False), (5,), 0, False),
    seen("x + linear(x)", Lambda(lambda m, x: x + m.a(x), a=nn.Linear(5, 5)), (5,)),
    seen("x - linear(x)", Lambda(lambda m, x: x - m.a(x), a=nn.Linear(5, 5)), (5,)),
    seen("linear(x) - 2 x", Lambda(lambda m, x: m.a(x) - 2 * x, a=nn.Linear(5, 5)), (5,)),
    seen(
        "x + conv(x), even kernel, uneven padding",
        Lambda(lambda m, x: x + m.a(F.pad(x, (0, 1, 1, 0))), a=nn.Conv2d(2, 2, 2)), (2, 4, 3),
    ),
    seen("x + conv(x), dilated", Lambda(
        lambda m, x: x + m.a(x), a=nn.Conv2d(2, 2, 3, padding=2, dilation=2)), (2, 4, 4)),
    seen("x + conv(x), odd padding of a dilated kernel", Lambda(
        lambda m, x: x + m.a(x), a=nn.Conv1d(2, 2, 3, padding="same", dilation=3)), (2, 7)),
    seen("x + grouped conv(x)", Lambda(
        lambda m, x: x + m.a(x), a=nn.Conv2d(6, 6, 3, padding=1, groups=3)), (6, 3, 3)),
    seen("x + depthwise conv(x)", Lambda(
        lambda m, x: x + m.a(x), a=nn.Conv2d(4, 4, 3, padding=1, groups=4)), (4, 3, 3)),
    seen("x + circular conv(x)", Lambda(
        lambda m, x: x + m.a(x), a=nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")),
        (2, 4, 3)),
    seen("x + 1x1 conv(x), one pixel", Lambda(
        lambda m, x: x + m.a(x), a=nn.Conv2d(3, 3, 1)), (3, 1, 1)),
    seen("-(x + conv(x)) * 3", Lambda(
        lambda m, x: -(x + m.a(x)) * 3, a=nn.Conv2d(2, 2, 3, padding=1)), (2, 4, 4)),
    seen("x + (conv(x) + x) + conv(x)", Lambda(
        lambda m, x: x + (m.a(x) + x) + m.a(x), a=nn.Conv2d(2, 2, 3, padding=1)), (2, 4, 4)),
    seen("shared branch, two readers", Lambda(
        lambda m, x: torch.cat([m.b(y := m.a(x)), y * m.s], 1), a=nn.Conv2d(2, 2, 3, padding=1),
        b=nn.Conv2d(2, 1, 1), s=nn.Parameter(torch.ones(2, 1, 1))), (2, 3, 4), exact=False),
    seen("a(x) + a(x), the same call", Lambda(
        lambda m, x: (y := m.a(x)) + y, a=nn.Linear(4, 3)), (4,)),
    seen("a(x) - a(x)", Lambda(lambda m, x: m.a(x) - m.a(x), a=nn.Linear(4, 3)), (4,)),
    seen("sum of branches", Lambda(
        lambda m, x: m.a(x) + m.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3)), (4,)),
    seen("concatenated branches", Lambda(
        lambda m, x: torch.cat([m.a(x), x, m.b(x)], 1), a=nn.Linear(4, 3), b=nn.Linear(4, 3)),
        (4,)),
    seen("concatenated conv branches", Lambda(
        lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=nn.Conv2d(2, 2, 3, padding=1),
        b=nn.Conv2d(2, 3, 1)), (2, 4, 4)),
    seen("average pool after conv", nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2)), (2, 6, 6)),
    seen("average pool before conv", nn.Sequential(
        nn.AvgPool2d(2, 2), nn.Conv2d(2, 3, 3, padding=1)), (2, 7, 6)),
    seen("padded average pool before conv", nn.Sequential(
        nn.AvgPool2d(3, 1, padding=1), nn.Conv2d(2, 3, 3, padding=1)), (2, 4, 4), exact=False),
    seen("conv of conv", nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(3, 2, 3, padding=1)), (2, 6)),
    seen("circular pad of its own", Lambda(
        lambda m, x: m.a(F.pad(x, (1, 2, 2, 1), mode="circular")), a=nn.Conv2d(2, 2, 3)),
        (2, 4, 5)),
    seen("circular pad, strided", Lambda(
        lambda m, x: m.a(F.pad(x, (1, 1), mode="circular")), a=nn.Conv1d(2, 2, 3, stride=2)),
        (2, 6)),
    seen("zero pad in front of a padded conv", nn.Sequential(
        nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 2, 3, stride=2, padding=1)), (2, 4, 5)),
    seen("constant pad", nn.Sequential(nn.ConstantPad2d(1, 7.0), nn.Conv2d(1, 2, 3)), (1, 4, 4)),
    seen("negative pad", Lambda(
        lambda m, x: m.a(F.pad(x, (-1, 1))), a=nn.Conv1d(1, 2, 3)), (1, 6)),
    seen("reflect pad of a transpose", Lambda(
        lambda m, x: m.a(F.pad(x, (2, 1), mode="reflect").transpose(1, 2)), a=nn.Linear(2, 3)),
        (2, 5)),
    seen("token mixing", Lambda(
        lambda m, x: m.a(x.transpose(1, 2)).transpose(1, 2), a=nn.Linear(4, 4)), (4, 3)),
    seen("token and channel mixing", Lambda(
        lambda m, x: m.b(m.a(x.transpose(1, 2)).transpose(1, 2)), a=nn.Linear(4, 3),
        b=nn.Linear(3, 2)), (4, 3)),
    seen("x @ W", Lambda(lambda m, x: x @ m.w, w=nn.Parameter(torch.ones(4, 3))), (4,)),
    seen("sum over channels", Lambda(lambda m, x: x.sum(1)), (3, 2, 2)),
    seen("x minus its mean", Lambda(lambda m, x: x - x.mean(1, keepdim=True)), (4, 3)),
    seen("outer broadcast", Lambda(lambda m, x: x + x[:, :1]), (4, 3), exact=False),
    seen("sum with alpha", Lambda(lambda m, x: torch.add(x, x.flip(1), alpha=3)), (4,)),
    seen("difference with alpha", Lambda(lambda m, x: torch.sub(x, x.flip(1), alpha=-2)), (4,)),
    seen("reverse difference with alpha", Lambda(lambda m, x: torch.rsub(x, x.flip(1), alpha=2)),
         (4,)),
)  # fmt: skip

COPIES = (
    seen("identity", _id(), (3,)),
    seen("flatten", nn.Flatten(), (2, 3)),
    seen("permute", Lambda(lambda m, x: x.permute(0, 2, 3, 1)), (2, 3, 2)),
    seen("movedim", Lambda(lambda m, x: x.movedim(1, 2)), (2, 3, 2)),
    seen("repeat", Lambda(lambda m, x: x.repeat(1, 3)), (4,)),
    seen("repeat, two axes", Lambda(lambda m, x: x.repeat(1, 2, 3)), (2, 2)),
    seen("repeat_interleave", Lambda(lambda m, x: x.repeat_interleave(3, 1)), (3,)),
    seen("tile", Lambda(lambda m, x: x.tile((2,))), (3,)),
    seen("expand", Lambda(lambda m, x: x.unsqueeze(1).expand(-1, 5, -1)), (3,)),
    seen("flip", Lambda(lambda m, x: x.flip(1)), (4,)),
    seen("roll", Lambda(lambda m, x: x.roll((1, 2), (1, 2))), (3, 4)),
    seen("rot90", Lambda(lambda m, x: x.rot90(1, (2, 3))), (1, 2, 3)),
    seen("tril", Lambda(lambda m, x: x.tril()), (3, 3)),
    seen("triu", Lambda(lambda m, x: x.triu(1)), (3, 3)),
    seen("triu of everything", Lambda(lambda m, x: x.triu(9)), (3, 3)),
    seen("pixel shuffle", nn.PixelShuffle(2), (4, 2, 2)),
    seen("pixel unshuffle", nn.PixelUnshuffle(2), (1, 4, 4)),
    seen("channel shuffle", nn.ChannelShuffle(2), (4, 2, 2)),
    seen("nearest, whole", nn.Upsample(scale_factor=2), (1, 2, 3)),
    seen("nearest, uneven", nn.Upsample(size=(5, 7)), (1, 2, 3)),
    seen("nearest 1-D", nn.Upsample(size=7), (1, 3)),
    seen("nearest 3-D", nn.Upsample(size=(3, 2, 5)), (1, 2, 1, 2)),
    seen("nearest, shrinking", nn.Upsample(size=(2, 2)), (1, 5, 3)),
    seen("reflection pad 1-D", nn.ReflectionPad1d((2, 1)), (2, 4)),
    seen("reflection pad 2-D", nn.ReflectionPad2d((2, 1, 0, 2)), (1, 4, 3)),
    seen("reflection pad, whole map", nn.ReflectionPad1d(4), (1, 5)),
    seen("reflection pad 3-D", nn.ReflectionPad3d(1), (1, 2, 3, 2)),
    seen("replication pad 1-D", nn.ReplicationPad1d((5, 2)), (1, 2)),
    seen("replication pad 2-D", nn.ReplicationPad2d((2, 1, 3, 0)), (1, 3, 2)),
    seen("replication pad 3-D", nn.ReplicationPad3d(1), (1, 2, 1, 2)),
    seen("circular pad 1-D", nn.CircularPad1d((3, 2)), (1, 3)),
    seen("circular pad 2-D", nn.CircularPad2d(2), (1, 3, 2)),
    seen("zero pad", nn.ZeroPad2d((2, 0, 1, 1)), (1, 2, 2)),
    seen("cropping pad", nn.ZeroPad2d(-1), (1, 4, 3)),
    seen("slice", Lambda(lambda m, x: x[:, 1:3]), (4, 2)),
    seen("strided slice", Lambda(lambda m, x: x[:, ::2, 1::3]), (4, 5)),
    seen("slice, negative end", Lambda(lambda m, x: x[..., :-1]), (4, 2)),
    seen("select", Lambda(lambda m, x: x[:, -1]), (4, 2)),
    seen("index, repeated", Lambda(lambda m, x: x[:, [0, 2, 2, 2, 1]]), (4, 2)),
    seen("index, negative", Lambda(lambda m, x: x[:, :, [-1, 0]]), (2, 3)),
    seen("index_select", Lambda(
        lambda m, x: x.index_select(2, torch.tensor([1, 1, 0]))), (2, 3)),
    seen("concatenation with itself", Lambda(lambda m, x: torch.cat([x, x, x], 2)), (2, 2)),
    seen("stack with itself", Lambda(lambda m, x: torch.stack([x, -x], 1)), (3,)),
    seen("squeeze and unsqueeze", Lambda(lambda m, x: x.squeeze(1).unsqueeze(2)), (1, 3)),
)  # fmt: skip


def _pool(name: str, module: nn.Module, shape: Shape) -> Layer:
    return seen(name, module, shape, exact=False)


AVERAGES = (
    *(
        _pool(f"avg {n} k={k} s={s} p={p} ceil={c} pad counted={i}", nn.AvgPool2d(
            k, s, p, ceil_mode=c, count_include_pad=i), (1, *n))
        for n, k, s, p in (
            ((4, 4), 2, 2, 0), ((5, 7), 3, 2, 1), ((6, 5), (2, 3), 1, (1, 0)), ((3, 3), 3, 1, 1),
            ((2, 2), 3, 2, 1), ((7, 4), (3, 2), (2, 3), (1, 1)),
        )
        for c in (False, True)
        for i in (False, True)
    ),
    _pool("avg 1-D", nn.AvgPool1d(3, 2, 1, ceil_mode=True), (2, 8)),
    _pool("avg 3-D", nn.AvgPool3d(2, 1), (1, 3, 3, 2)),
    _pool("avg with divisor", nn.AvgPool2d(2, divisor_override=3), (1, 4, 4)),
    *(
        _pool(f"adaptive avg {n} -> {m}", nn.AdaptiveAvgPool2d(m), (1, *n))
        for n, m in (((5, 7), (3, 4)), ((2, 3), (5, 4)), ((6, 6), (1, 1)), ((7, 3), (7, 1)))
    ),
    _pool("adaptive avg 1-D", nn.AdaptiveAvgPool1d(4), (2, 7)),
    _pool("adaptive avg 3-D", nn.AdaptiveAvgPool3d(2), (1, 3, 3, 5)),
    _pool("mean", Lambda(lambda m, x: x.mean((2, 3))), (2, 3, 5)),
    _pool("sum", Lambda(lambda m, x: x.sum(-1, keepdim=True)), (2, 7)),
)  # fmt: skip
