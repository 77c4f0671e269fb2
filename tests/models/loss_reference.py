"""The cross-entropy of an output head in float64, written as the formula says: what the loss is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from truthgpt.models.linear_cross_entropy import OutputHead


def reference_loss(hidden: torch.Tensor, head: OutputHead, labels: torch.Tensor) -> torch.Tensor:
    """Summed over the labels that are not -100, in float64; differentiable."""
    bias = None if head.bias is None else head.bias.double()
    logits = F.linear(hidden.double(), head.weight.double(), bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def reference_gradients(
    hidden: torch.Tensor, head: OutputHead, labels: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss, and the gradients of `factor` times it by hidden states, weight and, where there is one, bias."""
    leaves = [hidden, head.weight, *([] if head.bias is None else [head.bias])]
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = OutputHead(leaves[1], None if head.bias is None else leaves[2], head.scale, head.softcap)
    loss = reference_loss(leaves[0], exact, labels)
    return loss.detach(), list(torch.autograd.grad(loss * factor, leaves))
