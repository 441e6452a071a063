"""Calibration: a few dozen networks of the spaces in question measured on a device, and the latency model they give."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hardware_profiles.host import host_fingerprint
from hardware_profiles.meter import Measurement
from hardware_profiles.paths import user_data_dir, write_text
from hardware_profiles.profile import Target
from hardware_profiles.runtimes import converter_for, meter_for
from predictors.base import Array
from predictors.operator_model import (
    FEATURES,
    LEAST_NETWORKS,
    Fit,
    OperatorModel,
    leave_one_out,
    network_totals,
    trusted,
)
from predictors.roofline import Roofline
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs
from search_spaces.errors import explain

FORMAT = 1
CANDIDATES = 2000
MAX_AGE_DAYS = 30.0

Progress = Callable[[str, int, int], None]


class MeasuredNetwork(BaseModel):
    """One measured network: what it was, its operator totals, and its latency.

    Args:
        architecture: knob -> choice.
        totals: one value per feature of the operator model.
        latency_ms: the protocol's statistic; None where measuring failed, with the reason in `note`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: str
    architecture: dict[str, int | float | str]
    totals: tuple[float, ...]
    latency_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    median_ms: float | None = None
    throttled: bool = False
    note: str = ""


class Calibration(BaseModel):
    """Measurements of one target, and the model fitted to them, frozen: a run that keeps this file predicts the same.

    Args:
        target: `device:operating-point`.
        key: identifies what was to be measured, on which machine and with which runtime.
        created: time of day, UTC.
        protocol: how it was measured.
        networks: all measured networks.
        features: names of `networks[i].totals`.
        model: the fitted numbers of `OperatorModel`.
        quality: leave-one-out figures `within_10_percent`, `spearman`, `median_error` (relative) and
            `interval_90_coverage`, and how many `networks`, `failed` and `throttled` there were.
        seconds: what measuring took, by phase.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    target: str
    key: str
    created: datetime
    host: str
    protocol: dict[str, Any]
    networks: tuple[MeasuredNetwork, ...]
    features: tuple[str, ...]
    model: Fit
    quality: dict[str, float]
    seconds: dict[str, float]

    def predictor(self) -> OperatorModel:
        """The fitted model; the same bits whenever and wherever the file is loaded."""
        return OperatorModel(self.model)

    def save(self, path: Path) -> None:
        """Write as JSON, atomically. Raises UserError where that fails."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or one that is damaged or of another version.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read this calibration: {error}") from error
        try:
            calibration = cls.model_validate_json(text)
            if calibration.format != FORMAT:
                raise UserError(f"{path}: calibration format {calibration.format}, this version reads {FORMAT}")
            calibration.predictor()
        except ValidationError as error:
            reason = explain(error, str(path), cls.model_fields)
            raise UserError(
                f"{reason[:300]} (this calibration file is damaged: delete it and calibrate again)"
            ) from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return calibration


def calibrate(
    target: Target,
    spaces: SearchSpace | Sequence[SearchSpace],
    networks: int = 32,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
    max_age_days: float = MAX_AGE_DAYS,
) -> Calibration:
    """Measure networks of the spaces on a target and fit a latency model; or reuse an earlier calibration.

    An earlier one is reused if it is of the same networks, machine, runtime version and operating point, and not too
    old; a cache file that is damaged is said so and measured anew.

    Args:
        target: one that can be measured here.
        spaces: one or several; the networks are shared out evenly and fitted together.
        networks: number to measure, 8 at least.
        seed: of the choice of networks and of their weights.
        cache: directory of earlier calibrations; None means `calibrations` in the user's data directory.
        progress: called with (phase, done, total): `convert`, counted in networks, then `measure`, in passes.
        max_age_days: older calibrations are not reused.

    Raises:
        UserError: a target that cannot be measured here, too few networks, or too many that failed.
    """
    spaces = [spaces] if isinstance(spaces, SearchSpace) else list(spaces)
    if not spaces or networks < LEAST_NETWORKS * len(spaces):
        raise UserError(
            f"calibration.networks: {networks} for {len(spaces)} spaces; at least {LEAST_NETWORKS} per space are needed"
        )
    meter = meter_for(target, partial(progress, "measure") if progress else None)
    converter = converter_for(target)
    shares = [len(part) for part in np.array_split(np.arange(networks), len(spaces))]
    chosen = [
        (space, arch)
        for space, share in zip(spaces, shares, strict=True)
        for arch in choose(space, share, target, np.random.default_rng(seed))
    ]
    totals = network_totals([space.workload(arch) for space, arch in chosen])
    key = _key(target, chosen, totals)
    path = (cache or user_data_dir() / "calibrations") / f"{target.name.replace(':', '-')}-{key[:16]}.json"
    found = _cached(path, key, max_age_days)
    if found:
        return found

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="nasbench-calibration-") as directory:
        artifacts = []
        for i, (space, arch) in enumerate(chosen):
            shape = network_input_shape(space, arch)
            artifacts.append(
                converter.convert(space.build(arch), target, shape, Path(directory) / f"{i}.{converter.format}")
            )
            if progress:
                progress("convert", i + 1, len(chosen))
        converted = time.perf_counter()
        measurements = meter.measure(artifacts, target)
    seconds = {"convert": converted - start, "measure": time.perf_counter() - converted}
    calibration = _fit(target, key, chosen, totals, measurements, seconds)
    try:
        calibration.save(path)
    except UserError as error:
        warnings.warn(f"{error} The calibration is used, but not kept for later runs.", stacklevel=2)
    return calibration


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


def _key(target: Target, chosen: Sequence[tuple[SearchSpace, Archs]], totals: Array) -> str:
    """A digest of everything that the measured latencies depend on."""
    import onnxruntime

    what = {
        "format": FORMAT,
        "host": host_fingerprint(),
        "target": target.name,
        "point": [target.precision, target.runtime, target.threads, target.batch, target.point.power_mode],
        "runtime": onnxruntime.__version__,
        "features": FEATURES,
        "spaces": [(space.name, arch.tolist()) for space, arch in chosen],
        "totals": totals.tolist(),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


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
    chosen: Sequence[tuple[SearchSpace, Archs]],
    totals: Array,
    measurements: Sequence[Measurement],
    seconds: dict[str, float],
) -> Calibration:
    good = np.array([not m.error for m in measurements])
    if good.sum() < LEAST_NETWORKS:
        reason = next(m.error for m in measurements if m.error)
        raise UserError(f"{target.name}: {int((~good).sum())} of {len(good)} networks could not be measured: {reason}")
    throttled = sum(m.throttled for m in measurements)
    warning = ""
    if throttled > 0.25 * len(good):
        warning = f"{throttled} of {len(good)} calibration measurements were disturbed; calibrate when it is quiet"
    y = np.array([m.latency_ms for m in measurements])
    model = OperatorModel.fit_totals(totals[good], y[good], warning)
    return Calibration(
        target=target.name,
        key=key,
        created=datetime.now(UTC),
        host=host_fingerprint(),
        protocol=asdict(next(m.protocol for m in measurements if not m.error)),
        networks=tuple(
            MeasuredNetwork(
                space=space.name,
                architecture=space.decode(arch),
                totals=tuple(row.tolist()),
                latency_ms=None if m.error else m.latency_ms,
                median_ms=None if m.error else m.median_ms,
                throttled=m.throttled,
                note=m.error or m.note,
            )
            for (space, arch), row, m in zip(chosen, totals, measurements, strict=True)
        ),
        features=FEATURES,
        model=model.numbers,
        quality={**_quality(model, totals[good], y[good]), "failed": int((~good).sum()), "throttled": throttled},
        seconds=seconds,
    )


def _quality(model: OperatorModel, totals: Array, y: Array) -> dict[str, float]:
    """How well each measured network is predicted by a fit to all others."""
    from scipy.stats import spearmanr

    logs = leave_one_out(totals, y, trusted(totals, y), model.numbers.ridge)
    return {
        "networks": len(y),
        "within_10_percent": float(np.mean(np.abs(np.expm1(-logs)) <= 0.1)),
        "spearman": float(spearmanr(y / np.exp(logs), y).statistic),
        "median_error": float(np.median(np.abs(np.expm1(-logs)))),
        "interval_90_coverage": float(np.mean(np.abs(logs) <= 1.645 * model.numbers.log_std)),
    }
