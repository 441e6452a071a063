"""Dense predictions on the classic backbones: FCN-ResNet, the pose networks of trt_pose, and U-Net."""

from __future__ import annotations

from torch import Tensor, nn

from search_spaces.reference import densenet, resnet
from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import Branches, ConvBnAct, conv, initialise


def fcn_resnet(input_shape: InputShape, num_classes: int, *, block: str, depths: tuple[int, ...]) -> nn.Module:
    """Fully convolutional network with torchvision's head: class logits at a 32nd of the resolution."""
    layers, channels = resnet.backbone(input_shape[0], block, depths)
    head = (ConvBnAct(channels, channels // 4, 3), nn.Dropout(0.1), conv(channels // 4, num_classes))
    return initialise(nn.Sequential(*layers, *head))


class Attended(nn.Module):
    """Maps upsampled by transposed convolutions, gated by a convolution of themselves, projected to `cout`."""

    def __init__(self, cin: int, width: int, doublings: int, gate: nn.Module, cout: int) -> None:
        super().__init__()
        up: list[nn.Module] = []
        for _ in range(doublings):
            up += [nn.ConvTranspose2d(cin, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
            cin = width
        self.up = nn.Sequential(*up)
        self.gate = nn.Sequential(conv(width, width, 3), gate)
        self.project = conv(width, cout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.project(x * self.gate(x))


class PoseHead(nn.Module):
    """Confidence maps of the parts and affinity fields of the links between them."""

    def __init__(self, cin: int, parts: int, links: int) -> None:
        super().__init__()
        self.parts = Attended(cin, 256, 3, nn.Sigmoid(), parts)
        self.links = Attended(cin, 256, 3, nn.Tanh(), 2 * links)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.parts(x), self.links(x)


LINKS = 21  # of COCO's 18 human parts


def pose_resnet(input_shape: InputShape, num_classes: int, *, block: str, depths: tuple[int, ...]) -> nn.Module:
    """Pose network on ResNet; `num_classes` are the parts of a body."""
    layers, channels = resnet.backbone(input_shape[0], block, depths)
    return initialise(nn.Sequential(*layers, PoseHead(channels, num_classes, LINKS)))


def pose_densenet(
    input_shape: InputShape, num_classes: int, *, growth: int, stem: int, depths: tuple[int, ...]
) -> nn.Module:
    """Pose network on DenseNet, without ReLU after its last normalisation."""
    layers, channels = densenet.backbone(input_shape[0], growth, stem, depths)
    return initialise(nn.Sequential(*layers[:-1], PoseHead(channels, num_classes, LINKS)))


class Level(nn.Module):
    """One resolution of a U-Net: `down` to the next, everything `below`, `up` again, joined with the input."""

    def __init__(self, below: nn.Module, up: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.inner = Branches(nn.Identity(), nn.Sequential(nn.MaxPool2d(2, 2), below, up))
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x))


def unet(input_shape: InputShape, num_classes: int, *, widths: tuple[int, ...]) -> nn.Module:
    """U-Net (Ronneberger et al., MICCAI 2015) with padding and normalisation: logits per pixel.

    The sides of the input must be divisible by 2 to the power of the levels below the first.
    """

    def double(cin: int, cout: int) -> nn.Sequential:
        return nn.Sequential(ConvBnAct(cin, cout, 3), ConvBnAct(cout, cout, 3))

    module: nn.Module = nn.Identity()
    for i, width in reversed(list(enumerate(widths))):
        first = double(widths[i - 1] if i else input_shape[0], width)
        if i + 1 < len(widths):
            up = nn.ConvTranspose2d(widths[i + 1], width, 2, 2)
            module = nn.Sequential(first, Level(module, up, double(2 * width, width)))
        else:
            module = first
    return initialise(nn.Sequential(module, conv(widths[0], num_classes)))
