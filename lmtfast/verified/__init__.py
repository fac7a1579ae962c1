# SPDX-License-Identifier: MIT
"""Verified norms: upper bounds in the sense of real numbers, every rounding error included.

``rounding`` holds outward arithmetic, ``residual`` the a-posteriori Cholesky inequality, ``matrix``
dense and batched matrices, ``banded`` the same inequality along an image, whose blocks come from
``convolution`` or ``composite``; ``torus`` convolutions through their symbol, ``weight_error`` what
folding rounds, ``region`` the choice among them within a ``budget``; ``lanczos`` untrusted guesses,
``moment`` probabilistic bounds.
"""

from lmtfast.verified.matrix import NormEnclosure, complex_matrix_norm_upper, matrix_norm_upper
from lmtfast.verified.moment import moment_norm_upper
from lmtfast.verified.rounding import frobenius_up, prescale, self_test
from lmtfast.verified.torus import circular_norm_upper, polyphase, torus_norm_upper

__all__ = [
    "NormEnclosure",
    "circular_norm_upper",
    "complex_matrix_norm_upper",
    "frobenius_up",
    "matrix_norm_upper",
    "moment_norm_upper",
    "polyphase",
    "prescale",
    "self_test",
    "torus_norm_upper",
]
