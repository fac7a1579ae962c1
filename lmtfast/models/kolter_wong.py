# SPDX-License-Identifier: MIT
"""The small MNIST network of Kolter and Wong, as the LMT experiments use it."""

from __future__ import annotations

import math

import torch
from torch import nn


class KolterWong(nn.Module):
    """Two strided 4 x 4 convolutions (16, 32 channels), a hidden layer of 100 and a linear head.

    Args:
        input_shape: ``(C, H, W)`` of one input, H and W at least 4.
        classes: Number of classes K.
        hidden: Width D of the layer before the head.

    Shapes:
        Input ``(N, C, H, W)``, logits ``(N, K)``; float32.

    Guarantee:
        None. Convolutions start He-normal, linear layers LeCun-normal, biases at zero.

    Source:
        Architecture: Wong and Kolter (2018), arXiv:1711.00851. Initialisation: Tsuzuku, Sato,
        Sugiyama (2018), arXiv:1802.04034, whose code leaves linear layers at its framework's
        default.

    Example:
        >>> KolterWong()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        *,
        hidden: int = 100,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 16, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 4, stride=2, padding=1)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(32 * (height // 2 // 2) * (width // 2 // 2), hidden)
        self.fc2 = nn.Linear(hidden, classes)
        self.relu = nn.ReLU()
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, K)`` of a batch ``(N, C, H, W)``."""
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        x = self.relu(self.fc1(self.flatten(x)))
        return self.fc2(x)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """He-normal convolutions, LeCun-normal linear layers, zero biases, in module order.

    Guarantee:
        None. Draws from torch's global generator.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            gain = 2.0 if isinstance(module, nn.Conv2d) else 1.0
            module.weight.normal_(0.0, math.sqrt(gain / fan_in))
            if module.bias is not None:
                module.bias.zero_()
