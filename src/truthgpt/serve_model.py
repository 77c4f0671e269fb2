"""A trained model that writes text: loaded, in the type it computes in, behind an engine. Layer 4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.errors import ConfigError
from truthgpt.factories.kv_cache import KV_CACHES
from truthgpt.inference.engine import Engine
from truthgpt.inference.open_engine import EngineOptions, open_engine
from truthgpt.load_model import LoadedModel, load_model
from truthgpt.runtime.device import choose_device
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.precision import has_native_bf16, hold_weights_in_bf16


@dataclass(frozen=True)
class ServingOptions:
    """How a model is run.

    Args:
        device: `auto`, `cuda`, `cpu` or `mps`.
        dtype: `float32`, `bf16`, or `auto`: bf16 on a GPU that has it.
        kv_cache: name of a cache.
        block_size: positions of a block of a paged one.
        engine: see `EngineOptions`.
    """

    device: str = "auto"
    dtype: str = "auto"
    kv_cache: str = "paged"
    block_size: int = 16
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True)
class TextModel:
    """A model behind an engine."""

    engine: Engine
    tokenizer: PreTrainedTokenizerFast
    loaded: LoadedModel


@contextmanager
def open_text_model(target: Path, options: ServingOptions) -> Iterator[TextModel]:
    """The model that `target` names, a run, a checkpoint or a Hugging Face folder, behind an engine.

    Raises:
        ConfigError: the model writes no text.
        CheckpointError: there is nothing to load.
    """
    device = choose_device(options.device)
    half = options.dtype == "bf16" or (options.dtype == "auto" and device.type == "cuda" and has_native_bf16(device))
    loaded = load_model(target, device, cast=_in_bf16 if half else None)
    if loaded.tokenizer is None:
        raise ConfigError(
            f"{target}: a {type(loaded.model).__name__} writes no text; truthgpt eval says how good it is"
        )
    policy = KV_CACHES.build(options.kv_cache, {}, block_size=options.block_size)
    name = (loaded.run_directory or loaded.folder).absolute().name
    with open_engine(loaded.model, loaded.tokenizer, policy, Fallbacks(), options.engine, model_name=name) as engine:
        yield TextModel(engine, loaded.tokenizer, loaded)


def _in_bf16(model: PreTrainedModel) -> None:
    hold_weights_in_bf16(model, sum_in_float32=False)
