# SPDX-License-Identifier: MIT
"""Bounds that claim something: rigorous or probabilistic, for networks and for single operators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmtfast.backends.reference import effective_weight
from lmtfast.bound import LipschitzBound
from lmtfast.composing import compose_up
from lmtfast.errors import (
    ArgumentError,
    BackendUnavailableError,
    DtypeError,
    NonFiniteError,
    NotCertifiedError,
    ShapeError,
    TrainModeError,
    UnsupportedLayerError,
)  # fmt: skip
from lmtfast.estimation import NetworkBound, class_count, head_matrix
from lmtfast.graph import Linear, Operator, Region
from lmtfast.level import RIGOROUS, Level, weakest
from lmtfast.plan import BoundPlan, make_plan
from lmtfast.tracing import trace_model
from lmtfast.verified.arithmetic import ensure_arithmetic
from lmtfast.verified.budget import Allowance, Budget
from lmtfast.verified.drawn import check_draw, drawn_norm_upper
from lmtfast.verified.matrix import NormEnclosure
from lmtfast.verified.region import METHODS, allowances, operator_norm_upper
from lmtfast.verified.rounding import div_down, frobenius_up, gamma_up, next_up
from lmtfast.verified.weight_error import absolute, weight_roundings
from lmtfast.weights import Weights, laid_out, named_tensors, on_host, weights_sha256

# The ``method`` of an enclosure, and which ``method`` to ask for to get it again.
PROVED_BY = {
    **dict.fromkeys(("cholesky", "dense", "empty", "frobenius", "row-column", "zero"), "dense"),
    "banded": "banded",
    "torus": "torus",
}


def check_method(method: str) -> None:
    """Refuse a method that does not exist."""
    if method not in METHODS:
        raise ArgumentError(
            f"a method, one of {', '.join(METHODS)}", repr(method), "method", "pick one"
        )


def proof_device(name: str) -> torch.device:
    """The device that proofs run on, its arithmetic tested; typed errors for any other."""
    ensure_arithmetic(torch.device("cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(
            "'cpu' or a CUDA device", repr(name), "device", "use 'cpu': proofs need float64"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "a CUDA device", "none that torch can use", f"device={name!r}", "use device='cpu'"
        )
    ensure_arithmetic(device)
    return device


def check_certifiable(model: nn.Module) -> None:
    """Refuse a model in training mode, on the meta device, or with values that are not finite."""
    for name, module in model.named_modules():
        if module.training:
            raise TrainModeError(
                "a model in eval mode", "training mode", repr(name or type(module).__name__),
                "call model.eval(): dropout and batch norm mean another function while training",
            )  # fmt: skip
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta:
            raise NotCertifiedError(
                "weights with values", "a tensor on the meta device", repr(name),
                "materialise the model before bounding it",
            )  # fmt: skip
        values = tensor.is_floating_point() or tensor.is_complex()
        if values and not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                "finite weights and buffers", "NaN or infinity", repr(name),
                "find where training diverged; no bound exists for this model",
            )  # fmt: skip


def certified_bound(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    level: str = "rigorous",
    delta: float | None = None,
    method: str = "auto",
    budget: Budget | None = None,
    draw: str = "fresh",
    device: str = "cpu",
) -> LipschitzBound:
    """Bound a network's L2 Lipschitz constant with a guarantee.

    The model is traced afresh at every call, so nothing stale can enter; power iterates are never
    read.

    Args:
        model: Module in eval mode that :func:`lmtfast.trace` accepts; any floating dtype, any
            device.
        input_shape: Shape of one input, without the batch dimension.
        level: ``"rigorous"``, ``"probabilistic"``, or ``"estimate"`` (a converged estimate), or a
            :class:`~lmtfast.Level`. The bound's own level is the weakest of its operators': a
            network of closed forms is rigorous whatever was asked for.
        delta: Probability, over the library's own draw, that a probabilistic bound is too small,
            summed over the operators; by default the level's, 2^-100.
        method: ``"auto"``; ``"dense"``, ``"banded"`` or ``"torus"`` insist on one proof for every
            operator that it can treat.
        budget: What exact proofs may cost together, by default two minutes of two cores; operators
            beyond it get the looser torus bound or a composition. ``methods`` of the result says
            which.
        draw: Where a probabilistic bound has its randomness: ``"fresh"`` from the operating system,
            or ``"hash"`` from SHA-256 of weights, network and settings. The latter repeats, and
            needs ``delta`` of at most 2^-100.
        device: Where the proofs are computed, ``"cpu"`` or a CUDA device, wherever the model is.
            On the latter also its library of matrix products is trusted (ADR 0021).

    Returns:
        The bound; floats, and ``head_weight`` in float64.

    Raises:
        TrainModeError: A module is in training mode.
        NonFiniteError: A weight or buffer holds NaN or infinity.
        UnsupportedLayerError: A part has no Lipschitz rule.
        BackendUnavailableError: No such device is usable here.
        NotCertifiedError: The machine's arithmetic is not IEEE 754, or weights are too extreme.
        ArgumentError: Unknown level, method or draw, a method that does not fit an operator, or a
            draw from a hash with a larger ``delta``.

    Guarantee:
        As ``level`` says, for the exact real function of the stored parameters in inference form.
        Weights derived by parametrizations are taken as float64 computes them.

    Source:
        Verified norms: Rump, BIT 51 (2011) 367-384. Composition: Tsuzuku, Sato, Sugiyama (2018),
        arXiv:1802.04034, section 5. Probabilistic: the moment bound in
        :mod:`lmtfast.verified.moment`.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> bound = lf.certified_bound(layer.eval(), (2,))
        >>> 4.0 <= bound.total < 4.0 * (1 + 1e-9)
        True
    """
    asked = Level(level, delta)
    check_method(method)
    check_certifiable(model)
    if asked == "estimate":
        return NetworkBound(model, input_shape, engine="operator").rescan()
    graph = trace_model(model, input_shape).graph
    plan = make_plan(model, graph, engine="operator", backend="reference")
    return plan_bound(
        plan, model, level=asked, method=method, budget=budget, draw=draw, device=device
    )


def plan_bound(
    plan: BoundPlan,
    model: nn.Module,
    *,
    level: Level,
    method: str = "auto",
    budget: Budget | None = None,
    draw: str = "fresh",
    device: str = "cpu",
    proofs: Mapping[str, str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> LipschitzBound:
    """The guaranteed bound of a model whose plan is fresh; ``tensors`` replace its own.

    ``proofs`` names how an earlier bound proved each operator; it is done again that way.
    """
    check_draw(draw, level)
    place = proof_device(device)
    plan.check_fresh(model)
    tensors = named_tensors(model) if tensors is None else tensors
    stored = {n: laid_out(t) for n, t in tensors.items()}
    weights = Weights({n: t.to(place) for n, t in stored.items()}, dtype=torch.float64)
    # Without cuDNN a convolution is a matrix product, never a transform.
    with torch.no_grad(), on_host(), torch.backends.cudnn.flags(enabled=False):
        share = level
        if level.delta > 0.0:
            drawn = sum(not _closed(o) for o in plan.operators)
            share = Level(level, div_down(level.delta, float(max(1, drawn))))
        commitment = (weights_sha256(tensors), plan.fingerprint) if draw == "hash" else ()
        drawing = {"draw": draw, "commitment": commitment, "confirming": proofs is not None}
        ways = _ways(plan.operators, weights, method, budget or Budget(), proofs)
        norms = [
            _norm(o, weights, how, allowance, share, drawing)
            for o, (how, allowance) in zip(plan.operators, ways, strict=True)
        ]
        values = compose_up(plan.graph.tape, [n.upper for n in norms])
        head_weight, head_error = _head(plan, Weights(stored, dtype=torch.float64))
    names = [o.name for o in plan.operators]
    slacks = [n.slack for n in norms if n.upper > 0.0]
    methods = dict(zip(names, (n.method for n in norms), strict=True))
    return LipschitzBound(
        total=values[plan.graph.total],
        features=values[plan.graph.features],
        per_operator=dict(zip(names, (n.upper for n in norms), strict=True)),
        # The shares add up to at most what was asked for, which verifying asks for again.
        level=level if weakest(n.level for n in norms) == level else RIGOROUS,
        slack=max(slacks, default=0.0), method=", ".join(sorted(set(methods.values()))),
        methods=methods, head_weight=head_weight, head_row_error=head_error,
        classes=class_count(plan),
    )  # fmt: skip


def _ways(
    operators: Sequence[Operator],
    weights: Weights,
    method: str,
    budget: Budget,
    proofs: Mapping[str, str] | None,
) -> list[tuple[str, Allowance]]:
    """Method and allowance of every operator."""
    if proofs is None:
        return [(method, a) for a in allowances(operators, weights, method, budget)]
    ways = []
    for operator in operators:
        name = proofs.get(operator.name, method)
        paid = 0.0 if name == "composition" else math.inf
        ways.append((PROVED_BY.get(name, "auto"), Allowance(paid, math.inf)))
    return ways


def _closed(operator: Operator) -> bool:
    """Whether a proof costs so little that nothing is drawn for it."""
    return not isinstance(operator, Region) or operator.kind in ("scale", "linear")


def _norm(
    operator: Operator,
    weights: Weights,
    method: str,
    allowance: Allowance,
    share: Level,
    drawing: Mapping[str, Any],
) -> NormEnclosure:
    if share == "probabilistic" and not _closed(operator):
        assert isinstance(operator, Region)
        found = drawn_norm_upper(operator, weights, level=share, **drawing)
        if found is not None:
            return found
    return operator_norm_upper(operator, weights, method=method, allowance=allowance)


def _head(plan: BoundPlan, weights: Weights) -> tuple[Tensor | None, Tensor | None]:
    """The head's rows and what folding scales into them may have rounded."""
    if plan.graph.head is None:
        return None, None
    # A copy: the rows of a float64 model are its own parameter.
    matrix = head_matrix(plan, weights).clone()
    region = plan.operators[plan.graph.head]
    assert isinstance(region, Region)
    assert isinstance(region.primitive, Linear)
    count = weight_roundings(region.primitive)
    if count == 0:
        return matrix, None
    positive, sizes = absolute(region, weights)
    assert isinstance(positive.primitive, Linear)
    majorant = effective_weight(positive.primitive, sizes)
    lengths = torch.tensor([frobenius_up(row) for row in majorant], dtype=torch.float64)
    # The factor covers the roundings of the majorant and of this line.
    error = gamma_up(2 * count + matrix.shape[1]) * lengths * (1 + 2.0**-20)
    return matrix, error.clamp_min(next_up(0.0))


def spectral_norm(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    level: str = "rigorous",
    delta: float | None = None,
) -> LipschitzBound:
    """Spectral norm of a module that is one linear map: a layer, or layers with their batch norms.

    Args:
        module: Linear in its input up to a constant (biases do not matter), in eval mode.
        input_shape: Shape of one input, without the batch dimension.
        level: ``"rigorous"``, ``"probabilistic"`` or ``"estimate"`` (differentiable in the
            weights).
        delta: Failure probability at ``"probabilistic"``.

    Returns:
        The bound; ``total`` is the norm.

    Raises:
        UnsupportedLayerError: The module is not one linear map, or has a part without a rule.
        TrainModeError, NonFiniteError, NotCertifiedError, ArgumentError: As
            :func:`certified_bound`.

    Guarantee:
        As ``level`` says.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Thm. 1 (operator norm of a convolution).

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> norm = lf.spectral_norm(torch.nn.Conv2d(1, 1, 3, padding=1).eval(), (1, 8, 8))
        >>> norm.level
        'rigorous'
    """
    asked = Level(level, delta)
    check_certifiable(module)
    graph = trace_model(module, input_shape).graph
    plan = make_plan(module, graph, engine="operator", backend="reference")
    linear = all(s.op in ("constant", "sigma", "mul") for s in graph.tape) and all(
        rule in ("copy", "average", "scale") for _, rule, _ in graph.notes
    )
    if (
        not linear
        or len(graph.operators) > 1
        or not all(isinstance(o, Region) for o in graph.operators)
    ):
        raise UnsupportedLayerError(
            "a module that is one linear map", f"{len(graph.operators)} operators, nonlinear",
            type(module).__name__, "use certified_bound for networks",
        )  # fmt: skip
    if asked != "estimate":
        return plan_bound(plan, module, level=asked)
    estimate = NetworkBound(module, input_shape, engine="operator")
    estimate.rescan()
    return estimate(update=False)


class _Convolution(nn.Module):
    """A convolution without bias around a given weight."""

    weight: Tensor

    def __init__(
        self, weight: Tensor, options: dict[str, Any], mode: str, transposed: bool
    ) -> None:
        super().__init__()
        # A buffer may be any tensor, so gradients reach a weight that is not a leaf.
        self.register_buffer("weight", weight)
        self.options, self.mode, self.transposed = options, mode, transposed
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        axes = self.weight.ndim - 2
        options = dict(self.options)
        if self.mode != "zeros":
            low_high = [p for n in reversed(options.pop("padding")) for p in (n, n)]
            x = nn.functional.pad(x, low_high, mode=self.mode)
        function = getattr(nn.functional, f"conv{'_transpose' * self.transposed}{axes}d")
        result: Tensor = function(x, self.weight, None, **options)
        return result


def conv_spectral_norm(
    weight: Tensor,
    input_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    level: str = "rigorous",
) -> LipschitzBound:
    """Spectral norm of a convolution on inputs of a given size, boundary included.

    Unlike the norm of the reshaped kernel, this is the norm of the map itself.

    Args:
        weight: ``(C_out, C_in / groups, k...)``, or ``(C_in, C_out / groups, k...)`` if transposed;
            one to three kernel axes.
        input_shape: ``(C_in, n...)``, without the batch dimension.
        stride, padding, dilation: One number or one per axis.
        groups: As in ``torch.nn.Conv2d``.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        transposed: Whether it is a transposed convolution (zero padding only).
        level: As in :func:`spectral_norm`. At ``"estimate"``, ``total`` is differentiable in
            ``weight``.

    Returns:
        The bound; ``total`` is the norm.

    Raises:
        ShapeError: ``weight`` is not a kernel of one to three axes.
        DtypeError: ``weight`` is not floating point.
        ArgumentError: Unknown ``padding_mode`` or ``level``.
        UnsupportedLayerError: The geometry is impossible.
        NonFiniteError: The weight holds NaN or infinity.

    Guarantee:
        As ``level`` says.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Thm. 1 and 2.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> ones = torch.ones(1, 1, 3, 3)
        >>> norm = lf.conv_spectral_norm(ones, (1, 4, 4), stride=2, padding=1).total
        >>> 3.618 < norm < 3.619
        True
    """
    if weight.ndim not in (3, 4, 5):
        raise ShapeError(
            "a kernel with one to three spatial axes", str(tuple(weight.shape)),
            "conv_spectral_norm(weight)", "pass the weight of a Conv1d, Conv2d or Conv3d",
        )  # fmt: skip
    if not weight.is_floating_point():
        raise DtypeError(
            "a floating-point weight", str(weight.dtype), "conv_spectral_norm(weight)",
            "convert it with weight.float() or weight.double()",
        )  # fmt: skip
    modes = ("zeros",) if transposed else ("zeros", "circular", "reflect", "replicate")
    if padding_mode not in modes:
        raise ArgumentError(
            f"one of {', '.join(modes)}", repr(padding_mode), "padding_mode", "pick one of these"
        )
    axes = weight.ndim - 2

    def per_axis(item: int | Sequence[int]) -> list[int]:
        return [item] * axes if isinstance(item, int) else [int(i) for i in item]

    options: dict[str, Any] = {
        "stride": per_axis(stride), "padding": per_axis(padding), "dilation": per_axis(dilation),
        "groups": groups,
    }  # fmt: skip
    return spectral_norm(
        _Convolution(weight, options, padding_mode, transposed), input_shape, level=level
    )
