"""Networks whose shape a stage has changed: kept as weights and what differs from the network as it is built.

A pruned network is no longer what its space or its factory builds. Its file holds its tensors, in their own shapes, and
as JSON the plain attributes of modules that differ (`out_channels`, `heads`, ...), the modules that were taken out, and
where lite residuals were added. Put onto a freshly built network, that gives it back: nothing is unpickled, and no code
is read from the file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasbench.ondevice.methods import LiteResidual
from nasbench.training.checkpoint import load_tensors, save_tensors
from search_spaces.errors import UserError

_TENSORS, _PLAIN = "model/", (bool, int, float, str, type(None))


class Skip(nn.Module):
    """What stands in the place of a module that was taken out: hands on its first input."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


def save_network(path: Path, network: nn.Module, original: nn.Module) -> None:
    """Write a network that was made from `original` by changing shapes, values and plain attributes of its modules.

    Args:
        original: the network as it is built anew, which `load_network` will be given; only looked at.

    Raises:
        UserError: it has modules that the original does not have, or the file cannot be written.
    """
    tensors = {_TENSORS + name: tensor for name, tensor in network.state_dict().items()}
    save_tensors(path, tensors, {"structure": describe(network, original)})


def load_network(path: Path, original: nn.Module) -> nn.Module:
    """The network that `save_network` wrote.

    Args:
        original: freshly built; it is changed, and is the result.

    Raises:
        UserError: missing or corrupt file, or one made from another network.
    """
    tensors, metadata = load_tensors(path)
    given = {name.removeprefix(_TENSORS): t for name, t in tensors.items() if name.startswith(_TENSORS)}
    return rebuild(original, metadata.get("structure", {}), given, str(path))


def describe(network: nn.Module, original: nn.Module) -> dict[str, Any]:
    """What `rebuild` needs beside the tensors, JSON-able.

    Raises:
        UserError: a module that the original does not have, or of another class.
    """
    original, residuals = _with_same_residuals(original, network)
    before, skipped = dict(original.named_modules()), []
    attributes: dict[str, dict[str, Any]] = {}
    for name, module in network.named_modules():
        if isinstance(module, Skip) and not isinstance(before.get(name), Skip):
            skipped.append(name)
            continue
        former = before.get(name)
        if former is None or type(former) is not type(module):
            raise UserError(
                f"{type(network).__name__}: its module {name!r} is a {type(module).__name__}, which the network as "
                "built does not have there; only changed shapes, left-out modules and lite residuals can be kept"
            )
        changed = _changed(module, former)
        if changed:
            attributes[name] = changed
    return {"residuals": residuals, "skipped": skipped, "attributes": attributes}


def rebuild(
    original: nn.Module, structure: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = "network"
) -> nn.Module:
    """`original`, changed to what `structure` and `tensors` say.

    Raises:
        UserError: they are of another network; `where` names them.
    """
    for name, shapes in structure.get("residuals", {}).items():
        if name not in dict(original.named_modules()):
            raise UserError(f"{where}: of another network: this one has no module {name!r}")
        original.set_submodule(name, LiteResidual(original.get_submodule(name), *shapes))
    modules = dict(original.named_modules())
    for name in [*structure.get("skipped", ()), *structure.get("attributes", {})]:
        if name not in modules:
            raise UserError(f"{where}: of another network: this one has no module {name!r}")
    for name in structure.get("skipped", ()):
        original.set_submodule(name, Skip())
    for name, attributes in structure.get("attributes", {}).items():
        for key, value in attributes.items():
            setattr(modules[name], key, _like(getattr(modules[name], key, None), value))
    own = original.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        raise UserError(f"{where}: of another network: it {'lacks' if name in own else 'has'} the tensor {name!r}")
    for name, tensor in tensors.items():
        parent, _, key = name.rpartition(".")
        module = original.get_submodule(parent)
        if own[name].shape == tensor.shape:
            with torch.no_grad():
                own[name].copy_(tensor)
        elif isinstance(getattr(module, key), nn.Parameter):
            setattr(module, key, nn.Parameter(tensor, requires_grad=getattr(module, key).requires_grad))
        else:
            setattr(module, key, tensor)
    return original


def _with_same_residuals(original: nn.Module, network: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of the original with lite residuals where the network has them, outer ones first; and their shapes."""
    added: dict[str, Any] = {}
    for name, module in network.named_modules():
        if not isinstance(module, LiteResidual):
            continue
        if not added:
            original = copy.deepcopy(original)
        former = dict(original.named_modules()).get(name)
        if former is not None and not isinstance(former, LiteResidual):
            original.set_submodule(name, LiteResidual(former, module.given, module.made))
            added[name] = [module.given, module.made]
    return original, added


def _changed(module: nn.Module, before: nn.Module) -> dict[str, Any]:
    """Plain attributes that differ; those that torch keeps for itself and how it is run left aside."""
    found = {}
    for key, value in vars(module).items():
        if key.startswith("_") or key == "training" or not _is_plain(value):
            continue
        if value != getattr(before, key, None):
            found[key] = _jsonable(value)
    return found


def _is_plain(value: Any) -> bool:
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, f.name)) for f in fields(value))
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _jsonable(getattr(value, f.name)) for f in fields(value)}
    return [_jsonable(v) for v in value] if isinstance(value, tuple | list) else value


def _like(before: Any, value: Any) -> Any:
    """A JSON value in the type of what stood there: a tuple again, a dataclass with other fields."""
    if is_dataclass(before) and not isinstance(before, type) and isinstance(value, dict):
        return replace(before, **{key: _like(getattr(before, key), v) for key, v in value.items()})
    if isinstance(before, tuple | list) and isinstance(value, list):
        made = [_like(before[min(i, len(before) - 1)] if before else None, v) for i, v in enumerate(value)]
        return tuple(made) if isinstance(before, tuple) else made
    return value
