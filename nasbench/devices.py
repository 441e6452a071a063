"""Adding, calibrating and validating devices: what the commands `nasbench devices ...` do."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware_profiles import Target, list_profiles, user_data_dir
from hardware_profiles.paths import write_text
from hardware_profiles.profile import parse_profile
from nasbench.networks import NamedNetwork, network_of, space_network, suite_networks
from predictors.base import Array, Estimate
from predictors.calibration import Calibration, MeasuredRow
from search_spaces import SearchSpace, UserError, Workload

# Measured where none are named, to validate: of several families, light enough for a small board.
VALIDATION_NETWORKS = (
    "mobilenet_v1_0.5", "mobilenet_v2@160", "mobilenet_v3_small", "shufflenet_v2", "squeezenet1_1", "mnasnet",
    "resnet18@160", "efficientnet_lite0", "ghostnet_v1", "mobilenet_v2_1.4",
)  # fmt: skip

# Peaks to start from, where nobody states any: (10^9 multiply-accumulates/s in fp32, GB/s). Orders of magnitude.
_GUESSES = {
    "CPU": (20.0, 10.0), "GPU": (250.0, 30.0), "NPU": (1000.0, 10.0),
    "DSP": (500.0, 10.0), "MCU": (0.2, 0.2), "FPGA": (100.0, 5.0),
}  # fmt: skip
REFUSED = "the network is refused"
_FASTER = {"fp32": 1.0, "fp16": 2.0, "int8": 4.0}


@dataclass(frozen=True)
class NewDevice:
    """What `nasbench devices new` is told.

    Args:
        name: lower-case letters, digits and `_`.
        title: for people; the name by default.
        kind: `CPU`, `GPU`, `NPU`, `DSP`, `MCU` or `FPGA`.
        runtime, precision, threads: of its operating point.
        command, adb, ssh: how it is measured: a command line with `{artifact}`, a serial number, a host. None of them
            for the machine this runs on.
        local: it is the machine this runs on.
        peak_gmacs, bandwidth_gbs, power_w: from its datasheet; guessed where not given.
        source: of those.
    """

    name: str
    title: str = ""
    kind: str = "CPU"
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    threads: int = 1
    command: str | None = None
    adb: str | None = None
    ssh: str | None = None
    local: bool = False
    peak_gmacs: float | None = None
    bandwidth_gbs: float | None = None
    power_w: float | None = None
    source: str = ""


def new_profile(device: NewDevice) -> Path:
    """Write a commented, valid profile into the user's directory.

    Returns:
        Its path.

    Raises:
        UserError: the name is taken or not a name, or a value that is none.
    """
    text = profile_text(device)
    parse_profile(tomllib.loads(text), f"the new profile {device.name!r}")
    if device.name in list_profiles():
        raise UserError(f"device {device.name!r} exists; choose another name, or edit its file")
    path = user_data_dir() / "devices" / f"{device.name}.toml"
    if path.exists():
        raise UserError(f"{path}: exists already and is not overwritten")
    write_text(path, text)
    return path


def profile_text(device: NewDevice) -> str:
    """The profile as commented TOML."""
    peak, bandwidth = _GUESSES.get(device.kind, _GUESSES["CPU"])
    peak = peak * _FASTER.get(device.precision, 1.0) if device.peak_gmacs is None else device.peak_gmacs
    bandwidth = bandwidth if device.bandwidth_gbs is None else device.bandwidth_gbs
    given = device.peak_gmacs is not None and device.bandwidth_gbs is not None
    source = device.source or (
        "given on the command line" if given else "guessed by kind; a calibration makes up for it"
    )
    power = (
        f"power_w = {device.power_w:g}"
        if device.power_w is not None
        else "# power_w = 5.0                # W while it infers; without, only measured energy is predicted"
    )
    return f"""\
# The profile of a device. `nasbench devices check {device.name}` validates and explains it.
name = {_quoted(device.name)}
title = {_quoted(device.title or device.name)}
kind = {_quoted(device.kind)}                     # CPU, GPU, NPU, DSP, MCU or FPGA
default = {_quoted(device.precision)}                 # the operating point that is meant where none is named
local = {str(device.local).lower()}                   # true: the machine this runs on

{_meter_text(device)}
# Facts, each with its source. Units: cores, GHz, MHz, GMAC/s, GFLOP/s, TOP/s, GB/s, MB, GB, W, ...
# [[datasheet]]
# name = "clock"
# value = 1.5
# unit = "GHz"
# source = "data sheet, page 3"

# One way to run networks on it. More may follow, as [operating_points.int8] and so on.
[operating_points.{device.precision}]
precision = {_quoted(device.precision)}             # fp32, fp16 or int8
runtime = {_quoted(device.runtime)}
threads = {device.threads}
batch = 1
peak_gmacs = {peak:g}                # 10^9 multiply-accumulates/s, at most
bandwidth_gbs = {bandwidth:g}             # of its memory, GB/s
{power}
estimated = {str(not given).lower()}
source = {_quoted(source)}

# Starting values of the roofline, used until `nasbench devices calibrate {device.name}` has measured something.
[roofline]
bandwidth_efficiency = 0.6
launch_us = {2 if device.kind in ("CPU", "MCU") else 30}                   # of every operator
fixed_us = {0 if device.kind in ("CPU", "MCU") else 300}                    # of every inference
source = "guessed by kind of device"

[roofline.efficiency]             # attained share of peak_gmacs, by kind of operator
conv2d = 0.5
pointwise = 0.5
depthwise_conv2d = 0.15
other = 0.3

# What it or its compiler cannot run; a search in a space with these operators leaves them out.
# [constraints]
# unsupported_operators = ["hard_swish"]
# source = "compiler manual"
"""


def _meter_text(device: NewDevice) -> str:
    if sum(given is not None for given in (device.command, device.adb, device.ssh, device.local or None)) > 1:
        raise UserError("a device is local, or measured by --command, --adb or --ssh: give one of them")
    head = "# How it is measured.\n[meter]\n"
    if device.command is not None:
        return (
            f'{head}kind = "command"\ncommand = {_quoted(device.command)}\n'
            '# It prints JSON: {"latency_ms": [1.2, 1.3], "energy_mj": 3.4, "peak_memory_bytes": 5, '
            '"runtime_version": "6"};\n# only latency_ms must be there.\n'
            "# Placeholders: {artifact} {threads} {batch} {precision} {power_mode} {warmup} {repeats}.\n"
            "timeout_s = 600\n"
        )
    if device.adb is not None:
        serial = (
            f"serial = {_quoted(device.adb)}\n" if device.adb else '# serial = "..."   # where several are connected\n'
        )
        return f'{head}kind = "adb"\n{serial}# taskset = "f0"     # mask of the cores to run on\n'
    if device.ssh is not None:
        tools = {"tensorrt": "trtexec", "openvino": "benchmark_app", "tflite": "benchmark_model"}
        tool = tools.get(device.runtime, "json")
        binary = (
            'binary = "my_benchmark"   # prints JSON, see nasbench devices new --command\n' if tool == "json" else ""
        )
        return f'{head}kind = "ssh"\nhost = {_quoted(device.ssh)}\ntool = "{tool}"\n{binary}'
    if device.local:
        return ""
    return (
        "# How it is measured: by a command, adb or ssh (docs/add_a_device.md). Without, it can only be predicted.\n"
        '# [meter]\n# kind = "command"\n# command = "my_benchmark {artifact}"\n'
    )


def _quoted(text: str) -> str:
    import tomli_w

    return tomli_w.dumps({"x": text}).partition(" = ")[2].strip()


def unsupported_operators(target: Target, workloads: Sequence[Workload]) -> list[tuple[str, int, str, str]]:
    """What a target does not run of networks, or of a space's blocks: (operator, how many alike, why, what then)."""
    from hardware_profiles import check_workload

    findings = [finding for workload in workloads for finding in check_workload(workload, target)]
    alike = Counter((f.operator.kind, f.reason, f.otherwise) for f in findings)
    then = {"refused": REFUSED, "host_cpu": "it runs on the host's CPU"}
    return [(kind, count, reason, then.get(what, what)) for (kind, reason, what), count in alike.items()]


def calibration_networks(
    target: Target, networks: int, spaces: Mapping[str, SearchSpace], seed: int = 0
) -> list[NamedNetwork]:
    """Networks to calibrate a target with: of spaces, spread over their latencies; else made up, of all kinds.

    Networks with operators that the target refuses are passed over.

    Raises:
        UserError: none is left.
    """
    found: list[NamedNetwork] = []
    if spaces:
        from predictors.measuring import choose

        shares = [len(part) for part in np.array_split(np.arange(networks), len(spaces))]
        for (label, space), share in zip(spaces.items(), shares, strict=True):
            if share:
                rows = choose(space, max(share, 2), target, np.random.default_rng(seed))[:share]
                found += [space_network(space, [int(i) for i in row], label) for row in rows]
    else:
        found = suite_networks(networks)
    runnable = [
        n for n in found if not any(then == REFUSED for *_, then in unsupported_operators(target, [n.workload]))
    ]
    if not runnable:
        raise UserError(
            f"{target.name}: it refuses every network that was to be measured; see `nasbench devices check`"
        )
    return runnable


@dataclass(frozen=True)
class Validation:
    """Predicted against measured values of one target, latencies in ms.

    Args:
        networks: names.
        measured, mean, low, high: `(n,)` measured latency, predicted latency and its 90 % interval.
        basis: what the predictions rest on.
        warning: what makes them doubtful.
        drift: measured now over measured at calibration, of networks that were measured then; empty where none was.
    """

    networks: tuple[str, ...]
    measured: Array
    mean: Array
    low: Array
    high: Array
    basis: str
    warning: str
    drift: dict[str, float]

    @property
    def times_off(self) -> float:
        """How many times measured and predicted values differ, in the median."""
        return float(np.exp(np.median(np.abs(np.log(self.measured / self.mean)))))

    @property
    def figures(self) -> dict[str, float]:
        """`median_error`, `within_10_percent`, `spearman`, `interval_90_coverage` and, where known, `drift`."""
        from predictors.quality import figures

        inside = float(np.mean((self.low <= self.measured) & (self.measured <= self.high)))
        found = figures(np.log(self.measured / self.mean), self.measured, inside)
        if self.drift:
            found["drift"] = float(np.median(list(self.drift.values())))
        return found


def validate_target(
    target: Target, rows: Sequence[MeasuredRow], workloads: Sequence[Workload], predictor: str = "auto"
) -> Validation:
    """Predict networks that were measured.

    Raises:
        UserError: no rows, or nothing predicts the target.
    """
    from predictors.calibration import kept_calibration
    from predictors.choice import choose_predictor

    if not rows:
        raise UserError(f"{target.name}: nothing was measured, so nothing can be validated")
    choice = choose_predictor(target, "latency_ms", predictor=predictor)
    estimate: Estimate = choice.predictor.predict(list(workloads))
    calibration: Calibration | None = kept_calibration(target)
    before = {r.network: r.latency_ms for r in calibration.rows} if calibration else {}
    return Validation(
        networks=tuple(r.network for r in rows),
        measured=np.array([r.latency_ms for r in rows]),
        mean=estimate.mean,
        low=estimate.quantile(0.05),
        high=estimate.quantile(0.95),
        basis=choice.basis,
        warning=estimate.warning,
        drift={r.network: r.latency_ms / before[r.network] for r in rows if r.network in before},
    )


def workloads_of(rows: Sequence[MeasuredRow], spaces: Mapping[str, SearchSpace] | None = None) -> list[Workload]:
    """The workloads of measured networks.

    Args:
        spaces: by what their names begin with; others are loaded.

    Raises:
        UserError: a network that there is not.
    """
    known = dict(spaces or {})
    return [network_of(row.network, known).workload for row in rows]
