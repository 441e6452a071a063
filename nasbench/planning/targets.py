"""Targets, with the predictors and meters that a configuration gives them."""

from __future__ import annotations

from pathlib import Path

from hardware_profiles import Meter, Target, load_target, meter_for
from hardware_profiles.meter_choice import with_meter
from nasbench.config import Config
from nasbench.planning.sections import find, naming
from nasbench.registry import resolve
from predictors.choice import PREDICTORS, TABLES, table_file
from search_spaces import UserError, nearest


def settled_targets(config: Config, where: Path | None) -> dict[str, Target]:
    """The targets by full name, which what is said per target goes by too; unknown predictors and meters are refused,
    and so is a target named twice.

    A target with a meter from the experiment is one with that meter, so that networks are converted for that.
    """
    targets: dict[str, Target] = {}
    for name in config.targets.devices:
        with naming("targets.devices"):
            target = load_target(name)
        if target.name in targets:
            raise UserError(f"targets.devices = {config.targets.devices}: {target.name} is named twice; keep it once")
        targets[target.name] = target
    section = config.targets
    for key in ("calibration", "predictors", "meters"):
        given = getattr(section, key)
        with naming(f"targets.{key}"):
            full = {load_target(name).name: value for name, value in given.items()}
        for name in full:
            if name not in targets:
                raise UserError(f"targets.{key}: {name!r} is not among targets.devices = {list(targets)}")
        setattr(section, key, full)
    for name, predictor in section.predictors.items():
        key = f"targets.predictors: {name}"
        if predictor.startswith(TABLES):
            kind, file, column = table_file(predictor)
            section.predictors[name] = f"{kind}:{find(file, key, where)}" + (f"@{column}" if column else "")
        elif ":" in predictor:
            with naming(key):
                resolve("predictor", predictor, where)
        elif predictor not in PREDICTORS:
            raise UserError(
                f'{key}: unknown predictor {predictor!r}. {nearest(predictor, PREDICTORS)} Your own: "module:Class".'
            )
    for name, spec in section.meters.items():
        key = f"targets.meters: {name}"
        kind, _, rest = spec.partition(":")
        if kind == "replay":
            spec = f"replay:{find(rest, key, where)}"
        elif spec.endswith(".toml"):
            spec = find(spec, key, where)
        section.meters[name] = spec
        with naming(key):
            if kind not in ("adb", "ssh", "replay") and rest and not spec.endswith(".toml"):
                resolve("meter", spec, where)
            targets[name], _ = with_meter(targets[name], spec)
    return targets


def meter_of(config: Config, target: Target) -> Meter:
    """What measures on a target.

    Raises:
        UserError: it cannot be measured from here.
    """
    spec = config.targets.meters.get(target.name)
    return with_meter(target, spec)[1] if spec else meter_for(target)
