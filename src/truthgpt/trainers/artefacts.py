"""The run's model in Hugging Face format: description from the start, weights at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from truthgpt.models.lora import (
    BASE_FOLDER,
    base_name,
    has_added_tokens,
    method_name,
    save_adapter_config,
    save_adapters,
)
from truthgpt.models.trained_weights import adapter_weights, base_state, load_trained_state
from truthgpt.runtime.atomic_file import commit_file, disk_errors, rust_disk_errors, temporary_beside, write_atomic
from truthgpt.trainers.checkpoint_payload import write_payload

_CARD = """---
library_name: {library}
tags: [truthgpt]
---
# {run_name}

{what}, trained with TruthGPT Optimization Core.

- Data: {data}
- Step: {step}{best}
- Seed: {seed}

```python
{usage}```
"""
_USAGE = """from transformers import {model_class}, {processor_class}

processor = {processor_class}.from_pretrained(".")
model = {model_class}.from_pretrained(".")
"""
_ADAPTER_USAGE = """from peft import PeftModel
from transformers import {model_class}, {processor_class}

processor = {processor_class}.from_pretrained(".")
base = {model_class}.from_pretrained({base!r})
{resize}model = PeftModel.from_pretrained(base, ".")
"""
_RESIZE = "base.resize_token_embeddings(len(processor))  # the adapters train new tokens\n"
_TEXT_CLASSES = ("AutoModelForCausalLM", "AutoTokenizer")
_BIN_FILE = "pytorch_model.bin"
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

    def text(self, state: Mapping[str, Any], library: str, what: str, usage: str) -> str:
        """The card of the model that the loop state `state` belongs to."""
        facts = {"data": self.data, "seed": self.seed, "run_name": self.run_name, "step": state["step"]}
        value = state["best_metric"]  # None: nothing was held out
        best = "" if value is None else f" (best {self.metric}: {value:.6g})"
        return _CARD.format(library=library, what=what, usage=usage, best=best, **facts)


class Artefacts(Protocol):
    """Writes `model/` of a run directory."""

    def save_description(self) -> None:
        """All but the weights; before the first step."""
        ...

    def save_weights(self, state: Mapping[str, Any]) -> None:
        """The model's present weights and its card; `state` is the loop state they belong to."""
        ...


@dataclass(frozen=True, eq=False)
class ModelArtefacts:
    """Writes a whole model, which transformers and vLLM load.

    Args:
        folder: where to write.
        safetensors: weights as safetensors, else as `pytorch_model.bin`.
    """

    folder: Path
    model: PreTrainedModel
    processor: Processor
    card: ModelCard
    safetensors: bool

    def save_description(self) -> None:
        """Configuration, generation configuration and tokenizer or image processor."""
        with _written_whole(self.folder) as folder:
            _save_description(self.model, folder)
            self.processor.save_pretrained(folder)

    def save_weights(self, state: Mapping[str, Any]) -> None:
        """See `Artefacts`."""
        with disk_errors(self.folder), rust_disk_errors():
            _save_model(self.model, self.folder, self.model.state_dict(), self.safetensors)
        model_class, processor_class = _TEXT_CLASSES if self.model.can_generate() else _IMAGE_CLASSES
        what = f"A {self.model.config.model_type} model with {self.model.num_parameters():,} parameters"
        usage = _USAGE.format(model_class=model_class, processor_class=processor_class)
        write_atomic(self.folder / "README.md", self.card.text(state, "transformers", what, usage))


@dataclass(frozen=True, eq=False)
class AdapterArtefacts:
    """Writes the adapters of a model in peft's format, for `PeftModel.from_pretrained`.

    Where the run itself made the base, from random weights, that is written too, below the adapters.

    Args:
        folder: where to write.
        safetensors: weights as safetensors, else as peft's and transformers' `.bin` files.
    """

    folder: Path
    model: PreTrainedModel
    processor: Processor
    card: ModelCard
    safetensors: bool

    def save_description(self) -> None:
        """The base's configuration, the adapters' one, generation configuration and tokenizer."""
        with _written_whole(self.folder) as folder:
            _save_description(self.model, folder)
            save_adapter_config(self.model, folder, self._base())
            self.processor.save_pretrained(folder)

    def save_weights(self, state: Mapping[str, Any]) -> None:
        """See `Artefacts`."""
        with disk_errors(self.folder), rust_disk_errors():
            if self._own_base is not None:
                self._own_base.mkdir(exist_ok=True)
                _save_model(self.model, self._own_base, base_state(self.model), self.safetensors)
            save_adapters(self.model, self.folder, self.safetensors)
        model_class, processor_class = _TEXT_CLASSES
        parameters = sum(weight.numel() for weight in adapter_weights(self.model).values())
        method, kind = method_name(self.model), self.model.config.model_type
        what = f"Low-rank adapters ({method}) of {parameters:,} parameters for a {kind} model"
        base = BASE_FOLDER if self._own_base is not None else self._base()
        names = {"model_class": model_class, "processor_class": processor_class, "base": base}
        usage = _ADAPTER_USAGE.format(**names, resize=_RESIZE if has_added_tokens(self.model) else "")
        write_atomic(self.folder / "README.md", self.card.text(state, "peft", what, usage))

    @property
    def _own_base(self) -> Path | None:
        return self.folder / BASE_FOLDER if base_name(self.model) is None else None

    def _base(self) -> str:
        return str(base_name(self.model) if self._own_base is None else self._own_base.absolute())


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder whose files take their places in `folder` at the end, each whole: a resume reads the tokenizer there.

    Raises:
        RunDirectoryError: the disk is full or not writable.
    """
    temporary = temporary_beside(folder / "description")  # inside, should `folder` be a link to another disk
    with disk_errors(folder), rust_disk_errors():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                commit_file(path, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _save_description(model: PreTrainedModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _save_model(model: PreTrainedModel, folder: Path, state: Mapping[str, torch.Tensor], safetensors: bool) -> None:
    if safetensors:
        model.save_pretrained(folder, state_dict=dict(state))
    else:
        _save_description(model, folder)
        write_payload(dict(state), folder / _BIN_FILE)
    # Of a run that ended before with the other setting; transformers would read these in place of the new ones.
    for path in folder.glob("model*.safetensors*") if not safetensors else [folder / _BIN_FILE]:
        path.unlink(missing_ok=True)


def load_exported_weights(model: torch.nn.Module, payload: Mapping[str, Any], averaged: bool = True) -> None:
    """Put a checkpoint's final weights into `model`: the averaged ones where the run kept an average.

    Args:
        averaged: False for those of its step anyway.

    Raises:
        CheckpointError: they are adapters on another base.
    """
    load_trained_state(model, payload["model"])
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, average in payload["ema"].items() if averaged else ():
            parameters[name].copy_(average)
