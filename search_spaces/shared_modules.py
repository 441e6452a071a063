"""Plain modules as parts of supernets: what they normalise with, and which weights they read, is settled per call.

A module of a stand-alone network becomes part of a supernet without being written twice: `share` lets its layers read
their parameters from a store, cropped to their own shapes, and normalise and drop values as the running call says. A
call is a value that is bound while it runs (`running`), for its thread alone; nothing of it remains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from search_spaces.base import SearchSpace
from search_spaces.depthwise import convolve
from search_spaces.errors import UserError
from search_spaces.shared_layers import BatchNorm, Drop, Normalise, crop
from search_spaces.supernet import check_weights

# Per knob the choices that run, and what their outputs are multiplied by; None stands for one.
Running = list[list[tuple[int, Tensor | None]]]


@dataclass(frozen=True)
class Call:
    """One forward pass.

    Args:
        normalise: what normalisation layers do.
        drop: what dropout does.
        running: the paths of every knob, for modules that choose for themselves.
    """

    normalise: Normalise
    drop: Drop
    running: Running | None = None


def keep(x: Tensor, rate: float) -> Tensor:
    """The `Drop` that drops nothing."""
    return x


_CALL: ContextVar[Call] = ContextVar("call of a supernet")


def this_call() -> Call:
    """The call that runs in this thread."""
    return _CALL.get()


@contextmanager
def running(call: Call) -> Iterator[None]:
    """Bind a call while a supernet runs."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


class Store(nn.Module):
    """Parameters under dotted names, as nested modules: what a supernet owns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def part(self, name: str) -> nn.Module | None:
        """The module below a name, None where nothing was put there."""
        try:
            return self.get_submodule(name)
        except AttributeError:
            return None

    def covers(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a value for all of `shape` was put there."""
        return any(all(a <= b for a, b in zip(shape, known, strict=True)) for known in self.shapes.get(name, ()))

    def put(self, name: str, value: Tensor) -> None:
        """Write a first value; the parameter grows where it is smaller, its own values leading and centred."""
        shape = tuple(value.shape)
        self.shapes.setdefault(name, []).append(shape)
        *path, last = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        old = owner._parameters.get(last)
        if old is not None:
            full = torch.zeros([max(pair) for pair in zip(old.shape, shape, strict=True)])
            crop(full, *old.shape).copy_(old.detach())
            crop(full, *shape).copy_(value.detach())
            value = full
        value = value.detach().clone()
        if value.dim() == 4:  # nearly twice as fast on CPUs; `contiguous` would leave 1x1 kernels as they are
            value = value.to(memory_format=torch.channels_last)
        owner.register_parameter(last, nn.Parameter(value))


Module = TypeVar("Module", bound=nn.Module)


def share(module: Module, store: nn.Module | None = None) -> Module:
    """Make a plain module part of a supernet, in place; it keeps no running statistics from now on.

    Args:
        module: without state beyond parameters and running statistics.
        store: where its parameters are under the same names, as large or larger; None leaves it its own.
    """
    for path, part in list(module.named_modules()):
        own = [key for key, value in part._parameters.items() if value is not None] if store is not None else []
        if own:
            assert store is not None
            # Not as a submodule: the store owns its parameters, and the part reads them.
            part.__dict__["source"] = store.get_submodule(path)
            part.__dict__["shapes"] = {key: tuple(part._parameters[key].shape) for key in own}
            for key in own:
                del part._parameters[key]
        if isinstance(part, BatchNorm):
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None
        if own or isinstance(part, BatchNorm | nn.Dropout):
            kind: Any = type(part)
            part.__class__ = _shared_class(kind, tuple(own))
    return module


@cache
def _shared_class(kind: Any, parameters: tuple[str, ...]) -> type[nn.Module]:
    """A kind of module that reads the named parameters from its source, and normalises and drops as the call says."""

    def reader(key: str) -> Any:
        def read(self: Any) -> Tensor:
            return crop(getattr(self.source, key), *self.shapes[key])

        return property(read)

    members: dict[str, Any] = {key: reader(key) for key in parameters}
    if issubclass(kind, BatchNorm):
        members["forward"] = lambda self, x: this_call().normalise(self, x)
    elif issubclass(kind, nn.Conv2d):
        members["forward"] = convolve
    elif issubclass(kind, nn.Dropout):
        members["forward"] = lambda self, x: this_call().drop(x, self.p)
    return type(f"Shared{kind.__name__}", (kind,), members)


def running_paths(space: SearchSpace, weights: Sequence[Tensor], run: Sequence[Tensor] | None = None) -> Running:
    """Per knob the choices that run and their weights: those of weight zero are left out, unless `run` marks them.

    A weight of exactly one without a gradient is None: nothing is multiplied.

    Raises:
        UserError: other weights than one vector per knob, or a knob of which nothing runs.
    """
    check_weights(space, weights)
    if run is not None:
        check_weights(space, run)
    paths: Running = []
    for k, vector in enumerate(weights):
        asked = [False] * len(vector) if run is None else run[k].tolist()
        taken = [
            (i, None if value == 1 and not vector.requires_grad else vector[i])
            for i, (value, wanted) in enumerate(zip(vector.detach().tolist(), asked, strict=True))
            if value != 0 or wanted
        ]
        if not taken:
            raise UserError(f"mixture supernet: all choices of knob {space.knobs[k].name!r} have weight zero")
        paths.append(taken)
    return paths


def scaled(x: Tensor, *weights: Tensor | None) -> Tensor:
    """`x` times those weights that are there."""
    weight = product_of(weights)
    return x if weight is None else x * weight


def product_of(weights: Iterable[Tensor | None]) -> Tensor | None:
    """The product of those that are there."""
    result: Tensor | None = None
    for weight in weights:
        if weight is not None:
            result = weight if result is None else result * weight
    return result


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of equal shape; the tensor itself where it is one."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result
