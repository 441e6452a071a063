"""The calibration of a target: what was measured on it and the models fitted to that, in one file of one format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from hardware_profiles.meter import Measurement, Protocol
from hardware_profiles.paths import user_data_dir
from hardware_profiles.profile import Target
from hardware_profiles.records import KeptRecord, Record
from predictors.base import Predictor
from predictors.calibration_methods import FittedMetric, Method, Positive, Sample, fit_metric
from search_spaces import UserError, Workload

METRICS = ("latency_ms", "energy_mj")
# With a larger share of disturbed measurements, predictions say so.
MOST_THROTTLED = 0.25


class MeasuredRow(Record):
    """One network as measured on a target.

    Args:
        network: how it is found again: a reference network's name, `space:architecture`, or an ONNX file.
        family: networks that are left out together when a fit is judged.
        latency_ms, energy_mj: per inference (one batch), the protocol's statistic; energy where it was measured.
        median_ms: of the samples of latency, where they are known.
        throttled: the machine was disturbed while this was measured.
        note: what the meter said of it.
    """

    network: Annotated[str, Field(min_length=1)]
    family: str = ""
    latency_ms: Positive
    energy_mj: Positive | None = None
    median_ms: Positive | None = None
    throttled: bool = False
    note: str = ""

    @classmethod
    def of(cls, family: str, m: Measurement) -> Self:
        """A measurement that succeeded, of a named network of a family."""
        return cls(
            network=m.artifact.name,
            family=family,
            latency_ms=m.latency_ms,
            energy_mj=m.energy_mj,
            median_ms=m.median_ms,
            throttled=m.throttled,
            note=m.note,
        )


class Calibration(KeptRecord):
    """Measurements of one target and the models fitted to them, frozen: whoever keeps this file predicts the same.

    Args:
        target: `device:operating-point`.
        created: time of day, UTC.
        source: where the measurements are from, if they were not taken for this: the name of a table.
        key: identifies what was to be measured, on which machine and with which runtime; empty where nobody will ask.
        host: the device as it named itself.
        protocol: how it was measured; None where a table does not say.
        rows: the measurements.
        failures: networks that could not be measured, and why.
        models: per metric.
        seconds: what converting and measuring took.
    """

    kind = "calibration"
    otherwise = "delete it and calibrate again"

    format: int = 3
    target: str
    created: datetime
    source: str = ""
    key: str = ""
    host: str = ""
    protocol: Protocol | None = None
    rows: Annotated[tuple[MeasuredRow, ...], Field(min_length=1)]
    failures: dict[str, str] = Field(default={})
    models: dict[str, FittedMetric]
    seconds: dict[str, float] = Field(default={})

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        if unknown := self.models.keys() - set(METRICS):
            raise ValueError(f"models: unknown metric {sorted(unknown)[0]!r}")
        return self

    @property
    def warning(self) -> str:
        """What makes the measurements, or the fits to them, doubtful; empty where nothing does."""
        return "; ".join(w for w in (_warning(self.rows), *(m.doubt for m in self.models.values())) if w)

    def predictor(self, target: Target, metric: str = "latency_ms") -> Predictor:
        """The fitted predictor; the same bits whenever and wherever the file is loaded.

        Raises:
            UserError: of another target, or nothing of that metric was measured.
        """
        if target.name != self.target:
            raise UserError(f"the calibration is of {self.target}, not of {target.name}")
        if metric not in self.models:
            raise UserError(f"{target.name}: the calibration holds no measurements of {metric}")
        return self.models[metric].predictor(target, metric)

    def basis(self, metric: str = "latency_ms") -> str:
        """What its predictions of a metric rest on, in a few words."""
        model = self.models[metric]
        words = {"operator_model": "operator model", "roofline": "roofline fitted anew", "scale": "scaled roofline"}
        error = model.quality.get("median_error")
        left_out = f", {error:.0%} median error on networks left out" if error is not None else ""
        count = int(model.quality["networks"])
        doubt = f" ({model.doubt})" if model.doubt else ""
        return f"{words[model.method]} of {count} networks measured {self.created:%Y-%m-%d}{left_out}{doubt}"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or one that is damaged or of another version.
        """
        found = super().load(path)
        for metric, model in found.models.items():
            try:
                model.parsed()
            except UserError as error:
                raise UserError(f"{path}: {metric}: {error}; {cls.otherwise}") from error
        return found


def fit_target(
    target: Target,
    rows: Sequence[MeasuredRow],
    workloads: Sequence[Workload],
    *,
    method: Method | Literal["auto"] = "auto",
    source: str = "",
    key: str = "",
    host: str = "",
    protocol: Protocol | None = None,
    failures: Mapping[str, str] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Calibration:
    """Fit what was measured on a target. Of the methods that so many networks allow, the one that predicts best those
    left out of it is taken.

    Args:
        rows: measurements, each network once.
        workloads: one per row.
        method: of latency, instead of choosing.
        source, key, host, protocol, failures, seconds: of the measurements, as `Calibration` has them.

    Raises:
        UserError: no rows, a network twice, too few for the method, or a value in another unit.
    """
    if not rows or len(rows) != len(workloads):
        raise UserError(f"{target.name}: no measurements to fit")
    names = [r.network for r in rows]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(
            f"{target.name}: {twice[0]!r} was measured more than once; keep one measurement of each network"
        )
    models = {"latency_ms": fit_metric(_sample(target, "latency_ms", rows, workloads), method)}
    with_energy = [i for i, r in enumerate(rows) if r.energy_mj is not None]
    if with_energy:
        some, theirs = [rows[i] for i in with_energy], [workloads[i] for i in with_energy]
        models["energy_mj"] = fit_metric(_sample(target, "energy_mj", some, theirs))
    return Calibration(
        target=target.name,
        created=datetime.now(UTC),
        source=source,
        key=key,
        host=host,
        protocol=protocol,
        rows=tuple(rows),
        failures=dict(failures or {}),
        models=models,
        seconds=dict(seconds or {}),
    )


def _sample(target: Target, metric: str, rows: Sequence[MeasuredRow], workloads: Sequence[Workload]) -> Sample:
    return Sample(
        target,
        metric,
        tuple(r.network for r in rows),
        tuple(r.family or r.network for r in rows),
        workloads,
        np.array([getattr(r, metric) for r in rows], dtype=float),
        _warning(rows),
    )


def _warning(rows: Sequence[MeasuredRow]) -> str:
    throttled = sum(r.throttled for r in rows)
    if throttled <= MOST_THROTTLED * len(rows):
        return ""
    return f"{throttled} of {len(rows)} calibration measurements were disturbed; calibrate when it is quiet"


def calibrations_dir() -> Path:
    """Where calibrations are kept, in the user's directory: `TARGET.json` is what predicts a target unless another is
    named; `TARGET-KEY.json` is what an experiment measured of a space, for the next experiment on it."""
    return user_data_dir() / "calibrations"


def calibration_path(target: Target) -> Path:
    """Where the calibration of a target is kept that predicts it unless another is named."""
    return calibrations_dir() / f"{file_stem(target)}.json"


def file_stem(target: Target) -> str:
    """The target's name as part of a file's."""
    return target.name.replace(":", "-")


def kept_calibration(target: Target) -> Calibration | None:
    """The user's calibration of a target, if there is one.

    Raises:
        UserError: there is one, and it is damaged or of another version.
    """
    path = calibration_path(target)
    old = path.parent / "targets" / path.name
    if old.is_file() and not path.is_file():
        raise UserError(
            f"{old}: a calibration of an earlier version, which this one does not read. Calibrate again with "
            f"`nasbench devices calibrate {target.name}` (--from, if the measurements are in a table), or delete it"
        )
    return Calibration.load(path) if path.is_file() else None
