"""Image classifiers of transformers: building one, a new head for other classes, and the loss."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from truthgpt.data.base import IGNORED_LABEL, Batch, LossAndLogits
from truthgpt.errors import ConfigError, Problem
from truthgpt.models.architecture import ModelKind, load_architecture
from truthgpt.runtime.hub import cache_when_unreachable
from truthgpt.runtime.seeds import derive_seed, random_state_kept

logger = logging.getLogger(__name__)

_OTHER_INPUTS = {"imagegpt", "shieldgemma2", "siglip2", "timm_wrapper"}
"""Types that take colour clusters, text or patches beside the pixels, or a package of their own."""
_CLASS_SETTINGS = ("num_labels", "id2label", "label2id")
_OWN_ATTENTION = "eager"
"""transformers' name for the attention a model brings itself, which is none in a convolutional network."""

IMAGE_CLASSIFIER = ModelKind(
    "image classifier",
    [name for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES if name not in _OTHER_INPUTS],
    "vit, deit, swin, convnext, resnet",
)


def load_image_architecture(
    name_or_path: str | None, overrides: Mapping[str, Any], classes: Sequence[str], trust_remote_code: bool
) -> PreTrainedConfig:
    """The transformers configuration of an image classifier, with the classes of the data.

    Args:
        name_or_path: hub id or folder to start from; None: `overrides` names a `model_type`.
        overrides: `model.config` of the YAML.
        classes: names of the classes, in the order of their labels.
        trust_remote_code: let transformers run code that comes with the model.

    Raises:
        ConfigError: unknown model type, key or value, a model of another kind, nothing at `name_or_path`, or a setting
            that the classes decide.
    """
    problems = [
        Problem(f"model.config.{key}", "the classes come from the data", suggestion="leave it out")
        for key in _CLASS_SETTINGS
        if key in overrides
    ]
    if problems:
        raise ConfigError(problems)
    architecture = load_architecture(name_or_path, overrides, trust_remote_code, IMAGE_CLASSIFIER)
    before = [str(architecture.id2label[label]) for label in sorted(architecture.id2label)]
    renamed = [(old, new) for old, new in zip(before, classes, strict=False) if old != new]
    if name_or_path is not None and len(before) == len(classes) and renamed:
        logger.info("%s has as many classes under other names, for example %s, here %s", name_or_path, *renamed[0])
    architecture.id2label = dict(enumerate(classes))
    architecture.label2id = {name: label for label, name in enumerate(classes)}
    architecture.problem_type = "single_label_classification"
    # transformers iterates over it where a type has several classes (deit, levit), and leaves None there itself.
    architecture.architectures = architecture.architectures or []
    return architecture


def build_image_classifier(architecture: PreTrainedConfig, attention: str, seed: int) -> PreTrainedModel:
    """A model with random float32 weights that depend on `architecture` and `seed` only.

    Args:
        attention: name of an attention implementation transformers knows. A model that cannot have its attention
            replaced, or has none, keeps its own, and one line says so.
    """
    with random_state_kept():
        torch.manual_seed(derive_seed(seed, "initial weights"))
        model = AutoModelForImageClassification.from_config(
            architecture, attn_implementation=_usable_attention(architecture, attention), dtype=torch.float32
        )
    return cast(PreTrainedModel, model)


def load_image_classifier(
    name_or_path: str, architecture: PreTrainedConfig, attention: str, seed: int, trust_remote_code: bool
) -> PreTrainedModel:
    """A pretrained model with float32 weights; its head is new where the number of classes differs.

    Args:
        attention: as for `build_image_classifier`.
        seed: seed of the run, for the weights of a new head.

    Raises:
        ConfigError: no weights at `name_or_path`, or weights that do not fit `architecture` (the head's aside).
    """
    try:
        with random_state_kept(), cache_when_unreachable(name_or_path):
            torch.manual_seed(derive_seed(seed, "initial weights"))
            model, report = AutoModelForImageClassification.from_pretrained(
                name_or_path,
                config=architecture,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                attn_implementation=_usable_attention(architecture, attention),
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise _no_weights(name_or_path, str(error).strip().split("\n", 1)[0]) from error
    _check_mismatches(name_or_path, report["mismatched_keys"], architecture.num_labels)
    for kind in ("missing_keys", "unexpected_keys"):
        names = sorted(report[kind])
        if names:
            logger.warning("%s: %d %s weights, for example %s", name_or_path, len(names), kind.split("_")[0], names[0])
    return cast(PreTrainedModel, model)


def image_classification_loss(model: nn.Module, batch: Batch) -> LossAndLogits:
    """Summed cross-entropy in nats over the images (0-d), and what gives the logits `(B, C)`."""
    logits = model(pixel_values=batch["pixel_values"]).logits
    loss = F.cross_entropy(logits.float(), batch["labels"], ignore_index=IGNORED_LABEL, reduction="sum")
    return loss, lambda: logits


def _usable_attention(architecture: PreTrainedConfig, attention: str) -> str:
    """`attention`, or the model's own where transformers cannot replace it: convolutional networks have none."""
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(architecture), None)
    if found is None or attention == _OWN_ATTENTION:  # None: a model that brings its own code
        return attention
    model_class = found[0] if isinstance(found, tuple | list) else found
    replaceable = model_class._supports_sdpa if attention == "sdpa" else model_class._supports_attention_backend
    if replaceable:
        return attention
    logger.info("%s models have no attention that %s could replace: not used", architecture.model_type, attention)
    return _OWN_ATTENTION


def _check_mismatches(name: str, mismatches: Iterable[tuple[str, torch.Size, torch.Size]], classes: int) -> None:
    """Only the head may differ from the file, and only in the number of classes."""
    before = None
    for key, stored, wanted in sorted(mismatches):
        if wanted[0] != classes or stored[1:] != wanted[1:]:
            raise _no_weights(name, f"{key} has the shape {list(stored)} there and {list(wanted)} in model.config")
        before = stored[0]
    if before is not None:
        logger.info("%s: a new head for %d classes (it had %d)", name, classes, before)


def _no_weights(name_or_path: str, reason: str) -> ConfigError:
    message = f"no weights can be loaded from {name_or_path!r}: {reason}"
    hint = "model.init: scratch starts from random weights"
    return ConfigError([Problem(key="model.name_or_path", message=message, suggestion=hint)])
