# SPDX-License-Identifier: MIT
"""Which margin backend runs: the first automatic one that takes the problem, or the reference."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor

from lmtfast.backends import AUTOMATIC, available_backends, margin_reference, providing


@functools.cache
def margin_module(name: str) -> tuple[ModuleType | None, str]:
    """The module of a compiled backend with margin losses, or None, with the reason.

    Remembered, because probing takes longer than a small loss.
    """
    status = available_backends()[name]
    if not status.available:
        return None, status.reason
    module = importlib.import_module(f"lmtfast.backends.{name}")
    if not hasattr(module, "margin_forward"):
        return None, f"it runs {status.provides} only"
    return module, status.reason


def choose_margin_backend(logits: Tensor, member: str, requested: str | None = None) -> ModuleType:
    """The module whose two margin functions to use.

    A requested one never falls back: it refuses by itself what it does not take. Where none is
    requested, a device, dtype or formula that no compiled backend has goes to the reference.
    """
    if requested == "reference":
        return margin_reference
    if requested is not None:
        return providing(requested, "margin_forward", "the margin losses")
    for name in AUTOMATIC.get(logits.device.type, ()):
        module, _ = margin_module(name)
        if module is not None and logits.dtype in module.DTYPES and member in module.MEMBERS:
            return module
    return margin_reference
