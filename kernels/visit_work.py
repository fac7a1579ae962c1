# SPDX-License-Identifier: MIT
"""Where a stencil reads: taps as visits, on the host.

A *visit* is one tap as one product sees it: position x of the target reads the source at
``step * x + shift`` per axis, where the source has that position. Forward, x is an output and the
step the stride. The adjoint of a strided stencil falls apart into classes of input positions equal
modulo the stride; in a class the step is 1 and only the taps that reach it are visits. A circular
axis adds the visits that wrap around.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import triton.language as tl

VISIT_WIDTH = tl.constexpr(4)  # tap, shift per axis


class PositionClass(NamedTuple):
    """Target positions ``residue + stride * x`` with x below ``counts``, and their visits."""

    residue: tuple[int, ...]
    counts: list[int]
    visits: list[list[int]]


def taps_of(row: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Indices of all taps, the last axis fastest."""
    return list(itertools.product(*(range(row[f"kernel_{a}"]) for a in range(3))))


def forward_class(row: Mapping[str, int]) -> PositionClass:
    """All outputs; every tap is a visit, in the order of the taps."""
    visits = [
        [tap, *(row[f"dilation_{a}"] * t[a] - row[f"pad_low_{a}"] for a in range(3))]
        for tap, t in enumerate(taps_of(row))
    ]
    return PositionClass((0, 0, 0), [row[f"out_{a}"] for a in range(3)], visits)


def adjoint_classes(row: Mapping[str, int]) -> list[PositionClass]:
    """The inputs, class by class."""
    sizes = [row[f"in_{a}"] for a in range(3)]
    strides = [row[f"stride_{a}"] for a in range(3)]
    wraps = (-1, 0, 1) if row["circular"] else (0,)
    classes = []
    residues = (range(min(s, n)) for s, n in zip(strides, sizes, strict=True))
    for residue in itertools.product(*residues):
        counts = [-(-(n - r) // s) for n, r, s in zip(sizes, residue, strides, strict=True)]
        visits = []
        for tap, t in enumerate(taps_of(row)):
            for wrap in itertools.product(wraps, repeat=3):
                shift = [
                    residue[a] + wrap[a] * sizes[a] + row[f"pad_low_{a}"]
                    - row[f"dilation_{a}"] * t[a] for a in range(3)
                ]  # fmt: skip
                if any(e % s for e, s in zip(shift, strides, strict=True)):
                    continue
                reads = [e // s for e, s in zip(shift, strides, strict=True)]
                # Some position of the class reads inside the source.
                if all(-counts[a] < reads[a] < row[f"out_{a}"] for a in range(3)):
                    visits.append([tap, *reads])
        classes.append(PositionClass(residue, counts, visits))
    return classes
