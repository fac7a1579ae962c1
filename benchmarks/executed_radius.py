# SPDX-License-Identifier: MIT
"""What speaking of executions costs in radius: ``executed(profile)`` beside ``ideal``.

``python -m benchmarks.executed_radius --checkpoint runs/mnist --data mnist.npz``

Prints, per network and profile, the median and the smallest share of the ideal radius that the
executed one keeps, over the points certified at ``ideal``, and over those with radii above 0.01.
Without a checkpoint only the second network is measured: sixteen convolutions, trained with a
margin on scikit-learn's digits (extra ``demo``) from random orthogonal matrices in the centre taps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

import lmtfast as lf
from lmtfast.checkpoint import load_checkpoint
from lmtfast.data import Dataset, load_dataset
from lmtfast.profiles import PROFILES

CHANNELS, DEPTH, EPOCHS, BATCH, EPS = 16, 16, 10, 64, 0.05
CLEAR = 0.01


def deep_network(data: Dataset, seed: int = 0) -> nn.Module:
    """Sixteen 3 x 3 convolutions with ReLU and a linear head, trained with a margin."""
    torch.manual_seed(seed)
    channels, *size = data.input_shape
    layers: list[nn.Module] = []
    for depth in range(DEPTH):
        conv = nn.Conv2d(CHANNELS if depth else channels, CHANNELS, 3, padding=1)
        with torch.no_grad():
            conv.weight.normal_(0.0, 0.02)
            conv.weight[:, :, 1, 1] += nn.init.orthogonal_(torch.empty(conv.weight.shape[:2]))
        layers += [conv, nn.ReLU()]
    head = nn.Linear(CHANNELS * size[0] * size[1], data.classes)
    model = nn.Sequential(*layers, nn.Flatten(), head)
    bound = lf.NetworkBound(model, data.input_shape)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH):
            logits = model(data.x_train[batch])
            loss = lf.margin_cross_entropy(logits, data.y_train[batch], bound(), eps=EPS)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def cases(
    checkpoint: str | None, data: str | None, limit: int
) -> Iterator[tuple[str, nn.Module, Tensor]]:
    if checkpoint is not None:
        saved = load_checkpoint(checkpoint)
        images = load_dataset(data or saved.config.data, input_range=saved.config.input_range)
        yield saved.config.model, saved.model(), images.x_test[:limit]
    digits = load_dataset("digits")
    yield f"conv-{DEPTH}", deep_network(digits), digits.x_test[:limit]


def kept(model: nn.Module, x: Tensor) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Profile, ideal radii and the shares of them that its radii keep."""
    shape = tuple(x.shape[1:])
    ideal = lf.certify(model, x, input_shape=shape, input_range=(0.0, 1.0)).prediction_radius
    sure = ideal > 0
    for profile in PROFILES.values():
        found = lf.certify(
            model, x, input_shape=shape, input_range=(0.0, 1.0), semantics=profile.semantics
        )
        yield profile.semantics, ideal[sure], found.prediction_radius[sure] / ideal[sure]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint")
    parser.add_argument("--data")
    parser.add_argument("--limit", type=int, default=1000)
    chosen = parser.parse_args(arguments)
    line = "{:12s} {:18s} {:>6s} {:>10s} {:>10s} {:>10s} {:>10s}\n"
    sys.stdout.write(
        line.format("network", "semantics", "points", "radius", "median", "least", "clear")
    )
    for name, model, x in cases(chosen.checkpoint, chosen.data, chosen.limit):
        for semantics, ideal, share in kept(model, x):
            clear = share[ideal > CLEAR]
            figures = (np.median(ideal), np.median(share), share.min(), clear.min(initial=1.0))
            sys.stdout.write(
                line.format(name, semantics, str(len(share)), *(f"{v:.6f}" for v in figures))
            )


if __name__ == "__main__":
    main()
