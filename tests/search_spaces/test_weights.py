"""Published weights under their official names, against small forward passes that read those names themselves.

Names and shapes are written down here from the code that made the files: mit-han-lab/once-for-all, pytorch/vision and
huggingface/pytorch-image-models.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from search_spaces import AutoFormerSpace, MobileNetV3Space, NormStats, ResNetSpace, UserError, load_space, load_weights
from search_spaces.shared_layers import WeightSharingSupernet

State = dict[str, Tensor]
Made = tuple[WeightSharingSupernet, State, Callable[[Tensor], Tensor]]

STAGES: list[dict[str, Any]] = [
    {"width": 16, "expansions": [1]},
    {"width": 24, "stride": 2, "depths": [1, 3], "kernels": [3, 5, 7], "expansions": [2, 4]},
    {"width": 40, "kernels": [3, 5, 7], "expansions": [2, 4], "se": True, "activation": "hard_swish"},
]


class File:
    """A file's tensors, drawn when first asked for by name and shape, and layers that read them."""

    def __init__(self, eps: float = 1e-5) -> None:
        self.state: State = {}
        self.eps = eps
        self._rng = torch.Generator().manual_seed(0)

    def get(self, name: str, *shape: int, positive: bool = False) -> Tensor:
        if name not in self.state:
            fan = max(1, int(np.prod(shape[1:])))
            value = torch.randn(shape, generator=self._rng) * (2 / fan) ** 0.5
            self.state[name] = value.abs() + 0.1 if positive else value
        assert self.state[name].shape == shape, name
        return self.state[name]

    def conv(self, x: Tensor, name: str, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.get(f"{name}.weight", cout, x.shape[1] // groups, kernel, kernel)
        return F.conv2d(x, weight, None, stride, kernel // 2, 1, groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        n = x.shape[1]
        mean, var = self.get(f"{name}.running_mean", n), self.get(f"{name}.running_var", n, positive=True)
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(3)
        return F.batch_norm(x, mean, var, self.get(f"{name}.weight", n), self.get(f"{name}.bias", n), eps=self.eps)

    def linear(self, x: Tensor, name: str, cout: int, bias: bool = True, as_conv: bool = False) -> Tensor:
        weight = self.get(f"{name}.weight", cout, x.shape[1], *((1, 1) if as_conv else ())).flatten(1)
        return F.linear(x, weight, self.get(f"{name}.bias", cout) if bias else None)

    def gates(self, x: Tensor, reduce: str, expand: str, squeeze: int) -> Tensor:
        y = x.mean((2, 3))
        y = F.relu(self.linear(y, reduce, squeeze, as_conv=True))
        return x * F.hardsigmoid(self.linear(y, expand, x.shape[1], as_conv=True))[..., None, None]


def once_for_all_mobilenet(old: bool = False, kernel_transform: bool = True) -> Made:
    """`ofa_mbv3.py`: static first block, elastic others; `old` is the spelling of the first release."""
    file = File()
    block = "mobile_inverted_conv" if old else "conv"

    def forward(x: Tensor) -> Tensor:
        x = F.hardswish(file.norm(file.conv(x, "first_conv.conv", 16, 3, 2), "first_conv.bn"))
        b = f"blocks.0.{block}"
        y = F.relu(file.norm(file.conv(x, f"{b}.depth_conv.conv", 16, 3, 1, 16), f"{b}.depth_conv.bn"))
        x = x + file.norm(file.conv(y, f"{b}.point_linear.conv", 16), f"{b}.point_linear.bn")
        rows = [(96 - 32, 24, 2, False), (96, 24, 1, False), (96, 24, 1, False), (96, 40, 1, True)]
        for i, (hidden, cout, stride, late) in enumerate(rows, start=1):
            act: Callable[[Tensor], Tensor] = F.hardswish if late else F.relu
            b = f"blocks.{i}.{block}"
            for step, n in (("7to5", 25), ("5to3", 9)) if kernel_transform else ():
                file.get(f"{b}.depth_conv.conv.{step}_matrix", n, n)
            y = act(
                file.norm(file.conv(x, f"{b}.inverted_bottleneck.conv.conv", hidden), f"{b}.inverted_bottleneck.bn.bn")
            )
            y = act(
                file.norm(file.conv(y, f"{b}.depth_conv.conv.conv", hidden, 7, stride, hidden), f"{b}.depth_conv.bn.bn")
            )
            if late:
                y = file.gates(y, f"{b}.depth_conv.se.fc.reduce", f"{b}.depth_conv.se.fc.expand", 24)
            y = file.norm(file.conv(y, f"{b}.point_linear.conv.conv", cout), f"{b}.point_linear.bn.bn")
            x = y + x if y.shape == x.shape else y
        x = F.hardswish(file.norm(file.conv(x, "final_expand_layer.conv", 96), "final_expand_layer.bn"))
        x = F.hardswish(file.linear(x.mean((2, 3)), "feature_mix_layer.conv", 128, bias=False, as_conv=True))
        return file.linear(x, "classifier.linear", 10)

    space = MobileNetV3Space(
        3, 10, stages=STAGES, resolutions=[32], final_width=96, feature_width=128, feature_bias=False,
        kernel_transform=kernel_transform,
    )  # fmt: skip
    forward(torch.zeros(1, 3, 32, 32))
    return space.supernet(), file.state, forward


# Howard et al. (2019), table 1: kernel, hidden, out, gates, hard-swish, stride.
LARGE = [
    (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
    (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
    (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1),
    (5, 960, 160, 1, 1, 1),
]  # fmt: skip
SQUEEZE = {72: 24, 120: 32, 480: 120, 672: 168, 960: 240}


def torchvision_large() -> Made:
    """`mobilenetv3.py`: layers of a block are counted, and its normalisation adds 0.001."""
    file = File(eps=1e-3)

    def forward(x: Tensor) -> Tensor:
        x = F.hardswish(file.norm(file.conv(x, "features.0.0", 16, 3, 2), "features.0.1"))
        for i, (kernel, hidden, cout, se, late, stride) in enumerate(LARGE, start=1):
            act: Callable[[Tensor], Tensor] = F.hardswish if late else F.relu
            y, names = x, iter(f"features.{i}.block.{j}" for j in range(4))
            if hidden != x.shape[1]:
                n = next(names)
                y = act(file.norm(file.conv(y, f"{n}.0", hidden), f"{n}.1"))
            n = next(names)
            y = act(file.norm(file.conv(y, f"{n}.0", hidden, kernel, stride, hidden), f"{n}.1"))
            if se:
                n = next(names)
                y = file.gates(y, f"{n}.fc1", f"{n}.fc2", SQUEEZE[hidden])
            n = next(names)
            y = file.norm(file.conv(y, f"{n}.0", cout), f"{n}.1")
            x = y + x if y.shape == x.shape else y
        x = F.hardswish(file.norm(file.conv(x, "features.16.0", 960), "features.16.1"))
        return file.linear(F.hardswish(file.linear(x.mean((2, 3)), "classifier.0", 1280)), "classifier.3", 10)

    forward(torch.zeros(1, 3, 32, 32))
    return load_space("mobilenet_v3_large", 3, 10, resolutions=[32]).supernet(), file.state, forward  # type: ignore[return-value]


def timm_large() -> Made:
    """`mobilenetv3_large_100`: blocks by stage; the first has no expansion and so other names."""
    file = File()
    depths = [1, 2, 3, 4, 2, 3]

    def forward(x: Tensor) -> Tensor:
        x = F.hardswish(file.norm(file.conv(x, "conv_stem", 16, 3, 2), "bn1"))
        places = [(s, b) for s, depth in enumerate(depths) for b in range(depth)]
        for (s, b), (kernel, hidden, cout, se, late, stride) in zip(places, LARGE, strict=True):
            act: Callable[[Tensor], Tensor] = F.hardswish if late else F.relu
            n, y = f"blocks.{s}.{b}", x
            if s:
                y = act(file.norm(file.conv(y, f"{n}.conv_pw", hidden), f"{n}.bn1"))
            y = act(
                file.norm(file.conv(y, f"{n}.conv_dw", hidden, kernel, stride, hidden), f"{n}.{'bn2' if s else 'bn1'}")
            )
            if se:
                y = file.gates(y, f"{n}.se.conv_reduce", f"{n}.se.conv_expand", SQUEEZE[hidden])
            last, norm = ("conv_pwl", "bn3") if s else ("conv_pw", "bn2")
            y = file.norm(file.conv(y, f"{n}.{last}", cout), f"{n}.{norm}")
            x = y + x if y.shape == x.shape else y
        x = F.hardswish(file.norm(file.conv(x, "blocks.6.0.conv", 960), "blocks.6.0.bn1"))
        x = F.hardswish(file.linear(x.mean((2, 3)), "conv_head", 1280, as_conv=True))
        return file.linear(x, "classifier", 10)

    forward(torch.zeros(1, 3, 32, 32))
    return load_space("mobilenet_v3_large", 3, 10, resolutions=[32]).supernet(), file.state, forward  # type: ignore[return-value]


def once_for_all_resnet() -> Made:
    """`ofa_resnets.py`: elastic layers throughout."""
    file = File()

    def layer(x: Tensor, name: str, cout: int, kernel: int = 1, stride: int = 1) -> Tensor:
        return file.norm(file.conv(x, f"{name}.conv.conv", cout, kernel, stride), f"{name}.bn.bn")

    def forward(x: Tensor) -> Tensor:
        x = F.relu(layer(x, "input_stem.0", 16, 3, 2))
        x = F.relu(layer(x, "input_stem.1.conv", 16, 3)) + x
        x = F.max_pool2d(F.relu(layer(x, "input_stem.2", 32, 3)), 3, 2, 1)
        for i, (cout, stride) in enumerate([(64, 1), (64, 1), (64, 1), (128, 2), (128, 1)]):
            b = f"blocks.{i}"
            y = F.relu(layer(x, f"{b}.conv1", cout // 4))
            y = layer(F.relu(layer(y, f"{b}.conv2", cout // 4, 3, stride)), f"{b}.conv3", cout)
            if cout != x.shape[1]:
                x = layer(F.avg_pool2d(x, stride, stride) if stride > 1 else x, f"{b}.downsample", cout)
            x = F.relu(y + x)
        return file.linear(x.mean((2, 3)), "classifier.linear.linear", 10)

    stages = [{"width": 64, "depths": [1, 3]}, {"width": 128, "depths": [2], "stride": 2}]
    space = ResNetSpace(3, 10, stages=stages, resolutions=[32], widths=[0.5, 1.0], stem_width=32)
    forward(torch.zeros(1, 3, 32, 32))
    return space.supernet(), file.state, forward


def cream_autoformer() -> Made:
    """`supernet_transformer.py` at the largest sizes that the space searches, in a supernet that is wider still."""
    file = File()
    whole, width, heads, head, hidden, reach, grid = 32, 24, 2, 8, 48, 3, 4
    tokens = grid**2 + 1

    def layer(x: Tensor, name: str, out: int, full: tuple[int, int], rows: Tensor | None = None) -> Tensor:
        weight, bias = file.get(f"{name}.weight", *full), file.get(f"{name}.bias", full[0])
        rows = torch.arange(out) if rows is None else rows
        return F.linear(x, weight[rows, : x.shape[-1]], bias[rows])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, (width,), file.get(f"{name}.weight", whole)[:width], file.get(f"{name}.bias", whole)[:width]
        )

    def relative(name: str) -> Tensor:
        """The embedding of every pair of tokens `(query, key, head)`."""
        patch = torch.arange(grid**2)
        total = torch.zeros(tokens, tokens, head)
        for table, place in (("v", patch // grid), ("h", patch % grid)):
            distance = (place[None] - place[:, None]).clamp(-reach, reach) + reach + 1
            total = (
                total + file.get(f"{name}.embeddings_table_{table}", 2 * reach + 2, head)[F.pad(distance, (1, 0, 1, 0))]
            )
        return total

    def attention(x: Tensor, name: str) -> Tensor:
        rows = torch.cat([torch.arange(3 * heads * head)[part::3] for part in range(3)])  # queries, keys, values
        qkv = layer(x, f"{name}.qkv", 0, (3 * whole, whole), rows).unflatten(-1, (3, heads, head))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) + torch.einsum("bhqd,qkd->bhqk", q, relative(f"{name}.rel_pos_embed_k"))
        weights = (logits * head**-0.5).softmax(-1)
        y = weights @ v + torch.einsum("bhqk,qkd->bhqd", weights, relative(f"{name}.rel_pos_embed_v"))
        return layer(y.transpose(1, 2).flatten(2), f"{name}.proj", width, (whole, whole))

    def forward(x: Tensor) -> Tensor:
        weight, bias = (
            file.get("patch_embed_super.proj.weight", whole, 3, 8, 8),
            file.get("patch_embed_super.proj.bias", whole),
        )
        x = F.conv2d(x, weight[:width], bias[:width], 8).flatten(2).transpose(1, 2)
        first = file.get("cls_token", 1, 1, whole)[..., :width].expand(len(x), -1, -1)
        x = torch.cat([first, x], 1) + file.get("pos_embed", 1, tokens, whole)[..., :width]
        for i in range(2):
            x = x + attention(norm(x, f"blocks.{i}.attn_layer_norm"), f"blocks.{i}.attn")
            y = layer(norm(x, f"blocks.{i}.ffn_layer_norm"), f"blocks.{i}.fc1", hidden, (2 * whole, whole))
            x = x + layer(F.gelu(y), f"blocks.{i}.fc2", width, (whole, 2 * whole))
        return layer(norm(x, "norm")[:, 1:].mean(1), "head", 10, (10, whole))

    space = AutoFormerSpace(
        3, 10, widths=[16, width], depths=[1, 2], heads=[1, heads], ratios=[1.5, 2], resolution=32, patch=8,
        head_width=head, max_relative_position=reach,
    )  # fmt: skip
    forward(torch.zeros(1, 3, 32, 32))
    return space.supernet(), file.state, forward


FILES: dict[str, Callable[[], Made]] = {
    "once_for_all_mobilenet": once_for_all_mobilenet,
    "once_for_all_mobilenet_old": lambda: once_for_all_mobilenet(old=True),
    "once_for_all_mobilenet_plain": lambda: once_for_all_mobilenet(kernel_transform=False),
    "torchvision_large": torchvision_large,
    "timm_large": timm_large,
    "once_for_all_resnet": once_for_all_resnet,
    "cream_autoformer": cream_autoformer,
}


def save(state: State, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_published_weights_compute_what_their_own_code_does(make: Callable[[], Made], tmp_path: Path) -> None:
    supernet, state, forward = make()
    stats = load_weights(supernet, save(state, tmp_path))
    assert (stats is not None) == any(key.endswith("running_mean") for key in state)
    arch = supernet.space.canonical((supernet.space.cardinalities - 1)[None])[0]
    stats = stats or NormStats({}, {})
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = forward(x)
        assert torch.allclose(supernet(x, arch, stats), expected, atol=1e-3 * float(expected.abs().max()))
        network = supernet.extract(arch, stats)
        assert torch.allclose(network(x), expected, atol=1e-3 * float(expected.abs().max()))
    assert len(stats.mean) == len(stats.var) == sum(key.endswith("running_mean") for key in state)
    if make is cream_autoformer:  # wider than what is searched
        return
    # Every number of the file is somewhere in the supernet.
    values = [v for key, v in state.items() if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert sum(v.numel() for v in values) == sum(p.numel() for p in supernet.parameters())


def test_a_supernets_own_weights_and_a_networks_load(tmp_path: Path) -> None:
    source, _, _ = once_for_all_mobilenet()
    target, _, _ = once_for_all_mobilenet()
    assert load_weights(target, save(source.state_dict(), tmp_path)) is None
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    raw = {f"model/{key}": value for key, value in source.state_dict().items()}
    load_weights(target, save(raw, tmp_path))
    averaged = {f"ema/{key}": value + 1 for key, value in source.state_dict().items()}
    load_weights(target, save(raw | averaged, tmp_path))
    assert all(torch.equal(a + 1, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    plain, _, _ = once_for_all_mobilenet(kernel_transform=False)
    network = plain.space.build(plain.space.references["largest"])
    stats = load_weights(plain, save(network.state_dict(), tmp_path))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(plain(x, plain.space.references["largest"], stats), network.eval()(x), atol=1e-5)


def test_names_of_ones_own(tmp_path: Path) -> None:
    plain, _, _ = once_for_all_mobilenet(kernel_transform=False)
    state = {key.replace("stem.conv", "entry").removeprefix("largest."): v for key, v in plain.state_dict().items()}
    path = save(state, tmp_path)
    load_weights(plain, path, names={"entry": "stem.conv"})
    with pytest.raises(UserError, match=r"entry\.weight: mobilenet_v3 has no entry\.weight"):
        load_weights(plain, path)


def test_modules_can_keep_their_weights(tmp_path: Path) -> None:
    supernet, state, _ = once_for_all_resnet()
    state["classifier.linear.linear.weight"] = torch.zeros(1000, 128)
    state["classifier.linear.linear.bias"] = torch.zeros(1000)
    path = save(state, tmp_path)
    before = supernet.get_parameter("largest.head.classifier.weight").clone()
    with pytest.raises(UserError, match=r"classifier\.linear\.linear\.bias: shape \(1000,\), but .*\(10,\)"):
        load_weights(supernet, path)
    load_weights(supernet, path, keep=["head.classifier"])
    assert torch.equal(supernet.get_parameter("largest.head.classifier.weight"), before)
    assert load_weights(supernet, path, keep=["head.classifier"]) is not None
    assert load_weights(supernet, path, keep=["head.classifier", "stem"]) is None  # some statistics are missing now
    with pytest.raises(UserError, match="keep: resnet has no module 'classifier'"):
        load_weights(supernet, path, keep=["classifier"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.conv.depth_conv.bn.bn.bias"),
         r"nothing in it for largest\.stages\.1\.0\.depthwise\.norm\.bias"),
        (lambda s: s.pop("final_expand_layer.bn.running_var"), r"running statistics, but none for head\.final\.norm"),
        (lambda s: s.update({"blocks.9.conv.point_linear.conv.conv.weight": torch.zeros(1)}),
         r"blocks\.9\.conv\.point_linear\.conv\.conv\.weight: mobilenet_v3 has no "),
        (lambda s: s.update({"first_conv.conv.weight": torch.zeros(16, 1, 3, 3)}),
         r"first_conv\.conv\.weight: shape \(16, 1, 3, 3\), but largest\.stem\.conv\.weight has \(16, 3, 3, 3\)"),
        (lambda s: s.update({"first_conv.bn.bias": torch.full((16,), torch.nan)}), r"first_conv\.bn\.bias: .* finite"),
        (lambda s: s.update({"first_conv.bn.bias": torch.zeros(16, dtype=torch.int64)}), r"bn\.bias: .* floating"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    change: Callable[[State], object], message: str, tmp_path: Path
) -> None:
    supernet, state, _ = once_for_all_mobilenet()
    change(state)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_weights(supernet, save(state, tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in supernet.state_dict().items())


def test_learned_kernels_are_never_dropped(tmp_path: Path) -> None:
    _, state, _ = once_for_all_mobilenet()
    plain, _, _ = once_for_all_mobilenet(kernel_transform=False)
    with pytest.raises(UserError, match="kernel_transform = true"):
        load_weights(plain, save(state, tmp_path))


def test_autoformers_classes_and_positions_are_not_cropped(tmp_path: Path) -> None:
    supernet, state, _ = cream_autoformer()
    for key, axis, name in (("head.bias", 0, "head.classifier.bias"), ("pos_embed", 1, "embedding.positions")):
        longer = {**state, key: torch.cat([state[key], state[key]], axis)}
        with pytest.raises(UserError, match=rf"{name}: shape .*, but largest\.{name} has"):
            load_weights(supernet, save(longer, tmp_path))
    del state["blocks.0.attn.rel_pos_embed_v.embeddings_table_h"]
    with pytest.raises(UserError, match=r"nothing in it for largest\.layers\.0\.attention\.value_positions"):
        load_weights(supernet, save(state, tmp_path))


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    supernet, _, _ = once_for_all_resnet()
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    with pytest.raises(UserError, match=r"weights\.pth: cannot read it as safetensors.*weights_only=True"):
        load_weights(supernet, path)
    with pytest.raises(UserError, match=r"absent: cannot read it"):
        load_weights(supernet, tmp_path / "absent")
