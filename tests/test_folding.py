# SPDX-License-Identifier: MIT
"""Folding never changes the linear map, up to reorderings at its ends."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lmtfast.backends.reference import region_apply
from lmtfast.folding import fold
from lmtfast.graph import (
    INPUT,
    Average,
    Call,
    ChannelScale,
    ConstantRef,
    Conv,
    Copy,
    Linear,
    Region,
    RegionNode,
    Scale,
    number,
)  # fmt: skip
from lmtfast.weights import Weights, constant_ref
from tests.oracles import svd_norm

C, N = 2, 4
SHAPE = (C, N)


def constant(rng: random.Random, *shape: int) -> ConstantRef:
    values = [rng.choice((-1, 1)) * rng.randrange(1, 256) / 64 for _ in range(int(np.prod(shape)))]
    return constant_ref(torch.tensor(values, dtype=torch.float64).reshape(shape))


def conv(rng: random.Random) -> Conv:
    kernel = rng.choice((1, 3))
    mode = rng.choice(("zeros", "circular"))
    pad = ((kernel - 1) // 2,) * 2
    return Conv(
        "conv", SHAPE, SHAPE, constant(rng, C, C, kernel), (kernel,), (1,), (pad,), (1,), 1,
        padding_mode=mode,
    )  # fmt: skip


def scale(rng: random.Random) -> Scale:
    if rng.random() < 0.4:
        return Scale("factor", SHAPE, SHAPE, gain=rng.choice((2.0, -1.0, 0.1, 0.3)))
    shape = rng.choice(((C, 1), (N,), (), (1, N), (C, N)))
    return Scale(
        "scale", SHAPE, SHAPE, constant(rng, *shape), shape, inverse=rng.random() < 0.3,
        gain=rng.choice((1.0, 0.5, 0.1)),
    )  # fmt: skip


def flip(axis: int) -> Copy:
    call = Call("aten.flip.default", (INPUT, (axis,)))
    return Copy("flip", SHAPE, SHAPE, call, 1, True, False)


def average() -> Average:
    call = Call("aten.avg_pool1d.default", (INPUT, (3,), (1,), (1,)))
    return Average("pool", SHAPE, SHAPE, call, 1.0)


def random_region(seed: int) -> Region:
    """Nodes of one shape, each reading any earlier ones, so that many have several readers."""
    rng = random.Random(seed)
    nodes: list[RegionNode] = []
    for i in range(rng.randint(1, 7)):
        recent = [*range(-1, i)]
        source = rng.choice(recent[-3:])
        kind = rng.choice(("conv", "conv", "scale", "scale", "linear", "flip", "average", "add"))
        if kind == "add":
            nodes.append(RegionNode("add", (source, rng.choice(recent))))
            continue
        op = {
            "conv": lambda: conv(rng),
            "scale": lambda: scale(rng),
            "linear": lambda: Linear("linear", SHAPE, SHAPE, constant(rng, N, N)),
            "flip": lambda: flip(rng.choice((1, 2))),
            "average": average,
        }[kind]()
        nodes.append(RegionNode(op, (source,)))
    return Region("region", SHAPE, SHAPE, tuple(nodes))


def matrix(region: Region) -> np.ndarray:
    n = int(np.prod(region.in_shape))
    basis = torch.eye(n, dtype=torch.float64).reshape(n, *region.in_shape)
    return region_apply(region, Weights({}, dtype=torch.float64), basis).reshape(n, -1).T.numpy()


@pytest.mark.parametrize("block", range(8))
def test_folding_keeps_the_map(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        region = random_region(seed)
        folded = fold(region)
        assert len(folded.nodes) <= len(region.nodes)
        assert fold(folded) == folded
        before, after = matrix(region), matrix(folded)
        norm = svd_norm(before)
        assert abs(svd_norm(after) - norm) <= 1e-12 * (1 + norm), seed
        # Without reorderings at the ends, the very entries are the same.
        if not any(isinstance(n.op, Copy) for n in region.nodes):
            assert np.allclose(before, after, rtol=1e-12, atol=1e-12 * (1 + norm)), seed


def test_an_identity_gain_is_never_rounded() -> None:
    kernel = conv(random.Random(0))
    tiny = Scale("factor", SHAPE, SHAPE, gain=2.0**-60)
    nodes = (
        RegionNode(kernel, (-1,)),
        RegionNode("add", (-1, 0)),
        RegionNode(tiny, (1,)),
        RegionNode("add", (-1, 2)),
    )
    folded = fold(Region("region", SHAPE, SHAPE, nodes))
    assert all(getattr(n.op, "identity_gain", 0.0) != 1.0 for n in folded.nodes)


def test_factors_that_round_stay_apart() -> None:
    kernel = conv(random.Random(0))
    nodes = tuple(
        RegionNode(op, (i - 1,))
        for i, op in enumerate(
            (kernel, *(Scale("factor", SHAPE, SHAPE, gain=g) for g in (0.1, 0.3, 0.5)))
        )
    )
    op = fold(Region("region", SHAPE, SHAPE, nodes)).primitive
    assert isinstance(op, Conv)
    assert op.gain == 0.05
    assert op.row_scales == (ChannelScale(number(0.3)),)
