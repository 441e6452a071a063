"""Vision transformers of the AutoFormer family, as plain static modules.

Every module runs at any size up to its own: its `forward` takes the sizes to run at and uses the leading part of each
weight, which costs a stand-alone network nothing. So the supernet runs these very modules.

Inside a network tokens are rows of one matrix, `(positions * batch, width)`, all samples of a position one after the
other: then every product of the attention, with other tokens or with relative positions, reads its operands in place.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.autoformer_spec import NetworkSpec
from search_spaces.operators import Workload
from search_spaces.relative_attention import attend
from search_spaces.shared_layers import Drop, bias, crop, linear
from search_spaces.tracing import trace


class RelativePositions(nn.Module):
    """Which relative position every token of a `grid x grid` image sees in every row, every column and the class token.

    AutoFormer adds to a key, and to a value, the sum of two embeddings that depend on the vertical and the horizontal
    distance of the two patches (Shaw et al., NAACL 2018, in two dimensions); pairs with the class token share one. So
    a query meets one embedding per row and per column of patches and one for the class token, `2 grid + 1` in all,
    instead of one per key. The tokens that share one are told by `members`.

    `index` `(positions, 2 grid + 1)` points into what `embeddings` gives, `members` `(positions, 2 grid + 1)` is one
    where a token lies in a row or column, or is the class token. Constants, made again by `reset`.
    """

    index: Tensor
    members: Tensor

    def __init__(self, grid: int, reach: int) -> None:
        super().__init__()
        self.grid, self.reach = grid, reach
        self.register_buffer("index", None, persistent=False)
        self.register_buffer("members", None, persistent=False)
        self.reset()

    @property
    def positions(self) -> int:
        """Tokens of an image: the class token, then the patches row by row."""
        return self.grid**2 + 1

    def reset(self, device: torch.device | None = None) -> None:
        """Compute the constants."""
        table = 2 * self.reach + 2  # in each direction: the class token's, then distances -reach..reach
        line = torch.arange(self.grid, device=device)
        distance = (line - line[:, None]).clamp(-self.reach, self.reach) + self.reach + 1  # [query, key]
        rows = distance[:, None].expand(-1, self.grid, -1).flatten(0, 1)
        columns = table + distance[None].expand(self.grid, -1, -1).flatten(0, 1)
        patches = torch.cat([rows, columns, torch.full_like(rows[:, :1], 2 * table)], 1)
        # The class token sees all patches alike: its shared embedding along the rows, nothing along the columns.
        first = torch.full_like(patches[:1], 2 * table)
        first[:, self.grid : 2 * self.grid] = 2 * table + 1
        self.index = torch.cat([first, patches])
        eye = torch.eye(self.grid, device=device)
        members = torch.zeros(self.positions, 2 * self.grid + 1, device=device)
        members[1:, : self.grid] = eye.repeat_interleave(self.grid, 0)
        members[1:, self.grid : 2 * self.grid] = eye.repeat(self.grid, 1)
        members[0, -1] = 1
        self.members = members

    def embeddings(self, table: Tensor) -> Tensor:
        """`(positions, 2 grid + 1, head width)` from the learned vectors `(2, 2 reach + 2, head width)`."""
        rows = torch.cat([table.flatten(0, 1), table[:, 0].sum(0, keepdim=True), torch.zeros_like(table[0, :1])])
        return F.embedding(self.index, rows)


class Embedding(nn.Module):
    """Patches and a class token with learned positions: images to tokens."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.patches = nn.Conv2d(spec.in_channels, spec.width, spec.patch, spec.patch)
        self.token = nn.Parameter(torch.zeros(1, spec.width))
        self.positions = nn.Parameter(torch.zeros(spec.grid**2 + 1, spec.width))

    def forward(self, x: Tensor, width: int) -> Tensor:
        """Tokens `(positions * batch, width)` of images `(batch, channels, height, width)`."""
        layer = self.patches
        weight = crop(layer.weight, width, *layer.weight.shape[1:])
        x = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias(layer, width), layer.stride)
        positions = crop(self.positions, self.positions.shape[0], width)
        x = x + positions[1:].t().unflatten(1, x.shape[2:])
        token = crop(self.token, 1, width) + positions[:1]
        return torch.cat([token.expand(x.shape[0], -1), x.permute(2, 3, 0, 1).flatten(0, 2)])


class Attention(nn.Module):
    """Normalisation and multi-head self-attention with relative positions on keys and values, and the shortcut.

    The rows of `qkv` are ordered by head, and within a head by query, key, value, so that the leading heads are the
    leading rows. (AutoFormer's own code stores the channels of query, key and value in turns, to the same end.)
    """

    def __init__(self, width: int, heads: int, head_width: int, positions: RelativePositions) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, heads * 3 * head_width)
        self.key_positions = nn.Parameter(torch.zeros(2, 2 * positions.reach + 2, head_width))
        self.value_positions = nn.Parameter(torch.zeros(2, 2 * positions.reach + 2, head_width))
        self.project = nn.Linear(heads * head_width, width)
        self.positions = positions

    def forward(self, x: Tensor, heads: int, drop: Drop, dropout: float = 0.0, drop_path: float = 0.0) -> Tensor:
        """Tokens `(positions * batch, width)` to the same, with `heads` leading heads."""
        tokens, width = x.shape
        y = drop(linear(self.project, self.gather(layer_norm(self.norm, x), heads), width), dropout)
        return x + drop_samples(y, tokens // self.positions.positions, drop, drop_path)

    def gather(self, x: Tensor, heads: int) -> Tensor:
        """What the heads gather for normalised tokens `(positions * batch, width)`, `(..., heads * head width)`."""
        qkv = linear(self.qkv, x, heads * 3 * self.head_width)
        qkv = qkv.view(self.positions.positions, -1, 3, self.head_width)
        keys = self.positions.embeddings(self.key_positions)
        values = self.positions.embeddings(self.value_positions)
        return attend(qkv, keys, values, self.positions.members).reshape(x.shape[0], heads * self.head_width)


class Perceptron(nn.Module):
    """Normalisation, two linear layers with GELU between them, and the shortcut."""

    def __init__(self, width: int, hidden: int, positions: RelativePositions) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, hidden)
        self.project = nn.Linear(hidden, width)
        self.positions = positions

    def forward(self, x: Tensor, hidden: int, drop: Drop, dropout: float = 0.0, drop_path: float = 0.0) -> Tensor:
        """Tokens `(positions * batch, width)` to the same, through `hidden` leading channels."""
        tokens, width = x.shape
        y = drop(F.gelu(linear(self.widen, layer_norm(self.norm, x), hidden)), dropout)
        y = drop(linear(self.project, y, width), dropout)
        return x + drop_samples(y, tokens // self.positions.positions, drop, drop_path)


class Head(nn.Module):
    """Normalisation, mean over the patches, classifier.

    The class token takes part in the layers, not in the mean: so are the published networks trained and searched (the
    option `gp` of AutoFormer's commands).
    """

    def __init__(self, width: int, classes: int, positions: RelativePositions) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)` of tokens `(positions * batch, width)`."""
        return self.classify(layer_norm(self.norm, x))

    def classify(self, x: Tensor) -> Tensor:
        """Logits of normalised tokens."""
        x = x.unflatten(0, (self.positions.positions, -1))[1:].mean(0)
        return linear(self.classifier, x, self.classifier.out_features)


class AutoFormer(nn.Module):
    """One network: `embedding`, `layers[i].attention`, `layers[i].mlp`, `head`.

    Takes images `(batch, channels, resolution, resolution)` of its own `input_shape`, gives logits `(batch, classes)`.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.input_shape = spec.input_shape
        self.positions = RelativePositions(spec.grid, spec.reach)
        self.embedding = Embedding(spec)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": Attention(spec.width, layer.heads, spec.head_width, self.positions),
                    "mlp": Perceptron(spec.width, layer.hidden, self.positions),
                }
            )
            for layer in spec.layers
        )
        self.head = Head(spec.width, spec.classes, self.positions)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.spec, lambda y, rate: F.dropout(y, rate) if rate and self.training else y)

    def run(self, x: Tensor, spec: NetworkSpec, drop: Drop) -> Tensor:
        """The forward pass of a network no larger than this one, in the leading parts of these weights."""
        x = drop(self.embedding(x, spec.width), spec.dropout)
        for modules, layer in zip(self.layers, spec.layers, strict=False):
            assert isinstance(modules, nn.ModuleDict)
            x = modules["attention"](x, layer.heads, drop, spec.dropout, layer.drop_path)
            x = modules["mlp"](x, layer.hidden, drop, spec.dropout, layer.drop_path)
        return self.head(x)


class _Alone(nn.Module):
    """One block of a network by itself, for tracing: takes what stands between blocks with a batch dimension."""

    def __init__(self, network: AutoFormer, kind: str) -> None:
        super().__init__()
        self.spec, self.kind = network.spec, kind
        modules = {"embedding": network.embedding, "head": network.head}
        self.block = modules[kind] if kind in modules else network.layers[0].get_submodule(kind)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.spec.layers[0]
        if self.kind == "embedding":
            return self.block(x, self.spec.width)
        x = x.flatten(0, 1)
        if self.kind == "head":
            return self.block(x)
        return self.block(x, layer.heads if self.kind == "attention" else layer.hidden, lambda y, rate: y)


def trace_block(spec: NetworkSpec, kind: str) -> Workload:
    """Operators of the `embedding`, the `head`, or of `attention` or `mlp` of the first layer of a network."""
    with torch.device("meta"):
        network = AutoFormer(replace(spec, layers=spec.layers[:1]))
    tokens = (network.positions.positions, spec.width)
    return trace(_Alone(network, kind), spec.input_shape if kind == "embedding" else tokens)


def layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """`layer` over as many leading channels as `x` has."""
    width = x.shape[-1]
    return F.layer_norm(x, (width,), crop(layer.weight, width), crop(layer.bias, width), layer.eps)


def drop_samples(x: Tensor, batch: int, drop: Drop, rate: float) -> Tensor:
    """Tokens `(positions * batch, width)`, those of some samples all zero (stochastic depth, Huang et al., 2016)."""
    if not rate:
        return x
    whole = torch.ones(batch, dtype=x.dtype, device=x.device)
    kept = drop(whole, rate)
    return x if kept is whole else (x.unflatten(0, (-1, batch)) * kept[:, None]).flatten(0, 1)


def initialise(network: nn.Module) -> None:
    """Normal of 0.02 for linear layers and all embeddings, as in the family's own code; zero biases."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) and name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(module, nn.Linear | Embedding | Attention):
                nn.init.normal_(parameter, std=0.02)
