"""Device profiles: what is known of a piece of hardware, read from TOML and checked; and targets.

A profile holds facts with their sources (datasheet figures, published latencies) apart from estimates (roofline
parameters), so that a prediction can say what it rests on. A target is a profile at one of its operating points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from hardware_profiles.meter_section import AdbSection, CommandSection, MeterSection, SshSection
from hardware_profiles.paths import finished, read_toml, user_data_dir
from hardware_profiles.profile_sections import (
    ITEMSIZE,
    ChannelMultiple,
    Constraints,
    Figure,
    OperatingPoint,
    Precision,
    Reference,
    ReferenceSet,
    RooflineFit,
    RooflineParameters,
    Text,
)
from hardware_profiles.records import Record
from search_spaces.errors import UserError, most_telling, nearest


class Profile(Record):
    """A device: facts, operating points, roofline parameters, constraints and references.

    Args:
        name: as in `load_profile(name)` and in targets; also the name of its file.
        kind: `CPU`, `GPU`, `NPU`, ...
        default: name of the operating point meant where none is named.
        local: the device is the machine this runs on, so that it can be measured and calibrated here.
        measure: how to measure on the device: a command or a short recipe, for people.
        references: published latencies; `reference_sets` are the same as tables, and become references on loading.
        fits: what the roofline learned from them, by operating point.
        channel_multiples: numbers of channels that run without padding; the first that fits an operating point counts.
        meter: how this project measures there, by a command, adb or ssh (`hardware_profiles.meter_section`).
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    title: Text
    kind: Literal["CPU", "GPU", "NPU", "DSP", "MCU", "FPGA"]
    default: Text
    local: bool = False
    measure: str = ""
    meter: MeterSection | None = None
    datasheet: tuple[Figure, ...] = ()
    operating_points: Annotated[dict[str, OperatingPoint], Field(min_length=1)]
    roofline: RooflineParameters
    constraints: Constraints = Constraints()
    references: tuple[Reference, ...] = ()
    reference_sets: Annotated[tuple[ReferenceSet, ...], Field(exclude=True)] = ()
    fits: dict[str, RooflineFit] = Field(default={})
    channel_multiples: tuple[ChannelMultiple, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Profile:
        if self.default not in self.operating_points:
            raise ValueError(f"default {self.default!r} is no operating point. {self._nearest(self.default)}")
        for name in self.operating_points:
            if not name or ":" in name or any(c.isspace() for c in name):
                raise ValueError(f"operating point {name!r}: a name has no ':' and no blanks")
        sets = [s.operating_point for s in self.reference_sets]
        for owner, keys in (("reference_sets", sets), ("fits", list(self.fits))):
            for key in keys:
                if key not in self.operating_points:
                    raise ValueError(f"{owner}: no operating point {key!r}. {self._nearest(key)}")
        more = (s.references(self.operating_points[s.operating_point].precision) for s in self.reference_sets)
        object.__setattr__(self, "references", (*self.references, *(r for part in more for r in part)))
        object.__setattr__(self, "reference_sets", ())
        seen: set[str] = set()
        for reference in self.references:
            identity = reference.model_copy(update={"latency_ms": 1.0, "energy_mj": None}).model_dump_json()
            if identity in seen:
                raise ValueError(
                    f"reference {reference.network!r} at {reference.size} pixels stands twice for operating "
                    f"point {reference.operating_point!r}, with one runtime, source and note"
                )
            seen.add(identity)
            if reference.operating_point and reference.operating_point not in self.operating_points:
                raise ValueError(
                    f"reference {reference.network!r}: no operating point {reference.operating_point!r}. "
                    f"{self._nearest(reference.operating_point)}"
                )
        for name, point in self.operating_points.items():
            rules = self.constraints
            if rules.apply_to(point) and rules.precisions and point.precision not in rules.precisions:
                raise ValueError(
                    f"operating point {name!r}: precision is {point.precision!r}, but by its constraints this device "
                    f"computes in {', '.join(rules.precisions)} only"
                )
        return self

    def _nearest(self, point: str) -> str:
        return nearest(point, self.operating_points)

    def target(self, point: str = "") -> Target:
        """This device at the named operating point, or at its default.

        A precision alone (`fp16`) means the first operating point in the file that has it.

        Raises:
            UserError: it has no such operating point.
        """
        point = point or self.default
        if point not in self.operating_points:
            point = next((name for name, p in self.operating_points.items() if p.precision == point), point)
        if point not in self.operating_points:
            raise UserError(f"device {self.name!r} has no operating point {point!r}. {self._nearest(point)}")
        return Target(self, point)


@dataclass(frozen=True)
class Target:
    """A device at one operating point."""

    profile: Profile
    operating_point: str

    @property
    def name(self) -> str:
        """`device:operating-point`."""
        return f"{self.profile.name}:{self.operating_point}"

    @property
    def point(self) -> OperatingPoint:
        """The operating point's figures."""
        return self.profile.operating_points[self.operating_point]

    @property
    def precision(self) -> Precision:
        """`fp32`, `fp16` or `int8`."""
        return self.point.precision

    @property
    def itemsize(self) -> int:
        """Bytes per element at this precision."""
        return ITEMSIZE[self.precision]

    @property
    def runtime(self) -> str:
        """Name of the runtime."""
        return self.point.runtime

    @property
    def threads(self) -> int:
        """Threads of one inference."""
        return self.point.threads

    @property
    def batch(self) -> int:
        """Samples per inference."""
        return self.point.batch

    @property
    def measure(self) -> str:
        """How to measure there: the operating point's command, else the profile's."""
        return self.point.measure or self.profile.measure

    @property
    def channel_multiple(self) -> int:
        """What numbers of channels should be multiples of; 1 where nobody says.

        The profile's word, else the lanes of a roofline that was fitted to measurements.
        """
        for known in self.profile.channel_multiples:
            runs = not known.runtimes or self.runtime in known.runtimes
            if runs and (not known.precisions or self.precision in known.precisions):
                return known.multiple
        fit = self.profile.fits.get(self.operating_point)
        return (fit.parameters if fit else self.profile.roofline).lanes[0]

    @property
    def constraints(self) -> Constraints:
        """What cannot run here; nothing where the profile's constraints are of other runtimes."""
        rules = self.profile.constraints
        return rules if rules.apply_to(self.point) else Constraints()


def explain_fields(error: ValidationError, model: type[BaseModel], path: object) -> str:
    """The most telling problem as one sentence: file, key, value, what was expected."""
    first = most_telling(error)
    *parents, last = first["loc"] or ("",)
    key = ".".join(str(part) for part in first["loc"])
    where = f"{path}: {key}" if key else f"{path}"
    if first["type"].startswith("union_tag"):
        return f"{where}: needs kind = one of {', '.join(map(repr, _MODELS))}"
    if first["type"] == "extra_forbidden":
        fields: Any = model
        for part in parents:
            if chosen := _MODELS.get(str(part)):
                fields = chosen
                continue
            # Indices and free names (of operating points) lead to the same model as the field that holds them.
            if isinstance(part, str) and part in fields.model_fields:
                fields = _model_in(fields.model_fields[part].annotation) or fields
        return f"{where}: unknown key. {nearest(str(last), fields.model_fields)}"
    if first["type"] == "missing":
        return f"{where}: this key is missing"
    if first["type"] == "literal_error":
        expected = re.findall("'([^']*)'", first["ctx"]["expected"])
        return f"{where}: unknown value {first['input']!r}. {nearest(str(first['input']), expected)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" + ("" if first["type"] == "value_error" else f", got {first['input']!r}")


# Models that a `kind` chooses: it stands in the place of an error, where no field is.
_MODELS: dict[str, type[BaseModel]] = {"command": CommandSection, "adb": AdbSection, "ssh": SshSection}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Model`, `tuple[Model, ...]`, `dict[str, Model]` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a)) is not None), None)


def parse_profile(table: Mapping[str, Any], source: object) -> Profile:
    """A profile from a parsed TOML table; `source` names it in errors.

    Raises:
        UserError: a wrong key or value.
    """
    try:
        return Profile.model_validate(table)
    except ValidationError as error:
        raise UserError(explain_fields(error, Profile, source)) from error


def _read(path: Path) -> Profile:
    profile = parse_profile(read_toml(path), path)
    if profile.name != path.stem:
        raise UserError(f"{path}: name: is {profile.name!r}, but a profile is found by its file's name, {path.stem!r}")
    return profile


def shipped_files() -> dict[str, Path]:
    """The profiles that come with the package, by name."""
    return {p.stem: p for p in sorted(Path(str(resources.files("hardware_profiles") / "devices")).glob("*.toml"))}


def _files() -> dict[str, Path]:
    """All profile files by name: the shipped ones and the user's.

    Raises:
        UserError: a file of the user's has the name of a shipped profile: which one a result meant would be unclear.
    """
    shipped = shipped_files()
    own = {p.stem: p for p in finished(user_data_dir() / "devices", "*.toml")}
    for name in own.keys() & {*shipped, "host"}:
        raise UserError(f"{own[name]}: {name!r} is the name of a device that comes with the package; rename yours")
    return shipped | own


def list_profiles() -> list[str]:
    """Names of all device profiles: `host`, the shipped ones and the user's."""
    return ["host", *sorted(_files())]


def load_profile(name: str | Path) -> Profile:
    """A device profile by name, or from a TOML file of any place. `host` is detected, the others are read.

    Raises:
        UserError: no such device, or a file with a wrong key or value.
    """
    if name == "host":
        from hardware_profiles.host import host_profile

        return host_profile()
    if isinstance(name, Path) or name.endswith(".toml"):
        return _read(Path(name))
    files = _files()
    if name not in files:
        raise UserError(f"unknown device {name!r}. {nearest(name, ['host', *files])}")
    return _read(files[name])


def load_target(name: str) -> Target:
    """The target `device` (at its default operating point) or `device:operating-point`.

    >>> load_target("jetson_nano:fp32").precision
    'fp32'

    Raises:
        UserError: no such device or operating point.
    """
    device, _, point = name.partition(":")
    return load_profile(device).target(point)
