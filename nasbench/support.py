"""What a search may propose: the part of a space that its target devices run.

Before a search every operator of the space is held against every target. Blocks with an operator that a target does not
run are taken out of the space, so that no strategy ever proposes them; where no architecture does without, that is told
at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hardware_profiles import Target
from hardware_profiles.constraints import Finding, check_workload
from nasbench.feasibility import fewest_blocks
from predictors.base import EAGER_BLOCKS
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

log = logging.getLogger(__name__)

Fallback = Literal["avoid", "allow", "refuse"]
_NAMED = 4  # blocks and operators named in a message before it says how many more there are


@dataclass(frozen=True)
class SupportedSpace:
    """The part of a space that targets run.

    Args:
        space: without the blocks that no proposal may have; the space itself where there are none.
        notes: what was left out or will run on a host's CPU, one sentence each, for people.
    """

    space: SearchSpace
    notes: tuple[str, ...]


def unsupported_blocks(space: SearchSpace, target: Target) -> NDArray[np.bool_]:
    """Which blocks of the catalog have an operator that the target does not run, `(len(catalog),)` bool."""
    catalog = space.catalog
    rules = target.constraints
    if not (rules.operators or rules.unsupported_operators or rules.limits or rules.max_rank):
        return np.zeros(len(catalog), dtype=bool)
    if len(catalog) > EAGER_BLOCKS:
        log.warning(
            "%s has %d distinct blocks: holding them against %s takes long", space.name, len(catalog), target.name
        )
    return np.fromiter((bool(check_workload(block.workload, target)) for block in catalog), bool, len(catalog))


def supported_space(space: SearchSpace, targets: Sequence[Target], fallback: Fallback = "avoid") -> SupportedSpace:
    """The architectures of a space that all targets run.

    A network with an operator that its device refuses is never proposed. Where a device would leave the operator to the
    CPU of its host, `fallback` decides: `avoid` leaves such networks out, unless all are such; `allow` keeps them;
    `refuse` leaves them out in any case.

    Raises:
        UserError: no architecture runs on a target (or on all of them at once); names operators, blocks and devices.
    """
    notes: list[str] = []
    names: list[str] = []
    # What must be kept comes first, so that what may be given up is given up for it.
    for target in sorted(targets, key=lambda t: _may_fall_back(t, fallback)):
        blocked = unsupported_blocks(space, target)
        if not blocked.any():
            continue
        where = _blocks_text(space, blocked, target)
        if _may_fall_back(target, fallback) and fallback == "allow":
            notes.append(f"{target.name} leaves to its host's CPU, far slower: {where}")
            continue
        restricted = space.without_blocks(blocked)
        # Blocks were taken out for other targets before, so the least is sought in what they left.
        exact = fewest_blocks(space, blocked)
        nearest = _sampled(restricted) if exact is None else exact
        if restricted.permits(nearest[None])[0]:
            space = restricted
            names.append(target.name)
            notes.append(f"architectures that {target.name} does not run are left out: {where}{_choices_text(space)}")
        elif _may_fall_back(target, fallback):
            notes.append(
                f"every architecture leaves operators to the CPU of {target.name}'s host, far slower than a prediction "
                f"for the device alone: {where}"
            )
        else:
            raise UserError(_refusal(space, nearest, target, names))
    return SupportedSpace(space, tuple(notes))


def _may_fall_back(target: Target, fallback: Fallback) -> bool:
    return target.constraints.otherwise == "host_cpu" and fallback != "refuse"


def _sampled(restricted: SearchSpace) -> Archs:
    """A permitted architecture if random ones show one, else any: for spaces that tie too many knobs together."""
    try:
        return restricted.sample(1, np.random.default_rng(0))[0]
    except UserError:
        return np.zeros(len(restricted.knobs), dtype=restricted.dtype)


def _findings(space: SearchSpace, ids: Sequence[int], target: Target) -> list[tuple[str, Finding]]:
    """Block name and finding for every operator of these blocks that the target does not run."""
    blocks = [space.catalog[int(i)] for i in ids if i >= 0]
    return [(block.name, finding) for block in blocks for finding in check_workload(block.workload, target)]


def _blocks_text(space: SearchSpace, blocked: NDArray[np.bool_], target: Target) -> str:
    return _text(_findings(space, np.flatnonzero(blocked).tolist(), target))


def _text(findings: Sequence[tuple[str, Finding]]) -> str:
    """Reasons with the blocks that they concern, each once."""
    by_reason: dict[str, dict[str, None]] = {}
    for block, finding in findings:
        by_reason.setdefault(finding.reason, {})[block] = None
    parts = [f"{reason} (in {_some(list(blocks))})" for reason, blocks in by_reason.items()]
    return _some(parts, "; ")


def _some(names: Sequence[str], separator: str = ", ") -> str:
    shown = separator.join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _choices_text(space: SearchSpace) -> str:
    """The choices that are never possible now, if there are such."""
    lost = []
    for index, knob in enumerate(space.knobs):
        offered = set(space.menu.choices(index).tolist())
        gone = [str(choice) for i, choice in enumerate(knob.choices) if i not in offered]
        if gone:
            lost.append(f"{knob.name} = {' or '.join(gone)}")
    return f". Never chosen: {_some(lost)}" if lost else ""


def _refusal(space: SearchSpace, nearest: Archs, target: Target, others: Sequence[str]) -> str:
    findings = _findings(space, space.blocks(nearest[None])[0].tolist(), target)
    source = findings[0][1].source
    beside = f" that {' and '.join(others)} run{'s' if len(others) == 1 else ''}" if others else ""
    then = (
        "it refuses such networks"
        if target.constraints.otherwise == "refused"
        else 'they would be left to its host\'s CPU, which targets.fallback = "refuse" rules out'
    )
    return (
        f"{target.name} runs no architecture of space {space.name!r}{beside}: {then}. With the fewest such operators: "
        f"{_text(findings)} ({source}). Choose another space or target."
    )
