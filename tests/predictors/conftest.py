from collections.abc import Callable

import pytest

from search_spaces import MobileNetV3Space, Tensor, Workload, WorkloadBuilder


class Emitter:
    """Writes convolutional networks as workloads, following the tensor written last."""

    def __init__(self, resolution: int) -> None:
        self.builder = WorkloadBuilder()
        self.last = self.builder.input(Tensor((3, resolution, resolution)))

    def conv(self, out: int, kernel: int, stride: int = 1, depthwise: bool = False) -> None:
        channels, size, _ = self.builder.tensors[self.last].shape
        groups = channels if depthwise else 1
        self.last = self.builder.add(
            "depthwise_conv2d" if depthwise else "conv2d", [self.last], (out, -(-size // stride), -(-size // stride)),
            kernel=(kernel, kernel), stride=(stride, stride), groups=groups,
            params=out * channels // groups * kernel**2,
        )  # fmt: skip

    def add(self, other: int) -> None:
        self.last = self.builder.add("add", [self.last, other], self.builder.tensors[self.last].shape)

    def finish(self) -> Workload:
        channels = self.builder.tensors[self.last].shape[0]
        self.last = self.builder.add("global_avg_pool", [self.last], (channels,))
        self.last = self.builder.add("linear", [self.last], (1000,), params=1000 * channels + 1000)
        return self.builder.build([self.last])


def mobilenet_v1(resolution: int) -> Workload:
    """Howard et al., 2017, table 1."""
    net = Emitter(resolution)
    net.conv(32, 3, 2)
    for out, stride in [
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    ]:
        net.conv(net.builder.tensors[net.last].shape[0], 3, stride, depthwise=True)
        net.conv(out, 1)
    return net.finish()


def mobilenet_v2(resolution: int) -> Workload:
    """Sandler et al., CVPR 2018, table 2."""
    net = Emitter(resolution)
    net.conv(32, 3, 2)
    for t, out, n, s in [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]:
        for i in range(n):
            source, channels = net.last, net.builder.tensors[net.last].shape[0]
            if t > 1:
                net.conv(t * channels, 1)
            net.conv(t * channels, 3, s if i == 0 else 1, depthwise=True)
            net.conv(out, 1)
            if i:
                net.add(source)
    net.conv(1280, 1)
    return net.finish()


def resnet50(resolution: int) -> Workload:
    """He et al., CVPR 2016, table 1; the stride in the 3x3 convolution."""
    net = Emitter(resolution)
    net.conv(64, 7, 2)
    channels, size, _ = net.builder.tensors[net.last].shape
    net.last = net.builder.add(
        "max_pool2d", [net.last], (channels, -(-size // 2), -(-size // 2)), kernel=(3, 3), stride=(2, 2)
    )
    for width, n, s in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for i in range(n):
            source = net.last
            net.conv(width, 1)
            net.conv(width, 3, s if i == 0 else 1)
            net.conv(4 * width, 1)
            branch = net.last
            if i == 0:
                net.last = source
                net.conv(4 * width, 1, s)
                source = net.last
            net.last = branch
            net.add(source)
    return net.finish()


@pytest.fixture(scope="session")
def published() -> dict[str, Callable[[int], Workload]]:
    """The networks that profiles quote latencies of: name -> workload at a resolution."""

    def large(resolution: int) -> Workload:
        from search_spaces import load_space

        space = load_space("mobilenet_v3_large", resolutions=[resolution])
        return space.workload(space.encode({space.knobs[0].name: space.knobs[0].choices[0]}))

    return {
        "MobileNetV1 1.0": mobilenet_v1,
        "MobileNetV2 1.0": mobilenet_v2,
        "MobileNetV3-Large 1.0": large,
        "ResNet-50": resnet50,
    }


@pytest.fixture(scope="session")
def small_space() -> MobileNetV3Space:
    """240 architectures: optional blocks, kernels, expansions and resolutions."""
    return MobileNetV3Space(
        3, 10, stem_width=8, final_width=16, feature_width=16, resolutions=[16, 24], name="small",
        stages=[
            {"width": 8, "stride": 2, "depths": [1, 2], "kernels": [3, 5], "expansions": [2, 3], "se": True},
            {"width": 16, "kernels": [3, 5, 7], "expansions": [2, 3], "activation": "hard_swish"},
        ],
    )  # fmt: skip
