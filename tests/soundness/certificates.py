# SPDX-License-Identifier: MIT
"""A certificate made by hand with NumPy alone: two dense operators of exactly known norms, so that
every number of it can be put on either side of what it may be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lmtfast import check

ONE, ZERO = (1.0).hex(), (0.0).hex()
UP, HAIR = 1.0 + 2.0**-25, 1.0 - 2.0**-51
INF, NAN = math.inf, math.nan
FIRST = np.kron([[1.0, 1.0], [1.0, -1.0]], [[1.0, 1.0], [1.0, -1.0]])  # of norm 2
HEAD = np.array([[3.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 0, 0]])  # of norm 4; rows 5, 3, 4 apart
FEATURES = 2.0 * UP
TOTAL = math.nextafter(FEATURES * 4.0 * UP * (1.0 + 2.0**-50), INF)
Header, Arrays = dict[str, Any], dict[str, np.ndarray]


def linear(name: str, rows: int, columns: int, **changes: Any) -> dict[str, Any]:
    node = {
        "op": "linear", "in": [columns], "out": [rows], "rows": [], "columns": [], "gain": ONE,
        "identity": ZERO, "weight": {"array": name}, "inputs": [-1], **changes,
    }  # fmt: skip
    return {"name": name, "in": [columns], "out": [rows], "nodes": [node]}


def weights_of(header: Header, arrays: Arrays) -> None:
    """Names these weights in the description, as 64-bit floats."""
    header["network"]["weights"] = {
        n: [[*a.shape], check.sha256(a.astype("<f8").tobytes())] for n, a in arrays.items()
    }


def honest() -> tuple[Header, Arrays, Arrays]:
    """A header, arrays and weights; radii and margins are a hair below the most that holds."""
    tape = [["constant", ONE], ["sigma", 0], ["sigma", 1], ["mul", 1, 2]]
    network: dict[str, Any] = {
        "input": [4], "tape": tape, "features": 1, "total": 3, "head": 1,
        "operators": [linear("first", 4, 4), linear("head", 3, 4)],
    }  # fmt: skip
    header: Header = {
        "schema": 2, "level": "rigorous", "delta": ZERO, "norm": "l2", "classes": 3,
        "assumptions": [f"A{i}: so" for i in range(1, 6)], "input_shape": [4],
        "input_range": [ZERO, ONE], "semantics": "ideal", "program_sha256": "0" * 64,
        "weights_sha256": "1" * 64, "network": network, "features": FEATURES.hex(),
        "total": TOTAL.hex(), "operators": [["first", "m", (2.0 * UP).hex()],
                                            ["head", "m", (4.0 * UP).hex()]],
        "counts": {"certified": 2, "constant": 0, "correct": 3, "refused": 2, "total": 4},
        "arrays": {}, "fingerprint": "", "seal": "", "head_sha256": "", "method": "m",
        "requested_method": "m", "slack": ZERO, "versions": {},
    }  # fmt: skip
    error = np.array([0.0, 0.125, 0.0, 0.25])
    logits = np.array([[1.0, 0.0, -5.0], [-4.0, 1.0, -1.0], [0.5, 0.0, 2.0], [0.0, 0.25, 0.5]])
    reach = 1.0 + 2.0**-40  # what the checker may lose by rounding
    radius = [1.0 / (5.0 * FEATURES), (2.0 - 0.25) / (4.0 * FEATURES), 1.5 / (3.0 * FEATURES), 0.0]
    arrays = {
        "label": np.array([0, 1, 1, 2]), "logit_error": error, "logits": logits.reshape(-1),
        "margin_lower": np.array([1.0, 1.75, 1.5, 0.0]) / reach,
        "prediction": np.array([0, 1, 2, 2]), "prediction_radius": np.array(radius) / reach,
    }  # fmt: skip
    weights = {"first": FIRST, "head": HEAD}
    weights_of(header, weights)
    return header, arrays, weights


def signed(header: Header) -> Header:
    identity = [header["program_sha256"], header["network"], header["weights_sha256"]]
    return header | {"fingerprint": check.sha256(check.canonical(identity))}
