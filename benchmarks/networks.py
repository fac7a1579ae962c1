# SPDX-License-Identifier: MIT
"""Networks the bound step is timed on, as data, and the list of their linear layers."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmtfast.models import WideResNet


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride), 1 x 1 convolutions with batch norm, added to the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        outputs = expansion * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu(self.norm1(self.conv1(x)))
        branch = self.relu(self.norm2(self.conv2(branch)))
        return self.relu(self.norm3(self.conv3(branch)) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al. (2016) with bottleneck blocks; (3, 4, 6, 3) blocks of width 64 make ResNet-50."""

    def __init__(self, blocks: tuple[int, ...], width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        layers, inputs = [], width
        for group, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if group and not block else 1
                layers.append(Bottleneck(inputs, width << group, stride))
                inputs = 4 * (width << group)
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.relu(self.norm(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def conv_chain(depth: int, width: int) -> nn.Module:
    """The convolutions of LiResNet's backbone, each followed by ReLU."""
    convs = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth)]
    return nn.Sequential(*(m for conv in convs for m in (conv, nn.ReLU())))


@dataclass(frozen=True)
class Network:
    """An architecture and the shape of one input."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]


def _wide(depth: int, width: int, size: int) -> Network:
    shape = (3, size, size)
    return Network(functools.partial(WideResNet, shape, depth=depth, width=width), shape)


NETWORKS: dict[str, Network] = {
    "wrn-10-1": _wide(10, 1, 8),
    "wrn-16-4": _wide(16, 4, 32),
    "wrn-28-10": _wide(28, 10, 32),
    **{f"wrn-28-10 at {n}": _wide(28, 10, n) for n in (64, 128, 224)},
    "resnet-14": Network(lambda: ResNet((1, 1, 1, 1), width=8, classes=10), (3, 32, 32)),
    "resnet-50": Network(lambda: ResNet((3, 4, 6, 3)), (3, 224, 224)),
    "l2w8": Network(lambda: conv_chain(2, 8), (8, 6, 6)),
    "l12w512": Network(lambda: conv_chain(12, 512), (512, 16, 16)),
}


@torch.no_grad()
def build_network(name: str, seed: int = 0) -> nn.Module:
    """The network in eval mode, initialised as its framework does, with a past in its batch norms.

    Running variances between 4 and 9 keep the product of all norms of a deep network in range.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name].build().eval()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                assert module.running_var is not None
                module.running_var.uniform_(4.0, 9.0)
                module.weight.uniform_(0.5, 1.0)
    return model


@dataclass(frozen=True)
class Layer:
    """One linear layer: its module, geometry, and the batch norm that directly follows it.

    ``kind`` is ``conv``, ``linear`` or ``scale`` (a batch norm that follows no linear layer).
    """

    name: str
    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    norm: str | None = None

    @property
    def geometry(self) -> tuple[tuple[int, ...], ...]:
        """What layers must share to run in one grouped call."""
        return (self.in_shape, self.out_shape, self.kernel, self.stride, self.padding)

    @property
    def weights(self) -> int:
        if self.kind == "scale":
            return self.out_shape[0]
        return self.in_shape[0] * self.out_shape[0] * math.prod(self.kernel)

    @property
    def products(self) -> int:
        """Multiply-adds of one application to one sample."""
        if self.kind == "scale":
            return 0
        return self.weights * math.prod(self.out_shape[1:])

    @property
    def output_padding(self) -> tuple[int, ...]:
        """What the transposed convolution must add to return the input's own shape."""
        return tuple(
            (n + 2 * p - k) % s
            for n, p, k, s in zip(
                self.in_shape[1:], self.padding, self.kernel, self.stride, strict=True
            )
        )


def layers_of(model: nn.Module, input_shape: tuple[int, ...]) -> list[Layer]:
    """Linear layers in the order they run, read off one forward pass without data."""
    twin = copy.deepcopy(model).to("meta")
    found: dict[str, Layer] = {}
    source: dict[int, str] = {}
    alive = []  # outputs are told apart by id, so none may be freed

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        shapes = tuple(x.shape[1:]), tuple(output.shape[1:])
        alive.extend((x, output))
        if isinstance(module, nn.Conv2d):
            assert module.groups == 1
            assert module.dilation == (1, 1)
            assert not isinstance(module.padding, str)
            found[name] = Layer(
                name, "conv", *shapes, module.kernel_size, module.stride, module.padding
            )
            source[id(output)] = name
        elif isinstance(module, nn.Linear):
            found[name] = Layer(name, "linear", *shapes)
        elif id(x) in source:
            found[source[id(x)]] = replace(found[source[id(x)]], norm=name)
        else:
            found[name] = Layer(name, "scale", *shapes)

    for name, module in twin.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, _BatchNorm)):
            module.register_forward_hook(functools.partial(record, name))
    twin(torch.empty(1, *input_shape, device="meta"))
    return list(found.values())
