# SPDX-License-Identifier: MIT
"""The training loop: plain cross-entropy, or the margin loss with the network's Lipschitz bound."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from lmtfast.bound import LipschitzBound
from lmtfast.checkpoint import (
    Checkpoint,
    check_resumable,
    has_checkpoint,
    load_checkpoint,
    load_tensors,
    optimizer_tensors,
    prune_checkpoints,
    restore_optimizer,
    save_checkpoint,
)
from lmtfast.config import TrainConfig
from lmtfast.data import Dataset, batches
from lmtfast.errors import ConfigError, NonFiniteError
from lmtfast.estimation import NetworkBound
from lmtfast.files import write_atomically, writing
from lmtfast.losses import margin_cross_entropy
from lmtfast.models import build_model

EVALUATION_BATCH = 1000
FILES = ("config.json", "history.csv", "losses.csv")  # beside the checkpoints

_log = logging.getLogger(__name__)


class Progress(Protocol):
    """Called after every ``log_every`` steps, and after every epoch with its row of the history."""

    def __call__(self, step: int, steps: int, row: Mapping[str, Any]) -> None:
        """``step`` of ``steps`` optimiser steps are done; ``row`` holds the newest figures."""


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind.

    Args:
        model: The trained network, in evaluation mode.
        config: The configuration of the run.
        history: One mapping per epoch.
        losses: The loss of every step, float32, on the CPU.
        seconds: Wall-clock seconds of this call.
        checkpoint: The last checkpoint file, or None if nothing was written.
    """

    model: nn.Module
    config: TrainConfig
    history: list[dict[str, Any]]
    losses: torch.Tensor
    seconds: float
    checkpoint: Path | None


def train(
    config: TrainConfig,
    data: Dataset,
    *,
    progress: Progress | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    allow_previous: bool = False,
) -> TrainResult:
    r"""Train a network as a configuration says.

    ``method = "lmt"`` minimises :math:`\mathrm{CE}` on logits whose rivals are raised by
    :math:`\varepsilon\,L\,\|w_j - w_t\|`, with one power-iteration step of the bound per training
    step.

    Args:
        config: The run; see :class:`lmtfast.config.TrainConfig`.
        data: Inputs and classes; moved to ``config.device`` once.
        progress: Called every ``config.log_every`` steps and after every epoch.
        out: Directory for checkpoints (the last two are kept), ``history.csv``, ``losses.csv`` and
            ``config.json``; nothing is written without it.
        resume: Continue from the newest checkpoint in ``out``. On the CPU, with the same number of
            threads, the loss curve is then the one of an uninterrupted run, bit for bit.
        allow_previous: With ``resume``: if the newest checkpoint is damaged, continue from the one
            before.

    Returns:
        The trained network with its history.

    Raises:
        NonFiniteError: The loss became NaN or infinite; the message names the last good checkpoint.
        ConfigError: ``out`` holds another run, or the checkpoint does not belong to this one.
        UnsupportedLayerError: The model has a layer without a Lipschitz rule (``"lmt"`` only).

    Guarantee:
        None. The bound used while training is an estimate; use :func:`lmtfast.certify` on the
        result.

    Source:
        Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Algorithms 1 and 2.

    Example:
        >>> from lmtfast.data import load_dataset
        >>> from lmtfast.recipes import load_recipe
        >>> config = load_recipe("digits-lmt", epochs=1)
        >>> result = train(config, load_dataset("digits"))
        >>> result.history[-1]["test_accuracy"] > 0.5
        True
    """
    started = time.perf_counter()
    directory = None if out is None else Path(out)
    if directory is not None and not resume and has_checkpoint(directory):
        raise ConfigError(
            "a directory without checkpoints",
            "an earlier run",
            str(directory),
            "pass --resume, or another directory",
        )
    device = torch.device(config.device)
    with _seeded(config.seed, device):
        run = _Run(config, data, device)
        if resume:
            if directory is None:
                raise ConfigError(
                    "a directory to resume from", "none", "out", "pass out=DIR (--out)"
                )
            run.restore(load_checkpoint(directory, allow_previous=allow_previous))
        _log.info("training %s on %s: %s", config.model, data.name, config.canonical())
        if directory is not None:
            with writing(directory):
                directory.mkdir(parents=True, exist_ok=True)
                for name in (*FILES, "epoch-*.safetensors"):  # of a run that was killed
                    for leftover in directory.glob(f".{name}.*.tmp"):
                        leftover.unlink()
                prune_checkpoints(directory)
            write_atomically(directory / "config.json", f"{config.canonical()}\n".encode())
            run.write_tables(directory)  # a run that was stopped may have left older ones
        while run.epoch < config.epochs:
            run.one_epoch(progress)
            if directory is not None:
                run.saved = save_checkpoint(directory, run.checkpoint())
                run.write_tables(directory)
    seconds = time.perf_counter() - started
    return TrainResult(
        run.model.eval(), config, run.history, torch.tensor(run.losses), seconds, run.saved
    )


class _Run:
    """The mutable state of a run: everything a checkpoint holds."""

    def __init__(self, config: TrainConfig, data: Dataset, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        self.x, self.y = data.x_train.to(device), data.y_train.to(device)
        self.x_test, self.y_test = data.x_test.to(device), data.y_test.to(device)
        self.model = build_model(
            config.model,
            input_shape=data.input_shape,
            classes=data.classes,
            options=config.model_options,
        ).to(device)
        self.bound = self._network_bound() if config.method == "lmt" else None
        self.names: dict[torch.Tensor, str] = {p: n for n, p in self.model.named_parameters()}
        self.optimizer = _optimizer(config, list(self.model.parameters()), device)
        self.steps_per_epoch = math.ceil(len(self.x) / config.batch_size)
        self.epoch = 0
        self.losses: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.saved: Path | None = None

    def _network_bound(self) -> NetworkBound:
        bound = NetworkBound(
            self.model,
            self.data.input_shape,
            engine=self.config.engine,
            batch_norm=self.config.batch_norm,
        )
        return bound.to(self.device)

    def one_epoch(self, progress: Progress | None) -> None:
        config, began = self.config, time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.epoch)
        pending: list[torch.Tensor] = []
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        eps = 0.0
        order = batches(
            self.x, self.y, batch_size=config.batch_size, seed=config.seed, epoch=self.epoch
        )
        for index, (x, y) in enumerate(order, start=1):
            eps = config.eps_at(self.epoch + (index - 1) / self.steps_per_epoch)
            logits = self.model(x)
            loss = self._loss(logits, y, eps)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            pending.append(loss.detach())
            correct += (logits.detach().argmax(1) == y).sum()
            if len(pending) == config.log_every or index == self.steps_per_epoch:
                self._fetch(pending)
                if progress is not None:
                    progress(
                        len(self.losses),
                        config.epochs * self.steps_per_epoch,
                        {"loss": self.losses[-1]},
                    )
        self.epoch += 1
        epoch_losses = self.losses[-self.steps_per_epoch :]
        row = {
            "epoch": self.epoch,
            "lr": config.lr_at(self.epoch - 1),
            "eps": eps if self.bound is not None else 0.0,
            "train_loss": sum(epoch_losses) / len(epoch_losses),
            "train_accuracy": int(correct) / len(self.x),
            **self._evaluate(),
            "seconds": time.perf_counter() - began,
        }
        self.history.append(row)
        _log.info("epoch %d: %s", self.epoch, row)
        if progress is not None:
            progress(len(self.losses), config.epochs * self.steps_per_epoch, row)

    def _loss(self, logits: torch.Tensor, y: torch.Tensor, eps: float) -> torch.Tensor:
        if self.bound is None:
            return functional.cross_entropy(logits, y)
        if self.config.power_steps > 1:
            with torch.no_grad():
                for _ in range(self.config.power_steps - 1):
                    self.bound()
        return margin_cross_entropy(
            logits,
            y,
            self.bound(),
            eps=eps,
            scaling=self.config.scaling,
            trades_weight=self.config.trades_weight,
        )

    def _fetch(self, pending: list[torch.Tensor]) -> None:
        """Move the waiting losses to the host in one transfer; stop if one is not finite."""
        values = torch.stack(pending).tolist()
        pending.clear()
        bad = next((i for i, v in enumerate(values) if not math.isfinite(v)), None)
        if bad is not None:
            step = len(self.losses) + bad + 1
            raise NonFiniteError(
                "a finite training loss",
                f"{values[bad]} at step {step} (epoch {self.epoch + 1})",
                "train",
                "lower lr or eps; the last good checkpoint is "
                f"{self.saved or 'none, nothing was saved'}",
            )
        self.losses.extend(values)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float | None]:
        """Test accuracy, and what the estimate of the bound says about the median radius."""
        self.model.eval()
        logits = torch.cat([self.model(part) for part in self.x_test.split(EVALUATION_BATCH)])
        accuracy = (logits.argmax(1) == self.y_test).double().mean()
        row: dict[str, float | None] = {"test_accuracy": float(accuracy)}
        if self.bound is not None:
            estimate = self.bound(update=False)
            scale = estimate.total if estimate.head_weight is None else estimate.features
            row["bound_estimate"] = float(scale)
            row["radius_estimate"] = float(radius_estimate(logits, self.y_test, estimate).median())
        return row

    def checkpoint(self) -> Checkpoint:
        tensors = {f"model/{n}": t for n, t in self.model.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer, self.names)
        if self.bound is not None:
            tensors |= {f"bound/{n}": t for n, t in self.bound.state_dict().items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float32)
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(
            config=self.config,
            epoch=self.epoch,
            step=len(self.losses),
            input_shape=self.data.input_shape,
            classes=self.data.classes,
            dataset=self.data.name,
            dataset_digest=self.data.digest,
            history=self.history,
            tensors=tensors,
        )

    def write_tables(self, directory: Path) -> None:
        """The history, and the mean loss of each ``log_every`` steps."""
        if self.history:
            names = list(self.history[0])
            rows = [[row.get(n) for n in names] for row in self.history]
            _write_table(directory / "history.csv", [names, *rows])
            every = self.config.log_every
            starts = range(0, len(self.losses), every)
            parts = [self.losses[start : start + every] for start in starts]
            means = [(s + len(p), sum(p) / len(p)) for s, p in zip(starts, parts, strict=True)]
            _write_table(directory / "losses.csv", [("step", "mean_loss"), *means])

    def restore(self, saved: Checkpoint) -> None:
        check_resumable(saved, self.config, digest=self.data.digest)
        ours, theirs = (
            f"inputs {d.input_shape} and {d.classes} classes" for d in (self.data, saved)
        )
        if ours != theirs:
            raise ConfigError(ours, theirs, str(saved.path), "resume on the data it began with")
        load_tensors(self.model, saved.group("model"), where=f"{saved.path}: model")
        if self.bound is not None:
            load_tensors(self.bound, saved.group("bound"), where=f"{saved.path}: bound")
        state = saved.group("optimizer")
        restore_optimizer(self.optimizer, self.names.values(), state, where=str(saved.path))
        self.epoch, self.history, self.saved = saved.epoch, list(saved.history), saved.path
        try:
            losses, states = saved.tensors["losses"], saved.group("rng")
            fits = losses.shape == (saved.step,) and losses.dtype == torch.float32
            fits = fits and states["cpu"].shape == torch.get_rng_state().shape
            if not fits or saved.step != self.epoch * self.steps_per_epoch:
                raise ValueError(f"{tuple(losses.shape)} losses after {saved.step} steps")
            self.losses = losses.tolist()
            torch.set_rng_state(states["cpu"])
            if self.device.type == "cuda" and "cuda" in states:
                torch.cuda.set_rng_state(states["cuda"], self.device)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                "the losses and the generator's state of a run",
                f"{type(error).__name__}: {error}",
                str(saved.path),
                "delete the file, or resume from the one before it (--allow-previous)",
            ) from error


def radius_estimate(
    logits: torch.Tensor, target: torch.Tensor, bound: LipschitzBound
) -> torch.Tensor:
    """Radius ``(N,)`` if the estimate were a bound; zero where the prediction is wrong."""
    pairs = bound.pair_norms(torch.arange(logits.shape[1], device=logits.device))  # (K, K)
    scale = bound.total if bound.head_weight is None else bound.features
    gaps = logits.gather(1, target[:, None]) - logits  # (N, K)
    ratios = gaps / (scale * pairs[target])
    ratios.scatter_(1, target[:, None], torch.inf)
    return ratios.amin(1).clamp_min(0.0)


def _optimizer(
    config: TrainConfig, parameters: list[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    # The fused update is one call for all parameters; at this batch size the loop is bound by call
    # overhead.
    fused = device.type in ("cpu", "cuda") and all(p.dtype == torch.float32 for p in parameters)
    if config.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused
        )
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0.0,
        weight_decay=config.weight_decay,
        fused=fused,
    )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch for the run and give the caller's generator back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _write_table(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_atomically(path, text.getvalue().encode())
