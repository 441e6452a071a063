"""Costs of architectures measured on devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles import Artifact, Meter, Target, converter_for, load_target
from hardware_profiles.measuring import convert_and_measure
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from search_spaces import SearchSpace, UserError, nearest
from search_spaces.base import Archs

# What a measurement may hold.
_METRICS = ("latency_ms", "energy_mj", "peak_memory_bytes")


class MeasureEvaluator(Evaluator):
    """Builds each architecture, converts it for a target, and measures it there with the target's meter.

    Networks are freshly initialised. Several are measured together, so that passes over them are interleaved. Workers,
    and other runs, take turns at a device. A network that cannot be converted or run is `FAILED`.

    Args:
        space: that the architectures come from.
        targets: of the experiment.
        meter_for: what measures on a target.
        metrics: `latency_ms`, `energy_mj` or `peak_memory_bytes`, as far as the meter gives them, of the first target,
            or as `latency_ms@TARGET`.

    Example:
        [[evaluator.also]]
        name = "measure"
        metrics = ["latency_ms@raspberry_pi_4"]
    """

    preferred_batch = 8

    def __init__(
        self,
        space: SearchSpace,
        targets: Mapping[str, Target],
        meter_for: Callable[[Target], Meter],
        *,
        metrics: Sequence[str] = ("latency_ms",),
    ) -> None:
        self.space = space
        self.metrics = self.columns({"metrics": metrics}, targets)
        self.targets = {name: targets[name] for name in dict.fromkeys(m.partition("@")[2] for m in self.metrics)}
        self.meters = {name: meter_for(target) for name, target in self.targets.items()}

    @classmethod
    def columns(cls, options: Mapping[str, Any], targets: Mapping[str, Target]) -> tuple[str, ...]:
        found = []
        for metric in options["metrics"]:
            quantity, _, name = metric.partition("@")
            if quantity not in _METRICS:
                raise UserError(f"evaluator.metrics: nothing measures {quantity!r}. {nearest(quantity, _METRICS)}")
            name = load_target(name).name if name else next(iter(targets))
            if name not in targets:
                raise UserError(f"evaluator.metrics: target {name!r} is not among targets.devices = {list(targets)}")
            found.append(f"{quantity}@{name}")
        return tuple(dict.fromkeys(found))

    @classmethod
    def alone(cls, options: Mapping[str, Any], targets: Mapping[str, Target]) -> bool:
        return any(targets[metric.partition("@")[2]].profile.local for metric in cls.columns(options, targets))

    def evaluate(self, proposals: Proposals) -> Evaluation:
        n = len(proposals)
        values = np.full((n, len(self.metrics)), np.nan)
        messages: dict[int, str] = {}
        start = time.perf_counter()
        archs = {str(row): arch for row, arch in enumerate(self.space.canonical(proposals.archs))}
        for name, target in self.targets.items():
            convert = {row: partial(self._convert, arch, target) for row, arch in archs.items()}
            taken = convert_and_measure(target, convert, self.meters[name])
            for row, error in taken.failures.items():
                messages[int(row)] = f"{name}: {error}"
            for column, metric in enumerate(self.metrics):
                quantity, _, of = metric.partition("@")
                for row, measurement in taken.measured.items() if of == name else ():
                    value = getattr(measurement, quantity)
                    if value is None:
                        messages[int(row)] = f"{name}: its meter gives no {quantity}"
                    else:
                        values[int(row), column] = value
        failed = np.isnan(values).any(axis=1)
        values[failed] = np.nan
        status = np.where(failed, Status.FAILED, Status.OK).astype(np.uint8)
        return Evaluation(values, status, seconds=np.full(n, (time.perf_counter() - start) / n), messages=messages)

    def _convert(self, arch: Archs, target: Target, path: Path) -> Artifact:
        network, converter = self.space.build(arch), converter_for(target)
        shape = getattr(network, "input_shape", self.space.input_shape)
        return converter.convert(network, target, shape, path.with_suffix(f".{converter.format}"))
