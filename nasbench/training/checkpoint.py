"""Training state in one safetensors file: weights, optimiser state, and JSON in the header. Written atomically."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hardware_profiles.paths import atomic
from search_spaces.errors import UserError

FORMAT = "nasbench-training-1"
_MODEL, _AVERAGE, _OPTIMIZER = "model/", "ema/", "optimizer/"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors with JSON-able metadata: the file is complete or not there.

    Raises:
        UserError: the directory is read-only or full.
    """
    header = {"format": FORMAT, "json": json.dumps(metadata)}
    with atomic(path) as temporary:
        try:
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, header)
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be written: {error}") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that `save_tensors` wrote.

    Raises:
        UserError: missing, corrupt, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train first, or give the path of a trained one")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = json.loads(header.get("json", "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error}); delete it to train anew") from error
    if header.get("format") != FORMAT or not isinstance(metadata, dict):
        raise UserError(f"{path}: a safetensors file, but not a checkpoint of this project ({FORMAT})")
    return tensors, metadata


def save_weights(path: Path, model: nn.Module, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the weights of a network or supernet alone.

    Raises:
        UserError: the file cannot be written.
    """
    save_tensors(path, {_MODEL + name: t for name, t in model.state_dict().items()}, metadata or {})


def load_weights(model: nn.Module, path: Path) -> dict[str, Any]:
    """Put the weights of a checkpoint into `model`, averaged ones where it has them; returns the metadata.

    Raises:
        UserError: missing or corrupt file, or weights of another network.
    """
    tensors, metadata = load_tensors(path)
    averaged = any(name.startswith(_AVERAGE) for name in tensors)
    _put_weights(model.state_dict(), tensors, _AVERAGE if averaged else _MODEL, path)
    return metadata


def save_state(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    metadata: Mapping[str, Any],
    kept: Mapping[str, Tensor],
) -> None:
    """Write weights, the state of their optimisers, and further tensors by their names."""
    tensors = {**kept, **{_MODEL + name: t for name, t in model.state_dict().items()}}
    owners = _owners(optimizers)
    for name, parameter in model.named_parameters():
        for key, value in owners[parameter].state.get(parameter, {}).items() if parameter in owners else ():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{name}/{key}"] = value
    save_tensors(path, tensors, metadata)


def load_state(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    kept: Mapping[str, Tensor],
    check: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Restore what `save_state` wrote, into `model`, `optimizers` and the tensors of `kept`; returns the metadata.

    Args:
        check: called with the metadata before anything is changed.

    Raises:
        UserError: missing or corrupt file, or the state of another network or optimiser.
    """
    tensors, metadata = load_tensors(path)
    check(metadata)
    _put_weights(model.state_dict(), tensors, _MODEL, path)
    others = (_MODEL, _OPTIMIZER)
    _put_weights(kept, {n: t for n, t in tensors.items() if not n.startswith(others)}, "", path)
    owners, parameters = _owners(optimizers), dict(model.named_parameters())
    for full, tensor in tensors.items():
        if full.startswith(_OPTIMIZER):
            name, _, key = full.removeprefix(_OPTIMIZER).rpartition("/")
            if name not in parameters or parameters[name] not in owners:
                raise UserError(f"{path}: optimiser state for {name!r}, which this network does not have")
            parameter = parameters[name]
            # State shares its parameter's memory layout, as if it had never been away.
            own = torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor.clone()
            owners[parameter].state[parameter][key] = own
    return metadata


def check_settings(path: Path, ours: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a training with other settings.

    Raises:
        UserError: naming the first key that differs, with both values.
    """
    theirs = metadata.get("settings", {})
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            raise UserError(
                f"{path}: this training was begun with {key} = {theirs.get(key)!r}, now it is {ours.get(key)!r}; "
                "continue with the same settings, or delete the file to train anew"
            )


def _owners(optimizers: Sequence[torch.optim.Optimizer]) -> dict[Tensor, torch.optim.Optimizer]:
    """Which optimiser a parameter belongs to."""
    return {parameter: o for o in optimizers for group in o.param_groups for parameter in group["params"]}


def _put_weights(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    given = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    for name in sorted(own.keys() ^ given.keys()):
        side = "lacks" if name in own else "has"
        raise UserError(f"{path}: of another network: it {side} the tensor {name!r}; use the space it was trained with")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape:
            raise UserError(
                f"{path}: of another network: tensor {name!r} is {tuple(given[name].shape)}, here it is "
                f"{tuple(tensor.shape)}; use the space it was trained with"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])
