# SPDX-License-Identifier: MIT
"""Training configurations shipped with the library, one TOML file each; none names a path."""

from __future__ import annotations

from importlib import resources
from typing import Any

from lmtfast.config import TrainConfig, from_mapping, parse_config
from lmtfast.errors import ConfigError


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes shipped with the library.

    Example:
        >>> recipe_names()
        ('digits-lmt', 'digits-plain', 'mnist-lmt', 'mnist-plain')
    """
    files = resources.files(__name__).iterdir()
    return tuple(sorted(f.name[: -len(".toml")] for f in files if f.name.endswith(".toml")))


def load_recipe(name: str, **changes: Any) -> TrainConfig:
    """Read a shipped recipe by name.

    Args:
        name: One of :func:`recipe_names`.
        changes: Fields to set to other values.

    Raises:
        ConfigError: No such recipe (the message lists the names), or an illegal change.

    Example:
        >>> load_recipe("mnist-lmt").eps
        1.0
    """
    if name not in recipe_names():
        raise ConfigError(
            f"a recipe among {', '.join(recipe_names())}",
            repr(name),
            "recipe",
            "choose one of these, or write a TOML file of your own (lmtfast train --config FILE)",
        )
    text = resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    config = parse_config(text, where=f"recipe {name}")
    return from_mapping(config.to_dict() | changes, where=f"recipe {name}")
