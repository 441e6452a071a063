"""Any Optuna sampler as a strategy."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from hardware_profiles.extras import require
from nasbench.evaluators.base import Proposals
from nasbench.strategies.base import Strategy
from search_spaces import SearchSpace, UserError, nearest
from search_spaces.base import TRIES, Archs

if TYPE_CHECKING:
    from nasbench.objectives import Objective

_STUDY = "nasbench"
_VIOLATIONS = "violations"
# Samplers that know no parameters but those that every trial has.
_FLAT = ("CmaEsSampler", "GPSampler")
_WAITS = (0.5, 2.0, 5.0)  # seconds before a storage that failed is tried again


def _ascending(choices: tuple[Any, ...]) -> bool:
    """Whether choices are numbers in ascending order, more than one."""
    return len(choices) > 1 and all(isinstance(c, int | float) for c in choices) and list(choices) == sorted(choices)


def _first_line(error: Exception) -> str:
    """What went wrong, without a full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".")


def _constraints(trial: FrozenTrial) -> list[float]:
    return trial.user_attrs.get(_VIOLATIONS, [])


class OptunaStrategy(Strategy):
    """Proposes with a sampler of Optuna (Akiba et al., KDD 2019), through its own ask and tell.

    Made for expensive evaluations: Optuna handles one trial at a time, some hundred a second (GP: one in some seconds).
    Every knob is a categorical parameter, asked for only where it is active, so samplers see the space as the tree that
    it is. GP and CMA-ES know no trees: they are asked for every knob, and those that are not active count for nothing.
    CMA-ES, for one objective, knows no categories either: knobs whose choices are ascending numbers become indices, the
    others are drawn at random. Limits reach samplers that know constraints (TPE, NSGA-II, NSGA-III, GP). Failed rows
    become failed trials.

    The study lives in memory. With `storage` every told trial is also written there, once all proposed before it are
    told, for optuna-dashboard and the like; that takes 0.1 to 0.5 s a trial with SQLite. A storage that fails is tried
    three times more over some seconds, then the search stops; resumed, it goes on and writes what is missing. The
    sampler is made anew for every ask, its seed drawn from `seed` and the number of proposals so far, so that a
    restored strategy continues identically.

    Args:
        sampler: class name of a sampler in `optuna.samplers` that takes categorical parameters.
        sampler_options: its constructor's arguments, such as `{"multivariate": true}`.
        storage: URL of a storage, such as `"sqlite:///study.db"`; empty for none.
        study_name: of the study in `storage`.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        initial: Archs | None = None,
        *,
        sampler: str = "TPESampler",
        sampler_options: dict[str, Any] | None = None,
        storage: str = "",
        study_name: str = "nasbench",
    ) -> None:
        super().__init__(space, seed, initial)
        known = [name for name in optuna.samplers.__all__ if name.endswith("Sampler") and name != "BaseSampler"]
        if sampler not in known:
            raise UserError(f"strategy.sampler: unknown sampler {sampler!r}. {nearest(sampler, known)}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._seed = seed
        self._sampler_name = sampler
        self._options = dict(sampler_options or {})
        self._choices = [
            tuple(knob.choices[int(c)] for c in space.menu.choices(index)) for index, knob in enumerate(space.knobs)
        ]
        self._flat = sampler in _FLAT
        by_index = [sampler == "CmaEsSampler" and _ascending(choices) for choices in self._choices]
        if sampler == "CmaEsSampler":
            if not any(by_index):
                raise UserError(
                    "strategy.sampler = 'CmaEsSampler' needs knobs whose choices are ascending numbers, and space "
                    f"{space.name!r} has none; TPESampler, NSGAIISampler and GPSampler take categories"
                )
            require("cmaes")
        self._distributions: dict[str, BaseDistribution] = {
            k.name: IntDistribution(0, len(choices) - 1) if indexed else CategoricalDistribution(choices)
            for k, choices, indexed in zip(space.knobs, self._choices, by_index, strict=True)
        }
        self._numbers: list[int] = []  # per proposal, its trial; trials that the space does not permit are no proposals
        self._study_name = study_name
        self._storage_url = storage
        self._mirror: optuna.Study | None = None
        self._written = 0
        self._rebuild(1, [], {})

    def check(self, objectives: Sequence[Objective]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                study = optuna.create_study(directions=["minimize"] * len(objectives), sampler=self._sampler())
                study.ask({"any": IntDistribution(0, 1)})
            except ValueError as error:
                raise UserError(
                    f"strategy.sampler = {self._sampler_name!r} cannot do this search: {_first_line(error)}; "
                    "TPESampler, NSGAIISampler, NSGAIIISampler and GPSampler take any number of objectives"
                ) from error
            try:
                if self._storage_url:
                    optuna.storages.get_storage(self._storage_url)
            except Exception as error:  # drivers and databases raise their own kinds
                raise UserError(
                    f"strategy.storage = {self._storage_url!r} cannot be used: {_first_line(error)}; expected a URL "
                    "such as 'sqlite:///study.db' that can be reached, and its driver installed"
                ) from error

    def _sampler(self) -> optuna.samplers.BaseSampler:
        kind = getattr(optuna.samplers, self._sampler_name)
        accepted = inspect.signature(kind).parameters
        options = dict(self._options)
        if "seed" in accepted:
            options["seed"] = int(np.random.SeedSequence([self._seed, self.next_id]).generate_state(1)[0])
        if "warn_independent_sampling" in accepted:
            options.setdefault("warn_independent_sampling", False)  # which knobs that concerns is documented above
        if "constraints_func" in accepted:
            options.setdefault("constraints_func", _constraints)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constraints are marked experimental
            try:
                return kind(**options)
            except (TypeError, ValueError) as error:
                raise UserError(f"strategy.sampler_options: {self._sampler_name}: {error}") from error

    def _rebuild(self, objectives: int, trials: list[FrozenTrial], attributes: Mapping[str, Any]) -> None:
        """A study of so many objectives that holds `trials`, under the numbers that they had."""
        self._memory = optuna.storages.InMemoryStorage()
        self._objectives = objectives
        self._study = optuna.create_study(
            storage=self._memory, study_name=_STUDY, directions=["minimize"] * objectives, sampler=self._sampler()
        )
        self._study.add_trials(trials)
        for name, value in attributes.items():
            self._memory.set_study_system_attr(self._study_id, name, value)

    @property
    def _study_id(self) -> int:
        return int(self._memory.get_study_id_from_name(_STUDY))

    def _attributes(self) -> dict[str, Any]:
        """What samplers have noted of the whole study."""
        own = self._memory.get_study_system_attrs(self._study_id)
        return {name: value for name, value in own.items() if not name.startswith("study:")}

    def ask(self, n: int) -> Proposals:
        self._study.sampler = self._sampler()
        given = [] if self.initial is None else list(self.initial[self.next_id : self.next_id + n])
        archs = np.zeros((n, len(self.space.knobs)), dtype=self.space.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in range(n):
                if row < len(given):
                    self._study.enqueue_trial(self._parameters(given[row]))
                try:
                    archs[row] = self._permitted()
                except ValueError as error:
                    raise UserError(
                        f"strategy.sampler = {self._sampler_name!r} cannot do this search: {error}"
                    ) from error
        return self._proposals(archs)

    def _permitted(self) -> Archs:
        """The next architecture `(K,)` that the space permits; trials with any other fail, and the sampler learns so.

        Raises:
            UserError: the sampler finds none.
        """
        for _ in range(TRIES):
            trial = self._study.ask()
            arch = self._suggested(trial)
            if self.space.permits(arch[None])[0]:
                self._numbers.append(trial.number)
                return arch
            self._study.tell(trial, state=TrialState.FAIL)
        raise UserError(
            f"strategy.sampler = {self._sampler_name!r}: none of {TRIES} suggestions in a row is an architecture "
            "that all targets run; choose another strategy or restrict the space"
        )

    def _suggested(self, trial: optuna.Trial) -> Archs:
        """The architecture that a trial suggests, `(K,)`: knobs in order, those first that are active already."""
        arch = np.zeros((1, len(self.space.knobs)), dtype=self.space.dtype)
        asked = np.zeros(len(self.space.knobs), dtype=bool)
        while True:
            open_knobs = np.flatnonzero((self._flat | self.space.active(arch)[0]) & ~asked)
            if not len(open_knobs):
                return self.space.canonical(arch)[0]
            index = int(open_knobs[0])
            knob, choices = self.space.knobs[index], self._choices[index]
            if isinstance(self._distributions[knob.name], IntDistribution):
                choice = choices[trial.suggest_int(knob.name, 0, len(choices) - 1)]
            else:
                choice = trial.suggest_categorical(knob.name, choices)
            arch[0, index] = knob.choices.index(choice)
            asked[index] = True

    def _parameters(self, arch: Archs) -> dict[str, Any]:
        """What a trial has to suggest to become an architecture `(K,)`."""
        chosen = dict(self.space.decode(arch))
        if self._flat:
            chosen = {
                k.name: chosen.get(k.name, choices[0])
                for k, choices in zip(self.space.knobs, self._choices, strict=True)
            }
        for knob, choices in zip(self.space.knobs, self._choices, strict=True):
            if knob.name in chosen and isinstance(self._distributions[knob.name], IntDistribution):
                chosen[knob.name] = choices.index(chosen[knob.name])
        return chosen

    def tell(
        self,
        proposals: Proposals,
        values: NDArray[np.float64],
        violations: NDArray[np.float64],
        status: NDArray[np.uint8],
    ) -> None:
        if values.shape[1] != self._objectives:
            # The number of objectives shows only here; a study has to know it from the start.
            self._rebuild(values.shape[1], self._study.trials, self._attributes())
        failed = (status != 0) | np.isnan(values).any(axis=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            numbers = [self._numbers[i] for i in proposals.ids.tolist()]
            for row, number in enumerate(numbers):
                if violations.shape[1]:
                    trial_id = self._memory.get_trial_id_from_study_id_trial_number(self._study_id, number)
                    # A finite number, since JSON and most samplers have no infinity.
                    self._memory.set_trial_user_attr(trial_id, _VIOLATIONS, np.minimum(violations[row], 1e9).tolist())
                if failed[row]:
                    self._study.tell(number, state=TrialState.FAIL)
                else:
                    self._study.tell(number, values[row].tolist())
        if self._storage_url:
            self._write()

    def _write(self) -> None:
        """Add proposals that are told to the named storage; those there from before an interruption are only compared.

        In the order in which they were proposed, up to the first that is not told yet: in a storage no trial can be
        put in between later, and a resumed asynchronous search proposes in this order what was recorded.

        Raises:
            UserError: the storage cannot be used, or its study holds another search.
        """
        where = f"strategy.storage: study {self._study_name!r} in {self._storage_url!r}"
        for wait in (*_WAITS, None):
            try:
                self._write_once(where)
                return
            except UserError:
                raise
            except Exception as error:  # drivers and databases raise their own kinds
                if wait is None:
                    raise UserError(
                        f"{where} cannot be written: {_first_line(error)}. Nothing is lost: with the storage back, "
                        "resume the run"
                    ) from error
                self._mirror = None  # connects again
                time.sleep(wait)

    def _write_once(self, where: str) -> None:
        if self._mirror is None:
            self._mirror = optuna.create_study(
                storage=self._storage_url, study_name=self._study_name, load_if_exists=True,
                directions=["minimize"] * self._objectives,
            )  # fmt: skip
        there = self._mirror.get_trials(deepcopy=False)
        trials = self._study.get_trials(deepcopy=False)
        for index in range(self._written, len(self._numbers)):
            trial = trials[self._numbers[index]]
            if not trial.state.is_finished():
                break
            if index >= len(there):
                self._mirror.add_trial(trial)
            elif there[index].params != trial.params:
                raise UserError(f"{where} holds another search; give another study_name")
            self._written = index + 1

    def state_dict(self) -> dict[str, Any]:
        trials = [
            {
                "state": trial.state.name,
                "params": trial.params,
                "values": trial.values,
                "user_attrs": trial.user_attrs,
                "system_attrs": trial.system_attrs,
            }
            for trial in self._study.trials
        ]
        own = {
            "objectives": self._objectives,
            "trials": trials,
            "numbers": list(self._numbers),
            "attributes": self._attributes(),
        }
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._numbers = [int(number) for number in state.get("numbers", range(self.next_id))]
        trials = [
            optuna.trial.create_trial(
                state=TrialState[trial["state"]],
                params=trial["params"],
                distributions={name: self._distributions[name] for name in trial["params"]},
                values=trial["values"],
                user_attrs=trial["user_attrs"],
                system_attrs=trial["system_attrs"],
            )
            for trial in state["trials"]
        ]
        self._rebuild(int(state["objectives"]), trials, state["attributes"])
