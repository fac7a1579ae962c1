# SPDX-License-Identifier: MIT
"""One frozen dataclass describes a training run; it is read from TOML and has a fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lmtfast.errors import ConfigError
from lmtfast.losses import MEMBERS, ConstantSchedule, LinearSchedule, LogSchedule, Schedule

# The same parser under two names: tomli joined the standard library in Python 3.11.
tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

CHOICES: Mapping[str, tuple[str, ...]] = {
    "method": ("plain", "lmt"),
    "optimizer": ("adam", "sgd"),
    "eps_schedule": ("constant", "linear", "log"),
    "scaling": tuple(MEMBERS),
    "engine": ("auto", "operator", "symbol", "separable"),
    "batch_norm": ("running", "batch"),
}
# TOML's parser takes quadratic time for a long key, and recurses into tables and lists.
MAX_CONFIG_BYTES = 1 << 14
MAX_OPTION_DEPTH = 8
NOT_NEGATIVE = (
    "eps", "eps_start", "eps_ramp_epochs", "trades_weight", "weight_decay", "momentum", "seed",
)  # fmt: skip
# Where the run happens and where its data lie do not change what is computed, so they stay out of
# the fingerprint.
OUTSIDE_FINGERPRINT = frozenset({"data", "device", "log_every"})
# A run may be resumed with a later end; everything else must be what the checkpoint was written
# with.
MAY_CHANGE_ON_RESUME = OUTSIDE_FINGERPRINT | {"epochs", "certify_radii"}

FrozenOptions = Mapping[str, Any]


def _no_options() -> FrozenOptions:
    return MappingProxyType({})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    Args:
        method: ``"lmt"`` trains with the margin loss and the Lipschitz bound, ``"plain"`` with
            cross-entropy.
        model: A name in :data:`lmtfast.models.MODELS`, or ``package.module:callable``.
        model_options: Keyword arguments for the model.
        data: ``"digits"``, a ``.npz`` file or a directory of IDX files; the command line may
            replace it.
        input_range: Smallest and largest legal input value; the certificate speaks of this domain.
        epochs: Number of passes over the training set.
        batch_size: Samples per step; the last batch of an epoch may be smaller.
        seed: Seeds the initial weights, the epoch orders and the power iterates.
        optimizer: ``"adam"``, or ``"sgd"`` with Nesterov momentum.
        lr: Learning rate before the first milestone.
        lr_milestones: Epochs (counted from 0) from which the rate is multiplied by ``lr_factor``
            once more.
        lr_factor: Multiplier at each milestone.
        momentum: Momentum of ``"sgd"``; not used by ``"adam"``.
        weight_decay: L2 penalty on every parameter, as the optimiser defines it.
        eps: L2 radius the margin loss asks for, in input units (c in the paper). Not used by
            ``"plain"``.
        eps_schedule: ``"constant"``, or ``"linear"`` or ``"log"`` from ``eps_start`` to ``eps``
            over ``eps_ramp_epochs``.
        eps_start: First radius of a schedule that is not constant.
        eps_ramp_epochs: Length of that schedule; afterwards the radius is exactly ``eps``.
        scaling: Member of the loss family, as in :func:`lmtfast.margin_cross_entropy`.
        trades_weight: Weight of the divergence with ``scaling = "trades"``.
        engine: Engine of :class:`lmtfast.NetworkBound`.
        power_steps: Power iterations of the bound per training step; the paper takes one. More let
            the estimate lag less behind the moving weights.
        batch_norm: Which statistics the bound folds while training.
        device: Where to train, for example ``"cpu"`` or ``"cuda:0"``.
        log_every: Steps between two transfers of the loss values from the device.
        certify_radii: Radii at which certified accuracy is reported, in input units.

    Raises:
        ConfigError: A field has the wrong type or a value outside its set; the message names it.

    Guarantee:
        None. A configuration states an intention; only a certificate states a fact.

    Source:
        Defaults are those of the MNIST experiment of Tsuzuku, Sato, Sugiyama (2018),
        arXiv:1802.04034.

    Example:
        >>> TrainConfig(epochs=2).eps_at(0.5)
        1.0
    """

    method: str = "lmt"
    model: str = "kolter-wong"
    model_options: FrozenOptions = field(default_factory=_no_options)
    data: str = ""
    input_range: tuple[float, float] = (0.0, 1.0)
    epochs: int = 20
    batch_size: int = 50
    seed: int = 0
    optimizer: str = "adam"
    lr: float = 1e-3
    lr_milestones: tuple[int, ...] = ()
    lr_factor: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    eps: float = 1.0
    eps_schedule: str = "constant"
    eps_start: float = 0.0
    eps_ramp_epochs: float = 0.0
    scaling: str = "lmt++"
    trades_weight: float = 1.0
    engine: str = "operator"
    power_steps: int = 1
    batch_norm: str = "running"
    device: str = "cpu"
    log_every: int = 100
    certify_radii: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)

    def __post_init__(self) -> None:
        for name, value in _normalised(self):
            object.__setattr__(self, name, value)
        _check_values(self)

    def __hash__(self) -> int:
        return hash(self.canonical())

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_plain, (self.to_dict(),)

    def eps_at(self, epoch: float) -> float:
        """Radius asked for at a (fractional) epoch, in input units.

        Guarantee:
            None.

        Source:
            :mod:`lmtfast.losses.schedule`.

        Example:
            >>> config = TrainConfig(
            ...     eps=0.01, eps_schedule="linear", eps_start=1e-5, eps_ramp_epochs=5
            ... )
            >>> config.eps_at(2.5)
            0.005005
        """
        return self._schedule(epoch)

    @cached_property
    def _schedule(self) -> Schedule:
        if self.eps_schedule == "linear":
            return LinearSchedule(self.eps_start, self.eps, self.eps_ramp_epochs)
        if self.eps_schedule == "log":
            return LogSchedule(self.eps_start, self.eps, self.eps_ramp_epochs)
        return ConstantSchedule(self.eps)

    def lr_at(self, epoch: int) -> float:
        """Learning rate in an epoch counted from 0."""
        return self.lr * self.lr_factor ** sum(
            epoch >= milestone for milestone in self.lr_milestones
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in values.items()}

    def canonical(self) -> str:
        """Canonical JSON of every field: sorted keys, no spaces."""
        return _canonical_json(self.to_dict())

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON without the fields that only say where the run happens.

        Example:
            >>> TrainConfig().fingerprint() == TrainConfig(device="cuda").fingerprint()
            True
        """
        kept = {k: v for k, v in self.to_dict().items() if k not in OUTSIDE_FINGERPRINT}
        return hashlib.sha256(_canonical_json(kept).encode()).hexdigest()


def from_mapping(values: Mapping[str, Any], *, where: str) -> TrainConfig:
    """Build a configuration from a mapping, refusing unknown keys by name.

    Args:
        values: Field names and values, as read from TOML or JSON.
        where: What to call the source in error messages.

    Raises:
        ConfigError: Unknown key, wrong type, or illegal value.
    """
    legal = sorted(f.name for f in dataclasses.fields(TrainConfig))
    unknown = sorted(set(values) - set(legal))
    if unknown:
        raise ConfigError(
            f"keys among {', '.join(legal)}",
            f"unknown {'keys' if len(unknown) > 1 else 'key'} {', '.join(map(repr, unknown))}",
            where,
            "correct the spelling or remove the key",
        )
    try:
        return TrainConfig(**values)
    except ConfigError as error:
        raise ConfigError(
            error.expected, error.got, f"{where}: {error.where}", error.remedy
        ) from None


def load_config(path: str | Path) -> TrainConfig:
    """Read a configuration from a TOML file.

    Raises:
        ConfigError: The file is missing, is not TOML, or holds an unknown key or an illegal value.

    Example:
        >>> load_config("run.toml").epochs  # doctest: +SKIP
        20
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "a readable TOML file",
            type(error).__name__,
            str(path),
            "check the path given to --config",
        ) from error
    return parse_config(text, where=str(path))


def parse_config(text: str, *, where: str) -> TrainConfig:
    """Build a configuration from the text of a TOML file; ``where`` names it in error messages.

    Raises:
        ConfigError: Not TOML, an unknown key, or an illegal value.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"at most {MAX_CONFIG_BYTES} bytes", "more", where, "this is not a configuration"
        )
    try:
        values = tomllib.loads(text)
    # ValueError: not TOML, or an integer of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "TOML", str(error), where, "correct the syntax at the position named"
        ) from error
    return from_mapping(values, where=where)


def _from_plain(values: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _frozen(name: str, value: Any, depth: int = 0) -> Any:
    """What JSON can hold and give back, unchangeable."""
    if depth > MAX_OPTION_DEPTH:
        raise _wrong(name, f"at most {MAX_OPTION_DEPTH} levels", "more")
    if isinstance(value, Mapping):
        items = {str(k): _frozen(f"{name}.{k}", v, depth + 1) for k, v in value.items()}
        return MappingProxyType(items)
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(name, v, depth + 1) for v in value)
    if isinstance(value, bool | str) or value is None:
        return value
    return _integer(name, value) if isinstance(value, int) else _number(name, value)


def _canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _wrong(name: str, expected: str, got: object) -> ConfigError:
    return ConfigError(expected, repr(got), f"key {name!r}", f"set {name} to {expected}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, "a finite number", value)
    if not abs(value) <= sys.float_info.max:
        raise _wrong(name, "a finite number", "one out of range")
    return float(value)


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, "an integer", value)
    if not -(2**63) <= value < 2**63:
        raise _wrong(name, "an integer of 64 bits", "a larger one")
    return value


def _sequence(name: str, value: object, item: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(name, "a list", value)
    return tuple(item(name, v) for v in value)


def _normalised(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """Field values with their declared type, ints widened to floats where a float is declared."""
    for spec in dataclasses.fields(config):
        name, kind, value = spec.name, str(spec.type), getattr(config, spec.name)
        if kind == "float":
            yield name, _number(name, value)
        elif kind == "int":
            yield name, _integer(name, value)
        elif kind == "str":
            if not isinstance(value, str):
                raise _wrong(name, "a string", value)
        elif kind.startswith("tuple"):
            yield name, _sequence(name, value, _integer if "int" in kind else _number)
        else:
            if not isinstance(value, Mapping):
                raise _wrong(name, "a table", value)
            yield name, _frozen(name, value)


def _check_values(config: TrainConfig) -> None:
    for name, legal in CHOICES.items():
        if getattr(config, name) not in legal:
            raise _wrong(name, f"one of {', '.join(map(repr, legal))}", getattr(config, name))
    for name in ("epochs", "batch_size", "log_every", "power_steps"):
        if getattr(config, name) < 1:
            raise _wrong(name, "at least 1", getattr(config, name))
    for name in ("lr", "lr_factor"):
        if getattr(config, name) <= 0.0:
            raise _wrong(name, "above 0", getattr(config, name))
    for name in NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise _wrong(name, "at least 0", getattr(config, name))
    if config.momentum >= 1.0:
        raise _wrong("momentum", "below 1", config.momentum)
    if config.eps_schedule != "constant" and config.eps_ramp_epochs == 0.0:
        raise _wrong("eps_ramp_epochs", "above 0 with this eps_schedule", config.eps_ramp_epochs)
    if len(config.input_range) != 2 or not config.input_range[0] < config.input_range[1]:
        raise _wrong(
            "input_range", "two numbers [low, high] with low < high", list(config.input_range)
        )
    if (
        list(config.lr_milestones) != sorted(set(config.lr_milestones))
        or min(config.lr_milestones, default=1) < 1
    ):
        raise _wrong(
            "lr_milestones", "increasing epochs, each at least 1", list(config.lr_milestones)
        )
    if any(r < 0 for r in config.certify_radii):
        raise _wrong("certify_radii", "radii of at least 0", list(config.certify_radii))
