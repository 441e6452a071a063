"""Operators of a network whose channels are elastic: traced once at full width, and written for any other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd

from search_spaces.elastic_graph import Axis, ElasticGraph, Removable
from search_spaces.operators import Operator, Tensor, Workload, WorkloadBuilder
from search_spaces.tracing import _inference, _Recorder, _without_data


@dataclass(frozen=True)
class ElasticOperator:
    """One operator at full width, and what its shapes consist of.

    Args:
        reads, writes: the axes of its inputs and of its output; empty for what never changes.
        layer: name of the layer that it is, else empty.
        pair, single: its parameters per pair of input and output channel, and per output channel.
        owner: the removable block that it is part of, else empty.
        path: of the module that runs it.
    """

    operator: Operator
    reads: tuple[Axis, ...]
    writes: Axis
    pair: int
    single: int
    owner: str
    path: str


@dataclass(frozen=True)
class Run:
    """Consecutive operators, with the tensors that are alive before and after them, in order.

    Args:
        first, last: numbers of the operators, the last excluded.
        groups: whose width matters.
        owner: the removable block that they are part of, else empty.
    """

    first: int
    last: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    groups: frozenset[int]
    owner: str


class _Marked(fx.Interpreter):
    """Runs a graph, and notes which operators and tensors each node gave."""

    def __init__(self, network: nn.Module, graph: fx.Graph, recorder: _Recorder) -> None:
        super().__init__(network, graph=graph)
        self.recorder = recorder
        self.nodes: list[fx.Node] = []  # of each operator
        self.tensors: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.nodes += [n] * (self.recorder.count - len(self.nodes))
        index = self.recorder.index_of(result)
        if index is not None:
            self.tensors[n] = index
        return result


class ElasticWorkload:
    """The operators of a network at any width of its groups.

    Args:
        network, found: as of `analyse`.
        input_shape: of one input.
    """

    def __init__(self, network: nn.Module, found: ElasticGraph, input_shape: Sequence[int]) -> None:
        self._groups = found.groups
        recorder = _Recorder(network)
        with _inference(network), sdpa_kernel(SDPBackend.MATH), _without_data(network):
            sample = torch.empty((1, *input_shape))
            recorder.source(sample)
            marked = _Marked(network, found.graph, recorder)
            with recorder:
                result = marked.run(sample)
        full = recorder.workload(result)
        self._reads, self._writes = full.reads, full.writes
        self._inputs, self._outputs = full.inputs, full.outputs
        self._specs = full.tensors
        owners = {node: block.name for block in found.removable for node in block.nodes}
        self.operators = []
        for i, (op, node) in enumerate(zip(full.operators, marked.nodes, strict=True)):
            last = i + 1 == len(marked.nodes) or marked.nodes[i + 1] is not node
            self.operators.append(_elastic(network, found, op, node, last, owners.get(node, "")))
        self._tensor_axes: dict[int, Axis] = dict(zip(full.writes, (op.writes for op in self.operators), strict=True))
        count = len(self.operators)
        born = dict.fromkeys(full.inputs, -1) | {t: i for i, t in enumerate(full.writes)}
        read = {t: i for i, reads in enumerate(full.reads) for t in reads} | dict.fromkeys(full.outputs, count)
        self._alive = [sorted(t for t in born if born[t] < i <= read.get(t, -1)) for i in range(count + 1)]
        self._place = {t: t for t in born}
        self.removable = tuple(block for block in found.removable if self._clears(block, marked.tensors))
        kept = {block.name for block in self.removable}
        self.operators = [op if op.owner in kept else replace(op, owner="") for op in self.operators]

    def _clears(self, block: Removable, tensors: dict[fx.Node, int]) -> bool:
        """Whether a block's operators stand together, and change one live tensor for another."""
        own = [i for i, op in enumerate(self.operators) if op.owner == block.name]
        source, result = tensors.get(block.source), tensors.get(block.result)
        if not own or own != list(range(own[0], own[-1] + 1)) or source is None or result is None or source == result:
            return False
        # Where one is read through another view than it was written, they do not stand for each other.
        if (self._specs[source], self._tensor_axes.get(source)) != (self._specs[result], self._tensor_axes[result]):
            return False
        before, after = set(self._alive[own[0]]), set(self._alive[own[-1] + 1])
        if source not in before or result not in after or before - {source} != after - {result}:
            return False
        self._place[result] = self._place[source]  # so that with and without the block all others keep their places
        return True

    def runs(self, knob_of: Mapping[int, str]) -> list[Run]:
        """The network in pieces of operators that depend on the same knobs, as far as these go together.

        Args:
            knob_of: the knob that decides about a group; groups without one never change.
        """

        def knobs(groups: Iterable[int]) -> frozenset[str]:
            return frozenset(knob_of[g] for g in groups if g in knob_of)

        def elastic(axes: Iterable[Axis]) -> frozenset[int]:
            return frozenset(g for axis in axes for g, _ in axis if g in knob_of)

        around = [elastic(self._tensor_axes.get(t, ()) for t in alive) for alive in self._alive]
        pieces: list[tuple[int, int, frozenset[int]]] = []
        for i, op in enumerate(self.operators):
            alone = elastic((*op.reads, op.writes)) | around[i] | around[i + 1]
            if pieces and self.operators[i - 1].owner == op.owner:
                first, _, groups = pieces[-1]
                if knobs(groups | alone) in (knobs(groups), knobs(alone)):
                    pieces[-1] = first, i + 1, groups | alone
                    continue
            pieces.append((i, i + 1, alone))
        return [
            Run(first, last, self._ordered(first), self._ordered(last), groups, self.operators[first].owner)
            for first, last, groups in pieces
        ]

    def _ordered(self, boundary: int) -> tuple[int, ...]:
        return tuple(sorted(self._alive[boundary], key=self._place.__getitem__))

    def workload(self, run: Run, widths: Mapping[int, int]) -> Workload:
        """The operators of a run.

        Args:
            widths: of the groups that it depends on; others have their full one.
        """
        builder = WorkloadBuilder()
        made = {t: builder.input(self._sized(self._specs[t], self._tensor_axes.get(t, ()), widths)) for t in run.before}
        for i in range(run.first, run.last):
            op = self.operators[i]
            inputs = tuple(
                self._sized(spec, axis, widths) for spec, axis in zip(op.operator.inputs, op.reads, strict=True)
            )
            output = self._sized(op.operator.output, op.writes, widths)
            read = self._total(op.reads[0], widths) if op.reads else 0
            wrote = self._total(op.writes, widths)
            grouped = op.operator.groups > 1 and bool(op.writes)
            resized = replace(
                op.operator,
                inputs=inputs,
                output=output,
                groups=wrote if grouped and op.operator.groups == op.operator.output.shape[0] else op.operator.groups,
                params=wrote * (op.pair * read + op.single) if op.pair or op.single else op.operator.params,
            )
            made[self._writes[i]] = builder.put(resized, [made[t] for t in self._reads[i]])
        return builder.build([made[t] for t in run.after])

    def _total(self, axis: Axis, widths: Mapping[int, int]) -> int:
        return sum(widths.get(g, self._groups[g].size) * per for g, per in axis)

    def _sized(self, tensor: Tensor, axis: Axis, widths: Mapping[int, int]) -> Tensor:
        return Tensor((self._total(axis, widths), *tensor.shape[1:]), tensor.itemsize) if axis else tensor


def _elastic(
    network: nn.Module, found: ElasticGraph, op: Operator, node: fx.Node, last: bool, owner: str
) -> ElasticOperator:
    """An operator with its axes: the last one of a node writes the node's axis, all others stay with what it reads."""
    sources = [found.axes[s] for s in node.all_input_nodes if s in found.axes]
    made = found.axes.get(node, ())
    elastic = any(not found.groups[g].fixed for axis in (*sources, made) for g, _ in axis)
    path = str(node.meta.get("path", ""))
    if not elastic or not sources:
        return ElasticOperator(op, tuple(() for _ in op.inputs), (), 0, 0, owner, path)
    full = {axis: sum(found.groups[g].size * per for g, per in axis) for axis in (*sources, made)}
    # A tensor that one argument gave several times, or that came about within the node, has the first axis that fits.
    given = [axis for s in _arguments(node) if (axis := found.axes.get(s)) is not None]
    reads = []
    for place, tensor in enumerate(op.inputs):
        candidates = given[place : place + 1] + sources
        reads.append(next((a for a in candidates if full[a] == tensor.shape[0]), ()))
    axis = made if last else reads[0]
    writes = axis if full.get(axis) == op.output.shape[0] else ()
    name = str(node.target)
    pair = single = 0
    if node.op == "call_module" and name in found.layers and op.params:
        module = network.get_submodule(name)
        if found.layers[name].channelwise:
            single = op.params // full[made]
        else:
            pair = prod(module.kernel_size) if isinstance(module, _ConvNd) else 1
            single = int(module.bias is not None)
    return ElasticOperator(op, tuple(reads), writes, pair, single, owner, path)


def _arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, repeated ones and those in lists too."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return found
