# SPDX-License-Identifier: MIT
"""The demonstration: one network trained with a Lipschitz margin and without, both certified."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmtfast.certificate import Certificate
from lmtfast.certification import certify
from lmtfast.checkpoint import remove_checkpoints
from lmtfast.data import load_dataset
from lmtfast.errors import MissingDependencyError
from lmtfast.files import write_atomically, writing
from lmtfast.layer_bounds import LayerBounds, layer_bounds, write_layers
from lmtfast.recipes import load_recipe
from lmtfast.training import Progress, train

RUNS = {"lmt": "digits-lmt", "plain": "digits-plain"}


@dataclass(frozen=True)
class DemoResult:
    """Certificates by run, the radii to report, the files written and the time spent."""

    certificates: dict[str, Certificate]
    radii: tuple[float, ...]
    files: tuple[Path, ...]
    seconds: float


def run_demo(
    out: str | Path, *, epochs: int | None = None, progress: Progress | None = None
) -> DemoResult:
    """Train on scikit-learn's digits with LMT++ and plainly, certify both, write the results.

    Args:
        out: Directory for ``certificate.npz`` (of the LMT network), ``plain.npz``, ``curve.png``,
            ``bounds.csv``, ``seconds.txt`` and the checkpoints of both runs; an earlier demo there
            is replaced.
        epochs: Fewer epochs than the recipes', for tests.
        progress: As for :func:`lmtfast.training.train`.

    Raises:
        MissingDependencyError: scikit-learn is not installed.

    Guarantee:
        The certificates are rigorous.

    Example:
        >>> run_demo("demo").certificates["lmt"].median_radius > 0.2  # doctest: +SKIP
        True
    """
    began = time.perf_counter()
    with _one_thread():
        certificates, layers, seconds, radii = _train_and_certify(Path(out), epochs, progress)
    out = Path(out)
    files = [out / "certificate.npz", out / "plain.npz", out / "bounds.csv", out / "seconds.txt"]
    certificates["lmt"].save(files[0])
    certificates["plain"].save(files[1])
    write_layers(files[2], layers)
    files += _curve(out / "curve.png", certificates, radii)
    seconds["total"] = time.perf_counter() - began
    times = "".join(f"{name}: {value:.1f}\n" for name, value in seconds.items())
    write_atomically(files[3], times.encode())
    return DemoResult(certificates, radii, tuple(files), seconds["total"])


def _train_and_certify(
    out: Path, epochs: int | None, progress: Progress | None
) -> tuple[dict[str, Certificate], dict[str, LayerBounds], dict[str, float], tuple[float, ...]]:
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    data = load_dataset("digits")
    certificates: dict[str, Certificate] = {}
    layers: dict[str, LayerBounds] = {}
    seconds: dict[str, float] = {}
    radii: tuple[float, ...] = ()
    for run, recipe in RUNS.items():
        config = load_recipe(recipe, **({} if epochs is None else {"epochs": epochs}))
        radii = config.certify_radii
        remove_checkpoints(out / run)
        trained = train(config, data, out=out / run, progress=_labelled(progress, run))
        seconds[f"train {run}"] = trained.seconds
        started = time.perf_counter()
        certificates[run] = certify(
            trained.model,
            (data.x_test, data.y_test),
            input_shape=data.input_shape,
            input_range=data.input_range,
            level="rigorous",
        )
        seconds[f"certify {run}"] = time.perf_counter() - started
        layers[run] = layer_bounds(trained.model, data.input_shape, level="rigorous")
    return certificates, layers, seconds, radii


@contextmanager
def _one_thread() -> Iterator[None]:
    """The demo's layers are too small to share between threads, and so every machine agrees."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _curve(
    path: Path, certificates: Mapping[str, Certificate], radii: tuple[float, ...]
) -> list[Path]:
    """The figure, unless matplotlib is missing: the demo's numbers do not depend on it."""
    from lmtfast.plot import plot_certificates

    try:
        return [plot_certificates(certificates, path, marks=radii)]
    except MissingDependencyError:
        return []


def _labelled(progress: Progress | None, run: str) -> Progress | None:
    if progress is None:
        return None

    def report(step: int, steps: int, row: Mapping[str, Any]) -> None:
        progress(step, steps, {"run": run, **row})

    return report
