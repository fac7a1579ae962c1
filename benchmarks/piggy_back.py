# SPDX-License-Identifier: MIT
"""An experiment: the power iterates ride through the training convolutions as one more sample.

Each convolution runs on its batch with the iterate v appended, so that one call gives the batch's
output and ``A v``, and its backward the batch's gradient, ``A^T A v`` and the weight gradient of
both. Only a compiler can hope to append without copying. Norms are multiplied, which costs what
composing them costs but bounds no residual network.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.networks import Layer


class Carrier(nn.Module):
    """A convolution that applies itself to its iterate as well, and keeps the image."""

    image: Tensor

    def __init__(self, conv: nn.Conv2d, layer: Layer) -> None:
        super().__init__()
        self.conv = conv
        generator = torch.Generator().manual_seed(sum(layer.name.encode()))
        v = torch.randn(1, *layer.in_shape, generator=generator)
        self.v = nn.Parameter((v / v.norm()).to(conv.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.cat([x, self.v.to(x.dtype)]))
        self.image = y[-1]
        return y[:-1]


class PiggyBack(nn.Module):
    """A copy of a network whose convolutions are carriers; returns logits and norms."""

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        super().__init__()
        self.network = copy.deepcopy(model)
        # Layers whose batch norm is folded in, as in the other estimates of the true convolution.
        self.carriers: list[tuple[Carrier, nn.BatchNorm2d | None]] = []
        self.norms: list[nn.BatchNorm2d] = []
        for layer in layers:
            module = self.network.get_submodule(layer.name)
            if isinstance(module, nn.BatchNorm2d):
                self.norms.append(module)
            elif isinstance(module, nn.Conv2d):
                carrier = Carrier(module, layer)
                parent, _, name = layer.name.rpartition(".")
                setattr(self.network.get_submodule(parent), name, carrier)
                norm = None if layer.norm is None else self.network.get_submodule(layer.norm)
                assert norm is None or isinstance(norm, nn.BatchNorm2d)
                self.carriers.append((carrier, norm))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N, K)``; norms of the convolutions, then of separate batch norms, ``(R,)``."""
        logits = self.network(x)
        found = []
        for carrier, norm in self.carriers:
            image = carrier.image.float()
            found.append((image if norm is None else image * _gain(norm)[:, None, None]).norm())
        found += [_gain(norm).abs().amax() for norm in self.norms]
        return logits, torch.stack(found)

    def iterates(self) -> list[Tensor]:
        return [carrier.v for carrier, _ in self.carriers]

    @torch.no_grad()
    def advance(self) -> None:
        """The gradients that backward left in the iterates become the next ones, and vanish."""
        iterates = self.iterates()
        grads = [v.grad for v in iterates if v.grad is not None]
        torch._foreach_copy_(iterates, torch._foreach_div(grads, torch._foreach_norm(grads)))
        torch._foreach_zero_(grads)


def _gain(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    return norm.weight * (norm.running_var + norm.eps).rsqrt()
