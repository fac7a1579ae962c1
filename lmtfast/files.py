# SPDX-License-Identifier: MIT
"""Files that are written whole or not at all, and the one error for those that cannot be."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lmtfast.errors import WriteError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside becomes a :class:`lmtfast.errors.WriteError`."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            "a place that can be written to", error.strerror or str(error), str(path),
            "free space or choose another place, and repeat the command; a file that was there "
            "before is whole",
        ) from error  # fmt: skip


def write_atomically(path: Path, content: bytes | memoryview) -> Path:
    """Write a file whole or not at all: temporary file, fsync, rename, directory fsync.

    A process that is killed can leave the temporary file, ``.NAME.*.tmp``; nothing reads it.

    Raises:
        WriteError: Nothing was replaced, unless the directory's fsync alone failed.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return path
