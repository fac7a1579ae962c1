# SPDX-License-Identifier: MIT
"""Reader for IDX, the format in which MNIST and Fashion-MNIST are published."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from lmtfast.errors import ArgumentError

IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
IDX_UINT8 = 0x08  # third byte of the magic number; the fourth is the number of axes


def read_idx_directory(path: Path) -> dict[str, np.ndarray]:
    """Read the four files of MNIST, under the names they are published with.

    Returns:
        uint8 arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``.

    Raises:
        ArgumentError: A file is missing or damaged.
    """
    found = {}
    for key, name in IDX_FILES.items():
        candidates = [
            path / f"{stem}{suffix}"
            for stem in (name, name.replace("-idx", ".idx"))
            for suffix in ("", ".gz")
        ]
        file = next((c for c in candidates if c.is_file()), None)
        if file is None:
            raise _damaged(f"{name} or {name}.gz in the directory", f"{path.name} without it")
        found[key] = read_idx(file)
    return found


def read_idx(path: str | Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes, plain or gzipped.

    Returns:
        uint8 array of the shape in the header.

    Raises:
        ArgumentError: Wrong magic number, or fewer or more bytes than the header says.

    Source:
        Format as published with MNIST (LeCun, Bottou, Bengio, Haffner 1998): two zero bytes, a type
        byte, the number of axes, each length as a big-endian 32-bit integer, then the data.

    Example:
        >>> read_idx("t10k-labels-idx1-ubyte.gz").shape  # doctest: +SKIP
        (10000,)
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged("a readable IDX file", f"{path.name}: {error}") from error
    axes = raw[3] if len(raw) > 3 else 0
    header = 4 + 4 * axes
    if raw[:3] != bytes((0, 0, IDX_UINT8)) or not 1 <= axes <= 4 or len(raw) < header:
        raise _damaged(
            "the IDX magic number of unsigned bytes", f"{path.name}: {raw[:4].hex() or 'empty'}"
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", axes, 4))
    if int(np.prod(shape, dtype=object)) != len(raw) - header:
        raise _damaged(f"{shape} bytes of data", f"{path.name}: {len(raw) - header} bytes")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _damaged(expected: str, got: str) -> ArgumentError:
    return ArgumentError(expected, got, "data", "fetch the file again, or correct the path")
