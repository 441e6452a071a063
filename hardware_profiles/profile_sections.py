"""What the tables of a device profile hold: figures, operating points, rooflines, constraints, references and fits."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from hardware_profiles.records import Record
from search_spaces.errors import nearest
from search_spaces.operators import Operator, unknown_kind

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


def _within(least: float, most: float, unit: str) -> AfterValidator:
    """Bounds that no device is near: a figure beyond them is in another unit, and the error says which is expected."""

    def check(value: float) -> float:
        if not least <= value <= most:
            raise ValueError(f"{value:g} is outside {least:g} to {most:g}, in {unit}")
        return value

    return AfterValidator(check)


# From an 8-bit microcontroller (some 10^5 multiply-accumulates/s, 10^7 bytes/s, 1 mW) to a wafer of a chip (Cerebras
# WSE-3: 6 x 10^16 multiply-accumulates/s, 21 PB/s) and a server (kW), with room on both sides.
GMacs = Annotated[float, _within(1e-5, 1e8, "10^9 multiply-accumulates/s")]
Bandwidth = Annotated[float, _within(1e-4, 1e8, "GB/s")]
WATTS = (1e-4, 1e5)
Watts = Annotated[float, _within(*WATTS, "W")]
# A serial line; several bundled links between accelerators.
LinkSpeed = Annotated[float, _within(1e-6, 1e4, "GB/s")]
Threads = Annotated[int, _within(1, 4096, "threads of one inference")]
Batch = Annotated[int, _within(1, 1_000_000, "samples per inference")]
# No device waits for minutes before it computes; fits beside peaks that were guessed go further than any device.
Microseconds = Annotated[float, _within(0, 1e9, "microseconds")]
# Far from 1 where a roofline was fitted beside peaks that were guessed.
Fraction = Annotated[float, _within(1e-9, 1e6, "fractions of the peak, so that 60 % is 0.6")]


class Figure(Record):
    """One datasheet figure, and who says so."""

    name: Text
    value: Positive
    unit: Unit
    source: Text
    note: str = ""


class ChannelMultiple(Record):
    """The number of channels that a runtime computes at a time: others are padded up to a multiple of it.

    Args:
        runtimes, precisions: that it holds for; empty for all of the profile's.
        source: who says so.
    """

    multiple: Count
    runtimes: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ()
    source: Text


class OperatingPoint(Record):
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
    threads: Threads = 1
    batch: Batch = 1
    power_mode: str = ""
    peak_gmacs: GMacs
    bandwidth_gbs: Bandwidth
    power_w: Watts | None = None
    host_link: str = ""
    host_link_gbs: LinkSpeed | None = None
    measure: str = ""
    options: dict[str, str | int | float | bool] = Field(default={})
    estimated: bool = False
    source: Text

    @model_validator(mode="after")
    def _check(self) -> OperatingPoint:
        if bool(self.host_link) != (self.host_link_gbs is not None):
            raise ValueError("host_link and host_link_gbs, its name and its speed, go together")
        return self


# Kinds of arithmetic that a roofline tells apart.
EFFICIENCIES = ("conv2d", "pointwise", "linear", "depthwise_conv2d", "grouped_conv2d", "other")


class RooflineParameters(Record):
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
        host_link_gbs: link that inputs (and parameters that `on_chip_bytes` has no room for) cross for each inference,
            GB/s; None for a device that computes in the host's own memory.
        on_chip_bytes: the accelerator's memory, where parameters stay between inferences as far as the activations of
            the largest operator leave room; None without such a limit.
        estimated, source: as above.
    """

    efficiency: dict[str, Fraction]
    bandwidth_efficiency: Fraction = 0.6
    weight_bandwidth_efficiency: Fraction | None = None
    lanes: tuple[Count, Count] = (1, 1)
    launch_us: Microseconds
    fixed_us: Microseconds = 0.0
    host_link_gbs: LinkSpeed | None = None
    on_chip_bytes: Count | None = None
    estimated: bool = True
    source: Text

    @model_validator(mode="after")
    def _check(self) -> RooflineParameters:
        if "other" not in self.efficiency:
            raise ValueError("efficiency must name 'other', the fraction for all kinds not named")
        for kind in self.efficiency:
            if kind not in EFFICIENCIES:
                raise ValueError(f"efficiency.{kind}: unknown kind of arithmetic. {nearest(kind, EFFICIENCIES)}")
        fractions = {f"efficiency.{kind}": value for kind, value in self.efficiency.items()}
        fractions["bandwidth_efficiency"] = self.bandwidth_efficiency
        fractions["weight_bandwidth_efficiency"] = self.weight_bandwidth_efficiency or 0.0
        for key, value in fractions.items():
            if self.estimated and value > 1:
                raise ValueError(f"{key}: an estimate is a fraction less than or equal to 1, got {value:g}")
        if self.on_chip_bytes is not None and self.host_link_gbs is None:
            raise ValueError("on_chip_bytes needs host_link_gbs, the link that the remaining parameters come over")
        return self


class Limit(Record):
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


class Constraints(Record):
    """What a device or its compiler cannot do, in the words of who says so.

    Args:
        runtimes: the runtimes that this applies to; empty means all of the profile's operating points.
        precisions: the only ones that it computes in; empty for any.
        static_shapes: it takes networks whose shapes are all known when they are compiled, batch included.
        operators: the only kinds of operators that it runs (`search_spaces.operators.KINDS`, and ONNX operators that
            the reader leaves under their names); empty for any but `unsupported_operators`.
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
    limits: dict[str, Limit] = Field(default={})
    otherwise: Literal["refused", "host_cpu"] = "refused"
    note: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _check(self) -> Constraints:
        if (self.precisions or self.operators or self.unsupported_operators or self.max_rank) and not self.source:
            raise ValueError("constraints need a source")
        for key in ("operators", "unsupported_operators", "limits"):
            if why := next(filter(None, map(unknown_kind, getattr(self, key))), ""):
                raise ValueError(f"{key}: {why}")
        both = set(self.operators) & set(self.unsupported_operators)
        if both:
            raise ValueError(f"{sorted(both)[0]!r} stands among operators and among unsupported_operators")
        return self

    def apply_to(self, point: OperatingPoint) -> bool:
        """Whether they hold at an operating point."""
        return not self.runtimes or point.runtime in self.runtimes


class Reference(Record):
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


class ReferenceSet(Record):
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
    energy_mj: dict[str, Positive] = Field(default={})

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


class FitErrors(Record):
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


class RooflineFit(Record):
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
    power_w: Watts | None = None
    errors: FitErrors
