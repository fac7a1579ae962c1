# SPDX-License-Identifier: MIT
"""What a module's forward reads besides parameters and buffers: attributes, hooks, its code."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lmtfast.graph import ConstantRef
from lmtfast.weights import constant_ref

# Attributes every module has: tensors and submodules are read elsewhere, the mode moves no bound.
_COMMON = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class ModuleSettings:
    """The settings of one module as they were, to be compared with what they are.

    Attributes count by identity or equal value, containers and objects of plain values by content,
    and a tensor that is no buffer by content if the plan holds it as a constant (one that a hook
    computes at every forward is none). What a closure or a global variable holds is not seen.

    Args:
        module: The module.
        constants: The constants of the plan.
        idle: Attributes that were seen to change without changing the traced program, such as a
            counter of calls; they are not looked at.
    """

    def __init__(
        self,
        module: nn.Module,
        constants: Collection[ConstantRef],
        idle: Collection[str] = (),
    ) -> None:
        self.module = module
        self.idle = frozenset(idle)
        self._code = _code(module)
        self._hooks = _hooks(module)
        self._attributes: dict[str, Any] = {}
        self._containers: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._size = len(vars(module))
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                if constants and not value.is_meta and constant_ref(value) in constants:
                    self._tensors[name] = value.detach().clone()
            elif name not in _COMMON and name not in self.idle:
                self._attributes[name] = value
                if (content := _content(value)) is not None:
                    self._containers[name] = content
        self._names = tuple(self._attributes)
        self._values = tuple(self._attributes.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleSettings:
        # By way of the pickled form the code would be lost.
        twin = memo[id(self)] = object.__new__(ModuleSettings)
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Code is not pickled; without it the first comparison fails: the model is traced again.
        return {**self.__dict__, "_code": None}

    def unchanged(self) -> bool:
        """Whether every setting is what it was; a microsecond where none is mutable."""
        now, kind = vars(self.module), type(self.module)
        same = (
            len(now) == self._size
            and (kind.forward, kind.__call__) == self._code
            and (*now["_forward_hooks"], None, *now["_forward_pre_hooks"]) == self._hooks
            and all(map(is_, map(now.get, self._names), self._values))
            and not self._tensors
        )
        for name, content in self._containers.items():
            same = same and _content(now.get(name)) == content
        return same or not any(self.differences())

    def differences(self) -> Iterator[str]:
        """Names of the settings that changed."""
        now = vars(self.module)
        if _code(self.module) != self._code:
            yield "forward"
        if _hooks(self.module) != self._hooks:
            yield "hooks"
        for name, value in self._attributes.items():
            if not _same(now.get(name, ...), value):
                yield name
        for name, value in self._containers.items():
            if _content(now.get(name)) != value:
                yield name
        for name, tensor in self._tensors.items():
            found = now.get(name)
            if not isinstance(found, Tensor) or not torch.equal(found, tensor):
                yield name
        added = now.keys() - self._attributes.keys() - _COMMON - self.idle
        yield from (name for name in sorted(added) if not isinstance(now[name], Tensor))

    def idle_after(self, changed: Collection[str]) -> frozenset[str]:
        """What is idle once these changed and the program stayed the same: none of the settings
        that a layer's class lists as constants of its forward."""
        listed = getattr(type(self.module), "__constants__", ())
        return self.idle | (frozenset(changed) - frozenset(listed))


def _code(module: nn.Module) -> tuple[object, object]:
    return type(module).forward, type(module).__call__


def _hooks(module: nn.Module) -> tuple[int | None, ...]:
    # Handles are numbered through the whole process, so equal numbers are the same hooks.
    return (*module._forward_hooks, None, *module._forward_pre_hooks)


def _content(value: Any) -> Any:
    """A copy of what a mutable attribute holds, None if it is not one of plain values."""
    if isinstance(value, (list, dict, set)):
        return value.copy() if _plain(value) else None
    members = None if callable(value) else getattr(value, "__dict__", None)
    return dict(members) if isinstance(members, dict) and _plain(members) else None


def _plain(item: Any) -> bool:
    if isinstance(item, _PLAIN):
        return True
    if isinstance(item, dict):
        return all(map(_plain, item)) and all(map(_plain, item.values()))
    return isinstance(item, (list, tuple, set)) and all(map(_plain, item))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return type(a) is type(b) and _plain(a) and bool(a == b)


def constants_in(item: Any) -> Iterator[ConstantRef]:
    """Every constant tensor anywhere inside a graph."""
    if isinstance(item, ConstantRef):
        yield item
    elif isinstance(item, (tuple, list)):
        for part in item:
            yield from constants_in(part)
    elif is_dataclass(item):
        for member in fields(item):
            yield from constants_in(getattr(item, member.name))
