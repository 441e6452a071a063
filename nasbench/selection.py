"""Which networks go on to the stages: rules over the verified front, or by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.objectives import Objective, minimised
from nasbench.pareto import knee
from search_spaces import SearchSpace, UserError, nearest


def select(
    values: NDArray[np.float64],
    objectives: tuple[Objective, ...],
    rule: str,
    count: int,
    objective: str | None = None,
) -> list[int]:
    """Rows of a front chosen by a rule.

    Args:
        values: `(n, M)` of non-dominated networks within the limits, in the objectives' own units, not NaN.
        rule: `knee` (the knee point and its nearest neighbours along the front), `spread` (evenly spaced along the
            front, both ends included), `best` (best by `objective`).
        count: how many; fewer where the front has fewer.
        objective: name, for `best`; the first by default.

    Returns:
        Row indices, the most wanted first.

    Raises:
        UserError: an empty front or an unknown objective.
    """
    if not len(values):
        raise UserError("no network is within all limits, so there is none to select; loosen a limit")
    count = min(count, len(values))
    costs = minimised(values, objectives)
    if rule == "best":
        names = [o.name for o in objectives]
        if objective is not None and objective not in names:
            raise UserError(f"selection.objective = {objective!r} is no objective; there are {', '.join(names)}")
        column = names.index(objective) if objective else 0
        return np.lexsort((*costs.T[::-1], costs[:, column]))[:count].tolist()
    # Distance along the front: by the first objective, in units of each objective's range.
    span = np.ptp(costs, axis=0)
    scaled = (costs - costs.min(0)) / np.where(span > 0, span, 1.0)
    order = np.lexsort(scaled.T[::-1])
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(scaled[order], axis=0), axis=1))])
    if rule == "knee":
        here = along[np.flatnonzero(order == knee(costs))[0]]
        return order[np.argsort(np.abs(along - here), kind="stable")[:count]].tolist()
    positions = np.linspace(0.0, along[-1], count) if count > 1 else along[-1:] / 2
    return order[nearest_each(along, positions, np.zeros(len(along), dtype=bool))].tolist()


def nearest_each(
    places: NDArray[np.float64], positions: NDArray[np.float64], taken: NDArray[np.bool_]
) -> NDArray[np.intp]:
    """`(m,)` rows of `places` `(n,)`: for each of `(m,)` positions in turn, the first of the nearest that are free.

    Args:
        taken: `(n,)` rows that are not free; of the others there are at least `m`.
    """
    taken = taken.copy()
    rows = np.empty(len(positions), dtype=np.intp)
    for i, position in enumerate(positions):
        rows[i] = np.where(taken, np.inf, np.abs(places - position)).argmin()
        taken[rows[i]] = True
    return rows


def named_networks(space: SearchSpace, networks: Sequence[str | dict[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Architectures by reference name, or as `{knob: choice}`.

    Raises:
        UserError: an unknown name, knob or choice, or none named.
    """
    chosen: dict[str, np.ndarray[Any, Any]] = {}
    for index, network in enumerate(networks):
        if isinstance(network, dict):
            chosen[f"named-{index:02d}"] = space.encode(network)
        elif network in space.references:
            chosen[network] = space.references[network]
        else:
            raise UserError(f"selection.networks: unknown network {network!r}. {nearest(network, space.references)}")
    if not chosen:
        raise UserError("selection.rule = 'named' needs selection.networks")
    return chosen
