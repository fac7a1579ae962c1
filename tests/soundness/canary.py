# SPDX-License-Identifier: MIT
"""A bug seeded by hand into what certificates rest on."""

from __future__ import annotations

from typing import NamedTuple


class Canary(NamedTuple):
    """One replacement in one file, and what has to fail then: test files or single tests."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
