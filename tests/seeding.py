# SPDX-License-Identifier: MIT
"""A pytest plugin that runs the suite on kernels with a bug: ``-p tests.seeding``.

``LMTFAST_SEEDED_KERNELS`` is a folder whose files replace those of ``lmtfast.kernels``;
``LMTFAST_SEEDED_TREE`` is a source tree whose CUDA kernels are emulated instead of this one's.
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

KERNELS, TREE = "LMTFAST_SEEDED_KERNELS", "LMTFAST_SEEDED_TREE"


class SeededKernels(importlib.abc.MetaPathFinder):
    """Finds a kernel's module in the folder before its package does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, stem = name.rpartition(".")
        file = self.folder / f"{stem}.py"
        if package != "lmtfast.kernels" or not file.exists():
            return None
        return importlib.util.spec_from_file_location(name, file)


def pytest_configure() -> None:
    if KERNELS in os.environ:
        sys.meta_path.insert(0, SeededKernels(Path(os.environ[KERNELS])))
    if TREE in os.environ:
        from tests import emulation

        emulation.ROOT = Path(os.environ[TREE])
        emulation.BUILD = emulation.ROOT / "build" / "ctest"
