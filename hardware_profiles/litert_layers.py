"""Torch modules that compute what others do in a way that LiteRT's converter knows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class CroppedConvTranspose2d(nn.Module):
    """A transposed convolution without padding, of whose output the edges are cut off: the same values.

    Args:
        module: one that `fits`; its parameters are shared.
    """

    def __init__(self, module: nn.ConvTranspose2d) -> None:
        super().__init__()
        self.module = module

    @staticmethod
    def fits(module: nn.ConvTranspose2d) -> bool:
        """Whether its padding is neither none nor TensorFlow's `SAME`, and cropping gives the same."""
        if isinstance(module.padding, str) or module.dilation != (1, 1):
            return False
        sides = list(zip(module.kernel_size, module.stride, module.padding, module.output_padding, strict=True))
        known = all(out == 0 and 2 * pad in (0, kernel - stride) for kernel, stride, pad, out in sides)
        return not known and all(out <= pad for _, _, pad, out in sides)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, height, width)` to what the module gives for it."""
        m = self.module
        y = F.conv_transpose2d(x, m.weight, m.bias, m.stride, groups=m.groups)
        top, left = (int(side) for side in m.padding)
        below, beside = m.output_padding
        return y[:, :, top : y.shape[2] - top + below, left : y.shape[3] - left + beside]
