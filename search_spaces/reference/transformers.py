"""DeiT (Touvron et al., ICML 2021) and MobileViT (Mehta and Rastegari, ICLR 2022)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.errors import UserError
from search_spaces.mobilenet_v3_spec import make_divisible
from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import ConvBnAct, InvertedResidual, Residual, classifier, initialise


class Attention(nn.Module):
    """Multi-head self-attention over `(batch, tokens, width)`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SplitAttention(nn.Module):
    """Multi-head self-attention whose queries, keys and values come from layers of their own.

    As many parameters and multiply-accumulates as `Attention`; the leading channels of all three make a narrower one.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (self.query(x), self.key(x), self.value(x))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _encoder(
    width: int,
    heads: int,
    hidden: int,
    activation: type[nn.Module],
    eps: float,
    attention: type[nn.Module] = Attention,
) -> nn.Module:
    """Pre-normalised attention and two-layer perceptron, each with its shortcut."""
    perceptron = nn.Sequential(
        nn.LayerNorm(width, eps), nn.Linear(width, hidden), activation(), nn.Linear(hidden, width)
    )
    gather = nn.Sequential(nn.LayerNorm(width, eps), attention(width, heads))
    return nn.Sequential(Residual(gather), Residual(perceptron))


class VisionTransformer(nn.Module):
    """Patches and a class token with learned positions, encoders, classifier on the class token."""

    def __init__(
        self, input_shape: InputShape, num_classes: int, width: int, heads: int, depth: int, patch: int = 16
    ) -> None:
        super().__init__()
        channels, *size = input_shape
        if any(s % patch for s in size):
            raise UserError(f"vision transformer: height and width must be multiples of {patch}, got {tuple(size)}")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, math.prod(s // patch for s in size) + 1, width))
        self.encoders = nn.Sequential(*(_encoder(width, heads, 4 * width, nn.GELU, 1e-6) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.classifier = nn.Linear(width, num_classes)
        initialise(self)
        for learned in (self.token, self.positions):
            nn.init.trunc_normal_(learned, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.classifier(self.norm(self.encoders(x))[:, 0])


def deit(input_shape: InputShape, num_classes: int, *, width: int, heads: int, depth: int = 12) -> nn.Module:
    """DeiT without a distillation token."""
    return VisionTransformer(input_shape, num_classes, width, heads, depth)


class MobileVitBlock(nn.Module):
    """Local features by a 3x3 convolution, global ones by transformers over the pixels of equal place in a patch.

    Args:
        width: of the tokens.
        ratio: hidden width of the transformers' perceptrons, as a multiple of `width`.
        attention: the attention's module, made with a width and a number of heads.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        heads: int = 4,
        patch: int = 2,
        ratio: float = 2,
        attention: type[nn.Module] = Attention,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.local = nn.Sequential(
            ConvBnAct(channels, channels, 3, activation="silu"), nn.Conv2d(channels, width, 1, bias=False)
        )
        self.encoders = nn.Sequential(
            *(_encoder(width, heads, int(ratio * width), nn.SiLU, 1e-5, attention) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width, 1e-5)
        self.project = ConvBnAct(width, channels, activation="silu")
        self.fuse = ConvBnAct(2 * channels, channels, 3, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        y, p = self.local(x), self.patch
        size = y.shape[-2:]
        rows, columns = (math.ceil(s / p) for s in size)
        if (rows * p, columns * p) != tuple(size):
            y = F.interpolate(y, (rows * p, columns * p), mode="bilinear", align_corners=False)
        # (batch, width, rows, p, columns, p) -> (batch * p * p, rows * columns, width): pixels attend across patches.
        batch, width = y.shape[:2]
        y = y.reshape(batch, width, rows, p, columns, p).permute(0, 3, 5, 2, 4, 1)
        y = self.norm(self.encoders(y.reshape(batch * p * p, rows * columns, width)))
        y = y.reshape(batch, p, p, rows, columns, width).permute(0, 5, 3, 1, 4, 2)
        y = y.reshape(batch, width, rows * p, columns * p)
        if y.shape[-2:] != size:
            y = F.interpolate(y, tuple(size), mode="bilinear", align_corners=False)
        return self.fuse(torch.cat([x, self.project(y)], 1))


def mobilevit(
    input_shape: InputShape,
    num_classes: int,
    *,
    channels: tuple[int, ...],
    widths: tuple[int, ...],
    depths: tuple[int, ...] = (2, 4, 3),
    expansion: float = 4,
    final: int,
) -> nn.Module:
    """Stem, two stages of inverted residuals, three that end in a MobileViT block, final convolution, classifier.

    Args:
        channels: of the stem and of the five stages.
        widths, depths: of the transformers in the last three stages.
        final: channels of the last 1x1 convolution.
    """

    def inverted(cin: int, cout: int, stride: int) -> nn.Module:
        return InvertedResidual(cin, make_divisible(cin * expansion), cout, 3, stride, activation="silu")

    stem, first, second, *others = channels
    layers: list[nn.Module] = [ConvBnAct(input_shape[0], stem, 3, 2, activation="silu"), inverted(stem, first, 1)]
    layers += [inverted(first, second, 2), inverted(second, second, 1), inverted(second, second, 1)]
    cin = second
    for cout, width, depth in zip(others, widths, depths, strict=True):
        layers += [inverted(cin, cout, 2), MobileVitBlock(cout, width, depth)]
        cin = cout
    layers += [ConvBnAct(cin, final, activation="silu"), classifier(final, num_classes, 0.1)]
    return initialise(nn.Sequential(*layers))
