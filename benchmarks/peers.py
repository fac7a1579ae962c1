# SPDX-License-Identifier: MIT
"""How others estimate spectral norms in a training step, in plain PyTorch.

Written from the published methods. Every peer holds its own copy of the weights and keeps its
iterates warm. ``forward`` is one step without a gradient; ``gradient`` is one step, with the
gradient of the sum of the logarithms of the estimates added to every ``.grad``. Both return the
estimates in the order of ``names``.
"""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.networks import Layer


class Peer:
    """Weights with preallocated gradients, batch-norm gains, iterates, and a twin in float64."""

    # Whether the batch norm after a layer is part of its operator, as the method has it.
    folds_norm = True

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        self.source = model, layers
        self.layers = [x for x in layers if x.kind != "scale" or self.folds_norm]
        self.names = [x.name for x in self.layers]
        self.parameters: dict[str, Tensor] = {}
        self.variances: dict[str, Tensor] = {}
        for layer in self.layers:
            if layer.kind != "scale":
                self.parameters[layer.name] = model.get_parameter(f"{layer.name}.weight")
            norm = self.norm_of(layer)
            if norm is not None:
                module = model.get_submodule(norm)
                assert isinstance(module, nn.BatchNorm2d)
                assert module.running_var is not None
                self.parameters[norm] = module.weight
                self.variances[norm] = module.running_var + module.eps
        self.iterates = self.prepare()
        self.parameters = _leaves(self.parameters, torch.float32)

    def prepare(self) -> list[Tensor]:
        """The first iterates; a place to regroup the parameters."""
        return [self.start(layer) for layer in self.layers if layer.kind != "scale"]

    def start(self, layer: Layer) -> Tensor:
        """A Gaussian vector of unit length, beside the layer's weight."""
        generator = torch.Generator().manual_seed(sum(layer.name.encode()))
        x = torch.randn(1, *layer.in_shape, generator=generator)
        return (x / x.norm()).to(self.parameters[layer.name].device)

    def norm_of(self, layer: Layer) -> str | None:
        """Name of the batch norm that belongs to the layer's operator."""
        if not self.folds_norm:
            return None
        return layer.name if layer.kind == "scale" else layer.norm

    def gain(self, layer: Layer) -> Tensor | None:
        """The batch norm's factor per output channel."""
        norm = self.norm_of(layer)
        return None if norm is None else self.parameters[norm] * self.variances[norm].rsqrt()

    def image(self, layer: Layer, v: Tensor) -> Tensor:
        """``A v`` for one vector."""
        weight, gain = self.parameters[layer.name], self.gain(layer)
        if layer.kind == "linear":
            return F.linear(v, weight)
        u = F.conv2d(v, weight, None, layer.stride, layer.padding)
        return u if gain is None else u * gain[:, None, None]

    def read(self, result: Tensor) -> Tensor:
        return result

    def adjoint(self, layer: Layer, u: Tensor) -> Tensor:
        """``A^T u``, in the shape of the layer's input."""
        weight, gain = self.parameters[layer.name], self.gain(layer)
        if layer.kind == "linear":
            return u @ weight
        u = u if gain is None else u * gain[:, None, None]
        shape = layer.stride, layer.padding, layer.output_padding
        return F.conv_transpose2d(u, weight, None, *shape)

    def sigmas(self) -> Tensor:
        """Differentiable estimates; moves the iterates."""
        raise AssertionError("every peer estimates something")

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.sigmas()

    def gradient(self) -> Tensor:
        sigmas = self.sigmas()
        sigmas.log().sum().backward()
        return sigmas.detach()

    def clone(self) -> Peer:
        """Another instance with its own memory."""
        return type(self)(*self.source)

    def twin(self) -> Peer:
        """The same step in float64 from the same iterates, gradients at zero."""
        other = copy.copy(self)
        other.parameters = _leaves(self.parameters, torch.float64)
        other.variances = {name: t.double() for name, t in self.variances.items()}
        other.iterates = [v.detach().double() for v in self.iterates]
        return other


def _leaves(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {n: t.detach().to(dtype, copy=True).requires_grad_() for n, t in tensors.items()}
    for leaf in leaves.values():
        leaf.grad = torch.zeros_like(leaf)
    return leaves


def _without(peer: Peer, *methods: str) -> Peer:
    """The peer with its own methods instead of compiled ones, which are bound to the original."""
    for name in methods:
        delattr(peer, name)
    return peer


class PerLayer(Peer):
    """The leanest form: one convolution per layer, whose backward gives the adjoint as well.

    With a gradient, the next iterate is the gradient in the present one; without, it is one
    transposed convolution. Source: Tsuzuku, Sato, Sugiyama (2018), arXiv:1802.04034, Algorithm 2.
    """

    def norms(self, vectors: list[Tensor]) -> Tensor:
        """``||A v||`` per layer."""
        found, queue = [], iter(vectors)
        for layer in self.layers:
            if layer.kind == "scale":
                found.append(_largest(self.gain(layer)))
            else:
                found.append(self.image(layer, next(queue)).norm())
        return torch.stack(found)

    def step(self, vectors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``||A v||`` and ``A^T A v`` normalised, per layer."""
        found, moved, queue = [], [], iter(vectors)
        for layer in self.layers:
            if layer.kind == "scale":
                found.append(_largest(self.gain(layer)))
                continue
            u = self.image(layer, next(queue))
            back = self.adjoint(layer, u)
            found.append(u.norm())
            moved.append(back / back.norm())
        return torch.stack(found), moved

    def forward(self) -> Tensor:
        with torch.no_grad():
            sigmas, self.iterates = self.step(self.iterates)
        return sigmas

    def gradient(self) -> Tensor:
        vectors = [v.detach().requires_grad_() for v in self.iterates]
        sigmas = self.norms(vectors)
        sigmas.log().sum().backward()
        with torch.no_grad():
            backs = [v.grad for v in vectors if v.grad is not None]
            self.iterates = [back / back.norm() for back in backs]
        return sigmas.detach()


def _largest(gain: Tensor | None) -> Tensor:
    assert gain is not None
    return gain.abs().amax()


class CompiledPerLayer(PerLayer):
    """:class:`PerLayer` under ``torch.compile``: one graph per step."""

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        super().__init__(model, layers)
        self.norms = torch.compile(self.norms, dynamic=False)
        self.step = torch.compile(self.step, dynamic=False)

    def twin(self) -> Peer:
        return _without(super().twin(), "norms", "step")


class LiResNet(Peer):
    """Equal layers as one grouped convolution, ``n_iter`` iterations under autograd, from ones.

    A linear layer takes twice the iterations. Source: Hu, Zou, Wang, Leino, Fredrikson (2023),
    arXiv:2301.12549, and the authors' code.
    """

    folds_norm = False
    n_iter = 10

    def prepare(self) -> list[Tensor]:
        groups: dict[object, list[Layer]] = defaultdict(list)
        for layer in self.layers:
            groups[layer.geometry if layer.kind == "conv" else layer.name].append(layer)
        self.groups = list(groups.values())
        self.names = [layer.name for group in self.groups for layer in group]
        self.parameters = {
            group[0].name: torch.cat([self.parameters[x.name] for x in group])
            for group in self.groups
        }
        first = next(iter(self.parameters.values()))
        return [
            first.new_ones(1, len(g) * g[0].in_shape[0], *g[0].in_shape[1:]) for g in self.groups
        ]

    def sigmas(self) -> Tensor:
        found, moved = [], []
        for group, x in zip(self.groups, self.iterates, strict=True):
            layer, depth = group[0], len(group)
            weight = self.parameters[layer.name]
            if layer.kind == "linear":
                for _ in range(2 * self.n_iter):
                    x = F.normalize(F.linear(F.linear(x, weight), weight.T), dim=1)
                x = x.detach()
                image = F.linear(x, weight)
            else:
                for _ in range(self.n_iter):
                    u = F.conv2d(x, weight, None, layer.stride, layer.padding, groups=depth)
                    shape = layer.stride, layer.padding, layer.output_padding, depth
                    back = F.conv_transpose2d(u, weight, None, *shape)
                    x = F.normalize(back.reshape(depth, -1), dim=1).reshape(x.shape)
                x = x.detach()
                image = F.conv2d(x, weight, None, layer.stride, layer.padding, groups=depth)
            moved.append(x)
            found.append(image.reshape(depth, -1).norm(dim=1))
        self.iterates = moved
        return torch.cat(found)


class LiResNetOnce(LiResNet):
    """:class:`LiResNet` with one iteration per step, from iterates that a few steps have warmed.

    Ones are close to the null space of some layers, where float32 keeps few digits of an image.
    """

    n_iter = 1

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        super().__init__(model, layers)
        for _ in range(3):
            self.forward()


class CompiledLiResNet(LiResNet):
    """:class:`LiResNet` under ``torch.compile``."""

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        super().__init__(model, layers)
        self.sigmas = torch.compile(self.sigmas, dynamic=False)

    def twin(self) -> Peer:
        return _without(super().twin(), "sigmas")


class GloRo(Peer):
    """Five iterations per layer, each followed by a test on the host, none of them differentiated.

    The authors stop when the iterate moves by less than 1e-5 squared; weights that stand still, as
    here, would always stop at once, so the test is made but never met. Source: Leino, Wang,
    Fredrikson (2021), arXiv:2102.08452, and the authors' code (five is the trainer's default).
    """

    folds_norm = False
    n_iter = 5

    def sigmas(self) -> Tensor:
        found, moved = [], []
        for layer, x in zip(self.layers, self.iterates, strict=True):
            with torch.no_grad():
                for _ in range(self.n_iter):
                    last, x = x, self.adjoint(layer, self.image(layer, x))
                    x = x / x.norm()
                    if float((x - last).square().sum()) < 0.0:
                        break
            moved.append(x)
            found.append((self.image(layer, x).square().sum() / x.square().sum()).sqrt())
        self.iterates = moved
        return torch.stack(found)


class TorchSpectralNorm(Peer):
    """``torch.nn.utils.parametrizations.spectral_norm``: one iteration on the reshaped kernel.

    Not the norm of the convolution. A step reads every normalised weight, which is what the
    parametrization returns; with a gradient, a fixed one arrives in each.
    """

    folds_norm = False

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        super().__init__(model, layers)
        self.modules = []
        for name, weight in self.parameters.items():
            module = nn.Linear(1, 1, bias=False, device=weight.device)
            module.weight = nn.Parameter(weight.detach())
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sum(name.encode()))
                self.modules.append(parametrizations.spectral_norm(module))
        self._adopt()

    def prepare(self) -> list[Tensor]:
        return []

    def _adopt(self) -> None:
        originals = [m.parametrizations["weight"].original for m in self.modules]
        self.parameters = dict(zip(self.names, originals, strict=True))
        for leaf in originals:
            leaf.grad = torch.zeros_like(leaf)
        self.incoming = [torch.full_like(leaf, 1e-3) for leaf in originals]

    def _normalised(self) -> tuple[list[Tensor], Tensor]:
        weights = [module.weight for module in self.modules]
        # A ratio of two entries: the parametrization does not hand out its estimate.
        pairs = zip(self.parameters.values(), weights, strict=True)
        ratios = [a.detach().flatten()[0] / b.detach().flatten()[0] for a, b in pairs]
        return weights, torch.stack(ratios)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self._normalised()[1]

    def gradient(self) -> Tensor:
        weights, sigmas = self._normalised()
        torch.autograd.backward(weights, self.incoming)
        return sigmas

    def twin(self) -> Peer:
        other = copy.copy(self)
        other.modules = [copy.deepcopy(module).double() for module in self.modules]
        other._adopt()
        return other


class GramIteration(Peer):
    """Gram iteration over the frequencies of a circular convolution of the layer's size, stride 1.

    An upper bound in exact arithmetic of another operator than the zero-padded one. Source:
    Delattre, Barthelemy, Araujo, Allauzen (2023), arXiv:2305.16173, Algorithm 3.
    """

    folds_norm = False
    n_iter = 5

    def prepare(self) -> list[Tensor]:
        return []

    def estimate(self, layer: Layer) -> Tensor:
        weight = self.parameters[layer.name]
        if layer.kind == "linear":
            gram = weight[None]
        else:
            spectrum = torch.fft.rfft2(weight, s=layer.in_shape[1:])
            gram = spectrum.flatten(2).permute(2, 0, 1)
        if gram.shape[1] < gram.shape[2]:
            gram = gram.mT
        log_scale = torch.zeros_like(gram[:, 0, 0].real)
        for _ in range(self.n_iter):
            size = torch.linalg.matrix_norm(gram)
            gram = gram / size[:, None, None]
            log_scale = 2 * (log_scale + size.log())
            gram = gram.mH @ gram
        log_norms = (torch.linalg.matrix_norm(gram).log() + log_scale) / 2**self.n_iter
        return log_norms.exp().amax()

    def sigmas(self) -> Tensor:
        return torch.stack([self.estimate(layer) for layer in self.layers])

    def gradient(self) -> Tensor:
        found = []
        for layer in self.layers:
            # One backward per layer: the graphs of all layers together do not fit into memory.
            sigma = self.estimate(layer)
            sigma.log().backward()
            found.append(sigma.detach())
        return torch.stack(found)
