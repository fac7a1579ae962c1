# SPDX-License-Identifier: MIT
"""Which margin backend runs: native on a CPU where it is built, else the reference."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from torch import Tensor

from lmtfast.backends import available_backends, margin_reference, providing
from lmtfast.errors import ArgumentError, BackendUnavailableError


@functools.cache
def native_module() -> tuple[ModuleType | None, str]:
    """The native margin backend, or None with the reason it cannot be used."""
    try:
        native = importlib.import_module("lmtfast.backends.native")
    except ImportError as error:
        return None, f"the extension is not built ({error})"
    usable, reason = native.available()
    if usable and not hasattr(native, "margin_forward"):
        return None, "the extension has no margin losses"
    return (native, reason) if usable else (None, reason)


def choose_margin_backend(logits: Tensor, member: str, requested: str | None = None) -> ModuleType:
    """The module whose two margin functions to use; a requested one never falls back."""
    if requested == "reference":
        return margin_reference
    if requested not in (None, "native"):
        if requested in available_backends():
            return providing(requested, "margin_forward", "the margin losses")
        raise ArgumentError(
            "backend None, 'native' or 'reference', or a registered one",
            repr(requested),
            "margin_cross_entropy(backend=)",
            "name one of these, or leave backend out to have one chosen.",
        )
    native, reason = native_module()
    if native is not None:
        if logits.device.type != "cpu":
            reason, native = f"it computes on the CPU, the logits are on {logits.device}", None
        elif logits.dtype not in native.DTYPES:
            reason, native = f"it takes float32 and float64 logits, not {logits.dtype}", None
        elif member not in native.MEMBERS:
            reason, native = f"it has no '{member}' loss", None
    if native is not None:
        return native
    if requested == "native":
        raise BackendUnavailableError(
            "the native backend",
            f"unavailable: {reason}",
            "margin_cross_entropy(backend='native')",
            "drop backend='native' to use the reference implementation.",
        )
    return margin_reference
