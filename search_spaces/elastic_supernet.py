"""The weight-sharing network of an elastic space, and its networks cut to size."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from search_spaces.base import Archs
from search_spaces.depthwise import depthwise_conv2d
from search_spaces.shared_layers import BatchNorm, Drop, Normalise, WeightSharingSupernet
from search_spaces.supernet import NormStats, fit

if TYPE_CHECKING:
    from search_spaces.elastic import ElasticSpace

# What a layer keeps: indices of the features that it reads and of the channels that it writes; None for all.
Cut = tuple[Tensor | None, Tensor | None]


class SuperElastic(WeightSharingSupernet):
    """Every network of an `ElasticSpace` in the weights of the user's own: each layer with the channels that are kept.

    It begins with the weights of the space's network.
    """

    space: ElasticSpace

    def __init__(self, space: ElasticSpace) -> None:
        super().__init__(space, deepcopy(space.network).to(memory_format=torch.channels_last))  # type: ignore[call-overload]

    def run(self, x: Tensor, arch: Archs, normalise: Normalise, drop: Drop) -> Tensor:
        found = self.space.found
        cuts = self.space.cuts(arch)
        absent = {node: block for block in self.space.absent(arch) for node in block.nodes}
        x = fit(x, self.space.input_shape).contiguous(memory_format=torch.channels_last)
        values: dict[fx.Node, Any] = {}
        for node in found.graph.nodes:
            if (block := absent.get(node)) is not None:
                if node is block.result:
                    values[node] = values[block.source]
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return cast(Tensor, args[0])
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "call_module":
                module = self.largest.get_submodule(str(node.target))
                values[node] = _layer(module, args, kwargs, cuts.get(str(node.target)), normalise, drop)
            elif node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif node.op == "get_attr":
                values[node] = _attribute(self.largest, str(node.target))
            else:
                values[node] = node.target(*args, **kwargs)
            for last in self.space.last_reads.get(node, ()):
                values.pop(last, None)
        raise AssertionError("a traced graph ends with its output")

    def extract(self, arch: Archs, stats: NormStats) -> nn.Module:
        network = cut_network(self.largest, self.space, arch)
        for name, module in network.named_modules():
            if isinstance(module, BatchNorm) and name in stats.mean:
                module.track_running_stats = True
                module.running_mean = stats.mean[name].detach().clone()
                module.running_var = stats.var[name].detach().clone()
                module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=stats.mean[name].device)
        return network.eval()


def cut_network(network: nn.Module, space: ElasticSpace, arch: Archs) -> nn.Module:
    """A copy of the space's network with the layers and channels of one architecture `(K,)`: of the same class."""
    copied = deepcopy(network)
    with torch.no_grad():
        for name, cut in space.cuts(arch).items():
            _cut_layer(copied.get_submodule(name), *cut)
    for block in space.absent(arch):
        copied.set_submodule(block.name, nn.Identity())
    copied.input_shape = space.input_shape  # type: ignore[assignment]
    return copied


def _attribute(network: nn.Module, path: str) -> Any:
    value: Any = network
    for part in path.split("."):
        value = getattr(value, part)
    return value


class _CutNorm:
    """A normalisation layer with the scales and shifts of some channels; stands for it where a layer is asked for."""

    def __init__(self, norm: _BatchNorm, x: Tensor, rows: Tensor | None) -> None:
        channels = x.shape[1]
        self.weight = x.new_ones(channels) if norm.weight is None else _part(norm.weight, rows, None)
        self.bias = x.new_zeros(channels) if norm.bias is None else _part(norm.bias, rows, None)
        self.eps = norm.eps
        self._norm = norm

    def __hash__(self) -> int:
        return hash(self._norm)

    def __eq__(self, other: object) -> bool:
        return other is self._norm


def _layer(
    module: nn.Module, args: Any, kwargs: Mapping[str, Any], cut: Cut | None, normalise: Normalise, drop: Drop
) -> Any:
    """One layer on its inputs, with the channels that are kept of it."""
    x: Any = args[0] if args else None
    columns, rows = cut or (None, None)
    if isinstance(module, BatchNorm):
        if rows is None and module.weight is not None:
            return normalise(module, x)
        return normalise(cast(Any, _CutNorm(module, x, rows)), x)
    if isinstance(module, _DropoutNd):
        return drop(x, module.p)
    if isinstance(module, nn.Conv2d) and _plainly_depthwise(module):
        return depthwise_conv2d(x, _part(module.weight, rows, None), module.stride, module.padding)  # type: ignore[arg-type]
    if columns is None and rows is None:
        return module(*args, **kwargs)
    if isinstance(module, nn.Linear):
        return F.linear(x, _part(module.weight, rows, columns), _bias(module, rows))
    if isinstance(module, nn.PReLU):
        return F.prelu(x, _part(module.weight, rows, None))
    assert isinstance(module, _ConvNd)
    if isinstance(module, _ConvTransposeNd):
        transposed: Any = F.conv_transpose1d if isinstance(module, nn.ConvTranspose1d) else F.conv_transpose2d
        weight = _part(module.weight, columns, rows)
        return transposed(
            x, weight, _bias(module, rows), module.stride, module.padding, module.output_padding, 1, module.dilation
        )
    if module.groups > 1:
        weight, groups = _part(module.weight, rows, None), x.shape[1]
    else:
        weight, groups = _part(module.weight, rows, columns), 1
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    padding = module.padding if module.padding_mode == "zeros" else 0
    convolve: Any = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
    return convolve(x, weight, _bias(module, rows), module.stride, padding, module.dilation, groups)


def _plainly_depthwise(module: nn.Conv2d) -> bool:
    return (
        module.groups == module.in_channels == module.out_channels > 1
        and module.bias is None
        and module.padding_mode == "zeros"
        and module.dilation == (1, 1)
        and isinstance(module.padding, tuple)
    )


def _bias(module: _ConvNd | nn.Linear, rows: Tensor | None) -> Tensor | None:
    return None if module.bias is None else _part(module.bias, rows, None)


def _part(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Some rows (first dimension) and columns (second) of a weight, in its memory format; None for all."""
    if columns is None:
        return weight if rows is None else weight.index_select(0, rows.to(weight.device))
    last = weight.dim() == 4  # channels-last, so that what is taken stays so
    weight = weight.permute(0, 2, 3, 1) if last else weight
    if rows is not None:
        weight = weight.index_select(0, rows.to(weight.device))
    weight = weight.index_select(-1 if last else 1, columns.to(weight.device))
    return weight.permute(0, 3, 1, 2) if last else weight


def _cut_layer(module: nn.Module, columns: Tensor | None, rows: Tensor | None) -> None:
    """Take channels away from a layer, in place."""
    if columns is None and rows is None:
        return
    transposed = isinstance(module, _ConvTransposeNd)
    depthwise = isinstance(module, _ConvNd) and module.groups > 1
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 1 or depthwise:
            part = _part(parameter, rows, None)
        else:
            part = _part(parameter, columns, rows) if transposed else _part(parameter, rows, columns)
        setattr(module, name, nn.Parameter(part.clone(), requires_grad=parameter.requires_grad))
    for name in ("running_mean", "running_var"):
        if isinstance(module, _BatchNorm) and (value := getattr(module, name)) is not None:
            setattr(module, name, _part(value, rows, None).clone())
    if isinstance(module, _ConvNd):
        first, second = module.weight.shape[:2]
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
        if depthwise:
            module.in_channels = module.groups = first
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _BatchNorm):
        module.num_features = len(rows) if rows is not None else module.num_features
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
