# SPDX-License-Identifier: MIT
"""The training-time bound: differentiable, warm-started, cheap, and always an estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmtfast.autograd import spectral_norms
from lmtfast.backends import choose_backend
from lmtfast.backends.pair_norm import without_autocast
from lmtfast.backends.reference import Leaves, effective_weight
from lmtfast.bound import LipschitzBound, OperatorNorms
from lmtfast.custom_ops import shared_plan
from lmtfast.engines import get_engine
from lmtfast.engines.network import rescan_iterates
from lmtfast.errors import ArgumentError
from lmtfast.graph import BoundGraph, Linear, Region
from lmtfast.level import ESTIMATE
from lmtfast.plan import BoundPlan, make_plan
from lmtfast.reading import ModelReader
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
        tensors = [t for t in named_tensors(model).values() if t.is_floating_point()]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        device = tensors[0].device if tensors else torch.device("cpu")
        self._engine, self._backend = engine, backend
        choose_backend(backend, device.type, dtype == torch.float64)  # refuses before tracing
        graph = trace_model(model, input_shape).graph
        # In a tuple, so that the model does not become a submodule and its weights not ours.
        self._model = (model,)
        self._batch_variance: dict[str, Tensor] | None = None
        self._make_plan(graph, device, dtype)
        self.state = PowerState(self.plan.state_sizes, dtype=dtype, device=device)
        if not self.state.iterates.is_meta and not any(t.is_meta for t in tensors):
            self.converge(WARM_UP)
        # After the warm-up, which has no batch to take statistics from.
        if batch_norm == "batch":
            self._watch_batch_norms()

    def _make_plan(self, graph: BoundGraph, device: torch.device, dtype: torch.dtype) -> None:
        self._runs_on = (device.type, dtype)
        name, reason = choose_backend(self._backend, device.type, dtype == torch.float64)
        model = self._model[0]
        self.plan = shared_plan(
            make_plan(model, graph, engine=self._engine, backend=name, backend_reason=reason)
        )
        self._reader = ModelReader(model, self.plan)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.plan = shared_plan(self.plan)

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

    def forward(self, update: bool = True) -> LipschitzBound:
        """Estimate the bound at the present weights.

        Args:
            update: Whether the iterates advance by one power step.

        Returns:
            The bound at level ``estimate``; ``total``, ``features`` and ``per_operator`` are 0-dim
            tensors (float32, or float64 for float64 weights), differentiable in the parameters.

        Raises:
            StalePlanError: The model's structure, a layer's settings, hooks or forward changed
                since it was traced, so that the traced program is no longer the model's.
        """
        iterates = self.state.iterates
        if (iterates.device.type, iterates.dtype) != self._runs_on:
            # Moved since: the engines and the layout of the iterates stay, the backend may not.
            self._make_plan(self.plan.graph, iterates.device, iterates.dtype)
        plan = self.plan
        with without_autocast(iterates.device):
            tensors = self._reader.tensors(iterates.dtype, self._batch_variance)
            sigmas, values, new = spectral_norms(plan, iterates, update, tensors)
            if update:
                self.state.advance(new)
            head_weight = None
            if plan.graph.head is not None:
                head = {r: tensors[i].to(iterates.dtype) for r, i in plan.head_slots}
                head_weight = head_matrix(plan, Leaves(head))
        features, total = values.unbind()
        return LipschitzBound(
            total=total, features=features,
            per_operator=OperatorNorms(plan.index, sigmas),
            level=ESTIMATE, slack=math.nan, method=plan.method, methods=plan.methods,
            head_weight=head_weight, classes=class_count(plan),
        )  # fmt: skip

    @torch.no_grad()
    def rescan(self) -> LipschitzBound:
        """Search afresh at the present weights: Lanczos, or a scan of all frequencies.

        Power iteration follows a drifting maximum but lags behind it, and can miss another one that
        overtakes it; a rescan finds that one. It costs some dozen power steps and waits for the
        device. With the symbol engine, one before every training step keeps nearly all estimates
        within one percent of the supremum (docs/adr/0009).
        """
        tensors = self._reader.tensors(self.state.iterates.dtype, self._batch_variance)
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
