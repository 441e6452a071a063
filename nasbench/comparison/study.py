"""A comparison of strategies: every search from every seed, kept one by one, so that a killed one goes on."""

from __future__ import annotations

import hashlib
import inspect
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardware_profiles.paths import write_text
from nasbench.comparison.problems import Problem, make_problem
from nasbench.comparison.result import Comparison
from nasbench.comparison.settings import Settings, dump_settings, load_settings
from nasbench.comparison.trial import Trial, run_trial
from nasbench.progress import Reporter
from nasbench.registry import options, resolve
from nasbench.run import load_state, save_state
from nasbench.strategies.base import Strategy
from nasbench.strategies.fit import undemanding, undemanding_strategies
from search_spaces import UserError

TRIALS = "trials"


@dataclass(frozen=True)
class Contender:
    """A strategy of a comparison: its class, its keys completed, and how many it is asked for at a time."""

    name: str
    kind: type[Strategy]
    options: dict[str, Any]
    batch: int

    @property
    def fingerprint(self) -> str:
        """What its proposals depend on, as a hash: class, keys, batch; the code too where it is the user's own."""
        parts = [f"{self.kind.__module__}:{self.kind.__qualname__}", repr(sorted(self.options.items())), self.batch]
        if not self.kind.__module__.startswith("nasbench."):
            parts.append(Path(inspect.getfile(self.kind)).read_text(encoding="utf-8"))
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Cell:
    """One search: of a strategy, on a problem, from a seed; `file` holds its result."""

    problem: str
    strategy: str
    seed: int
    file: Path


@dataclass(frozen=True)
class Study:
    """A comparison that was checked and can be run."""

    settings: Settings
    problems: dict[str, Problem]
    contenders: dict[str, Contender]

    def cells(self, path: Path) -> list[Cell]:
        """All searches, with the files of their results in a directory.

        A file's name tells what the result depends on. So a changed comparison finds what still holds, and runs what
        does not.
        """
        found = []
        for p, problem in self.problems.items():
            for c, contender in self.contenders.items():
                parts = (problem.fingerprint, contender.fingerprint, self.settings.evaluations)
                digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
                for seed in self.settings.seed_list:
                    found.append(Cell(p, c, seed, path / TRIALS / p / f"{c}-{seed}-{digest}.npz"))
        return found

    def run(self, cell: Cell) -> None:
        """Do one search and keep its result, whole or not at all.

        Raises:
            UserError: the strategy or the evaluator raises; says which, on what.
        """
        problem, contender = self.problems[cell.problem], self.contenders[cell.strategy]
        try:
            strategy = contender.kind(problem.space, cell.seed, **contender.options)
            trial = run_trial(
                strategy,
                problem.evaluator,
                problem.objectives,
                evaluations=self.settings.evaluations,
                batch=contender.batch,
            )
        except Exception as error:  # whatever a user's own strategy may raise
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            raise UserError(
                f"strategy {cell.strategy!r} on problem {cell.problem!r} from seed {cell.seed}: {kind}{error}"
            ) from error
        save_state(cell.file, vars(trial))


def make_study(settings: Settings, where: Path | None = None) -> Study:
    """Build and check everything that a comparison names, before anything runs.

    Raises:
        UserError: an unknown name or key, a wrong value, or a strategy that cannot be compared.
    """
    problems = {name: make_problem(name, settings.sections_of(name), where) for name in settings.problems}
    contenders = {}
    for name, section in settings.strategies.items():
        kind = resolve("strategy", section.name or name, where)
        if not undemanding(kind):
            raise UserError(
                f"strategies.{name}: {section.name or name!r} does not propose architectures to be evaluated in full, "
                f"so it cannot be counted in evaluations; these can: {undemanding_strategies()}"
            )
        complete = options(kind, section.options, f"strategies.{name}")
        contenders[name] = Contender(name, kind, complete, section.batch or settings.batch)
        for problem in problems.values():
            try:
                kind(problem.space, settings.seed_list[0], **complete).check(problem.objectives)
            except UserError as error:
                raise UserError(f"strategies.{name} on problem {problem.name!r}: {error}") from error
    return Study(settings, problems, contenders)


def compare(
    source: str | Path | Settings | None = None,
    *,
    output: str | Path | None = None,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    report: Reporter | None = None,
) -> Comparison:
    """Compare strategies over problems and seeds; what an earlier call finished is kept.

    Args:
        source: a TOML file (see `nasbench.comparison.settings.Settings`); None for the default comparison, on a small
            table that ships with the package.
        output: the directory of the results, by default `runs/compare-NAME`.
        jobs: worker processes. The results are the same with any number.
        overrides: `key=value`, as of `--set`.
        report: where progress is told; silent by default.

    Returns:
        Curves, statistics and figures; `report.html` is in its `path`.

    Raises:
        UserError: anything the user can mend; what was finished stays.

    Example:
        >>> result = nb.compare()
        >>> result.summary
        >>> result.plot_hypervolume()
    """
    report = report or Reporter(quiet=True)
    if jobs < 1:
        raise UserError(f"jobs = {jobs}: expected 1 or more")
    where = None if source is None or isinstance(source, Settings) else Path(source).resolve().parent
    settings = source if isinstance(source, Settings) else load_settings(Path(source) if source else None, overrides)
    path = Path(output) if output else Path("runs") / f"compare-{settings.name}"
    if path.exists() and not (path.is_dir() and ((path / FILE).is_file() or not any(path.iterdir()))):
        raise UserError(f"{path}: is there and is no comparison; name another directory with --output")
    study = make_study(settings, where)
    write_text(path / FILE, dump_settings(settings))
    cells = study.cells(path)
    missing = [cell for cell in cells if not cell.file.is_file()]
    if missing:
        with report.phase("compare") as phase:
            progress = phase.progress("searches")
            for done, cell in enumerate(_run_all(study, missing, min(jobs, len(missing)), where), 1):
                progress(done, len(missing), f"{cell.strategy} on {cell.problem}")
            phase.done(f"{len(missing)} searches" + (f", {len(cells) - len(missing)} kept" if cells != missing else ""))
    trials = {(c.problem, c.strategy, c.seed): _load(c.file) for c in cells}
    with report.phase("statistics"):
        result = Comparison(path, settings, study.problems, trials)
        result.write()
    return result


FILE = "compare.toml"


def _load(file: Path) -> Trial:
    state = load_state(file)
    try:
        return Trial(**state)
    except TypeError as error:
        raise UserError(f"{file}: is no result of a search; delete it to repeat the search") from error


def _run_all(study: Study, cells: list[Cell], jobs: int, where: Path | None) -> Iterator[Cell]:
    if jobs == 1:
        for cell in cells:
            study.run(cell)
            yield cell
        return
    executor = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_start, initargs=(study.settings, where)
    )
    try:
        futures = {executor.submit(_run_one, cell): cell for cell in cells}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died (killed, or out of memory?); what was finished is kept: run the comparison again, "
            "perhaps with fewer jobs"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


# The study of a worker process.
_mine: list[Study] = []


def _start(settings: Settings, where: Path | None) -> None:
    import torch

    torch.set_num_threads(1)  # as many processes as asked for, not more
    _mine[:] = [make_study(settings, where)]


def _run_one(cell: Cell) -> None:
    _mine[0].run(cell)
