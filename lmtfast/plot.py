# SPDX-License-Identifier: MIT
"""Certified accuracy against radius, drawn from certificates alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmtfast.errors import ArgumentError, MissingDependencyError
from lmtfast.files import write_atomically

if TYPE_CHECKING:
    from lmtfast.attack_report import AttackReport
    from lmtfast.certificate import Certificate

FIGURE_INCHES = (6.4, 4.2)
DOTS_PER_INCH = 150
# The axis ends where at most this share of the inputs is still certified, so one easy input does
# not stretch it.
TAIL = 0.002
FAR = 1e9  # beyond every axis


def certified_curve(certificate: Certificate) -> tuple[np.ndarray, np.ndarray]:
    """Certified accuracy as a step function of the radius.

    Returns:
        ``(radii, accuracy)``, float64: ``accuracy[i]`` holds on ``[radii[i], radii[i + 1])``. The
        first radius is 0, where an input counts if it is correct with a positive radius, the
        inequality being strict.

    Guarantee:
        That of the certificate.

    Example:
        >>> certified_curve(certificate)  # doctest: +SKIP
        (array([0. , 0.3, 0.7]), array([1. , 0.5, 0. ]))
    """
    radius = np.asarray(certificate.radius, dtype=np.float64)
    correct = np.asarray(certificate.correct, dtype=bool)
    values, counts = np.unique(radius[correct & (radius > 0.0)], return_counts=True)
    left = counts.sum() - np.cumsum(counts)
    radii = np.concatenate(([0.0], values))
    return radii, np.concatenate(([counts.sum()], left)) / max(len(radius), 1)


def plot_certificates(
    certificates: Certificate | Sequence[Certificate] | Mapping[str, Certificate],
    path: str | Path,
    *,
    marks: Sequence[float] = (),
    attacked: Mapping[str, AttackReport] | None = None,
) -> Path:
    """Draw certified accuracy against radius for one or several certificates.

    Args:
        certificates: One, several, or several by name; the names make the legend.
        path: Image file; the suffix chooses the format (png, pdf, svg).
        marks: Radii to mark with a vertical line, in input units.
        attacked: What :func:`lmtfast.attack` found, by the name of the certificate: a dashed curve
            of the accuracy under attack, an upper bound, beside the certified one, a lower bound.

    Returns:
        The path written.

    Raises:
        ArgumentError: No certificate was given.
        MissingDependencyError: matplotlib is not installed.

    Guarantee:
        That of the certificates; the caption states their level, method and input range.

    Example:
        >>> plot_certificates({"LMT": ours, "plain": theirs}, "curve.png")  # doctest: +SKIP
    """
    named = _named(certificates)
    if not named:
        raise ArgumentError("at least one certificate", "none", "plot_certificates", "pass one")
    figure_class, canvas_class = _matplotlib()
    figure = figure_class(figsize=FIGURE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    canvas_class(figure)
    axes = figure.add_subplot()
    end = 0.0
    for name, certificate in named.items():
        radii, accuracy = certified_curve(certificate)
        clean = 100.0 * float(np.mean(np.asarray(certificate.correct)))
        label = f"{name}, {clean:.1f} % correct"
        # An input whose class can never change has an infinite radius: it stays up to the edge.
        (line,) = axes.step(*_drawn(radii, accuracy), where="post", label=label)
        axes.plot(0.0, clean, marker="o", clip_on=False, zorder=3, color=line.get_color())
        end = max(end, _end(radii, accuracy))
        if attacked is not None and name in attacked:
            curve = attacked[name].curve()
            style = {"color": line.get_color(), "linestyle": "--", "linewidth": 1.0}
            axes.step(*_drawn(*curve), where="post", label=f"{name}, under attack", **style)
            end = max(end, _end(*curve))
    for mark in marks:
        axes.axvline(mark, color="0.7", linewidth=0.8, zorder=0)
    axes.set(
        xlabel="L2 radius in input units",
        ylabel="certified accuracy, %" if attacked is None else "accuracy, %",
        xlim=(0.0, 1.05 * end if end else 1.0),
        ylim=(0.0, 104.0),
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    text = caption(list(named.values()))
    if attacked is not None:
        text += "".join(
            f"\nattacked with {', '.join(r.name for r in report.rows)}; {len(report.violations)} "
            "changes of class inside a radius"
            for report in attacked.values()
        )
    figure.supxlabel(text, fontsize="x-small", color="0.35")
    path = Path(path)
    # A fixed Software entry: the same certificates give the same file.
    metadata = {"Software": "lmtfast"} if path.suffix == ".png" else None
    content = io.BytesIO()
    kind = path.suffix[1:] or "png"
    figure.savefig(content, format=kind, metadata=metadata)
    return write_atomically(path, content.getbuffer())


def _drawn(radii: np.ndarray, accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve's finite steps in percent, carried on beyond every axis."""
    finite = np.isfinite(radii)
    return (
        np.append(radii[finite], FAR),
        100.0 * np.append(accuracy[finite], accuracy[finite][-1]),
    )


def _end(radii: np.ndarray, accuracy: np.ndarray) -> float:
    tail = radii[np.isfinite(radii) & (accuracy > TAIL)]
    return float(tail[-1]) if len(tail) else 0.0


def caption(certificates: Sequence[Certificate]) -> str:
    """One line per kind of certificate: level, method, norm, number of inputs, input range."""
    lines = {
        f"level {c.level.label}, method {c.header.get('method', 'unknown')}, L2 norm, "
        f"{len(c.radius)} inputs in {c.header.get('input_range', 'an undeclared range')}": None
        for c in certificates
    }
    return "\n".join(lines)


def _named(
    certificates: Certificate | Sequence[Certificate] | Mapping[str, Certificate],
) -> dict[str, Certificate]:
    if isinstance(certificates, Mapping):
        return dict(certificates)
    if isinstance(certificates, Sequence):
        return {f"certificate {i}": c for i, c in enumerate(certificates, start=1)}
    return {"certificate": certificates}


def _matplotlib() -> tuple[Any, Any]:
    """The figure and the Agg canvas, without pyplot: no global state, no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib", "not installed", "lmtfast.plot", 'pip install "lmtfast[plot]"'
        ) from error
    return Figure, FigureCanvasAgg
