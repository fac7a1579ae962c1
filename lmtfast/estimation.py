# SPDX-License-Identifier: MIT
"""The training-time bound: differentiable, warm-started, cheap, and always an estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmtfast.autograd import SpectralNorms
from lmtfast.backends import choose_backend
from lmtfast.backends.reference import effective_weight
from lmtfast.bound import LipschitzBound
from lmtfast.engines import get_engine
from lmtfast.engines.network import rescan_iterates
from lmtfast.errors import ArgumentError, StalePlanError
from lmtfast.graph import Linear, ParameterRef, Region
from lmtfast.plan import BoundPlan, make_plan
from lmtfast.state import PowerState
from lmtfast.tracing import trace_model
from lmtfast.weights import Weights, named_tensors

WARM_UP = 10


class NetworkBound(nn.Module):
    """Estimates a network's L2 Lipschitz constant in every training step, differentiably.

    One warm power step per operator and call. The model is traced once, in eval mode, and not
    touched; its parameters are read afresh at every call. The state dict holds the iterates only.

    Args:
        model: Any module that :func:`lmtfast.trace` accepts.
        input_shape: Shape of one input, without the batch dimension.
        engine: ``"operator"`` (true zero-padded convolutions), ``"symbol"`` (supremum over
            frequencies, one read of the weights), ``"separable"`` (the true map at the symbol's
            price), or ``"auto"`` to choose per operator.
        backend: Name of a registered backend; None chooses. A name never falls back.
        batch_norm: ``"running"`` folds running variances; ``"batch"`` the variances of the model's
            latest forward in training mode, through which gradients flow (the paper's choice).

    Raises:
        UnsupportedLayerError: The model has a part without a Lipschitz rule.
        ArgumentError: ``engine`` or ``batch_norm`` is unknown.
        BackendUnavailableError: The named backend cannot run here.

    Guarantee:
        None: power iteration estimates norms from below. ``certify`` does not accept it.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Alg. 1 and 2.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> bound = lf.NetworkBound(model, (4,))
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> loss = lf.margin_cross_entropy(model(x), y, bound(), eps=36 / 255)
        >>> loss.backward()
    """

    plan: BoundPlan

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        *,
        engine: str = "auto",
        backend: str | None = None,
        batch_norm: str = "running",
    ) -> None:
        super().__init__()
        if engine != "auto":
            get_engine(engine)
        if batch_norm not in ("running", "batch"):
            raise ArgumentError(
                "'running' or 'batch'", repr(batch_norm), "NetworkBound(batch_norm=...)",
                "use 'running' unless the bound must follow batch statistics",
            )  # fmt: skip
        chosen = choose_backend(backend)
        graph = trace_model(model, input_shape).graph
        self.plan = make_plan(model, graph, engine=engine, backend=chosen)
        # In a tuple, so that the model does not become a submodule and its weights not ours.
        self._model = (model,)
        self._batch_variance: dict[str, Tensor] | None = None
        tensors = [t for t in named_tensors(model).values() if t.is_floating_point()]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        device = tensors[0].device if tensors else torch.device("cpu")
        self.state = PowerState(self.plan.state_sizes, dtype=dtype, device=device)
        if not self.state.iterates.is_meta and not any(t.is_meta for t in tensors):
            self.converge(WARM_UP)
        # After the warm-up, which has no batch to take statistics from.
        if batch_norm == "batch":
            self._watch_batch_norms()

    def _watch_batch_norms(self) -> None:
        # Registered after tracing, so that the traced program does not contain the hooks.
        self._batch_variance = {}
        modules = dict(self._model[0].named_modules())
        for ref in self.plan.batch_norms:
            if not isinstance(modules.get(ref.module), _BatchNorm):
                raise ArgumentError(
                    "batch norms that are modules", f"a functional one at {ref.module!r}",
                    "NetworkBound(batch_norm='batch')", "use batch_norm='running'",
                )  # fmt: skip
            hook = partial(_record_variance, self._batch_variance, ref.module)
            modules[ref.module].register_forward_pre_hook(hook)

    def _weights(self) -> Weights:
        model = self._model[0]
        self.plan.check_fresh(model)
        if self._batch_variance is not None:
            wanted = {ref.module for ref in self.plan.batch_norms}
            if missing := wanted - set(self._batch_variance):
                raise StalePlanError(
                    "batch statistics from a forward pass in training mode",
                    f"none for {sorted(missing)[0]!r}", "NetworkBound(batch_norm='batch')",
                    "call model(x) in training mode before calling the bound",
                )  # fmt: skip
        return Weights(
            named_tensors(model),
            dtype=self.state.iterates.dtype,
            batch_variance=self._batch_variance,
        )

    def _tensors(self, weights: Weights) -> list[Tensor]:
        """One tensor per slot; parameters in their own dtype, which a backend may read directly."""
        variances = {
            ref.variance: self._batch_variance[ref.module]
            for ref in self.plan.batch_norms
            if self._batch_variance is not None
        }
        return [
            variances[ref] if ref in variances
            else weights.tensors[ref.name] if isinstance(ref, ParameterRef)
            else weights[ref]
            for ref in self.plan.slots
        ]  # fmt: skip

    def forward(self, update: bool = True) -> LipschitzBound:
        """Estimate the bound at the present weights.

        Args:
            update: Whether the iterates advance by one power step.

        Returns:
            The bound at level ``estimate``; ``total``, ``features`` and ``per_operator`` are 0-dim
            tensors (float32, or float64 for float64 weights), differentiable in the parameters.

        Raises:
            StalePlanError: The model's structure changed since it was traced.
        """
        with torch.autocast(self.state.iterates.device.type, enabled=False):
            weights = self._weights()
            tensors = self._tensors(weights)
            sigmas, values, iterates = SpectralNorms.apply(
                self.plan, self.state.iterates, update, *tensors
            )
            if update:
                self.state.advance(iterates)
            head_weight = None
            head = self.plan.graph.head
            if head is not None:
                head_weight = head_matrix(self.plan, weights)
        features, total = values.unbind()
        names = [o.name for o in self.plan.operators]
        return LipschitzBound(
            total=total, features=features,
            per_operator=dict(zip(names, sigmas.unbind(), strict=True)),
            level="estimate", delta=1.0, slack=math.nan,
            method="power iteration, " + "/".join(sorted(set(self.plan.engines))),
            methods=dict(zip(names, self.plan.engines, strict=True)),
            head_weight=head_weight, classes=class_count(self.plan),
        )  # fmt: skip

    @torch.no_grad()
    def rescan(self) -> LipschitzBound:
        """Search afresh at the present weights: Lanczos, or a scan of all frequencies.

        Power iteration follows a drifting maximum but can miss another one that overtakes it; a
        rescan every few hundred steps finds that one. It costs many power steps and waits for the
        device.
        """
        tensors = self._tensors(self._weights())
        self.state.advance(rescan_iterates(self.plan, self.state.iterates, tensors))
        return self(update=False)

    @torch.no_grad()
    def converge(self, n_iter: int = 200) -> LipschitzBound:
        """Take ``n_iter`` power steps at the present weights; returns the estimate after them."""
        for _ in range(n_iter):
            self(update=True)
        return self(update=False)

    def extra_repr(self) -> str:
        return f"operators={len(self.plan.operators)}, backend={self.plan.backend!r}"


def _record_variance(
    store: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    # A function of the store alone: copying the model must not drag the bound along.
    if module.training:
        x = inputs[0]
        x = x if x.dtype == torch.float64 else x.float()
        store[name] = x.var(dim=[d for d in range(x.ndim) if d != 1], unbiased=False)


def head_matrix(plan: BoundPlan, weights: Weights) -> Tensor:
    """The head's rows with all scales folded in. Shape ``(K, D)``."""
    assert plan.graph.head is not None
    region = plan.operators[plan.graph.head]
    assert isinstance(region, Region)
    assert isinstance(region.primitive, Linear)
    return effective_weight(region.primitive, weights)


def class_count(plan: BoundPlan) -> int | None:
    """Number of logits, or None if the output is not one vector per sample."""
    shape = plan.graph.output_shape
    return shape[0] if len(shape) == 1 else None
