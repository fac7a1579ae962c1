# SPDX-License-Identifier: MIT
"""Single convolutions for the engines' tests: regions, random geometries, dense norms, states."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmtfast.backends.reference import Leaves
from lmtfast.graph import Conv, ParameterRef, Region, RegionNode
from tests.oracles import conv_matrix, output_extent, svd_norm

REF = ParameterRef("weight")


class Case(NamedTuple):
    """A convolution with its weight and the dense norm of its operator."""

    region: Region
    weight: Tensor
    norm: float


def conv_region(
    weight: Tensor,
    in_shape: tuple[int, ...],
    *,
    stride: tuple[int, ...] | None = None,
    padding: tuple[tuple[int, int], ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    groups: int = 1,
    transposed: bool = False,
    output_padding: tuple[int, ...] = (),
    padding_mode: str = "zeros",
    gain: float = 1.0,
    identity_gain: float = 0.0,
) -> Region:
    """A region of one convolution; "same" padding for odd kernels unless given."""
    axes, k = weight.ndim - 2, tuple(weight.shape[2:])
    stride, dilation = stride or (1,) * axes, dilation or (1,) * axes
    padding = padding or tuple((d * (n - 1) // 2,) * 2 for n, d in zip(k, dilation, strict=True))
    extra = output_padding or (0,) * axes
    if transposed:
        spatial = tuple(
            (n - 1) * s - low - high + d * (kk - 1) + 1 + e
            for n, s, (low, high), d, kk, e in zip(
                in_shape[1:], stride, padding, dilation, k, extra, strict=True
            )
        )
        out_shape = (weight.shape[1] * groups, *spatial)
    else:
        spatial = tuple(
            output_extent(n, kk, s, pair, d)
            for n, kk, s, pair, d in zip(in_shape[1:], k, stride, padding, dilation, strict=True)
        )
        out_shape = (weight.shape[0], *spatial)
    op = Conv(
        "conv", tuple(in_shape), out_shape, REF, k, stride, padding, dilation, groups, transposed,
        output_padding, padding_mode, (), (), gain, identity_gain,
    )  # fmt: skip
    return Region("conv", op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))


def dense_norm(region: Region, weight: Tensor) -> float:
    """Float64 norm of the operator's dense matrix."""
    op = region.primitive
    assert isinstance(op, Conv)
    matrix = conv_matrix(
        weight.double().numpy(), op.in_shape, op.stride, list(op.padding), op.dilation, op.groups,
        op.padding_mode, op.transposed, list(op.output_padding) or 0,
    )  # fmt: skip
    return svd_norm(matrix)


def weights_of(weight: Tensor) -> Leaves:
    return Leaves({REF: weight})


def start(engine, region: Region, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A state as the library makes it: independent Gaussians of unit length."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(engine.state_size(region), generator=generator, dtype=torch.float64)
    return (state / state.norm()).to(dtype)


def run(engine, region: Region, weight: Tensor, state: Tensor, steps: int) -> tuple[float, Tensor]:
    """Sigma after ``steps`` steps, fewer if it stands still, and the state."""
    weights, last = weights_of(weight), 0.0
    for i in range(steps):
        result = engine.step(region, weights, state, update=True)
        state, sigma = result.state, result.sigma.item()
        if i > 20 and sigma - last <= 1e-14 * sigma:
            break
        last = sigma
    return engine.step(region, weights, state, update=False).sigma.item(), state


def random_case(rng: np.random.Generator, axes: int) -> Case | None:
    """A small random geometry: stride, dilation, groups, even kernels, odd sizes, transposed."""
    pick = lambda low, high: tuple(int(rng.integers(low, high)) for _ in range(axes))  # noqa: E731
    groups = int(rng.choice([1, 1, 1, 2, 3]))
    rows, columns = (groups * int(rng.integers(1, 4)) for _ in range(2))
    transposed = bool(rng.random() < 0.3)
    stride = pick(1, 4)
    shape = (columns, rows // groups) if transposed else (rows, columns // groups)
    weight = torch.from_numpy(rng.standard_normal((*shape, *pick(1, 5 if axes < 3 else 3))))
    low = pick(0, 3)
    high = low if transposed else pick(0, 3)
    region = conv_region(
        weight, (columns, *pick(2, {1: 14, 2: 8, 3: 5}[axes])), stride=stride,
        padding=tuple(zip(low, high, strict=True)), dilation=pick(1, 3), groups=groups,
        transposed=transposed,
        output_padding=tuple(int(rng.integers(0, s)) for s in stride) if transposed else (),
    )  # fmt: skip
    if min(region.out_shape) < 1:
        return None
    return Case(region, weight, dense_norm(region, weight))


def smooth_weight(rng: np.random.Generator, rows: int, columns: int, k: int = 3) -> Tensor:
    """A kernel dominated by low frequencies, as trained networks have them, plus noise."""
    bump = np.convolve([1.0, 1.0], np.ones(k - 1)) / k
    mixing = rng.standard_normal((rows, columns))
    decay = np.arange(1, min(rows, columns) + 1) ** -0.7
    left, _, right = np.linalg.svd(mixing, full_matrices=False)
    mixing = (left * decay) @ right
    weight = mixing[:, :, None, None] * (bump[:, None] * bump)
    noise = rng.standard_normal(weight.shape) * 0.3 / np.sqrt(rows * k * k)
    return torch.from_numpy(weight + noise * decay.mean())
