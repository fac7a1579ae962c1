# SPDX-License-Identifier: MIT
"""The curve of certified accuracy, drawn from certificates alone."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lmtfast.errors import ArgumentError, MissingDependencyError
from lmtfast.level import Level
from lmtfast.plot import caption, certified_curve, plot_certificates

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def certificate(radius, correct, method="cholesky"):
    header = {"method": method, "input_range": [0.0, 1.0]}
    return SimpleNamespace(
        radius=np.array(radius), correct=np.array(correct), level=Level("rigorous"), header=header
    )


def test_the_curve_is_the_strict_count_at_every_radius():
    rng = np.random.default_rng(0)
    radius = np.round(rng.random(200), 2) * (rng.random(200) < 0.8)
    correct = rng.random(200) < 0.9
    radii, accuracy = certified_curve(certificate(radius, correct))
    assert radii[0] == 0.0
    for eps in [*radii, *rng.random(50)]:
        step = np.searchsorted(radii, eps, side="right") - 1
        assert accuracy[step] == np.mean(correct & (radius > eps))


@pytest.mark.parametrize(
    ("radius", "correct", "accuracy"),
    [([], [], [0.0]), ([0.0, 0.0], [True, False], [0.0]), ([0.5], [False], [0.0])],
)
def test_nothing_certified(radius, correct, accuracy):
    radii, shares = certified_curve(certificate(radius, np.array(correct, dtype=bool)))
    assert radii.tolist() == [0.0]
    assert shares.tolist() == accuracy


def test_a_figure_of_several_certificates_is_reproducible(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    rng = np.random.default_rng(1)
    several = {
        "LMT": certificate(rng.random(50), rng.random(50) < 0.9),
        "plain": certificate(0.1 * rng.random(50), rng.random(50) < 0.98),
    }
    paths = [plot_certificates(several, tmp_path / f"{i}.png", marks=(0.5,)) for i in (1, 2)]
    first, second = (path.read_bytes() for path in paths)
    assert first[:8] == PNG_SIGNATURE
    assert len(first) > 5000
    assert first == second


def test_inputs_that_can_never_change_stay_on_the_curve(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    constant = certificate([0.5, np.inf], [True, True])
    radii, accuracy = certified_curve(constant)
    assert radii.tolist() == [0.0, 0.5, np.inf]
    assert accuracy.tolist() == [1.0, 0.5, 0.0]
    assert plot_certificates(constant, tmp_path / "constant.png").stat().st_size > 5000


def test_no_pyplot_and_so_no_global_state(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    before = "matplotlib.pyplot" in sys.modules
    plot_certificates(certificate([0.2], [True]), tmp_path / "one.pdf")
    assert ("matplotlib.pyplot" in sys.modules) == before
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")


def test_the_caption_comes_from_the_header():
    lines = caption([certificate([0.1], [True]), certificate([0.2], [True], method="torus")])
    assert "rigorous" in lines
    assert "cholesky" in lines
    assert "torus" in lines
    assert "[0.0, 1.0]" in lines


def test_no_certificate_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="certificate"):
        plot_certificates([], tmp_path / "none.png")


def test_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="plot"):
        plot_certificates(certificate([0.2], [True]), tmp_path / "one.png")
