"""Vision transformers as a space: what is published, the attention by its definition, dropping, bf16, ONNX."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces import AutoFormerSpace, UserError, load_space
from search_spaces.autoformer_network import Attention, RelativePositions
from search_spaces.relative_attention import attend
from search_spaces.supernet import resize

PRESETS = ("autoformer_tiny", "autoformer_small", "autoformer_base")


def small(**options: Any) -> AutoFormerSpace:
    table: dict[str, Any] = {
        "widths": [16, 24], "depths": [1, 2, 3], "heads": [1, 2], "ratios": [1.5, 2],
        "resolution": 16, "patch": 4, "head_width": 8,
    }  # fmt: skip
    return AutoFormerSpace(2, 5, **{**table, **options})


def test_sizes_are_the_published_ones() -> None:
    assert load_space("autoformer_tiny").size == 3 * (4**12 + 4**13 + 4**14)
    assert load_space("autoformer_small").size == 3 * (9**12 + 9**13 + 9**14)
    base = load_space("autoformer_base")
    assert base.size == 3 * (9**14 + 9**15 + 9**16)
    # The paper's "more than 1.7 x 10^16" counts the layers beyond the depth as choices too.
    assert round(prod(base.cardinalities.tolist()) / 1e16, 1) == 1.7


@pytest.mark.parametrize("name", PRESETS)
def test_references_have_their_published_costs(name: str) -> None:
    text = {"autoformer_tiny": {"ratios": [3.0, 3.5, 4.0]}}.get(name, {})
    ((reference, published),) = load_space(name, **text).published.items()
    assert published.options == text
    space = load_space(name, **published.options)
    workload = space.workload(space.references[reference])
    assert isinstance(published.params, str)
    # Rounded to a decimal, that of AutoFormer-T (5.868) downwards.
    assert abs(workload.params / 1e6 - float(published.params.removesuffix("M"))) < 0.1
    # The figures do not say how they count relative positions: without them it would be 1.28, 4.77 and 11.05, with one
    # embedding per pair of tokens 1.48, 5.16 and 11.69.
    assert isinstance(published.macs, str)
    assert abs(workload.macs / 1e9 / float(published.macs.removesuffix("G")) - 1) < 0.08


def test_references_that_a_space_does_not_offer_are_left_out() -> None:
    assert "autoformer_t" not in load_space("autoformer_tiny").references
    assert not load_space("autoformer_small", depths=[12]).published


def test_attention_follows_its_definition() -> None:
    """One embedding per pair of tokens, as the paper's equations and the family's own code have it."""
    torch.manual_seed(0)
    grid, reach, heads, d, batch, width = 5, 2, 3, 8, 2, 12
    positions = RelativePositions(grid, reach)
    layer = Attention(width, heads, d, positions).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    n = positions.positions
    x = torch.randn(n * batch, width, dtype=torch.double)

    def pairs(table: Tensor) -> Tensor:
        place = torch.arange(grid**2)
        vertical = place // grid - (place // grid)[:, None]
        horizontal = place % grid - (place % grid)[:, None]
        index = [F.pad(i.clamp(-reach, reach) + reach + 1, (1, 0, 1, 0)) for i in (vertical, horizontal)]
        return table[0][index[0]] + table[1][index[1]]

    normed = F.layer_norm(x, (width,), layer.norm.weight, layer.norm.bias)
    q, k, v = layer.qkv(normed).view(n, batch, heads, 3, d).permute(3, 1, 2, 0, 4)
    logits = torch.einsum("bhid,ijd->bhij", q, pairs(layer.key_positions)) + q @ k.transpose(2, 3)
    weights = (logits / d**0.5).softmax(-1)
    y = weights @ v + torch.einsum("bhij,ijd->bhid", weights, pairs(layer.value_positions))
    expected = x + layer.project(y.permute(2, 0, 1, 3).reshape(n * batch, heads * d))
    positions.members = positions.members.double()
    assert torch.allclose(layer(x, heads, lambda y, rate: y), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_the_attention_are_right(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    positions = RelativePositions(3, 1)
    n, groups = positions.members.shape
    members = positions.members.to(dtype)
    qkv, keys, values = (torch.randn(shape, dtype=dtype) for shape in ((n, 4, 3, 8), (n, groups, 8), (n, groups, 8)))
    results = []
    for plain in (True, False):
        parts = [t.clone().requires_grad_() for t in (qkv, keys, values)]
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
            y = attend(*parts, members)
        gradient = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        results.append([y, *torch.autograd.grad(y, parts, gradient)])
    for expected, given in zip(*results, strict=True):
        torch.testing.assert_close(given, expected)
    assert results[0][0].grad_fn.name() != results[1][0].grad_fn.name()


def test_a_subnet_uses_leading_heads() -> None:
    space = small()
    supernet, arch = space.supernet(), space.references["smallest"]
    x = torch.randn(2, 2, 16, 16)
    before = supernet(x, arch)
    with torch.no_grad():
        qkv = supernet.get_parameter("largest.layers.0.attention.qkv.weight")
        qkv[3 * 8 :] += 1  # queries, keys and values of the second head
        qkv[:, 16:] += 1
    assert torch.equal(supernet(x, arch), before)
    with torch.no_grad():
        qkv[3 * 8 - 1] += 1
    assert not torch.equal(supernet(x, arch), before)


def test_dropped_branches_are_dropped_for_whole_samples_in_training_alone() -> None:
    torch.manual_seed(0)
    space = small(depths=[2], drop_path=0.5)
    assert [layer.drop_path for layer in space.spec(space.references["largest"]).layers] == [0.0, 0.5]
    supernet, arch, x = space.supernet(), space.references["largest"], torch.randn(64, 2, 16, 16)
    with torch.no_grad():
        for parameter in supernet.largest.layers[0].parameters():
            parameter.zero_()  # the first layer does nothing
        plain = supernet.eval()(x, arch)
        same = supernet.train()(x, arch, generator=torch.Generator().manual_seed(1))
        again = supernet(x, arch, generator=torch.Generator().manual_seed(1))
        without = small(depths=[1]).supernet().eval()
        without.largest.load_state_dict(supernet.largest.state_dict(), strict=False)
        skipped = torch.isclose(same, without(x, without.space.references["largest"]), atol=1e-6).all(1)
    assert torch.equal(same, again)
    assert 4 <= int(skipped.sum()) <= 28  # both branches of a quarter of the samples, on average
    assert not torch.equal(plain, same)
    network = supernet.extract(arch, supernet.calibrate(arch, []))
    with torch.no_grad():
        assert torch.allclose(network(x), plain, atol=1e-5)
        assert not torch.allclose(network.train()(x), plain, atol=1e-5)


def test_images_of_another_size_are_resized() -> None:
    space = small()
    supernet, arch, x = space.supernet(), space.references["largest"], torch.randn(2, 2, 20, 20)
    assert torch.equal(supernet(x, arch), supernet(resize(x, 16), arch))
    weights = [F.one_hot(torch.tensor(int(c)), len(k.choices)).float() for c, k in zip(arch, space.knobs, strict=True)]
    mixture = space.mixture_supernet()
    assert torch.equal(mixture(x, weights), mixture(resize(x, 16), weights))


def test_dropout_is_proportional_to_the_width() -> None:
    space = small(dropout=0.3)
    assert space.spec(space.references["largest"]).dropout == pytest.approx(0.3)
    assert space.spec(space.references["smallest"]).dropout == pytest.approx(0.2)


def test_trains_in_bfloat16() -> None:
    torch.manual_seed(0)
    space = small()
    supernet, arch, x = space.supernet(), space.references["largest"], torch.randn(4, 2, 16, 16)
    plain = supernet(x, arch)
    with torch.autocast("cpu", torch.bfloat16):
        logits = supernet(x, arch)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - plain).abs().max() < 0.03 * plain.abs().max()
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in supernet.parameters())


def test_exports_to_onnx(tmp_path: Path) -> None:
    import onnxruntime

    from hardware_profiles.onnx_runtime import write_onnx

    torch.manual_seed(0)
    space = load_space("autoformer_tiny", 3, 10, resolution=64, depths=[2, 3])
    supernet, arch = space.supernet(), space.sample(1, np.random.default_rng(0))[0]
    network = supernet.extract(arch, supernet.calibrate(arch, []))
    x = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    write_onnx(network, x, tmp_path / "vit.onnx")
    (output,) = onnxruntime.InferenceSession(tmp_path / "vit.onnx").run(None, {"input": x})
    with torch.no_grad():
        np.testing.assert_allclose(output, network(torch.from_numpy(x)).numpy(), rtol=1e-3, atol=1e-5)
    assert (tmp_path / "vit.onnx").stat().st_size < 1.2 * 4 * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 18}, "resolution must be a multiple of patch = 4, got 18"),
        ({"heads": [2, 1]}, "heads: choices must be at least one, distinct and in ascending order"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"references": {"mine": {"width": 16, "heads": [1, 1], "ratios": [2]}}}, "one value per layer, got 2 and 1"),
        ({"references": {"mine": {"wdith": 16, "heads": [1], "ratios": [2]}}}, "Did you mean 'width'"),
    ],
)
def test_says_what_is_wrong_with_a_table(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**options)
