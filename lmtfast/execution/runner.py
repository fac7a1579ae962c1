# SPDX-License-Identifier: MIT
"""Executes a network exactly as a profile says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lmtfast.builder import Value
from lmtfast.enclosure import Enclosed, ErrorCall, ProgramInterpreter, Recorder
from lmtfast.enclosure.interpreter import first_value
from lmtfast.errors import DtypeError, InputDomainError, NotCertifiedError
from lmtfast.execution.recorder import SourceRecorder
from lmtfast.graph import Derived
from lmtfast.guarantee import check_certifiable
from lmtfast.profiles import Profile, get_profile
from lmtfast.tracing import TracedModel, trace_model
from lmtfast.verified.arithmetic import ensure_arithmetic
from lmtfast.weights import named_tensors


class Execution(ProgramInterpreter):
    """A traced network under one execution profile.

    Args:
        model: The model that was traced.
        traced: Its program.
        profile: The profile.
        tensors: Parameters and buffers to use instead of the model's present ones.

    Raises:
        NotCertifiedError: A call has no error rule, a tensor the program reads is not representable
            in the profile's storage, or the program casts to a narrower type.

    Guarantee:
        A call's result is the float64 value of its error rule on the stored operands, rounded once
        to storage. ``run`` conforms to the profile under any precision setting of torch.

    Example:
        >>> layer = nn.Linear(2, 2).eval()
        >>> execution = Execution(layer, trace_model(layer, (2,)), get_profile("fp32a64"))
        >>> execution(torch.ones(1, 2)).dtype
        torch.float32
    """

    bounded = False

    def __init__(
        self,
        model: nn.Module,
        traced: TracedModel,
        profile: Profile,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.profile = profile
        self.dtype: torch.dtype = getattr(torch, profile.dtype)
        super().__init__(model, traced, tensors)
        self._check_storage()
        for node, call in self.calls():
            self._check_width(node, call)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of a batch that the storage represents. ``(N, ...)`` to ``(N, K)`` in storage."""
        check_autocast()
        ensure_rounding(self.profile, x.device)
        self.check_inputs(x)
        return self.run(x.detach().to(torch.float64).contiguous()).value.to(self.dtype)

    def check_inputs(self, x: Tensor) -> None:
        """Refuse inputs that the storage does not represent."""
        if not x.is_floating_point():
            raise DtypeError(
                "floating-point inputs", str(x.dtype), "run(x)", "convert and scale them"
            )
        away = x.to(self.dtype).to(torch.float64) != x.to(torch.float64)
        if bool(away.any()):
            raise InputDomainError(
                f"inputs that {self.profile.dtype} represents",
                f"{int(away.sum())} values that it does not (NaN included)",
                f"inputs under {self.profile.semantics}",
                f"round them first, for example x.to(torch.{self.profile.dtype}), and certify "
                "those",
            )

    def _recorder(self, input_shape: tuple[int, ...]) -> Recorder:
        return SourceRecorder(input_shape)

    def _settled(self, result: Enclosed, traced: Value) -> Enclosed:
        stored = result.value.to(self.dtype).to(torch.float64)
        # Errors are not asked for; the rules only pass these zeros on.
        return Enclosed(stored, torch.zeros_like(stored), stored.new_zeros(len(stored)), traced)

    def _check_storage(self) -> None:
        for ref in self.references:
            tensor = self.weights[ref]
            if not torch.equal(tensor.to(self.dtype).to(tensor.dtype), tensor):
                derived = isinstance(ref, Derived)
                raise NotCertifiedError(
                    f"parameters and constants that {self.profile.dtype} represents",
                    "a weight that a parametrization computes" if derived else "others",
                    f"{getattr(ref, 'name', 'a tensor of the program')} under "
                    f"{self.profile.semantics}",
                    "remove the parametrization (torch.nn.utils.parametrize."
                    "remove_parametrizations) and round the weight"
                    if derived
                    else f"round them first, for example model.to(torch.{self.profile.dtype})",
                )

    def _check_width(self, node: torch.fx.Node, call: ErrorCall) -> None:
        """Refuse calls that narrow a tensor below the storage, by a cast or as ``mean(dtype=)``."""
        sources = (n for n in node.all_input_nodes if first_value(self.walk.env.get(n)) is not None)
        known, result = {n.meta["val"].dtype for n in sources}, node.meta["val"]
        dtype = (result[0] if isinstance(result, (tuple, list)) else result).dtype
        if dtype not in known and torch.finfo(dtype).eps > torch.finfo(self.dtype).eps:
            raise NotCertifiedError(
                f"a program that stays in {self.profile.dtype}", f"a cast to {dtype}",
                repr(call.name or "the model's forward"),
                "remove the cast: its rounding is none of the profile's",
            )  # fmt: skip


def check_autocast() -> None:
    """Refuse to execute anything while autocast is active."""
    active = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    if active:
        raise NotCertifiedError(
            "execution without autocast", f"torch.autocast active for {', '.join(active)}",
            "an executed profile",
            "leave the autocast context: it rounds the operands of every call to 16 bits, and the "
            "worst case of that exceeds any margin",
        )  # fmt: skip


def ensure_rounding(profile: Profile, device: torch.device) -> None:
    """Probe the arithmetic, and the rounding into storage."""
    ensure_arithmetic(torch.device("cpu"))
    if device.type != "cpu":
        ensure_arithmetic(device)
    dtype = getattr(torch, profile.dtype)
    if profile.unit == 0.0:
        return
    half, least = profile.unit, 2.0 * profile.underflow
    probes = (
        (1.0 + half, 1.0), (1.0 + 1.5 * half, 1.0 + 2 * half), (1.0 + 3 * half, 1.0 + 4 * half),
        (-1.0 - 1.5 * half, -1.0 - 2 * half), (0.75 * least, least), (least, least),
    )  # fmt: skip
    pairs = torch.tensor(probes, dtype=torch.float64, device=device).repeat(16, 1)
    values, expected = pairs.unbind(1)
    if not torch.equal(values.to(dtype).to(torch.float64), expected):
        raise NotCertifiedError(
            f"float64 rounded to {profile.dtype} to nearest, with gradual underflow",
            "another rounding", f"torch on {device}",
            "turn off torch.set_flush_denormal and restore the rounding mode",
        )  # fmt: skip


def run(model: nn.Module, x: Tensor, *, profile: str = "fp32a64") -> Tensor:
    """Execute a network exactly as an execution profile says.

    Under ``fp32a64``, every tensor is float32; each call of the traced program (convolution, linear
    layer, batch norm, pooling, sum, activation) is evaluated in float64 on its float32 operands and
    rounded once. Maxima, ReLU, and calls that only move entries are exact. Under ``fp64``,
    everything is float64.

    Args:
        model: Module in eval mode that :func:`lmtfast.trace` accepts, whose parameters and
            constants the profile's storage represents (values count, not dtypes); CPU or CUDA.
        x: Batch ``(N, ...)``, floating point, on the model's device, representable in storage.
        profile: ``"fp32a64"`` or ``"fp64"``.

    Returns:
        The model's output, ``(N, ...)``, in the profile's storage.

    Raises:
        NotCertifiedError: Profiles of which nothing can be certified (float32 accumulation, TF32,
            bfloat16, float16), autocast that is active, weights that storage does not represent,
            casts to a narrower type, a call without an error rule, arithmetic that is not IEEE 754.
        ArgumentError: There is no such profile.
        InputDomainError: An input that storage does not represent.
        TrainModeError, NonFiniteError, UnsupportedLayerError: As for :func:`lmtfast.certify`.

    Guarantee:
        The result is that of an execution that conforms to the profile, under any setting of
        torch's float32 precision: a certificate with ``semantics="executed(fp32a64)"`` speaks of
        it.

    Example:
        >>> import torch
        >>> from lmtfast.models import run
        >>> run(torch.nn.Linear(4, 3).eval(), torch.rand(2, 4)).dtype
        torch.float32
    """
    found = get_profile(profile)
    check_certifiable(model)
    tensors = {n: t.detach() for n, t in named_tensors(model).items()}
    with torch.device("cpu"):
        traced = trace_model(model, tuple(x.shape[1:]))
    return Execution(model, traced, found, tensors)(x)
