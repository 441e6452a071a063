"""Convolutions, then attention: the published networks, the elastic attention, ONNX, and what a table must say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_spaces import MobileHybridSpace, UserError, calibrate, load_space, reference_network, trace

STAGES: list[dict[str, Any]] = [
    {"widths": [8, 16]},
    {"widths": [16], "stride": 2, "token_widths": [8, 16], "layers": [1, 2], "ratios": [1.5, 2]},
]


def small(**options: Any) -> MobileHybridSpace:
    table: dict[str, Any] = {"stages": STAGES, "resolutions": [16], "stem_width": 8, "final_widths": [16], "heads": 2}
    table["dropout"] = 0.0
    return MobileHybridSpace(3, 5, **{**table, **options})


def test_published_networks_are_in_it() -> None:
    space = load_space("mobile_hybrid")
    # Parameters as timm counts them, multiply-accumulates as this library's own MobileViT has them.
    counts = {"mobilevit_xxs": 1_272_024, "mobilevit_xs": 2_317_848, "mobilevit_s": 5_578_632}
    for name, params in counts.items():
        assert space.workload(space.references[name]).params == params
    own = trace(reference_network("mobilevit_s").build(), (3, 256, 256))
    assert space.workload(space.references["mobilevit_s"]).macs == own.macs
    assert set(space.published) == set(counts)
    assert not load_space("mobile_hybrid", resolutions=[64]).published


def test_subnets_of_the_attention_use_leading_layers_and_channels() -> None:
    space = small()
    supernet, x = space.supernet(), torch.randn(4, 3, 16, 16)
    narrow = space.references["smallest"]
    before = supernet(x, narrow)
    with torch.no_grad():
        query = supernet.get_parameter("largest.stage1_attention.shared.encoders.0.0.body.1.query.weight")
        assert query.shape == (16, 16)
        query[8:] += 1
        query[:, 8:] += 1
        for name, parameter in supernet.named_parameters():
            if ".encoders.1." in name:
                parameter += 1
    assert torch.equal(supernet(x, narrow), before)
    with torch.no_grad():
        query[7, 7] += 1
    assert not torch.equal(supernet(x, narrow), before)


def test_exports_to_onnx(tmp_path: Path) -> None:
    import onnxruntime

    from hardware_profiles.onnx_runtime import write_onnx

    torch.manual_seed(0)
    space = small(resolutions=[16, 24])
    supernet, arch = space.supernet(), space.references["largest"]
    network = supernet.extract(arch, calibrate(supernet, arch, torch.randn(8, 3, 24, 24)))
    x = np.random.default_rng(0).normal(size=(1, 3, 24, 24)).astype(np.float32)
    write_onnx(network, x, tmp_path / "hybrid.onnx")
    (output,) = onnxruntime.InferenceSession(tmp_path / "hybrid.onnx").run(None, {"input": x})
    with torch.no_grad():
        np.testing.assert_allclose(output, network(torch.from_numpy(x)).numpy(), rtol=1e-3, atol=1e-5)


def changed(stage: int, **fields: Any) -> dict[str, Any]:
    return {"stages": [{**each, **fields} if i == stage else each for i, each in enumerate(STAGES)]}


REFERENCE = {
    "resolution": 16, "widths": [8, 16], "depths": [1, 1], "token_widths": [8], "layers": [1], "final_width": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "stages.1.token_widths: heads = 3 does not divide 8"),
        (changed(0, kernels=[3, 4]), "kernels must be odd"),
        (changed(0, layers=[2]), "give token_widths too"),
        (changed(1, token_widths=[16, 8]), "ascending order"),
        (changed(1, token_width=[8]), "unknown key 'stages.1.token_width'. Did you mean 'token_widths'"),
        ({"references": {"mine": {**REFERENCE, "depths": [1]}}}, "references.mine.depths: needs 2 values, got 1"),
    ],
)
def test_says_what_is_wrong_with_a_table(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**options)
