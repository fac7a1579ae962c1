# SPDX-License-Identifier: MIT
"""Backends: which implementations there are, whether they run here, and which one is used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
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


# Backends in order of preference where none is asked for, by type of device.
AUTOMATIC = {"cpu": ("native",), "cuda": ("cuda", "triton")}


def choose_backend(requested: str | None, device: str, double: bool) -> tuple[str, str]:
    """Name of the backend that runs the power steps, and why; a requested one never falls back.

    Args:
        requested: Name of a registered backend, or None.
        device: Type of the device the weights are on.
        double: Whether the iterates are float64, which only the reference runs.
    """
    if requested is None:
        for name in AUTOMATIC.get(device, ()):
            if name in _REGISTRY and not double and _REGISTRY[name].probe()[0] and steps(name):
                return name, f"first that runs on {device}"
        return "reference", "float64 weights" if double else f"no compiled one runs on {device}"
    info = _REGISTRY.get(requested)
    module = None
    if info is None or not info.probe()[0] or not steps(requested):
        module = providing(requested, "matvec", "the power steps")
    if double and module is None:
        raise BackendUnavailableError(
            "float32, bfloat16 or float16 weights", f"float64, which {requested!r} does not run",
            "backend", "drop backend= to have one chosen, or ask for 'reference'",
        )  # fmt: skip
    return requested, "as requested"


def steps(name: str) -> frozenset[str]:
    """Engines that a backend runs for all operators in one call."""
    found: frozenset[str] = getattr(backend_module(name), "STEPS", frozenset())
    return found


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
    path = _REGISTRY[name].module
    return sys.modules.get(path) or importlib.import_module(path)


def _reference() -> tuple[bool, str]:
    return True, "always"


def _native() -> tuple[bool, str]:
    if importlib.util.find_spec("lmtfast._C") is None:
        return False, "the compiled extension lmtfast._C is not built"
    return importlib.import_module("lmtfast.backends.native").available()


def _cuda() -> tuple[bool, str]:
    return importlib.import_module("lmtfast.backends.cuda_device").available()


def _triton() -> tuple[bool, str]:
    reason = importlib.import_module("lmtfast.kernels").unavailable_reason()
    if reason is not None:
        return False, reason
    return importlib.import_module("lmtfast.backends.triton").available()


register_backend(
    "reference", module="lmtfast.backends.reference", provides="everything, plain PyTorch",
    probe=_reference,
)  # fmt: skip
register_backend(
    "native", module="lmtfast.backends.native",
    provides="margin losses, pair norms and bound steps on the CPU", probe=_native,
)  # fmt: skip
register_backend(
    "cuda", module="lmtfast.backends.cuda",
    provides="margin losses, pair norms and bound steps on NVIDIA GPUs", probe=_cuda,
)  # fmt: skip
register_backend(
    "triton", module="lmtfast.backends.triton",
    provides="margin losses, pair norms and bound steps on NVIDIA GPUs", probe=_triton,
)  # fmt: skip
