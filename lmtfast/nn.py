# SPDX-License-Identifier: MIT
"""Layers that Lipschitz networks want and torch lacks; plain modules, traced like any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmtfast.errors import ArgumentError, ShapeError


class Normalize(nn.Module):
    """Input normalisation ``(x - mean) / std`` per channel, as the first layer of a model.

    Inside the model it is part of what is bounded and certified, so radii are in the units of the
    input before it (pixels).

    Args:
        mean: One number per channel.
        std: One positive number per channel.

    Shapes:
        ``(N, C, ...)`` to the same; floating point.

    Raises:
        ArgumentError: Different lengths, or a deviation that is not positive and finite.

    Guarantee:
        Traced exactly: alone its constant is ``1 / min(std)``; before a convolution it becomes a
        scale of the kernel's columns.

    Source:
        Input normalisation as a factor of the constant: Tsuzuku, Sato, Sugiyama (2018),
        arXiv:1802.04034, section 6.

    Example:
        >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 2)).tolist()
        [[[2.0, 2.0]]]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        values = torch.tensor(list(std), dtype=torch.float32)
        if len(mean) != len(std) or not bool(((values > 0) & values.isfinite()).all()):
            raise ArgumentError(
                "one mean and one positive deviation per channel", f"{mean} and {std}",
                "Normalize(mean, std)", "give both per channel, in the units of the input",
            )  # fmt: skip
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32))
        self.register_buffer("std", values)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input."""
        shape = (-1,) + (1,) * (x.ndim - 2)
        return (x - self.mean.reshape(shape)) / self.std.reshape(shape)

    def extra_repr(self) -> str:
        return f"channels={self.mean.numel()}"


class MinMax(nn.Module):
    """Sorts channel i with channel i + C/2: maxima in the first half, minima in the second.

    Shapes:
        ``(N, C, ...)`` with even C, to the same; floating point.

    Raises:
        ShapeError: An odd number of channels.

    Guarantee:
        Constant exactly 1: it permutes entries, and preserves gradients' norms.

    Source:
        Anil, Lucas, Grosse (2019), arXiv:1811.05381, section 4 (GroupSort with groups of two).

    Example:
        >>> MinMax()(torch.tensor([[1.0, 2.0, 3.0, 0.0]])).tolist()
        [[3.0, 2.0, 1.0, 0.0]]
    """

    def forward(self, x: Tensor) -> Tensor:
        """The sorted pairs."""
        _divisible(x, 2, "MinMax")
        a, b = x.chunk(2, dim=1)
        return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), dim=1)


class GroupSort(nn.Module):
    """Sorts the channels within consecutive groups, in ascending order.

    Args:
        group_size: Channels per group.

    Shapes:
        ``(N, C, ...)`` with C a multiple of ``group_size``, to the same; floating point.

    Raises:
        ArgumentError: ``group_size`` is not positive.
        ShapeError: C is not a multiple of it.

    Guarantee:
        Constant exactly 1.

    Source:
        Anil, Lucas, Grosse (2019), arXiv:1811.05381, section 4.

    Example:
        >>> GroupSort(2)(torch.tensor([[2.0, 1.0, 0.0, 3.0]])).tolist()
        [[1.0, 2.0, 0.0, 3.0]]
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        if group_size < 1:
            raise ArgumentError(
                "a positive group size", str(group_size), "GroupSort(group_size)", "use 2 or more"
            )
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """The sorted groups."""
        _divisible(x, self.group_size, "GroupSort")
        groups = x.reshape(x.shape[0], -1, self.group_size, *x.shape[2:])
        return groups.sort(dim=2).values.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"


def _divisible(x: Tensor, factor: int, layer: str) -> None:
    if x.ndim < 2 or x.shape[1] % factor:
        raise ShapeError(
            f"(N, C, ...) with C a multiple of {factor}", str(tuple(x.shape)), layer,
            "change the number of channels before it",
        )  # fmt: skip
