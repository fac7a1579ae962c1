# SPDX-License-Identifier: MIT
"""Triton's interpreter, sped up for kernels made of many small functions."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from unittest import mock

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


def _patched_once(interpreter) -> Callable:
    """Triton's language, patched for interpretation once per launch, not in each of its calls."""
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

    return once


def _known_types(original: Callable) -> Callable:
    """``block_type.__init__`` that looks up what it has made before."""
    known: dict = {}

    def init(self, element, shape) -> None:
        key = (element.name, *(getattr(s, "value", s) for s in shape))
        if key not in known:
            original(self, element, shape)
            known[key] = dict(self.__dict__)
        self.__dict__.update(known[key])

    return init


def _known_shapes(original: Callable) -> Callable:
    """``tensor.__init__`` likewise; of a tensor only its values are new."""
    known: dict = {}

    def init(self, handle, type) -> None:
        block = type.shape if type.is_block() else None
        if id(block) not in known:
            original(self, handle, type)
            # With the shape itself, so that no other one takes its place in memory.
            known[id(block)] = block, self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.shape, self.numel = known[id(block)]

    return init


def _known_dtypes(original: Callable) -> Callable:
    known: dict = {}

    def dtype(type):
        name = type.scalar.name
        if name not in known:
            known[name] = original(type)
        return known[name]

    return dtype


@contextlib.contextmanager
def swift() -> Iterator[None]:
    """Interpreted launches take less than half the time; NumPy computes with NaN and infinities as
    silently as a device does."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if not triton.knobs.runtime.interpret:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    core = interpreter.tl.core
    with (
        mock.patch.object(interpreter, "_patch_lang", _patched_once(interpreter)),
        mock.patch.object(interpreter, "_get_np_dtype", _known_dtypes(interpreter._get_np_dtype)),
        mock.patch.object(core.block_type, "__init__", _known_types(core.block_type.__init__)),
        mock.patch.object(core.tensor, "__init__", _known_shapes(core.tensor.__init__)),
        np.errstate(all="ignore"),
    ):
        yield
