# SPDX-License-Identifier: MIT
"""The table of Lipschitz rules, per ATen operation or module class. Nothing has a default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from lmtfast.builder import GraphBuilder, Value
from lmtfast.errors import ArgumentError, UnsupportedLayerError
from lmtfast.graph import BatchNormScale, ConstantRef, Derived, ParameterRef, Shape, WeightRef

REF_TYPES = (ParameterRef, ConstantRef, BatchNormScale, Derived)


@dataclass
class TracedCall:
    """One call of the traced program, as a rule sees it.

    Attributes:
        builder: Where values, operators and notes are made.
        target: Name of the ATen overload, for example ``"aten.conv2d.default"``.
        arguments: Every schema argument by name, defaults filled in. Traced tensors are
            :class:`~lmtfast.builder.Value`, parameter-only tensors are weight references.
        name: Qualified name of the module the call came from.
        out_shapes: Shapes of the outputs without the batch dimension.
        tensor: The present value of a weight reference (for shapes and constant indices).
        keyword_only: Arguments the overload takes by keyword only.
    """

    builder: GraphBuilder
    target: str
    arguments: dict[str, Any]
    name: str
    out_shapes: tuple[Shape | None, ...]
    tensor: Callable[[WeightRef], torch.Tensor]
    keyword_only: frozenset[str] = frozenset()

    @property
    def out_shape(self) -> Shape:
        if self.out_shapes[0] is None:
            raise self.unsupported("its first result has no batch dimension")
        return self.out_shapes[0]

    def __getitem__(self, key: str) -> Any:
        return self.arguments[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.arguments.get(key, default)

    def value(self, key: str) -> Value:
        """The argument as a traced tensor; refuses a constant in its place."""
        item = self.arguments[key]
        if not isinstance(item, Value):
            raise self.unsupported(f"argument {key!r} does not depend on the input")
        return item

    def weight(self, key: str) -> WeightRef:
        """The argument as a parameter-only tensor; refuses one that depends on the input."""
        item = self.arguments[key]
        if not isinstance(item, REF_TYPES):
            raise self.unsupported(f"argument {key!r} is not a parameter or constant")
        return item

    def unsupported(self, reason: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(
            "an operation with a proven global Lipschitz constant",
            f"{self.target}: {reason}",
            repr(self.name or "the model's forward"),
            "replace the layer by one with a rule, or register one with lmtfast.register_rule "
            "(docs/guide.md, adding a layer)",
        )


OperationRule: TypeAlias = Callable[[TracedCall], Any]
ModuleRule: TypeAlias = Callable[[nn.Module], float]

OPERATION_RULES: dict[str, OperationRule] = {}
# Built-in operations that take one traced tensor: a second one, say as a bias, is refused.
SINGLE: set[str] = set()
MODULE_RULES: dict[type[nn.Module], ModuleRule] = {}


def operation_rule(*targets: str, joins: bool = False) -> Callable[[OperationRule], OperationRule]:
    """Register the rule of one or more ATen overloads (inside the library)."""

    def add(rule: OperationRule) -> OperationRule:
        for target in targets:
            if target in OPERATION_RULES:
                raise RuntimeError(f"two rules for {target}")
            OPERATION_RULES[target] = rule
        if not joins:
            SINGLE.update(targets)
        return rule

    return add


def register_rule(
    layer: type[nn.Module] | torch._ops.OpOverload,
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Teach :func:`lmtfast.trace` a layer or an operation it does not know.

    For a module class the rule is a function ``rule(module) -> float``, an upper bound on the L2
    Lipschitz constant of the module as a map from its one tensor input to its one tensor output,
    per sample. Whatever the module does inside is then not looked at. For an operator overload
    (``torch.ops.mylib.op.default``) it is ``rule(call) -> Value`` on a :class:`TracedCall`.

    Args:
        layer: Module class, or operator overload.

    Returns:
        A decorator that registers the rule and returns it unchanged.

    Raises:
        ArgumentError: ``layer`` is neither, or already has a rule.

    Guarantee:
        Only as good as the rule: a constant that is too small makes every bound of the network
            wrong.

    Source:
        Composition rules: Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, section 5 and appendix
            B.

    Example:
        >>> import torch
        >>> import lmtfast as lf
        >>> class Swishish(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x * torch.cos(x) / (1 + x * x)
        >>> @lf.register_rule(Swishish)
        ... def constant(module):
        ...     return 1.25
        >>> plan = lf.trace(torch.nn.Sequential(torch.nn.Linear(4, 3), Swishish()), (4,))
    """

    def add(rule: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if isinstance(layer, torch._ops.OpOverload):
            key = str(layer)
            if key in OPERATION_RULES:
                raise _already(key)
            OPERATION_RULES[key] = rule
        else:
            if layer in MODULE_RULES:
                raise _already(layer.__name__)
            MODULE_RULES[layer] = rule
        return rule

    if not (
        isinstance(layer, torch._ops.OpOverload)
        or (isinstance(layer, type) and issubclass(layer, nn.Module))
    ):
        raise ArgumentError(
            "a torch.nn.Module class or an operator overload", repr(layer), "register_rule(layer)",
            "pass the class itself, or for example torch.ops.mylib.op.default",
        )  # fmt: skip
    return add


def _already(name: str) -> ArgumentError:
    return ArgumentError(
        "a layer without a rule", f"{name}, which has one", "register_rule(layer)",
        "subclass the layer if it needs another constant",
    )  # fmt: skip
