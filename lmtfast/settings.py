# SPDX-License-Identifier: MIT
"""What a forward reads besides the numbers in its tensors: attributes, children, hooks, code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain, repeat
from operator import attrgetter, eq, is_, is_not, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from lmtfast.graph import ConstantRef
from lmtfast.weights import constant_ref

# Attributes every module has: tensors and submodules are read elsewhere, the mode moves no bound.
_COMMON = frozenset(vars(nn.Module()))
# Dictionaries of a module; the order of the entries counts in the first three.
_STORES = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers")
_ORDERED = _STORES[:3]
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_code = attrgetter("forward", "__call__")  # of a class
_stores = itemgetter(*_STORES)  # of a module's ``vars``


class ModuleSettings:
    """The settings of one module as they were, to be compared with what they are.

    Children and hooks count by identity and order, attributes by identity or equal value,
    containers and objects of plain values by content, and a tensor that is no buffer by content if
    the plan holds it as a constant (one that a hook computes at every forward is none). What a
    closure or a global variable holds is not seen.

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
        self._code = (type(module), *_code(type(module)))
        self._ordered = _ordered(module)
        self.attributes: dict[str, Any] = {}
        self.containers: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                if constants and not value.is_meta and constant_ref(value) in constants:
                    self.tensors[name] = value.detach().clone()
            elif name not in _COMMON and name not in self.idle:
                self.attributes[name] = value
                if (content := _content(value)) is not None:
                    self.containers[name] = content

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleSettings:
        # By way of the pickled form the code would be lost.
        twin = memo[id(self)] = object.__new__(ModuleSettings)
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Code is not pickled; without it the first comparison fails: the model is traced again.
        return {**self.__dict__, "_code": None}

    def differences(self) -> Iterator[str]:
        """Names of the settings that changed."""
        now, kind = vars(self.module), type(self.module)
        if (kind, *_code(kind)) != self._code:
            yield "forward"
        for name, items in _ordered(self.module).items():
            if items != self._ordered[name]:
                yield name.strip("_")
        for name, value in self.attributes.items():
            if not _same(now.get(name, ...), value):
                yield name
        for name, value in self.containers.items():
            if _content(now.get(name)) != value:
                yield name
        for name, tensor in self.tensors.items():
            if not _equal(now.get(name), tensor):
                yield name
        added = now.keys() - self.attributes.keys() - _COMMON - self.idle
        yield from (name for name in sorted(added) if not isinstance(now[name], Tensor))

    def idle_after(self, changed: Collection[str]) -> frozenset[str]:
        """What is idle once these changed and the program stayed the same: none of the settings
        that a layer's class lists as constants of its forward."""
        listed = getattr(type(self.module), "__constants__", ())
        return self.idle | (frozenset(changed) - frozenset(listed))


class Snapshot:
    """The settings of all modules and the shapes of their tensors, compared without a loop over
    modules: every training step asks whether anything changed, and nearly always nothing did.

    Args:
        settings: Of every module of a model, taken just now.
    """

    def __init__(self, settings: Sequence[ModuleSettings]) -> None:
        self._modules = [s.module for s in settings]
        self._kinds = [*map(type, self._modules)]
        self._classes = [*dict.fromkeys(self._kinds)]
        self._code = [*map(_code, self._classes)]
        self._members = [*map(vars, self._modules)]
        self._stores = [*chain.from_iterable(map(_stores, self._members))]
        self._sized = self._members + self._stores
        self._sizes = [*map(len, self._sized)]
        ordered = chain.from_iterable(map(itemgetter(*_ORDERED), self._members))
        self._ordered = [store for store in ordered if len(store) > 1]
        self._order = [*map(tuple, self._ordered)]
        items = [(store, *item) for store in self._stores for item in store.items()]
        self._attributes = _Entries(
            [(vars(s.module), *item) for s in settings for item in s.attributes.items()]
            + [item for item in items if not isinstance(item[2], Tensor)]
        )
        # Whatever their value, they are there: no new attribute makes up for a removed one.
        self._others = _Entries(
            [(m, n, ...) for s in settings for m in (vars(s.module),)
             for n in m.keys() - s.attributes.keys() - _COMMON]
        )  # fmt: skip
        self._shapes = _Entries([(d, n, t.shape) for d, n, t in items if isinstance(t, Tensor)])
        self._containers = _Entries(
            [(vars(s.module), *item) for s in settings for item in s.containers.items()]
        )
        self._tensors = _Entries(
            [(vars(s.module), *item) for s in settings for item in s.tensors.items()]
        )
        compared = [
            *self._modules,
            *self._sized,
            *self._attributes._values,
            *map(itemgetter(2), items),
        ]
        self._compared = [*{id(item): item for item in compared}.values()]

    def unchanged(self) -> bool:
        """Whether every setting and shape is what it was; a microsecond per module."""
        attributes, shapes = self._attributes, self._shapes
        # By now other work has driven these objects out of the caches. A copy of the list touches
        # all of them, many at a time, where the comparisons would wait for one after another.
        self._compared.copy()
        return (
            all(map(is_, map(type, self._modules), self._kinds))
            and all(map(is_, map(vars, self._modules), self._members))
            and [*map(_code, self._classes)] == self._code
            and all(map(is_, chain.from_iterable(map(_stores, self._members)), self._stores))
            and [*map(len, self._sized)] == self._sizes
            and [*map(tuple, self._ordered)] == self._order
            and self._others.match(is_not)
            and (attributes.match(is_) or attributes.match(_same))
            and shapes.match(eq, map(getattr, shapes.now(), repeat("shape"), repeat(None)))
            and self._containers.match(eq, map(_content, self._containers.now()))
            and self._tensors.match(_equal)
        )


class _Entries:
    # Entries of many dictionaries in three columns, which iterators in C go through.
    def __init__(self, rows: list[tuple[dict[Any, Any], Any, Any]]) -> None:
        self._owners, self._names, self._values = [*zip(*rows, strict=True)] or [()] * 3

    def now(self) -> Iterator[Any]:
        return map(dict.get, self._owners, self._names, repeat(...))

    def match(self, same: Callable[[Any, Any], bool], now: Iterator[Any] | None = None) -> bool:
        return all(map(same, self.now() if now is None else now, self._values))


def _ordered(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(vars(module)[name].items()) for name in _ORDERED}


def _equal(found: Any, tensor: Tensor) -> bool:
    return isinstance(found, Tensor) and torch.equal(found, tensor)


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
