"""The command `nasbench`. Imports what a command needs inside the command, so that `--help` is instant."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from search_spaces.errors import UserError, nearest

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hardware-aware neural architecture search: search, verify and deploy Pareto-optimal networks.",
)


@app.command()
def run(
    experiment: Annotated[str | None, typer.Argument(help="An experiment file, or the name of a shipped one.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, overrides the file.")] = None,
    output: Annotated[Path | None, typer.Option(help="The run directory; a new one below runs/ by default.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
    quiet: Annotated[bool, typer.Option(help="Say nothing but the result.")] = False,
) -> None:
    """Run an experiment, or continue one with --resume."""
    from nasbench.config import find_experiment, load_config
    from nasbench.progress import Reporter
    from nasbench.run import RunView, load_run_config, run_origin

    if resume is not None:
        if experiment or set_ or output:
            raise UserError(
                "--resume takes the configuration from the run; leave out the experiment, --set and --output"
            )
        config, where = load_run_config(resume), run_origin(resume)
    elif experiment is None:
        raise UserError("name an experiment file, or --resume RUN")
    else:
        file = find_experiment(experiment)
        config, where = load_config(file, set_ or []), file.resolve().parent

    from nasbench.experiment import new_directory, run_experiment

    path = resume or output or new_directory(config.name)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        view: RunView = run_experiment(config, path, resume=resume is not None, where=where, report=Reporter(quiet))
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; everything finished is kept. Continue with: nasbench run --resume {path}", file=sys.stderr
        )
        raise SystemExit(130) from None
    front = view.front()
    print(f"{int(front['pareto'].sum())} networks on the verified front. Report: {path / 'report.html'}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Draw the figures and write the report of a run again."""
    from nasbench.report import write_report

    print(write_report(run))


@app.command()
def runs(
    run: Annotated[Path | None, typer.Argument(help="Show this run; all below --below when left out.")] = None,
    below: Annotated[Path, typer.Option(help="Where to look for runs.")] = Path("runs"),
) -> None:
    """List runs, or show the front of one."""
    from nasbench.run import load_run

    if run is not None:
        view = load_run(run)
        front = view.front()
        names = list(view.config.objectives)
        columns = ["name", *(c for n in names for c in front.columns if c == n or c.startswith(f"{n}_"))]
        rows = front[front["pareto"]].sort_values(names[-1])[columns]
        _table(columns, rows.itertuples(index=False, name=None))
        return
    found: list[tuple[object, ...]] = []
    for path in sorted(p.parent for p in below.glob("*/config.toml")):
        try:
            view = load_run(path)
            found.append((str(path), view.state["status"], view.state["created"], len(view.evaluations())))
        except (UserError, OSError, ValueError) as error:
            found.append((str(path), f"unreadable: {error}", "", ""))
    _table(("run", "status", "created", "evaluations"), found)


@app.command()
def spaces(name: Annotated[str | None, typer.Argument(help="Show this space.")] = None) -> None:
    """List search spaces, or show one."""
    from search_spaces import load_space, presets

    if name is None:
        _table(("space", "what it is"), presets().items())
        return
    space = load_space(name)
    print(f"{space.name}: {space.size:,} architectures, {len(space.knobs)} knobs, input {space.input_shape}")
    _table(("knob", "choices"), [(k.name, ", ".join(map(str, k.choices))) for k in space.knobs])
    rows = []
    for reference, arch in space.references.items():
        workload = space.workload(arch)
        rows.append((reference, f"{workload.macs / 1e6:.2f}", f"{workload.params / 1e6:.3f}"))
    _table(("reference", "M MACs", "M parameters"), rows)


@app.command()
def strategies() -> None:
    """List search strategies and their keys."""
    _components("strategy")


@app.command()
def stages() -> None:
    """List post-search stages and their keys."""
    _components("stage")


devices_app = typer.Typer(help="Devices: list, show, calibrate.", no_args_is_help=True)
app.add_typer(devices_app, name="devices")


@devices_app.command("list")
def devices_list() -> None:
    """List device profiles."""
    from hardware_profiles import list_profiles, load_profile

    rows = []
    for name in list_profiles():
        profile = load_profile(name)
        rows.append((name, profile.title, ", ".join(profile.operating_points), profile.default))
    _table(("device", "what it is", "operating points", "default"), rows)


@devices_app.command("show")
def devices_show(name: Annotated[str, typer.Argument(help="A device, or the path of a profile.")]) -> None:
    """Show a profile, with the sources of its figures."""
    import tomli_w

    from hardware_profiles import load_profile

    print(tomli_w.dumps(load_profile(name).model_dump(exclude_none=True)), end="")


@devices_app.command("calibrate")
def devices_calibrate(
    name: Annotated[str, typer.Argument(help="A target that is here.")] = "host",
    space: Annotated[list[str] | None, typer.Option(help="Spaces whose networks are measured.")] = None,
    networks: Annotated[int, typer.Option(help="How many networks of each.")] = 32,
    output: Annotated[Path | None, typer.Option(help="Write the calibration here too.")] = None,
) -> None:
    """Measure networks and fit the latency model of a target; the result is kept for later runs."""
    from hardware_profiles import load_target
    from nasbench.experiment import calibration_summary
    from nasbench.progress import Reporter
    from predictors import calibrate
    from search_spaces import load_space

    with Reporter().phase(f"calibrate {name}") as phase:
        found = [load_space(s) for s in space or ["quickstart"]]
        calibration = calibrate(
            load_target(name),
            found,
            networks=networks * len(found),
            progress=phase.steps("networks"),
        )
        phase.done(calibration_summary(calibration))
    if output is not None:
        calibration.save(output)


@app.command()
def predict(
    target: Annotated[str, typer.Option(help="device or device:operating-point.")],
    network: Annotated[Path | None, typer.Argument(help="An ONNX file.")] = None,
    space: Annotated[str | None, typer.Option(help="A space, with --arch.")] = None,
    arch: Annotated[str | None, typer.Option(help="Choice indices separated by blanks, or a reference name.")] = None,
    metric: Annotated[
        str, typer.Option(help="latency_ms, energy_mj, peak_memory_bytes, params or macs.")
    ] = "latency_ms",
) -> None:
    """Predict a cost of one network on a target, with its 90 % interval."""
    from hardware_profiles import load_target
    from nasbench.archive import arch_row
    from predictors import calibrate, predictor_for
    from search_spaces import load_space, read_onnx

    device = load_target(target)
    if (network is None) == (space is None):
        raise UserError("name an ONNX file, or --space with --arch")
    calibration = None
    if network is not None:
        workload = read_onnx(network)
    else:
        chosen = load_space(str(space))
        names = chosen.references
        digits = (arch or "").replace(" ", "").isdigit()
        if arch not in names and not digits:
            raise UserError(f"--arch {arch!r}: neither choice indices nor a reference. {nearest(arch or '', names)}")
        row = names[arch] if arch in names else chosen.check(arch_row(str(arch))[None])[0]
        workload = chosen.workload(row)
    if metric == "latency_ms" and device.profile.local:
        calibration = calibrate(device, [load_space(space or "quickstart")])
    estimate = predictor_for(device.name, metric, calibration).predict([workload])
    low, high = float(estimate.quantile(0.05)[0]), float(estimate.quantile(0.95)[0])
    print(
        f"{metric} on {device.name}: {float(estimate.mean[0]):.4g} (90 % interval {low:.4g} to {high:.4g}), predicted"
    )
    if estimate.warning:
        print(f"warning: {estimate.warning}", file=sys.stderr)


def _components(family: str) -> None:
    import inspect

    from nasbench.registry import REGISTRY, resolve

    rows = []
    for name in REGISTRY[family]:
        component = resolve(family, name)
        keys = [
            f"{p.name} = {p.default!r}" if p.default is not p.empty else p.name
            for p in inspect.signature(component).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        rows.append((name, (inspect.getdoc(component) or "").split("\n")[0], ", ".join(keys)))
    _table((family, "what it is", "keys"), rows)


def _table(columns: Any, rows: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in row))
    Console().print(table)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: one line for what a person can mend, a traceback for what is our fault."""
    import sqlite3

    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except (OSError, sqlite3.OperationalError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        print(f"error: {where}{reason}; what was finished is kept, see nasbench run --resume", file=sys.stderr)
        raise SystemExit(2) from None
