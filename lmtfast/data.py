# SPDX-License-Identifier: MIT
"""Image sets as arrays (``.npz``, IDX, scikit-learn's digits), visited in a reproducible order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmtfast.errors import (
    ArgumentError,
    DtypeError,
    InputDomainError,
    MissingDependencyError,
    NonFiniteError,
    ShapeError,
)
from lmtfast.idx import read_idx_directory

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
DIGITS_MAXIMUM = 16.0
DIGITS_TEST_EVERY = 5  # every fifth sample of a class is a test sample
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, ready for a network.

    Args:
        x_train: Inputs ``(N, C, H, W)``, float32.
        y_train: Classes ``(N,)``, int64 in ``[0, K)``.
        x_test: Test inputs ``(M, C, H, W)``, float32.
        y_test: Test classes ``(M,)``, int64.
        name: What to call the set in logs; never a path.
        input_range: Declared smallest and largest input value; every input lies inside.
        digest: SHA-256 of the four arrays, filled in when it is not given.

    Raises:
        ShapeError: Splits disagree in shape, or labels and inputs in number.
        NonFiniteError: An input is NaN or infinite.
        InputDomainError: An input lies outside ``input_range``.

    Example:
        >>> x, y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
        >>> Dataset(x, y, x, y, name="zeros").classes
        2
    """

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    name: str
    input_range: tuple[float, float] = (0.0, 1.0)
    digest: str = field(default="")

    def __post_init__(self) -> None:
        for split, x, y in (
            ("train", self.x_train, self.y_train),
            ("test", self.x_test, self.y_test),
        ):
            _check_split(f"{self.name}: {split}", x, y, self.input_range)
            # A grey image has a channel axis of any stride; torch takes some for channels-last.
            object.__setattr__(self, f"x_{split}", x.clone(memory_format=torch.contiguous_format))
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ShapeError(
                f"test inputs of shape {tuple(self.x_train.shape[1:])}, as in training",
                str(tuple(self.x_test.shape[1:])),
                f"{self.name}: x_test",
                "give both splits the same shape",
            )
        if not self.digest:
            object.__setattr__(self, "digest", self._digest())

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch dimension."""
        return tuple(self.x_train.shape[1:])

    @property
    def classes(self) -> int:
        """Number of classes K: one more than the largest label of either split."""
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    def _digest(self) -> str:
        sha = hashlib.sha256()
        for name in ARRAYS:
            array = getattr(self, name).contiguous().numpy()
            sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
            sha.update(memoryview(array).cast("B"))
        return sha.hexdigest()


def load_dataset(source: str | Path, *, input_range: tuple[float, float] = (0.0, 1.0)) -> Dataset:
    """Read an image set.

    Args:
        source: ``"digits"`` (scikit-learn's 8 x 8 digits), a ``.npz`` file with x_train, y_train,
            x_test, y_test, or a directory with the four IDX files of MNIST, plain or gzipped.
        input_range: Declared range of the inputs after scaling. uint8 images are divided by 255;
            floats are kept.

    Returns:
        A :class:`Dataset`. Grey images ``(N, H, W)`` become ``(N, 1, H, W)``, uint8 colour images
        ``(N, H, W, 3)`` become ``(N, 3, H, W)``.

    Raises:
        ArgumentError: No such file, or a file of another kind, or damaged.
        ShapeError: Arrays are missing, or do not fit together.
        DtypeError: Images are neither uint8 nor float, or labels are not integers.
        MissingDependencyError: ``"digits"`` without scikit-learn.

    Guarantee:
        None. Pickled objects are refused. The same source gives the same tensors, bit for bit.

    Example:
        >>> load_dataset("digits").input_shape
        (1, 8, 8)
    """
    if str(source) == "digits":
        return _digits()
    path = Path(source)
    if path.is_dir():
        arrays = read_idx_directory(path)
    elif path.suffix == ".npz" and path.is_file():
        arrays = _read_npz(path)
    else:
        raise _bad_source(
            "'digits', a .npz file or a directory of IDX files",
            f"{path} (not found or another kind)",
        )
    return Dataset(
        x_train=_images(f"{path.name}: x_train", arrays["x_train"]),
        y_train=_labels(f"{path.name}: y_train", arrays["y_train"]),
        x_test=_images(f"{path.name}: x_test", arrays["x_test"]),
        y_test=_labels(f"{path.name}: y_test", arrays["y_test"]),
        name=path.stem,
        input_range=input_range,
    )


def epoch_order(samples: int, *, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch visits the training set.

    A function of its arguments alone, so a resumed run needs no generator state to continue in the
    same order.

    Returns:
        A permutation, shape ``(samples,)``, int64, on the CPU.

    Example:
        >>> bool((epoch_order(9, seed=0, epoch=1) == epoch_order(9, seed=0, epoch=1)).all())
        True
    """
    mixed = hashlib.sha256(f"lmtfast epoch order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
    return torch.randperm(samples, generator=generator)


def batches(
    x: torch.Tensor, y: torch.Tensor, *, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch, in :func:`epoch_order`; the last one may be smaller.

    Example:
        >>> x, y = torch.zeros(5, 1), torch.zeros(5)
        >>> x, y = torch.zeros(5, 1), torch.zeros(5)
        >>> [len(part) for part, _ in batches(x, y, batch_size=2, seed=0, epoch=0)]
        [2, 2, 1]
    """
    order = epoch_order(len(x), seed=seed, epoch=epoch).to(x.device)
    for part in order.split(batch_size):
        yield x[part], y[part]


def _bad_source(expected: str, got: str) -> ArgumentError:
    return ArgumentError(
        expected, got, "data", "check the path; lmtfast train --help shows the formats"
    )


def _check_split(
    where: str, x: torch.Tensor, y: torch.Tensor, input_range: tuple[float, float]
) -> None:
    if x.dim() < 2 or y.dim() != 1 or len(x) != len(y) or len(x) == 0:
        raise ShapeError(
            "inputs (N, C, H, W) and labels (N,), N > 0",
            f"{tuple(x.shape)} and {tuple(y.shape)}",
            where,
            "reshape",
        )
    if x.dtype != torch.float32 or y.dtype != torch.int64:
        raise DtypeError(
            "float32 inputs and int64 labels", f"{x.dtype} and {y.dtype}", where, "convert them"
        )
    if int(y.min()) < 0 or int(y.max()) >= MAX_CLASSES:
        raise ArgumentError(
            "labels in [0, K)", f"{int(y.min())} to {int(y.max())}", where, "count classes from 0"
        )
    low, high = x.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise NonFiniteError("finite inputs", "NaN or infinity", where, "clean the data")
    if float(low) < input_range[0] or float(high) > input_range[1]:
        raise InputDomainError(
            f"inputs in [{input_range[0]:g}, {input_range[1]:g}]",
            f"[{float(low):g}, {float(high):g}]",
            where,
            "scale the data, or declare its range as input_range",
        )


def _images(where: str, array: np.ndarray) -> torch.Tensor:
    """Float32 ``(N, C, H, W)`` from uint8 or float images."""
    if array.ndim not in (3, 4):
        raise ShapeError(
            "images (N, H, W), (N, C, H, W) or uint8 (N, H, W, 3)",
            str(array.shape),
            where,
            "reshape",
        )
    if array.dtype == np.uint8:
        if array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        array = array.astype(np.float32) / np.float32(255.0)
    elif array.dtype.kind != "f":
        raise DtypeError(
            "uint8 or floating point images", str(array.dtype), where, "convert the array"
        )
    if array.ndim == 3:
        array = array[:, None]
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _labels(where: str, array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "ui":
        raise DtypeError("integer labels", str(array.dtype), where, "convert the array")
    if array.ndim != 1:
        raise ShapeError("labels (N,)", str(array.shape), where, "flatten the array")
    return torch.from_numpy(array.astype(np.int64))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in ARRAYS if name not in archive.files]
            if missing:
                raise ShapeError(
                    f"arrays {', '.join(ARRAYS)}",
                    f"{', '.join(archive.files) or 'none'} ({', '.join(missing)} missing)",
                    path.name,
                    "save the arrays under these names with numpy.savez",
                )
            return {name: np.asarray(archive[name]) for name in ARRAYS}
    except ShapeError:
        raise
    except Exception as error:  # NumPy's and zipfile's parsers raise many kinds
        raise _bad_source(
            "an intact .npz file without pickled objects", f"{path.name}: {error}"
        ) from error


def _digits() -> Dataset:
    """Scikit-learn's 1797 digits in [0, 1]; every fifth sample of each class is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "scikit-learn", "not installed", "data 'digits'", 'pip install "lmtfast[demo]"'
        ) from error
    bunch: Any = load_digits()
    x = (bunch.images / DIGITS_MAXIMUM).astype(np.float32)[:, None]
    y = bunch.target.astype(np.int64)
    test = np.zeros(len(y), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(y == label)[::DIGITS_TEST_EVERY]] = True
    return Dataset(
        x_train=torch.from_numpy(x[~test]),
        y_train=torch.from_numpy(y[~test]),
        x_test=torch.from_numpy(x[test]),
        y_test=torch.from_numpy(y[test]),
        name="digits",
    )
