"""The run's model in Hugging Face format: description from the start, weights at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from truthgpt.runtime.atomic_file import write_atomic

_CARD = """---
library_name: transformers
tags: [truthgpt]
---
# {run_name}

A {model_type} model with {parameters:,} parameters, trained with TruthGPT Optimization Core.

- Data: {data}
- Step: {step} (best {metric}: {best_metric})
- Seed: {seed}

```python
from transformers import {model_class}, {processor_class}

processor = {processor_class}.from_pretrained(".")
model = {model_class}.from_pretrained(".")
```
"""
_TEXT_CLASSES = ("AutoModelForCausalLM", "AutoTokenizer")
_IMAGE_CLASSES = ("AutoModelForImageClassification", "AutoImageProcessor")


class Processor(Protocol):
    """What turns raw input into the model's, and is saved beside it: a tokenizer or an image processor."""

    def save_pretrained(self, folder: str | Path, /) -> object:
        """Write the files that transformers loads it from."""
        ...


@dataclass(frozen=True)
class ModelCard:
    """What the model card says beside what the model knows itself."""

    run_name: str
    data: str
    metric: str
    seed: int


class ModelArtefacts:
    """Writes `model/` of a run directory, which transformers and vLLM load.

    Args:
        folder: where to write.
        safetensors: weights as safetensors, else as `pytorch_model.bin`.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        processor: Processor,
        card: ModelCard,
        safetensors: bool,
    ) -> None:
        self._folder = folder
        self._model = model
        self._processor = processor
        self._card = card
        self._safetensors = safetensors

    def save_description(self) -> None:
        """Configuration, generation configuration and tokenizer or image processor; before the first step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._model.config.architectures = [type(self._model).__name__]
        self._model.config.save_pretrained(self._folder)
        if self._model.can_generate() and self._model.generation_config is not None:
            self._model.generation_config.save_pretrained(self._folder)
        self._processor.save_pretrained(self._folder)

    def save_weights(self, state: Mapping[str, Any]) -> None:
        """The model's present weights and its card; `state` is the loop state they belong to."""
        if self._safetensors:
            self._model.save_pretrained(self._folder)
        else:
            self.save_description()
            torch.save(self._model.state_dict(), self._folder / "pytorch_model.bin")
        model_class, processor_class = _TEXT_CLASSES if self._model.can_generate() else _IMAGE_CLASSES
        card = _CARD.format(
            model_class=model_class,
            processor_class=processor_class,
            run_name=self._card.run_name,
            model_type=self._model.config.model_type,
            parameters=self._model.num_parameters(),
            data=self._card.data,
            metric=self._card.metric,
            seed=self._card.seed,
            step=state["step"],
            best_metric=state["best_metric"],
        )
        write_atomic(self._folder / "README.md", card)


def load_exported_weights(model: torch.nn.Module, payload: Mapping[str, Any]) -> None:
    """Put a checkpoint's final weights into `model`: the averaged ones where the run kept an average."""
    model.load_state_dict(payload["model"])
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, average in payload["ema"].items():
            parameters[name].copy_(average)
