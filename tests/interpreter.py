# SPDX-License-Identifier: MIT
"""Triton's interpreter, sped up for kernels made of many small functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest


class _Scope:
    """What a launch restores at its end, and that it has."""

    def __init__(self, scope, patched: set[frozenset[str]]) -> None:
        self.scope, self.patched = scope, patched

    def restore(self) -> None:
        self.patched.clear()
        self.scope.restore()


class _Done:
    def restore(self) -> None:
        pass


@contextlib.contextmanager
def swift() -> Iterator[None]:
    """Triton's language is patched for interpretation once per launch, not in each of its calls;
    NumPy computes with NaN and infinities as silently as a device does."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton not installed")
    original, patched = interpreter._patch_lang, set()

    def once(fn):
        modules = frozenset(
            name for name, value in fn.__globals__.items()
            if value is interpreter.tl or value is interpreter.tl.core
        )  # fmt: skip
        if modules in patched:
            return _Done()
        patched.add(modules)
        return _Scope(original(fn), patched)

    interpreter._patch_lang = once
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        interpreter._patch_lang = original
