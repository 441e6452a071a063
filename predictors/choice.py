"""Which predictor a metric on a target needs: chosen by what data exist, or by name."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardware_profiles.paths import user_data_dir
from hardware_profiles.profile import Target, load_target
from predictors.base import AdditivePredictor, Predictor
from predictors.counts import COUNTS, Count
from predictors.derived import StatedEnergy
from predictors.roofline import Roofline
from predictors.training_memory import TrainingMemoryCount
from search_spaces import SearchSpace, UserError, nearest

if TYPE_CHECKING:
    from predictors.calibration import Calibration
    from predictors.few_shot import FewShot

METRICS = ("latency_ms", "energy_mj", *COUNTS, "training_memory_bytes")
# Names that `predictor` takes besides `module:Class`.
TABLES = ("few_shot:", "table:")
PREDICTORS = ("auto", "roofline", "scale", "operator_model")


@dataclass(frozen=True)
class Choice:
    """A predictor, and what its figures rest on, in a few words; whether it is tied to the networks of one table."""

    predictor: Predictor
    basis: str
    tied: bool = False


def predictor_for(
    target: str | Target | None,
    metric: str,
    calibration: Calibration | None = None,
    predictor: str = "auto",
    space: SearchSpace | None = None,
) -> Predictor:
    """The best predictor there is; see `choose_predictor`, which also says what it rests on."""
    return choose_predictor(target, metric, calibration, predictor, space).predictor


def choose_predictor(
    target: str | Target | None,
    metric: str,
    calibration: Calibration | None = None,
    predictor: str = "auto",
    space: SearchSpace | None = None,
) -> Choice:
    """The predictor of a metric on a target: by what data exist, or the one that is named.

    Chosen automatically: exact counts; else a calibration that is given, or the later of a calibration and a few-shot
    predictor of that space in the user's directory (of energy that nobody measured: calibrated latency times the power
    that the profile states); else the profile's roofline, whose parameters are fitted to published measurements or
    taken from the datasheet.

    Args:
        target: `device` or `device:operating-point`; counts need none (peak memory then means fp32).
        metric: `latency_ms`, `energy_mj`, or one of `COUNTS`.
        calibration: measurements of that target; None looks into the user's directory.
        predictor: `auto`, one of `PREDICTORS`, `few_shot:FILE` (what `FewShot.save` wrote) or `table:FILE` (any that
            `MeasuredTable.read` takes), tied to the space of their table, or `module:Class` of one's own, made as
            `Class(target, metric)`. Of a table with several devices the column is that of the target's name, or as
            `table:FILE@COLUMN` says; a CSV whose rows say that they are of another target or operating point is
            refused. A `roofline` is the calibration's, if it is by one, else the profile's.
        space: whose architectures are to be predicted; None of any networks.

    Raises:
        UserError: an unknown metric, target or predictor, a calibration of another target or of another kind than the
            one that is named, this machine without a calibration, or energy of a target whose power nobody states.
    """
    if metric not in METRICS:
        raise UserError(f"no predictor for metric {metric!r}. {nearest(metric, METRICS)}")
    if isinstance(target, str):
        target = load_target(target) if target else None
    if metric in COUNTS and predictor == "auto":
        exact = "a lower bound: largest sum of live activations" if metric == "peak_memory_bytes" else "an exact count"
        return Choice(Count(metric, itemsize=target.itemsize if target else 4), exact)
    if metric == "training_memory_bytes" and predictor == "auto":
        what = "kept activations, gradients and momentum of training everything by plain autograd, batch 1"
        return Choice(TrainingMemoryCount(), what)
    if target is None:
        raise UserError(f'{metric} needs a target, such as "host" or "raspberry_pi_4"')
    if predictor.startswith(TABLES):
        return _of_table(predictor, target, metric, space)
    if ":" in predictor:
        return Choice(_own(predictor, target, metric), f"your {predictor}")
    if predictor not in PREDICTORS:
        raise UserError(f'unknown predictor {predictor!r}. {nearest(predictor, PREDICTORS)} Your own: "module:Class".')
    if metric in COUNTS or metric == "training_memory_bytes":
        raise UserError(f"{metric} is counted, not predicted; leave predictor at 'auto'")
    if predictor == "auto" and metric == "latency_ms" and space is not None and calibration is None:
        kept = few_shot_path(target, space)
        if kept.is_file() and _is_latest(kept, target):
            return _of_table(f"few_shot:{kept}", target, metric, space)
    found = _calibrated(target, metric, calibration, predictor)
    if found is not None:
        return found
    if metric == "energy_mj" and predictor in ("auto", "roofline"):
        timed = _calibrated(target, "latency_ms", calibration, predictor)
        if timed is not None and isinstance(timed.predictor, AdditivePredictor):
            power_w, log_std, doubt = Roofline(target, metric).power
            energy = StatedEnergy(timed.predictor, power_w, log_std, doubt)
            return Choice(energy, f"{power_w:g} W times latency: {timed.basis}")
    unknown = target.profile.local and metric == "latency_ms"  # without measurements
    if predictor != "roofline" and (predictor != "auto" or unknown):
        raise UserError(
            f"{target.name}: {'latency on this machine' if predictor == 'auto' else predictor} is predicted from "
            f"measurements; make them with `nasbench devices calibrate {target.name}`, or pass a calibration"
        )
    return _roofline(target, metric)


def _calibrated(target: Target, metric: str, calibration: Calibration | None, predictor: str) -> Choice | None:
    """From a calibration, given or kept; None where there is none of that metric, or none by the roofline that is asked
    for: then the profile's is meant."""
    from predictors.calibration import kept_calibration

    given = calibration is not None
    if calibration is None:
        calibration = kept_calibration(target)
    if calibration is None:
        return None
    if calibration.target != target.name:
        raise UserError(f"the calibration is of {calibration.target}, not of {target.name}")
    if metric not in calibration.models:
        return None
    method = calibration.models[metric].method
    if predictor == "roofline" != method:
        return None
    if predictor not in ("auto", method):
        where = "the calibration" if given else "your calibration of it"
        raise UserError(
            f"{target.name}: {where} is by {method!r}, not {predictor!r}; "
            f"calibrate again with --method {predictor}, or leave predictor at 'auto'"
        )
    return Choice(calibration.predictor(target, metric), calibration.basis(metric))


def _is_latest(few_shot: Path, target: Target) -> bool:
    """Whether a few-shot predictor was kept after the calibration of its target, if there is one."""
    from predictors.calibration import kept_calibration

    calibration = kept_calibration(target)
    return calibration is None or datetime.fromtimestamp(few_shot.stat().st_mtime, UTC) >= calibration.created


def _roofline(target: Target, metric: str) -> Choice:
    roofline = Roofline(target, metric)
    return Choice(roofline, roofline.basis)


def table_file(predictor: str) -> tuple[str, str, str]:
    """Kind, file and column of `few_shot:FILE`, `table:FILE` or `table:FILE@COLUMN`; the column may be empty.

    >>> table_file("table:boards@home.csv@phone")
    ('table', 'boards@home.csv', 'phone')
    >>> table_file("table:boards.txt@phone"), table_file("table:boards@home.csv")
    (('table', 'boards.txt', 'phone'), ('table', 'boards@home.csv', ''))
    """
    kind, _, file = predictor.partition(":")
    if kind != "table" or Path(file).is_file():
        return kind, file, ""
    # A file need not lie in this folder: what ends as one's name does is no column.
    named = re.fullmatch(r"(.+\.(?:csv|gz|npz))@(.+)", file) or re.fullmatch(
        r"(.+)@([^/]+)(?<!\.(?:csv|npz))(?<!\.gz)", file
    )
    return (kind, named[1], named[2]) if named else (kind, file, "")


def _of_table(spec: str, target: Target, metric: str, space: SearchSpace | None) -> Choice:
    """A predictor of one space, from a file."""
    from predictors.few_shot import FewShot
    from predictors.tables import MeasuredTable, TableLookup, check_points, device_of

    if metric != "latency_ms":
        raise UserError(f"predictor {spec!r}: predicts latency_ms, not {metric}")
    kind, file, column = table_file(spec)
    if kind == "few_shot":
        adapted = FewShot.load(Path(file))
        if not len(adapted.latency_ms):
            raise UserError(f"{file}: was not adapted to any device; call adapt(networks, latency_ms) before saving it")
        return Choice(adapted, few_shot_basis(adapted), tied=True)
    table = MeasuredTable.read(Path(file), space)
    if not file.endswith(".npz"):
        check_points(Path(file), target)
    if column:
        device = column if column in table.devices else device_of(column)
    else:
        own = [n for n in (target.name, target.profile.name) if n in table.devices]
        device, *others = own[:1] or table.devices
        if others or (not own and device != "latency"):
            raise UserError(
                f"{file}: which of its devices is {target.name}? It has {', '.join(table.devices)}; name one as "
                f"table:{file}@{device}"
            )
    return Choice(TableLookup(table, device), f"measured table of {len(table)} networks, {device}", tied=True)


def few_shot_path(target: Target, space: SearchSpace) -> Path:
    """Where the few-shot predictor of a target on a space is kept, in the user's directory.

    A space goes by what it is, so that a file of that name with other knobs is another.
    """
    what = repr(([(k.name, k.choices) for k in space.knobs], space.input_shape))
    digest = hashlib.sha256(what.encode()).hexdigest()[:8]
    name = f"{target.name.replace(':', '-')}-{Path(space.name).stem}-{digest}.npz"
    return user_data_dir() / "calibrations" / "few_shot" / name


def few_shot_basis(adapted: FewShot) -> str:
    """What a few-shot predictor rests on, in a few words."""
    sources = ", ".join(adapted.table.devices)
    return f"few-shot transfer of {len(adapted.latency_ms)} measured networks from {sources}"


def _own(path: str, target: Target, metric: str) -> Predictor:
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module may raise
        raise UserError(f"predictor {path!r}: cannot import it: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, Predictor)):
        raise UserError(f"predictor {path!r} is no Predictor")
    try:
        made: Predictor = found(target, metric)  # type: ignore[call-arg]
    except TypeError as error:
        raise UserError(f"predictor {path!r}: is made as {name}(target, metric): {error}") from error
    if getattr(made, "metric", None) != metric:
        raise UserError(
            f"predictor {path!r}: its attribute 'metric' is {getattr(made, 'metric', None)!r}, not {metric!r}"
        )
    return made
