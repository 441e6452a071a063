"""Networks by name, as the commands take them: a reference network, an architecture of a space, or an ONNX file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hardware_profiles import Artifact, Target
from search_spaces import SearchSpace, UserError, Workload, load_space, nearest, read_onnx
from search_spaces.base import Archs
from search_spaces.reference import reference_network, reference_networks

if TYPE_CHECKING:
    from torch import nn

    from predictors.base import Estimate, Predictor
    from predictors.suite import CalibrationNetwork

# Names of made-up networks: `suite64:fire-3` is one of 64.
_SUITE = re.compile(r"suite(\d+)")


@dataclass(frozen=True)
class NamedNetwork:
    """A network that has a name, with what measuring and predicting need of it.

    Args:
        name: found again by `named_network(name)`.
        family: networks that resemble it: all of one design, of one space, or itself alone.
    """

    name: str
    family: str
    design: CalibrationNetwork | None = None
    space: SearchSpace | None = None
    arch: tuple[int, ...] = ()
    file: Path | None = None

    @cached_property
    def workload(self) -> Workload:
        """Its operators."""
        if self.design is not None:
            return self.design.workload()
        if self.space is not None:
            return self.space.workload(self._row)
        assert self.file is not None
        return read_onnx(self.file)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Per sample, without the batch."""
        workload = self.workload
        return workload.tensors[workload.inputs[0]].shape

    def estimate(self, predictor: Predictor) -> Estimate:
        """The estimate of a predictor bound to the architecture's space, as tables of measurements need it."""
        assert self.space is not None
        return predictor.bind(self.space).predict(self._row[None])

    def build(self) -> nn.Module:
        """A module with random weights.

        Raises:
            UserError: it is a file.
        """
        import torch

        torch.manual_seed(0)
        if self.design is not None:
            return self.design.build()
        if self.space is not None:
            return self.space.build(self._row)
        raise UserError(f"{self.name}: a file is measured as it is, and not built")

    def artifact(self, target: Target, stem: Path) -> Artifact:
        """The network in the format of the target's runtime, in a file `stem` with a suffix; an ONNX file as it is.

        Raises:
            UserError: it cannot be converted for that target.
        """
        from hardware_profiles import converter_for

        converter = converter_for(target)
        if self.file is not None:
            if converter.format != "onnx":
                raise UserError(f"{self.name}: is ONNX, but {target.name} takes {converter.format} files")
            return Artifact(self.file, "onnx", target.precision, self.input_shape)
        path = stem.with_suffix(f".{converter.format}")
        return converter.convert(self.build(), target, self.input_shape, path)

    @property
    def _row(self) -> Archs:
        assert self.space is not None
        return np.array(self.arch, dtype=self.space.dtype)


def named_network(name: str, space: SearchSpace | None = None) -> NamedNetwork:
    """The network of that name.

    Args:
        name: `resnet18`, `mobilenet_v2@160` (at another resolution), `quickstart:largest`, `quickstart:0.1.2` (choice
            indices), or the path of an ONNX file.
        space: for names that begin with its own, instead of loading it again.

    Raises:
        UserError: no such network.
    """
    if name.endswith(".onnx"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such file")
        return NamedNetwork(name, name, file=path)
    head, colon, rest = name.rpartition(":")
    if colon and (suite := _SUITE.fullmatch(head)):
        made = {n.name: n for n in suite_networks(int(suite[1]))}
        if name not in made:
            raise UserError(f"{name}: no such network of that suite. {nearest(name, made)[:300]}")
        return made[name]
    if colon:
        found = space if space is not None and space.name == head else load_space(head)
        return space_network(found, rest, head)
    base, at, resolution = name.partition("@")
    if at and not resolution.isdigit():
        raise UserError(f"{name}: expected NAME@RESOLUTION with a number of pixels, as in mobilenet_v2@160")
    if base not in reference_networks():
        hint = nearest(base, reference_networks()).partition("Known:")[0]
        raise UserError(
            f"no network {base!r}. {hint}It may be one of {len(reference_networks())} reference networks "
            "(search_spaces.reference_networks()), SPACE:ARCHITECTURE, or FILE.onnx"
        )
    reference = reference_network(base, resolution=int(resolution) if at else None)
    return NamedNetwork(name, reference.family, design=reference)


def network_of(name: str, spaces: dict[str, SearchSpace]) -> NamedNetwork:
    """As `named_network`, of many names in turn.

    Args:
        spaces: by what names of their architectures begin with; one that has to be loaded is added.

    Raises:
        UserError: no such network.
    """
    head, _, arch = name.rpartition(":")
    if head in spaces:
        return space_network(spaces[head], arch, head)
    network = named_network(name)
    if network.space is not None:
        spaces[head] = network.space
    return network


@lru_cache(maxsize=4)
def _suite(n: int) -> tuple[NamedNetwork, ...]:
    from predictors.suite import calibration_suite

    return tuple(NamedNetwork(f"suite{n}:{m.name}", f"suite-{m.family}", design=m) for m in calibration_suite(n))


def suite_networks(n: int) -> list[NamedNetwork]:
    """`n` networks made up for calibration, of every kind of building block (`predictors.calibration_suite`).

    Fewer than there are kinds are spread over the costs of the smallest suite.
    """
    from predictors.suite import THEMES

    if n >= len(THEMES):
        return list(_suite(n))
    ordered = sorted(_suite(len(THEMES)), key=lambda network: network.workload.macs)
    return [ordered[i] for i in np.linspace(0, len(ordered) - 1, n).round().astype(int)]


def space_network(space: SearchSpace, arch: str | Sequence[int], label: str = "") -> NamedNetwork:
    """An architecture of a space: by choice indices (with blanks, dots or commas between) or a reference's name.

    Args:
        label: what `load_space` takes for this space, if that is not its name (a TOML file's path).

    Raises:
        UserError: neither, or indices that the space does not have.
    """
    if isinstance(arch, str) and arch in space.references:
        row = space.references[arch]
    else:
        words = arch.replace(".", " ").replace(",", " ").split() if isinstance(arch, str) else [str(a) for a in arch]
        if not words or not all(w.isdigit() for w in words):
            raise UserError(
                f"{space.name}: {arch!r} is neither choice indices nor a reference. "
                f"{nearest(str(arch), space.references)}"
            )
        row = space.check(np.array([[int(w) for w in words]]))[0]
    indices = tuple(int(i) for i in row)
    return NamedNetwork(f"{label or space.name}:{'.'.join(map(str, indices))}", space.name, space=space, arch=indices)


def named_networks(names: Iterable[str], space: str | None = None, archs: Iterable[str] = ()) -> list[NamedNetwork]:
    """Networks by name, and architectures of one space; each once.

    Raises:
        UserError: none, one that there is not, one twice, or a space of which no architecture is named.
    """
    chosen = load_space(space) if space else None
    if chosen is None and (archs := list(archs)):
        raise UserError(f"--arch {archs[0]!r} needs --space")
    found = [named_network(n, chosen) for n in names]
    found += [space_network(chosen, a, space or "") for a in archs] if chosen is not None else []
    if not found:
        raise UserError(
            "name a network: a reference network, SPACE:ARCHITECTURE, FILE.onnx, or an architecture with --space"
        )
    if chosen is not None and not any(n.space is not None and n.space.name == chosen.name for n in found):
        raise UserError(f"--space {space} and {found[0].name}, which is none of its architectures, exclude each other")
    listed = [n.name for n in found]
    if twice := sorted({n for n in listed if listed.count(n) > 1}):
        raise UserError(f"{twice[0]}: named twice")
    return found
