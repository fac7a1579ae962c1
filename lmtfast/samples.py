# SPDX-License-Identifier: MIT
"""The inputs to certify: checked against shape and range, regrouped into fixed chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmtfast.errors import ArgumentError, DtypeError, InputDomainError, ShapeError
from lmtfast.graph import Shape

WHERE = "certify(data)"


def check_input_range(input_range: Any) -> tuple[float, float]:
    """The declared range as two finite numbers, the first below the second."""
    try:
        low, high = (float(bound) for bound in input_range)
    except (TypeError, ValueError):
        low = high = float("nan")
    if not (low < high and abs(low) < float("inf") and abs(high) < float("inf")):
        raise InputDomainError(
            "a pair of finite numbers (low, high) with low < high",
            repr(input_range),
            "input_range",
            "state the range of the inputs the model receives, for example (0.0, 1.0)",
        )  # fmt: skip
    return low, high


class Samples:
    """Inputs and labels as float64 chunks.

    Chunks do not depend on how the data arrives: batches of a loader are joined and cut anew.

    Args:
        data: ``(x, y)`` or ``(x, None)`` as a tuple, ``x`` alone, or an iterable of batches of
            these forms (lists count as tuples there).
        shape: Shape of one input.
        input_range: The declared range.
        classes: Number of classes, for the labels.
    """

    def __init__(
        self, data: Any, shape: Shape, input_range: tuple[float, float], classes: int
    ) -> None:
        self._data, self._shape, self._classes = data, shape, classes
        self._low, self._high = input_range
        self.total: int | None = None
        self.labelled: bool | None = None
        if isinstance(data, (Tensor, np.ndarray)):
            self.total = len(data) if data.ndim else None
        elif isinstance(data, tuple) and data and hasattr(data[0], "__len__"):
            self.total = len(data[0])

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Chunks of exactly ``size`` samples, the last one possibly smaller."""
        held: list[tuple[Tensor, Tensor | None]] = []
        count = 0
        for x, y in self._batches():
            for piece in range(0, len(x), size):
                part = (x[piece : piece + size], None if y is None else y[piece : piece + size])
                held.append(part)
                count += len(part[0])
                while count >= size:
                    xs, ys = _joined(held)
                    yield self._checked(xs[:size], None if ys is None else ys[:size])
                    held = [(xs[size:], None if ys is None else ys[size:])]
                    count -= size
        if count:
            yield self._checked(*_joined(held))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        data = self._data
        alone = isinstance(data, (Tensor, np.ndarray))
        if alone or isinstance(data, tuple):
            batches: Iterable[Any] = [data]
        elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
            batches = data
        else:
            raise ArgumentError(
                "(x, y), x, or an iterable of batches", type(data).__name__, WHERE,
                "pass tensors, arrays or a DataLoader",
            )  # fmt: skip
        for batch in batches:
            x, y = batch, None
            if isinstance(batch, (tuple, list)):
                if len(batch) not in (1, 2):
                    raise ArgumentError(
                        "batches of the form (x, y)", f"{len(batch)} parts", WHERE,
                        "drop the other parts",
                    )  # fmt: skip
                x, y = batch[0], batch[1] if len(batch) == 2 else None
            inputs = self._inputs(x)
            labels = None if y is None else self._labels(y, len(inputs))
            if batches is data:
                # A loader may write its next batch into the same memory; chunks outlive batches.
                inputs = inputs.clone()
                labels = None if labels is None else labels.clone()
            if self.labelled not in (None, labels is not None):
                raise ArgumentError(
                    "labels for all inputs or for none", "some of each", WHERE, "make them alike"
                )
            self.labelled = labels is not None
            yield inputs, labels

    def _inputs(self, x: Any) -> Tensor:
        tensor = _as_tensor(x, "inputs")
        if not tensor.is_floating_point():
            raise DtypeError(
                "floating-point inputs", str(tensor.dtype), WHERE,
                "convert and scale them as for the model, for example x.float() / 255, and state "
                "input_range in the same units",
            )  # fmt: skip
        if tensor.ndim == 0 or tuple(tensor.shape[1:]) != self._shape:
            raise ShapeError(
                f"inputs of shape {('N', *self._shape)}", str(tuple(tensor.shape)), WHERE,
                "pass a batch whose samples have input_shape",
            )  # fmt: skip
        return tensor

    def _labels(self, y: Any, count: int) -> Tensor:
        tensor = _as_tensor(y, "labels")
        integer = not (
            tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
        )
        if not integer:
            raise DtypeError(
                "integer labels", str(tensor.dtype), WHERE, "convert them with y.long()"
            )
        if tuple(tensor.shape) != (count,):
            raise ShapeError(
                f"labels of shape ({count},)", str(tuple(tensor.shape)), WHERE,
                "pass one class index per input",
            )  # fmt: skip
        tensor = tensor.to(torch.int64)
        outside = int(((tensor < 0) | (tensor >= self._classes)).sum())
        if outside:
            raise ArgumentError(
                f"labels in [0, {self._classes})", f"{outside} outside", WHERE,
                "check that labels and model belong together",
            )  # fmt: skip
        return tensor

    def _checked(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Every float16, bfloat16 and float32 value is exact in float64.
        x = x.to(torch.float64)
        inside = (x >= self._low) & (x <= self._high)
        if not bool(inside.all()):
            bad = x[~inside]
            nan = int(bad.isnan().sum())
            numbers = bad[~bad.isnan()]
            middle = self._low / 2 + self._high / 2
            worst = (
                float(numbers[(numbers - middle).abs().argmax()]) if len(numbers) else float("nan")
            )
            raise InputDomainError(
                f"inputs in [{self._low!r}, {self._high!r}]",
                f"{len(bad)} values outside, {nan} of them NaN; the worst is {worst!r}",
                WHERE,
                "certify the inputs in the units the model receives, or correct input_range",
            )
        return x, y


def _as_tensor(item: Any, what: str) -> Tensor:
    if isinstance(item, Tensor):
        return item.detach().cpu()
    if isinstance(item, np.ndarray) and item.dtype.kind in "fiub" and item.dtype.itemsize <= 8:
        return torch.as_tensor(np.ascontiguousarray(item).copy())
    if isinstance(item, np.ndarray) or not isinstance(item, Sequence) or isinstance(item, str):
        name = str(item.dtype) if isinstance(item, np.ndarray) else type(item).__name__
        raise DtypeError(f"{what} as a tensor or numeric array", name, WHERE, "convert them first")
    tensor = torch.as_tensor(item)
    # Python floats are float64; the default dtype would round them.
    return torch.as_tensor(item, dtype=torch.float64) if tensor.is_floating_point() else tensor


def _joined(held: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    if len(held) == 1:
        return held[0]
    labels = [y for _, y in held if y is not None]
    return torch.cat([x for x, _ in held]), torch.cat(labels) if labels else None
