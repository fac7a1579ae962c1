# SPDX-License-Identifier: MIT
"""Verification: recomputes what a certificate claims, and lists every difference."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from lmtfast.certificate import Certificate
from lmtfast.certification import assumptions, head_sha256, operator_rows, sample_radii
from lmtfast.guarantee import check_certifiable
from lmtfast.profiles import profile_of
from lmtfast.samples import Samples
from lmtfast.subject import prepare
from lmtfast.verified.drawn import METHOD_OF
from lmtfast.weights import named_tensors, weights_sha256


def verify_certificate(certificate: Certificate, model: nn.Module, data: Any = None) -> list[str]:
    """Recompute a certificate from the model and, if given, from the data.

    A radius is confirmed only if it is at most the recomputed one, a bound only if it is at least
    the recomputed one; looser claims are true as well. Another machine may sum in another order:
    certificates keep a margin for that.

    Args:
        certificate: The certificate.
        model: The network it speaks of, in eval mode.
        data: The certified inputs in the same order, in any form :func:`lmtfast.certify` takes;
            None checks weights, graph and bounds only.

    Returns:
        One line per difference; empty if everything is confirmed.

    Raises:
        LmtfastError: The model cannot be certified at all, or the data has another form.

    Guarantee:
        With an empty list and ``data`` given, every claim of the certificate was derived again at
        its level.

    Example:
        >>> verify_certificate(certificate, model, (x, y))  # doctest: +SKIP
        []
    """
    check_certifiable(model)
    if weights_sha256(named_tensors(model)) != certificate.weights_sha256:
        return ["the weights are not the certified ones (another SHA-256)"]
    proofs = {name: method for name, method, _ in certificate.operators}
    subject = prepare(
        model, certificate.input_shape, certificate.input_range,
        level=certificate.level, method=certificate.requested_method,
        draw="hash" if METHOD_OF["hash"] in proofs.values() else "fresh", proofs=proofs,
        profile=profile_of(certificate.semantics),
    )  # fmt: skip
    findings: list[str] = []
    described = certificate.network is not None
    own = subject.fingerprint if described else subject.program_sha256
    if own != certificate.fingerprint:
        findings.append("the traced network is not the certified one (another fingerprint)")
    if subject.classes != certificate.classes:
        return [*findings, f"{subject.classes} classes in place of {certificate.classes}"]
    findings += _bound_findings(certificate, subject.bound)
    if missing := sorted(set(assumptions(subject)) - set(certificate.assumptions)):
        findings.append(f"assumptions that the certificate does not state: {missing}")
    if certificate.norm != "l2":
        findings.append(f"a radius in {certificate.norm!r}, not shown")
    if data is not None:
        samples = Samples(
            data, certificate.input_shape, certificate.input_range, certificate.classes
        )
        norms = [norm for _, _, norm in operator_rows(subject.bound)]
        error = subject.execution_error(norms, certificate.input_range)
        fresh = sample_radii(subject, samples, None, 1.0, error, stated=certificate.logits)
        findings += _sample_findings(certificate, fresh)
    return findings


def _bound_findings(certificate: Certificate, bound: Any) -> list[str]:
    findings = []
    for name in ("features", "total"):
        stored, recomputed = getattr(certificate, name), float(getattr(bound, name))
        if not stored >= recomputed:
            findings.append(f"{name} bound {stored!r} is below the recomputed {recomputed!r}")
    if head_sha256(bound) != certificate.head_sha256:
        findings.append("the head's rows are not the certified ones")
    stored_rows = {name: norm for name, _, norm in certificate.operators}
    for name, _, norm in operator_rows(bound):
        if not stored_rows.pop(name, -1.0) >= norm:
            findings.append(f"the norm of {name!r} is missing or below the recomputed {norm!r}")
    if stored_rows:
        findings.append(f"operators that the network does not have: {sorted(stored_rows)}")
    return findings


def _sample_findings(certificate: Certificate, fresh: dict[str, Any]) -> list[str]:
    radius, prediction, margin = (
        np.asarray(fresh[k]) for k in ("prediction_radius", "prediction", "margin_lower")
    )
    if len(radius) != certificate.n_total:
        return [f"{len(radius)} inputs in place of {certificate.n_total}"]
    findings = []
    claimed = certificate.prediction_radius > 0
    wrong = {
        "predictions differ": claimed & (prediction != certificate.prediction),
        "radii are larger than recomputed": ~(certificate.prediction_radius <= radius),
        "margins are larger than recomputed": ~(certificate.margin_lower <= margin),
    }
    if certificate.logits is not None and certificate.logit_error is not None:
        known = np.isfinite(certificate.logit_error)
        away = np.abs(certificate.logits - fresh["logits"]).max(1, initial=0.0)
        inside = away + fresh["logit_error"] <= certificate.logit_error
        wrong["enclosures of logits do not hold the recomputed ones"] = known & ~inside
    label = fresh["label"]
    if label is None and certificate.label is not None:
        findings.append("labels that the data given here does not have")
    if label is not None and certificate.label is not None:
        wrong["labels differ"] = label != certificate.label
        # Without a radius nothing is claimed of the prediction, except whether it is correct.
        wrong["predictions of uncertified inputs differ"] = (
            ~claimed & (prediction != certificate.prediction) & (margin > 0)
        )
    for what, where in wrong.items():
        if where.any():
            findings.append(f"{int(where.sum())} {what} (first at input {int(where.argmax())})")
    return findings
