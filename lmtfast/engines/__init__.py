# SPDX-License-Identifier: MIT
"""Engines: power iterations that estimate spectral norms, and the choice between them."""

from __future__ import annotations

import importlib
import math

from lmtfast.backends import backend_module, reference
from lmtfast.engines.polyphase import conv_form
from lmtfast.engines.step import Engine, Saved, Step
from lmtfast.errors import ArgumentError
from lmtfast.graph import Region

__all__ = ["ENGINES", "Engine", "Saved", "Step", "choose_engine", "get_engine"]

ENGINES = ("operator", "symbol", "separable")

# Provisional (docs/adr/0009): the true operator where a map is so small that it costs about one
# read of the weights, the symbol where its boundary error is below one percent, the separable form
# between, unless the true operator is less arithmetic.
OPERATOR_MAX_POSITIONS = 64
SEPARABLE_MAX_POSITIONS = 400


def get_engine(name: str, backend: str = "reference") -> Engine:
    """The engine called ``name``; ``operator`` calls the backend's functions, if it has them."""
    if name not in ENGINES:
        raise ArgumentError(
            f"an engine, one of {', '.join(('auto', *ENGINES))}", repr(name), "engine",
            "pick one of these",
        )  # fmt: skip
    module = importlib.import_module(f"lmtfast.engines.{name}")
    engine: Engine = module
    if name == "operator":
        functions = backend_module(backend)
        engine = module.OperatorEngine(functions if hasattr(functions, "matvec") else reference)
    return engine


def choose_engine(region: Region, requested: str) -> tuple[str, str]:
    """Name of the engine that runs a region, and why.

    Composites and matrices always run the true operator, which costs one read of their weights; a
    requested engine that cannot run a convolution gives way to it too, with the reason in the plan.
    """
    form = conv_form(region)
    if form is None:
        return "operator", "not a convolution"
    positions = math.prod(form.out_extent)
    if requested == "auto":
        if positions <= OPERATOR_MAX_POSITIONS:
            return "operator", f"{positions} positions"
        requested = "symbol"
        if positions <= SEPARABLE_MAX_POSITIONS:
            if form.operator_products <= form.separable_products:
                return "operator", f"{positions} positions, fewer products than separable"
            requested = "separable"
    reason = get_engine(requested).refusal(region)
    if reason is not None:
        return "operator", f"{requested}: {reason}"
    return requested, f"{positions} positions"
