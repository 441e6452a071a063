"""Subnets of one supernet for devices of different size: which fits, which weights it has, how it normalises."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from predictors import BoundPredictor
from predictors.counts import Count
from search_spaces import Archs, SearchSpace, UserError
from search_spaces.shared_layers import BatchNorm
from search_spaces.supernet import NormStats, Supernet

_PROBES = 32  # images: a unit that is closed for half of them is closed for all with probability 2^-32


def fitting_subnet(
    space: SearchSpace, cost: BoundPredictor, limit: float, *, samples: int = 1000, seed: int = 0
) -> Archs:
    """The subnet `(K,)` with the most multiply-accumulates that keeps a device's limit, of a random sample.

    Args:
        cost: such as `TrainingMemoryCount(batch=8).bind(space)`, or a predictor of a device's latency.
        limit: in the cost's unit.
        samples: drawn from `seed`; the space's references are among the candidates.

    Raises:
        UserError: nothing fits; names the least that was found.
    """
    archs = space.sample(samples, np.random.default_rng(seed))
    archs = np.concatenate([archs, np.stack(list(space.references.values()))])
    costs = cost.predict(archs).mean
    fits = archs[costs <= limit]
    if not len(fits):
        raise UserError(
            f"limit = {limit:g}: no subnet of {space.name} fits, the least of {len(archs)} is {costs.min():g}"
        )
    return np.asarray(fits[Count("macs").bind(space).predict(fits).mean.argmax()])


def flatten(network: nn.Module) -> Tensor:
    """All parameters as one vector, in the order of their names."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@torch.no_grad()
def put(network: nn.Module, vector: Tensor) -> None:
    """Make the values of a vector, as `flatten` gives it, the network's parameters."""
    parameters = list(network.parameters())
    for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view(parameter.shape))


def trained_elements(supernet: Supernet, arch: Archs, input_shape: Sequence[int]) -> Tensor:
    """Which elements of `flatten(supernet)` a subnet trains: ascending indices, int64.

    Found for any supernet, however it shares its weights: a gradient of NaN at the output reaches every element that
    takes part, and zeros or nothing comes to all others.
    """
    probe = copy.deepcopy(supernet).train()
    # So that no unit, however it was trained, is closed for a whole batch: then no gradient would pass it.
    for module in probe.modules():
        if isinstance(module, BatchNorm | nn.LayerNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
    for name, parameter in probe.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    x = torch.randn(_PROBES, *input_shape, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = probe(x, arch)
    parameters = list(probe.parameters())
    gradients = torch.autograd.grad(out, parameters, torch.full_like(out, float("nan")), allow_unused=True)
    reached = [
        torch.zeros(p.numel(), dtype=torch.bool) if g is None else g.flatten().isnan()
        for p, g in zip(parameters, gradients, strict=True)
    ]
    return torch.cat(reached).nonzero().flatten()


def pooled(parts: Iterable[tuple[int, NormStats]]) -> NormStats:
    """Statistics of all samples together from those of clients, each with its number of samples.

    Mean: weighted mean. Variance: mean of variances plus variance of means.

    Raises:
        UserError: no parts.
    """
    given = list(parts)
    if not given:
        raise UserError("no client has statistics of this subnet")
    total = sum(count for count, _ in given)
    mean, var = {}, {}
    for name in given[0][1].mean:
        mean[name] = sum((n / total * s.mean[name].double() for n, s in given), torch.zeros(()))
        square = sum(
            (n / total * (s.var[name].double() + s.mean[name].double() ** 2) for n, s in given), torch.zeros(())
        )
        var[name] = (square - mean[name] ** 2).clamp_min(0.0)
    return NormStats({k: v.float() for k, v in mean.items()}, {k: v.float() for k, v in var.items()})
