# SPDX-License-Identifier: MIT
"""Networks as people write them, small, without any import of the library, and ten that have no
bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """torchvision's residual block."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(3, 3, 1), BasicBlock(3, 4, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer1(x))
        return self.fc(torch.flatten(x, 1))


class WideBlock(nn.Module):
    """The pre-activation block of wide residual networks."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.drop = nn.Dropout(0.3)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride) if c_in != c_out or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.drop(F.relu(self.bn2(self.conv1(out))))) + skip


class WideResNet(nn.Sequential):
    def __init__(self, classes: int = 3) -> None:
        super().__init__(
            nn.Conv2d(1, 2, 3, padding=1), WideBlock(2, 3, 1), WideBlock(3, 3, 2),
            nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(3, classes),
        )  # fmt: skip


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 2, 3, padding=1))
            for c in (2, 4, 6)
        )
        self.transition = nn.Sequential(nn.Conv2d(8, 4, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(4 * 9, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(self.transition(torch.cat(features, 1)).flatten(1))


class Inception(nn.Module):
    """Four branches of different reach, concatenated."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, 1)
        self.three = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
        self.five = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 2, 5, padding=2))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(1, 1, 1))
        self.head = nn.Linear(7, classes)

    def forward(self, x: Tensor) -> Tensor:
        branches = [F.relu(b(x)) for b in (self.one, self.three, self.five, self.pool)]
        return self.head(F.adaptive_avg_pool2d(torch.cat(branches, 1), 1).squeeze(-1).squeeze(-1))


class VGG(nn.Sequential):
    def __init__(self, classes: int = 3) -> None:
        super().__init__(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(True), nn.MaxPool2d(2, 2),
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True), nn.MaxPool2d(2, 2),
            nn.Flatten(), nn.Linear(4, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, classes),
        )  # fmt: skip


class MinMax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


class LiResBlock(nn.Module):
    """x + conv(x): one operator with the identity in its centre tap."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class LiResNet(nn.Sequential):
    def __init__(self, classes: int = 3) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 5, 2, 2), MinMax(), LiResBlock(4), MinMax(), LiResBlock(4), MinMax(),
            nn.Conv2d(4, 2, 2, 2), nn.Flatten(), nn.Linear(2, classes),
        )  # fmt: skip


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.token = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.channel = nn.Sequential(nn.Linear(channels, 5), nn.GELU(), nn.Linear(5, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channel(x)


class Mixer(nn.Module):
    """An MLP-Mixer without normalisation."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, 2)
        self.blocks = nn.Sequential(MixerBlock(9, 4), MixerBlock(9, 4))
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))


class Nested(nn.Module):
    """Splits inside splits, shared weights, and a branch of a branch."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(6, 6)
        self.squash, self.head = nn.Linear(12, 6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.flatten(1)[:, :12].chunk(2, 1)
        a1, a2 = a.split([3, 3], 1)
        a = torch.cat([torch.tanh(self.inner(a1)), self.inner(F.relu(a2)) * -2.0], 1)
        b = b + F.relu(self.outer(b))
        mixed = torch.cat([F.relu(b), F.relu(a)], 1)
        return self.head(F.leaky_relu(self.squash(mixed)) + self.outer(a))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (ResNet, WideResNet, DenseNet, Inception, VGG, LiResNet, Mixer, Nested)
}
IMAGE = (1, 6, 6)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode with random weights and batch-norm statistics."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(noise / max(1.0, parameter[0].numel()) ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_var is not None
            assert module.running_mean is not None
            module.running_var.copy_(
                torch.rand(module.running_var.shape, generator=generator, dtype=torch.float64) + 0.1
            )
            module.running_mean.normal_(generator=generator)
            module.weight.data.normal_(generator=generator)
    return model


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Jacobian at one input without batch dimension. Shape ``(outputs, inputs)``."""

    def flat(v: Tensor) -> Tensor:
        return model(v.unsqueeze(0)).reshape(-1)

    result = torch.autograd.functional.jacobian(flat, x, vectorize=True)
    return result.reshape(-1, x.numel())


def steepest(
    model: nn.Module, shape: tuple[int, ...], points: int = 8, seed: int = 0
) -> tuple[float, Tensor]:
    """Largest Jacobian norm over random points, and the same for every pair of outputs.

    The norm of the Jacobian at a point of differentiability never exceeds the Lipschitz constant.
    """
    generator = torch.Generator().manual_seed(seed)
    best, pairs = 0.0, torch.zeros(0)
    for i in range(points):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (i % 4 - 1.5)
        matrix = jacobian(model, x)
        best = max(best, float(torch.linalg.matrix_norm(matrix, 2)))
        gaps = (matrix[:, None] - matrix[None]).norm(dim=-1)
        pairs = gaps if not len(pairs) else torch.maximum(pairs, gaps)
    return best, pairs
