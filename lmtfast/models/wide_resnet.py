# SPDX-License-Identifier: MIT
"""Wide residual networks in pre-activation form, built of layers with a Lipschitz rule."""

from __future__ import annotations

import torch
from torch import nn

from lmtfast.errors import ArgumentError
from lmtfast.models.kolter_wong import initialise

# The paper's framework adds 2e-5 to the variance; the bound of a conv followed by batch norm
# depends on it.
BATCH_NORM_EPS = 2e-5
BASE_WIDTHS = (16, 32, 64)
MOST_BLOCKS = 200  # per group; the deepest in use have 166


class WideBlock(nn.Module):
    """Batch norm, ReLU, conv, batch norm, ReLU, dropout, conv, added to the shortcut.

    A block that changes width or resolution takes its 1 x 1 shortcut from the activated tensor; the
    others add the untouched input, whose Lipschitz constant is then that of the tensor before batch
    norm.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, dropout: float, pool_shortcut: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs, eps=BATCH_NORM_EPS)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs, eps=BATCH_NORM_EPS)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.projects = inputs != outputs or stride != 1
        self.shortcut: nn.Module = nn.Identity()
        if self.projects and pool_shortcut and stride != 1:
            project = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), project)
        elif self.projects:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        activated = self.relu1(self.norm1(x))
        branch = self.relu2(self.norm2(self.conv1(activated)))
        branch = self.conv2(self.dropout(branch))
        return branch + self.shortcut(activated if self.projects else x)


class WideResNet(nn.Module):
    """WRN-depth-width: stem, three groups of :class:`WideBlock`, average pool, linear head.

    Args:
        input_shape: ``(C, H, W)``, H and W multiples of 4.
        classes: Number of classes K.
        depth: 6 n + 4, for example 16 or 28; n blocks per group.
        width: Multiplier of the widths 16, 32, 64.
        dropout: Probability of zeroing inside a block while training.
        pool_shortcut: Downsample shortcuts with a 2 x 2 average pool before the 1 x 1 conv, instead
            of a stride.

    Shapes:
        Input ``(N, C, H, W)``, logits ``(N, K)``; float32.

    Raises:
        ArgumentError: ``depth`` is not 6 n + 4 or above 1204, or the image is not a multiple of 4.

    Guarantee:
        None. Every layer has a Lipschitz rule, so the network can be bounded at any level.

    Source:
        Zagoruyko and Komodakis (2016), arXiv:1605.07146. Used with LMT by Tsuzuku, Sato, Sugiyama
        (2018), arXiv:1802.04034, section 6.2 (WRN-16-4, dropout 0.4); ``pool_shortcut`` is its
        average-pool variant.

    Example:
        >>> WideResNet(depth=10, width=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        *,
        depth: int = 28,
        width: int = 10,
        dropout: float = 0.0,
        pool_shortcut: bool = False,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or not 1 <= blocks <= MOST_BLOCKS:
            raise ArgumentError(
                f"depth = 6 n + 4 with n from 1 to {MOST_BLOCKS}",
                str(depth),
                "WideResNet(depth=)",
                "choose 10, 16, 22, 28, 34 or 40",
            )
        channels, height, image_width = input_shape
        if height % 4 or image_width % 4:
            raise ArgumentError(
                "H and W multiples of 4",
                f"{height} x {image_width}",
                "WideResNet(input_shape=)",
                "pad the images",
            )
        widths = [BASE_WIDTHS[0], *(base * width for base in BASE_WIDTHS)]
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        layers = [
            WideBlock(
                widths[group] if block == 0 else widths[group + 1],
                widths[group + 1],
                2 if block == 0 and group > 0 else 1,
                dropout,
                pool_shortcut,
            )
            for group in range(len(BASE_WIDTHS))
            for block in range(blocks)
        ]
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(widths[-1], eps=BATCH_NORM_EPS)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d((height // 4, image_width // 4))
        self.flatten = nn.Flatten()
        self.head = nn.Linear(widths[-1], classes)
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, K)`` of a batch ``(N, C, H, W)``."""
        x = self.blocks(self.stem(x))
        x = self.pool(self.relu(self.norm(x)))
        return self.head(self.flatten(x))
