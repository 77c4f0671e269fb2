"""What a task (language modelling, image classification) hands to the rest of the build. Layer 4."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.data.base import Batch, TrainLoader
from truthgpt.data.loader import EvalLoader
from truthgpt.trainers.artefacts import Processor
from truthgpt.trainers.engine import Objective


@dataclass(frozen=True)
class TaskParts:
    """A model on its device, what it is trained for and on.

    Attributes:
        tokenizer: None for a task without text.
        example: a batch of the run's shape, on the CPU; the values mean nothing.
        fixed_shapes: whether every full batch has one shape.
        tokens_per_step: positions of a step, for reports.
        unit: what the supervised labels are, `tokens` or `images`.
        flops_per_token: arithmetic of training on one supervised label; None where it is not known.
    """

    model: PreTrainedModel
    objective: Objective
    tokenizer: PreTrainedTokenizerFast | None
    processor: Processor
    train_loader: TrainLoader
    eval_loader: EvalLoader | None
    example: Batch
    fixed_shapes: bool
    tokens_per_step: int
    unit: str
    flops_per_token: float | None
