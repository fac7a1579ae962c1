# SPDX-License-Identifier: MIT
"""Backends: which implementations there are, whether they run here, and which one is used."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from lmtfast.errors import ArgumentError, BackendUnavailableError


@dataclass(frozen=True)
class BackendInfo:
    """One backend: its name, what it runs, and a probe that says whether it can run here."""

    name: str
    provides: str
    probe: Callable[[], tuple[bool, str]]
    module: str


_REGISTRY: dict[str, BackendInfo] = {}


def register_backend(
    name: str, *, module: str, provides: str, probe: Callable[[], tuple[bool, str]]
) -> None:
    """Add a backend to the registry.

    Args:
        name: Name to ask for it by.
        module: Importable module with ``matvec``, ``rmatvec`` and ``weight_vjp``, or with
            ``margin_forward`` and ``margin_backward``; see :mod:`lmtfast.backends.reference`.
        provides: One line: which operations it runs.
        probe: Returns (usable here, reason). Called when asked, never at import.

    Raises:
        ArgumentError: The name is taken.

    Guarantee:
        None; every backend is held to the reference by the contract tests.

    Example:
        >>> import lmtfast as lf
        >>> lf.register_backend("mine", module="mylib.kernels", provides="operator step",
        ...                     probe=lambda: (False, "no device"))
        >>> "mine" in lf.available_backends()
        True
    """
    if name in _REGISTRY:
        raise ArgumentError(
            "a new name", repr(name), "register_backend(name)",
            f"taken are {', '.join(_REGISTRY)}; choose another",
        )  # fmt: skip
    _REGISTRY[name] = BackendInfo(name, provides, probe, module)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here, why (not), and which operations it provides."""

    name: str
    available: bool
    reason: str
    provides: str


def available_backends() -> dict[str, BackendStatus]:
    """What backends there are, whether each can run here, and why not.

    Returns:
        Name to :class:`BackendStatus`, in order of registration.

    Guarantee:
        None.

    Example:
        >>> import lmtfast as lf
        >>> lf.available_backends()["reference"].available
        True
    """
    report = {}
    for info in _REGISTRY.values():
        usable, reason = info.probe()
        report[info.name] = BackendStatus(info.name, usable, reason, info.provides)
    return report


def choose_backend(requested: str | None) -> str:
    """Name of the backend that runs the power steps; a requested one never falls back."""
    if requested is None:
        return "reference"
    providing(requested, "matvec", "the power steps")
    return requested


def providing(requested: str, function: str, purpose: str) -> ModuleType:
    """The module of a backend asked for by name, if it can run here and has ``function``."""
    info = _REGISTRY.get(requested)
    if info is None:
        raise ArgumentError(
            f"one of {', '.join(_REGISTRY)}", repr(requested), "backend", "pick one of these"
        )
    usable, reason = info.probe()
    module = importlib.import_module(info.module) if usable else None
    if module is None or not hasattr(module, function):
        why = reason if module is None else f"it runs {info.provides} only"
        raise BackendUnavailableError(
            f"a backend that runs {purpose}", f"{requested!r}: {why}", "backend",
            "drop backend= to have one chosen, or ask for 'reference'",
        )  # fmt: skip
    return module


def backend_module(name: str) -> ModuleType:
    """The module of a backend that :func:`choose_backend` has accepted."""
    return importlib.import_module(_REGISTRY[name].module)


def _reference() -> tuple[bool, str]:
    return True, "always"


def _native() -> tuple[bool, str]:
    if importlib.util.find_spec("lmtfast._C") is None:
        return False, "the compiled extension lmtfast._C is not built"
    return importlib.import_module("lmtfast.backends.native").available()


register_backend(
    "reference", module="lmtfast.backends.reference", provides="everything, plain PyTorch",
    probe=_reference,
)  # fmt: skip
register_backend(
    "native", module="lmtfast.backends.native", provides="margin cross-entropy on the CPU",
    probe=_native,
)  # fmt: skip
