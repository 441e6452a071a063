"""Networks before the first stage: from the search, or from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware_profiles import Artifact
from nasbench.evaluators.base import Evaluator
from nasbench.plan import Plan
from nasbench.registry import resolve
from nasbench.stages.base import Form
from search_spaces import UserError, load_space, nearest, presets, read_onnx
from search_spaces.reference import reference_network, reference_networks

if TYPE_CHECKING:
    from torch import nn

    from nasbench.tasks.base import Task

Arch = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Start:
    """One network before the stages.

    Args:
        arch: of the searched space, `(K,)`; None for a network from elsewhere.
        fresh: builds it anew, in its first shape and with any weights; None for a file.
        take: gives it with the weights that it starts with.
        trained: whether these are worth an accuracy.
        artifact: instead of the functions, for a file.
    """

    arch: Arch | None = None
    fresh: Callable[[], nn.Module] | None = None
    take: Callable[[], nn.Module] | None = None
    trained: bool = False
    artifact: Artifact | None = None

    @property
    def form(self) -> Form:
        """What it starts as."""
        return Form.FLOAT if self.artifact is None else Form.ARTIFACT


def searched(plan: Plan, chosen: Mapping[str, Arch], source: Evaluator | None) -> dict[str, Start]:
    """Architectures of the plan's space.

    Args:
        source: the evaluator whose supernet gives them their weights; None for freshly initialised ones.
    """
    return {name: _searched(plan, arch, source, index) for index, (name, arch) in enumerate(chosen.items())}


def _searched(plan: Plan, arch: Arch, source: Evaluator | None, index: int) -> Start:
    def fresh() -> nn.Module:
        return plan.space.build(arch)

    def take() -> nn.Module:
        if source is not None and hasattr(source, "extract"):
            network: nn.Module = source.extract(arch)
            return network
        return _seeded(fresh, plan.config.seed + index)

    return Start(arch, fresh, take, trained=source is not None)


def _seeded(fresh: Callable[[], nn.Module], seed: int) -> nn.Module:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fresh()


def given_networks(plan: Plan, where: Path | None) -> dict[str, Start]:
    """The networks of the configuration's `[networks.NAME]`.

    Raises:
        UserError: one that there is not, that cannot be built or does not fit the task, or weights that do not fit it.
    """
    starts = {}
    for index, (name, section) in enumerate(plan.config.networks.items()):
        try:
            starts[name] = _given(section.source, section.weights, plan, where, plan.config.seed + index)
        except UserError as error:
            raise UserError(f"networks.{name}: {error}") from error
    return starts


def _given(source: str, weights: str | None, plan: Plan, where: Path | None, seed: int) -> Start:
    if source.endswith(".onnx"):
        if weights:
            raise UserError(f"{source}: an ONNX file has its own weights; leave out weights = {weights!r}")
        workload = read_onnx(Path(source))
        # A quantised file still takes and gives fp32; its tensors inside are int8.
        precision = "int8" if min(t.itemsize for t in workload.tensors) == 1 else "fp32"
        shape = workload.tensors[workload.inputs[0]].shape
        return Start(artifact=Artifact(Path(source), "onnx", precision, shape), trained=True)
    fresh = _builder(source, plan.task, where)
    made = _seeded(fresh, seed)
    if weights:
        _load(made, Path(weights))  # told now, not after the calibration

    def take() -> nn.Module:
        network = _seeded(fresh, seed)
        if weights:
            _load(network, Path(weights))
        return network

    own = ":" in source and source.partition(":")[0] not in presets() and not source.partition(":")[0].endswith(".toml")
    return Start(None, fresh, take, trained=bool(weights) or own)


def _builder(source: str, task: Task, where: Path | None) -> Callable[[], nn.Module]:
    """What builds the network of that name, for the task's channels and classes.

    Raises:
        UserError: no such network.
    """
    import torch

    from nasbench.networks import space_network

    channels, classes = task.input_shape[0], task.num_classes
    head, colon, rest = source.rpartition(":")
    if colon and (head in presets() or head.endswith(".toml")):
        space = load_space(head, channels, classes)
        row = np.array(space_network(space, rest, head).arch, dtype=space.dtype)
        return lambda: space.build(row)
    if colon:
        function = resolve("network", source, where)

        def build() -> nn.Module:
            try:
                network = function()
            except Exception as error:  # whatever a user's function may raise
                raise UserError(f"{source}: {type(error).__name__}: {error}") from error
            if not isinstance(network, torch.nn.Module):
                raise UserError(f"{source}: returned a {type(network).__name__}; a torch.nn.Module was expected")
            return network

        return build
    base, at, resolution = source.partition("@")
    if base not in reference_networks() or (at and not resolution.isdigit()):
        hint = nearest(base, reference_networks()).partition("Known:")[0]
        raise UserError(
            f"no network {source!r}. {hint}It may be a reference network (resnet18, mobilenet_v2@96), "
            'SPACE:ARCHITECTURE, "module:function" of your own, or FILE.onnx'
        )
    reference = reference_network(
        base, resolution=int(resolution) if at else None, in_channels=channels, num_classes=classes
    )

    def build_reference() -> nn.Module:
        network = reference.build()
        network.input_shape = reference.input_shape  # type: ignore[assignment]
        return network

    return build_reference


def _load(network: nn.Module, path: Path) -> None:
    """Put weights from a safetensors file into a network: of this project's training, or plain by name."""
    from safetensors import SafetensorError, safe_open

    from nasbench.training.checkpoint import FORMAT, load_weights

    if not path.is_file():
        raise UserError(f"{path}: no such file of weights")
    try:
        with safe_open(path, framework="pt") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    if ours:
        load_weights(network, path)
        return
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path}: of another network: {str(error).splitlines()[1].strip()[:200]}") from error
