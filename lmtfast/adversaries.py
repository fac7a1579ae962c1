# SPDX-License-Identifier: MIT
"""L2 attacks of foolbox and of the Adversarial Robustness Toolbox (ART) behind one signature."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmtfast.errors import ArgumentError, MissingDependencyError
from lmtfast.judgement import CHANGED, KEPT, Verdicts

# Attacks on the cross-entropy lose their gradient where a logit leads by more than this.
LARGEST_LEAD = 10.0
SMALLEST_IMAGE = 10  # below, Square's tiles vanish


class Victim(nn.Module):
    """The model as attacks see it: float32 in and out, logits scaled, copies of its weights.

    The module is called with the copies and hidden from attacks, which clear gradients and modes of
    what they see. A constant factor moves no boundary, and keeps losses from saturating.

    Args:
        model: The certified network.
        lead: Largest lead of a logit at the attacked inputs.
        box: Smallest and largest input an attack may use.
        classes: Number of logits.
        input_shape: Shape of one input.
    """

    def __init__(
        self,
        model: nn.Module,
        lead: float,
        box: tuple[float, float],
        classes: int,
        input_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self._hidden = (model,)
        # Every slot of every module object once: functional_call puts back no slot given twice.
        self._tensors = {
            f"{path}.{name}".lstrip("."): tensor.detach().clone()
            for path, module in model.named_modules()
            for name, tensor in [
                *module.named_parameters(recurse=False, remove_duplicate=False),
                *module.named_buffers(recurse=False, remove_duplicate=False),
            ]
        }
        weight = next((t for t in self._tensors.values() if t.is_floating_point()), None)
        self.dtype = torch.float32 if weight is None else weight.dtype
        self.device = torch.device("cpu") if weight is None else weight.device
        self.factor = LARGEST_LEAD / lead if lead > LARGEST_LEAD else 1.0
        self.box, self.classes, self.input_shape = box, classes, input_shape
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = functional_call(
            self._hidden[0], self._tensors, (x.to(self.dtype),), tie_weights=False
        )
        return (logits * self.factor).to(torch.float32)

    def glance(self, points: Tensor, classes: Tensor) -> Verdicts:
        """Classes as float32 logits show them: fast, and no proof. Results on the CPU."""
        with torch.no_grad():
            logits = self(points.to(self.device, torch.float32)).cpu().double()
        own = classes[:, None]
        lead = logits - logits.gather(1, own)
        best = lead.scatter(1, own, -math.inf).nan_to_num(-math.inf, math.inf, -math.inf).max(1)
        status = torch.where(best.values > 0, CHANGED, KEPT)
        return Verdicts(status, best.values, best.indices)

    def gradient(self, points: Tensor, classes: Tensor, rivals: Tensor) -> Tensor:
        """Gradient of logit ``rivals`` minus logit ``classes``, ``(N, ...)``."""
        with torch.enable_grad():
            x = points.to(self.device, torch.float32).requires_grad_()
            logits = self(x)
            rows = torch.arange(len(x), device=x.device)
            difference = logits[rows, rivals.to(x.device)] - logits[rows, classes.to(x.device)]
            (result,) = torch.autograd.grad(difference.sum(), x)
        return result


# victim, inputs, classes, eps (budgeted attacks), starting points (attacks that take them)
Run = Callable[[Victim, Tensor, Tensor, float, Tensor], Tensor]


@dataclass(frozen=True)
class Adversary:
    """One attack.

    Attributes:
        name: How reports call it.
        run: ``run(victim, x, classes, eps, start)`` returns points ``(N, ...)``; they need not be
            of another class. ``x`` and ``start`` are float32 on the victim's device.
        library: Package it comes from, for the report.
        slow: Whether only some of the inputs are attacked.
        budgeted: Whether it searches a ball of radius ``eps``, rather than for the closest point.
        started: Whether ``start`` must hold points of another class; others are left out.
        settings: Its settings, for the report.
        refuses: Why it cannot attack inputs of a shape, or an empty string.
    """

    name: str
    run: Run
    library: str = ""
    slow: bool = False
    budgeted: bool = False
    started: bool = False
    settings: str = ""
    refuses: Callable[[tuple[int, ...]], str] = lambda shape: ""


def _package(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            package, f"not importable ({error})", "lmtfast.attack", 'pip install "lmtfast[attack]"'
        ) from error


def _foolbox(kind: str, **settings: Any) -> Run:
    def run(victim: Victim, x: Tensor, classes: Tensor, eps: float, start: Tensor) -> Tensor:
        foolbox = _package("foolbox", "foolbox")
        target = foolbox.PyTorchModel(victim, bounds=victim.box, device=victim.device)
        goal = foolbox.criteria.Misclassification(classes)
        attack = getattr(foolbox.attacks, kind)(**settings)
        if kind == "BoundaryAttack":
            result = attack.run(target, x, goal, starting_points=start)
        elif isinstance(attack, foolbox.attacks.base.FixedEpsilonAttack):
            result = attack.run(target, x, goal, epsilon=eps)
        else:
            result = attack.run(target, x, goal)
        return result

    return run


def _art(kind: str, **settings: Any) -> Run:
    def run(victim: Victim, x: Tensor, classes: Tensor, eps: float, start: Tensor) -> Tensor:
        name = "adversarial-robustness-toolbox"
        estimators = _package(name, "art.estimators.classification")
        target = estimators.PyTorchClassifier(
            model=victim, loss=nn.CrossEntropyLoss(), input_shape=victim.input_shape,
            nb_classes=victim.classes, clip_values=victim.box,
            device_type="gpu" if victim.device.type == "cuda" else "cpu",
        )  # fmt: skip
        options = {"norm": 2, "eps": eps, "batch_size": len(x), "verbose": False, **settings}
        if kind == "AutoProjectedGradientDescent":
            options["eps_step"] = 2 * eps  # the first step of APGD's schedule
        attack = getattr(_package(name, "art.attacks.evasion"), kind)(target, **options)
        # Square divides by zero where a window holds no change; what is not finite is dropped.
        with np.errstate(all="ignore"):
            found = attack.generate(x.cpu().numpy().copy(), y=classes.cpu().numpy())
        return torch.from_numpy(found)

    return run


def _square_refuses(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 and shape[1] == shape[2] >= SMALLEST_IMAGE:
        return ""
    return f"needs square images of at least {SMALLEST_IMAGE} pixels a side, not {shape}"


def _described(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _adversary(
    name: str, library: str, kind: str, settings: dict[str, Any], **flags: Any
) -> Adversary:
    make = _foolbox if library == "foolbox" else _art
    return Adversary(name, make(kind, **settings), library, settings=_described(settings), **flags)


ADVERSARIES: dict[str, Adversary] = {
    a.name: a
    for a in (
        _adversary("deepfool", "foolbox", "L2DeepFoolAttack", {"steps": 50, "overshoot": 0.02}),
        _adversary("ddn", "foolbox", "DDNAttack", {"steps": 50}),
        _adversary("pgd", "foolbox", "L2ProjectedGradientDescentAttack",
                   {"steps": 30, "rel_stepsize": 0.1}, budgeted=True),
        _adversary("cw", "foolbox", "L2CarliniWagnerAttack",
                   {"binary_search_steps": 6, "steps": 100, "stepsize": 0.02, "initial_const": 0.1},
                   slow=True),
        _adversary("apgd", "art", "AutoProjectedGradientDescent",
                   {"max_iter": 50, "nb_random_init": 1, "loss_type": "cross_entropy"},
                   slow=True, budgeted=True),
        _adversary("square", "art", "SquareAttack", {"max_iter": 300, "p_init": 0.3},
                   slow=True, budgeted=True, refuses=_square_refuses),
        _adversary("boundary", "foolbox", "BoundaryAttack", {"steps": 500},
                   slow=True, started=True),
    )
}  # fmt: skip


def choose(
    names: Sequence[str | Adversary] | None,
) -> tuple[list[Adversary], list[tuple[str, str]]]:
    """The adversaries to run, and those left out with the reason.

    Without names: all of foolbox's, which must be installed, and those of ART where it is.

    Raises:
        MissingDependencyError: A library that is needed is not installed.
        ArgumentError: A name that no attack has, or no attack at all.
    """
    if names is not None:
        unknown = [n for n in names if isinstance(n, str) and n not in ADVERSARIES]
        if unknown or not names:
            raise ArgumentError(
                f"attacks among {', '.join(ADVERSARIES)}", repr(unknown or "none"),
                "attack(attacks)", "choose from these, or pass an Adversary of your own",
            )  # fmt: skip
        chosen = [ADVERSARIES[n] if isinstance(n, str) else n for n in names]
        for adversary in chosen:
            _require(adversary)
        return chosen, []
    chosen, missing = [], []
    for adversary in ADVERSARIES.values():
        try:
            _require(adversary)
            chosen.append(adversary)
        except MissingDependencyError as error:
            if adversary.library != "art":
                raise
            missing.append((adversary.name, f"{error.expected} is {error.got}"))
    return chosen, missing


def _require(adversary: Adversary) -> None:
    if adversary.library == "foolbox":
        _package("foolbox", "foolbox")
    elif adversary.library == "art":
        # Another package is called art as well.
        _package("adversarial-robustness-toolbox", "art.attacks.evasion")


@contextmanager
def fixed_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator that attacks draw from, and put the old states back."""
    plain, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(array)  # noqa: NPY002
