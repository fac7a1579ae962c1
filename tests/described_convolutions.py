# SPDX-License-Identifier: MIT
"""Convolutions as certificates describe them, at random, and their matrices."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.oracles import conv_matrix


def described_convolution(
    seed: int, modes: Sequence[str | None], longest: int
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A node of a description and the shape of its kernel, the array ``w``.

    Args:
        seed: Goes through the modes and, slower, through one and two axes.
        modes: Borders to take turns; None is zeros.
        longest: Of the input along one axis.
    """
    choice = random.Random(seed)
    mode, axes = modes[seed % len(modes)], 1 + seed // len(modes) % 2
    groups = choice.choice((1, 1, 2))
    while True:
        sides = [choice.randint(2, longest if axes == 1 else 6) for _ in range(axes)]
        kernel, stride, dilation = ([choice.randint(1, top) for _ in sides] for top in (4, 3, 2))
        padding = [[choice.randint(0, n - 1 if mode else 2) for _ in "ab"] for n in sides]
        rules = zip(sides, padding, kernel, stride, dilation, strict=True)
        out = [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in rules]
        if min(out) > 0:
            break
    rows, columns = (groups * choice.randint(1, 3) for _ in "ab")
    node = {
        "op": "conv", "in": [columns, *sides], "out": [rows, *out], "rows": [], "columns": [],
        "gain": (1.0).hex(), "identity": (0.0).hex(), "weight": {"array": "w"}, "inputs": [-1],
        "groups": groups, "kernel": kernel, "stride": stride, "padding": padding,
        "dilation": dilation, "centre": [0] * axes,
    }  # fmt: skip
    node |= {"mode": mode} if mode else {}
    return node, (rows, columns // groups, *kernel)


def convolution_matrix(node: dict[str, Any], weight: np.ndarray) -> np.ndarray:
    """The map of the whole convolution, entry by entry."""
    return conv_matrix(
        weight, node["in"], node["stride"], node["padding"], node["dilation"], node["groups"],
        node.get("mode", "zeros"),
    )  # fmt: skip
