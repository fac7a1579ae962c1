# SPDX-License-Identifier: MIT
"""A certificate: radii per input, what they claim, under which assumptions, of which weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmtfast.certificate_file import OPTIONAL, decode, encode
from lmtfast.errors import ArgumentError, CertificateError
from lmtfast.files import write_atomically
from lmtfast.level import Level

if TYPE_CHECKING:
    from torch import nn

MAX_FILE_BYTES = 1 << 32
ASSUMPTIONS = (
    "A1: IEEE 754 binary64 sums, products and quotients, round to nearest, gradual underflow; "
    "square roots within one unit in the last place (tested before every run)",
    "A2: matrix products and convolutions in float64 sum products in some order",
    "A3: no memory corruption",
    "A4: Python, PyTorch and the drivers run as written",
    "A5: float64 elementwise functions are accurate to 4 units in the last place",
)
PARAMETRIZED = "weights derived by parametrizations are taken as float64 computes them"
ON_CUDA = "norms were proved on a GPU: A1 and A2 are those of its float64 units and library as well"
HASHED = (
    "the draw is expanded from SHA-256 of weights, network and settings, which is taken for "
    "random; a search over T of them multiplies delta by T"
)
ARRAYS = {
    "label": np.int64, "logit_error": np.float64, "logits": np.float64, "margin_lower": np.float64,
    "prediction": np.int64, "prediction_radius": np.float64,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Certificate:
    """Radii within which no L2 perturbation changes the class of an input.

    Attributes:
        prediction: Predicted classes, ``(N,)`` int64.
        prediction_radius: For every d with ``||d||_2 <= prediction_radius[i]``, the exact real
            function of the stored parameters gives input i plus d the class ``prediction[i]``,
            strictly; with executed semantics, so does every execution that conforms to the
            profile, wherever input i plus d is representable. ``(N,)`` float64, in units of the
            inputs; 0 claims nothing, infinity that the class can never change.
        margin_lower: Lower bound on the logit gap to the closest rival, 0 where it is not positive.
        label: True classes, ``(N,)`` int64, or None.
        level: ``"rigorous"`` or ``"probabilistic"``, a :class:`~lmtfast.Level`.
        method: How the operator norms were bounded.
        requested_method: The ``method`` argument of :func:`lmtfast.certify`.
        operators: ``(name, method, norm)`` of every operator.
        slack: Largest relative excess of an operator's bound over its estimate; NaN if unknown.
        features, total: Lipschitz constants up to the head and to the logits, as used.
        head_sha256: Hash of the head's rows whose distances were used, or ``"none"``.
        classes: Number of logits.
        input_shape, input_range: The declared inputs, in whose units radii are.
        weights_sha256: Hash of every parameter and buffer.
        fingerprint: What names the certified network: a hash of its program, its description and
            its weights.
        program_sha256: Hash of the plan and of every traced call, constants in code included.
        network: The network as :mod:`lmtfast.check` reads it, canonical JSON. None in files of
            schema 1, which no checker can judge; then ``fingerprint`` is the program's hash.
        logits: Enclosed logits, ``(N, K)`` float64; 0 where they are not finite. With executed
            semantics those of :func:`lmtfast.models.run`. None in schema 1.
        logit_error: Bound on the distance of each of an input's logits from the exact one,
            ``(N,)`` float64; infinite where nothing is known. None in schema 1.
        versions: Of the library, torch and numpy.
        semantics: ``"ideal"``: speaks of the exact real function, not of its execution in floats.
            ``"executed(fp32a64)"``, ``"executed(fp64)"``: speaks of both, under that profile
            (:mod:`lmtfast.profiles`).
        norm: ``"l2"``.

    Guarantee:
        As ``level`` says, under ``assumptions``. Loading a file checks that it is whole, not that
        it is true: :meth:`verify` recomputes it. Certified never means correctly classified.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, section 4 and Prop. 2.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> model = torch.nn.Linear(2, 2).eval()
        >>> data = (torch.rand(4, 2), torch.tensor([0, 1, 0, 1]))
        >>> certificate = lf.certify(model, data, input_shape=(2,), input_range=(0.0, 1.0))
        >>> len(certificate.radius), certificate.level
        (4, 'rigorous')
    """

    prediction: np.ndarray = field(repr=False)
    prediction_radius: np.ndarray = field(repr=False)
    margin_lower: np.ndarray = field(repr=False)
    label: np.ndarray | None = field(repr=False)
    level: Level
    method: str
    requested_method: str
    operators: tuple[tuple[str, str, float], ...] = field(repr=False)
    slack: float
    features: float
    total: float
    head_sha256: str = field(repr=False)
    classes: int
    input_shape: tuple[int, ...]
    input_range: tuple[float, float]
    weights_sha256: str
    fingerprint: str
    versions: Mapping[str, str] = field(repr=False)
    assumptions: tuple[str, ...] = field(repr=False, default=ASSUMPTIONS)
    semantics: str = "ideal"
    norm: str = "l2"
    program_sha256: str | None = field(repr=False, default=None)
    network: str | None = field(repr=False, default=None)
    logits: np.ndarray | None = field(repr=False, default=None)
    logit_error: np.ndarray | None = field(repr=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", Level(self.level))
        for name, kind in ARRAYS.items():
            array = getattr(self, name)
            if array is None and name in OPTIONAL[1]:
                continue
            fixed = np.array(array, dtype=kind)
            fixed.setflags(write=False)
            object.__setattr__(self, name, fixed)

    @property
    def claim(self) -> str:
        """Level and semantics, as the names of certified accuracies carry them."""
        return f"{self.level.label}, {self.semantics}"

    # -- results -----------------------------------------------------------------------------------

    @property
    def delta(self) -> float:
        """Probability that the bound is too small; 0 at ``"rigorous"``."""
        return self.level.delta

    def _labels(self, what: str) -> np.ndarray:
        if self.label is None:
            raise ArgumentError(
                "a certificate with labels", "one made without", f"Certificate.{what}",
                "pass data=(x, y) to certify, or use prediction_radius",
            )  # fmt: skip
        return self.label

    @property
    def correct(self) -> np.ndarray:
        """Whether the prediction is the label, ``(N,)`` bool."""
        return self.prediction == self._labels("correct")

    @property
    def radius(self) -> np.ndarray:
        """``prediction_radius`` where the prediction is correct, 0 elsewhere. ``(N,)`` float64."""
        return np.where(self.correct, self.prediction_radius, 0.0)

    @property
    def median_radius(self) -> float:
        """Median of ``radius``, the zeros of misclassified inputs counted; NaN without inputs."""
        radius = np.sort(self.radius)
        if not len(radius):
            return float("nan")
        low, high = radius[(len(radius) - 1) // 2], radius[len(radius) // 2]
        return float(low if low == high else (low + high) / 2)

    def certified_accuracy(self, eps: float) -> float:
        """Share of all inputs that are correct with a radius above ``eps``; NaN without inputs.

        Args:
            eps: Radius in units of the inputs, at least 0, for example ``36 / 255``.
        """
        if not eps >= 0:
            raise ArgumentError(
                "a radius of at least 0", repr(eps), "certified_accuracy(eps)",
                "pass the attack's L2 budget in input units",
            )  # fmt: skip
        radius = self.radius
        return float(np.count_nonzero(radius > eps) / len(radius)) if len(radius) else float("nan")

    @property
    def counts(self) -> dict[str, int]:
        """``total`` = ``certified`` + ``refused``; ``constant`` have an infinite radius;
        ``correct`` is present with labels, and then only correct inputs count as certified."""
        radius = self.prediction_radius if self.label is None else self.radius
        certified = int(np.count_nonzero(radius > 0))
        counts = {
            "certified": certified,
            "constant": int(np.count_nonzero(np.isinf(self.prediction_radius))),
            "refused": len(radius) - certified,
            "total": len(radius),
        }
        if self.label is not None:
            counts["correct"] = int(np.count_nonzero(self.correct))
        return counts

    @property
    def n_total(self) -> int:
        """Number of inputs."""
        return self.counts["total"]

    @property
    def n_correct(self) -> int:
        """Number of inputs classified correctly; needs labels."""
        self._labels("n_correct")
        return self.counts["correct"]

    @property
    def n_certified(self) -> int:
        """Number of inputs with a positive radius (and a correct prediction, with labels)."""
        return self.counts["certified"]

    @property
    def n_constant(self) -> int:
        """Number of inputs whose class can never change."""
        return self.counts["constant"]

    @property
    def schema(self) -> int:
        """2 with a description of the network and logits, 1 without."""
        return 1 if self.network is None else 2

    @property
    def header(self) -> dict[str, Any]:
        """Everything but the arrays, as plain Python values."""
        names = [f.name for f in fields(self) if f.name not in ARRAYS]
        return {
            "schema": self.schema,
            "counts": self.counts,
            "delta": self.delta,
            **{n: getattr(self, n) for n in names},
        }

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the certificate; the same certificate always gives the same bytes.

        The file at ``path`` is replaced at once or not at all, also if the machine stops.
        """
        return write_atomically(Path(path), encode(self))

    def to_tsv(self, path: str | os.PathLike[str]) -> Path:
        """Write ``idx label predict radius correct``, tab-separated, one line per input.

        Radii are those of the prediction, in the format randomized smoothing results are shared in.
        """
        labels, right = self._labels("to_tsv"), self.correct
        lines = ["idx\tlabel\tpredict\tradius\tcorrect"]
        rows = zip(labels, self.prediction, self.prediction_radius, right, strict=True)
        lines += [f"{i}\t{y}\t{p}\t{r!r}\t{int(c)}" for i, (y, p, r, c) in
                  enumerate((int(y), int(p), float(r), c) for y, p, r, c in rows)]  # fmt: skip
        return write_atomically(Path(path), ("\n".join(lines) + "\n").encode())

    def plot(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Draw certified accuracy against radius; options as for the plotting module."""
        from lmtfast.plot import plot_certificates

        return plot_certificates([self], Path(path), **options)

    def verify(self, model: nn.Module, data: Any = None) -> None:
        """Recompute the certificate from the model and, if given, the data.

        Args:
            model: The certified network, in eval mode.
            data: The certified inputs in the same order and form as for :func:`lmtfast.certify`.

        Raises:
            CertificateError: Something differs; the message lists every finding.
        """
        from lmtfast.verification import verify_certificate

        findings = verify_certificate(self, model, data)
        if findings:
            raise CertificateError(
                "a certificate that recomputes", "; ".join(findings), "Certificate.verify",
                "certify again; do not use this file with this network",
            )  # fmt: skip


def load_certificate(path: str | os.PathLike[str]) -> Certificate:
    """Read a certificate file and check that it is whole and consistent.

    Args:
        path: File written by :meth:`Certificate.save`.

    Returns:
        The certificate.

    Raises:
        CertificateError: The file is damaged, from another schema, or contradicts itself.

    Guarantee:
        The result is what :meth:`Certificate.save` wrote or would write, byte for byte. Whether its
        claims hold is for :meth:`Certificate.verify`.

    Example:
        >>> import lmtfast as lf
        >>> lf.load_certificate("certificate.npz").median_radius  # doctest: +SKIP
        1.02
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CertificateError(
                f"a file of at most {MAX_FILE_BYTES} bytes",
                f"{path.stat().st_size} bytes",
                str(path),
                "this is not a certificate",
            )
        content = path.read_bytes()
    except OSError as error:
        raise CertificateError(
            "a readable file", error.strerror or str(error), str(path), "check the path"
        ) from error
    try:
        certificate = Certificate(**decode(content))
        if encode(certificate) != content:
            raise ValueError("bytes that a saved certificate does not have")
        return certificate
    # Whatever a hostile file makes a parser raise; tests/soundness fuzzes for other causes.
    except Exception as error:
        raise CertificateError(
            "a whole certificate file",
            f"{type(error).__name__}: {error}",
            str(path),
            "copy or certify it again; it cannot be trusted",
        ) from error
