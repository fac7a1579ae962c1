# SPDX-License-Identifier: MIT
"""A small convolutional network for 8 x 8 digits; the demo trains it in seconds."""

from __future__ import annotations

import torch
from torch import nn

from lmtfast.models.kolter_wong import initialise


class DigitsNet(nn.Module):
    """A 3 x 3 and a strided 4 x 4 convolution, a hidden layer and a linear head, with ReLU.

    Args:
        input_shape: ``(C, H, W)`` of one input, H and W even.
        classes: Number of classes K.
        channels: Channels of the two convolutions.
        hidden: Width D of the layer before the head.

    Shapes:
        Input ``(N, C, H, W)``, logits ``(N, K)``; float32.

    Guarantee:
        None.

    Example:
        >>> DigitsNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (1, 8, 8),
        classes: int = 10,
        *,
        channels: tuple[int, int] = (16, 32),
        hidden: int = 64,
    ) -> None:
        super().__init__()
        first, second = channels
        self.conv1 = nn.Conv2d(input_shape[0], first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 4, stride=2, padding=1)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * (input_shape[1] // 2) * (input_shape[2] // 2), hidden)
        self.fc2 = nn.Linear(hidden, classes)
        self.relu = nn.ReLU()
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, K)`` of a batch ``(N, C, H, W)``."""
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        x = self.relu(self.fc1(self.flatten(x)))
        return self.fc2(x)
