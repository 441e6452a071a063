"""An exponential moving average of weights, which is what is judged and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Weights averaged over the steps of a training, with decay `min(decay, (1 + t) / (10 + t))` at step t.

    The warm-up of the decay, as in TensorFlow's `ExponentialMovingAverage`, lets go of the initial weights early.
    Buffers that are no floating point numbers (counters) are taken as they are.

    Args:
        model: on the device where it is trained.
        decay: per step; 0 keeps no average, and all methods leave the model as it is.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self.tensors: dict[str, Tensor] = (
            {n: t.detach().clone() for n, t in model.state_dict().items()} if decay else {}
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` finished steps."""
        if not self.decay:
            return
        keep = min(self.decay, (1 + step) / (10 + step))
        own = self._model.state_dict()
        floating = [n for n, t in self.tensors.items() if t.is_floating_point()]
        torch._foreach_lerp_([self.tensors[n] for n in floating], [own[n] for n in floating], 1 - keep)
        for name in self.tensors.keys() - set(floating):
            self.tensors[name].copy_(own[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights; its own come back afterwards, to the bit."""
        own = {n: t.clone() for n, t in self._model.state_dict().items()} if self.decay else {}
        self.put()
        try:
            yield
        finally:
            self._copy(own)

    def put(self) -> None:
        """Leave the averaged weights in the model."""
        self._copy(self.tensors)

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        target = self._model.state_dict()
        for name, tensor in source.items():
            target[name].copy_(tensor)
