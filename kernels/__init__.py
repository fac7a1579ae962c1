# SPDX-License-Identifier: MIT
"""Triton kernels, installed as ``lmtfast.kernels``; one operation per file.

Importing this package needs neither Triton nor torch. Ask ``unavailable_reason()`` before importing
a kernel file.
"""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["unavailable_reason"]


def unavailable_reason() -> str | None:
    """Why the kernels cannot be imported here, or None where they can."""
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None
