# SPDX-License-Identifier: MIT
"""The recipes' networks: shapes, sizes, initial weights, and building by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lmtfast.errors import ArgumentError, ConfigError
from lmtfast.models import MODELS, build_model
from lmtfast.models.kolter_wong import KolterWong
from lmtfast.models.wide_resnet import WideResNet

CASES = [
    ("digits", (1, 8, 8), {}),
    ("kolter-wong", (1, 28, 28), {}),
    ("kolter-wong", (3, 32, 30), {"hidden": 7}),
    ("wide-resnet", (3, 32, 32), {"depth": 10, "width": 1}),
    ("wide-resnet", (1, 16, 24), {"depth": 10, "width": 2, "pool_shortcut": True, "dropout": 0.4}),
]


@pytest.mark.parametrize(("name", "shape", "options"), CASES)
def test_logits_have_one_column_per_class(name, shape, options):
    model = build_model(name, input_shape=shape, classes=4, options=options)
    logits = model(torch.randn(3, *shape))
    assert logits.shape == (3, 4)
    logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("name", "shape", "options"), CASES)
def test_same_seed_gives_the_same_weights(name, shape, options):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model(name, input_shape=shape, classes=4, options=options).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_every_model_is_covered_here():
    assert {name for name, _, _ in CASES} == set(MODELS)


def test_kolter_wong_is_the_papers_network():
    model = KolterWong()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert shapes == {
        "conv1.weight": (16, 1, 4, 4),
        "conv1.bias": (16,),
        "conv2.weight": (32, 16, 4, 4),
        "conv2.bias": (32,),
        "fc1.weight": (100, 1568),
        "fc1.bias": (100,),
        "fc2.weight": (10, 100),
        "fc2.bias": (10,),
    }


def test_initial_deviations_are_he_for_convs_and_lecun_for_linear_layers():
    torch.manual_seed(0)
    model = KolterWong((64, 28, 28), hidden=400)
    for weight, expected in (
        (model.conv1.weight, math.sqrt(2 / (64 * 16))),
        (model.conv2.weight, math.sqrt(2 / (16 * 16))),
        (model.fc1.weight, math.sqrt(1 / 1568)),
    ):
        # 4 standard errors of the sample deviation of a normal sample
        assert abs(weight.std().item() / expected - 1) < 4 / math.sqrt(2 * weight.numel())
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))


def test_wide_resnet_28_10_has_the_published_size():
    with torch.device("meta"):
        model = WideResNet()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 28
    assert sum(p.numel() for p in model.parameters()) == 36_479_194
    assert len({(m.weight.shape, m.stride) for m in convs}) == 10


def test_wide_resnet_shortcuts_start_from_the_activated_tensor():
    block = WideResNet(depth=16, width=1).eval().blocks[2]
    assert block.projects
    with torch.no_grad():
        block.conv2.weight.zero_()
        x = torch.randn(2, 16, 8, 8)
        assert torch.equal(block(x), block.shortcut(block.relu1(block.norm1(x))))


@pytest.mark.parametrize("depth", [4, 9, 27])
def test_wide_resnet_refuses_other_depths(depth):
    with pytest.raises(ArgumentError, match="6 n \\+ 4"):
        WideResNet(depth=depth)


def test_wide_resnet_refuses_images_it_would_crop():
    with pytest.raises(ArgumentError, match="multiples of 4"):
        WideResNet((3, 30, 32), depth=10, width=1)


def test_a_callable_is_imported_by_name():
    model = build_model(
        "torch.nn:Linear",
        input_shape=(3,),
        classes=2,
        options={"in_features": 3, "out_features": 2},
    )
    assert isinstance(model, nn.Linear)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {}, "digits, kolter-wong, wide-resnet"),
        ("torch.nn:Missing", {}, "Missing"),
        ("no_such_module:x", {}, "no_such_module"),
        ("kolter-wong", {"colour": 1}, "colour"),
        ("math:pi", {}, "callable"),
        ("math:factorial", {"n": 3}, "torch.nn.Module|options"),
    ],
)
def test_unusable_names_are_refused_by_name(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(name, input_shape=(1, 28, 28), classes=10, options=options)
