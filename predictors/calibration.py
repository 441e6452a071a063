"""Calibration: a few dozen networks measured on a device, and the latency model they give."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from pydantic import Field

from hardware_profiles.host import host_fingerprint
from hardware_profiles.meter import Artifact, Measurement
from hardware_profiles.paths import user_data_dir
from hardware_profiles.profile import Target
from hardware_profiles.records import KeptRecord, Record
from hardware_profiles.runtimes import converter_for, meter_for
from predictors.operator_features import COORDINATES, GROUPS, QUANTITIES
from predictors.operator_model import LEAST_NETWORKS, Fit, OperatorModel
from predictors.quality import figures
from predictors.roofline import Roofline
from predictors.suite import CalibrationNetwork, calibration_suite
from search_spaces import SearchSpace, UserError, Workload
from search_spaces.base import Archs

if TYPE_CHECKING:
    from torch import nn

FORMAT = 2
CANDIDATES = 2000
MAX_AGE_DAYS = 30.0

Progress = Callable[[str, int, int], None]


class MeasuredNetwork(Record):
    """One measured network: what it was, and its latency.

    Args:
        name: unique in a calibration.
        family: the space it is of, or the family of designs.
        architecture: knob -> choice, of a network of a space.
        latency_ms: the protocol's statistic; None where converting or measuring failed, with the reason in `note`.
    """

    name: str
    family: str
    architecture: dict[str, int | float | str] = Field(default={})
    latency_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    median_ms: float | None = None
    throttled: bool = False
    note: str = ""


@dataclass(frozen=True)
class SpaceNetwork:
    """One architecture of a space, as a network to calibrate with."""

    space: SearchSpace
    row: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.space.name}-{'.'.join(map(str, self.row))}"

    @property
    def family(self) -> str:
        return self.space.name

    @property
    def architecture(self) -> dict[str, int | float | str]:
        return self.space.decode(self._arch)

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


class Calibration(KeptRecord):
    """Measurements of one target, and the model fitted to them, frozen: a run that keeps this file predicts the same.

    Args:
        target: `device:operating-point`.
        key: identifies what was to be measured, on which machine and with which runtime.
        created: time of day, UTC.
        protocol: how it was measured.
        networks: all that were to be measured.
        model: the fitted numbers of `OperatorModel`.
        quality: figures of networks left out, a family at a time (or an eighth, of one or two families):
            `predictors.quality.figures`; and how many `networks`, `failed` and `throttled` there were.
        seconds: what measuring took, by phase.
    """

    kind = "calibration"
    otherwise = "delete it and calibrate again"

    format: int = FORMAT
    target: str
    key: str
    created: datetime
    host: str
    protocol: dict[str, Any]
    networks: tuple[MeasuredNetwork, ...]
    model: Fit
    quality: dict[str, float]
    seconds: dict[str, float]

    def predictor(self) -> OperatorModel:
        """The fitted model; the same bits whenever and wherever the file is loaded."""
        return OperatorModel(self.model)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or one that is damaged or of another version.
        """
        found = super().load(path)
        try:
            found.predictor()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return found


def calibrate(
    target: Target,
    spaces: SearchSpace | Sequence[SearchSpace | CalibrationNetwork] | None = None,
    networks: int = 32,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
    max_age_days: float = MAX_AGE_DAYS,
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

    Raises:
        UserError: a target that cannot be measured here, too few networks, or too many that failed.
    """
    meter = meter_for(target, partial(progress, "measure") if progress else None)
    converter = converter_for(target)
    chosen = _chosen(target, spaces, networks, seed)
    key = _key(target, chosen, meter.runtime_version())
    path = (cache or user_data_dir() / "calibrations") / f"{target.name.replace(':', '-')}-{key[:16]}.json"
    found = _cached(path, key, max_age_days)
    if found:
        return found

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="nasbench-calibration-") as directory:
        artifacts: dict[int, Artifact] = {}
        failures: dict[int, str] = {}
        for i, network in enumerate(chosen):
            try:
                artifacts[i] = converter.convert(
                    network.build(), target, network.input_shape, Path(directory) / f"{i}.{converter.format}"
                )
            except UserError as error:
                failures[i] = str(error)
            if progress:
                progress("convert", i + 1, len(chosen))
        converted = time.perf_counter()
        measured = meter.measure(list(artifacts.values()), target) if artifacts else []
    seconds = {"convert": converted - start, "measure": time.perf_counter() - converted}
    measurements = dict(zip(artifacts, measured, strict=True))
    failures.update((i, m.error) for i, m in measurements.items() if m.error)
    calibration = _fit(target, key, chosen, measurements, failures, seconds)
    try:
        calibration.save(path)
    except UserError as error:
        warnings.warn(f"{error} The calibration is used, but not kept for later runs.", stacklevel=2)
    return calibration


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


def _key(target: Target, chosen: Sequence[CalibrationNetwork], runtime_version: str) -> str:
    """A digest of everything that the measured latencies depend on."""
    what = {
        "format": FORMAT,
        "host": host_fingerprint(),
        "target": target.name,
        "point": [target.precision, target.runtime, target.threads, target.batch, target.point.power_mode],
        "runtime": runtime_version,
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


def _fit(
    target: Target,
    key: str,
    chosen: Sequence[CalibrationNetwork],
    measurements: Mapping[int, Measurement],
    failures: Mapping[int, str],
    seconds: dict[str, float],
) -> Calibration:
    good = {i: m for i, m in measurements.items() if i not in failures}
    if len(good) < LEAST_NETWORKS:
        reason = next(iter(failures.values()))
        raise UserError(f"{target.name}: {len(failures)} of {len(chosen)} networks could not be measured: {reason}")
    throttled = sum(m.throttled for m in good.values())
    warning = ""
    if throttled > 0.25 * len(good):
        warning = f"{throttled} of {len(good)} calibration measurements were disturbed; calibrate when it is quiet"
    y = np.array([m.latency_ms for m in good.values()])
    model, residuals = OperatorModel.fit_report(
        [chosen[i].workload() for i in good], y, families=[chosen[i].family for i in good], warning=warning
    )
    rows = []
    for i, network in enumerate(chosen):
        architecture = network.architecture if isinstance(network, SpaceNetwork) else {}
        about: dict[str, Any] = {"latency_ms": None, "note": failures[i]} if i in failures else {
            "latency_ms": good[i].latency_ms, "median_ms": good[i].median_ms, "throttled": good[i].throttled,
            "note": good[i].note,
        }  # fmt: skip
        rows.append(MeasuredNetwork(name=network.name, family=network.family, architecture=architecture, **about))
    return Calibration(
        target=target.name,
        key=key,
        created=datetime.now(UTC),
        host=host_fingerprint(),
        protocol=asdict(next(iter(good.values())).protocol),
        networks=tuple(rows),
        model=model.numbers,
        quality={"networks": len(y), **figures(residuals, y), "failed": len(failures), "throttled": throttled},
        seconds=seconds,
    )
