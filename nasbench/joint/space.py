"""Architecture, width and bit width in one search space."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from nasbench.joint.narrowing import inner_channels, narrowed
from nasbench.pruning.allocation import rounded
from search_spaces import SearchSpace, UserError, load_space
from search_spaces.base import Archs, Block, Catalog, Knob
from search_spaces.supernet import NormStats, Supernet

if TYPE_CHECKING:
    from nasbench.pruning.groups import ChannelGroup

BITS = (8, 32)
# Scores of a group's channels, larger for what is worth more.
Score = Callable[[nn.Module, Sequence["ChannelGroup"]], Mapping[str, NDArray[np.float64]]]


class JointSpace(SearchSpace):
    """A space with two more kinds of knobs: the share of their channels that blocks keep inside, and the bit width.

    The knobs of the space come first, then `width0` to `width<parts - 1>`, one per part of the network, then `bits`.
    Only channels that no other block sees are pruned (the middle of a bottleneck, the squeezed ones of a gate): so
    blocks still fit together, and a block's operators follow from its own choices. `bits` changes no operator; what a
    precision costs is the evaluator's business.

    Args:
        in_channels, num_classes: of the task.
        of: the space, by a preset's name or a TOML file.
        options: of that space.
        widths: shares of the inner channels that stay.
        bits: 8 (int8 after training) and 32.
        parts: the positions of the space are cut in so many parts of equal length.
        multiple: numbers of channels are multiples of it; blocks with fewer keep all.

    Raises:
        UserError: an impossible width or bit width, or a space without channels to prune inside its blocks.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        *,
        of: str = "resnet28",
        options: dict[str, Any] | None = None,
        widths: Sequence[float] = (0.5, 0.75, 1.0),
        bits: Sequence[int] = BITS,
        parts: int = 1,
        multiple: int = 8,
    ) -> None:
        self.base = load_space(of, in_channels, num_classes, **(options or {}))
        self.name = f"joint-{self.base.name}"
        places = len(self.base.block_knobs)
        for key, values, good in (("widths", widths, lambda w: 0 < w <= 1), ("bits", bits, lambda b: b in BITS)):
            if not values or list(values) != sorted(set(values)) or not all(good(v) for v in values):
                expected = "shares above 0 and up to 1" if key == "widths" else "8 and 32"
                raise UserError(f"{self.name}: {key} = {list(values)}: expected {expected}, ascending")
        if not 1 <= parts <= places:
            raise UserError(f"{self.name}: parts = {parts}: expected 1 to {places}, the positions of {self.base.name}")
        if multiple < 1:
            raise UserError(f"{self.name}: multiple = {multiple}: expected 1 or more")
        self.widths, self.bits, self.parts, self.multiple = tuple(widths), tuple(bits), parts, multiple
        self.part = np.arange(places) * parts // places  # of each position
        if not any(inner_channels(self.base.catalog[int(b)].workload) for b in self._largest_blocks()):
            raise UserError(f"{self.name}: no block of {self.base.name!r} has channels of its own that could be pruned")

    def _largest_blocks(self) -> NDArray[np.int32]:
        ids = self.base.blocks(self.base.references["largest"][None])[0]
        return ids[ids >= 0]

    @cached_property
    def knobs(self) -> tuple[Knob, ...]:
        widths = tuple(Knob(f"width{part}", self.widths) for part in range(self.parts))
        return (*self.base.knobs, *widths, Knob("bits", self.bits))

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.base.input_shape

    @property
    def num_classes(self) -> int:
        return self.base.num_classes

    @property
    def size(self) -> int:
        """The exact number of choices; where rounding makes two widths one, they still count as two."""
        return self.base.size * len(self.widths) ** self.parts * len(self.bits)

    @property
    def references(self) -> dict[str, Archs]:
        """Those of the space, whole and in the most bits, and the smallest of all."""
        whole = [len(self.widths) - 1] * self.parts + [len(self.bits) - 1]
        named = {name: np.append(row, whole).astype(self.dtype) for name, row in self.base.references.items()}
        return {**named, "smallest": np.append(self.base.references["smallest"], [0] * len(whole)).astype(self.dtype)}

    def bits_of(self, archs: Archs) -> NDArray[np.int64]:
        """Bit widths `(n,)` of architectures `(n, K)`."""
        return np.array(self.bits)[np.asarray(archs)[:, -1]]

    def inner(self, archs: Archs) -> Archs:
        """The rows `(n, k)` that architectures `(n, K)`, or one `(K,)`, have in the space that is wrapped."""
        return np.asarray(archs)[..., : len(self.base.knobs)].astype(self.base.dtype)

    def active(self, archs: Archs) -> NDArray[np.bool_]:
        own = np.ones((len(archs), self.parts + 1), dtype=bool)
        return np.hstack([self.base.active(self.inner(archs)), own])

    @cached_property
    def catalog(self) -> Catalog:
        return Catalog(len(self.base.catalog) * len(self.widths), self._make_block)

    def _make_block(self, index: int) -> Block:
        block, width = divmod(index, len(self.widths))
        made = self.base.catalog[block]
        return Block(made.name, narrowed(made.workload, lambda channels: self._count(channels, self.widths[width])))

    def _count(self, channels: int, share: float) -> int:
        from nasbench.pruning.groups import ChannelGroup

        return rounded(ChannelGroup("", channels, ()), share * channels, self.multiple)

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        ids = self.base.blocks(self.inner(archs)).astype(np.int64)
        width = np.asarray(archs)[:, len(self.base.knobs) + self.part].astype(np.int64)
        return np.where(ids < 0, -1, ids * len(self.widths) + width).astype(np.int32)

    @property
    def block_knobs(self) -> tuple[tuple[int, ...], ...]:
        first = len(self.base.knobs)
        return tuple((*knobs, first + int(p)) for knobs, p in zip(self.base.block_knobs, self.part, strict=True))

    def build(self, arch: Archs) -> nn.Module:
        """A freshly initialised network: the leading channels of the whole one."""
        return self.pruned(self.base.build(self.inner(arch)), arch)

    def supernet(self) -> JointSupernet:
        return JointSupernet(self)

    def pruned(self, network: nn.Module, arch: Archs, score: Score | None = None) -> nn.Module:
        """A copy of the whole network of architecture `(K,)` with the inner channels that its widths leave.

        Args:
            score: of channels, the strongest of which stay; None for the leading ones.

        Raises:
            UserError: the network's channels are not those that its operators told of.
        """
        told = self._inner_channels(arch)
        if all(share == 1 for _, share in told):
            return copy.deepcopy(network)
        from nasbench.pruning.groups import find_channels, removed
        from nasbench.pruning.importance import strongest

        shape = getattr(network, "input_shape", self.input_shape)
        groups = [g for g in find_channels(network, shape).groups if _inside(network, g)]
        left, counts = list(groups), dict[str, int]()
        for channels, share in told:
            here, left = left[: len(channels)], left[len(channels) :]
            if sorted(g.channels for g in here) != sorted(channels):
                raise UserError(
                    f"{self.name}: the network has inner channels {[g.channels for g in groups]}, its operators tell "
                    f"of {[channels for channels, _ in told]}"
                )
            counts |= {g.name: self._count(g.channels, share) for g in here}
        counts = {g.name: counts[g.name] for g in groups if counts[g.name] < g.channels}
        if score is None:
            scores: Mapping[str, NDArray[np.float64]] = {g.name: -np.arange(g.channels, dtype=float) for g in groups}
        else:
            scores = score(network, groups)
        smaller = removed(network, groups, strongest(dict(scores), counts))
        if hasattr(network, "input_shape"):
            smaller.input_shape = shape  # type: ignore[assignment]
        return smaller

    def _inner_channels(self, arch: Archs) -> list[tuple[list[int], float]]:
        """Per block the inner channels of the whole network, and the share that stays."""
        ids = self.base.blocks(self.inner(arch)[None])[0]
        widths = np.asarray(arch)[len(self.base.knobs) + self.part]
        found = []
        for block, width in zip(ids, widths, strict=True):
            if block >= 0:
                channels = [count for count, _ in inner_channels(self.base.catalog[int(block)].workload)]
                found.append((channels, self.widths[int(width)]))
        return found


def _inside(network: nn.Module, group: ChannelGroup) -> bool:
    """Whether all layers of a group lie in one module of a block, and not only in a list of blocks."""
    parts = [member.module.split(".")[:-1] for member in group.members]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return bool(common) and not isinstance(network.get_submodule(".".join(common)), nn.Sequential | nn.ModuleList)


class JointSupernet(Supernet):
    """The supernet of the space that is wrapped: it trains and knows whole networks, whatever the widths and bits.

    Its weights have the names of that supernet's, so that either's checkpoints load into the other.
    """

    def __init__(self, space: JointSpace) -> None:
        super().__init__()
        self.space = space
        self.whole = space.base.supernet()

    def forward(self, x: Tensor, arch: Archs, stats: NormStats | None = None, generator: Any = None) -> Tensor:
        logits: Tensor = self.whole(x, self.space.inner(arch), stats, generator)
        return logits

    def calibrate(self, arch: Archs, batches: Iterable[Tensor]) -> NormStats:
        return self.whole.calibrate(self.space.inner(arch), batches)

    def extract(self, arch: Archs, stats: NormStats) -> nn.Module:
        """The whole network; `JointSpace.pruned` takes channels out, and then statistics are to be taken anew."""
        return self.whole.extract(self.space.inner(arch), stats)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.whole.load_state_dict(state_dict, *args, **kwargs)
