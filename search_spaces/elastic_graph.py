"""What of a network can be made smaller: groups of channels that go together, and residual blocks that can go.

The network is traced once (torch.fx), with the sizes of its feature maps known and its channels left open. Every tensor
then gets an axis: which groups of channels its second dimension consists of. A convolution or linear layer begins a
group; a sum makes two groups one; a concatenation lines groups up. Whatever computes with channels in a way that is not
known here (reshaping, shuffling, attention, grouped convolutions, ...) fixes the groups that it meets to their full
width: it is never wrong, only less elastic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import is_parametrized

from search_spaces.errors import UserError

# Images that a network is traced with: a number that nothing else is likely to be, so that code which goes through a
# batch image by image is told from code that takes a tensor apart.
_BATCH = 5

# Groups that a tensor's channels consist of, in order, each with how many features a channel has (after flattening).
Axis = tuple[tuple[int, int], ...]

_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity, nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool1d, nn.MaxPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad1d,
    nn.ZeroPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d, _DropoutNd,
)  # fmt: skip
_ACTIVATIONS = (
    "relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh",
    "sigmoid", "sigmoid_", "tanh", "tanh_", "softplus", "clamp", "clamp_", "clamp_min", "sqrt", "exp", "abs", "neg",
    "dropout", "dropout2d", "contiguous", "float",
)  # fmt: skip
_POOLS = (
    "avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "interpolate",
)  # fmt: skip
_SUMS = ("add", "iadd", "sub", "isub", "add_", "sub_")
_BINARY = (*_SUMS, "mul", "imul", "mul_", "truediv", "div", "maximum", "minimum")


@dataclass
class Group:
    """Channels that can only be taken away together.

    Args:
        size: how many.
        layers: names of the layers that write just them, in execution order.
        norms: names of the normalisation layers over just them.
        fixed: why their number cannot change, empty where it can.
    """

    size: int
    layers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    fixed: str = ""


@dataclass(frozen=True)
class Layer:
    """A layer with weights by channel: the axes that it reads and writes.

    Args:
        channelwise: whether every channel has weights of its own alone (normalisation, depthwise convolution).
    """

    name: str
    reads: Axis
    writes: Axis
    channelwise: bool


@dataclass(frozen=True)
class Removable:
    """A residual block whose output has the shape of its input: without it the network still is one.

    Args:
        name: of the module.
        nodes: of the graph that belong to it.
        source, result: its input and its output.
    """

    name: str
    nodes: frozenset[fx.Node]
    source: fx.Node
    result: fx.Node


@dataclass(frozen=True)
class ElasticGraph:
    """A traced network, its groups of channels and its removable blocks.

    Args:
        graph: in execution order.
        axes: of every node that has channels.
        groups: by the numbers that axes hold.
        layers: by name, those with weights per channel.
        removable: in execution order; none inside another.
    """

    graph: fx.Graph
    axes: dict[fx.Node, Axis]
    groups: dict[int, Group]
    layers: dict[str, Layer]
    removable: tuple[Removable, ...]


def analyse(network: nn.Module, input_shape: Sequence[int]) -> ElasticGraph:
    """Trace a network in eval mode, and find what of it is elastic. The network stays as it is.

    Args:
        input_shape: `(channels, height, width)` of one input.

    Raises:
        UserError: the network does not run on that shape, or its path depends on the data; the module is named.
    """
    for name, module in network.named_modules():
        known = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and type(module).forward is _BatchNorm.forward
        if getattr(module, "running_mean", None) is not None and not known:
            raise UserError(
                f"{type(network).__name__}: {type(module).__name__} {name!r} keeps running statistics; an elastic "
                "network can calibrate those of BatchNorm1d and BatchNorm2d alone"
            )
    modes = [(m, m.training) for m in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            graph, called_with_one = _traced(network, tuple(input_shape))
    finally:
        for module, mode in modes:
            module.training = mode
    analysis = _Analysis(network)
    for node in graph.nodes:
        analysis.visit(node)
    axes = {node: analysis.resolve(axis) for node, axis in analysis.axes.items()}
    layers = {
        name: Layer(name, analysis.resolve(reads), analysis.resolve(writes), name in analysis.channelwise)
        for name, (reads, writes) in analysis.layers.items()
    }
    for layer in layers.values():
        module = network.get_submodule(layer.name)
        if len(layer.writes) == 1 and layer.writes[0][1] == 1:
            group = analysis.groups[layer.writes[0][0]]
            if isinstance(module, _BatchNorm):
                group.norms.append(layer.name)
            elif isinstance(module, _ConvNd | nn.Linear):
                group.layers.append(layer.name)
    used = {g for axis in axes.values() for g, _ in axis}
    groups = {g: analysis.groups[g] for g in sorted(used)}
    found = ElasticGraph(graph, axes, groups, layers, ())
    return replace(found, removable=_removable(network, found, called_with_one))


class _Shape(tuple[Any, ...]):
    """A tensor's shape: batch and channels open, the rest numbers."""

    def numel(self) -> Any:
        return prod(self)


class _Proxy(fx.Proxy):
    """A traced value that knows the sizes of its feature maps, so that code may decide by them."""

    @property
    def shape(self) -> Any:
        value = self.node.meta.get("value")
        if not isinstance(value, Tensor):
            return super().__getattr__("shape")
        sizes: Any = self.tracer.create_proxy("call_method", "size", (self,), {})
        return _Shape([sizes[i] if i < 2 else n for i, n in enumerate(value.shape)])

    def size(self, dim: int | None = None) -> Any:
        shape = self.shape
        return shape if dim is None else shape[dim]

    def dim(self) -> int:
        return int(self.node.meta["value"].dim())

    @property
    def ndim(self) -> int:
        return self.dim()

    def __len__(self) -> int:
        return len(self.node.meta["value"])

    def __iter__(self) -> Any:
        value = self.node.meta.get("value")
        if isinstance(value, tuple | list) or (isinstance(value, Tensor) and len(value) != _BATCH):
            this: Any = self
            return iter([this[i] for i in range(len(value))])
        return super().__iter__()


class _Tracer(fx.Tracer):
    """Traces, and computes every value on the way."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.failed = ""
        self.once: dict[str, bool] = {}  # whether a module is only ever called with one argument
        self._path: list[str] = []
        self._computing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._computing:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self.once[path] = self.once.get(path, True) and len(args) == 1 and not kwargs
        self._path.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or path
            raise
        finally:
            self._path.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        node.meta["path"] = self._path[-1] if self._path else ""
        if kind == "placeholder":
            node.meta["value"] = self.example
        elif kind != "output":
            values = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
            self._computing = True
            try:
                node.meta["value"] = _computed(self.root, kind, target, *values)
            finally:
                self._computing = False
        return node


def _computed(root: Any, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
    if kind == "call_module":
        return root.get_submodule(target)(*args, **kwargs)
    if kind == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if kind == "get_attr":
        value = root
        for part in target.split("."):
            value = getattr(value, part)
        return value
    return target(*args, **kwargs)


def _traced(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[fx.Graph, dict[str, bool]]:
    """The graph, whose nodes know the shape of their value and the path of their module."""
    example = torch.zeros((_BATCH, *input_shape), device=next((p.device for p in network.parameters()), None))
    tracer = _Tracer(example)
    own_class = type(network)
    try:
        # Further arguments of `forward` keep their defaults: what is traced takes images alone.
        network.__class__ = type(
            own_class.__name__, (own_class,), {"forward": lambda self, x: own_class.forward(self, x)}
        )
        graph = tracer.trace(network)
    except Exception as error:  # whatever a user's module may raise
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        where = f" in {tracer.failed!r}" if tracer.failed else ""
        kind = type(network.get_submodule(tracer.failed)).__name__
        raise UserError(
            f"{type(network).__name__}: cannot follow {kind}{where} for inputs of shape {input_shape} (no batch): "
            f"{type(error).__name__}: {first_line}. A network for an elastic space runs on that shape, and its path "
            "does not depend on its data"
        ) from error
    finally:
        network.__class__ = own_class
    for node in reversed(graph.nodes):
        in_place = str(getattr(node.target, "__name__", node.target)).endswith("_")
        if not node.users and node.op not in ("placeholder", "output") and not in_place:
            graph.erase_node(node)
    for node in graph.nodes:
        value = node.meta.pop("value", None)
        if isinstance(value, Tensor):
            node.meta["shape"] = tuple(value.shape)
    return graph, tracer.once


class _Analysis:
    """Axes of all nodes, node by node in execution order."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.axes: dict[fx.Node, Axis] = {}
        self.groups: dict[int, Group] = {}
        self.layers: dict[str, tuple[Axis, Axis]] = {}
        self.channelwise: set[str] = set()
        self._parent: dict[int, int] = {}

    def visit(self, node: fx.Node) -> None:
        """Find the axis of a node, and what it says of those that it reads."""
        shape = node.meta.get("shape", ())
        if node.op == "output":
            for source in node.all_input_nodes:
                self._fix(source, "is the output")
            return
        if node.op == "placeholder":
            self.axes[node] = self._new(shape[1], fixed="is the input")
            return
        if node.op == "call_method" and node.target == "size":
            return  # harmless as such; computing with the number of channels is not
        if node.target is operator.getitem and not shape:
            size, place = node.args
            if isinstance(size, fx.Node) and size.target == "size" and place == 1:
                self._fix(size.args[0], f"is computed with in {node.meta['path'] or 'the network'!r}")
            return
        axis = self._module(node, shape) if node.op == "call_module" else self._function(node, shape)
        if axis is not None:
            self.axes[node] = axis
        else:
            self._unknown(node, shape)

    def _unknown(self, node: fx.Node, shape: tuple[int, ...]) -> None:
        what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module":
            what = f"{type(self.network.get_submodule(str(node.target))).__name__} {node.target!r}"
        for source in node.all_input_nodes:
            self._fix(source, f"goes through {what}")
        if len(shape) > 1:
            self.axes[node] = self._new(shape[1], fixed=f"comes from {what}")

    def _module(self, node: fx.Node, shape: tuple[int, ...]) -> Axis | None:
        name = str(node.target)
        module = self.network.get_submodule(name)
        x = node.args[0] if node.args else None
        if not isinstance(x, fx.Node) or x not in self.axes:
            return None
        axis = self.axes[x]
        if is_parametrized(module) or module._forward_pre_hooks:  # its weights are computed
            return None
        if isinstance(module, nn.Flatten):
            return self._flattened(x, shape) if module.start_dim == 1 else None
        if isinstance(module, _POINTWISE_MODULES):
            return axis
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return axis
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.PReLU):
            return self._channelwise(name, axis)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d):
            if module.groups == 1:
                return self._layer(name, axis, self._written(name, module.out_channels))
            if module.groups == module.in_channels == module.out_channels and not isinstance(module, _ConvTransposeNd):
                return self._channelwise(name, axis)
            return None
        if isinstance(module, nn.Linear) and len(shape) == 2:
            return self._layer(name, axis, self._written(name, module.out_features))
        return None

    def _function(self, node: fx.Node, shape: tuple[int, ...]) -> Axis | None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        name = name.removeprefix("_").removesuffix("_") if name.startswith("__") else name
        sources = [s for s in node.all_input_nodes if s in self.axes]
        arrays = [s for s in node.all_input_nodes if len(s.meta.get("shape", ())) > 0]
        if node.op == "get_attr" or not sources or len(sources) != len(arrays) or len(shape) < 2:
            return None
        x = sources[0]
        given = x.meta["shape"]
        if name in _BINARY:
            return self._joined(sources, shape)
        if name in _ACTIVATIONS and len(sources) == 1:
            return self.axes[x]
        if (name in _POOLS or name == "boolean_dispatch") and len(sources) == 1 and len(shape) == len(given) > 2:
            return self.axes[x]
        if name == "fn" and node.target in (F.max_pool1d, F.max_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d):
            return self.axes[x]
        if name in ("pad", "_pad") and shape[:2] == given[:2]:
            return self.axes[x]
        if name in ("mean", "sum", "amax") and len(sources) == 1 and shape[:2] == given[:2]:
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            dims = (dims,) if isinstance(dims, int) else dims
            inner = isinstance(dims, tuple | list) and all(isinstance(d, int) and d % len(given) > 1 for d in dims)
            return self.axes[x] if inner else None
        if name in ("squeeze", "unsqueeze"):
            return self.axes[x] if len(shape) > 2 and shape[:2] == given[:2] else None
        if name in ("cat", "concat"):
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            terms: Any = node.args[0]
            return tuple(part for s in terms for part in self.axes[s]) if dim in (1, 1 - len(shape)) else None
        if name == "flatten":
            start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
            return self._flattened(x, shape) if start == 1 and len(sources) == 1 else None
        if name in ("view", "reshape") and node.args[-1] == -1 and len(node.args) == 3 and len(given) > 2:
            return self._flattened(x, shape)
        return None

    def _flattened(self, x: fx.Node, shape: tuple[int, ...]) -> Axis | None:
        given = x.meta["shape"]
        if len(shape) != 2 or shape[1] != prod(given[1:]):
            return None
        return tuple((group, per * prod(given[2:])) for group, per in self.axes[x])

    def _joined(self, sources: list[fx.Node], shape: tuple[int, ...]) -> Axis | None:
        """Of an operator on pairs of channels: they become the same groups. One channel is shared out to all others."""
        wide = [s for s in sources if len(s.meta["shape"]) == len(shape) and s.meta["shape"][1] == shape[1]]
        if len(wide) < len(sources):
            for s in sources:
                if s not in wide:
                    self._fix(s, "is one for all channels")
            if any(s not in wide and (s.meta["shape"][1] != 1 or len(s.meta["shape"]) != len(shape)) for s in sources):
                return None
        for other in wide[1:]:
            self._unify(self.axes[wide[0]], self.axes[other])
        return self.axes[wide[0]] if wide else None

    def _channelwise(self, name: str, axis: Axis) -> Axis:
        self.channelwise.add(name)
        return self._layer(name, axis, axis)

    def _layer(self, name: str, reads: Axis, writes: Axis) -> Axis:
        if name in self.layers:  # called once more: what it reads and writes is the same again
            first_reads, first_writes = self.layers[name]
            self._unify(first_reads, reads)
            self._unify(first_writes, writes)
        else:
            self.layers[name] = reads, writes
        return writes

    def _written(self, name: str, size: int) -> Axis:
        return self.layers[name][1] if name in self.layers else self._new(size)

    def _new(self, size: int, fixed: str = "") -> Axis:
        number = len(self._parent)
        self._parent[number] = number
        self.groups[number] = Group(size, fixed=fixed)
        return ((number, 1),)

    def _find(self, group: int) -> int:
        while self._parent[group] != group:
            group = self._parent[group]
        return group

    def resolve(self, axis: Axis) -> Axis:
        """The axis in groups that are left after unions."""
        return tuple((self._find(g), per) for g, per in axis)

    def _fix(self, source: Any, why: str) -> None:
        for group, _ in self.axes.get(source, ()):
            self.groups[self._find(group)].fixed = self.groups[self._find(group)].fixed or why

    def _unify(self, first: Axis, second: Axis) -> None:
        """Make two axes of equal width the same, group by group; where their borders differ, both are fixed."""
        first, second = self.resolve(first), self.resolve(second)
        sizes = [[(self.groups[g].size, per) for g, per in axis] for axis in (first, second)]
        if sizes[0] != sizes[1]:
            for group, _ in (*first, *second):
                self.groups[group].fixed = self.groups[group].fixed or "meets a concatenation that is cut elsewhere"
            return
        for (one, _), (two, _) in zip(first, second, strict=True):
            a, b = sorted((self._find(one), self._find(two)))
            if a != b:
                self._parent[b] = a
                self.groups[a].fixed = self.groups[a].fixed or self.groups[b].fixed


def _removable(network: nn.Module, found: ElasticGraph, called_with_one: dict[str, bool]) -> tuple[Removable, ...]:
    """Modules that add to what they are given, the innermost of nested ones."""
    order = {node: i for i, node in enumerate(found.graph.nodes)}
    inside: dict[str, set[fx.Node]] = {}
    for node in found.graph.nodes:
        parts = node.meta.get("path", "").split(".") if node.meta.get("path") else []
        for depth in range(1, len(parts) + 1):
            inside.setdefault(".".join(parts[:depth]), set()).add(node)
    result: list[Removable] = []
    for name in sorted(inside, key=lambda n: (-n.count("."), n)):
        nodes = inside[name]
        if any(other.nodes & nodes for other in result) or not called_with_one.get(name, False):
            continue
        sources = {s for node in nodes for s in node.all_input_nodes if s not in nodes}
        results = {node for node in nodes if any(user not in nodes for user in node.users)}
        if len(sources) != 1 or len(results) != 1:
            continue
        (source,), (made,) = sources, results
        same = source.meta.get("shape") == made.meta.get("shape") and found.axes.get(source) == found.axes.get(made)
        if same and all(user in nodes for user in source.users) and _adds(network, source, made):
            result.append(Removable(name, frozenset(nodes), source, made))
    return tuple(sorted(result, key=lambda block: order[block.source]))


def _adds(network: nn.Module, source: fx.Node, result: fx.Node) -> bool:
    """Whether `result` is a sum with `source` itself, perhaps with an activation after it."""
    node = result
    while node.op != "placeholder":
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op != "call_module" and name in _SUMS:
            terms = [_behind_identities(network, term) for term in node.all_input_nodes]
            return source in terms and len(terms) == 2
        pointwise = node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), _POINTWISE_MODULES)
        if not (pointwise or name in _ACTIVATIONS) or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return False


def _behind_identities(network: nn.Module, node: fx.Node) -> fx.Node:
    while node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), nn.Identity | _DropoutNd):
        node = node.all_input_nodes[0]
    return node
