# SPDX-License-Identifier: MIT
"""Every error says: expected, got, where, what to do. The wording of the main ones is pinned."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast import errors
from lmtfast.errors import LmtfastError

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, LmtfastError)
]
FORMAT = re.compile(r"expected (.+); got (.+); at (.+)\.\n  Do this: (.+)", re.DOTALL)
CERTIFY = {"input_shape": (4,), "input_range": (0.0, 1.0)}


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("error", CLASSES)
def test_message_has_four_parts(error: type[LmtfastError]) -> None:
    raised = error("a cat", "a dog", "the garden", "open the door")
    assert str(raised) == "expected a cat; got a dog; at the garden.\n  Do this: open the door"
    assert FORMAT.fullmatch(str(raised))


@pytest.mark.parametrize("error", CLASSES)
def test_errors_pickle(error: type[LmtfastError]) -> None:
    raised = error("a cat", "a dog", "the garden", "open the door")
    copy = pickle.loads(pickle.dumps(raised))
    assert type(copy) is error
    assert str(copy) == str(raised)
    assert (copy.expected, copy.got, copy.where, copy.remedy) == raised.__reduce__()[1]


@pytest.mark.parametrize("error", CLASSES)
def test_errors_are_documented(error: type[LmtfastError]) -> None:
    assert error.__doc__


def normalised_by_layer() -> None:
    lf.trace(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), (4,))


def product_of_activations() -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x)

    lf.trace(nn.Sequential(nn.Linear(4, 4), Gate()), (4,))


def certify_an_estimate() -> None:
    lf.certify(small_model(), torch.rand(2, 4), **CERTIFY, level="estimate")


def bound_after_surgery() -> None:
    model = small_model()
    bound = lf.NetworkBound(model, (4,))
    model[2] = nn.Linear(8, 5)
    bound()


def certify_while_training() -> None:
    lf.certify(small_model().train(), torch.rand(2, 4), **CERTIFY)


def bound_while_training() -> None:
    lf.certified_bound(small_model().train(), (4,))


def certify_outside_the_domain() -> None:
    lf.certify(small_model(), 255.0 * torch.ones(2, 4), **CERTIFY)


def name_a_missing_backend() -> None:
    probe = lambda: (False, "no such device")  # noqa: E731
    lf.register_backend("absent", module="absent", provides="power steps", probe=probe)
    lf.NetworkBound(small_model(), (4,), backend="absent")


def weights_that_diverged() -> None:
    model = small_model()
    model[0].weight.data[0, 0] = float("nan")
    lf.certified_bound(model, (4,))


def level_that_does_not_exist() -> None:
    lf.certified_bound(small_model(), (4,), level="exact")


# What is raised, and the words that must stay: the place, the reason and the remedy.
PINNED = [
    (
        normalised_by_layer,
        errors.UnsupportedLayerError,
        ["layer_norm", "there is no rule for it", "at '1'", "lmtfast.register_rule", "guide.md"],
    ),
    (
        product_of_activations,
        errors.UnsupportedLayerError,
        ["aten.mul.Tensor", "a product of two traced tensors has no global constant", "at '1'"],
    ),
    (certify_an_estimate, errors.NotCertifiedError, ["estimate", "rigorous"]),
    (
        bound_after_surgery,
        errors.StalePlanError,
        ["2.weight: (3, 8)", "at Sequential", "trace the model again"],
    ),
    (certify_while_training, errors.TrainModeError, ["eval mode", "training mode", "model.eval()"]),
    (
        bound_while_training,
        errors.TrainModeError,
        ["expected a model in eval mode; got training mode; at 'Sequential'", "model.eval()"],
    ),
    (certify_outside_the_domain, errors.InputDomainError, ["255", "input_range"]),
    (
        name_a_missing_backend,
        errors.BackendUnavailableError,
        ["'absent': no such device", "at backend", "drop backend="],
    ),
    (weights_that_diverged, errors.NonFiniteError, ["NaN or infinity", "'0.weight'"]),
    (
        level_that_does_not_exist,
        errors.ArgumentError,
        ["one of estimate, probabilistic, rigorous", "got 'exact'", "at level"],
    ),
]


@pytest.mark.parametrize(("action", "error", "words"), PINNED, ids=[p[0].__name__ for p in PINNED])
@pytest.mark.usefixtures("registries")
def test_wording(action: Callable[[], None], error: type[LmtfastError], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert FORMAT.fullmatch(message), message
    assert not [word for word in words if word not in message], message
