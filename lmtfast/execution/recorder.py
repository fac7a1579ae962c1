# SPDX-License-Identifier: MIT
"""A graph builder that remembers where every base came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmtfast.builder import Base, Origin, Value
from lmtfast.enclosure import Recorder
from lmtfast.graph import Shape, WeightRef


@dataclass(frozen=True, eq=False)
class Source:
    """How a base was made: ``function``, ``slope``, ``add``, ``join`` or ``slice`` of values."""

    kind: str
    values: tuple[Value, ...]
    slope: WeightRef | None = None


class SourceRecorder(Recorder):
    """Records a :class:`Source` for every base but the input's."""

    def __init__(self, input_shape: Shape) -> None:
        self.sources: dict[Base, Source] = {}
        self._joined: tuple[Value, ...] = ()
        super().__init__(input_shape)

    def joint(self, values: Sequence[Value]) -> tuple[Origin, int]:
        self._joined = tuple(values)
        return super().joint(values)

    def new_base(self, origin: Origin, rel: int, shape: Shape) -> Value:
        result = super().new_base(origin, rel, shape)
        self.sources[result.base] = Source("join", self._joined)
        return result

    def nonlinear(
        self, value: Value, constant: float, shape: Shape, note: tuple[str, str]
    ) -> Value:
        result = super().nonlinear(value, constant, shape, note)
        self.sources[result.base] = Source("function", (value,))
        return result

    def learned_slope(self, value: Value, name: str, ref: WeightRef) -> Value:
        result = super().learned_slope(value, name, ref)
        self.sources[result.base] = Source("slope", (value,), ref)
        return result

    def slice(self, value: Value, axis: int, start: int, stop: int) -> Value:
        result = super().slice(value, axis, start, stop)
        if result is not value:
            self.sources[result.base] = Source("slice", (value,))
        return result

    def add(self, values: Sequence[Value]) -> Value:
        result = super().add(values)
        if result.expression is result.base:
            self.sources[result.base] = Source("add", tuple(values))
        return result
