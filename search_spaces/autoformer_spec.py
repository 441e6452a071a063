"""One concrete network of an AutoFormer space as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One transformer layer.

    Args:
        heads: of the attention.
        hidden: width of the two-layer perceptron.
        drop_path: probability that a sample skips a branch of the layer in training.
    """

    heads: int
    hidden: int
    drop_path: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """One network: everything that its modules are made from.

    Args:
        in_channels, resolution: of the input image.
        patch: edge of a patch in pixels; divides the resolution.
        width: embedding dimension of the tokens.
        layers: one after the other.
        head_width: width of queries, keys and values per head.
        reach: distance in patches from which relative positions are told apart no longer.
        classes: width of the output.
        dropout: probability after the embedding and after each linear layer of a branch, in training.
    """

    in_channels: int
    resolution: int
    patch: int
    width: int
    layers: tuple[LayerSpec, ...]
    head_width: int
    reach: int
    classes: int
    dropout: float = field(default=0.0, compare=False)

    @property
    def grid(self) -> int:
        """Patches per edge."""
        return self.resolution // self.patch

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)`."""
        return self.in_channels, self.resolution, self.resolution
