# SPDX-License-Identifier: MIT
"""A pytest plugin that runs the suite on code with a bug: ``-p tests.seeding``.

``LMTFAST_SEEDED_MODULES`` is a folder of modules that replace the library's, each in a file of its
full name (``lmtfast.radius.py``); ``LMTFAST_SEEDED_TREE`` is a source tree whose CUDA kernels are
emulated instead of this one's.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

MODULES, TREE = "LMTFAST_SEEDED_MODULES", "LMTFAST_SEEDED_TREE"


class SeededModules(importlib.abc.MetaPathFinder):
    """Finds a module in the folder before its package does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self.folder / f"{name}.py"
        return importlib.util.spec_from_file_location(name, file) if file.exists() else None


# Before the first conftest imports the library.
if MODULES in os.environ:
    sys.meta_path.insert(0, SeededModules(Path(os.environ[MODULES])))


def pytest_configure() -> None:
    if TREE in os.environ:
        from tests import emulation

        emulation.ROOT = Path(os.environ[TREE])
        emulation.BUILD = emulation.ROOT / "build" / "ctest"
