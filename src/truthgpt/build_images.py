"""Image classification: a vision model, its images and loaders from a Config. Layer 4."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from truthgpt.attention.base import AttentionFunction, capabilities_of
from truthgpt.attention.install import TRANSFORMERS_OWN, install_attention
from truthgpt.build_data import worker_settings
from truthgpt.build_sources import build_source, validation_source
from truthgpt.config.schema import Config
from truthgpt.data.base import Batch, Collator, ImageFields, ImageSource
from truthgpt.data.batch_order import ShuffledOrder
from truthgpt.data.images import ImageDataset, ImageTransform, split_images
from truthgpt.data.loader import EvalLoader, GlobalBatchLoader
from truthgpt.errors import ConfigError, Problem
from truthgpt.factories.attention import ATTENTION_BACKENDS
from truthgpt.factories.collate import COLLATORS, CVOptions
from truthgpt.memory.base import MemoryPlan
from truthgpt.models.causal_lm import enable_gradient_checkpointing
from truthgpt.models.image_classifier import (
    build_image_classifier,
    image_classification_loss,
    load_image_architecture,
    load_image_classifier,
)
from truthgpt.models.image_processor import PixelFormat, pixel_format_of
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.precision import Precision
from truthgpt.task import TaskParts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageData:
    """The images of a run: which of `source` are trained on, and which of `validation_source` are held out."""

    source: ImageSource
    validation_source: ImageSource
    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]


def build_image_task(
    config: Config, plan: MemoryPlan, device: torch.device, precision: Precision, fallbacks: Fallbacks
) -> TaskParts:
    """Build in this order: images, architecture, pixel format, model, loaders.

    Raises:
        ConfigError: a name or value that only the libraries or the machine can refuse.
        DataError: the images cannot be read.
    """
    wanted, options = config.model, CVOptions.model_validate(config.data.collate.options)
    if wanted.tokenizer != type(wanted.tokenizer)():
        logger.info("model.tokenizer is not read: the task is image_classification")
    attention = _attention(config)
    data = build_image_data(config)
    architecture = load_image_architecture(
        wanted.name_or_path, wanted.config, data.source.classes, wanted.trust_remote_code
    )
    pixels = pixel_format_of(architecture, _pretrained(config), options.image_size)
    model = _build_model(config, architecture, attention).to(device)
    if plan.checkpointed_layers:
        enable_gradient_checkpointing(model, plan.checkpointed_layers)

    transform = ImageTransform(
        **vars(pixels), random_resized_crop=options.random_resized_crop, horizontal_flip=options.horizontal_flip
    )
    fingerprint = data.source.fingerprint()
    images = ImageDataset(data.source, data.train, transform, config.seed, train=True, source_fingerprint=fingerprint)
    order = ShuffledOrder(len(images), plan.micro_batch_size, plan.grad_accum_steps, config.seed)
    workers, pin_memory = worker_settings(config.data, fallbacks), device.type == "cuda"
    return TaskParts(
        model=model,
        objective=image_classification_loss,
        tokenizer=None,
        processor=pixels,
        train_loader=GlobalBatchLoader(images, _collator(config), order, workers, pin_memory),
        eval_loader=build_image_eval_loader(config, data, pixels, device, fallbacks),
        example=_example(plan.micro_batch_size, pixels),
        fixed_shapes=True,
        tokens_per_step=plan.micro_batch_size * plan.grad_accum_steps,
        unit="images",
        flops_per_token=None,
    )


def build_image_data(config: Config, classes: Sequence[str] | None = None) -> ImageData:
    """The images of `data`, divided.

    Args:
        classes: names of the classes, in the order of their labels, where a model has set them already.

    Raises:
        DataError: no image, or one of another class.
    """
    fields = ImageFields(config.data.image_field, config.data.label_field)
    source: ImageSource = build_source(config.data, config.data.split, fields, classes)
    held_out: ImageSource | None = validation_source(config.data, fields, source.classes)
    train, validation = split_images(source, config.data.validation_fraction, held_out)
    return ImageData(source, held_out or source, train, validation)


def build_image_eval_loader(
    config: Config, data: ImageData, pixels: PixelFormat, device: torch.device, fallbacks: Fallbacks
) -> EvalLoader | None:
    """Batches of the validation images; None when nothing is held out."""
    if not len(data.validation):
        return None
    source = data.validation_source
    fingerprint, transform = source.fingerprint(), ImageTransform(**vars(pixels))
    images = ImageDataset(source, data.validation, transform, config.seed, train=False, source_fingerprint=fingerprint)
    workers, pin_memory = worker_settings(config.data, fallbacks), device.type == "cuda"
    return EvalLoader(images, _collator(config), config.training.eval_batch_size, workers, pin_memory)


def _collator(config: Config) -> Collator:
    collator: Collator = COLLATORS.build(config.data.collate.type, config.data.collate.options)
    return collator


def _pretrained(config: Config) -> str | None:
    """Where the weights come from; None: random ones."""
    return None if config.model.init == "scratch" else config.model.name_or_path


def _build_model(config: Config, architecture: PreTrainedConfig, attention: str) -> PreTrainedModel:
    name = _pretrained(config)
    if name is None:
        return build_image_classifier(architecture, attention, config.seed)
    return load_image_classifier(name, architecture, attention, config.seed, config.model.trust_remote_code)


def _attention(config: Config) -> str:
    """The attention implementation by its name in transformers, whose own `sdpa` builds no mask for images."""
    backend = config.model.attention
    function: AttentionFunction = ATTENTION_BACKENDS.build(backend.backend, backend.model_extra)
    if backend.backend == TRANSFORMERS_OWN:
        return TRANSFORMERS_OWN
    if "noncausal" not in capabilities_of(function):
        message = f"{backend.backend} declares no attention without the causal limit, which images need"
        raise ConfigError([Problem(key="model.attention.backend", message=message, suggestion="use sdpa")])
    return install_attention(backend.backend, function)


def _example(rows: int, pixels: PixelFormat) -> Batch:
    """A micro-batch of zeros."""
    values = torch.zeros(rows, pixels.channels, *pixels.size)
    return {"pixel_values": values, "labels": torch.zeros(rows, dtype=torch.long)}
