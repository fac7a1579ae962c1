# SPDX-License-Identifier: MIT
"""R08, R09, R16, R18: defects of other libraries in the norms of convolutions.

Every test first does what the other library did and shows that its case catches it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import lmtfast as lf
from lmtfast.verified.region import METHODS, operator_norm_upper
from tests.oracles import norm_is_at_most, svd_norm
from tests.soundness.constructions import Construction, conv


def proved(case: Construction, method: str = "auto") -> float:
    if case.traceable_only:
        return lf.certified_bound(case.module(), case.shape, method=method).total
    region, weights = case.region()
    return operator_norm_upper(region, weights, method=method).upper


@pytest.mark.parametrize("n", range(2, 13, 2))
def test_r08_the_frequency_grid_has_its_full_number_of_points(n: int) -> None:
    """An end point that is counted twice leaves n - 1 frequencies, and an even n without pi."""
    taps = [-1.0, 2.0, -1.0]
    twice = np.exp(1j * np.outer(np.linspace(0, 2 * np.pi, n), [-1, 0, 1]))
    assert np.abs(twice @ taps).max() < 4.0 - 1e-2
    weight = np.reshape(taps, (1, 1, 3))
    wrapped = conv("alternating", weight, (1, n), 16, padding=1, padding_mode="circular")
    zeros = conv("alternating", weight, (1, n), None, padding=1)
    for method in METHODS:
        assert not wrapped.understated_by(proved(wrapped, method))
        assert not zeros.understated_by(proved(zeros, method))


def test_r09_a_convolution_is_not_its_reshaped_kernel() -> None:
    case = conv("ones", np.ones((1, 1, 3, 3)), (1, 6, 6), None, padding=1)
    reshaped = svd_norm(case.weight.reshape(1, -1))
    assert case.understated_by(2.5 * reshaped)
    found = lf.conv_spectral_norm(torch.from_numpy(case.weight), (1, 6, 6), padding=1).total
    assert not case.understated_by(float(found))
    assert case.within(float(found), 1e-6)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (4, 2), (3, 3), (5, 3), (2, 3)])
@pytest.mark.parametrize("size", [5, 6, 7])
def test_r16_strides_have_no_correction_factor(kernel: int, stride: int, size: int) -> None:
    """The norm of the strided map itself; the stride-one norm over the stride is below it."""
    weight = np.arange(1.0, kernel + 1).reshape(1, 1, kernel)
    case = conv("strided", weight, (1, size), None, stride=stride, padding=1)
    whole = svd_norm(conv("whole", weight, (1, size), None, padding=1).matrix())
    assert case.understated_by(whole / stride)
    for method in METHODS:
        assert not case.understated_by(proved(case, method))
    assert case.within(proved(case), 1e-9)


def test_r16_groups_take_the_maximum_and_neither_product_nor_part() -> None:
    weight = 0.2 * np.random.default_rng(1).standard_normal((8, 2, 3, 3))
    case = conv("groups", weight, (8, 4, 4), None, padding=1, groups=4)
    parts = [
        svd_norm(conv("part", w, (2, 4, 4), None, padding=1).matrix())
        for w in np.split(weight / 8, 4)
    ]
    # The product of the groups' norms, as a peer returns it, is far too small for small weights.
    eighth = conv("groups", weight / 8, (8, 4, 4), None, padding=1, groups=4)
    assert eighth.understated_by(math.prod(parts))
    for method in METHODS:
        assert not case.understated_by(proved(case, method))
        assert not eighth.understated_by(proved(eighth, method))
    assert proved(eighth) <= max(parts) * (1 + 1e-6)


def test_r16_dilation_counts() -> None:
    case = conv("dilated", np.ones((1, 1, 3)), (1, 9), None, dilation=2, padding=2)
    for method in METHODS:
        assert not case.understated_by(proved(case, method))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_r18_no_padding_is_bounded_by_the_circular_norm(mode: str) -> None:
    """The largest frequency 2 pi j / n of a kernel is below the norm of some map of its size."""
    harmed = False
    rng = np.random.default_rng(2)
    kernels = ([1.0, -1.0], [1.0, 1.0, 1.0], [-1.0, 2.0, -1.0], list(rng.standard_normal(3)))
    for n in (3, 5):
        for taps in kernels:
            weight = np.reshape(taps, (1, 1, -1))
            case = conv(mode, weight, (1, n), None, padding=1, padding_mode=mode)
            circular = float(np.abs(np.fft.fft(taps, n)).max())
            harmed |= not norm_is_at_most(case.matrix(), circular * (1 + 1e-9))
            if len(taps) == 3 and n == 3 or not case.traceable_only:
                for method in ("auto", "torus"):
                    assert not case.understated_by(proved(case, method))
    assert harmed
