"""Networks of chains of blocks, as images and as signals, keep their operators on the way to a runtime."""

from pathlib import Path

import numpy as np
import pytest

from hardware_profiles import load_target
from hardware_profiles.onnx_runtime import OnnxConverter
from search_spaces import ChainSpace, SearchSpace, load_space, read_onnx

BLOCKS = {
    "attention": {"type": "attention", "head_width": 8},
    "gates": {"type": "squeeze_excite"},
    "separable": {"type": "separable", "squeeze": 0.25},
    "shuffle": {"type": "shuffle"},
}
STAGES = [{"width": 16, "stride": 2}, {"width": 24, "layers": 4}]


@pytest.mark.parametrize(
    "space",
    [
        ChainSpace(3, 4, blocks=BLOCKS, stages=STAGES, resolution=16, final_width=32, name="images"),
        load_space("sensor_1d", 6, 7, resolution=100),
    ],
    ids=["images", "signals"],
)
def test_an_exported_chain_computes_the_same_with_the_same_operators(space: SearchSpace, tmp_path: Path) -> None:
    chosen = {f"layer{i}": name for i, name in enumerate(["shuffle", *BLOCKS])}
    arch = space.encode(chosen) if space.name == "images" else space.sample(1, np.random.default_rng(3))[0]
    network = space.build(arch).eval()
    # The converter holds what the runtime computes against the network.
    artifact = OnnxConverter().convert(network, load_target("host"), network.input_shape, tmp_path / "n.onnx")
    pair = space.workload(arch), read_onnx(artifact.path)
    for kind in ("conv2d", "depthwise_conv2d", "matmul", "linear"):
        own, read = (sorted((op.kernel, op.stride, op.macs) for op in w.operators if op.kind == kind) for w in pair)
        assert own == read, kind
