# SPDX-License-Identifier: MIT
"""Tables for the terminal: certificates, layers, versions and backends."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from lmtfast.errors import ArgumentError

if TYPE_CHECKING:
    from lmtfast.attack_report import AttackReport
    from lmtfast.certificate import Certificate
    from lmtfast.layer_bounds import LayerBounds

PACKAGES = (
    "lmtfast",
    "torch",
    "numpy",
    "safetensors",
    "typer",
    "rich",
    "matplotlib",
    "scikit-learn",
    "foolbox",
    "adversarial-robustness-toolbox",
)


def certificate_table(
    certificates: Mapping[str, Certificate], radii: Sequence[float], *, title: str
) -> Table:
    """One column per certificate: accuracy, certified accuracy at each radius, median radius.

    Raises:
        ArgumentError: The certificates are of different levels or semantics.
    """
    several = list(certificates.values())
    claims = sorted({c.claim for c in several})
    if len(claims) > 1:
        raise ArgumentError(
            "certificates of one level and semantics", "; ".join(claims), "certificate_table",
            "certify alike what is to be compared",
        )  # fmt: skip
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("training")
    for name in certificates:
        table.add_column(name, justify="right")
    table.add_row("inputs", *(str(len(c.radius)) for c in several))
    table.add_row("correct, %", *(_percent(float(np.mean(c.correct))) for c in several))
    for radius in radii:
        shares = (_percent(c.certified_accuracy(radius)) for c in several)
        # Not markup: the brackets belong to the name.
        table.add_row(Text(f"CRA@{radius:g}[{claims[0]}], %"), *shares)
    table.add_row("median certified radius", *(f"{c.median_radius:.4f}" for c in several))
    table.add_row("Lipschitz constant", *(f"{c.total:.4g}" for c in several))
    table.caption = (
        "CRA, certified robust accuracy: correct, and no L2 change up to the radius alters the "
        "class"
    )
    return table


def attack_table(report: AttackReport, *, title: str) -> Table:
    """One row per attack, the verdict and the gap below."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("attack", "library"):
        table.add_column(column)
    for column in ("inputs", "class changed", "closest", "median distance", "seconds"):
        table.add_column(column, justify="right")
    for row in report.rows:
        table.add_row(
            row.name, row.library or "own", str(row.inputs), str(row.changed), str(row.closest),
            f"{row.median:.4f}", f"{row.seconds:.0f}",
        )  # fmt: skip
    for name, reason in report.skipped:
        table.add_row(name, f"did not run: {reason}")
    gap = ", ".join(f"{100 * q:g} % {v:.3f}" for q, v in report.gap_quantiles().items())
    table.caption = (
        f"inside a certified radius: {len(report.violations)} proved changes of class, "
        f"{len(report.undecided)} undecided\n"
        f"certified radius / attacked distance, quantiles over {len(report.gap)} inputs: {gap}"
    )
    if report.unattacked:
        table.caption += f"\nnot attacked, their own class is not proved: {len(report.unattacked)}"
    return table


def layer_table(result: LayerBounds) -> Table:
    """One row per operator, the bound of the network below."""
    bound = result.bound
    table = Table(title=f"Spectral norms, level {bound.level.label}", box=box.SIMPLE_HEAD)
    for column in ("name", "kind", "input", "output"):
        table.add_column(column, overflow="fold")
    for column in ("norm", "Cor. 1", "Cisse"):
        table.add_column(column, justify="right")
    table.add_column("method", overflow="fold")
    for layer in result.layers:
        table.add_row(
            layer.name,
            layer.kind,
            "x".join(map(str, layer.in_shape)),
            "x".join(map(str, layer.out_shape)),
            f"{layer.norm:.5g}",
            *("" if v is None else f"{v:.5g}" for v in (layer.corollary_1, layer.cisse)),
            layer.method,
        )
    table.caption = (
        f"L2 Lipschitz constant {float(bound.total):.6g}, "
        f"up to the head {float(bound.features):.6g}; {result.seconds:.1f} s"
    )
    return table


def version_table() -> Table:
    """Versions of what the library works with."""
    table = Table(title="Versions", box=box.SIMPLE_HEAD)
    table.add_column("package")
    table.add_column("version")
    table.add_row("Python", platform.python_version())
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        table.add_row(package, version)
    return table


def backend_table() -> Table:
    """Every backend, whether it can run here, and why not."""
    from lmtfast import available_backends

    table = Table(title="Backends", box=box.SIMPLE_HEAD)
    for column in ("backend", "available", "reason"):
        table.add_column(column, overflow="fold")
    for entry in available_backends().values():
        table.add_row(entry.name, "yes" if entry.available else "no", entry.reason)
    return table


def _percent(share: float) -> str:
    return f"{100.0 * share:.2f}"
