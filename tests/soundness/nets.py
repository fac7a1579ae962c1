# SPDX-License-Identifier: MIT
"""Networks whose Lipschitz constant or radii are known exactly: N1 to N10 of the adversarial suite.

:data:`NETS` is the table: a family's name to a generator ``rng -> Net``; ``net(family, seed)`` is
one member. N7 has its exact values from its linear pieces, in :mod:`tests.soundness.polygons`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.cases import Lambda
from tests.classifiers import exact_radius_squared
from tests.soundness.constructions import (
    PYTHAGOREAN,
    Construction,
    Generator,
    dense,
    hadamard,
    signed_permutation,
)


@dataclass(frozen=True)
class Net:
    """A network in float64 and eval mode with what is known of it.

    Attributes:
        name: For messages.
        model: The network.
        shape: Of one input.
        constant: An operator whose norm is the network's Lipschitz constant.
        excess: Relative excess of ``total`` that the composition rules owe; None where they are
            loose.
        points: Inputs ``(N, *shape)``, with their class and the exact squared radius in ``radii``.
        tight: Whether certified radii are within 1e-6 of the exact ones.
    """

    name: str
    model: nn.Module = field(repr=False)
    shape: tuple[int, ...]
    constant: Construction | None = None
    excess: float | None = None
    points: Tensor | None = field(default=None, repr=False)
    radii: Sequence[tuple[int, Fraction]] = field(default=(), repr=False)
    tight: bool = False


def linear(weight: Any, bias: Any = None) -> nn.Linear:
    matrix = torch.as_tensor(np.asarray(weight, dtype=np.float64))
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        layer.weight.copy_(matrix)
        if bias is not None:
            layer.bias.copy_(torch.as_tensor(np.asarray(bias, dtype=np.float64)))
    return layer


def sequence(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).double().eval()


def integers(rng: Generator, *shape: int) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(float)


def inputs(rng: Generator, count: int, *shape: int) -> Tensor:
    """Multiples of 1/64 in [0, 1]."""
    return torch.from_numpy(rng.integers(0, 65, (count, *shape)) / 64.0)


def classified(weight: np.ndarray, bias: np.ndarray, x: Tensor) -> list[tuple[int, Fraction]]:
    """Exact radii of a linear classifier; zero at ties."""
    w, b = torch.from_numpy(weight), torch.from_numpy(bias)
    return [exact_radius_squared(w, b, point) for point in x]


# -- families --------------------------------------------------------------------------------------


def n1(rng: Generator) -> Net:
    """Products of integer matrices, with biases: one affine map in disguise."""
    sizes = [int(n) for n in rng.integers(2, 6, int(rng.integers(2, 5)))]
    layers, product, offset = [], np.eye(sizes[0]), np.zeros(sizes[0])
    for rows, columns in zip(sizes[1:], sizes, strict=False):
        weight, bias = integers(rng, rows, columns), integers(rng, rows)
        layers.append(linear(weight, bias))
        product, offset = weight @ product, weight @ offset + bias
    x = inputs(rng, 6, sizes[0])
    # Rows that coincide never flip, or always tie.
    distinct = len({tuple(row) for row in product.tolist()}) == sizes[-1]
    radii = classified(product, offset, x) if distinct else ()
    return Net(f"product of {sizes}", sequence(*layers), (sizes[0],), dense("product", product),
               None, x, radii)  # fmt: skip


def n2(rng: Generator) -> Net:
    """ReLUs between nonnegative matrices: all active on the positive orthant."""
    sizes = [int(n) for n in rng.integers(2, 6, int(rng.integers(3, 5)))]
    layers: list[nn.Module] = []
    product = np.eye(sizes[0])
    for rows, columns in zip(sizes[1:], sizes, strict=False):
        weight = np.abs(integers(rng, rows, columns))
        layers += [linear(weight, rng.integers(0, 9, rows) / 8), nn.ReLU()]
        product = weight @ product
    return Net(f"nonnegative {sizes}", sequence(*layers), (sizes[0],), dense("product", product))


# Whether the rules owe the constant of one exactly: maxima and minima of slices are joined, which
# costs a factor of sqrt(2).
SORTINGS: tuple[tuple[bool, Callable[[Any, Tensor], Tensor]], ...] = (
    (False, lambda m, x: torch.cat(
        [torch.maximum(x[:, :4], x[:, 4:]), torch.minimum(x[:, :4], x[:, 4:])], 1)),
    (True, lambda m, x: x.reshape(-1, 4, 2).sort(-1)[0].flatten(1)),
    (True, lambda m, x: x.sort(1, descending=True)[0]),
)  # fmt: skip


def n3(rng: Generator) -> Net:
    """Orthogonal layers and sorting: exactly one."""
    layers: list[nn.Module] = []
    exact = True
    for _ in range(int(rng.integers(1, 4))):
        turn = hadamard(4) / 2.0 if rng.integers(0, 2) else signed_permutation(rng, 4)
        owed, sorting = SORTINGS[int(rng.integers(len(SORTINGS)))]
        layers += [linear(np.kron(signed_permutation(rng, 2), turn)), Lambda(sorting)]
        exact &= owed
    one = dense("one", np.eye(8), 1)
    return Net("orthogonal and sorted", sequence(*layers), (8,), one, 1e-9 if exact else None)


def n4(rng: Generator) -> Net:
    """Towers of tents ``2 relu(x) - 4 relu(x - 1/2)``: slope exactly 2^k."""
    k = int(rng.integers(1, 7))
    layers: list[nn.Module] = []
    for i in range(k):
        first = [[1.0, 0.0], [1.0, 0.0]] if i == 0 else [[1.0], [1.0]]
        layers += [linear(first, [0.0, -0.5]), nn.ReLU(), linear([[2.0, -4.0]])]
    return Net(f"{k} tents", sequence(*layers), (2,), dense("slope", np.eye(1) * 2**k, 4**k))


def n6(rng: Generator) -> Net:
    """Linear classifiers and nearest prototypes: radius is margin over distance of rows."""
    classes, size = int(rng.integers(2, 6)), int(rng.integers(2, 9))
    rows = np.unique(integers(rng, 2 * classes, size), axis=0)[:classes]
    bias = rng.integers(-8, 9, len(rows)) / 4.0
    if rng.integers(0, 2):
        prototypes = np.unique(rng.integers(0, 9, (2 * classes, size)) / 8.0, axis=0)[:classes]
        rows, bias = 2 * prototypes, -(prototypes**2).sum(1)
    x = inputs(rng, 8, size)
    return Net("linear", sequence(linear(rows, bias)), (size,), dense("rows", rows), 1e-9, x,
               classified(rows, bias, x), tight=True)  # fmt: skip


def n8(rng: Generator) -> Net:
    """A linear classifier behind a projection and pairs ``relu(z) - relu(-z)``."""
    size, kept, classes = int(rng.integers(4, 9)), int(rng.integers(2, 4)), int(rng.integers(2, 4))
    project = signed_permutation(rng, size)[:kept]
    rows = np.unique(integers(rng, 4 * classes, kept), axis=0)[:classes]
    shift = rng.integers(-16, 17, kept) / 16.0
    eye = np.eye(kept)
    model = sequence(
        linear(project, shift), linear(np.concatenate([eye, -eye])), nn.ReLU(),
        linear(np.concatenate([eye, -eye], 1), -shift), linear(rows),
    )  # fmt: skip
    x = inputs(rng, 8, size)
    weight = rows @ project
    return Net("projected pairs", model, (size,), dense("rows", weight), None, x,
               classified(weight, np.zeros(len(rows)), x))  # fmt: skip


class Joined(nn.Module):
    """``function(module, x)`` with its layers; the function says how branches meet."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# Name, function of m.a (times a) and m.b (times b), exact square, whether the rules owe it exactly.
# Wherever a ReLU stands, an open set of inputs makes it active or passes it by.
JOINS: tuple[tuple[str, Callable[[Any, Tensor], Tensor], Callable[[int, int], int], bool], ...] = (
    ("x + a x", lambda m, x: x + m.a(x), lambda a, b: (1 + a) ** 2, True),
    ("x + relu(a x)", lambda m, x: x + m.a(x).relu(), lambda a, b: (1 + a) ** 2, True),
    ("x - relu(-a x)", lambda m, x: x - (-m.a(x)).relu(), lambda a, b: (1 + a) ** 2, True),
    ("a x + b x", lambda m, x: m.a(x) + m.b(x), lambda a, b: (a + b) ** 2, True),
    ("relu(a x) + relu(b x)", lambda m, x: m.a(x).relu() + m.b(x).relu(),
     lambda a, b: (a + b) ** 2, True),
    ("[x, x]", lambda m, x: torch.cat([x, x], 1), lambda a, b: 2, True),
    ("[a x, b x]", lambda m, x: torch.cat([m.a(x), m.b(x)], 1), lambda a, b: a * a + b * b, True),
    ("[relu(a x), x, b x]", lambda m, x: torch.cat([m.a(x).relu(), x, m.b(x)], 1),
     lambda a, b: a * a + b * b + 1, True),
    ("stack of x and relu(a x)", lambda m, x: torch.stack([x, m.a(x).relu()], 1),
     lambda a, b: 1 + a * a, True),
    ("a twice", lambda m, x: m.a(m.a(x).relu()), lambda a, b: a**4, True),
    ("a three times", lambda m, x: m.a(m.a(m.a(x).relu()).relu()), lambda a, b: a**6, True),
    ("a shared by two branches", lambda m, x: m.b(m.a(x).relu()) + m.a(x).relu(),
     lambda a, b: (a * b + a) ** 2, True),
    ("residual of a residual", lambda m, x: (y := x + m.a(x).relu()) + m.b(y).relu(),
     lambda a, b: ((1 + a) * (1 + b)) ** 2, True),
    ("dense block", lambda m, x: torch.cat([x, y := m.a(x).relu(), m.b(x + y).relu()], 1),
     lambda a, b: 1 + a * a + (b * (1 + a)) ** 2, True),
    ("sum over [x, a x]", lambda m, x: torch.stack([x, m.a(x).relu()], 1).sum(1),
     lambda a, b: (1 + a) ** 2, False),
    ("halves", lambda m, x: torch.cat([m.a(x)[:, :2], m.b(x)[:, 2:]], 1),
     lambda a, b: max(a, b) ** 2, False),
    ("largest of a x and b x", lambda m, x: torch.maximum(m.a(x), m.b(x)),
     lambda a, b: max(a, b) ** 2, False),
    ("x repeated", lambda m, x: m.a(x).repeat(1, 3), lambda a, b: 3 * a * a, True),
    ("x + a (mean of x)", lambda m, x: x + m.a(x).mean(1, keepdim=True),
     lambda a, b: (1 + a) ** 2, False),
    ("b of a skip over a", lambda m, x: m.b(x + m.a(x).relu()).relu(),
     lambda a, b: ((1 + a) * b) ** 2, True),
)  # fmt: skip


def n10(rng: Generator, join: int | None = None) -> Net:
    """Skips, concatenations, branches, shared modules on diagonal layers."""
    index = int(rng.integers(len(JOINS))) if join is None else join
    name, function, square, owed = JOINS[index]
    a, b = (int(n) for n in rng.integers(1, 8, 2))
    model = Joined(function, a=linear(a * np.eye(4)), b=linear(b * np.eye(4))).eval()
    constant = dense("constant", np.eye(1), square(a, b))
    return Net(f"{name}, a = {a}, b = {b}", model, (4,), constant, 1e-9 if owed else None)


NETS: dict[str, Callable[[Generator], Net]] = {
    "N1": n1, "N2": n2, "N3": n3, "N4": n4, "N6": n6, "N8": n8, "N10": n10,
}  # fmt: skip


def net(family: str, seed: int) -> Net:
    """Member ``seed`` of a family."""
    return NETS[family](np.random.default_rng([zlib.crc32(family.encode()), seed]))


# -- N7 and C16: ReLU networks on the plane, for the exact pieces ----------------------------------


def planar(rng: Generator) -> nn.Sequential:
    """N7: up to 12 hidden units in one or two layers, weights in eighths."""
    sizes = [2, *(int(n) for n in rng.integers(2, 7, int(rng.integers(1, 3)))),
             int(rng.integers(2, 4))]  # fmt: skip
    layers: list[nn.Module] = []
    for rows, columns in zip(sizes[1:], sizes, strict=False):
        weight = rng.integers(-16, 17, (rows, columns)) / 8.0
        layers += [linear(weight, rng.integers(-16, 17, rows) / 8.0), nn.ReLU()]
    return sequence(*layers[:-1])


def trap(rng: Generator) -> nn.Sequential:
    """C16: layers that cancel in exact arithmetic and not in floating point.

    ``omega x + c - omega x`` with omega up to 2^70, sums whose order decides, biases of 1e6, and
    layers scaled by 2^k and 2^-k.
    """
    kind = rng.choice(["omega", "order", "bias", "scaled"])
    base = rng.integers(1, 9, (2, 2)) / 8.0
    if kind == "omega":
        omega, c = 2.0 ** int(rng.integers(20, 71)), float(rng.integers(1, 8)) / 8
        first = linear([[omega, 0.0], [omega, 0.0], [0.0, 1.0]], [c, 0.0, 0.0])
        return sequence(first, nn.ReLU(), linear([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]))
    if kind == "order":
        big = 2.0 ** int(rng.integers(40, 60))
        first = linear([[big, 0.0], [1.0, 0.0], [-big, 0.0], [0.0, 1.0]])
        return sequence(first, linear([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    if kind == "bias":
        offset = float(rng.choice([1e6, 1e12, 2.0**52])) * np.ones(2)
        return sequence(linear(base, offset), nn.ReLU(), linear(np.eye(2), -offset))
    k = int(rng.integers(100, 400))
    return sequence(linear(base * 2.0**k), nn.ReLU(), linear(np.eye(2) * 2.0**-k))


# -- N9: planted flips -----------------------------------------------------------------------------

PLANTED_SIZE = 6
PLANTED = ("ramp", "spike", "deep", "convolution")


@dataclass(frozen=True)
class Planted:
    """A flip at a known place: at ``flip``, ``distance`` from ``x``, the other class wins.

    ``square`` is the exact squared radius at ``x``, less than ``distance ** 2``. Around ``x`` the
    network is constant, so no gradient leads to the flip.
    """

    x: Tensor
    flip: list[Fraction]
    distance: Fraction
    square: Fraction


def planted_model(kind: str) -> nn.Sequential:
    """The architecture, to be filled by :func:`plant`."""
    n = PLANTED_SIZE
    if kind == "deep":
        layers: list[nn.Module] = [nn.Linear(n, n), nn.Linear(n, 1), nn.ReLU(), nn.Linear(1, 1),
                                   nn.Linear(1, 2)]  # fmt: skip
    elif kind == "convolution":
        layers = [nn.Conv1d(1, 1, n), nn.ReLU(), nn.Flatten(), nn.Linear(1, 2)]
    else:
        layers = [nn.Linear(n, 3 if kind == "spike" else 1), nn.ReLU(),
                  nn.Linear(3 if kind == "spike" else 1, 2)]  # fmt: skip
    return sequence(*layers)


def plant(kind: str, model: nn.Sequential, rng: Generator) -> Planted:
    """Fill the architecture's weights with a flip at distance 1e-6 to about 1."""
    n = PLANTED_SIZE
    chosen = PYTHAGOREAN[int(rng.integers(len(PYTHAGOREAN)))]
    u = rng.permutation([*chosen, *[0] * (n - len(chosen))]) * rng.choice([-1, 1], n)
    length = Fraction(math.isqrt(int(u @ u)))
    x = rng.integers(0, 1025, n) / 1024.0
    # s = u.(x' - x) grows by length^2 t on the way to the flip, at distance length t.
    t = Fraction(int(rng.integers(1, 64)), 2 ** int(rng.integers(9, 27)))
    reach, distance = length**2 * t, length * t
    slope = Fraction(2) ** int(rng.integers(-8, 9))
    missing = Fraction(
        1, 2 ** int(rng.integers(2, 13))
    )  # how far before the flip the class is lost
    start = -float(u @ x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        if kind == "spike":
            # A tent on [reach / 2, 3 reach / 2] of height slope * reach / 2.
            half = float(reach) / 2
            for i, s in enumerate((half, 2 * half, 3 * half)):
                _fill(model[0], i, u, start - s)
            model[2].weight[1] = torch.tensor([1.0, -2.0, 1.0]) * float(slope)
            margin = slope * reach / 2 * (1 - missing)
            lost = reach * (1 - missing / 2)
        else:
            margin, lost = slope * reach * (1 - missing), reach * (1 - missing)
            if kind == "deep":
                k = int(rng.integers(0, 60))
                turn = signed_permutation(rng, n)
                model[0].weight.copy_(torch.from_numpy(turn * 2.0**k))
                _fill(model[1], 0, turn @ u * 2.0**-k, start)
                model[3].weight[0, 0] = 2.0**k
                model[4].weight[1, 0] = float(slope) * 2.0**-k
            else:
                _fill(model[0], 0, u, start)
                model[-1].weight[1, 0] = float(slope)
        model[-1].bias[0] = float(margin)
    flip = [Fraction(v) + int(w) * t for v, w in zip(x.tolist(), u.tolist(), strict=True)]
    return Planted(torch.from_numpy(x), flip, distance, (lost / length) ** 2)


def _fill(layer: nn.Module, row: int, weight: np.ndarray, bias: float) -> None:
    layer.weight[row] = torch.as_tensor(weight, dtype=torch.float64).reshape(
        layer.weight[row].shape
    )
    layer.bias[row] = bias
