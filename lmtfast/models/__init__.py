# SPDX-License-Identifier: MIT
"""Networks the recipes train: layers with a Lipschitz rule, and a linear head."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from lmtfast.errors import ConfigError, LmtfastError
from lmtfast.execution import run as run
from lmtfast.models.digits import DigitsNet
from lmtfast.models.kolter_wong import KolterWong
from lmtfast.models.wide_resnet import WideResNet

MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"digits": DigitsNet, "kolter-wong": KolterWong, "wide-resnet": WideResNet}
)


def import_callable(target: str) -> Callable[..., nn.Module]:
    """Import ``package.module:callable``.

    Raises:
        ConfigError: The text has another form, or the module or the name does not exist.

    Example:
        >>> import_callable("torch.nn:Linear")
        <class 'torch.nn.modules.linear.Linear'>
    """
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise ConfigError(
            f"one of {', '.join(sorted(MODELS))}, or package.module:callable",
            repr(target),
            "model",
            "name a model of the library, or an importable factory such as mynets.resnet:build",
        )
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"an importable {target}", str(error), "model", "check the spelling and the Python path"
        ) from error
    if not callable(found):
        raise ConfigError("a callable", type(found).__name__, target, "name a class or a function")
    return found


def build_model(
    name: str,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """Build a network by name, with weights drawn from torch's global generator.

    Args:
        name: A key of :data:`MODELS`, or ``package.module:callable``.
        input_shape: Shape of one input without the batch dimension, for example ``(1, 28, 28)``.
        classes: Number of classes K.
        options: Further keyword arguments. ``input_shape`` and ``classes`` are passed as well to
            the library's models, and to an imported callable whose signature has parameters of
            these names.

    Returns:
        A module that maps ``(N, *input_shape)`` float32 to ``(N, K)`` logits.

    Raises:
        ConfigError: Unknown name, or the callable refuses the options.

    Guarantee:
        None.

    Example:
        >>> import torch
        >>> model = build_model("kolter-wong", input_shape=(1, 28, 28), classes=10)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    factory = MODELS[name] if name in MODELS else import_callable(name)
    offered = {"input_shape": tuple(input_shape), "classes": classes}
    try:
        signature = inspect.signature(factory)
        arguments = {k: v for k, v in offered.items() if k in signature.parameters} | dict(options)
        signature.bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"options that {name} accepts",
            f"{dict(options)}: {error}",
            "model_options",
            "correct the options",
        ) from error
    try:
        model = factory(**arguments)
    except LmtfastError:
        raise
    except Exception as error:
        if name not in MODELS:
            raise  # the caller's own code
        raise ConfigError(
            f"options and shapes that {name} accepts", f"{arguments}: {error}",
            "model_options", "correct the options",
        ) from error  # fmt: skip
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "a torch.nn.Module", type(model).__name__, name, "return the module from the factory"
        )
    return model
