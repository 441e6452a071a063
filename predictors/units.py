"""Whether measured values can all be in the unit that they are said to be in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hardware_profiles.profile import Target
from predictors.base import Array
from search_spaces import UserError, Workload

# Units lie a thousand apart, and devices attain of different operators a tenth or ten times what is expected.
OTHER_UNIT = 100.0
# What a runtime may spend on an inference apart from its operators; what it spends beyond that grows with the network.
OVERHEAD_MS = 20.0
# No guess of peaks is so far off.
NO_GUESS = 1e5
# Algorithms save arithmetic (Winograd's of a 4x4 tile does with a quarter), and stated peaks may be of one core.
ABOVE_PEAK = 10.0
_COMPARED = 64  # networks, of different costs, that all others are compared with


def odd_one(values: Array, expected: Array) -> tuple[int, int] | None:
    """The value most at odds with the others, and one of those; None where all may be in one unit.

    Two values are at odds where one is `OTHER_UNIT` times the other, and still is in relation to what is expected of
    both: what every network pays alike (overhead) brings values closer together than expected, in no other order.

    Args:
        values: `(n,)`, positive.
        expected: `(n,)` of them, in any unit.
    """
    n = len(values)
    some = np.argsort(expected, kind="stable")[np.linspace(0, n - 1, min(n, _COMPARED)).round().astype(int)]
    logs, ratios = np.log(values), np.log(values / expected)
    differences = [x[:, None] - x[some] for x in (logs, ratios)]
    more = np.minimum(*differences) > np.log(OTHER_UNIT)
    less = np.maximum(*differences) < -np.log(OTHER_UNIT)
    odds = more | less
    if not odds.any():
        return None
    # Of two that are at odds with each other only, the one that is further from what is expected.
    worst = int(np.lexsort((np.abs(ratios), odds.sum(1)))[-1])
    return worst, int(some[odds[worst]][0])


def check_mixed(target: Target, metric: str, networks: Sequence[str], values: Array, expected: Array) -> None:
    """Refuse values of which one is in another unit than the others.

    Raises:
        UserError: names the network, its value, and another network's.
    """
    found = odd_one(values, expected)
    if found is None:
        return
    worst, other = found
    times = values[worst] / values[other] / (expected[worst] / expected[other])
    raise UserError(
        f"{target.name}: {metric} of {networks[worst]} is {values[worst]:g}, {max(times, 1 / times):.0f} times "
        f"{'more' if times > 1 else 'less'} than that of other networks, as {values[other]:g} of {networks[other]}, "
        "leads to expect: is it in another unit?"
    )


def level_doubt(target: Target, metric: str, workloads: Sequence[Workload], values: Array, expected: Array) -> str:
    """What is doubtful of all values together, next to the profile's figures; empty where nothing is.

    Args:
        values: `(n,)` in the metric's unit.
        expected: `(n,)` by the profile; of energy, at 1 W where nobody states the power, and then nothing is doubted.

    Raises:
        UserError: they are further off than any guess.
    """
    power = 1.0 if metric == "latency_ms" else target.point.power_w
    if power is None:
        return ""
    more, less = float(np.median((values - OVERHEAD_MS * power) / expected)), float(np.median(expected / values))
    if max(more, less) > NO_GUESS:
        raise UserError(
            f"{target.name}: {metric} is {max(more, less):.2g} times {'more' if more > less else 'less'} than the "
            f"profile's figures lead to expect, as {values[0]:g} of the first network: it is in another unit"
        )
    if more > OTHER_UNIT:
        return f"{metric} is {more:.0f} times what the profile's figures lead to expect"
    peak = target.point.peak_gmacs
    least = np.array([w.macs for w in workloads]) * target.batch / (peak * 1e6)
    if metric == "latency_ms" and (faster := float(np.median(least / values))) > ABOVE_PEAK:
        return f"{metric} is {faster:.0f} times less than arithmetic alone takes at peak_gmacs = {peak:g}"
    return f"{metric} is {less:.0f} times less than the profile's figures lead to expect" if less > OTHER_UNIT else ""
