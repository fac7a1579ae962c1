# SPDX-License-Identifier: MIT
"""Convolution geometries where a plain rule goes wrong: name, kernel, input, options."""

from __future__ import annotations

from typing import Any

# Where a geometry surprises: between-grid peaks, borders that fold, kernels that miss or overhang.
GEOMETRIES: tuple[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ("peak between the grid", (1, 1, 7), (1, 7), {"padding": 3}),
    ("peak between the grid, 2-D", (1, 1, 3, 3), (1, 3, 3), {"padding": 1}),
    ("reflect", (2, 1, 3), (1, 5), {"padding": 1, "padding_mode": "reflect"}),
    ("reflect, whole map", (1, 1, 5), (1, 3), {"padding": 2, "padding_mode": "reflect"}),
    ("reflect, 2-D", (1, 1, 3, 3), (1, 3, 4), {"padding": 1, "padding_mode": "reflect"}),
    ("edge, p = 3", (1, 1, 7), (1, 4), {"padding": 3, "padding_mode": "replicate"}),
    ("edge, p = 3, 2-D", (1, 1, 3, 3), (1, 2, 3), {"padding": 3, "padding_mode": "replicate"}),
    ("edge, one pixel", (1, 1, 3), (1, 1), {"padding": 3, "padding_mode": "replicate"}),
    ("even kernel", (2, 2, 4), (2, 5), {"padding": 2}),
    ("even kernel, circular", (1, 2, 2), (2, 5), {"padding": 1, "padding_mode": "circular"}),
    ("dilation larger than the image", (2, 1, 3), (1, 4), {"padding": 5, "dilation": 5}),
    ("stride larger than the kernel", (2, 2, 2), (2, 9), {"stride": 4}),
    ("stride larger than the kernel, 2-D", (3, 1, 1, 2), (1, 5, 7), {"stride": (3, 4)}),
    ("kernel larger than the image", (2, 1, 7), (1, 3), {"padding": 4}),
    ("groups", (4, 1, 3), (4, 4), {"padding": 1, "groups": 4}),
    ("groups, widening", (6, 2, 2), (4, 4), {"groups": 2, "stride": 2}),
    ("transposed", (2, 1, 3), (2, 4), {"transposed": True, "stride": 2, "padding": 1}),
    ("transposed, output padding", (1, 2, 3), (1, 3),
     {"transposed": True, "stride": 3, "padding": 1, "output_padding": 2}),
    ("transposed, 2-D, output padding", (2, 1, 2, 3), (2, 2, 2),
     {"transposed": True, "stride": 2, "padding": 1, "output_padding": (1, 0)}),
    ("transposed, groups", (4, 1, 3), (4, 3), {"transposed": True, "groups": 2, "dilation": 2}),
    ("1 x N", (1, 2, 1, 4), (2, 3, 5), {"padding": (0, 2)}),
    ("one row", (2, 1, 3, 3), (1, 1, 6), {"padding": 1}),
    ("same, uneven", (1, 1, 4), (1, 6), {"padding": ((1, 2),)}),
    ("same, uneven, 2-D", (2, 1, 2, 2), (1, 3, 4), {"padding": ((0, 1), (1, 0))}),
    ("only padding at the ends", (1, 1, 1), (1, 3), {"padding": 4, "stride": 3}),
    ("circular, stride does not divide", (2, 1, 3), (1, 5),
     {"padding": 1, "stride": 2, "padding_mode": "circular"}),
    ("circular, longer than the image", (1, 1, 2), (1, 4),
     {"padding": 3, "padding_mode": "circular"}),
    ("3-D", (1, 1, 2, 1, 2), (1, 3, 2, 2), {"padding": (1, 0, 1), "stride": (2, 1, 1)}),
)  # fmt: skip
