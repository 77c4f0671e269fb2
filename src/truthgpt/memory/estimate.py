"""The memory of a training step, from what its parts are: bytes at the peak, and when that is.

A step has five moments that can be its peak. At the end of the forward pass all activations are there, and the loss
holds a chunk of logits and the head's gradient. In the backward pass activations go and gradients come: the peak is at
its start, where checkpointed layers begin, or at its end. In the update all gradients are there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from truthgpt.memory.activations import Activations
from truthgpt.memory.base import MemoryEstimate, MemoryPlan
from truthgpt.models.linear_cross_entropy import CHUNK_BYTES, DEFAULT_CHUNK_BYTES, VOCAB_MULTIPLE

MIB = 2**20
LIBRARY_BYTES = 64 * MIB
"""What cuBLAS and cuDNN take from torch's allocator for their own use."""
BACKWARD_TENSORS, COMPILED_BACKWARD_TENSORS = 3, 2
"""Tensors as large as a layer's largest that its backward pass holds beside what was kept: the gradients around an
MLP's activation. A compiled one writes one of them over what it no longer needs."""


@dataclass(frozen=True)
class Held:
    """Bytes that are there in every moment of a step (gradients: from the backward pass on)."""

    weights: int
    gradients: int
    summed_gradients: int
    """The gradients of several micro-batches: float32."""
    layer_share: float
    """The part of the gradients that belongs to the decoder layers."""
    optimizer: int
    average: int


@dataclass(frozen=True)
class Head:
    """The output head: `vocab x width`, its weights in `weight_bytes` each, products in `compute_bytes`."""

    vocab: int
    width: int
    trained: bool
    weight_bytes: int
    compute_bytes: int
    hidden_bytes: int
    """A value of the last hidden states."""
    whole_logits: bool
    """All logits of a micro-batch exist at once: the model's head is more than a layer."""


@dataclass(frozen=True)
class StepMemory:
    """All that the memory of a step depends on, save the plan.

    Attributes:
        length: tokens a row.
    """

    layers: int
    length: int
    device_type: str
    compiled: bool
    held: Held
    activations: Activations
    head: Head

    def estimate(self, plan: MemoryPlan) -> MemoryEstimate:
        """Bytes at the peak of a step that is cut up as `plan` says."""
        return max(self._moments(plan), key=lambda moment: moment.peak_bytes)

    def _moments(self, plan: MemoryPlan) -> list[MemoryEstimate]:
        held, kept = self.held, self.activations
        rows, recomputed = plan.micro_batch_size, min(plan.checkpointed_layers, self.layers)
        gradients = held.summed_gradients if plan.grad_accum_steps > 1 else held.gradients
        carried = gradients if plan.grad_accum_steps > 1 else 0
        outside = kept.outside + rows * kept.outside_row
        layer = kept.layer + rows * kept.layer_row
        inputs = recomputed * rows * kept.layer_input_row
        everything = outside + inputs + (self.layers - recomputed) * layer
        wide = COMPILED_BACKWARD_TENSORS if self.compiled else BACKWARD_TENSORS
        transient = LIBRARY_BYTES + wide * rows * kept.widest_row
        tokens = rows * self.length
        of_layers = gradients * held.layer_share / self.layers
        moments: list[tuple[str, float, float, float, float]] = [
            ("the loss", carried, everything, self._loss_bytes(tokens), LIBRARY_BYTES),
            ("the first backward step", carried, everything, self._backward_loss_bytes(tokens), transient),
            ("the last backward step", max(carried, gradients - of_layers), outside + layer, 0.0, transient),
            ("the update", gradients, 0.0, 0.0, LIBRARY_BYTES),
        ]
        if recomputed:
            begun = max(carried, of_layers * (self.layers - recomputed) + self._head_gradient_bytes())
            others = inputs - rows * kept.layer_input_row  # the layer's own is among what it keeps
            moments.append(("the first layer computed again", begun, outside + others + layer, 0.0, transient))
        return [
            MemoryEstimate(
                weights=held.weights,
                gradients=round(of_gradients),
                optimizer=held.optimizer,
                average=held.average,
                activations=round(activations),
                loss=round(of_loss),
                workspace=round(workspace),
                moment=moment,
            )
            for moment, of_gradients, activations, of_loss, workspace in moments
        ]

    def _loss_bytes(self, tokens: int) -> float:
        """At the last chunk of the loss."""
        head = self.head
        if head.whole_logits:  # as computed, in float32, their log-probabilities, and the gradient
            return tokens * head.vocab * (head.compute_bytes + 3 * 4)
        padded = head.vocab + (-head.vocab % VOCAB_MULTIPLE if self.device_type == "cuda" else 0)
        row = padded * head.compute_bytes
        chunks = max(1, math.ceil(tokens * row / CHUNK_BYTES.get(self.device_type, DEFAULT_CHUNK_BYTES)))
        chunk = math.ceil(tokens / chunks) * (row + head.width * head.compute_bytes)
        copied = head.weight_bytes != head.compute_bytes or padded != head.vocab
        copy = padded * head.width * head.compute_bytes if copied else 0
        gradient = padded * head.width * 4 if head.trained else 0
        return chunk + copy + gradient + 2 * self._hidden_bytes(tokens)

    def _backward_loss_bytes(self, tokens: int) -> float:
        """What the loss leaves for the first backward step."""
        if self.head.whole_logits:
            return tokens * self.head.vocab * (self.head.compute_bytes + 2 * 4)
        return self._head_gradient_bytes() + 2 * self._hidden_bytes(tokens)

    def _head_gradient_bytes(self) -> int:
        head = self.head
        return head.vocab * head.width * head.weight_bytes if head.trained else 0

    def _hidden_bytes(self, tokens: int) -> int:
        return tokens * self.head.width * self.head.hidden_bytes
