"""The contract of post-search stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from search_spaces.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from hardware_profiles.meter import Artifact
    from nasbench.tasks.base import Task
    from predictors import Predictor
    from search_spaces import SearchSpace
    from search_spaces.supernet import Supernet


class Form(Enum):
    """What a network is at a point of the pipeline."""

    FLOAT = "float module"
    FAKE_QUANT = "fake-quantised module"
    ARTIFACT = "runtime artifact"


@dataclass(frozen=True)
class Candidate:
    """A network on its way through the stages.

    Args:
        name: short name, unique in the run, such as `knee`.
        arch: the architecture `(K,)` that it was built from, or None for a network from elsewhere.
        form: which of the fields below holds the network.
        network: for the module forms.
        artifact: for `ARTIFACT`.
        metrics: as measured after the stage that produced it.
        notes: what the stage that produced it has to tell a person, such as layers that it left alone.
    """

    name: str
    arch: np.ndarray[Any, Any] | None
    form: Form
    network: nn.Module | None = None
    artifact: Artifact | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choose(target: str, metric: str) -> Predictor:
    """The predictor of a target's metric that the user's directory and the profile give."""
    from predictors import predictor_for

    return predictor_for(target, metric)


@dataclass(frozen=True)
class StageContext:
    """What a stage may use.

    Args:
        task: train and validation data.
        space: that was searched; of a network from elsewhere, of no meaning.
        directory: the network's own.
        seed: the network's own.
        supernet: of the run, for a teacher.
        input_shape: `(channels, height, width)` that the network takes.
        predictor: gives the predictor of a target's metric, from what the run knows of that target.
        fresh: builds the candidate's network anew, with other weights and in its first shape; None where nobody can.
    """

    task: Task
    space: SearchSpace
    directory: Path
    seed: int
    supernet: Supernet | None = None
    input_shape: tuple[int, int, int] = (0, 0, 0)
    predictor: Callable[[str, str], Predictor] = choose
    fresh: Callable[[], nn.Module] | None = None


class Stage(ABC):
    """One post-search step.

    It declares the forms it takes and the form it gives, so that an impossible order is refused before the first stage
    runs. `run` changes the network; the runner measures the result anew, whatever the stage believes of it.
    """

    accepts: frozenset[Form]
    produces: Form
    once: bool = False  # a second time would do nothing good, whatever form it gets

    @abstractmethod
    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate after this step; the given one stays as it is."""


def check_order(stages: Sequence[tuple[str, Stage]], first: Form = Form.FLOAT) -> None:
    """Refuse a pipeline in which a stage would get a form that it does not take.

    Raises:
        UserError: naming the stage, what it takes and what it would get.
    """
    form = first
    for index, (name, stage) in enumerate(stages):
        if stage.once and any(type(stage) is type(earlier) for _, earlier in stages[:index]):
            raise UserError(f"stages[{index}] ({name!r}) stands there a second time; it can be done once")
        if form not in stage.accepts:
            wanted = " or ".join(sorted(f.value for f in stage.accepts))
            raise UserError(
                f"stages[{index}] ({name!r}) takes a {wanted}, but the step before it gives a {form.value}; "
                "move it before the step that produces one"
            )
        form = stage.produces
