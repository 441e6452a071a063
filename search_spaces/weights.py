"""Published weights for supernets: safetensors files under the names of the code that trained them.

Known names, told apart by a key of the file, per family of spaces:

=============  =====================================  =================================================================
family         names                                  a file that has them
=============  =====================================  =================================================================
mobilenet_v3   once-for-all (`OFAMobileNetV3`)        `ofa_mbv3_d234_e346_k357_w1.0`, `..._w1.2`
mobilenet_v3   torchvision (`mobilenet_v3_large`)     `MobileNet_V3_Large_Weights`, `MobileNet_V3_Small_Weights`
mobilenet_v3   timm (`mobilenetv3_large_100`)         `timm/mobilenetv3_large_100.ra_in1k`
resnet         once-for-all (`OFAResNets`)            `ofa_resnet50_d0-1-2_e0.2-0.25-0.35_w0.65-0.8-1.0`
autoformer     Cream (`Vision_TransformerSuper`)      `supernet-tiny.pth`, `supernet-small.pth`, `supernet-base.pth`
any            this project's                         a run's `supernet.safetensors`; a network's `state_dict()`
=============  =====================================  =================================================================

Others are given by `names`. Checkpoints of torch are converted once, without running what may be in them:
`save_file(torch.load(file, weights_only=True)["state_dict"], "weights.safetensors")`; AutoFormer's have `["model"]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from search_spaces.base import SearchSpace
from search_spaces.errors import UserError
from search_spaces.shared_layers import WeightSharingSupernet, norm_names
from search_spaces.supernet import NormStats, Supernet
from search_spaces.weight_names import EPS, NAMINGS, Naming


def load_weights(
    supernet: Supernet,
    path: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
) -> NormStats | None:
    """Copy published weights into a supernet; all of them or, where anything is wrong, none.

    Args:
        supernet: of a space whose largest network is the published one.
        path: a safetensors file.
        names: of modules or parameters, file -> `largest`; by default one of the known namings, see this module.
        keep: modules of `largest` (`head.classifier`) that keep the weights they have: for other tasks.

    Returns:
        The file's running statistics, those of the largest network; None where it has none, or where normalisation
        layers are kept. Where the published network adds another constant to its variances than ours, the difference is
        in the variances.

    Raises:
        UserError: an unreadable file, unknown names, a parameter that the file lacks, has too many or in another shape,
            or values that are not finite numbers; key and shapes are named.
    """
    if not isinstance(supernet, WeightSharingSupernet):
        raise UserError(f"published weights do not load into a {type(supernet).__name__}: it has no largest network")
    where = Path(path)
    state = _read(where)
    naming = _find(supernet.space, state) if names is None else None
    clean = str if naming is None else naming.clean
    names = names or ({} if naming is None else naming.names(supernet.space))
    if naming is not None and naming.convert is not None:
        state = naming.convert(supernet.space, state)
    parameters = dict(supernet.named_parameters())
    kept = tuple(f"largest.{module}." for module in keep)
    for module in kept:
        if not any(name.startswith(module) for name in parameters):
            raise UserError(f"keep: {supernet.space.name} has no module {module[len('largest.') : -1]!r}")
    found: dict[str, Tensor] = {}
    mean: dict[str, Tensor] = {}
    var: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _translate(clean(key), names)
        module, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked" or name.startswith(kept):
            continue
        moments = {"running_mean": mean, "running_var": var}.get(leaf)
        like = parameters.get(name if moments is None else f"{module}.weight")
        if like is None:
            raise UserError(f"{where}: {key}: {_unexpected(name, supernet.space, parameters)}")
        value = _checked(f"{where}: {key}", value, name, like)
        if moments is None:
            found[name] = value
        else:
            moments[module.removeprefix("largest.")] = value.to(like)
    missing = [name for name in parameters if name not in found and not name.startswith(kept)]
    if missing:
        raise UserError(f"{where}: nothing in it for {missing[0]}; {len(missing)} of {len(parameters)} parameters lack")
    norms = norm_names(supernet.largest).values()
    whole = bool(mean or var) and not any(f"largest.{norm}.".startswith(kept) for norm in norms)
    for norm in norms if whole else ():
        if norm not in mean or norm not in var:
            raise UserError(f"{where}: has running statistics, but none for {norm}")
    with torch.no_grad():
        for name, value in found.items():
            parameters[name].copy_(value)
    extra = 0.0 if naming is None else naming.eps - EPS
    return NormStats(mean, {name: value + extra for name, value in var.items()}) if whole else None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot read it as safetensors: {error}; a torch checkpoint is converted once with "
            "save_file(torch.load(file, weights_only=True), path)"
        ) from error
    # Runs keep what they trained under these prefixes, beside the state of the optimiser; averages are what was judged.
    for prefix in ("ema/", "model/"):
        if found := {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}:
            return found
    return state


def _find(space: SearchSpace, state: Mapping[str, Tensor]) -> Naming | None:
    """The known naming that the file has; None where names may be ours."""
    for naming in NAMINGS:
        if isinstance(space, naming.family) and any(naming.clean(key) == naming.marks for key in state):
            return naming
    return None


def _translate(key: str, names: Mapping[str, str]) -> str:
    """The supernet's name for a key of the file."""
    module, _, leaf = key.rpartition(".")
    name = names.get(key) or (f"{names[module]}.{leaf}" if module in names else key)
    return name if name.startswith(("largest.", "transforms.")) else f"largest.{name}"


def _checked(where: str, value: Tensor, name: str, like: Tensor) -> Tensor:
    """The value in the shape that it must have: 1x1 convolutions and linear layers hold the same numbers."""
    if _core(value) != _core(like):
        raise UserError(f"{where}: shape {tuple(value.shape)}, but {name} has {tuple(like.shape)}")
    if not value.is_floating_point() or not value.isfinite().all():
        raise UserError(f"{where}: values that are not finite floating-point numbers")
    return value.reshape(like.shape)


def _core(tensor: Tensor) -> list[int]:
    """The shape without ones at its end."""
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape


def _unexpected(name: str, space: SearchSpace, parameters: Mapping[str, Tensor]) -> str:
    if name.startswith("transforms."):
        return f"the file has learned kernels; make {space.name} with kernel_transform = true"
    short = name.removeprefix("largest.")
    near = get_close_matches(short, [parameter.removeprefix("largest.") for parameter in parameters], 1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    known = " or ".join(naming.marks for naming in NAMINGS if isinstance(space, naming.family))
    by_key = f"; other code's files are known by a key {known}" if known else ""
    return f"{space.name} has no {short}.{guess} Give names for files of other code{by_key}"
