# SPDX-License-Identifier: MIT
"""The attack cross-check: strong L2 attacks against every radius of a certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmtfast.adversaries import Adversary, Victim, choose, fixed_seed
from lmtfast.attack_report import AttackReport, AttackRow, Violation
from lmtfast.certificate import Certificate
from lmtfast.errors import ArgumentError, CertificateError
from lmtfast.guarantee import check_certifiable
from lmtfast.judgement import CHANGED, KEPT, UNDECIDED, Judge, along, inside, lengths
from lmtfast.polish import polish
from lmtfast.samples import Samples
from lmtfast.weights import named_tensors, weights_sha256

SLOW_INPUTS = 1000
BATCH = 250
# A budgeted attack searches the certified ball, then one this much smaller than the best so far.
SHRINK = 0.97
# A starting point is this much farther than the closest found, so that float32 sees its class too.
START = 1.05
# Points this much farther than the closest found are still polished; another direction may win.
WORTH = 1.1
POLISH_ROUNDS = 3
ITSELF = "the input itself"

Progress = Callable[[str, int, int], None]


def attack(
    model: nn.Module,
    certificate: Certificate,
    data: Any,
    *,
    attacks: Sequence[str | Adversary] | None = None,
    slow_inputs: int = SLOW_INPUTS,
    seed: int = 0,
    progress: Progress | None = None,
) -> AttackReport:
    """Attack every input of a certificate, and judge whether a radius is broken.

    Attacks run in float32 on a copy of the model and are believed in nothing: a point counts when
    the enclosure of the exact logits proves that its class differs, and it breaks a radius when the
    exact rational distance of the stored float64 point is at most the radius. In between, a polish
    brings every point to the boundary.

    Args:
        model: The certified network, in eval mode.
        certificate: Its certificate; ``label`` is not used, radii speak of the predicted class.
        data: The certified inputs in the same order, in any form :func:`lmtfast.certify` takes.
        attacks: Names among ``deepfool``, ``ddn``, ``pgd``, ``cw``, ``boundary`` (foolbox),
            ``apgd``, ``square`` (ART), or :class:`lmtfast.adversaries.Adversary`. By default all of
            foolbox's, and those of ART where it is installed.
        slow_inputs: How many inputs ``cw``, ``apgd``, ``square`` and ``boundary`` attack, spread
            evenly.
        seed: Of all random draws.
        progress: Called as ``progress(attack, done, total)``.

    Returns:
        The report; :meth:`AttackReport.check` raises if a radius was broken.

    Raises:
        MissingDependencyError: A library that is needed is not installed.
        CertificateError: The certificate is not of this model, or of other inputs.
        ArgumentError: An unknown attack, or a negative ``slow_inputs``.
        TrainModeError, ShapeError, DtypeError, InputDomainError: As :func:`lmtfast.certify`.

    Guarantee:
        Every reported violation contradicts the certificate, under its own assumptions. A report
        without violations proves nothing; it bounds from above how far radii could be raised.

    Source:
        The attacks: Moosavi-Dezfooli et al. (2016), DeepFool; Carlini, Wagner (2017); Madry et al.
        (2018), PGD; Brendel et al. (2018), boundary; Rony et al. (2019), DDN; Andriushchenko et al.
        (2020), Square; Croce, Hein (2020), APGD.

    Example:
        >>> import lmtfast as lf
        >>> layer = nn.Linear(2, 2).eval()
        >>> x = torch.rand(3, 2)
        >>> certificate = lf.certify(layer, x, input_shape=(2,), input_range=(0.0, 1.0))
        >>> report = lf.attack(layer, certificate, x)  # doctest: +SKIP
        >>> report.check()  # doctest: +SKIP
    """
    adversaries, skipped = choose(attacks)
    if slow_inputs < 0:
        raise ArgumentError(
            "a number of inputs of at least 0", repr(slow_inputs), "attack(slow_inputs)",
            "pass 0 to leave the slow attacks out",
        )  # fmt: skip
    campaign = Campaign(model, certificate, data, seed)
    reasons = dict(skipped)
    rows = []
    for adversary in adversaries:
        reason = adversary.refuses(certificate.input_shape)
        if reason or (adversary.slow and slow_inputs == 0):
            reasons[adversary.name] = reason or "slow_inputs is 0"
        else:
            limit = slow_inputs if adversary.slow else certificate.n_total
            rows.append(campaign.run(adversary, limit, progress))
    return campaign.report(rows, reasons)


class Campaign:
    """The closest change of class found so far for every input, and what it takes to improve it.

    Args:
        model, certificate, data, seed: As for :func:`attack`.
    """

    def __init__(self, model: nn.Module, certificate: Certificate, data: Any, seed: int) -> None:
        check_certifiable(model)
        if weights_sha256(named_tensors(model)) != certificate.weights_sha256:
            raise CertificateError(
                "a certificate of this network", "one of other weights (another SHA-256)",
                "attack(certificate)", "attack the network that was certified",
            )  # fmt: skip
        self.certificate, self.seed = certificate, seed
        norms = {name: norm for name, _, norm in certificate.operators}
        self.judge = Judge(model, certificate.input_shape, norms)
        samples = Samples(
            data, certificate.input_shape, certificate.input_range, certificate.classes
        )
        parts = [x for x, _ in samples.chunks(BATCH)]
        empty = torch.zeros((0, *certificate.input_shape), dtype=torch.float64)
        self.x = torch.cat(parts) if parts else empty
        n = len(self.x)
        if n != certificate.n_total:
            raise CertificateError(
                f"the {certificate.n_total} certified inputs", f"{n} inputs", "attack(data)",
                "pass the inputs that were certified, in the same order",
            )  # fmt: skip
        self.radius = torch.tensor(certificate.prediction_radius)
        self.classes = torch.tensor(certificate.prediction)
        own = self.judge(self.x, self.classes)
        self.point = self.x.clone()
        self.distance = torch.where(own.status == CHANGED, 0.0, math.inf).double()
        self.found_by = [ITSELF if s == CHANGED else "" for s in own.status.tolist()]
        self.unsure = own.status == UNDECIDED
        self.unsure_point = self.x.clone()
        self.centre_open = self.unsure.clone()
        self.targets = torch.nonzero(own.status == KEPT)[:, 0]
        leads = -own.lead[self.targets]
        finite = leads[leads.isfinite()]
        self.box = self._box()
        self.victim = Victim(
            model, float(finite.max()) if len(finite) else 1.0, self.box, certificate.classes,
            certificate.input_shape,
        )  # fmt: skip

    def _box(self) -> tuple[float, float]:
        """The input range, widened so that it cuts no certified ball: radii know no range."""
        low, high = self.certificate.input_range
        finite = self.radius[self.radius.isfinite()]
        wide = max(high - low, 2.0 * float(finite.max()) if len(finite) else 0.0)
        return low - wide, high + wide

    def run(self, adversary: Adversary, limit: int, progress: Progress | None) -> AttackRow:
        """Run one attack on at most ``limit`` inputs, polish what it finds, keep the closest."""
        start = time.perf_counter()
        chosen = self.targets
        if adversary.started:
            chosen = chosen[self.distance[chosen].isfinite()]
        if limit < len(chosen):
            spread = np.linspace(0, len(chosen) - 1, limit).round().astype(np.int64)
            chosen = chosen[torch.from_numpy(spread)]
        raw = torch.full((len(self.x),), math.inf).double()
        attacked = torch.zeros(len(self.x), dtype=torch.bool)
        for stage in range(2 if adversary.budgeted else 1):
            done = 0
            for batch, eps in self._batches(adversary, chosen, stage):
                attacked[batch] = True
                self._attack(adversary, batch, eps, raw)
                done += len(batch)
                if progress is not None:
                    progress(adversary.name, done, len(chosen))
        found = raw[raw.isfinite()]
        return AttackRow(
            adversary.name, adversary.library, adversary.settings, int(attacked.sum()),
            len(found), 0, float(found.median()) if len(found) else math.nan,
            time.perf_counter() - start,
        )  # fmt: skip

    def _batches(
        self, adversary: Adversary, chosen: Tensor, stage: int
    ) -> Iterator[tuple[Tensor, float]]:
        """Batches of inputs, of similar budgets where the attack has one."""
        if not adversary.budgeted:
            yield from ((batch, math.nan) for batch in chosen.split(BATCH) if len(batch))
            return
        radius, best = self.radius[chosen], self.distance[chosen]
        unknown = torch.where(radius > 0, 4 * radius, (self.box[1] - self.box[0]) / 12)
        budget = radius if stage == 0 else torch.where(best.isfinite(), SHRINK * best, unknown)
        usable = (budget > 0) & budget.isfinite()
        chosen, budget = chosen[usable], budget[usable]
        order = budget.argsort()
        for part in order.split(BATCH):
            if len(part):
                yield chosen[part], float(budget[part].max())

    def _attack(self, adversary: Adversary, batch: Tensor, eps: float, raw: Tensor) -> None:
        x, classes = self.x[batch], self.classes[batch]
        start = x
        if adversary.started:
            factor = torch.full((len(batch),), START).double()
            start = along(x, self.point[batch] - x, factor)
            ready = self.victim.glance(start, classes).changed
            batch, x, classes, start = batch[ready], x[ready], classes[ready], start[ready]
            if len(batch) == 0:
                return
        device = self.victim.device
        with fixed_seed(self.seed, device):
            points = adversary.run(
                self.victim, x.to(device, torch.float32), classes.to(device), eps,
                start.to(device, torch.float32),
            )  # fmt: skip
        points = points.detach().cpu().double()
        finite = points.flatten(1).isfinite().all(1)
        points = torch.where(finite.reshape(-1, *(1,) * (points.ndim - 1)), points, x)
        distance = lengths(points - x)
        changed = self.judge(points, classes).changed
        raw[batch[changed]] = torch.minimum(raw[batch[changed]], distance[changed])
        worth = changed & (distance < WORTH * self.distance[batch])
        self._keep(adversary.name, batch[worth], points[worth])

    def _keep(self, name: str, index: Tensor, far: Tensor) -> None:
        """Polish points of another class and keep those closer than what was known."""
        x, classes, radius = self.x[index], self.classes[index], self.radius[index]
        found = polish(
            self.judge, self.victim.glance, self.victim.gradient, x, far, classes, radius,
            rounds=POLISH_ROUNDS,
        )  # fmt: skip
        distance = lengths(found.points - x)
        closer = distance < self.distance[index]
        for i in torch.nonzero(closer)[:, 0].tolist():
            k = int(index[i])
            self.point[k], self.distance[k], self.found_by[k] = found.points[i], distance[i], name
        for i in torch.nonzero(found.open)[:, 0].tolist():
            k = int(index[i])
            self.unsure[k], self.unsure_point[k] = True, found.last[i]

    def report(self, rows: Sequence[AttackRow], skipped: dict[str, str]) -> AttackReport:
        """Judge the closest points exactly."""
        certificate = self.certificate
        broken = [
            k for k in range(len(self.x))
            if self.found_by[k] and inside(self.point[k], self.x[k], float(self.radius[k]))
        ]  # fmt: skip
        rivals = self.judge(self.point[broken], self.classes[broken]).rival.tolist()
        violations = tuple(
            Violation(
                k, self.found_by[k], float(self.distance[k]), float(self.radius[k]),
                int(self.classes[k]), rival, self.point[k].numpy().copy(),
            )
            for k, rival in zip(broken, rivals, strict=True)
        )  # fmt: skip
        undecided = tuple(
            k for k in torch.nonzero(self.unsure)[:, 0].tolist()
            if k not in broken
            and inside(self.unsure_point[k], self.x[k], float(self.radius[k]))
        )  # fmt: skip
        counted = [
            AttackRow(r.name, r.library, r.settings, r.inputs, r.changed,
                      self.found_by.count(r.name), r.median, r.seconds)
            for r in rows
        ]  # fmt: skip
        return AttackReport(
            radius=certificate.prediction_radius, distance=self.distance.numpy(),
            found_by=tuple(self.found_by),
            correct=None if certificate.label is None else np.asarray(certificate.correct),
            rows=tuple(counted), skipped=tuple(skipped.items()), violations=violations,
            undecided=undecided,
            unattacked=tuple(torch.nonzero(self.centre_open)[:, 0].tolist()),
            box=self.box, seed=self.seed,
        )  # fmt: skip
