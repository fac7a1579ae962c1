# SPDX-License-Identifier: MIT
"""Tables and plots of an engine study, from its CSV files alone."""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
BASELINE = "operator"
MACHINE_COLUMNS = ("command", "key", "value")
Row = Mapping[str, str]
COLOURS = {
    "operator": "tab:blue", "symbol": "tab:orange", "separable": "tab:green",
    "symbol, rescan 1": "tab:red",
}  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the values of some columns, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[n] for n in names), []).append(row)
    return groups


def column(rows: Iterable[Row], name: str) -> np.ndarray:
    """The numbers of a column, empty cells left out."""
    return np.array([float(r[name]) for r in rows if r[name] != ""])


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in lines) + "\n"


def percent(value: float, sign: str = "+") -> str:
    """Two digits; empty where nothing is known."""
    return "" if math.isnan(value) else f"{100 * value:{sign}.2f}"


def error_table(errors: Sequence[Row]) -> str:
    """Sigma beside the converged norm, by engine and number of output positions."""
    head = ["case", "run", "engine", "positions", "pairs", "5 %", "median", "95 %", "lowest"]
    rows = []
    for (case, variant, engine, size), part in grouped(
        errors, "case", "variant", "engine", "positions"
    ).items():
        error = column(part, "error")
        quantiles = [percent(float(np.percentile(error, q))) for q in (5, 50, 95)]
        lowest = percent(float(error.min()))
        rows.append([case, variant, engine, size, len(part), *quantiles, lowest])
    return markdown(head, rows)


def tracking_table(errors: Sequence[Row], runs: Sequence[Row]) -> str:
    """How closely the symbol engine follows its own supremum, and what it took per step."""
    head = [
        "case", "run", "pairs", "within 1 %", "within 3 %", "median", "95 %", "largest",
        "bound, ms", "rescans, ms",
    ]  # fmt: skip
    rows = []
    for (case, variant), part in grouped(errors, "case", "variant").items():
        error = np.abs(column(part, "tracking_error"))
        if not len(error):
            continue
        of_run = [r for r in runs if (r["case"], r["variant"]) == (case, variant)]
        shares = [f"{100 * float((error <= limit).mean()):.1f}" for limit in (0.01, 0.03)]
        quantiles = [f"{100 * float(np.percentile(error, q)):.2f}" for q in (50, 95, 100)]
        cost = [
            f"{column(of_run, name).mean():.2f}"
            for name in ("bound_ms_per_step", "rescan_ms_per_step")
        ]
        rows.append([case, variant, len(error), *shares, *quantiles, *cost])
    return markdown(head, rows)


def paired(rows: Mapping[str, Row], base: Mapping[str, Row], name: str) -> tuple[float, float]:
    """Mean over seeds of the relative difference to the baseline, and its standard error."""
    ratios = [float(rows[s][name]) / float(base[s][name]) - 1.0 for s in rows if s in base]
    if not ratios:
        return math.nan, math.nan
    spread = float(np.std(ratios, ddof=1)) if len(ratios) > 1 else math.nan
    return float(np.mean(ratios)), spread / math.sqrt(len(ratios))


def result_table(runs: Sequence[Row]) -> str:
    """Certified results by case and variant, beside the operator engine with the same seeds."""
    head = [
        "case", "run", "seeds", "correct, %", "median radius", "median of the correct",
        "estimate / norm", "radius beside operator, %", "standard error",
    ]  # fmt: skip
    rows = []
    for case in dict.fromkeys(r["case"] for r in runs):
        of_case = [r for r in runs if r["case"] == case]
        variants = grouped(of_case, "variant")
        base = {r["seed"]: r for r in variants.get((BASELINE,), [])}
        for (variant,), part in variants.items():
            mean, error = paired({r["seed"]: r for r in part}, base, "median_radius_correct")
            rows.append([
                case, variant, len(part), f"{100 * column(part, 'accuracy').mean():.2f}",
                f"{column(part, 'median_radius').mean():.4g}",
                f"{column(part, 'median_radius_correct').mean():.4g}",
                f"{(column(part, 'features_estimate') / column(part, 'features')).mean():.3f}",
                percent(mean), percent(error, "-"),
            ])  # fmt: skip
    return markdown(head, rows)


def certificate_table(certificates: Sequence[Row]) -> str:
    """Median radius at level rigorous, all inputs and the correct ones, beside the operator's."""
    head = ["case", "run", "seeds", "inputs", "correct, %", "median radius",
            "median of the correct", "radius beside operator, %", "standard error"]  # fmt: skip
    rows = []
    for case in dict.fromkeys(r["case"] for r in certificates):
        variants = grouped([r for r in certificates if r["case"] == case], "variant")
        base = {r["seed"]: r for r in variants.get((BASELINE,), [])}
        for (variant,), part in variants.items():
            mean, error = paired({r["seed"]: r for r in part}, base, "median_radius_correct")
            rows.append([
                case, variant, len(part), part[0]["inputs"],
                f"{100 * column(part, 'accuracy').mean():.2f}",
                f"{column(part, 'median_radius').mean():.4g}",
                f"{column(part, 'median_radius_correct').mean():.4g}",
                percent(mean), percent(error, "-"),
            ])  # fmt: skip
    return markdown(head, rows)


def cost_table(costs: Sequence[Row]) -> str:
    """Milliseconds of a step with its gradient, one column per engine."""
    engines = list(dict.fromkeys(r["engine"] for r in costs))
    rescans = [f"rescan {e}" for e in dict.fromkeys(r["engine"] for r in costs if r["rescan_ms"])]
    rows = []
    for key, part in grouped(costs, "backend", "subject", "channels", "size").items():
        cells = {r["engine"]: r["step_ms"] for r in part}
        cells |= {f"rescan {r['engine']}": r["rescan_ms"] for r in part if r["rescan_ms"]}
        numbers = [f"{float(cells[e]):.3g}" if e in cells else "" for e in (*engines, *rescans)]
        rows.append([*key, *numbers])
    return markdown(["backend", "what", "channels", "size", *engines, *rescans], rows)


def tables(folder: Path) -> str:
    """All tables in Markdown."""
    runs, errors = read(folder / "runs.csv"), read(folder / "errors.csv")
    costs, machine = read(folder / "costs.csv"), read(folder / "machine.csv")
    parts = {
        "Results": result_table(runs),
        "Rigorous certificates": certificate_table(read(folder / "certificates.csv")),
        "Error against the converged operator, in percent": error_table(errors),
        "Symbol against its own supremum, in percent": tracking_table(errors, runs),
        "Costs of a step with its gradient, in milliseconds": cost_table(costs),
        "Machine": markdown(MACHINE_COLUMNS, ([r[c] for c in MACHINE_COLUMNS] for r in machine)),
    }
    return "\n" + "".join(f"### {title}\n\n{table}" for title, table in parts.items())


def with_tables(text: str, fresh: str) -> str:
    """The text with what stands between the two marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + fresh + END + after


def write_report(folder: Path) -> None:
    """Write the tables into the folder's README.md, between its marks, and draw the plots."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    readme.write_text(with_tables(text, tables(folder)), encoding="utf-8")
    draw(folder / "errors.png", plot_errors, read(folder / "errors.csv"))
    draw(folder / "costs.png", plot_costs, read(folder / "costs.csv"))


def draw(path: Path, plot: Callable[[Any, Sequence[Row]], None], rows: Sequence[Row]) -> None:
    """One figure, drawn without a display."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(11, 4.2))
    plot(figure, rows)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_errors(figure: Any, errors: Sequence[Row]) -> None:
    """Per case: 5th to 95th percentile and median of the error over layers and seeds."""
    cases = list(dict.fromkeys(r["case"] for r in errors))
    for i, case in enumerate(cases):
        axes = figure.add_subplot(1, len(cases), i + 1)
        for engine, colour in COLOURS.items():
            part = [
                r for r in errors
                if r["case"] == case and r["variant"] == engine and r["kind"] == "conv"
            ]  # fmt: skip
            steps = grouped(part, "step")
            at = sorted(int(step) for (step,) in steps)
            if not at:
                continue
            low, middle, high = (
                [100 * np.percentile(column(steps[(str(s),)], "error"), q) for s in at]
                for q in (5, 50, 95)
            )
            axes.plot(at, middle, color=colour, label=engine)
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0.0, color="black", linewidth=0.6)
        axes.set(title=f"{case}: convolutions", xlabel="step", ylabel="sigma / norm - 1, %")
        axes.legend()


def plot_costs(figure: Any, costs: Sequence[Row]) -> None:
    """Per backend: milliseconds of a step against output positions, one line per width."""
    layers = [r for r in costs if r["subject"] == "layer"]
    backends = list(dict.fromkeys(r["backend"] for r in layers))
    styles = {"16": ":", "64": "--", "256": "-"}
    for i, backend in enumerate(backends):
        axes = figure.add_subplot(1, len(backends), i + 1)
        of_backend = [r for r in layers if r["backend"] == backend]
        for (engine, channels), part in grouped(of_backend, "engine", "channels").items():
            axes.loglog(
                column(part, "positions"), column(part, "step_ms"), styles.get(channels, "-"),
                color=COLOURS[engine], label=f"{engine}, {channels} channels",
            )  # fmt: skip
        axes.set(title=backend, xlabel="output positions", ylabel="ms per step and layer")
        axes.legend(fontsize=7)
