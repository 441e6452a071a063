"""Depthwise convolutions with a weight gradient in strips, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces import depthwise
from search_spaces.depthwise import depthwise_conv2d, fast_depthwise, weight_gradient


def case(channels: int, size: int, kernel: int, stride: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    out = F.conv2d(x, weight, None, stride, kernel // 2, 1, channels)
    return x, weight, torch.randn(out.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 4, 5, 7, 9])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 17])
def test_weight_gradient_is_that_of_torch(
    size: int, kernel: int, stride: int, memory_format: torch.memory_format
) -> None:
    x, weight, grad = case(6, size, kernel, stride)
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, None, stride, kernel // 2, 1, 6), weight, grad)
    x = x.contiguous(memory_format=memory_format)
    torch.testing.assert_close(
        weight_gradient(x, grad, (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2)), expected
    )


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_any_padding_will_do(padding: int) -> None:
    x, weight, _ = case(4, 9, 5, 1)
    out = F.conv2d(x, weight, None, 2, padding, 1, 4)
    (expected,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(weight_gradient(x, torch.ones_like(out), (5, 5), (2, 2), (padding, padding)), expected)


def test_one_dimension_will_do() -> None:
    x = torch.randn(3, 4, 1, 20, dtype=torch.float64)
    weight = torch.randn(4, 1, 1, 7, dtype=torch.float64, requires_grad=True)
    out = F.conv2d(x, weight, None, (1, 2), (0, 3), 1, 4)
    (expected,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(weight_gradient(x, torch.ones_like(out), (1, 7), (1, 2), (0, 3)), expected)


def test_parts_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, grad = case(4, 8, 5, 1, batch=7)
    whole = weight_gradient(x, grad, (5, 5), (1, 1), (2, 2))
    monkeypatch.setattr(depthwise, "_PART", 2 * x[0].numel() * x.element_size())
    torch.testing.assert_close(weight_gradient(x, grad, (5, 5), (1, 1), (2, 2)), whole)


def test_training_sees_the_gradients_of_torch() -> None:
    x, weight, grad = (t.detach().float() for t in case(8, 8, 7, 2))
    results = []
    for conv in (depthwise_conv2d, lambda x, w, s, p: F.conv2d(x, w, None, s, p, 1, 8)):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = conv(*inputs, (2, 2), (3, 3))
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert "Depthwise" in type(depthwise_conv2d(*inputs, (2, 2), (3, 3)).grad_fn).__name__


def test_what_the_strips_do_not_serve_is_torchs_own() -> None:
    x, weight, _ = (t.detach().float() for t in case(8, 8, 5, 1))
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv2d(x, weight, (1, 1), (2, 2)).dtype == torch.bfloat16
    with torch.no_grad():
        assert depthwise_conv2d(x, weight, (1, 1), (2, 2)).grad_fn is None
    narrow = weight[:, :, 1:4, 1:4].detach().requires_grad_()
    assert "Depthwise" not in type(depthwise_conv2d(x, narrow, (1, 1), (1, 1)).grad_fn).__name__


def test_one_channel_that_becomes_many_is_no_depthwise_convolution() -> None:
    x, weight = torch.randn(2, 1, 9, 9), torch.randn(4, 1, 5, 5, requires_grad=True)
    out = depthwise_conv2d(x, weight, (1, 1), (2, 2))
    torch.testing.assert_close(out, F.conv2d(x, weight, None, 1, 2))
    torch.autograd.grad(out.sum(), weight)


def test_a_network_is_plain_again_afterwards() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 5, 1, 2, groups=8, bias=False), nn.Conv2d(8, 8, 5, 1, 2, groups=8)
    )
    x = torch.randn(2, 3, 12, 12)
    plain = network(x)
    plain.sum().backward()
    expected = [p.grad for p in network.parameters()]
    network.zero_grad()
    with pytest.raises(ZeroDivisionError), fast_depthwise(network):
        changed = [module for module in network if "forward" in vars(module)]
        out = network(x)
        out.sum().backward()
        raise ZeroDivisionError
    assert changed == [network[1]]
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close([p.grad for p in network.parameters()], expected, rtol=1e-4, atol=1e-3)
    assert not any("forward" in vars(module) for module in network)
