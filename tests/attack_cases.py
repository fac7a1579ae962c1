# SPDX-License-Identifier: MIT
"""Attacks, nets of known radius and forged certificates for the tests of the cross-check."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import lmtfast as lf
from lmtfast.adversaries import Adversary


def needs(module):
    """Skip without the library; foolbox also fails to import where there is no git."""
    pytest.importorskip(module, reason="needs the extra attack", exc_type=ImportError)


def newton(victim, x, classes, eps, start):
    """One step to the closest linearised boundary, and half as far again."""
    rows, best = torch.arange(len(x)), None
    lead = victim(x) - victim(x)[rows, classes][:, None]
    for rival in range(victim.classes):
        rivals = torch.full_like(classes, rival)
        g = victim.gradient(x, classes, rivals)
        size = g.flatten(1).norm(dim=1).clamp_min(1e-30)
        far = torch.where(rivals == classes, torch.inf, -lead[:, rival] / size)
        step = (1.5 * far / size).reshape(-1, *(1,) * (x.ndim - 1)) * g
        closer = torch.ones_like(far, dtype=torch.bool) if best is None else far < best[0]
        keep = closer.reshape(-1, *(1,) * (x.ndim - 1))
        best = (far, step) if best is None else (
            torch.where(closer, far, best[0]), torch.where(keep, step, best[1])
        )  # fmt: skip
    return x + best[1].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


NEWTON = Adversary("newton", newton)


def mirror(victim, x, classes, eps, start):
    return -x


MIRROR = Adversary("mirror", mirror)


def linear_net(seed, depth=2):
    torch.manual_seed(seed)
    sizes = [9, *([7] * (depth - 1)), 5]
    layers = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    return nn.Sequential(*layers).eval()


def exact(tensor):
    return np.vectorize(Fraction, otypes=[object])(tensor.detach().double().numpy())


def exact_squared_radius(net, x):
    """Smallest squared distance to a boundary, and the class, in rational numbers."""
    matrix, shift = None, None
    for layer in net:
        w, b = exact(layer.weight), exact(layer.bias)
        matrix, shift = (w, b) if matrix is None else (w @ matrix, w @ shift + b)
    logits = matrix @ exact(x) + shift
    own = max(range(len(logits)), key=lambda k: logits[k])
    rivals = [k for k in range(len(logits)) if k != own]
    rows = {k: matrix[own] - matrix[k] for k in rivals}
    return min((logits[own] - logits[k]) ** 2 / (rows[k] @ rows[k]) for k in rivals), own


def certified(net, x, y=None):
    data = x if y is None else (x, y)
    shape = tuple(x.shape[1:])
    return lf.certify(net, data, input_shape=shape, input_range=(-1.0, 1.0))


def seeded(certificate, radius):
    """A forged certificate: only the radii differ."""
    return dataclasses.replace(certificate, prediction_radius=np.asarray(radius))


def signs():
    """f(x) = (x, -x): the boundary is 0, where both classes tie."""
    net = nn.Linear(1, 2, bias=False).eval()
    net.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    return net


def small_net():
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 4)
    )
    x, y = 2 * torch.rand(12, 1, 10, 10) - 1, torch.arange(12) % 4
    return net.eval(), x, y


def attacked_net():
    """A small network, its inputs and labels, its certificate, and what one attack found."""
    net, x, y = small_net()
    certificate = certified(net, x, y)
    return net, x, y, certificate, lf.attack(net, certificate, (x, y), attacks=[NEWTON])
