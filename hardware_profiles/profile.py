"""Device profiles: what is known of a piece of hardware, read from TOML and checked; and targets.

A profile holds facts with their sources (datasheet figures, published latencies) apart from estimates (roofline
parameters), so that a prediction can say what it rests on. A target is a profile at one of its operating points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hardware_profiles.meter_section import AdbSection, CommandSection, MeterSection, SshSection
from hardware_profiles.paths import read_toml, user_data_dir
from search_spaces.errors import UserError, most_telling, nearest
from search_spaces.operators import Operator

ITEMSIZE = {"fp32": 4, "fp16": 2, "int8": 1}

Precision = Literal["fp32", "fp16", "int8"]
Unit = Literal[
    "cores", "MAC/cycle", "GHz", "MHz", "GMAC/s", "GFLOP/s", "TOP/s", "GB/s", "Gbit/s", "Mbit/s", "kB", "MB", "GB", "W",
    "ms", "nm"
]  # fmt: skip
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Record):
    """One datasheet figure, and who says so."""

    name: Text
    value: Positive
    unit: Unit
    source: Text
    note: str = ""


class OperatingPoint(_Record):
    """One way of running networks on a device.

    Args:
        precision: of weights and activations.
        runtime: `onnxruntime`, `tensorrt`, `tflite`, ... Only some can be measured by this project.
        threads, batch: of one inference.
        power_mode: the device's own name for its clock and power setting.
        peak_gmacs: peak arithmetic, 10^9 multiply-accumulates/s in this precision with these threads.
        bandwidth_gbs: peak memory bandwidth, GB/s.
        power_w: power while it infers, W; None where unknown (then energy cannot be predicted).
        host_link: what inputs and outputs cross for each inference (`USB 3.0`, `PCIe 2.0 x1`), empty for a device that
            computes in the host's own memory.
        host_link_gbs: nominal speed of that link in one direction, GB/s.
        measure: the command that measures there, or a short recipe; the profile's where none is given.
        options: settings of the runtime that its converter or meter passes on, such as
            `{accelerator = "ethos-u55-128"}`.
        estimated: the figures are reckoned, not read from a datasheet.
        source: where they come from, or how they were reckoned.
    """

    precision: Precision
    runtime: Text
    threads: Count = 1
    batch: Count = 1
    power_mode: str = ""
    peak_gmacs: Positive
    bandwidth_gbs: Positive
    power_w: Positive | None = None
    host_link: str = ""
    host_link_gbs: Positive | None = None
    measure: str = ""
    options: dict[str, str | int | float | bool] = {}
    estimated: bool = False
    source: Text

    @model_validator(mode="after")
    def _check(self) -> OperatingPoint:
        if bool(self.host_link) != (self.host_link_gbs is not None):
            raise ValueError("host_link and host_link_gbs, its name and its speed, go together")
        return self


# Kinds of arithmetic that a roofline tells apart.
EFFICIENCIES = ("conv2d", "pointwise", "linear", "depthwise_conv2d", "grouped_conv2d", "other")


class RooflineParameters(_Record):
    """What a roofline needs beyond peaks. Never from a datasheet, so `estimated` unless fitted to measurements.

    Args:
        efficiency: attained fraction of peak arithmetic by kind of operator: `conv2d`, `pointwise` (1x1 convolutions,
            linear layers and matrix products), `depthwise_conv2d`, `grouped_conv2d`, and `other` for those not named.
            Above 1 where an algorithm saves arithmetic (Winograd) or a stated peak is too low.
        bandwidth_efficiency: attained fraction of peak bandwidth, for activations.
        weight_bandwidth_efficiency: for parameters; as activations where None.
        lanes: channels, and pixels of a row, that arithmetic comes in: both are rounded up to multiples.
        launch_us: time that every operator costs apart from its work, in microseconds.
        fixed_us: time that every inference costs apart from its operators, in microseconds.
        host_link_gbs: link that inputs (and parameters beyond `on_chip_bytes`) cross for each inference, GB/s;
            None for a device that computes in the host's own memory.
        on_chip_bytes: parameters that stay on the accelerator between inferences; None without such a limit.
        estimated, source: as above.
    """

    efficiency: dict[str, Positive]
    bandwidth_efficiency: Positive = 0.6
    weight_bandwidth_efficiency: Positive | None = None
    lanes: tuple[Count, Count] = (1, 1)
    launch_us: NotNegative
    fixed_us: NotNegative = 0.0
    host_link_gbs: Positive | None = None
    on_chip_bytes: Count | None = None
    estimated: bool = True
    source: Text

    @model_validator(mode="after")
    def _check(self) -> RooflineParameters:
        if "other" not in self.efficiency:
            raise ValueError("efficiency must name 'other', the fraction for all kinds not named")
        for kind, value in self.efficiency.items():
            if kind not in EFFICIENCIES:
                raise ValueError(f"efficiency.{kind}: unknown kind of arithmetic. {nearest(kind, EFFICIENCIES)}")
            if self.estimated and value > 1:
                raise ValueError(f"efficiency.{kind}: an estimate is less than or equal to 1, got {value:g}")
        if self.on_chip_bytes is not None and self.host_link_gbs is None:
            raise ValueError("on_chip_bytes needs host_link_gbs, the link that the remaining parameters come over")
        return self


class Limit(_Record):
    """What a device asks of one kind of operator; a key that is not given asks nothing.

    Args:
        max_kernel: largest edge of the kernel (or pooling window).
        max_kernel_area: largest product of the kernel's edges.
        max_stride: largest stride along either edge.
        max_channels: most channels of any input or of the output.
        max_elements: most elements of the output.
        max_output_rank: most dimensions of the output per sample.
        source: who says so.
    """

    max_kernel: Count | None = None
    max_kernel_area: Count | None = None
    max_stride: Count | None = None
    max_channels: Count | None = None
    max_elements: Count | None = None
    max_output_rank: Count | None = None
    source: Text

    def broken(self, op: Operator) -> str:
        """What of this limit an operator breaks, in words; "" where it keeps it."""
        channels = max(t.shape[0] if len(t.shape) == 3 else t.shape[-1] for t in (*op.inputs, op.output) if t.shape)
        measured = (
            ("kernel", max(op.kernel, default=0), self.max_kernel),
            ("kernel area", prod(op.kernel) if op.kernel else 0, self.max_kernel_area),
            ("stride", max(op.stride, default=0), self.max_stride),
            ("channels", channels, self.max_channels),
            ("output elements", op.output.size, self.max_elements),
            ("output dimensions", len(op.output.shape), self.max_output_rank),
        )
        return "; ".join(f"{what} {value} is above {most}" for what, value, most in measured if most and value > most)


class Constraints(_Record):
    """What a device or its compiler cannot do, in the words of who says so.

    Args:
        runtimes: the runtimes that this applies to; empty means all of the profile's operating points.
        precisions: the only ones that it computes in; empty for any.
        static_shapes: it takes networks whose shapes are all known when they are compiled, batch included.
        operators: the only kinds of operators that it runs; empty for any but `unsupported_operators`.
        unsupported_operators: kinds that it does not run.
        max_rank: most dimensions per sample (no batch dimension) of a tensor.
        limits: per kind of operator.
        otherwise: what becomes of an operator that it does not run: the network is `refused`, or the operator is left
            to the `host_cpu`.
        note, source: what a person should know, and who says all this.
    """

    runtimes: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ()
    static_shapes: bool = False
    operators: tuple[str, ...] = ()
    unsupported_operators: tuple[str, ...] = ()
    max_rank: Count | None = None
    limits: dict[str, Limit] = {}
    otherwise: Literal["refused", "host_cpu"] = "refused"
    note: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _check(self) -> Constraints:
        if (self.precisions or self.operators or self.unsupported_operators or self.max_rank) and not self.source:
            raise ValueError("constraints need a source")
        both = set(self.operators) & set(self.unsupported_operators)
        if both:
            raise ValueError(f"{sorted(both)[0]!r} stands among operators and among unsupported_operators")
        return self

    def apply_to(self, point: OperatingPoint) -> bool:
        """Whether they hold at an operating point."""
        return not self.runtimes or point.runtime in self.runtimes


class Reference(_Record):
    """A published latency of one inference (one batch): a fact to fit and judge predictions by.

    Args:
        network: a reference network's name.
        resolution: of its input, pixels: the edge of a square, or height and width.
        operating_point: the profile's, or empty where it has none like it.
        energy_mj: of the same inference.
    """

    network: Text
    resolution: Count | tuple[Count, Count]
    latency_ms: Positive
    precision: Precision
    runtime: Text
    operating_point: str = ""
    energy_mj: Positive | None = None
    source: Text
    note: str = ""

    @property
    def size(self) -> str:
        """`224`, or `320x512` (height first)."""
        return "x".join(map(str, self.resolution)) if isinstance(self.resolution, tuple) else str(self.resolution)


def _network_and_size(key: str) -> tuple[str, int | tuple[int, int]]:
    """Of `resnet50@224` or `fcn_resnet18@320x512`.

    Raises:
        ValueError: it is neither.
    """
    network, _, size = key.partition("@")
    edges = size.split("x")
    if not network or len(edges) > 2 or not all(e.isdecimal() and int(e) for e in edges):
        raise ValueError(f"{key!r}: expected a network with its resolution, such as 'resnet50@224' or '...@320x512'")
    return network, int(size) if len(edges) == 1 else (int(edges[0]), int(edges[1]))


class ReferenceSet(_Record):
    """References of one source and operating point in a table: `"resnet50@224" = 29.8`; height first where two edges.

    Args:
        operating_point: where they were measured; their precision is its.
        latency_ms: per network and resolution.
        energy_mj: of the same inferences, where it was measured.
    """

    operating_point: Text
    runtime: Text
    source: Text
    note: str = ""
    latency_ms: Annotated[dict[str, Positive], Field(min_length=1)]
    energy_mj: dict[str, Positive] = {}

    @model_validator(mode="after")
    def _check(self) -> ReferenceSet:
        for key in (*self.latency_ms, *self.energy_mj):
            _network_and_size(key)
        for key in self.energy_mj.keys() - self.latency_ms.keys():
            raise ValueError(f"energy_mj of {key!r}, which has no latency_ms here")
        return self

    def references(self, precision: Precision) -> tuple[Reference, ...]:
        """One by one."""
        return tuple(
            Reference(
                network=network,
                resolution=resolution,
                latency_ms=latency,
                precision=precision,
                runtime=self.runtime,
                operating_point=self.operating_point,
                energy_mj=self.energy_mj.get(key),
                source=self.source,
                note=self.note,
            )
            for key, latency in self.latency_ms.items()
            for network, resolution in (_network_and_size(key),)
        )


class FitErrors(_Record):
    """How well a network that was left out of the fit is predicted, over all networks of an operating point.

    Args:
        median_ape: median absolute error, relative to the measurement.
        within_10_percent, within_20_percent: share of networks predicted that closely.
        spearman: rank correlation; None for fewer than three networks.
        coverage_90: share of measurements inside the 90 % interval.
        family_*: the same where all widths, depths and resolutions of the network's family are left out with it.
    """

    median_ape: NotNegative
    within_10_percent: NotNegative
    within_20_percent: NotNegative
    spearman: float | None = None
    coverage_90: NotNegative
    family_median_ape: NotNegative
    family_within_20_percent: NotNegative
    family_coverage_90: NotNegative


class RooflineFit(_Record):
    """A roofline fitted to the references of one operating point (`predictors.fit_roofline`).

    Args:
        networks, families: how many it was fitted to; several figures of one network count once, by their median.
        range_ms: the least and the largest latency among them.
        parameters: the fitted ones.
        log_std: standard deviation of ln(measured / predicted) where the parameters are certain.
        deviations: their uncertainty: directions in the space of the logarithms of the costs, in the order of
            `predictors.roofline.COSTS`, each one standard deviation long.
        alone: logarithms of the costs fitted without knowledge of other devices; what is assumed of other devices rests
            on these.
        power_w: median of energy / latency, where energies were measured.
        errors: of networks left out.
    """

    networks: Count
    families: Count
    range_ms: tuple[Positive, Positive]
    parameters: RooflineParameters
    log_std: Positive
    deviations: tuple[tuple[float, ...], ...] = ()
    alone: tuple[float, ...] = ()
    power_w: Positive | None = None
    errors: FitErrors


class Profile(_Record):
    """A device: facts, operating points, roofline parameters, constraints and references.

    Args:
        name: as in `load_profile(name)` and in targets; also the name of its file.
        kind: `CPU`, `GPU`, `NPU`, ...
        default: name of the operating point meant where none is named.
        local: the device is the machine this runs on, so that it can be measured and calibrated here.
        measure: how to measure on the device: a command or a short recipe, for people.
        references: published latencies; `reference_sets` are the same as tables, and become references on loading.
        fits: what the roofline learned from them, by operating point.
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
    fits: dict[str, RooflineFit] = {}

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
    own = {p.stem: p for p in sorted((user_data_dir() / "devices").glob("*.toml"))}
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
