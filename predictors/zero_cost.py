"""Zero-cost proxies: how promising an untrained network looks, from one batch of images.

Every proxy is a function `(network, images, labels) -> float`, larger is better, and leaves the network, torch's random
state and everything else as it found them. Dropout is off; normalisation uses the batch's own statistics. The value
depends on the network's initial weights: two initialisations differ, and their mean ranks a little better than either.
Values are finite, whatever the network: what is said below of networks that carry no signal (as the NAS-Bench-201 cells
that cut the output off from the input) puts them below those that do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from search_spaces import Archs, SearchSpace, UserError, nearest, trace
from search_spaces.supernet import fit

ZeroCostProxy = Callable[[nn.Module, Tensor, Tensor], float]

_NORMALISATIONS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
# Added to the eigenvalues of a correlation matrix, as the authors do.
_JACOBIAN_SHIFT = 1e-5
# Distance between the two inputs of the Zen-score, as in its authors' code.
_ZEN_ALPHA = 0.01


def synflow(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Logarithm of the synaptic flow: the sum of |weight x gradient| over all weights.

    The gradient is that of the sum of the outputs for an image of ones, with every weight replaced by its absolute
    value, in double precision (Tanaka et al., NeurIPS 2020); without batch normalisation, as the score of a network of
    Abdelfattah et al. (ICLR 2021). The logarithm, which ranks the same, because the score multiplies over layers.
    A network without any flow has the logarithm of the smallest double, -708.4.
    """
    copied = deepcopy(network).double().eval()
    for module in copied.modules():
        if isinstance(module, _BatchNorm):
            module.forward = _identity  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.abs_()
    weights = _weights(copied)
    ones = torch.ones((1, *images.shape[1:]), dtype=torch.double, device=images.device)
    with _random_state():
        gradients = _gradients(_logits(copied, ones).sum(), weights)
    return _log(_saliency(weights, gradients))


def naswot(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Log-determinant of the kernel of activation codes: how well the network tells images apart (NASWOT).

    A code is the sign of every pre-activation, and the kernel counts for two images where their codes agree (Mellor et
    al., ICML 2021). For ReLU these are the linear regions of the paper; other activations (ReLU6, hard-swish, SiLU,
    GELU, ...) are read by the same sign. Where two images have one code, the determinant is zero: eigenvalues are
    taken for no smaller than the rounding error of the largest. A network without activations tells nothing apart: 0.
    """
    copied = _training(network)
    codes = _ActivationCodes(len(images))
    with torch.no_grad(), _random_state(), codes:
        copied(images)
    if not codes.kernel.any():
        return 0.0
    values = np.linalg.eigvalsh(codes.kernel.numpy())
    least = values[-1] * len(images) * np.finfo(float).eps
    return float(np.log(np.maximum(values, least)).sum())


def jacobian_covariance(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """How little correlated the gradients of the output with respect to single images are.

    Minus the sum of log(v + k) + 1 / (v + k) over the eigenvalues v of their correlation matrix, k = 1e-5 (the first
    version of Mellor et al., arXiv:2006.04647v1, and `jacob_cov` of Abdelfattah et al., ICLR 2021). A gradient that is
    zero, or the same everywhere, is taken to correlate with all others: with nothing else the least value there is.
    """
    copied = _training(network)
    images = images.clone().requires_grad_(True)
    with _random_state():
        (jacobian,) = _gradients(_logits(copied, images).sum(), [images])
    rows = jacobian.flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    norms = rows.norm(dim=1)
    alike = norms <= norms.max() * torch.finfo(images.dtype).eps
    correlation = (rows / norms.where(~alike, 1.0)[:, None]) @ (rows / norms.where(~alike, 1.0)[:, None]).T
    correlation[alike] = 1.0
    correlation[:, alike] = 1.0
    values = np.maximum(np.linalg.eigvalsh(correlation.cpu().numpy()), 0.0) + _JACOBIAN_SHIFT
    return float(-(np.log(values) + 1.0 / values).sum())


def grad_norm(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Sum over layers of the Euclidean norm of their weights' gradient of the cross-entropy (Abdelfattah et al., 2021).

    A layer that the output does not depend on counts zero.
    """
    return _norms(*_loss_gradients(network, images, labels))


def snip(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Connection sensitivity: the sum of |weight x gradient of the cross-entropy| over all weights.

    Saliency of Lee et al. (ICLR 2019), summed over the network as in Abdelfattah et al. (ICLR 2021). A layer that the
    output does not depend on counts zero.
    """
    return _saliency(*_loss_gradients(network, images, labels))


def zen(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Zen-score: how far the features move with the input, for Gaussian weights and Gaussian images.

    log E|f(x) - f(x + 0.01 e)| plus the sum over batch normalisations of the logarithm of the root of their mean batch
    variance (Lin et al., ICCV 2021, algorithm 1, with the sum of absolute differences of its authors' code); weights,
    x and e are standard normal, drawn from a fixed seed, and of `images` the shape alone matters. The features f are
    the last ones with more than one position: before global pooling. Shortcuts and squeeze-and-excitation stay in,
    where the authors take them out of their own space. The paper is about networks with batch normalisation; without,
    features overflow to the largest double. Where they do not move at all, the smallest one stands for their distance.
    """
    copied = _training(network)
    generator = torch.Generator().manual_seed(0)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(images.device)

    with torch.no_grad(), _random_state():
        for module in copied.modules():
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                module.weight.copy_(normal(module.weight.shape))
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, _NORMALISATIONS):
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.fill_(name == "weight")
        x = normal(images.shape)
        with _Variances(copied) as scale:
            features = _features(copied, x)
        moved = _features(copied, x + _ZEN_ALPHA * normal(images.shape))
        distance = (features - moved).double().abs().flatten(1).sum(1).mean()
    return _log(float(distance)) + scale.total


def params(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Number of parameters."""
    return float(sum(p.numel() for p in network.parameters()))


def macs(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Multiply-accumulates of one image."""
    return float(trace(network, images.shape[1:]).macs)


PROXIES: dict[str, ZeroCostProxy] = {
    "synflow": synflow,
    "naswot": naswot,
    "jacobian_covariance": jacobian_covariance,
    "grad_norm": grad_norm,
    "snip": snip,
    "zen": zen,
    "params": params,
    "macs": macs,
}


def score_network(
    network: nn.Module, images: Tensor, labels: Tensor, proxies: Sequence[str | ZeroCostProxy] = tuple(PROXIES)
) -> NDArray[np.float64]:
    """Several proxies of one network; those that need the same pass share it.

    Args:
        network: initialised, not trained; it stays as it is.
        images: `(batch, channels, height, width)` as the network takes them.
        labels: `(batch,)` int64.
        proxies: names of `PROXIES`, or functions of one's own.

    Returns:
        `(len(proxies),)` in their order.

    Raises:
        UserError: an unknown name.
    """
    gradients: tuple[list[Tensor], list[Tensor]] | None = None
    values = np.empty(len(proxies))
    for column, proxy in enumerate(proxies):
        if isinstance(proxy, str) and proxy not in PROXIES:
            raise UserError(f"unknown zero-cost proxy {proxy!r}. {nearest(proxy, PROXIES)}")
        if isinstance(proxy, str) and proxy in _OF_GRADIENTS:
            gradients = gradients or _loss_gradients(network, images, labels)
            values[column] = _OF_GRADIENTS[proxy](*gradients)
        else:
            values[column] = (PROXIES[proxy] if isinstance(proxy, str) else proxy)(network, images, labels)
    return values


def score_architecture(
    space: SearchSpace,
    arch: Archs,
    images: Tensor,
    labels: Tensor,
    proxies: Sequence[str | ZeroCostProxy] = tuple(PROXIES),
    *,
    seed: int = 0,
    initialisations: int = 1,
) -> NDArray[np.float64]:
    """Proxies of one architecture of a space, the mean over fresh initialisations.

    Args:
        arch: `(K,)`.
        images: `(batch, channels, height, width)`, resized to what the architecture takes.
        labels: `(batch,)` int64.
        proxies: names of `PROXIES`, or functions of one's own.
        seed: initialisation i is drawn from `seed + i`, whatever was asked before.

    Returns:
        `(len(proxies),)` in their order.
    """
    total = np.zeros(len(proxies))
    for start in range(initialisations):
        with _random_state(seed + start):
            network = space.build(arch).to(images.device)
        taken = fit(images, getattr(network, "input_shape", images.shape[1:]))
        total += score_network(network, taken, labels, proxies)
    return total / initialisations


def _identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _log(value: float) -> float:
    """Natural logarithm of what is not negative, between those of the smallest and the largest double."""
    limits = np.finfo(float)
    return float(np.log(np.clip(np.nan_to_num(value, nan=limits.max), limits.tiny, limits.max)))


def _training(network: nn.Module) -> nn.Module:
    """A copy that normalises by the batch's statistics and drops nothing."""
    copied = deepcopy(network).train()
    for module in copied.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    return copied


@contextmanager
def _random_state(seed: int = 0) -> Iterator[None]:
    """Torch's random state from a seed for a while: what networks draw (stochastic depth, say) is always the same."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    """The network's output: the first, of those that have several."""
    return next(leaf for leaf in tree_leaves(network(images)) if isinstance(leaf, Tensor))


def _weights(network: nn.Module) -> list[Tensor]:
    """The weights of convolutions, linear layers and attention: all that have two dimensions or more."""
    return [p for name, p in network.named_parameters() if p.dim() > 1 and name.endswith("weight")]


def _gradients(value: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar, zero where it does not depend on something at all."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in of]
    found = torch.autograd.grad(value, list(of), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(of, found, strict=True)]


def _loss_gradients(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and their gradients of the cross-entropy."""
    copied = _training(network).requires_grad_(True)
    weights = _weights(copied)
    with _random_state():
        loss = F.cross_entropy(_logits(copied, images), labels)
        return weights, _gradients(loss, weights)


def _norms(weights: list[Tensor], gradients: list[Tensor]) -> float:
    return sum(float(g.double().norm()) for g in gradients)


def _saliency(weights: list[Tensor], gradients: list[Tensor]) -> float:
    return sum(float((w.detach() * g).abs().sum(dtype=torch.double)) for w, g in zip(weights, gradients, strict=True))


_OF_GRADIENTS: dict[str, Callable[[list[Tensor], list[Tensor]], float]] = {"grad_norm": _norms, "snip": _saliency}


class _ActivationCodes(TorchDispatchMode):
    """Adds up, over all activations that run, in how many places the codes of two images agree.

    It sees operators, so that modules and functions are alike. Gates (sigmoid and hard-sigmoid) have no two sides.
    """

    NAMES = frozenset(
        {"relu", "hardtanh", "hardswish", "silu", "gelu", "mish", "leaky_relu", "elu", "_prelu_kernel", "tanh"}
    )

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.kernel = torch.zeros((batch, batch), dtype=torch.double)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2].removesuffix("_")
        rectifies = name in ("clamp", "clamp_min") and args[1:2] == (0,)  # other ways to write ReLU and ReLU6
        # Rows of a matrix may be the tokens of one image after another.
        if (name in self.NAMES or rectifies) and len(args[0]) % len(self.kernel) == 0:
            # With signs s of +1 and -1, two codes of n places agree in (n + s.s') / 2 of them.
            signs = (args[0].reshape(len(self.kernel), -1) > 0).to(torch.float32).mul_(2).sub_(1)
            self.kernel += ((signs @ signs.T).double() + signs.shape[1]).cpu() / 2
        return func(*args, **(kwargs or {}))


class _Variances:
    """While entered, adds up what batch normalisations divide by: the log of the root of each one's mean variance."""

    def __init__(self, network: nn.Module) -> None:
        self.total = 0.0
        self._norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]

    def __enter__(self) -> _Variances:
        self._hooks = [norm.register_forward_pre_hook(self._add) for norm in self._norms]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, norm: Any, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        variance = x.transpose(0, 1).flatten(1).var(1).mean()
        # What normalisation really divides by, where nothing varies.
        self.total += 0.5 * _log(max(float(variance), norm.eps))


class _LastFeatures(TorchDispatchMode):
    """Keeps the last tensor that has more than one position per channel."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.found: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out[0] if isinstance(out, tuple) and out else out  # normalisations return their statistics too
        if isinstance(made, Tensor) and made.dim() > 2 and len(made) == self.batch and prod(made.shape[2:]) > 1:
            self.found = made
        return out


def _features(network: nn.Module, images: Tensor) -> Tensor:
    """Features before global pooling, or the output where nothing has positions."""
    last = _LastFeatures(len(images))
    with last:
        logits = _logits(network, images)
    return logits if last.found is None else last.found
