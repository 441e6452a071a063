"""Components by name: the built-in ones, and the user's own as `"module:Class"`.

A component's keyword-only constructor parameters are the keys that its configuration section may hold; positional ones
come from the runner. So the signature is the schema, for a built-in and for a user's class alike.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from nasbench.keys import Keys
from search_spaces.errors import UserError, explain, nearest

# One line per component. Importing this module imports none of them.
REGISTRY: dict[str, dict[str, str]] = {
    "task": {
        "fashion_mnist": "nasbench.tasks.fashion_mnist:FashionMNIST",
        "folder": "nasbench.tasks.arrays:ImageFolder",
        "none": "nasbench.tasks.none:NoTask",
        "npz": "nasbench.tasks.arrays:NpzArrays",
        "smartwatch": "nasbench.tasks.smartwatch:SmartwatchExercises",
    },
    "space": {
        "elastic": "search_spaces:elastic_space",
        "joint": "nasbench.joint:JointSpace",
        "mobilenet_v3": "search_spaces:MobileNetV3Space",
    },
    "evaluator": {
        "supernet": "nasbench.evaluators.supernet:SupernetEvaluator",
        "supernet_int8": "nasbench.evaluators.supernet_int8:QuantisedSupernetEvaluator",
        "joint": "nasbench.evaluators.joint:JointEvaluator",
        "table": "nasbench.evaluators.table:TableEvaluator",
        "command": "nasbench.evaluators.command:CommandEvaluator",
        "measure": "nasbench.evaluators.measured:MeasureEvaluator",
        "train": "nasbench.evaluators.trained:TrainEvaluator",
        "zero_cost": "nasbench.evaluators.zero_cost:ZeroCostEvaluator",
    },
    "strategy": {
        "bayesian": "nasbench.strategies.bayesian:BayesianOptimization",
        "random": "nasbench.strategies.random_search:RandomSearch",
        "regularized_evolution": "nasbench.strategies.regularized_evolution:RegularizedEvolution",
        "nsga2": "nasbench.strategies.nsga2:NSGA2",
        "nsga3": "nasbench.strategies.nsga3:NSGA3",
        "local_search": "nasbench.strategies.local_search:LocalSearch",
        "reinforce": "nasbench.strategies.reinforce:Reinforce",
        "ppo": "nasbench.strategies.ppo:PPO",
        "successive_halving": "nasbench.strategies.successive_halving:SuccessiveHalving",
        "optuna": "nasbench.strategies.optuna_strategy:OptunaStrategy",
        "darts": "nasbench.strategies.darts:DARTS",
        "fbnet": "nasbench.strategies.gumbel:FBNet",
        "gdas": "nasbench.strategies.gumbel:GDAS",
        "gumbel": "nasbench.strategies.gumbel:GumbelSearch",
        "lightnas": "nasbench.strategies.lightnas:LightNAS",
        "predictor_gradient": "nasbench.strategies.predictor_gradient:PredictorGradient",
        "proxylessnas": "nasbench.strategies.proxylessnas:ProxylessNAS",
    },
    "stage": {
        "adapt": "nasbench.stages.adapt:Adapt",
        "finetune": "nasbench.stages.finetune:FineTune",
        "distill": "nasbench.stages.distill:Distill",
        "quantize": "nasbench.stages.quantize:Quantize",
        "mixed_precision": "nasbench.stages.mixed_precision:MixedPrecision",
        "quantization_aware": "nasbench.stages.quantization_aware:QuantizationAware",
        "weight_only": "nasbench.stages.weight_only:WeightOnly",
        "export": "nasbench.stages.export:Export",
        "prune": "nasbench.stages.prune:Prune",
        "prune_blocks": "nasbench.stages.prune_blocks:PruneBlocks",
        "prune_weights": "nasbench.stages.prune_weights:PruneWeights",
    },
}


def _load(path: str, what: str) -> type[Any]:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module may raise
        raise UserError(f"{what}: cannot import {path!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{what}: {path!r} is a {type(found).__name__}; a class or function was expected")
    return found


def resolve(family: str, name: str, where: Path | None = None) -> type[Any]:
    """The class (or function) called `name` in `family`, built in or `"module:Class"`.

    Args:
        where: a directory that user modules may lie in, beside the current one.

    Raises:
        UserError: unknown name, or a module that cannot be imported.
    """
    known = REGISTRY.get(family, {})
    if name in known:
        return _load(known[name], f"{family} {name!r}")
    if ":" not in name:
        there = f"{nearest(name, known)} Your own:" if known else "Expected one of your own:"
        raise UserError(f'{family}: unknown name {name!r}. {there} "module:Class".')
    top = name.partition(":")[0].partition(".")[0]
    for directory in ([where] if where else []) + [Path.cwd()]:
        files = [f for f in (directory / f"{top}.py", directory / top / "__init__.py") if f.is_file()]
        if files:
            sys.path[:] = [str(directory), *(p for p in sys.path if p != str(directory))]
            loaded = sys.modules.get(top)
            if loaded is not None and Path(loaded.__file__ or "") != files[0]:
                # Another experiment's module of the same name.
                for module in [m for m in sys.modules if m == top or m.startswith(f"{top}.")]:
                    del sys.modules[module]
            break
    return _load(name, family)


class _Options(Keys):
    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True, strict=False)


def options(component: Any, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`given` validated and completed with defaults against the keyword-only parameters of `component`.

    Raises:
        UserError: unknown key (with the nearest known), missing key, or a wrong value; `where` names the section.
    """
    fields: dict[str, Any] = {}
    for name, (parameter, function) in _keys(component).items():
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (_hint(parameter.annotation, function, f"{where}: key {name!r}"), default)
    rest = inspect.signature(_constructors(component)[-1]).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in rest)
    unknown = [] if takes_any else [key for key in given if key not in fields]
    if unknown:
        raise UserError(
            f"{where}: unknown key {unknown[0]!r}. {nearest(unknown[0], fields) if fields else 'It takes none.'}"
        )
    model = create_model("Options", __base__=_Options, **fields)
    try:
        parsed = model(**given)
    except ValidationError as error:
        raise UserError(explain(error, where)) from error
    return {name: getattr(parsed, name) for name in [*fields, *(k for k in given if k not in fields)]}


def defaults(component: Any) -> dict[str, Any]:
    """The keys of a component, its own before those of its base classes, with defaults; `...` where there is none."""
    return {
        name: ... if parameter.default is inspect.Parameter.empty else parameter.default
        for name, (parameter, _) in _keys(component).items()
    }


def _keys(component: Any) -> dict[str, tuple[inspect.Parameter, Any]]:
    """The parameters that are keys, and the function that each is of."""
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for function in _constructors(component):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                found.setdefault(name, (parameter, function))
    return found


def _constructors(component: Any) -> list[Any]:
    """What takes a component's keys: its constructor, and where that passes typed `Unpack[...]` on, its base class's.

    Where no base class has one, it is that of the class's attribute `options_of`, such as a dataclass.
    """
    if not inspect.isclass(component):
        return [component]
    found = []
    for kind in (*component.__mro__, getattr(component, "options_of", object)):
        if kind is object or "__init__" not in vars(kind):
            continue
        function = vars(kind)["__init__"]
        found.append(function)
        rest = [p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        if not rest or "Unpack[" not in str(rest[0].annotation):
            break
    return found or [component]


def _hint(annotation: Any, function: Any, where: str) -> Any:
    """A parameter's type; only keys of the configuration are looked at, so the others may name what is not imported."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, function.__globals__)  # the component's own source, which has just been imported
    except Exception as error:
        raise UserError(f"{where}: its type {annotation!r} cannot be resolved: {error}") from error
