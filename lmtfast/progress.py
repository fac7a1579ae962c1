# SPDX-License-Identifier: MIT
"""The terminal of the command line and its progress bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[figures]}"),
)


@contextmanager
def bound_progress(level: str) -> Iterator[Any]:
    """A progress bar over the inputs; the bound comes first and can take longer than they do."""
    with Progress(*COLUMNS, console=console) as bar:
        task = bar.add_task(f"bounding the network, level {level}", total=None, figures="")

        def report(done: int, total: int | None) -> None:
            bar.update(task, description="certifying", completed=done, total=total)

        yield report


@contextmanager
def training_progress() -> Iterator[Any]:
    """A progress bar; yields the function the training loop reports to."""
    with Progress(*COLUMNS, console=console) as bar:
        task = bar.add_task("training", total=None, figures="")

        def report(step: int, steps: int, row: Mapping[str, Any]) -> None:
            shown = {
                k: v
                for k, v in row.items()
                if k in ("epoch", "train_loss", "test_accuracy", "loss", "run")
            }
            figures = "  ".join(
                f"{k.replace('_', ' ')} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in shown.items()
            )
            if "loss" not in row:
                bar.console.print(figures)
            bar.update(task, completed=step, total=steps, figures=figures)

        yield report


@contextmanager
def attack_progress() -> Iterator[Any]:
    """A progress bar; yields the function that attacks report to."""
    with Progress(*COLUMNS, console=console) as bar:
        task = bar.add_task("attacking", total=None, figures="")

        def report(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"attacking: {name}", completed=done, total=total)

        yield report
