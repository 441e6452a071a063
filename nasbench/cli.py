"""The command `nasbench`. Imports what a command needs inside the command, so that `--help` is instant."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from nasbench.devices_cli import app as devices_app
from nasbench.export_cli import export
from nasbench.spaces_cli import app as spaces_app
from nasbench.tables import table
from nasbench.tables_cli import app as tables_app
from search_spaces.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hardware-aware neural architecture search: search, verify and deploy Pareto-optimal networks.",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"nasbench-hw {version('nasbench-hw')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Its version.")] = False,
) -> None:
    """Options that stand before a command."""


@app.command()
def run(
    experiment: Annotated[str | None, typer.Argument(help="An experiment file, or the name of a shipped one.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, overrides the file.")] = None,
    output: Annotated[Path | None, typer.Option(help="The run directory; a new one below runs/ by default.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
    quiet: Annotated[bool, typer.Option(help="Say nothing but the result.")] = False,
) -> None:
    """Run an experiment, or continue one with --resume.

    Started by torch's launcher, several processes train the supernet:
    torchrun --nproc-per-node 2 -m nasbench run EXPERIMENT
    """
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

    from nasbench.experiment import assist, new_directory, run_experiment
    from nasbench.training.processes import launched_rank

    if launched_rank():
        assist(config, where)
        return
    path = resume or output or new_directory(config.name)
    signal.signal(signal.SIGTERM, _interrupt)
    view: RunView
    try:
        view = run_experiment(config, path, resume=resume is not None, where=where, report=Reporter(quiet))
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; everything finished is kept. Continue with: nasbench run --resume {path}", file=sys.stderr
        )
        raise SystemExit(130) from None
    if config.networks:
        print(f"{int(view.stages()['final'].sum())} networks compressed. Report: {path / 'report.html'}")
        return
    front = view.front()
    print(f"{int(front['pareto'].sum())} networks on the verified front. Report: {path / 'report.html'}")


@app.command()
def compare(
    file: Annotated[
        Path | None, typer.Argument(help="A comparison's TOML file; a small one ships and is the default.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, overrides the file.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The directory of the results; runs/compare-NAME by default.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Worker processes; the results are the same with any number.")] = 1,
    quiet: Annotated[bool, typer.Option(help="Say nothing but the result.")] = False,
) -> None:
    """Compare search strategies: strategies x problems x seeds. Called again, it runs only what is missing."""
    from nasbench.comparison.study import compare as compare_strategies
    from nasbench.progress import Reporter
    from nasbench.report.comparison import verdict

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = compare_strategies(file, output=output, jobs=jobs, overrides=set_ or [], report=Reporter(quiet))
    except KeyboardInterrupt:
        print("\ninterrupted; finished searches are kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    ranks = result.ranks
    table(("strategy", *(f"rank at {b}" for b in ranks.columns)), ranks.itertuples(name=None))
    print(f"{verdict(result)}\nReport: {result.path / 'report.html'}")


@app.command()
def compress(
    network: Annotated[
        list[str],
        typer.Argument(
            help="A reference network (resnet18@28), SPACE:ARCHITECTURE, module:function of your own, or FILE.onnx; "
            "NAME=NETWORK gives it a name."
        ),
    ],
    stages: Annotated[Path, typer.Option(help="An experiment file with [\\[stages]], a \\[task] and targets.")],
    weights: Annotated[Path | None, typer.Option(help="safetensors to start from, for a single network.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, overrides the file.")] = None,
    output: Annotated[Path | None, typer.Option(help="The run directory; a new one below runs/ by default.")] = None,
    quiet: Annotated[bool, typer.Option(help="Say nothing but the result.")] = False,
) -> None:
    """Take networks of any origin through post-search stages; continue with `nasbench run --resume RUN`."""
    from nasbench.config import load_config, with_networks
    from nasbench.experiment import new_directory, run_experiment
    from nasbench.progress import Reporter

    config = with_networks(load_config(stages, set_ or []), network, str(weights) if weights else None)
    path = output or new_directory(config.name)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        view = run_experiment(config, path, where=stages.resolve().parent, report=Reporter(quiet))
    except KeyboardInterrupt:
        print(f"\ninterrupted; continue with: nasbench run --resume {path}", file=sys.stderr)
        raise SystemExit(130) from None
    rows = view.stages()
    shown = [c for c in ("network", "step", "stage", "accuracy", "test_accuracy") if c in rows]
    shown += [c for c in rows.columns if c.startswith("latency_ms@")] + ["file_bytes"]
    table(tuple(shown), rows.loc[rows["final"], shown].itertuples(index=False, name=None))
    print(f"Report: {path / 'report.html'}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Draw the figures and write the report of a run again."""
    from nasbench.report import write_report

    print(write_report(run))


@app.command()
def dashboard(
    run: Annotated[Path, typer.Argument(help="A run directory, of a run that is finished or under way.")],
    port: Annotated[int, typer.Option(help="Where to serve; 0 for a port that is free.")] = 0,
    host: Annotated[str, typer.Option(help="The address to serve at; 0.0.0.0 for other machines too.")] = "127.0.0.1",
) -> None:
    """Open a run in optuna-dashboard (extra `dashboard`), until Ctrl-C."""
    import threading

    from hardware_profiles.extras import require
    from nasbench.dashboard import RunStudies, serving

    require("dashboard")
    with serving(RunStudies(run), port, host) as address:
        print(f"{run} at {address} (Ctrl-C ends)", flush=True)
        threading.Event().wait()


@app.command()
def runs(
    run: Annotated[Path | None, typer.Argument(help="Show this run; all below --below when left out.")] = None,
    below: Annotated[Path | None, typer.Option(help="Where to look for runs; runs/ by default.")] = None,
) -> None:
    """List runs, or show the front of one.

    A run is stopped where its process was killed; nasbench run --resume goes on with it.
    """
    from nasbench.run import load_run

    if run is not None and below is not None:
        raise UserError("RUN and --below exclude each other: one run is shown, or all below a directory are listed")
    if run is not None:
        view = load_run(run)
        front = view.front()
        columns = ["name", *view.value_columns(front)]
        rows = front[front["pareto"]].sort_values(view.objectives[-1].name)[columns]
        table(columns, rows.itertuples(index=False, name=None))
        return
    found: list[tuple[object, ...]] = []
    for path in sorted(p.parent for p in (below or Path("runs")).glob("*/config.toml")):
        try:
            view = load_run(path)
            found.append((str(path), view.status, view.state["created"], len(view.evaluations())))
        except (UserError, OSError, ValueError) as error:
            found.append((str(path), f"unreadable: {error}", "", ""))
    table(("run", "status", "created", "evaluations"), found)


@app.command()
def strategies() -> None:
    """List search strategies and their keys."""
    _components("strategy")


@app.command()
def evaluators() -> None:
    """List evaluators and their keys."""
    _components("evaluator")


@app.command()
def tasks() -> None:
    """List tasks and their keys."""
    _components("task")


@app.command()
def stages() -> None:
    """List post-search stages and their keys."""
    _components("stage")


app.command()(export)
app.add_typer(devices_app, name="devices")
app.add_typer(spaces_app, name="spaces")
app.add_typer(tables_app, name="tables")


@app.command()
def predict(
    target: Annotated[str, typer.Option(help="device or device:operating-point.")],
    network: Annotated[
        str | None,
        typer.Argument(
            help="A reference network (mobilenet_v2, resnet18@160), SPACE:ARCHITECTURE, an ONNX file; with --space, "
            "an architecture."
        ),
    ] = None,
    space: Annotated[str | None, typer.Option(help="A space, with an architecture.")] = None,
    arch: Annotated[str | None, typer.Option(help="Choice indices separated by blanks, or a reference name.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="latency_ms (default), energy_mj, peak_memory_bytes, training_memory_bytes, file_bytes, params or "
            "macs; may be repeated."
        ),
    ] = None,
    predictor: Annotated[
        str,
        typer.Option(
            help="auto, roofline, scale, operator_model, few_shot:FILE, table:FILE\\[@COLUMN], or module:Class."
        ),
    ] = "auto",
) -> None:
    """Predict costs of one network on a target, with 90 % intervals and what they rest on."""
    from hardware_profiles import load_target
    from nasbench.devices import unsupported_operators
    from nasbench.networks import named_networks
    from predictors.choice import choose_predictor
    from predictors.counts import Count
    from predictors.training_memory import TrainingMemoryCount

    device = load_target(target)
    if space and network and not arch and ":" not in network and not network.endswith(".onnx"):
        network, arch = None, network
    named = named_networks([network] if network else [], space, [arch] if arch else [])
    if len(named) != 1:
        raise UserError("name one network, or --space with one architecture")
    (chosen,) = named
    workload = chosen.workload
    choices = [
        (m, choose_predictor(device, m, predictor=predictor, space=chosen.space)) for m in metric or ["latency_ms"]
    ]
    warnings: dict[str, None] = {}
    for name, choice in choices:
        bound = choice.tied and chosen.space is not None
        estimate = chosen.estimate(choice.predictor) if bound else choice.predictor.predict([workload])
        low, high = float(estimate.quantile(0.05)[0]), float(estimate.quantile(0.95)[0])
        unit = _UNITS.get(name, "")
        value = float(estimate.mean[0])
        if isinstance(choice.predictor, Count | TrainingMemoryCount):
            said = f"{value:,.0f}{unit}, {choice.basis}"
        else:
            interval = f" (90 % interval {low:.4g} to {high:.4g})" if high > low else ""
            said = f"{value:.4g}{unit}{interval}, predicted: {choice.basis}"
        print(f"{name} of {chosen.name} on {device.name}: {said}")
        for warning in filter(None, estimate.warning.split("; ")):
            about = "" if warning.startswith(device.name) else f"{name} on {device.name}: "
            warnings[about + warning] = None
    for kind, times, reason, then in unsupported_operators(device, [workload]):
        warnings[f"{times} x {kind} on {device.name}: {reason}; {then}"] = None
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


_UNITS = {
    "latency_ms": " ms",
    "energy_mj": " mJ",
    "peak_memory_bytes": " bytes",
    "training_memory_bytes": " bytes",
    "file_bytes": " bytes",
}


def _components(family: str) -> None:
    import inspect

    from nasbench.registry import REGISTRY, defaults, resolve

    rows = []
    for name in sorted(REGISTRY[family]):
        component = resolve(family, name)
        keys = [key if value is ... else f"{key} = {value!r}" for key, value in defaults(component).items()]
        rows.append((name, (inspect.getdoc(component) or "").split("\n")[0], ", ".join(keys)))
    table((family, "what it is", "keys"), rows)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


# What a command that fails leaves to go on from.
_KEPT = {
    "run": "; what was finished is kept, see nasbench run --resume",
    "compress": "; what was finished is kept, see nasbench run --resume",
    "compare": "; finished searches are kept, and the same command goes on from there",
}


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
        print(f"error: {where}{reason}{_KEPT.get(''.join(sys.argv[1:2]), '')}", file=sys.stderr)
        raise SystemExit(2) from None
