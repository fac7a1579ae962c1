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

# Measured along training (docs/adr/0009): networks trained with the symbol of their larger maps
# missed the radii of the true operator, which is cheap up to this many multiply-adds per step.
# Beyond, the symbol, whose price does not depend on the map, but never on maps so small that its
# border excess is several percent and the true operator costs about as much.
OPERATOR_MAX_PRODUCTS = 1 << 27
OPERATOR_MAX_POSITIONS = 64


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
        if form.operator_products <= OPERATOR_MAX_PRODUCTS:
            return "operator", f"{form.operator_products / 1e6:.3g} million products"
        requested = "symbol"
    reason = get_engine(requested).refusal(region)
    if reason is not None:
        return "operator", f"{requested}: {reason}"
    return requested, f"{positions} positions"
