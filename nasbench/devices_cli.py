"""The commands `nasbench devices ...`: look at devices, add one, measure on it, calibrate and validate it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.tables import table
from search_spaces.errors import UserError

if TYPE_CHECKING:
    from hardware_profiles import Meter, Target
    from nasbench.few_shot import Sources
    from nasbench.measurements import Measured
    from nasbench.networks import NamedNetwork
    from predictors.calibration import MeasuredRow
    from predictors.calibration_methods import FittedMetric
    from search_spaces import SearchSpace

app = typer.Typer(
    help="Devices: list, show, new, check, suggest, measure, calibrate, validate; see docs/add_a_device.md.",
    no_args_is_help=True,
)

_Target = Annotated[str, typer.Argument(help="device or device:operating-point.")]
_Networks = Annotated[
    list[str] | None,
    typer.Argument(help="Reference networks (mobilenet_v2, resnet18@160), SPACE:ARCHITECTURE, or ONNX files."),
]
_Space = Annotated[list[str] | None, typer.Option(help="Spaces whose architectures are measured.")]
_Meter = Annotated[
    str | None,
    typer.Option(help="adb[:SERIAL], ssh:HOST, a TOML file with a \\[meter] section, replay:FILE, or module:Class."),
]
_Sources = Annotated[
    Path | None,
    typer.Option(
        help="The space measured on other devices: a CSV with a column arch and one per device, a table "
        "in HELP's layout, or what MeasuredTable.save wrote."
    ),
]
_Column = Annotated[list[str] | None, typer.Option(help="Devices of --sources to learn from; all by default.")]
# Why --from excludes what says how and what to measure.
_READ = "measurements are read from its file, and none are taken"
_Quiet = Annotated[bool, typer.Option(help="Say nothing but the result.")]


@app.command("list")
def list_() -> None:
    """List device profiles."""
    from nasbench.devices_view import list_devices

    list_devices()


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A device, or the path of a profile.")],
    toml: Annotated[bool, typer.Option("--toml", help="As a TOML file, to copy and change.")] = False,
) -> None:
    """Show a profile, with the sources of its figures."""
    from hardware_profiles import load_profile

    profile = load_profile(name)
    if toml:
        import tomli_w

        print(tomli_w.dumps(profile.model_dump(exclude_none=True)), end="")
    else:
        from nasbench.devices_view import show_device

        show_device(profile)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and _.")],
    title: Annotated[str, typer.Option(help="What it is, for people.")] = "",
    kind: Annotated[str, typer.Option(help="CPU, GPU, NPU, DSP, MCU or FPGA.")] = "CPU",
    runtime: Annotated[
        str, typer.Option(help="onnxruntime, litert, openvino, tensorrt, tflite, or any other word.")
    ] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32",
    threads: Annotated[int, typer.Option(help="Of one inference.")] = 1,
    command: Annotated[
        str | None, typer.Option(help="Measures a network and prints JSON; {artifact} is the file.")
    ] = None,
    adb: Annotated[str | None, typer.Option(help="An Android device's serial number; '' for the only one.")] = None,
    ssh: Annotated[str | None, typer.Option(help="A host that ssh reaches without asking.")] = None,
    local: Annotated[bool, typer.Option("--local", help="It is the machine this runs on.")] = False,
    peak_gmacs: Annotated[float | None, typer.Option(help="10^9 multiply-accumulates/s, from its datasheet.")] = None,
    bandwidth_gbs: Annotated[float | None, typer.Option(help="Memory bandwidth, GB/s, from its datasheet.")] = None,
    power_w: Annotated[float | None, typer.Option(help="Power while it infers, W.")] = None,
    source: Annotated[str, typer.Option(help="Where these figures are from.")] = "",
) -> None:
    """Write a commented profile of a new device into your data directory; nothing is overwritten."""
    from nasbench.devices import NewDevice, new_profile

    path = new_profile(
        NewDevice(
            name=name, title=title, kind=kind, runtime=runtime, precision=precision, threads=threads, command=command,
            adb=adb, ssh=ssh, local=local, peak_gmacs=peak_gmacs, bandwidth_gbs=bandwidth_gbs, power_w=power_w,
            source=source,
        )
    )  # fmt: skip
    print(path)
    print(f"next: nasbench devices check {name}", file=sys.stderr)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A device, device:operating-point, or the path of a profile.")],
    networks: _Networks = None,
    space: Annotated[list[str] | None, typer.Option(help="Spaces whose blocks, or --arch, are checked.")] = None,
    arch: Annotated[
        list[str] | None, typer.Option(help="Architectures of the space; all its blocks by default.")
    ] = None,
) -> None:
    """Validate a profile and explain it; with networks or a space, tell which operators the device cannot run."""
    from hardware_profiles import load_profile, load_target
    from nasbench.devices import REFUSED, unsupported_operators
    from nasbench.networks import named_networks, space_network

    if arch and not space:
        raise UserError(f"--arch {arch[0]!r} needs --space")
    target = load_profile(name).target() if name.endswith(".toml") else load_target(name)
    _explain(target)
    if not networks and not space:
        return
    checked = [(n.name, [n.workload]) for n in (named_networks(networks) if networks else [])]
    for label, loaded in _spaces(space).items():
        if arch:
            checked += [(n.name, [n.workload]) for n in (space_network(loaded, a, label) for a in arch)]
        else:
            checked.append((label, [loaded.catalog[i].workload for i in range(len(loaded.catalog))]))
    rows = []
    for label, workloads in checked:
        for kind, times, reason, then in unsupported_operators(target, workloads):
            rows.append((label, kind, times, reason, then))
    if rows:
        table(("network", "operator", "times", "why not", "then"), rows)
        if any(row[-1] == REFUSED for row in rows):
            raise typer.Exit(1)
    whole = [label for label, _ in checked if label not in {row[0] for row in rows}]
    if whole:
        print(f"{target.name} runs all operators of {', '.join(whole)}")


@app.command()
def suggest(
    target: _Target,
    space: Annotated[str, typer.Option(help="The space whose architectures are to be measured.")],
    networks: Annotated[int, typer.Option("--networks", "-n", min=1, help="How many.")] = 20,
    sources: _Sources = None,
    column: _Column = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="What was measured before, in a CSV; suggestions add to it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write a CSV for measure --from, or to fill in by hand; else names are printed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what they are chosen from.")] = 0,
) -> None:
    """Suggest which architectures of a space to measure on a device; with other devices' tables, the most telling."""
    from nasbench.few_shot import read_sources, suggest_networks, write_suggestions
    from nasbench.measurements import read_measurements

    device = _load(target)
    ((label, loaded),) = _spaces([space]).items()
    if sources is None and (column or from_):
        raise UserError("--column and --from need --sources")
    others = read_sources(sources, loaded, label, device, column) if sources else None
    rows = read_measurements(from_, device, {label: loaded}) if from_ else []
    found = suggest_networks(device, loaded, label, networks, others, rows, seed, str(from_ or ""))
    if output is None:
        print("\n".join(n.name for n in found))
        return
    write_suggestions(output, found)
    print(f"{len(found)} networks in {output}", file=sys.stderr)
    print(f"next: nasbench devices measure {device.name} --from {output} --output measured.csv", file=sys.stderr)


@app.command()
def measure(
    target: _Target,
    networks: _Networks = None,
    space: Annotated[str | None, typer.Option(help="A space, with --arch.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="Choice indices, or a reference of the space.")] = None,
    from_: Annotated[Path | None, typer.Option("--from", help="A CSV whose column network names more of them.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="CSV to append to; measurements/TARGET.csv in your data directory.")
    ] = None,
    meter: _Meter = None,
    record: Annotated[
        Path | None, typer.Option(help="Keep commands and outputs in this JSON file, for replay.")
    ] = None,
    quiet: _Quiet = False,
) -> None:
    """Measure networks on a device and keep the results."""
    from nasbench.measurements import named_in
    from nasbench.networks import named_networks

    device = _load(target)
    found = named_networks([*(networks or []), *(named_in(from_) if from_ else [])], space, arch or [])
    path = output or _measurements_path(device)
    device, measured = _measured(device, found, meter, record, quiet, path)
    _show_measured(measured)
    if not all(m.error for m in measured):
        print(f"kept in {path}", file=sys.stderr)
    if any(m.error for m in measured):
        raise typer.Exit(1)


@app.command()
def calibrate(
    target: _Target = "host",
    networks: Annotated[
        int | None,
        typer.Option(min=1, help="How many networks to measure, of the spaces or made up: 48, or 20 with --sources."),
    ] = None,
    space: _Space = None,
    sources: _Sources = None,
    column: _Column = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Measured networks in a CSV, instead of measuring.")
    ] = None,
    method: Annotated[str, typer.Option(help="auto, scale, roofline or operator_model.")] = "auto",
    meter: _Meter = None,
    output: Annotated[Path | None, typer.Option(help="Write the calibration here too.")] = None,
    quiet: _Quiet = False,
) -> None:
    """Measure networks (or read measured ones) and fit the predictor of a target; the result is kept for later use.

    Many networks give an operator model, a handful a fitted roofline: what predicts left-out networks best is taken.
    With other devices' tables of one space (--sources), ten or twenty of its architectures give a few-shot predictor of
    that space.
    """
    from nasbench.devices import calibration_networks
    from nasbench.few_shot import read_sources, suggest_networks
    from nasbench.measurements import read_measurements

    device = _load(target)
    _check_method(method)
    if from_ is None:
        _meter(device, meter)
    else:
        _exclude("--from", _READ, {"--meter": meter, "--networks": networks})
    spaces = _spaces(space)
    about: dict[str, Any] = {}
    others = None
    if sources is not None:
        if len(spaces) != 1:
            raise UserError("--sources needs the one space whose architectures they measured (--space)")
        if method != "auto":
            raise UserError(f"--sources gives a few-shot predictor, and no {method}; leave out --method")
        ((label, loaded),) = spaces.items()
        others = read_sources(sources, loaded, label, device, column)
    elif column:
        raise UserError("--column needs --sources")
    if from_ is not None:
        rows = read_measurements(from_, device, spaces)
        about["source"] = from_.name
    else:
        if others is not None:
            chosen = suggest_networks(device, others.space, others.label, networks or 20, others)
        else:
            chosen = calibration_networks(device, networks or 48, spaces)
        device, measured = _measured(device, chosen, meter, None, quiet, _measurements_path(device))
        _say_failures(measured)
        rows = [m.row for m in measured if m.row]
        about = _about(measured)
    origin = str(from_ or "")
    if others is not None:
        _adapt_and_keep(device, rows, others, origin, output)
    else:
        _fit_and_keep(device, rows, spaces, method, about, output, quiet, origin)


@app.command()
def validate(
    target: _Target,
    networks: _Networks = None,
    space: _Space = None,
    count: Annotated[int | None, typer.Option(min=1, help="How many architectures of the spaces; 12.")] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Measured networks in a CSV, instead of measuring.")
    ] = None,
    predictor: Annotated[str, typer.Option(help="auto, roofline, or what the calibration is by.")] = "auto",
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Fit again to these and the earlier networks.")
    ] = False,
    meter: _Meter = None,
    quiet: _Quiet = False,
) -> None:
    """Compare predictions with fresh measurements: error, rank, interval coverage, and drift since the calibration."""
    from nasbench.devices import VALIDATION_NETWORKS, calibration_networks, validate_target, workloads_of
    from nasbench.measurements import read_measurements
    from nasbench.networks import named_networks
    from predictors.units import OTHER_UNIT

    device = _load(target)
    if from_ is None:
        _meter(device, meter)
    else:
        _exclude("--from", _READ, {"networks": networks, "--meter": meter, "--count": count})
    if networks:
        _exclude("networks", "those named are measured", {"--space": space, "--count": count})
    if count is not None and not space:
        raise UserError("--count needs --space, whose architectures are counted")
    spaces = _spaces(space)
    if from_ is not None:
        rows = read_measurements(from_, device, spaces)
    else:
        if networks or not spaces:
            chosen = named_networks(networks or VALIDATION_NETWORKS)
        else:
            chosen = calibration_networks(device, count or 12, spaces, seed=1)
        device, measured = _measured(device, chosen, meter, None, quiet, _measurements_path(device))
        _say_failures(measured)
        rows = [m.row for m in measured if m.row]
    found = validate_target(device, rows, workloads_of(rows, spaces), predictor)
    table(
        ("network", "measured ms", "predicted ms", "90 % interval", "error", "since calibration"),
        [
            (n, m, p, f"{low:.3g} to {high:.3g}{'' if low <= m <= high else ' (missed)'}", f"{p / m - 1:+.1%}",
             f"{found.drift[n] - 1:+.1%}" if n in found.drift else "")
            for n, m, p, low, high in zip(
                found.networks, found.measured, found.mean, found.low, found.high, strict=True
            )
        ],
    )  # fmt: skip
    print(f"{device.name}: {found.basis}")
    print(_figures(found.figures, len(rows)))
    if found.warning:
        print(f"warning: {found.warning}", file=sys.stderr)
    if "drift" in found.figures and abs(found.figures["drift"] - 1) > 0.1:
        print(
            f"warning: networks measured at calibration now take {found.figures['drift'] - 1:+.0%}: clock, runtime or "
            "load have changed; calibrate again",
            file=sys.stderr,
        )
    if found.times_off > OTHER_UNIT:
        told = f"what was measured is {found.times_off:.0f} times off what is predicted: is it in another unit?"
        if recalibrate:
            raise UserError(f"{device.name}: {told} The calibration is left as it was")
        print(f"warning: {told}", file=sys.stderr)
    if recalibrate:
        from predictors.calibration import kept_calibration

        before = kept_calibration(device)
        fresh = {r.network for r in rows}
        earlier = [r for r in before.rows if r.network not in fresh] if before else []
        about = before.model_dump(include={"source", "host", "protocol"}) if before else {}
        _fit_and_keep(device, [*earlier, *rows], spaces, "auto", about, None, quiet)


def _load(name: str) -> Target:
    from hardware_profiles import load_target

    return load_target(name)


def _check_method(method: str) -> None:
    from predictors.calibration_methods import METHODS
    from search_spaces import nearest

    if method not in ("auto", *METHODS):
        raise UserError(f"--method {method!r}: {nearest(method, ('auto', *METHODS))}")


def _meter(
    target: Target, spec: str | None, progress: Callable[[int, int], None] | None = None
) -> tuple[Target, Meter]:
    """The target's own meter or the one that was asked for; errors before networks for it are chosen and built."""
    from hardware_profiles import meter_for
    from hardware_profiles.meter_choice import with_meter

    target, meter = with_meter(target, spec, progress) if spec is not None else (target, meter_for(target, progress))
    if missing := meter.missing(target):
        raise UserError(f"{target.name}: its meter finds {missing}")
    return target, meter


def _exclude(first: str, why: str, others: Mapping[str, object]) -> None:
    """Refuse options beside one that would leave them without effect."""
    if given := [name for name, value in others.items() if value is not None and value != []]:
        raise UserError(f"{first} and {' and '.join(given)} exclude each other: {why}")


def _spaces(names: Iterable[str] | None) -> dict[str, SearchSpace]:
    from search_spaces import load_space

    return {s: load_space(s) for s in names or []}


def _measurements_path(target: Target) -> Path:
    from hardware_profiles import user_data_dir

    return user_data_dir() / "measurements" / f"{target.name.replace(':', '-')}.csv"


def _measured(
    target: Target, networks: list[NamedNetwork], meter: str | None, record: Path | None, quiet: bool, path: Path
) -> tuple[Target, list[Measured]]:
    """Measure with a bar, as the target's own meter or the one that was asked for does, and add that to a table."""
    from hardware_profiles import RecordingMeter
    from nasbench.measurements import append_measurements, measure_networks
    from nasbench.progress import Reporter

    with Reporter(quiet).phase(f"measure {target.name}") as phase:
        steps = phase.steps("networks")

        def said(done: int, total: int) -> None:
            steps("measure", done, total)

        target, chosen = _meter(target, meter, said)
        if record is not None:
            chosen = RecordingMeter(chosen, record)
        append_measurements(path, target, [])  # what cannot be kept is not measured
        try:
            measured = measure_networks(target, networks, meter=chosen, progress=steps)
        except KeyboardInterrupt as stop:
            _keep_finished(stop, target, networks, path)
            raise
        failed = sum(bool(m.error) for m in measured)
        phase.done(f"{len(measured) - failed} networks" + (f", {failed} failed" if failed else ""))
    try:
        append_measurements(path, target, measured)
    except UserError:
        _show_measured(measured)  # nothing else keeps them
        raise
    return target, measured


def _keep_finished(stop: KeyboardInterrupt, target: Target, networks: list[NamedNetwork], path: Path) -> None:
    """Add what was measured before an interrupt to a table, and say so."""
    from hardware_profiles.meter import Interrupted
    from nasbench.measurements import Measured, append_measurements

    named = {n.name: n for n in networks}
    taken = stop.measured if isinstance(stop, Interrupted) else ()
    finished = [Measured(named[m.artifact.name], m) for m in taken]
    told = "no network was finished"
    if finished:
        try:
            append_measurements(path, target, finished)
        except UserError as error:
            _show_measured(finished)  # nothing else keeps them
            print(f"error: {error}", file=sys.stderr)
            return
        command = f"nasbench devices calibrate {target.name} --from {path}"
        told = f"{len(finished)} of {len(networks)} networks are kept in {path}; fit them with: {command}"
    print(f"\ninterrupted; {told}", file=sys.stderr)


def _about(measured: list[Measured]) -> dict[str, Any]:
    """What a calibration keeps of a session of measuring besides its numbers."""
    protocol = next(m.measurement.protocol for m in measured if m.measurement)
    return {
        "host": protocol.host,
        "protocol": protocol,
        "failures": {m.network.name: m.error for m in measured if m.error},
    }


def _fit_and_keep(
    target: Target,
    rows: list[MeasuredRow],
    spaces: dict[str, SearchSpace],
    method: str,
    about: dict[str, Any],
    output: Path | None,
    quiet: bool,
    origin: str = "",
) -> None:
    from nasbench.devices import workloads_of
    from nasbench.planning.sections import naming
    from nasbench.progress import Reporter
    from predictors.calibration import calibration_path, fit_target

    with Reporter(quiet).phase(f"fit {target.name}"), naming(origin):
        calibration = fit_target(target, rows, workloads_of(rows, spaces), method=method, **about)  # type: ignore[arg-type]
    path, replaced = calibration_path(target), _replaced(target)
    calibration.save(path)
    if output is not None:
        calibration.save(output)
    for metric, model in calibration.models.items():
        print(f"{metric} on {target.name}: {calibration.basis(metric)}")
        print(_quality(model))
    if calibration.warning:
        print(f"warning: {calibration.warning}", file=sys.stderr)
    _say_kept(path, output, replaced)


def _say_kept(path: Path, output: Path | None, replaced: str) -> None:
    print(f"kept in {path}{f' and in {output}' if output else ''}{replaced}", file=sys.stderr)


def _replaced(target: Target) -> str:
    """What is lost with the calibration that a new one takes the place of; a damaged one is no loss."""
    from predictors.calibration import kept_calibration

    try:
        before = kept_calibration(target)
    except UserError:
        return ""
    if before is None:
        return ""
    error = before.models["latency_ms"].quality.get("median_error")
    how_good = "" if error is None else f", median error {error:.1%}"
    return f"; replaces one of {len(before.rows)} networks of {before.created:%Y-%m-%d}{how_good}"


def _replaced_few_shot(path: Path) -> str:
    """Likewise of a few-shot predictor."""
    from predictors import FewShot

    try:
        before = FewShot.load(path) if path.is_file() else None
    except UserError:
        return ""
    return f"; replaces one of {len(before.latency_ms)} networks" if before else ""


def _adapt_and_keep(
    target: Target, rows: list[MeasuredRow], sources: Sources, origin: str, output: Path | None
) -> None:
    from nasbench.few_shot import adapt_few_shot
    from predictors.choice import few_shot_basis, few_shot_path

    adapted, quality, doubt = adapt_few_shot(target, rows, sources, origin)
    path = few_shot_path(target, sources.space)
    replaced = _replaced_few_shot(path)
    for file in (path, *([output] if output else [])):
        adapted.save(file)
    print(f"latency_ms on {target.name}: {few_shot_basis(adapted)}")
    judged = ", each predicted without it" if "median_error" in quality else ": too few to judge the fit"
    print(_figures(quality, int(quality["networks"])) + judged)
    if doubt:
        print(f"warning: {doubt}", file=sys.stderr)
    _say_kept(path, output, replaced)
    print(f"an experiment takes it by name: few_shot:{output or path}, under targets.predictors", file=sys.stderr)


def _quality(model: FittedMetric) -> str:
    judged = ", each predicted by a fit without it" if "median_error" in model.quality else ": too few to judge the fit"
    return _figures(model.quality, int(model.quality["networks"])) + judged


def _figures(figures: dict[str, float], networks: int) -> str:
    parts = [f"{networks} networks"]
    for key, words in (
        ("median_error", "median error {:.1%}"), ("within_10_percent", "within 10 %: {:.0%}"),
        ("spearman", "Spearman {:.3f}"), ("interval_90_coverage", "in the 90 % interval: {:.0%}"),
    ):  # fmt: skip
        if key in figures:
            parts.append(words.format(figures[key]))
    return ", ".join(parts)


def _show_measured(measured: list[Measured]) -> None:
    rows: list[tuple[Any, ...]] = []
    for one in measured:
        m = one.measurement
        if m is None or one.error:
            rows.append((one.network.name, "", "", one.error))
            continue
        energy = "" if m.energy_mj is None else f"{m.energy_mj:.4g}"
        rows.append((one.network.name, m.latency_ms, energy, m.note))
    table(("network", "ms", "mJ", "note"), rows)


def _say_failures(measured: list[Measured]) -> None:
    for one in measured:
        if one.error:
            print(f"not measured: {one.network.name}: {one.error}", file=sys.stderr)


def _explain(target: Target) -> None:
    """What a profile says, in lines, and what each prediction of it would rest on."""
    from predictors.choice import choose_predictor

    profile, point = target.profile, target.point
    print(f"{profile.name}: {profile.title} ({profile.kind}), a valid profile")
    print(f"operating points: {', '.join(profile.operating_points)}; here {target.operating_point}: {point.precision}, "
          f"{point.runtime}, {point.threads} threads, batch {point.batch}")  # fmt: skip
    guessed = " (estimated)" if point.estimated else ""
    print(f"peak {point.peak_gmacs:g} GMAC/s, memory {point.bandwidth_gbs:g} GB/s{guessed}: {point.source}")
    try:
        _meter(target, None)
        print("measured from here: yes")
    except UserError as error:
        print(f"measured from here: no: {error}")
    for metric in ("latency_ms", "energy_mj", "peak_memory_bytes"):
        try:
            print(f"{metric}: {choose_predictor(target, metric).basis}")
        except UserError as error:
            print(f"{metric}: none: {error}")
