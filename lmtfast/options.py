# SPDX-License-Identifier: MIT
"""Choices and options that commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Level(str, Enum):
    """Strength of a bound."""

    estimate = "estimate"
    probabilistic = "probabilistic"
    rigorous = "rigorous"


class Semantics(str, Enum):
    """What a certificate speaks of."""

    ideal = "ideal"
    executed = "executed"


class CertifiedLevel(str, Enum):
    """Strengths a certificate may have."""

    probabilistic = "probabilistic"
    rigorous = "rigorous"


DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="`digits`, a `.npz` file (x_train, y_train, x_test, y_test), or a directory of IDX "
        "files. Not needed where the recipe or the checkpoint names `digits`.",
    ),
]
ImportModel = Annotated[
    bool,
    typer.Option(
        "--import-model",
        help="Allow the checkpoint to import a model that is not the library's own. "
        "Only for files you trust.",
    ),
]
MethodOption = Annotated[
    str, typer.Option(help="Method of the bound; `auto` takes the tightest one it can afford.")
]
BudgetOption = Annotated[
    float,
    typer.Option(
        "--budget", help="Nominal seconds that exact proofs may take; beyond it, looser bounds."
    ),
]
MemoryOption = Annotated[
    float, typer.Option("--memory", help="GiB that one proof may hold at once.")
]
SemanticsOption = Annotated[
    Semantics,
    typer.Option(
        help="`ideal` speaks of the exact real function; `executed` also of its execution under "
        "--profile."
    ),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        help="How the network is executed: `fp32a64` (float32 storage, every call in float64) or "
        "`fp64`."
    ),
]
DeltaOption = Annotated[
    float | None,
    typer.Option(help="Chance that a probabilistic bound is too small. Default: 2^-100."),
]
DrawOption = Annotated[
    str,
    typer.Option(
        help="Randomness of a probabilistic bound: `fresh`, or `hash` of the weights, which anyone "
        "can repeat."
    ),
]
ProofDeviceOption = Annotated[
    str, typer.Option("--device", help="Where norms are proved, e.g. `cuda`.")
]
