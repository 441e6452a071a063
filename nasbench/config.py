"""The experiment file: TOML, validated, with the nearest right word for every wrong one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hardware_profiles.paths import read_toml
from nasbench.keys import Keys
from search_spaces.errors import UserError, nearest

_LETTERS = "letters (a to z, A to Z), digits, '_', '-' and '.' only"
_LISTED = ("stages", "evaluator.also")  # sections in double brackets


class Section(Keys):
    """A section whose keys are all known here."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class Component(Keys):
    """A section that names a component; its further keys are the component's own (see `nasbench.registry.options`)."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The component's own keys as given."""
        return dict(self.__pydantic_extra__ or {})


class TaskSection(Component):
    """`[task]`: what the networks are to learn."""

    name: str = "fashion_mnist"


class SpaceSection(Component):
    """`[space]`: a preset, a TOML file of a space, a family with its keys, or `module:Class`."""

    name: str = "quickstart"


class EvaluatorSection(Component):
    """`[evaluator]`: what gives an architecture its accuracy, and how often it is asked.

    Keys:
        name: see `nasbench evaluators`; or `module:function` of your own.
        also: further evaluators, `[[evaluator.also]]` with a name and keys each, for further objectives.
        cache: a file that keeps what was evaluated, for other strategies and runs; they may use it at the same time.
        samples: architectures it evaluates to train an accuracy predictor, which then guides the search;
            0 evaluates every architecture that the strategy proposes.
        verify: networks of the predicted front that it evaluates (and that are measured) after the search.
    """

    name: str = "supernet"
    also: list[Component] = Field(default_factory=list)
    cache: str | None = None
    samples: int = Field(default=100, ge=0)
    verify: int = Field(default=24, ge=1)


class TargetsSection(Section):
    """`[targets]`: devices, as `device` or `device:operating-point`.

    Keys:
        devices: the first is the default of objectives that need a target.
        calibration_networks: whole networks measured to calibrate a latency model of a device that is here.
        calibration: per target a calibration file to use as it is, instead of measuring.
        predictors: per target what predicts its latency and energy: `auto` (by what data exist), `roofline`, `scale`,
            `operator_model`, `few_shot:FILE`, `table:FILE[@COLUMN]`, or `module:Class` of your own.
        meters: per target that is elsewhere how its networks are measured: `adb[:SERIAL]`, `ssh:HOST`, a TOML file with
            a `[meter]` section, `replay:FILE` of recorded measurements, or `module:Class` of your own.
        fallback: networks with operators that a device leaves to the CPU of its host are never proposed where there
            are others (`avoid`), proposed like any other (`allow`), or never proposed at all (`refuse`).
    """

    devices: list[str] = Field(default_factory=lambda: ["host"], min_length=1)
    calibration_networks: int = Field(default=32, ge=8)
    calibration: dict[str, str] = Field(default_factory=dict)
    predictors: dict[str, str] = Field(default_factory=dict)
    meters: dict[str, str] = Field(default_factory=dict)
    fallback: Literal["avoid", "allow", "refuse"] = "avoid"


class ObjectiveSection(Section):
    """`[objectives.NAME]`: one axis of the front; NAME is a metric, or `metric@target`, or free with `metric` given.

    Keys:
        metric, target, direction: what is meant, where NAME does not say it. A metric may be a function of the user's
            own, `"module:function"` of architectures `(n, K)` and the space, with a direction; the target may be
            `"each"`: an objective `NAME@device` for every device.
        batch: samples at a time, of `training_memory_bytes`.
        method: what trains, of `training_memory_bytes`: `full`, as plain autograd does it, or `bias`, as
            `nasbench.ondevice` does.
        limit: hard limit on the side that is worse; `at_least` and `at_most` may be given instead, or both.
        quantile: of a prediction, that must keep the limits; the mean where it is not given.
    """

    metric: str | None = None
    target: str | None = None
    direction: Literal["minimise", "maximise"] | None = None
    limit: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    batch: int | None = Field(default=None, ge=1)
    method: Literal["full", "bias"] | None = None
    quantile: float | None = Field(default=None, gt=0, lt=1)

    @field_validator("limit", "at_least", "at_most")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not abs(value) < float("inf"):
            raise ValueError("a limit must be a finite number")
        return value


class VerifySection(Section):
    """`[verify]`: what follows where the measured front is not as it was predicted.

    Keys:
        tolerance: mean relative difference of predicted and measured values on the front that is good enough.
        rounds: most times that predictors are corrected by the measurements and the search goes on, as long as the
            difference is larger or a network of the front breaks a limit; 0 measures once.
        quantile: of corrected predictions that must keep a limit, where its objective sets none; of "at least" limits
            the opposite one.
    """

    tolerance: float = Field(default=0.1, gt=0)
    rounds: int = Field(default=2, ge=0)
    quantile: float = Field(default=0.9, ge=0.5, lt=1)


class StrategySection(Component):
    """`[strategy]`: how the space is searched.

    Keys:
        name: see `nasbench strategies`; `docs/strategies.md` says which is good for what.
        evaluations: architectures to propose.
        batch: architectures asked at a time; the default is 1,000 for predicted and 16 for evaluated ones.
        seed_references: propose the space's reference architectures first.
    """

    name: str = "bayesian"
    evaluations: int = Field(default=20_000, ge=1)
    batch: int | None = Field(default=None, ge=1)
    seed_references: bool = True


class ExecutionSection(Section):
    """`[execution]`: where evaluations run, and what is done about those that fail (see docs/scale_out.md).

    Keys:
        backend: `in_process`, `processes` of this machine, or a `ray` cluster (extra `ray`).
        workers: evaluations at a time; 0 for one per processor, of this machine or of the cluster.
        retries: how often a failed evaluation is repeated before its row says so. One whose worker died is repeated
            in any case.
        timeout_s: an evaluation that takes longer has failed, and its worker is stopped.
        address: of a Ray cluster, `auto` or `HOST:PORT`; without, Ray is started here, for this run.
        asynchronous: tell the strategy of every result at once, instead of whole batches in the order asked. Workers
            never wait for each other, but the archive depends on which was first.
    """

    backend: Literal["in_process", "processes", "ray"] = "in_process"
    workers: int = Field(default=0, ge=0)
    retries: int = Field(default=0, ge=0)
    timeout_s: float | None = Field(default=None, gt=0)
    address: str = ""
    asynchronous: bool = False

    @model_validator(mode="after")
    def _fitting(self) -> ExecutionSection:
        if self.backend == "in_process":
            for key in ("timeout_s", "asynchronous"):
                if getattr(self, key):
                    raise ValueError(f'{key} needs workers: backend = "processes" or "ray"')
            if self.workers > 1:
                raise ValueError(f'workers = {self.workers} needs backend = "processes" or "ray"')
        if self.address and self.backend != "ray":
            raise ValueError('address goes with backend = "ray"')
        return self


class SelectionSection(Section):
    """`[selection]`: which networks of the verified front go through the stages.

    Keys:
        rule: `knee` (the knee and its neighbours), `spread` (evenly along the front), `best` (best by `objective`
            among those within all limits), `named` (those in `networks`).
        count: how many.
        objective: for `best`; the first objective by default.
        networks: for `named`: reference names, or architectures as `{knob = choice}` tables.
    """

    rule: Literal["knee", "spread", "best", "named"] = "spread"
    count: int = Field(default=3, ge=1)
    objective: str | None = None
    networks: list[str | dict[str, int | float | str]] = Field(default_factory=list)


class StageSection(Component):
    """`[[stages]]`: a post-search step; its other keys are its own (see `nasbench stages`).

    Keys:
        stop_if_accuracy_falls: where the validation accuracy after this stage is more than this below the best that the
            network had before, the network goes back to its latest form within that, and no later stage is run on it.
    """

    stop_if_accuracy_falls: float | None = Field(default=None, ge=0, lt=1)


class NetworkSection(Section):
    """`[networks.NAME]`: a network that goes through the stages as it is; with any, nothing is searched.

    Keys:
        source: a reference network (`resnet18@28`), `SPACE:ARCHITECTURE`, `module:function` of your own that returns a
            torch module, or an ONNX file.
        weights: safetensors to start from; without, a network of your own is taken to have its weights, others are new.
    """

    source: str
    weights: str | None = None


class SupernetSection(Keys):
    """`[supernet]`: training of the weight-sharing network; keys are those of `nasbench.training.train_supernet`.

    Keys:
        checkpoint: a supernet that this project trained, to start from; with `epochs = 0` it is used as it is.
        weights: published weights to start from instead, safetensors; see `search_spaces.load_weights`.
        keep: modules that do not take part in them, as `["head.classifier"]` for other classes than the published ones.
        tensorboard: write TensorBoard's event files to the run's directory `tensorboard`.
    """

    model_config = ConfigDict(extra="allow")
    checkpoint: str | None = None
    weights: str | None = None
    keep: list[str] = Field(default_factory=list)
    tensorboard: bool = False

    @model_validator(mode="after")
    def _one_start(self) -> SupernetSection:
        if self.checkpoint and self.weights:
            raise ValueError("give either checkpoint or weights to start from")
        if self.keep and not self.weights:
            raise ValueError("keep goes with weights")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The training keys as given."""
        return dict(self.__pydantic_extra__ or {})


class Config(Section):
    """A whole experiment. Every section and key has a default."""

    name: str = Field(default="experiment", pattern=r"^[A-Za-z0-9_.-]+$")
    seed: int = Field(default=0, ge=0)
    threads: int = Field(default=0, ge=0, description="threads for training; 0: all cores")
    task: TaskSection = Field(default_factory=TaskSection)
    space: SpaceSection = Field(default_factory=SpaceSection)
    supernet: SupernetSection = Field(default_factory=SupernetSection)
    evaluator: EvaluatorSection = Field(default_factory=EvaluatorSection)
    targets: TargetsSection = Field(default_factory=TargetsSection)
    objectives: dict[str, ObjectiveSection] = Field(
        default_factory=lambda: {"accuracy": ObjectiveSection(), "latency_ms": ObjectiveSection()}, min_length=1
    )
    strategy: StrategySection = Field(default_factory=StrategySection)
    verify: VerifySection = Field(default_factory=VerifySection)
    execution: ExecutionSection = Field(default_factory=ExecutionSection)
    selection: SelectionSection = Field(default_factory=SelectionSection)
    stages: list[StageSection] = Field(default_factory=list)
    networks: dict[str, NetworkSection] = Field(default_factory=dict)
    _file: Path | None = None

    @property
    def file(self) -> Path | None:
        """That it was read from, which errors found later name."""
        return self._file

    def __eq__(self, other: object) -> bool:  # wherever it was read from
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    @field_validator("networks")
    @classmethod
    def _named(cls, value: dict[str, NetworkSection]) -> dict[str, NetworkSection]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or set(name) == {"."}:
                raise ValueError(f"the name {name!r} is part of file names: {_LETTERS}")
        return value


def find_experiment(name: str) -> Path:
    """The experiment file called `name`: a path, or the name of a shipped experiment.

    Raises:
        UserError: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.name.removesuffix(".toml"): p for p in resources.files("nasbench").joinpath("experiments").iterdir()}
    if name in shipped:
        return Path(str(shipped[name]))
    raise UserError(f"no experiment file {name!r}. Shipped experiments: {nearest(name, shipped)}")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and validate an experiment file.

    Args:
        overrides: `section.key=value` with a TOML value, as of `--set`; a value that is no TOML is taken as a string.

    Raises:
        UserError: unreadable file, TOML syntax, unknown key or wrong value, naming file and key.
    """
    data = read_toml(path)
    for override in overrides:
        apply_override(data, override)
    config = parse_config(data, str(path))
    config._file = Path(path)
    return config


def parse_config(data: dict[str, Any], where: str = "config") -> Config:
    """A validated configuration from plain data.

    Raises:
        UserError: unknown key (with the nearest known one) or wrong value; `where` names the source.
    """
    if "strategies" in data and "problems" in data:
        raise UserError(f"{where}: compares strategies, and is no single experiment: start it with nasbench compare")
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error)}") from error


def with_networks(config: Config, given: Sequence[str], weights: str | None = None) -> Config:
    """The configuration for networks that are named on the command line, as `NETWORK` or `NAME=NETWORK`.

    Raises:
        UserError: two of one name, weights for more than one, or no stages.
    """
    if not config.stages:
        raise UserError("the file has no [[stages]]: there is nothing to do with the network")
    if weights and len(given) > 1:
        raise UserError(f"weights are of one network, and {len(given)} are named; use [networks.NAME] in the file")
    networks: dict[str, NetworkSection] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals:
            source = text
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(text).stem if text.endswith(".onnx") else text)
        if name in networks:
            raise UserError(f"two networks are called {name!r}; name them with NAME=NETWORK")
        networks[name] = NetworkSection(source=source, weights=weights)
    return config.model_copy(update={"networks": networks})


def dump_config(config: Config) -> str:
    """The configuration as TOML, all defaults written out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one value of plain data in place, as `--set section.key=value` says.

    Raises:
        UserError: it is written otherwise, or leads through a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override!r}: expected section.key=value, as in objectives.latency_ms.limit=2.5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    # As in TOML, a part with a dot is quoted.
    parts = [part.strip("\"'") for part in re.findall(r"\"[^\"]*\"|'[^']*'|[^.]+", key.strip())]
    if parts[0] == "objectives" and "objectives" not in data:
        data["objectives"] = {"accuracy": {}, "latency_ms": {}}  # the default, which is changed and not replaced
    here: Any = data
    for index, part in enumerate(parts):
        if isinstance(here, list) and not (part.isdigit() and int(part) < len(here)):
            raise UserError(f"--set {override!r}: {part!r} is not an index into {len(here)} entries")
        if not isinstance(here, list | dict):
            raise UserError(f"--set {override!r}: {'.'.join(parts[:index])} is a value, not a section")
        place: Any = int(part) if isinstance(here, list) else part
        if index == len(parts) - 1:
            here[place] = value
        else:
            here = here[place] if isinstance(here, list) else here.setdefault(place, {})


def _shape(place: tuple[int | str, ...], given: Any) -> str:
    """The TOML that a section, or a list, is written in where something else was given."""
    names = [part for part in place if isinstance(part, str)]
    key = ".".join(names)
    if key in _LISTED:
        return f"a section for each, [[{key}]]"
    if key in ("objectives", "networks"):
        first = given[0] if isinstance(given, list) and given else "NAME"
        return f"a section for each, [{key}.{first}]"
    return f"a section, [{key}]"


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        model: Any = Config
        for part in first["loc"][:-1]:
            if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
                model = model.model_fields[str(part)].annotation
            else:
                model = getattr(model, "__args__", (model,))[-1]
        known = list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
        return f"unknown key {key!r}. {nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "literal_error":
        known = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{key} = {first['input']!r}. {nearest(str(first['input']), known)}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    if first["type"] in ("model_type", "dict_type") or (first["type"] == "list_type" and key in _LISTED):
        return f"{key} = {first['input']!r}: expected {_shape(first['loc'], first['input'])}"
    if first["type"] == "list_type":
        return f"{key} = {first['input']!r}: expected a list, as [{first['input']!r}]"
    if first["type"] == "string_pattern_mismatch":  # of the experiment's name
        return f"{key} = {first['input']!r}: {_LETTERS}, as it is part of file names"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key} = {first['input']!r}: {message[0].lower()}{message[1:]}"
