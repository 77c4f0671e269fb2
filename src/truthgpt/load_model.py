"""A trained model from a run directory, a checkpoint or a Hugging Face folder; layer 4, beside build."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.attention.install import TRANSFORMERS_OWN
from truthgpt.errors import CheckpointError, ConfigError
from truthgpt.models.architecture import load_architecture
from truthgpt.models.causal_lm import build_causal_lm, load_causal_lm, quiet_transformers, transformers_attention
from truthgpt.models.image_classifier import IMAGE_CLASSIFIER, build_image_classifier, load_image_classifier
from truthgpt.models.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHT_FILES,
    BASE_FOLDER,
    add_saved_adapters,
    base_of_adapters,
    load_adapters,
    require_peft,
)
from truthgpt.models.quantized_base import require_bitsandbytes, take_quantization
from truthgpt.models.tokenizer import load_tokenizer
from truthgpt.trainers.artefacts import load_exported_weights
from truthgpt.trainers.checkpoint import load_checkpoint

logger = logging.getLogger(__name__)

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
EVERY_WEIGHT_FILE = (*_WEIGHT_FILES, *ADAPTER_WEIGHT_FILES)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use, perhaps with adapters, whose configuration and tokenizer are in `folder`.

    `tokenizer` is None for an image classifier, `run_directory` for a folder that is no run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    folder: Path
    run_directory: Path | None


def load_model(
    target: Path,
    device: torch.device,
    averaged: bool = True,
    stored_type: bool = False,
    cast: Callable[[PreTrainedModel], object] | None = None,
) -> LoadedModel:
    """Load what `target` names: a run directory (its `model/`), a checkpoint file, or a Hugging Face or peft folder.

    A run without final weights yet is loaded from its best checkpoint, with one line that says so.

    Args:
        averaged: of a checkpoint, the averaged weights where the run kept an average; else those of its step.
        stored_type: a folder's text model, and the base of adapters, in the type its weights are stored in, instead of
            float32.
        cast: changes the types of the weights in place, on the host: a GPU with room for bf16 need not have twice that.

    Raises:
        CheckpointError: nothing there that can be loaded.
    """
    quiet_transformers()
    loaded = _on_host(target, device, averaged, stored_type)
    if cast is not None:
        cast(loaded.model)
    return replace(loaded, model=loaded.model.to(device))


def _on_host(target: Path, device: torch.device, averaged: bool, stored_type: bool) -> LoadedModel:
    """What is loaded, not yet on `device`, save what is quantised there."""
    if target.is_file():
        return _from_checkpoint(target, device, averaged, stored_type)
    folder = trained_folder(target)
    if folder is not None:
        return _from_folder(folder, None if folder == target else target, device, stored_type)
    for name in ("best.pt", "last.pt"):
        checkpoint = target / "checkpoints" / name
        if checkpoint.is_file():
            logger.warning("%s has no final weights yet (the run is not complete): using %s", target, checkpoint)
            return _from_checkpoint(checkpoint, device, averaged, stored_type)
    raise CheckpointError(
        f"nothing to load at {target}: give a run directory (with model/ or checkpoints/), a checkpoint file (.pt), or "
        f"a Hugging Face folder (config.json, tokenizer.json and {' or '.join(_WEIGHT_FILES)})"
    )


def trained_folder(target: Path) -> Path | None:
    """The folder with weights that `target`, a folder or a run directory, is or has; None: there is none."""
    return next((folder for folder in (target, target / "model") if _has_weights(folder)), None)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in EVERY_WEIGHT_FILE)


def _from_folder(folder: Path, run_directory: Path | None, device: torch.device, stored_type: bool) -> LoadedModel:
    if _is_image_classifier(folder):
        architecture = load_architecture(str(folder), {}, trust_remote_code=False, kind=IMAGE_CLASSIFIER)
        model = load_image_classifier(str(folder), architecture, TRANSFORMERS_OWN, seed=0, trust_remote_code=False)
    elif (folder / ADAPTER_CONFIG).is_file():
        model = _load_base(folder, device, stored_type)
        load_adapters(model, folder)
    else:
        model = _load_text_model(str(folder), stored_type)
    return _loaded(model, folder, run_directory)


def _from_checkpoint(checkpoint: Path, device: torch.device, averaged: bool, stored_type: bool) -> LoadedModel:
    run_directory = checkpoint.absolute().parent.parent
    folder = run_directory / "model"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint} lies in no run directory: its model's configuration is expected in {folder} "
            f"(keep a checkpoint in the checkpoints/ folder of its run)"
        )
    payload = load_checkpoint(checkpoint)
    if _is_image_classifier(folder):
        architecture = load_architecture(str(folder), {}, trust_remote_code=False, kind=IMAGE_CLASSIFIER)
        model = build_image_classifier(architecture, TRANSFORMERS_OWN, seed=0)
    elif (folder / ADAPTER_CONFIG).is_file():
        model = _load_base(folder, device, stored_type)
        add_saved_adapters(model, folder)
    else:
        architecture = load_architecture(str(folder), {}, trust_remote_code=False)
        model = build_causal_lm(architecture, transformers_attention(architecture), seed=0)
    load_exported_weights(model, payload, averaged)
    return _loaded(model, folder, run_directory)


def _load_text_model(folder: str, stored_type: bool) -> PreTrainedModel:
    architecture = load_architecture(folder, {}, trust_remote_code=False)
    attention, dtype = transformers_attention(architecture), torch.float32
    if stored_type:
        dtype = architecture.dtype or dtype
    return load_causal_lm(folder, architecture, attention, trust_remote_code=False, dtype=dtype)


def _load_base(folder: Path, device: torch.device, stored_type: bool) -> PreTrainedModel:
    """The model that the adapters in `folder` belong on, with the run's own configuration where there is one.

    Raises:
        CheckpointError: its weights are not where they were.
    """
    require_peft()
    own = folder / BASE_FOLDER
    base = str(own) if own.is_dir() else base_of_adapters(folder)
    described = folder if (folder / "config.json").is_file() else base
    try:
        architecture = load_architecture(str(described), {}, trust_remote_code=False)
        dtype, quantized = torch.float32, take_quantization(architecture)
        if quantized:
            require_bitsandbytes()
            dtype = architecture.dtype or dtype  # as it was quantised
        elif stored_type:
            dtype = load_architecture(base, {}, trust_remote_code=False).dtype or dtype
        return load_causal_lm(
            base,
            architecture,
            transformers_attention(architecture),
            trust_remote_code=False,
            dtype=dtype,
            quantized_on=device if quantized else None,
        )
    except ConfigError as error:
        unfinished = ""
        if Path(base) == own.absolute():
            unfinished = "; the run made it itself and saves it with its final model: finish it (--resume auto)"
        raise CheckpointError(f"the base of the adapters in {folder} cannot be loaded: {error}{unfinished}") from error


def _is_image_classifier(folder: Path) -> bool:
    """Whether the model in `folder` says that it is one; one that cannot be read is a question for its loader."""
    try:
        names = json.loads((folder / "config.json").read_bytes()).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return False
    return any(str(name).endswith("ForImageClassification") for name in names)


def _loaded(model: PreTrainedModel, folder: Path, run_directory: Path | None) -> LoadedModel:
    tokenizer = None if _is_image_classifier(folder) else load_tokenizer(str(folder), trust_remote_code=False)
    return LoadedModel(model.eval(), tokenizer, folder, run_directory)
