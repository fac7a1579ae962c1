# SPDX-License-Identifier: MIT
"""Small networks of convolutions and matrices for the contract of compiled spectral steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lmtfast.engines import get_engine
from lmtfast.graph import (
    BatchNormScale,
    BoundGraph,
    ChannelScale,
    Conv,
    Instruction,
    Linear,
    ParameterRef,
    Region,
    RegionNode,
    Scale,
    WeightRef,
)
from lmtfast.plan import BoundPlan, make_plan
from tests.engine_cases import conv_region


@dataclass
class Network:
    """Regions whose norms are multiplied, and the tensors they read."""

    regions: list[Region] = field(default_factory=list)
    tensors: dict[WeightRef, Tensor] = field(default_factory=dict)

    def plan(self, engine: str, backend: str) -> BoundPlan:
        tape = [Instruction("sigma", (0,))]
        for i in range(1, len(self.regions)):
            tape += [Instruction("sigma", (i,)), Instruction("mul", (len(tape) - 1, len(tape)))]
        last = len(tape) - 1
        ends = self.regions[0].in_shape, self.regions[-1].out_shape
        graph = BoundGraph(*ends, tuple(self.regions), tuple(tape), last, last, None)
        return make_plan(nn.Identity(), graph, engine=engine, backend=backend)

    def values(self, plan: BoundPlan) -> list[Tensor]:
        """One tensor per slot of the plan."""
        return [self.tensors[ref] for ref in plan.slots]

    @property
    def convolutions(self) -> list[Region]:
        return [region for region in self.regions if isinstance(region.primitive, Conv)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Network:
        """A network whose weights, but not its scales, are changed."""
        weights = {region.primitive.weight for region in self.regions}  # type: ignore[union-attr]
        tensors = {r: change(t) if r in weights else t for r, t in self.tensors.items()}
        return Network(self.regions, tensors)

    def __add__(self, other: Network) -> Network:
        return Network(self.regions + other.regions, self.tensors | other.tensors)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv(name: str, shape: tuple[int, ...], extent: tuple[int, ...], **options: object) -> Network:
    """One convolution; ``shape`` is the kernel's, ``extent`` the input's without channels."""
    weight = randn(*shape, seed=sum(map(ord, name)))
    channels = shape[0] if options.get("transposed") else shape[1] * options.get("groups", 1)  # type: ignore[operator]
    region = conv_region(weight, (channels, *extent), **options)  # type: ignore[arg-type]
    op = region.primitive
    assert isinstance(op, Conv)
    return _network(name, replace(op, name=name, weight=ParameterRef(name)), weight)


def matrix(name: str, rows: int, columns: int, positions: tuple[int, ...] = ()) -> Network:
    op = Linear(name, (*positions, columns), (*positions, rows), ParameterRef(name))
    return _network(name, op, randn(rows, columns, seed=sum(map(ord, name))))


def _network(name: str, op: Conv | Linear, weight: Tensor) -> Network:
    region = Region(name, op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))
    return Network([region], {op.weight: weight})


def scaled(network: Network, *, gain: float = 1.0, identity: float = 0.0) -> Network:
    """The network's only operator with a batch norm and a scalar behind it, a factor before it."""
    op = network.regions[0].primitive
    assert isinstance(op, (Conv, Linear))
    linear = isinstance(op, Linear)
    ends = (op.out_shape[-1], op.in_shape[-1]) if linear else (op.out_shape[0], op.in_shape[0])
    gamma, variance, alpha, before = (
        ParameterRef(f"{op.name}.{part}") for part in ("gamma", "variance", "alpha", "before")
    )
    norm = BatchNormScale(gamma, variance, 1e-3, op.name)
    op = replace(
        op, row_scales=(ChannelScale(norm), ChannelScale(alpha, inverse=True)),
        column_scales=(ChannelScale(before),), gain=gain, identity_gain=identity,
    )  # fmt: skip
    region = Region(op.name, op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))
    tensors = {
        gamma: randn(ends[0], seed=1), variance: randn(ends[0], seed=2).square() + 0.1,
        alpha: torch.tensor([-0.7]), before: randn(ends[1], seed=3),
    }  # fmt: skip
    return Network([region], network.tensors | tensors)


def diagonal(
    name: str, tensors: dict[WeightRef, Tensor], ref: WeightRef, channels: int | None = None,
    *, inverse: bool = False, gain: float = 1.0,
) -> Network:  # fmt: skip
    """One factor per channel of an image, or one for all where ``channels`` is None."""
    shape = (channels or 1, 3, 4)
    broadcast = () if channels is None else (channels, 1, 1)
    op = Scale(name, shape, shape, ref, broadcast, inverse, gain)
    return Network([Region(name, shape, shape, (RegionNode(op, (-1,)),))], tensors)


def diagonals() -> Network:
    """Pre-activation blocks: batch norms before and after convolutions. The first two share a
    variance, the first and a convolution a gain, the last two all they have."""
    first = conv("first", (6, 5, 3, 3), (6, 5))
    second = scaled(conv("second", (5, 6, 3, 3), (6, 5), stride=(2, 1)), gain=1.5)
    gamma, variance, beta = (ParameterRef(f"diagonal.{n}") for n in ("gamma", "variance", "beta"))
    shared = {variance: randn(5, seed=8).square() + 0.1, gamma: randn(5, seed=9)}
    norm = BatchNormScale(ParameterRef("second.gamma"), variance, 1e-3, "before")
    after = BatchNormScale(gamma, variance, 1e-3, "after")
    return (
        diagonal("before", shared, norm, 5) + first + diagonal("after", {}, after, 5, gain=-0.5)
        + second + diagonal("wide", {beta: randn(300, seed=10)}, beta, 300)
        + diagonal("wide again", {}, beta, 300, inverse=True)
    )  # fmt: skip


def heads() -> Network:
    """Matrices beside convolutions, as heads and between them: more rows than a tile and fewer,
    scales with and without identity, one at several positions."""
    first, second = conv("first", (6, 5, 3, 3), (6, 5)), matrix("head", 33, 70)
    third = scaled(matrix("scaled_head", 9, 9), gain=-0.5, identity=1.5)
    return (
        first + second + third + scaled(matrix("tall_head", 41, 6, (3,)))
        + scaled(conv("depthwise_second", (4, 1, 3, 3), (4, 4), groups=4)) + matrix("row", 1, 7)
    )  # fmt: skip


def mixed_heads() -> Network:
    """A convolution and a matrix in bfloat16, and a scaled matrix in float32."""
    half = (conv("small", (4, 3, 3, 2), (4, 3)) + matrix("head", 33, 70)).map(Tensor.bfloat16)
    return half + scaled(matrix("scaled_head", 9, 9), gain=-0.5, identity=1.5)


def tap_major(weight: Tensor) -> Tensor:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    return weight if last is None else weight.contiguous(memory_format=last)


def tied() -> Network:
    """Three convolutions and two weights: one weight serves two maps of different size."""
    first, second = conv("tied", (6, 6, 3, 3), (7, 5)), conv("alone", (6, 6, 3, 3), (7, 5))
    op = conv("tied", (6, 6, 3, 3), (4, 9), dilation=(1, 2)).regions[0].primitive
    assert isinstance(op, Conv)
    again = Region("again", op.in_shape, op.out_shape, (RegionNode(op, (-1,)),))
    return Network([*first.regions, *second.regions, again], first.tensors | second.tensors)


def _cases() -> dict[str, Network]:
    found = [
        conv("plain", (5, 7, 3, 3), (9, 11)),
        conv("pointwise", (6, 5, 1, 1), (5, 3)),
        conv("one_channel", (1, 1, 3, 3), (5, 6)),
        conv("one_row", (1, 6, 3, 3), (5, 6)),
        conv("one_pixel", (4, 3, 3, 3), (1, 1)),
        conv("even", (5, 4, 2, 4), (6, 7), padding=((0, 1), (2, 1))),
        conv("strided", (6, 5, 3, 3), (8, 8), stride=(2, 2)),
        conv("uneven", (4, 5, 3, 2), (9, 8), stride=(2, 1), dilation=(1, 2),
             padding=((1, 0), (0, 2))),
        conv("sparse", (3, 4, 2, 2), (11, 12), stride=(3, 4), padding=((0, 0), (1, 1))),
        conv("dilated", (4, 3, 3, 3), (12, 10), stride=(2, 3), dilation=(2, 3)),
        conv("grouped", (6, 4, 3, 3), (6, 7), groups=3),
        conv("depthwise", (5, 1, 3, 3), (7, 6), groups=5),
        conv("depthwise_pair", (2, 1, 3, 3), (5, 3), groups=2),
        conv("multiplier", (8, 1, 3, 3), (6, 6), groups=4, stride=(2, 1)),
        conv("transposed", (5, 4, 3, 3), (4, 5), stride=(2, 2), transposed=True,
             output_padding=(1, 0)),
        conv("transposed_groups", (6, 2, 4, 4), (4, 3), stride=(2, 2), transposed=True, groups=2),
        conv("line", (4, 5, 5), (17,)),
        conv("line_strided", (7, 3, 4), (19,), stride=(3,), padding=((2, 0),)),
        conv("volume", (4, 3, 3, 2, 3), (4, 3, 5), padding=((1, 1), (0, 1), (1, 1))),
        conv("volume_strided", (3, 4, 2, 3, 2), (4, 5, 4), stride=(2, 1, 2)),
        conv("circular", (4, 5, 3, 3), (6, 7), padding_mode="circular"),
        conv("circular_strided", (4, 5, 3, 3), (6, 8), stride=(2, 2), padding_mode="circular"),
        conv("wide", (37, 53, 3, 3), (5, 6)),
        conv("tall", (150, 3, 3, 3), (6, 5)),
        conv("long", (70, 301, 1, 1), (3, 3)),
        scaled(conv("scaled", (5, 7, 3, 3), (6, 5)), gain=-0.5),
        scaled(conv("scaled_groups", (6, 2, 3, 3), (6, 5), groups=3)),
        scaled(conv("scaled_transposed", (4, 3, 3, 3), (5, 4), stride=(2, 2), transposed=True,
                    groups=2)),
        scaled(conv("identity", (6, 6, 3, 3), (6, 7)), identity=1.0),
        scaled(conv("identity_dilated", (4, 4, 5, 3), (9, 7), dilation=(2, 1)), identity=-2.0),
        scaled(conv("identity_groups", (6, 3, 3, 3), (5, 5), groups=2), gain=0.3, identity=0.5),
        scaled(conv("identity_transposed", (4, 4, 3, 3), (5, 5), transposed=True), identity=0.7),
        matrix("matrix", 7, 12),
        matrix("matrix_positions", 33, 70, (5,)),
        scaled(matrix("matrix_scaled", 9, 9), gain=2.0, identity=1.0),
    ]  # fmt: skip
    cases = {network.regions[0].name: network for network in found}
    for name in (
        "plain",
        "scaled",
        "identity_groups",
        "volume",
        "strided",
        "transposed_groups",
        "wide",
    ):
        cases[f"{name}, tap-major"] = cases[name].map(tap_major)
    for name in ("plain", "depthwise", "wide", "scaled", "matrix_positions", "identity_transposed"):
        cases[f"{name}, bfloat16"] = cases[name].map(torch.Tensor.bfloat16)
    cases["wide, bfloat16, tap-major"] = cases["wide, bfloat16"].map(tap_major)
    cases["plain, float16"] = cases["plain"].map(torch.Tensor.half)
    cases["sliced"] = cases["plain"].map(lambda w: torch.stack((w, w), -1)[..., 0])
    cases["tied"] = tied()
    small = conv("small", (4, 3, 3, 2), (4, 3))
    cases["head"] = small + cases["matrix_positions"]
    cases["wide head"] = small + scaled(matrix("wide_head", 40, 1032))
    cases["heads"], cases["heads, mixed dtypes"] = heads(), mixed_heads()
    cases["many"] = cases["scaled"] + cases["depthwise"] + cases["line"] + cases["wide"] + tied()
    return cases


CASES = _cases()


def runnable(engine: str) -> list[str]:
    """Cases whose convolutions the engine itself runs, or whose matrices where there are no others:
    one that refuses a region hands it to ``operator``."""

    def runs(region: Region) -> bool:
        return get_engine(engine).refusal(region) is None

    return [
        name
        for name, network in CASES.items()
        if all(map(runs, network.convolutions or network.regions))
    ]
