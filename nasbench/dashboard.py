"""A run in optuna-dashboard: its archive as Optuna studies in memory, kept up to date while the run goes on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hardware_profiles.extras import load
from nasbench.archive import Archive, arch_row
from nasbench.evaluators.base import Status
from nasbench.objectives import Objective, violations
from nasbench.plan import make_plan
from nasbench.run import ARCHIVE, load_run_config, run_origin
from search_spaces import SearchSpace, UserError

if TYPE_CHECKING:
    import optuna

_REFRESH_S = 5.0
# Of a trial, as Optuna's own samplers write the limits that they know of; the dashboard shows who keeps them.
_CONSTRAINTS = "constraints"


class RunStudies:
    """Optuna studies of a run, in memory: one per phase of its archive, and one of the verified front.

    Architectures become trials: knobs are categorical parameters, objectives are values, failed evaluations are failed
    trials. `refresh` adds what the run has found since. The run's own files are only read.

    Args:
        path: the run directory.

    Raises:
        UserError: no run there.
    """

    def __init__(self, path: Path) -> None:
        import optuna

        self.path = path
        plan = make_plan(load_run_config(path), run_origin(path))
        self.space: SearchSpace = plan.space
        self.objectives: tuple[Objective, ...] = plan.objectives
        self.storage = optuna.storages.InMemoryStorage()
        self.studies: dict[str, optuna.Study] = {}
        self._shown: dict[str, set[int]] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    def refresh(self) -> int:
        """Add what is new in the run; how many trials that were."""
        with closing(Archive(self.path / ARCHIVE, readonly=True)) as archive:
            rows = archive.evaluations()
        added = sum(self._add(str(phase), part) for phase, part in rows.groupby("phase", sort=False))
        if (self.path / "front.csv").is_file():
            front = pd.read_csv(self.path / "front.csv")
            front = front.assign(id=range(len(front)), status=int(Status.OK), message="", seconds=0.0)
            added += self._add("front", front)
        return added

    def _add(self, name: str, rows: pd.DataFrame) -> int:
        shown = self._shown.setdefault(name, set())
        new = rows[~rows["id"].isin(shown)]
        if len(new):
            self._study(name).add_trials([self._trial(row) for _, row in new.iterrows()])
            shown.update(new["id"].tolist())
        return len(new)

    def _study(self, name: str) -> optuna.Study:
        import optuna

        if name not in self.studies:
            study = optuna.create_study(
                storage=self.storage,
                study_name=f"{self.path.resolve().name}: {name}",
                directions=["maximize" if o.maximise else "minimize" for o in self.objectives],
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # names are marked experimental
                study.set_metric_names([o.label for o in self.objectives])
            self.studies[name] = study
        return self.studies[name]

    def _trial(self, row: pd.Series) -> optuna.trial.FrozenTrial:
        import optuna

        params = self.space.decode(arch_row(row["arch"]).astype(self.space.dtype))
        knobs = {knob.name: knob for knob in self.space.knobs}
        values = np.array([row.get(o.name, np.nan) for o in self.objectives], dtype=float)
        good = row["status"] == Status.OK and bool(np.isfinite(values).all())
        notes = {"architecture": row["arch"], "id": int(row["id"])}
        notes |= {
            key: row[key] for key in ("name", "kind", "message", "fidelity") if row.get(key) not in (None, "", "{}")
        }
        broken = violations(values[None], self.objectives)[0].tolist()
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE if good else optuna.trial.TrialState.FAIL,
            values=values.tolist() if good else None,
            params=params,
            distributions={name: optuna.distributions.CategoricalDistribution(knobs[name].choices) for name in params},
            user_attrs=notes,
            system_attrs={_CONSTRAINTS: broken} if good and broken else {},
        )


@contextmanager
def serving(studies: RunStudies, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """optuna-dashboard on the studies of a run, for as long as the block lasts; gives its address.

    Args:
        port: 0 for one that is free.

    Raises:
        UserError: optuna-dashboard is not installed, or the port is taken.
    """
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    application = load("dashboard", "optuna_dashboard").wsgi(studies.storage)

    class Quiet(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Threaded(ThreadingMixIn, WSGIServer):
        daemon_threads = True

    try:
        server = make_server(host, port, application, Threaded, Quiet)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; leave it out for one that is free") from error
    stopped = threading.Event()

    def follow() -> None:
        while not stopped.wait(_REFRESH_S):
            studies.refresh()

    studies.refresh()
    threads = [threading.Thread(target=target, daemon=True) for target in (server.serve_forever, follow)]
    for thread in threads:
        thread.start()
    try:
        yield f"http://{host}:{server.server_port}/"
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
