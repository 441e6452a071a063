"""Self-attention with relative positions, computed by matrix products that read and write tokens in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attend(qkv: Tensor, keys: Tensor, values: Tensor, members: Tensor) -> Tensor:
    """What tokens gather: `softmax(q (k + r) / sqrt(D)) (v + r')`, `(tokens, batch * heads, D)`.

    A query sees other tokens in G groups that may overlap, and the relative positions `r` and `r'` of a token are the
    sums of the embeddings of its groups. So queries are multiplied with G embeddings instead of one per token, and the
    products spread over the groups' members; weights are summed over the members, and the sums multiplied with the
    embeddings.

    On processors, where gradients are wanted, they are computed by hand, in two thirds of the time and without a second
    derivative.

    Args:
        qkv: `(tokens, batch * heads, 3, D)`, queries, keys and values.
        keys, values: `(tokens, G, D)` embeddings of the groups that each token sees.
        members: `(tokens, G)`, one where a token is in a group.
    """
    # As autocast would have it, once for all products.
    keys, values, members = (t.to(qkv.dtype) for t in (keys * qkv.shape[-1] ** -0.5, values, members))
    exported = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if qkv.device.type == "cpu" and torch.is_grad_enabled() and qkv.requires_grad and not exported:
        result: Tensor = _Attend.apply(qkv, keys, values, members)
        return result
    q, k, v = qkv.unbind(2)
    spread = torch.matmul(torch.bmm(q, keys.transpose(1, 2)).transpose(0, 1), members.t())
    logits = torch.baddbmm(spread, q.transpose(0, 1), k.permute(1, 2, 0), alpha=qkv.shape[-1] ** -0.5)
    weights = logits.softmax(-1)
    # Contiguous, or exporters that take `baddbmm` apart would have a result in the order of `gathered`.
    gathered = torch.bmm(weights, v.transpose(0, 1)).transpose(0, 1).contiguous()
    return torch.baddbmm(gathered, torch.matmul(weights, members).transpose(0, 1), values)


class _Attend(torch.autograd.Function):
    """`attend` with scaled keys, and its gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, keys: Tensor, values: Tensor, members: Tensor) -> Tensor:
        tokens, batch, _, width = qkv.shape
        q, k, v = _by_sample(qkv)
        spread = torch.bmm(qkv[:, :, 0], keys.transpose(1, 2)).transpose(0, 1).reshape(batch * tokens, -1)
        logits = torch.mm(spread, members.t()).view(batch, tokens, tokens)
        weights = logits.baddbmm_(q, k.transpose(1, 2), alpha=width**-0.5).softmax(-1)
        sums = torch.mm(weights.view(-1, tokens), members).view(batch, tokens, -1)
        ctx.save_for_backward(qkv, q, k, v, keys, values, members, weights, sums)
        return torch.bmm(sums.transpose(0, 1), values).add_(torch.bmm(weights, v).transpose(0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        qkv, q, k, v, keys, values, members, weights, sums = ctx.saved_tensors
        tokens, batch, _, width = qkv.shape
        scale = width**-0.5
        (own,) = _by_sample(grad.unsqueeze(2))
        d_values = torch.bmm(sums.permute(1, 2, 0), grad)
        d_sums = torch.bmm(grad, values.transpose(1, 2)).transpose(0, 1).reshape(batch * tokens, -1)
        d_weights = torch.mm(d_sums, members.t()).view(batch, tokens, tokens).baddbmm_(own, v.transpose(1, 2))
        d_logits = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_spread = torch.mm(d_logits.view(-1, tokens), members).view(batch, tokens, -1).transpose(0, 1)
        d_keys = torch.bmm(d_spread.transpose(1, 2), qkv[:, :, 0])
        d_qkv = torch.empty_like(qkv)
        by_keys = torch.bmm(d_logits, k).transpose(0, 1)
        torch.add(torch.bmm(d_spread, keys), by_keys, alpha=scale, out=d_qkv[:, :, 0])
        torch.mul(torch.bmm(d_logits.transpose(1, 2), q).transpose(0, 1), scale, out=d_qkv[:, :, 1])
        d_qkv[:, :, 2] = torch.bmm(weights.transpose(1, 2), own).transpose(0, 1)
        return d_qkv, d_keys, d_values, None


def _by_sample(tensors: Tensor) -> list[Tensor]:
    """`(tokens, batch, n, D)` as n tensors `(batch, tokens, D)`: views where products take them, else copies."""
    views = [t.transpose(0, 1) for t in tensors.unbind(2)]
    return views if tensors.dtype == torch.float32 else [view.contiguous() for view in views]
