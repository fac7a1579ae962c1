# SPDX-License-Identifier: MIT
"""Reads the tensors of a plan from a live model, and notices when its structure has changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmtfast.errors import StalePlanError
from lmtfast.graph import ParameterRef
from lmtfast.plan import BoundPlan
from lmtfast.settings import ModuleSettings, Snapshot, constants_in
from lmtfast.tracing import trace_model
from lmtfast.weights import Weights, named_tensors


class ModelReader:
    """The tensors of a plan's slots, as they are now.

    The model is compared at every call with the traced one: by identity of its modules, shapes of
    their tensors and identity of their settings, a microsecond per module. Where one of these
    differs, the model is traced again, and refused if its graph is another one.

    Args:
        model: The model that was traced.
        plan: What was traced.
    """

    def __init__(self, model: nn.Module, plan: BoundPlan) -> None:
        self.model, self.plan = model, plan
        self._remember()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has modules of its own: their settings are looked at one by one the first time.
        return {**self.__dict__, "_snapshot": None}

    def _check(self) -> None:
        if self._snapshot is not None and self._snapshot.unchanged():
            return
        self.plan.check_fresh(self.model)
        changed = [{*settings.differences()} for settings in self._settings]
        known = [*zip(self._settings, changed, strict=True)]
        if (
            any(changed)
            and trace_model(self.model, self.plan.graph.input_shape).graph != self.plan.graph
        ):
            names = [f"{type(s.module).__name__}.{name}" for s, c in known for name in sorted(c)]
            raise StalePlanError(
                "the program that was traced",
                ", ".join(names[:3]),
                type(self.model).__name__,
                "make a new NetworkBound after changing a layer's settings, hooks or forward",
            )
        same = [*self.model.modules()] == [s.module for s in self._settings]
        self._remember([s.idle_after(c) for s, c in known] if same else None)

    def _remember(self, idle: Sequence[Collection[str]] | None = None) -> None:
        self.plan.check_fresh(self.model)
        modules = list(self.model.modules())
        constants = set(constants_in(self.plan.graph))
        idle = idle or [()] * len(modules)
        self._settings = [
            ModuleSettings(m, constants, names) for m, names in zip(modules, idle, strict=True)
        ]
        self._snapshot: Snapshot | None = Snapshot(self._settings)
        self._stores = [
            self._store(ref.name) if isinstance(ref, ParameterRef) else None
            for ref in self.plan.slots
        ]
        variances = {ref.variance: ref.module for ref in self.plan.batch_norms}
        # Slot number and batch norm of every variance.
        self._variances = [
            (i, variances[ref]) for i, ref in enumerate(self.plan.slots) if ref in variances
        ]
        self._computed = [i for i, place in enumerate(self._stores) if place is None]

    def _store(self, name: str) -> tuple[dict[str, Any], str]:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        return (module._parameters if leaf in module._parameters else module._buffers), leaf

    def tensors(
        self, dtype: torch.dtype, batch_variance: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """One tensor per slot; parameters in their own dtype, computed ones in ``dtype``.

        Args:
            dtype: Of tensors that are computed from parameters.
            batch_variance: Variances to take the place of running ones, by batch norm.

        Raises:
            StalePlanError: The structure is no longer the traced one, or the latest batch's
                variance of a batch norm is missing.
        """
        # A compiled graph has the structure it was compiled for: its guards look after that.
        if not torch.compiler.is_compiling():
            self._check()
        tensors: list[Any] = [p if p is None else p[0][p[1]] for p in self._stores]
        if self._computed:
            weights = Weights(named_tensors(self.model), dtype=dtype, batch_variance=batch_variance)
            for i in self._computed:
                tensors[i] = weights[self.plan.slots[i]]
        if batch_variance is not None:
            for i, name in self._variances:
                if name not in batch_variance:
                    raise StalePlanError(
                        "batch statistics from a forward pass in training mode",
                        f"none for {name!r}", "NetworkBound(batch_norm='batch')",
                        "call model(x) in training mode before calling the bound",
                    )  # fmt: skip
                tensors[i] = batch_variance[name]
        return tensors
