"""Which architectures progressive shrinking trains when: knobs open one after another, from their largest choice on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from search_spaces import Archs, SearchSpace, UserError

# What a run without phases of its own does, in once-for-all's order; the rest trains the largest network alone.
_DEFAULT_SHARE = 0.2
_RESOLUTION = re.compile("resolution")
LARGEST = "largest"


@dataclass(frozen=True)
class Phase:
    """A share of the steps in which some knobs open.

    Args:
        name: as the user calls it.
        knobs: indices of the knobs that open in it.
        begin, end: steps.
    """

    name: str
    knobs: tuple[int, ...]
    begin: int
    end: int


class Shrinking:
    """Progressive shrinking (once-for-all: Cai et al., ICLR 2020) over the knobs of any space.

    First the largest network is trained alone. Then knobs open, phase by phase, and stay open. In its phase a knob's
    choices become available one rank at a time, from the most costly to the cheapest, in equal parts of the phase: as
    once-for-all does for depth and width. A knob that no phase names is elastic from the first step, as once-for-all's
    resolution is.

    Args:
        space: any.
        largest: its largest architecture, `(K,)`.
        phases: regular expressions for names of knobs, in the order in which they open, each with its share of the
            steps; what is left to 1 is the largest network's. None opens kernels, depths, and then all others but
            resolutions, as far as there are such, each in a fifth of the steps.
        steps: of the whole training.

    Raises:
        UserError: a phase that matches no knob which is still closed, or shares that leave nothing for the largest.
    """

    def __init__(self, space: SearchSpace, largest: Archs, phases: Mapping[str, float] | None, steps: int) -> None:
        self._space = space
        self._largest = largest
        self.phases: list[Phase] = []
        named = named_phases(space, phases)
        done = 1 - sum(share for _, _, share in named)
        begin = self.begin = round(done * steps)
        for name, knobs, share in named:
            done += share
            end = round(done * steps)
            self.phases.append(Phase(name, knobs, begin, end))
            begin = end
        self._ranks = {k: _by_cost(space, largest, k) for phase in self.phases for k in phase.knobs}

    def phase(self, step: int) -> str:
        """What the phase of a step is called."""
        return next((p.name for p in reversed(self.phases) if p.begin <= step), LARGEST)

    def draw(self, n: int, step: int, rng: np.random.Generator) -> Archs:
        """`n` architectures of what is open at a step, each open knob uniform and independent; `(n, K)` canonical."""
        open_: list[np.ndarray] = [np.arange(count) for count in self._space.cardinalities]
        for phase in self.phases:
            for knob in phase.knobs:
                ranks = self._ranks[knob]
                share = (step - phase.begin) / max(1, phase.end - phase.begin)
                more = 0 if step < phase.begin else 1 + int(share * (len(ranks) - 1))
                open_[knob] = ranks[: 1 + more]
        columns = [choices[(rng.random(n) * len(choices)).astype(np.intp)] for choices in open_]
        return self._space.canonical(np.stack(columns, axis=1).astype(self._space.dtype))


def named_phases(space: SearchSpace, phases: Mapping[str, float] | None) -> list[tuple[str, tuple[int, ...], float]]:
    """Name, knobs and share of the steps of every phase; see `Shrinking`, which raises the same."""
    named = _matched(space, phases) if phases else _default(space)
    if sum(share for _, _, share in named) >= 1 or any(not share > 0 for _, _, share in named):
        raise UserError(
            f"phases = {dict(phases or {})}: expected shares of the steps above 0, their sum below 1; the rest "
            "trains the largest network, which teaches the others"
        )
    return named


def _default(space: SearchSpace) -> list[tuple[str, tuple[int, ...], float]]:
    groups: dict[str, list[int]] = {"kernel": [], "depth": [], "width": []}
    for index, knob in enumerate(space.knobs):
        if not _RESOLUTION.search(knob.name) and len(knob.choices) > 1:
            groups[next((g for g in ("kernel", "depth") if g in knob.name), "width")].append(index)
    return [(name, tuple(knobs), _DEFAULT_SHARE) for name, knobs in groups.items() if knobs]


def _matched(space: SearchSpace, phases: Mapping[str, float]) -> list[tuple[str, tuple[int, ...], float]]:
    found, taken = [], set[int]()
    names = [k.name for k in space.knobs]
    for pattern, share in phases.items():
        try:
            knobs = {i for i, name in enumerate(names) if re.search(pattern, name)} - taken
        except re.error as error:
            raise UserError(f"phases: {pattern!r} is no regular expression: {error}") from error
        if not knobs:
            some = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise UserError(f"phases: {pattern!r} matches no knob that is still closed; the knobs are {some}")
        taken |= knobs
        found.append((pattern, tuple(sorted(knobs)), float(share)))
    return found


def _by_cost(space: SearchSpace, largest: Archs, knob: int) -> np.ndarray:
    """A knob's choices from the largest network's own on, then by multiply-accumulates and parameters, falling."""

    def cost(choice: int) -> tuple[bool, int, int]:
        arch = largest.copy()
        arch[knob] = choice
        workload = space.workload(space.canonical(arch[None])[0])
        return choice == largest[knob], workload.macs, workload.params

    return np.array(sorted(range(space.cardinalities[knob]), key=cost, reverse=True))
