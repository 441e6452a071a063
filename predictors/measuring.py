"""Calibrating by measuring: a few dozen networks chosen, run on the device and fitted, or an earlier result reused."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hardware_profiles.converted import ConvertedFiles
from hardware_profiles.host import host_fingerprint
from hardware_profiles.measuring import Progress, conditions, convert_and_measure, measuring_progress
from hardware_profiles.meter import Artifact, Converter, Meter
from hardware_profiles.profile import Target
from hardware_profiles.runtimes import converter_for, meter_for
from predictors.calibration import Calibration, MeasuredRow, calibrations_dir, file_stem, fit_target
from predictors.calibration_methods import Method
from predictors.operator_features import COORDINATES, GROUPS, QUANTITIES
from predictors.operator_model import LEAST_NETWORKS
from predictors.roofline import Roofline
from predictors.suite import CalibrationNetwork, calibration_suite
from search_spaces import SearchSpace, UserError, Workload
from search_spaces.base import Archs

if TYPE_CHECKING:
    from torch import nn

CANDIDATES = 2000
MAX_AGE_DAYS = 30.0


@dataclass(frozen=True)
class SpaceNetwork:
    """One architecture of a space, as a network to calibrate with."""

    space: SearchSpace
    row: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.space.name}:{'.'.join(map(str, self.row))}"

    @property
    def family(self) -> str:
        return self.space.name

    @property
    def input_shape(self) -> tuple[int, ...]:
        return network_input_shape(self.space, self._arch)

    def build(self) -> nn.Module:
        return self.space.build(self._arch)

    def workload(self) -> Workload:
        return self.space.workload(self._arch)

    @property
    def _arch(self) -> Archs:
        return np.array(self.row, dtype=self.space.dtype)


def calibrate(
    target: Target,
    spaces: SearchSpace | Sequence[SearchSpace | CalibrationNetwork] | None = None,
    networks: int = 32,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
    max_age_days: float = MAX_AGE_DAYS,
    method: Method | Literal["auto"] = "operator_model",
    files: Path | None = None,
) -> Calibration:
    """Measure networks on a target and fit a latency model; or reuse an earlier calibration.

    An earlier one is reused if it is of the same networks, machine, runtime version and operating point, and not too
    old; a cache file that is damaged is said so and measured anew. A network that the runtime cannot convert or run is
    recorded with the reason and left out.

    Args:
        target: one that can be measured here.
        spaces: one or several spaces, among which `networks` are shared out evenly, or networks themselves (such as
            reference networks), all of which are taken; all fitted together. None means `calibration_suite`, for a
            model of networks of any kind.
        networks: number to measure, 8 at least.
        seed: of the choice of networks and of their weights.
        cache: directory of earlier calibrations; None means `calibrations` in the user's data directory.
        progress: called with (phase, done, total): `convert`, counted in networks, then `measure`, in passes.
        max_age_days: older calibrations are not reused.
        method: as `fit_target` takes it.
        files: directory where converted networks are kept for later runs, see `ConvertedFiles`; None keeps none.

    Raises:
        UserError: a target that cannot be measured here, too few networks, two of one name, or too many that failed.
    """
    meter = meter_for(target, measuring_progress(progress))
    converter = converter_for(target)
    chosen = _chosen(target, spaces, networks, seed)
    key = _key(target, meter, chosen, method)
    path = (cache or calibrations_dir()) / f"{file_stem(target)}-{key[:16]}.json"
    found = _cached(path, key, max_age_days)
    if found:
        return found

    by_name = {network.name: network for network in chosen}
    kept = ConvertedFiles(files, target) if files else None
    taken = convert_and_measure(
        target,
        {name: partial(_convert, network, converter, target, kept) for name, network in by_name.items()},
        meter,
        progress,
    )
    if len(taken.measured) < LEAST_NETWORKS:
        reason = next(iter(taken.failures.values()))
        raise UserError(
            f"{target.name}: {len(taken.failures)} of {len(chosen)} networks could not be measured: {reason}"
        )
    calibration = fit_target(
        target,
        [MeasuredRow.of(by_name[name].family, m) for name, m in taken.measured.items()],
        [by_name[name].workload() for name in taken.measured],
        method=method,
        key=key,
        host=host_fingerprint() if target.profile.local else next(iter(taken.measured.values())).protocol.host,
        protocol=next(iter(taken.measured.values())).protocol,
        failures=taken.failures,
        seconds=taken.seconds,
    )
    try:
        calibration.save(path)
    except UserError as error:
        warnings.warn(f"{error} The calibration is used, but not kept for later runs.", stacklevel=2)
    return calibration


def converted(network: CalibrationNetwork, files: ConvertedFiles) -> Artifact:
    """The network's artifact among the files kept, converted if it is not there.

    Raises:
        UserError: the runtime does not take it.
    """
    return files.convert(_identity(network), network.build, network.input_shape)


def is_converted(network: CalibrationNetwork, files: ConvertedFiles) -> bool:
    """Whether the network is among the files kept, or known to be refused."""
    return files.has(_identity(network), network.input_shape)


def _identity(network: CalibrationNetwork) -> str:
    return json.dumps([network.name, *_operators(network.workload())])


def _convert(
    network: CalibrationNetwork, converter: Converter, target: Target, kept: ConvertedFiles | None, stem: Path
) -> Artifact:
    if kept:
        return converted(network, kept)
    return converter.convert(network.build(), target, network.input_shape, stem.with_suffix(f".{converter.format}"))


def _chosen(
    target: Target, spaces: SearchSpace | Sequence[SearchSpace | CalibrationNetwork] | None, networks: int, seed: int
) -> list[CalibrationNetwork]:
    """What to measure.

    Raises:
        UserError: too few networks, or two of one name.
    """
    if spaces is None:
        return list(calibration_suite(networks, seed))
    given = [spaces] if isinstance(spaces, SearchSpace) else list(spaces)
    some = [s for s in given if isinstance(s, SearchSpace)]
    chosen: list[CalibrationNetwork] = [s for s in given if not isinstance(s, SearchSpace)]
    if some and networks < LEAST_NETWORKS * len(some):
        raise UserError(
            f"calibration.networks: {networks} for {len(some)} spaces; at least {LEAST_NETWORKS} per space are needed"
        )
    shares = [len(part) for part in np.array_split(np.arange(networks), len(some))] if some else []
    for space, share in zip(some, shares, strict=True):
        rows = choose(space, share, target, np.random.default_rng(seed))
        chosen += [SpaceNetwork(space, tuple(row.tolist())) for row in rows]
    if len(chosen) < LEAST_NETWORKS:
        raise UserError(f"calibration needs at least {LEAST_NETWORKS} networks, got {len(chosen)}")
    names = [network.name for network in chosen]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"calibration: two networks are called {twice[0]!r}")
    return chosen


def network_input_shape(space: SearchSpace, arch: Archs) -> tuple[int, ...]:
    """`(channels, height, width)` that the network of an architecture takes, by its workload's graph input."""
    workload = space.workload(arch)
    return workload.tensors[workload.inputs[0]].shape


def choose(space: SearchSpace, n: int, target: Target, rng: np.random.Generator) -> Archs:
    """`(<= n, K)` distinct architectures spread over a space's latencies, the extremes included.

    Candidates are ordered by their roofline latency and one is drawn from each of n equal ranges of rank: the networks
    that a search will ask about are represented as they occur, and two ends found by coordinate descent keep it from
    extrapolating.
    """
    roofline = Roofline(target).bind(space)
    candidates = np.unique(space.sample(CANDIDATES, rng), axis=0)
    cost = roofline.predict(candidates).mean
    ends = [_extreme(space, candidates[np.argmin(sign * cost)], sign, roofline) for sign in (1.0, -1.0)]
    inner = ~(candidates[:, None] == ends).all(2).any(1)
    order = np.flatnonzero(inner)[np.argsort(cost[inner], kind="stable")]
    drawn = [candidates[rng.choice(part)] for part in np.array_split(order, max(1, n - 2)) if len(part)]
    return np.unique(np.array([*ends, *drawn]), axis=0)


def _extreme(space: SearchSpace, arch: Archs, sign: float, roofline: Any) -> Archs:
    """The cheapest (`sign` 1) or dearest (-1) architecture that changing one knob at a time leads to."""
    while True:
        trials = [arch]
        for knob, count in enumerate(space.cardinalities):
            for choice in range(int(count)):
                trials.append(arch.copy())
                trials[-1][knob] = choice
        archs = space.canonical(np.array(trials))
        cost = sign * roofline.predict(archs).mean
        best = int(np.argmin(cost))
        if cost[best] >= cost[0]:
            return archs[0]
        arch = archs[best]


def _key(target: Target, meter: Meter, chosen: Sequence[CalibrationNetwork], method: str) -> str:
    """A digest of everything that the measured latencies depend on."""
    what = {
        "format": Calibration.model_fields["format"].default,
        "method": method,
        "conditions": conditions(target, meter),
        "features": [GROUPS, QUANTITIES, COORDINATES],
        "networks": [(network.name, *_operators(network.workload())) for network in chosen],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _operators(workload: Workload) -> list[Any]:
    """The operators of a network as JSON-able values."""
    return [
        [op.kind, [t.shape for t in op.inputs], op.output.shape, op.kernel, op.stride, op.groups, op.params]
        for op in workload.operators
    ]


def _cached(path: Path, key: str, max_age_days: float) -> Calibration | None:
    if not path.is_file():
        return None
    try:
        found = Calibration.load(path)
    except UserError as error:
        warnings.warn(f"{error} Measuring again.", stacklevel=3)
        return None
    age = datetime.now(UTC) - found.created
    return found if found.key == key and age.total_seconds() <= max_age_days * 86400 else None
