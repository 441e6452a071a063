"""How other code names, and arranges, the weights of networks that are spaces here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from search_spaces.autoformer import AutoFormerSpace
from search_spaces.base import SearchSpace
from search_spaces.mobilenet_v3 import MobileNetV3Space
from search_spaces.resnet import ResNetSpace

# Of torch's normalisation layers, and so of every network here.
EPS = 1e-5

Names = dict[str, str]


@dataclass(frozen=True)
class Naming:
    """How a code base names the modules of one family's largest network.

    Args:
        marks: a key that files with these names have and others have not, once `clean`.
        family: class of the spaces.
        names: for a space, name of each module or parameter in the file -> name in the supernet's `largest`, or, for
            parameters, in the supernet.
        clean: makes one of several spellings of a key.
        convert: makes the file's tensors those that the names are of, where they are arranged in another way.
        eps: that the network's normalisation adds to variances.
    """

    marks: str
    family: type[SearchSpace]
    names: Callable[[Any], Names]
    clean: Callable[[str], str] = str
    convert: Callable[[Any, Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    eps: float = EPS


def _mobilenet_blocks(space: MobileNetV3Space) -> list[tuple[int, int, str]]:
    """Stage, block and name of every block of the largest network."""
    return [(s, b, f"stages.{s}.{b}") for s, stage in enumerate(space.table.stages) for b in range(stage.depths[-1])]


def _norm_pair(names: Names, theirs: str, norm: str, ours: str) -> None:
    names |= {theirs: f"{ours}.conv", norm: f"{ours}.norm"}


def once_for_all_mobilenet(space: MobileNetV3Space) -> Names:
    """`OFAMobileNetV3` of mit-han-lab/once-for-all, `ofa/imagenet_classification/elastic_nn/networks/ofa_mbv3.py`."""
    names: Names = {"feature_mix_layer.conv": "head.features", "classifier.linear": "head.classifier"}
    _norm_pair(names, "first_conv.conv", "first_conv.bn", "stem")
    _norm_pair(names, "final_expand_layer.conv", "final_expand_layer.bn", "head.final")
    for index, (s, b, ours) in enumerate(_mobilenet_blocks(space)):
        theirs = f"blocks.{index}.conv"
        for part, own in (("inverted_bottleneck", "expand"), ("depth_conv", "depthwise"), ("point_linear", "project")):
            _norm_pair(names, f"{theirs}.{part}.conv", f"{theirs}.{part}.bn", f"{ours}.{own}")
        for part in ("reduce", "expand"):
            names[f"{theirs}.depth_conv.se.fc.{part}"] = f"{ours}.se.{part}"
        for large in space.table.stages[s].kernels:
            for small in space.table.stages[s].kernels:
                step = f"{large}to{small}"
                names[f"{theirs}.depth_conv.conv.{step}_matrix"] = f"transforms.{s}_{b}.{step}"
    return names


def torchvision_mobilenet(space: MobileNetV3Space) -> Names:
    """`MobileNetV3` of pytorch/vision, `torchvision/models/mobilenetv3.py`."""
    names: Names = {"classifier.0": "head.features", "classifier.3": "head.classifier"}
    _norm_pair(names, "features.0.0", "features.0.1", "stem")
    largest = space.spec((space.cardinalities - 1).astype(space.dtype))
    blocks = _mobilenet_blocks(space)
    for index, (s, b, ours) in enumerate(blocks, start=1):
        spec, theirs, part = largest.stages[s][b], f"features.{index}.block", 0
        for own, there in (("expand", spec.expand), ("depthwise", True), ("se", spec.squeeze), ("project", True)):
            if not there:
                continue
            if own == "se":
                names |= {f"{theirs}.{part}.fc1": f"{ours}.se.reduce", f"{theirs}.{part}.fc2": f"{ours}.se.expand"}
            else:
                _norm_pair(names, f"{theirs}.{part}.0", f"{theirs}.{part}.1", f"{ours}.{own}")
            part += 1
    _norm_pair(names, f"features.{len(blocks) + 1}.0", f"features.{len(blocks) + 1}.1", "head.final")
    return names


def timm_mobilenet(space: MobileNetV3Space) -> Names:
    """`MobileNetV3` of huggingface/pytorch-image-models, `timm/models/mobilenetv3.py`."""
    names: Names = {"conv_head": "head.features", "classifier": "head.classifier"}
    _norm_pair(names, "conv_stem", "bn1", "stem")
    largest = space.spec((space.cardinalities - 1).astype(space.dtype))
    for s, b, ours in _mobilenet_blocks(space):
        theirs = f"blocks.{s}.{b}"
        convs = ("conv_pw", "conv_dw", "conv_pwl") if largest.stages[s][b].expand else ("conv_dw", "conv_pw")
        parts = ("expand", "depthwise", "project")[-len(convs) :]
        for number, (conv, own) in enumerate(zip(convs, parts, strict=True), start=1):
            _norm_pair(names, f"{theirs}.{conv}", f"{theirs}.bn{number}", f"{ours}.{own}")
        names |= {f"{theirs}.se.conv_{part}": f"{ours}.se.{part}" for part in ("reduce", "expand")}
    last = len(space.table.stages)
    _norm_pair(names, f"blocks.{last}.0.conv", f"blocks.{last}.0.bn1", "head.final")
    return names


def once_for_all_resnet(space: ResNetSpace) -> Names:
    """`OFAResNets` of mit-han-lab/once-for-all, `ofa/imagenet_classification/elastic_nn/networks/ofa_resnets.py`."""
    names: Names = {"classifier.linear": "head.classifier"}
    _norm_pair(names, "input_stem.0.conv", "input_stem.0.bn", "stem.first")
    _norm_pair(names, "input_stem.1.conv", "input_stem.1.conv.bn", "stem.middle")
    _norm_pair(names, "input_stem.2.conv", "input_stem.2.bn", "stem.last")
    places = [(s, b) for s, stage in enumerate(space.table.stages) for b in range(stage.depths[-1])]
    parts = {"conv1": "reduce", "conv2": "spatial", "conv3": "expand", "downsample": "shortcut.project"}
    for index, (s, b) in enumerate(places):
        for part, own in parts.items():
            theirs = f"blocks.{index}.{part}"
            _norm_pair(names, f"{theirs}.conv", f"{theirs}.bn", f"stages.{s}.{b}.{own}")
    return names


def _once_for_all_key(key: str) -> str:
    """Elastic layers wrap plain ones (`conv.conv.weight`, `bn.bn.bias`), and older files name the block differently."""
    key = key.replace(".mobile_inverted_conv.", ".conv.")
    return re.sub(r"\.(conv|bn|linear)(?:\.\1)+(?=\.)", r".\1", key)


# Parameters of AutoFormer's network and of each of its blocks, as there and here, and what each axis is of.
_AUTOFORMER = (
    ("patch_embed_super.proj.weight", "embedding.patches.weight", "w"),
    ("patch_embed_super.proj.bias", "embedding.patches.bias", "w"),
    ("cls_token", "embedding.token", "-w"),
    ("pos_embed", "embedding.positions", "-w"),
    ("norm.weight", "head.norm.weight", "w"),
    ("norm.bias", "head.norm.bias", "w"),
    ("head.weight", "head.classifier.weight", "-w"),
    ("head.bias", "head.classifier.bias", "-"),
)
_AUTOFORMER_BLOCK = (
    ("attn_layer_norm.weight", "attention.norm.weight", "w"),
    ("attn_layer_norm.bias", "attention.norm.bias", "w"),
    ("attn.qkv.weight", "attention.qkv.weight", "qw"),
    ("attn.qkv.bias", "attention.qkv.bias", "q"),
    ("attn.proj.weight", "attention.project.weight", "wa"),
    ("attn.proj.bias", "attention.project.bias", "w"),
    ("ffn_layer_norm.weight", "mlp.norm.weight", "w"),
    ("ffn_layer_norm.bias", "mlp.norm.bias", "w"),
    ("fc1.weight", "mlp.widen.weight", "hw"),
    ("fc1.bias", "mlp.widen.bias", "h"),
    ("fc2.weight", "mlp.project.weight", "wh"),
    ("fc2.bias", "mlp.project.bias", "w"),
)


def autoformer(space: AutoFormerSpace, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`Vision_TransformerSuper` of microsoft/Cream, `AutoFormer/model/supernet_transformer.py`, under our names.

    Its supernets are wider than their spaces (256 channels for 240 at most), and no network uses the rest: leading
    channels are taken. Its rows of queries, keys and values take turns; ours are ordered by head. The two tables of a
    relative position are one parameter here.
    """
    largest = space.spec((space.cardinalities - 1).astype(space.dtype))
    layer, head = largest.layers[0], largest.head_width
    # By axis: embedding, attention, perceptron, and three rows for each channel of attention.
    sizes = {"w": largest.width, "a": layer.heads * head, "h": layer.hidden, "q": 3 * layer.heads * head}
    rules = {theirs: (ours, axes) for theirs, ours, axes in _AUTOFORMER}
    for i in range(len(largest.layers)):
        rules |= {f"blocks.{i}.{theirs}": (f"layers.{i}.{ours}", axes) for theirs, ours, axes in _AUTOFORMER_BLOCK}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if table := re.fullmatch(r"blocks\.(\d+)\.attn\.rel_pos_embed_([kv])\.embeddings_table_v", key):
            other = state.get(key[:-1] + "h")
            if other is not None and other.shape == value.shape:
                what = "key" if table[2] == "k" else "value"
                found[f"layers.{table[1]}.attention.{what}_positions"] = torch.stack([value, other])
        elif key in rules:
            ours, axes = rules[key]
            value = value[0] if key in ("cls_token", "pos_embed") else value
            for axis, size in enumerate(axes):
                if size != "-" and value.dim() > axis and value.shape[axis] > sizes[size]:
                    value = value.narrow(axis, 0, sizes[size])
            if axes[0] == "q" and len(value) == sizes["q"]:
                value = value.unflatten(0, (layer.heads, head, 3)).transpose(1, 2).flatten(0, 2)
            found[ours] = value
        elif not key.endswith("embeddings_table_h"):
            found[key] = value
    return found


NAMINGS = (
    Naming("first_conv.conv.weight", MobileNetV3Space, once_for_all_mobilenet, _once_for_all_key),
    Naming("features.0.0.weight", MobileNetV3Space, torchvision_mobilenet, eps=1e-3),
    Naming("conv_stem.weight", MobileNetV3Space, timm_mobilenet),
    Naming("input_stem.0.conv.weight", ResNetSpace, once_for_all_resnet, _once_for_all_key),
    Naming("patch_embed_super.proj.weight", AutoFormerSpace, lambda space: {}, convert=autoformer),
)
