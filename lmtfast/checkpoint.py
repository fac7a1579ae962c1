# SPDX-License-Identifier: MIT
"""Training checkpoints: one safetensors file per epoch, written atomically, never a pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lmtfast.certificate_file import unique
from lmtfast.config import MAY_CHANGE_ON_RESUME, TrainConfig, from_mapping
from lmtfast.errors import ConfigError, MissingDependencyError
from lmtfast.files import write_atomically, writing
from lmtfast.models import MODELS, build_model

SCHEMA = 1
KEEP = 2
METADATA_KEY = "lmtfast"
CHECKSUM_KEY = "sha256"
MAX_HEADER_BYTES = 1 << 26
HEADER: Mapping[str, type] = {
    "classes": int, "config": dict, "dataset": str, "dataset_digest": str, "epoch": int,
    "history": list, "input_shape": list, "schema": int, "step": int,
}  # fmt: skip
# What the state of a parameter consists of: of its shape and dtype but for the number of steps.
OPTIMIZER_STATE: Mapping[type, set[str]] = {
    torch.optim.Adam: {"exp_avg", "exp_avg_sq", "step"},
    torch.optim.SGD: {"momentum_buffer"},
}
FILE_NAME = re.compile(r"epoch-(\d{6,})\.safetensors")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The complete state of a training run after a whole number of epochs.

    Args:
        config: The configuration of the run.
        epoch: Epochs completed.
        step: Optimiser steps completed.
        input_shape: Shape of one input.
        classes: Number of classes K.
        dataset: Name of the data set.
        dataset_digest: SHA-256 of its arrays; a resumed run must have the same.
        history: One mapping per completed epoch.
        tensors: ``model/*``, ``bound/*`` (power iterates), ``optimizer/<parameter>/*``, ``rng/*``
            and ``losses``.
        path: The file it was read from.

    Guarantee:
        What is loaded has the checksum of what was saved, or loading fails.

    Example:
        >>> load_checkpoint("runs/mnist-lmt").epoch  # doctest: +SKIP
        20
    """

    config: TrainConfig
    epoch: int
    step: int
    input_shape: tuple[int, ...]
    classes: int
    dataset: str
    dataset_digest: str
    history: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    path: Path | None = None

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose name starts with ``prefix/``, without the prefix."""
        start = f"{prefix}/"
        return {n[len(start) :]: t for n, t in self.tensors.items() if n.startswith(start)}

    def model(self, *, import_model: bool = False) -> nn.Module:
        """The trained network, in evaluation mode, on the CPU.

        Args:
            import_model: Allow a model that is not the library's own. The file then names a
                callable that is imported and called, so allow it only for files you trust.

        Raises:
            ConfigError: A foreign model without ``import_model``, or options or tensors that do
            not fit the network, which is never built larger than the tensors.
        """
        name, where = self.config.model, str(self.path or "checkpoint")
        if name not in MODELS and not import_model:
            raise ConfigError(
                f"a model of the library ({', '.join(sorted(MODELS))})",
                f"{name!r}, which would be imported and called",
                where,
                "if you trust the file, pass import_model=True (--import-model)",
            )
        tensors = self.group("model")
        entries = sum(t.numel() for t in tensors.values())
        allowance = _Allowance(entries) if name in MODELS else contextlib.nullcontext()
        with torch.random.fork_rng(devices=[]), allowance:
            model = build_model(
                name,
                input_shape=self.input_shape,
                classes=self.classes,
                options=self.config.model_options,
            )
        load_tensors(model, tensors, where=f"{where}: model")
        return model.eval()


class _Allowance(TorchFunctionMode):
    """Stops a network that grows beyond the tensors it is built for."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.left = entries

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.empty, torch.ones, torch.zeros):
            self.left -= math.prod(args[0] if isinstance(args[0], (tuple, list)) else args)
            if self.left < 0:
                raise ValueError("more weights than the checkpoint's tensors fit")
        return func(*args, **(kwargs or {}))


def load_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """``load_state_dict`` that neither casts nor leaves anything out.

    Raises:
        ConfigError: Names, shapes or dtypes differ from those of the module.
    """
    _check_fit(module, tensors, where)
    module.load_state_dict(dict(tensors))


def _check_fit(module: nn.Module, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    state = module.state_dict()
    wrong = sorted(state.keys() ^ tensors.keys())
    wrong += [n for n in state.keys() & tensors.keys() if not _alike(tensors[n], state[n])]
    if wrong:
        raise _misfit("tensors that fit the module", wrong, where)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _misfit(expected: str, wrong: list[str], where: str) -> ConfigError:
    names = ", ".join(wrong[:5])
    remedy = "use the code and the configuration the checkpoint was written with"
    return ConfigError(expected, f"others, or none, for {names}", where, remedy)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]
) -> dict[str, torch.Tensor]:
    """The optimiser's state tensors, named ``optimizer/<parameter>/<key>``."""
    return {
        f"optimizer/{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    where: str = "checkpoint",
) -> None:
    """Put back what :func:`optimizer_tensors` named; ``parameters`` in the optimiser's order.

    Raises:
        ConfigError: A tensor has no parameter, or another shape or dtype than its parameter. The
            fused update would read and write beyond its end.
    """
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        entries.setdefault(name, {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    keys, count = OPTIMIZER_STATE[type(optimizer)], torch.zeros(())
    state: dict[int, dict[str, torch.Tensor]] = {}
    wrong: list[str] = []
    for index, (name, parameter) in enumerate(zip(parameters, held, strict=True)):
        if found := entries.pop(name, None):
            state[index] = found
            fits = found.keys() == keys and all(
                _alike(t, count if k == "step" else parameter) for k, t in found.items()
            )
            wrong += [] if fits else [name]
    if wrong or entries:
        raise _misfit("the optimiser's state of every parameter", [*wrong, *entries], where)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_checkpoint(directory: str | Path, checkpoint: Checkpoint, *, keep: int = KEEP) -> Path:
    """Write a checkpoint atomically and delete all but the newest ``keep``.

    After a crash the name holds the whole file or does not exist.

    Returns:
        Path of the file, ``directory/epoch-NNNNNN.safetensors``.

    Raises:
        MissingDependencyError: safetensors is not installed.
        WriteError: The disk is full, or cannot be written to; older checkpoints are whole.
    """
    directory = Path(directory)
    # Clones, because safetensors refuses tensors that share memory, and a fused optimiser may keep
    # views.
    tensors = {n: t.detach().to("cpu").clone().contiguous() for n, t in checkpoint.tensors.items()}
    header = {
        "schema": SCHEMA,
        "config": checkpoint.config.to_dict(),
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "input_shape": list(checkpoint.input_shape),
        "classes": checkpoint.classes,
        "dataset": checkpoint.dataset,
        "dataset_digest": checkpoint.dataset_digest,
        "history": checkpoint.history,
    }
    text = json.dumps(header, sort_keys=True)
    metadata = {METADATA_KEY: text, CHECKSUM_KEY: _checksum(text, tensors)}
    path = directory / f"epoch-{checkpoint.epoch:06d}.safetensors"
    content = _safetensors().save(tensors, metadata)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        prune_checkpoints(directory, keep=keep)
    return path


def prune_checkpoints(directory: Path, *, keep: int = KEEP) -> None:
    """Delete all but the newest checkpoints of a directory."""
    for _, old in _checkpoint_files(directory)[:-keep]:
        old.unlink()


def load_checkpoint(path: str | Path, *, allow_previous: bool = False) -> Checkpoint:
    """Read a checkpoint file, or the newest one of a directory.

    Args:
        path: A file, or a directory :func:`save_checkpoint` wrote to.
        allow_previous: If the newest file of a directory is damaged, use the one before it and log
            a warning.

    Raises:
        ConfigError: No checkpoint, or a damaged one; the message names the file. It never falls
        back unasked.
        MissingDependencyError: safetensors is not installed.
    """
    path = Path(path)
    files = [f for _, f in _checkpoint_files(path)] if path.is_dir() else [path]
    if not files or not files[-1].is_file():
        raise ConfigError(
            "a checkpoint file, or a directory with epoch-NNNNNN.safetensors",
            "none",
            str(path),
            "check the path, or train first: lmtfast train --out DIR",
        )
    for file in reversed(files):
        try:
            return _read(file)
        except ConfigError as error:
            if not allow_previous or file is files[0]:
                raise
            _log.warning("%s Using the previous checkpoint, as asked.", error)
    raise AssertionError("unreachable: the loop returns or raises")


def newest_checkpoint(path: str | Path) -> Path:
    """The file itself, or the newest checkpoint file of a directory.

    Raises:
        ConfigError: A directory without a checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if not (files := _checkpoint_files(path)):
        raise ConfigError(
            "a directory with epoch-NNNNNN.safetensors", "none", str(path), "check the path"
        )
    return files[-1][1]


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a directory holds a checkpoint."""
    return Path(directory).is_dir() and bool(_checkpoint_files(Path(directory)))


def remove_checkpoints(directory: str | Path) -> None:
    """Delete every checkpoint of a directory, and nothing else in it."""
    for _, path in _checkpoint_files(Path(directory)) if Path(directory).is_dir() else ():
        path.unlink()


def check_resumable(checkpoint: Checkpoint, config: TrainConfig, *, digest: str) -> None:
    """Refuse to continue a run under another configuration or on other data.

    Raises:
        ConfigError: A field differs that changes what is computed, or the data differ.
    """
    old, new = checkpoint.config.to_dict(), config.to_dict()
    changed = [k for k in old if old[k] != new[k] and k not in MAY_CHANGE_ON_RESUME]
    where = str(checkpoint.path or "checkpoint")
    if changed:
        raise ConfigError(
            "the configuration of the checkpoint",
            ", ".join(f"{k} = {new[k]!r} instead of {old[k]!r}" for k in changed),
            where,
            "resume with the same configuration, or train into another directory",
        )
    if checkpoint.dataset_digest != digest:
        raise ConfigError(
            f"the data the run began with (sha256 {checkpoint.dataset_digest[:12]})",
            f"sha256 {digest[:12]}",
            where,
            "pass the same data, or train into another directory",
        )
    if checkpoint.epoch > config.epochs:
        raise ConfigError(
            f"at least {checkpoint.epoch} epochs",
            str(config.epochs),
            where,
            "raise epochs in the configuration",
        )


def _read(path: Path) -> Checkpoint:
    library = _safetensors()
    try:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        metadata = json.loads(raw[8 : 8 + length], object_pairs_hook=unique)["__metadata__"]
        tensors = library.load(raw)
        text = metadata[METADATA_KEY]
        if metadata[CHECKSUM_KEY] != _checksum(text, tensors):
            raise ValueError("its checksum does not match its contents")
        if any(t.dtype == torch.bool and (t.view(torch.uint8) > 1).any() for t in tensors.values()):
            raise ValueError("a truth value that is neither 0 nor 1")
        header = json.loads(text)
        if header["schema"] != SCHEMA:
            raise ValueError(f"it has schema {header['schema']}, this version reads {SCHEMA}")
        if json.dumps(header, sort_keys=True) != text or not _consistent(header):
            raise ValueError("a header that no training run writes")
        return Checkpoint(
            config=from_mapping(header["config"], where=f"{path}: config"),
            epoch=header["epoch"],
            step=header["step"],
            input_shape=tuple(header["input_shape"]),
            classes=header["classes"],
            dataset=header["dataset"],
            dataset_digest=header["dataset_digest"],
            history=header["history"],
            tensors=tensors,
            path=path,
        )
    except ConfigError:
        raise
    # safetensors raises its own exception type, which derives from Exception alone.
    except Exception as error:
        raise ConfigError(
            "an intact checkpoint",
            f"{type(error).__name__}: {error}",
            str(path),
            "delete the file, or ask for the one before it (allow_previous=True, --allow-previous)",
        ) from error


def _consistent(header: Mapping[str, Any]) -> bool:
    """Whether every field has its type, sizes are positive, and every epoch has its history."""
    if header.keys() != HEADER.keys() or any(type(header[k]) is not HEADER[k] for k in HEADER):
        return False
    sizes, history = [*header["input_shape"], header["classes"]], header["history"]
    return (
        all(type(n) is int and n > 0 for n in sizes)
        and header["step"] >= 0
        and len(history) == header["epoch"]
        and all(type(row) is dict for row in history)
    )


def _checkpoint_files(directory: Path) -> list[tuple[int, Path]]:
    matches = ((FILE_NAME.fullmatch(f.name), f) for f in directory.iterdir())
    return sorted((int(m[1]), f) for m, f in matches if m)


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch as library
    except ImportError as error:
        raise MissingDependencyError(
            "safetensors", "not installed", "lmtfast.checkpoint", 'pip install "lmtfast[cli]"'
        ) from error
    return library
