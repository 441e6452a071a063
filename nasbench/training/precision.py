"""Where a network is trained and in which number format."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from nasbench.training.recipe import PrecisionName
from search_spaces.errors import UserError


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`, as torch writes it; `auto` is CUDA where it is present, else the CPU.

    Several processes of one machine (torch's launcher numbers them) take a CUDA device each.

    Raises:
        UserError: no such device, or none of this kind here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = "cuda"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device = {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device = {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device = {name!r}: torch finds {count} CUDA devices here; auto takes what is present")
        if device.index is None:
            from nasbench.training.processes import local_rank

            device = torch.device("cuda", local_rank() % count)
    return device


def device_of(model: object) -> torch.device:
    """Where a module's first parameter lies; the CPU for what has none."""
    if isinstance(model, nn.Module):
        for tensor in model.parameters():
            return tensor.device
    return torch.device("cpu")


class Precision:
    """The number format of forward and backward passes: float32, or mixed with bfloat16 or float16.

    Weights, their gradients, the optimiser and the loss stay float32. With float16 losses are scaled, and steps whose
    gradients overflow are skipped (Micikevicius et al., ICLR 2018).
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self._device = device
        self._dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """For forward passes. It holds for the thread that enters it, so every worker enters its own."""
        # A subnet uses a weight once: a cache of converted ones would only tie the threads' graphs together.
        return torch.autocast(
            self._device.type, self._dtype or torch.bfloat16, enabled=self._dtype is not None, cache_enabled=False
        )

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to take gradients of."""
        return self.scaler.scale(loss)
