# SPDX-License-Identifier: MIT
"""Certification: from a model and inputs to radii that hold, or to a refusal that says why."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmtfast.bound import LipschitzBound
from lmtfast.certificate import ASSUMPTIONS, HASHED, ON_CUDA, PARAMETRIZED, Certificate
from lmtfast.composing import compose_up
from lmtfast.errors import NotCertifiedError, StalePlanError
from lmtfast.execution import check_autocast
from lmtfast.execution.recursion import ExecutionError
from lmtfast.graph import Derived
from lmtfast.guarantee import check_method
from lmtfast.level import Level
from lmtfast.profiles import IDEAL, profile_of
from lmtfast.radius import PairTable, canonical_up, radius_lower, raised_sum
from lmtfast.samples import Samples, check_input_range
from lmtfast.subject import Subject, prepare
from lmtfast.verified.arithmetic import ensure_arithmetic
from lmtfast.verified.budget import Budget
from lmtfast.verified.drawn import METHOD_OF
from lmtfast.verified.rounding import mul_up
from lmtfast.weights import named_tensors, on_host, weights_sha256

# Enclosures computed elsewhere have other roundings, each within its own error of the truth. With
# three times the error here, theirs with one still reaches the certified margin.
ERROR_FACTOR = 3.0
# The same for the error of executions: it is a small part of the margin, so this costs nothing.
EXECUTION_MARGIN = 1.0 + 2.0**-12
# Radii are computed for a constant this much above the stated one: a checker that rounds outward in
# its own way then finds every radius below what the stated constant allows (heads up to 2^20 wide).
SCALE_MARGIN = 1.0 + 2.0**-30

Progress = Callable[[int, "int | None"], None]


def certify(
    model: nn.Module,
    data: Any,
    *,
    input_shape: Sequence[int],
    input_range: tuple[float, float],
    level: str = "rigorous",
    method: str = "auto",
    budget: Budget | None = None,
    delta: float | None = None,
    draw: str = "fresh",
    device: str = "cpu",
    semantics: str = IDEAL,
    progress: Progress | None = None,
) -> Certificate:
    """Certify, for every input, a radius within which no L2 perturbation changes the class.

    The Lipschitz bound is computed afresh from the stored weights, logits are enclosed in float64
    with every rounding, and radii are rounded down. Nothing is read that training left behind.

    Args:
        model: Module in eval mode that :func:`lmtfast.trace` accepts; any floating dtype, CPU or
            CUDA.
        data: ``(x, y)``, ``x`` alone, or an iterable of batches of either (a ``DataLoader``).
            Inputs ``(N, *input_shape)`` floating point, labels ``(N,)`` integers. Without labels
            the certificate has radii of the predictions only.
        input_shape: Shape of one input, without the batch dimension.
        input_range: ``(low, high)`` of the inputs; radii are in these units. Has no default: a
            normalisation belongs into the model.
        level: ``"rigorous"`` or ``"probabilistic"``; the certificate states the weakest that any
            operator needed.
        method, budget: As for :func:`lmtfast.certified_bound`.
        delta: Probability, over the library's own draw, that a probabilistic bound is too small.
            One draw covers all inputs.
        draw, device: Where that draw comes from and where norms are proved, as for
            :func:`lmtfast.certified_bound`.
        semantics: ``"ideal"``: radii speak of the exact real function. ``"executed(fp32a64)"`` and
            ``"executed(fp64)"``: they also hold for every execution that conforms to the profile,
            :func:`lmtfast.models.run` among them, at every representable input.
        progress: Called as ``progress(done, total)`` after every chunk; ``total`` is None for
            iterables.

    Returns:
        The certificate.

    Raises:
        NotCertifiedError: ``level="estimate"``, a call whose rounding error is unknown, a module
            that does not compute what was traced, or arithmetic that is not IEEE 754. With executed
            semantics, whatever :func:`lmtfast.models.run` refuses: profiles such as TF32, active
            autocast, weights that the profile's storage does not represent.
        TrainModeError: A module is in training mode.
        NonFiniteError: A weight or buffer holds NaN or infinity.
        UnsupportedLayerError: A part has no Lipschitz rule.
        InputDomainError: ``input_range`` is no range, or an input lies outside it, is NaN, or is
            not representable in a profile's storage.
        ShapeError, DtypeError, ArgumentError: Data of another form.
        StalePlanError: The weights changed while certifying.

    Guarantee:
        As ``level`` says, for the exact real function of the stored parameters in inference form
        (``semantics="ideal"``): the rounding of the centre's logits is enclosed, that of
        executions at other inputs is not claimed. With executed semantics it is (ADR 0020).

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Prop. 1 and 2.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> certificate = lf.certify(model.eval(), (x, y), input_shape=(4,), input_range=(0, 1))
        >>> certificate.n_total, bool((certificate.radius >= 0).all())
        (5, True)
    """
    asked = Level(level, delta)
    check_method(method)
    if asked == "estimate":
        raise NotCertifiedError(
            "level 'probabilistic' or 'rigorous'", "'estimate'", "certify(level)",
            "use the default: power iteration underestimates norms, so it certifies nothing",
        )  # fmt: skip
    low_high = check_input_range(input_range)
    profile = profile_of(semantics)
    if profile is not None:
        check_autocast()
    subject = prepare(
        model, input_shape, low_high, level=asked, method=method, budget=budget, draw=draw,
        proof_device=device,
        profile=profile,
    )  # fmt: skip
    bound = subject.bound
    operators = tuple((n, m, canonical_up(x)) for n, m, x in operator_rows(bound))
    # Composed from the norms as stated, so that they follow from the certificate alone.
    graph = subject.plan.graph
    values = compose_up(graph.tape, [x for _, _, x in operators])
    scales: dict[str, Any] = {
        k: canonical_up(values[getattr(graph, k)]) for k in ("features", "total")
    }
    samples = Samples(data, subject.plan.graph.input_shape, low_high, subject.classes)
    scale = scales["features" if bound.head_weight is not None else "total"]
    error = subject.execution_error([x for _, _, x in operators], low_high)
    columns = sample_radii(
        subject, samples, mul_up(scale, SCALE_MARGIN), ERROR_FACTOR,
        None if error is None else error.widened(EXECUTION_MARGIN), progress=progress,
    )  # fmt: skip
    if weights_sha256(named_tensors(model)) != subject.weights_sha256:
        raise StalePlanError(
            "weights that stay as they are", "other weights after certifying than before",
            type(model).__name__, "stop whatever trains or edits the model, and certify again",
        )  # fmt: skip
    return Certificate(
        **columns,
        level=bound.level,
        method=bound.method,
        requested_method=method,
        operators=operators,
        slack=float(bound.slack),
        **scales,
        head_sha256=head_sha256(bound),
        classes=subject.classes,
        input_shape=subject.plan.graph.input_shape,
        input_range=low_high,
        weights_sha256=subject.weights_sha256,
        fingerprint=subject.fingerprint,
        versions=_versions(),
        assumptions=assumptions(subject),
        semantics=semantics,
        program_sha256=subject.program_sha256,
        network=subject.description.text,
    )


def sample_radii(
    subject: Subject,
    samples: Samples,
    scale: float | None,
    error_factor: float,
    execution_error: ExecutionError | None = None,
    *,
    stated: np.ndarray | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prediction, radius, margin, logits and label of every sample.

    With an ``execution_error`` the logits are those of the execution, or those ``stated``.
    """
    pairs = PairTable(subject.bound)
    rows: list[tuple[Tensor, ...]] = []
    labels: list[Tensor] = []
    done = 0
    for x, y in samples.chunks(subject.chunk):
        # An iterable runs code of its own, which may have changed the rounding mode.
        ensure_arithmetic(torch.device("cpu"))
        value, error = subject.enclosure(x.to(subject.device))
        value, error = value.cpu(), error_factor * error.cpu()
        if execution_error is not None:
            assert subject.execution is not None
            subject.execution.check_inputs(x)
            stored = subject.execution(x.to(subject.device)).to(torch.float64).cpu()
            if stated is not None and len(part := stated[done : done + len(x)]) == len(x):
                # Any logits that conform will do: elsewhere sums have another order.
                given = torch.from_numpy(np.array(part))
                conforms = (given - stored).abs() <= 2.0 * execution_error.whole.constant
                stored = torch.where(conforms.all(1, keepdim=True), given, stored)
            value, error = stored, raised_sum((stored - value).abs(), error)
        value, largest = _stated(value, error)
        errors = largest[:, None].expand_as(value)
        with on_host():
            found = radius_lower(
                value, errors, subject.bound, scale=scale, pairs=pairs, execution=execution_error
            )
        stored = value.masked_fill(largest.isinf()[:, None], 0.0)
        rows.append((*found, stored, largest))
        if y is not None:
            labels.append(y)
        done += len(x)
        if progress is not None:
            progress(done, samples.total)
    empty = torch.zeros(0, dtype=torch.float64, device="cpu")
    prediction, radius, margin, logits, error = (
        torch.cat([r[i] for r in rows]) if rows else empty for i in range(5)
    )
    label = torch.cat(labels) if labels else empty
    return {
        "prediction": prediction.to(torch.int64).numpy(),
        "prediction_radius": radius.numpy(),
        "margin_lower": margin.numpy(),
        "label": label.to(torch.int64).numpy() if samples.labelled else None,
        "logits": logits.reshape(-1, subject.classes).numpy(),
        "logit_error": error.numpy(),
    }


def _stated(value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and one error per input; infinite where an entry is not known."""
    known = (value.isfinite() & error.isfinite() & (error >= 0)).all(1)
    return value, error.amax(1).masked_fill(~known, math.inf)


def assumptions(subject: Subject) -> tuple[str, ...]:
    """What the radii rest on."""
    parametrized = any(isinstance(ref, Derived) for ref in subject.enclosure.references)
    hashed = METHOD_OF["hash"] in subject.bound.methods.values()
    profile = None if subject.execution is None else subject.execution.profile.assumption
    conditions = ((parametrized, PARAMETRIZED), (hashed, HASHED),
                  (subject.proof_device == "cuda", ON_CUDA), (profile, profile))  # fmt: skip
    return (*ASSUMPTIONS, *(text for holds, text in conditions if holds and text))


def head_sha256(bound: LipschitzBound) -> str:
    """Hash of the head's rows whose distances enter the radii, or ``"none"``."""
    if bound.head_weight is None:
        return "none"
    return weights_sha256({"head": bound.head_weight})


def operator_rows(bound: LipschitzBound) -> tuple[tuple[str, str, float], ...]:
    """Name, method and norm of every operator."""
    return tuple(
        (name, bound.methods.get(name, bound.method), float(norm))
        for name, norm in bound.per_operator.items()
    )


def _versions() -> dict[str, str]:
    library = importlib.import_module("lmtfast")
    return {
        "lmtfast": library.__version__,
        "numpy": np.__version__,
        "torch": str(torch.__version__),
    }
