# SPDX-License-Identifier: MIT
"""Networks of every kind with their value in 60 digits; imports nothing from the library."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import torch
from mpmath import mp, mpf
from torch import Tensor, nn

mp.dps = 60


def exact(tensor: Tensor) -> np.ndarray:
    flat = [mpf(v) for v in tensor.detach().double().reshape(-1).tolist()]
    result = np.empty(len(flat), dtype=object)
    result[:] = flat
    return result.reshape(tuple(tensor.shape))


def moved(call: Callable[[Tensor], Tensor], x: np.ndarray) -> np.ndarray:
    """A call that only copies entries, carried out on their indices (0 stands for a zero)."""
    index = call(torch.arange(1, x.size + 1, dtype=torch.float64).reshape(1, *x.shape))[0].long()
    flat = np.concatenate([[mpf(0)], x.reshape(-1)])
    return flat[index.numpy()]


def convolved(x: np.ndarray, m: nn.Module) -> np.ndarray:
    """Convolution by its definition, on zero-padded input."""
    weight = exact(m.weight)
    axes = weight.ndim - 2
    pads = [(0, 0)] + [(p, p) for p in m.padding]
    x = np.pad(x, pads, constant_values=mpf(0))
    spans = [d * (k - 1) + 1 for d, k in zip(m.dilation, weight.shape[2:], strict=True)]
    size = [(n - s) // t + 1 for n, s, t in zip(x.shape[1:], spans, m.stride, strict=True)]
    out = np.empty((weight.shape[0], *size), dtype=object)
    per_group, per_out = weight.shape[1], weight.shape[0] // m.groups
    for o, *at in itertools.product(*map(range, out.shape)):
        g = o // per_out
        windows = [
            slice(a * t, a * t + s, d)
            for a, t, s, d in zip(at, m.stride, spans, m.dilation, strict=True)
        ]
        part = x[(slice(g * per_group, (g + 1) * per_group), *windows)]
        out[(o, *at)] = mpmath.fsum((part * weight[o]).reshape(-1))
    if m.bias is not None:
        out = out + exact(m.bias).reshape(-1, *(1,) * axes)
    return out


def conv_transposed(x: np.ndarray, m: nn.ConvTranspose2d) -> np.ndarray:
    """Scatter by definition; groups 1."""
    weight = exact(m.weight)
    (s, _), (p, _), (k, _), e = m.stride, m.padding, m.kernel_size, m.output_padding[0]
    n = x.shape[1]
    size = (n - 1) * s + k + e
    out = np.full((weight.shape[1], size, size), mpf(0), dtype=object)
    for i, a, b in itertools.product(range(x.shape[0]), range(n), range(n)):
        out[:, a * s : a * s + k, b * s : b * s + k] += weight[i] * x[i, a, b]
    out = out[:, p : size - p, p : size - p]
    return out + exact(m.bias).reshape(-1, 1, 1)


def normalised(x: np.ndarray, m: nn.BatchNorm2d) -> np.ndarray:
    shape = (-1, *(1,) * (x.ndim - 1))
    root = np.array([mpmath.sqrt(v + mpf(m.eps)) for v in exact(m.running_var)], dtype=object)
    gain = exact(m.weight) / root
    shifted = x - exact(m.running_mean).reshape(shape)
    return shifted * gain.reshape(shape) + exact(m.bias).reshape(shape)


def windows(x: np.ndarray, k: int, s: int) -> np.ndarray:
    size = [(n - k) // s + 1 for n in x.shape[1:]]
    out = np.empty((x.shape[0], *size), dtype=object)
    for c, i, j in itertools.product(*map(range, out.shape)):
        out[c, i, j] = x[c, i * s : i * s + k, j * s : j * s + k].reshape(-1)
    return out


def sigmoid(v: Any) -> Any:
    return 1 / (1 + mpmath.exp(-v))


def elu(v: Any, alpha: Any = 1) -> Any:
    return v if v > 0 else alpha * mpmath.expm1(v)


def gelu(v: Any) -> Any:
    return v * (1 + mpmath.erf(v / mpmath.sqrt(2))) / 2


def gelu_tanh(v: Any) -> Any:
    return v * (1 + mpmath.tanh(mpmath.sqrt(2 / mp.pi) * (v + mpf("0.044715") * v**3))) / 2


def clip(v: Any, low: Any, high: Any) -> Any:
    return min(max(v, mpf(low)), mpf(high))


SCALAR: dict[str, tuple[nn.Module, Callable[[Any], Any]]] = {
    "relu": (nn.ReLU(), lambda v: max(v, mpf(0))),
    "relu6": (nn.ReLU6(), lambda v: clip(v, 0, 6)),
    "hardtanh": (nn.Hardtanh(), lambda v: clip(v, -1, 1)),
    "tanh": (nn.Tanh(), mpmath.tanh),
    "sigmoid": (nn.Sigmoid(), sigmoid),
    "logsigmoid": (nn.LogSigmoid(), lambda v: -mpmath.log1p(mpmath.exp(-v))),
    "softplus": (nn.Softplus(), lambda v: mpmath.log1p(mpmath.exp(v))),
    "softplus beta": (nn.Softplus(beta=2.0), lambda v: mpmath.log1p(mpmath.exp(2 * v)) / 2),
    "silu": (nn.SiLU(), lambda v: v * sigmoid(v)),
    "mish": (nn.Mish(), lambda v: v * mpmath.tanh(mpmath.log1p(mpmath.exp(v)))),
    "gelu": (nn.GELU(), gelu),
    "gelu tanh": (nn.GELU(approximate="tanh"), gelu_tanh),
    "elu": (nn.ELU(0.7), lambda v: elu(v, mpf(0.7))),
    "celu": (
        nn.CELU(0.7),
        lambda v: max(v, mpf(0)) + min(mpf(0), mpf(0.7) * mpmath.expm1(v / mpf(0.7))),
    ),
    "selu": (
        nn.SELU(),
        lambda v: (
            mpf(1.0507009873554804934193349852946) * elu(v, mpf(1.6732632423543772848170429916717))
        ),
    ),
    "leaky relu": (nn.LeakyReLU(0.2), lambda v: v if v > 0 else mpf(0.2) * v),
    "hardsigmoid": (nn.Hardsigmoid(), lambda v: clip(v + 3, 0, 6) / 6),
    "hardswish": (nn.Hardswish(), lambda v: v * clip(v + 3, 0, 6) / 6),
}


class Call(nn.Module):
    """A function of one tensor with its oracle."""

    def __init__(
        self, call: Callable[[Tensor], Tensor], oracle: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        super().__init__()
        self.call, self.oracle = call, oracle

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, kind: str = "add") -> None:
        super().__init__()
        self.branch, self.kind = branch, kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.kind == "cat":
            return torch.cat([x, y], 1)
        if self.kind == "maximum":
            return torch.maximum(x, y)
        if self.kind == "sub":
            return torch.sub(x, y, alpha=0.3)
        return x + y

    def oracle(self, x: np.ndarray) -> np.ndarray:
        y = evaluate(self.branch, x)
        if self.kind == "cat":
            return np.concatenate([x, y])
        if self.kind == "maximum":
            return np.maximum(x, y)
        return x - mpf(0.3) * y if self.kind == "sub" else x + y


def evaluate(m: nn.Module, x: np.ndarray) -> np.ndarray:
    if isinstance(m, nn.Sequential):
        for layer in m:
            x = evaluate(layer, x)
        return x
    if hasattr(m, "oracle"):
        return m.oracle(x)
    for module, function in SCALAR.values():
        if type(m) is type(module) and repr(m) == repr(module):
            return np.vectorize(function, otypes=[object])(x)
    if isinstance(m, nn.Linear):
        y = x @ exact(m.weight).T
        return y if m.bias is None else y + exact(m.bias)
    if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return convolved(x, m)
    if isinstance(m, nn.ConvTranspose2d):
        return conv_transposed(x, m)
    if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return normalised(x, m)
    if isinstance(m, nn.MaxPool2d):
        return np.vectorize(max, otypes=[object])(windows(x, m.kernel_size, m.stride))
    if isinstance(m, nn.AvgPool2d):
        mean = np.vectorize(lambda w: mpmath.fsum(w) / len(w), otypes=[object])
        return mean(windows(x, m.kernel_size, m.stride))
    if isinstance(m, nn.PReLU):
        slope = exact(m.weight).reshape(-1, *(1,) * (x.ndim - 1))
        return np.where(x > 0, x, x * slope)
    return moved(m, x)


def head(shape: tuple[int, ...], *layers: nn.Module) -> nn.Sequential:
    """The layers, flattened, with a linear head of three classes."""
    body = nn.Sequential(*layers)
    features = body.eval()(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


IMAGE = (2, 4, 4)
MATRIX = torch.full((3, 2), 0.3)


def networks() -> dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]]:
    conv = nn.Conv2d
    table: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
        "linear": ((6,), lambda: nn.Linear(6, 3)),
        "mlp": (
            (6,),
            lambda: nn.Sequential(
                nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
            ),
        ),
        "conv": (IMAGE, lambda: head(IMAGE, conv(2, 3, 3, padding=1), nn.ReLU())),
        "conv stride": (
            IMAGE,
            lambda: head(IMAGE, conv(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU()),
        ),
        "conv dilation": (IMAGE, lambda: head(IMAGE, conv(2, 2, 2, dilation=2), nn.ReLU())),
        "conv1d": ((2, 6), lambda: head((2, 6), nn.Conv1d(2, 3, 3), nn.ReLU())),
        "conv3d": ((1, 3, 3, 3), lambda: head((1, 3, 3, 3), nn.Conv3d(1, 2, 2), nn.ReLU())),
        "transposed": (
            (2, 3, 3),
            lambda: head((2, 3, 3), nn.ConvTranspose2d(2, 2, 3, 2, 1, 1), nn.ReLU()),
        ),
        "batch norm": (
            IMAGE,
            lambda: head(IMAGE, conv(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)),
        ),
        "batch norm 1d": (
            (6,),
            lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)),
        ),
        "max pool": (IMAGE, lambda: head(IMAGE, conv(2, 2, 1), nn.MaxPool2d(2, 1))),
        "average pool": (IMAGE, lambda: head(IMAGE, conv(2, 2, 1), nn.ReLU(), nn.AvgPool2d(3, 1))),
        "prelu": (IMAGE, lambda: head(IMAGE, conv(2, 2, 1), nn.PReLU(2, -1.5))),
        "residual": (
            IMAGE,
            lambda: head(IMAGE, Residual(nn.Sequential(conv(2, 2, 3, padding=1), nn.ReLU()))),
        ),
        "linear residual": (
            IMAGE,
            lambda: head(IMAGE, Residual(conv(2, 2, 3, padding=1)), nn.ReLU()),
        ),
        "difference": (
            IMAGE,
            lambda: head(IMAGE, Residual(nn.Sequential(conv(2, 2, 1), nn.Tanh()), "sub")),
        ),
        "concatenation": (
            IMAGE,
            lambda: head(IMAGE, Residual(nn.Sequential(conv(2, 3, 1), nn.ReLU()), "cat")),
        ),
        "maximum": (
            IMAGE,
            lambda: head(IMAGE, Residual(nn.Sequential(conv(2, 2, 1), nn.ReLU()), "maximum")),
        ),
        "shuffle": (
            (4, 2, 2),
            lambda: head((4, 2, 2), nn.PixelShuffle(2), nn.ReLU(), nn.ZeroPad2d(1)),
        ),
        "reflect": (IMAGE, lambda: head(IMAGE, nn.ReflectionPad2d(1), conv(2, 2, 3), nn.ReLU())),
        "constants": (
            IMAGE,
            lambda: head(
                IMAGE,
                Call(lambda x: (x - 0.1307) / 0.3081, lambda x: (x - mpf(0.1307)) / mpf(0.3081)),
                conv(2, 2, 1),
                nn.ReLU(),
                Call(lambda x: 1.5 - x * 0.7, lambda x: mpf(1.5) - x * mpf(0.7)),
            ),
        ),
        "sort": (
            (6,),
            lambda: nn.Sequential(
                nn.Linear(6, 8), Call(lambda x: x.sort(1)[0], lambda x: np.sort(x)), nn.Linear(8, 3)
            ),
        ),
        "slices": (
            (6,),
            lambda: nn.Sequential(
                nn.Linear(6, 8),
                Call(
                    lambda x: torch.cat(
                        [torch.maximum(x[:, :4], x[:, 4:]), torch.minimum(x[:, :4], x[:, 4:])], 1
                    ),
                    lambda x: np.concatenate([np.maximum(x[:4], x[4:]), np.minimum(x[:4], x[4:])]),
                ),
                nn.Linear(8, 3),
            ),
        ),
        "mean and sum": (
            IMAGE,
            lambda: nn.Sequential(
                conv(2, 3, 2),
                nn.ReLU(),
                Call(
                    lambda x: x.mean((2, 3)) + x.sum((2, 3)),
                    lambda x: x.reshape(3, -1).sum(1) * (1 + mpf(1) / 9),
                ),
                nn.Linear(3, 3),
            ),
        ),
        "matmul": (
            (2, 3),
            lambda: head(
                (2, 3), Call(lambda x: x @ MATRIX, lambda x: x @ exact(MATRIX)), nn.ReLU()
            ),
        ),
        "scale after head": (
            (4,),
            lambda: nn.Sequential(nn.Linear(4, 3), Call(lambda x: x * 0.1, lambda x: x * mpf(0.1))),
        ),
        "no head": ((4,), lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh())),
    }
    for name, (module, _) in SCALAR.items():
        table[name] = (
            (5,),
            lambda module=module: nn.Sequential(nn.Linear(5, 6), module, nn.Linear(6, 3)),
        )
    return table


NETWORKS = networks()
