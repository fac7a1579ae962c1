# SPDX-License-Identifier: MIT
"""Empty, zero and one-by-one everything: an exact bound and a result of the right shape, or a
refusal."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast.errors import LmtfastError
from lmtfast.nn import MinMax
from tests.cases import Lambda, unit_matrix
from tests.classifiers import UNIT
from tests.oracles import rayleigh_exceeds, svd_norm

Shape = tuple[int, ...]
Build = Callable[[], nn.Module]


def _chain(*layers: Build) -> Build:
    return lambda: nn.Sequential(*(layer() for layer in layers), nn.Flatten())


def _linear(a: int, b: int) -> Build:
    return lambda: nn.Linear(a, b)


def _conv(*arguments: int, **options: int) -> Build:
    return lambda: nn.Conv2d(*arguments, **options)


LAYERS: dict[str, tuple[Build, Shape]] = {
    "linear 1 x 1": (_linear(1, 1), (1,)), "linear 1 x n": (_linear(5, 1), (5,)),
    "linear n x 1": (_linear(1, 5), (1,)), "linear 0 rows": (_linear(3, 0), (3,)),
    "linear on a sequence of one": (_linear(2, 3), (1, 2)),
    "conv of a pixel": (_conv(1, 1, 1), (1, 1, 1)),
    "conv of a row": (_conv(2, 1, (1, 3), padding=(0, 1)), (2, 1, 4)),
    "conv of a column": (_conv(1, 2, (3, 1), padding=(1, 0)), (1, 4, 1)),
    "conv that sees padding only": (_conv(1, 1, 1, padding=2, stride=4), (1, 1, 1)),
    "conv larger than its map": (_conv(1, 1, 5, padding=2), (1, 2, 1)),
    "conv of one output": (_conv(2, 3, 2), (2, 2, 2)),
    "conv without outputs": (_conv(2, 0, 1), (2, 2, 2)),
    "conv, depthwise, a pixel": (_conv(3, 3, 1, groups=3), (3, 1, 1)),
    "transposed, a pixel": (lambda: nn.ConvTranspose2d(1, 1, 1), (1, 1, 1)),
    "transposed, one tap": (lambda: nn.ConvTranspose1d(2, 1, 1, stride=3), (2, 2)),
    "batch norm of one": (lambda: nn.BatchNorm1d(1), (1,)),
    "batch norm of a pixel": (lambda: nn.BatchNorm2d(2), (2, 1, 1)),
    "average of one": (lambda: nn.AvgPool2d(1), (1, 1, 1)),
    "global average": (lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 1)),
    "residual of one": (lambda: Lambda(lambda m, x: x + m.a(x), a=nn.Linear(1, 1)), (1,)),
    "nothing": (lambda: nn.Identity(), (1,)), "zero times": (
        lambda: Lambda(lambda m, x: x * 0.0), (3,)),
    "cut to nothing": (lambda: Lambda(lambda m, x: x[:, :0]), (3,)),
    "cancelled": (lambda: Lambda(lambda m, x: x - x), (3,)),
}  # fmt: skip
# Zero maps that are proved to be nearly zero, or no larger than the identity.
LOOSE = ("cut to nothing", "cancelled")
WEIGHTS = ("random", "zero", "one entry")


def filled(module: nn.Module, kind: str) -> nn.Module:
    for parameter in module.parameters():
        data = torch.randint(-4, 5, parameter.shape).double() / 4
        if kind != "random":
            data.zero_()
        if kind == "one entry" and data.numel():
            data.reshape(-1)[-1] = 0.5
        parameter.data = data
    return module.double().eval()


def has_weights(name: str) -> bool:
    return any(p.numel() for p in LAYERS[name][0]().parameters())


CASES = tuple((n, k) for n in LAYERS for k in WEIGHTS if k == "random" or has_weights(n))


def test_there_are_sixty_cases() -> None:
    assert len(CASES) + 2 * len(CLASSIFIERS) >= 60


@pytest.mark.parametrize("name", LAYERS)
def test_degenerate_layers_are_exact(name: str) -> None:
    build, shape = LAYERS[name]
    for kind in [k for n, k in CASES if n == name]:
        module = filled(build(), kind)
        try:
            total = lf.certified_bound(module, shape).total
        except LmtfastError:
            assert name in ("linear 0 rows", "conv without outputs")
            continue
        matrix = unit_matrix(module, shape)
        if "norm" not in name and "average" not in name:
            assert not rayleigh_exceeds(matrix, total)
        assert total >= svd_norm(matrix) * (1 - 1e-9)
        if name in LOOSE:
            continue
        assert total <= svd_norm(matrix) * (1 + 1e-9)
        # Exactly zero for the zero map, and for no other.
        assert (total == 0.0) is (not matrix.any())


# -- certificates ----------------------------------------------------------------------------------

CLASSIFIERS: dict[str, tuple[Build, Shape]] = {
    "one pixel, one class": (_chain(_conv(1, 1, 1)), (1, 1, 1)),
    "one class": (_chain(_linear(3, 1)), (3,)),
    "two classes of one number": (_chain(_linear(1, 2)), (1,)),
    "sorted pair": (_chain(_linear(1, 2), MinMax), (1,)),
    "pixels as classes": (_chain(_conv(1, 1, 1)), (1, 2, 1)),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_empty_batches_and_constant_networks_have_results_of_the_right_shape(name: str) -> None:
    build, shape = CLASSIFIERS[name]
    model = filled(build(), "random")
    certificate = lf.certify(
        model, torch.zeros(0, *shape).double(), input_shape=shape, input_range=UNIT
    )
    assert certificate.prediction_radius.shape == (0,)
    assert certificate.counts == {"certified": 0, "constant": 0, "refused": 0, "total": 0}
    assert certificate.logits is not None
    assert certificate.logits.shape == (0, certificate.classes)
    constant = filled(build(), "zero")
    x = torch.rand(2, *shape).double()
    zero = lf.certify(constant, x, input_shape=shape, input_range=UNIT)
    assert zero.total == 0.0
    # Zero everywhere is a tie; with one class there is nobody to tie with.
    alone = zero.classes == 1
    assert zero.prediction_radius.tolist() == [math.inf if alone else 0.0] * 2
    assert zero.counts["constant"] == (2 if alone else 0)
