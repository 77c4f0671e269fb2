"""The attention half of build: a backend for the model, probed on it, and whether documents can be packed. Layer 4."""

from __future__ import annotations

import logging
from contextlib import nullcontext

from transformers import PreTrainedConfig, PreTrainedModel

from truthgpt.attention.base import AttentionFunction, capabilities_of
from truthgpt.attention.install import check_attention, install_attention
from truthgpt.attention.probe import TOLERANCE, dense_error, packed_errors
from truthgpt.build_data import TokenizedText, can_pack, packing_pays, wants_packing
from truthgpt.config.schema import Config
from truthgpt.errors import ConfigError, Problem
from truthgpt.factories.attention import ATTENTION_BACKENDS
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.precision import Precision

logger = logging.getLogger(__name__)

BACKEND = "model.attention.backend"


def build_attention(config: Config, architecture: PreTrainedConfig) -> AttentionFunction:
    """The backend of `model.attention`, checked against the model's configuration before any data is read.

    Raises:
        ConfigError: the backend would silently compute this model wrongly.
    """
    backend = config.model.attention
    function: AttentionFunction = ATTENTION_BACKENDS.build(backend.backend, backend.model_extra)
    check_attention(backend.backend, function, architecture, config.data.max_seq_len)
    return function


def attend(config: Config, model: PreTrainedModel, function: AttentionFunction, fallbacks: Fallbacks) -> bool:
    """Make `model` use the backend; whether it does.

    A model that calls no attention function, or needs masks that only transformers builds for it, keeps transformers'
    own attention: one line says so. `sdpa` is compared with transformers' own on one row first; another backend may
    be an approximation on purpose.

    Raises:
        ConfigError: the model calls no attention function, and another backend than `sdpa` is asked for.
    """
    name, own = config.model.attention.backend, str(model.config._attn_implementation)
    if not model._supports_attention_backend or own == "eager":
        reason = f"{type(model).__name__} calls no attention function"
        if name != "sdpa":
            raise ConfigError([Problem(key=BACKEND, message=f"{name}: {reason}", suggestion="use sdpa")])
        _keep_own(own, reason, fallbacks)
        return False
    model.set_attn_implementation(install_attention(name, function))
    if name != "sdpa":
        return True
    error = dense_error(model, config.data.max_seq_len)
    right = error <= TOLERANCE  # NaN is not
    if not right:
        model.set_attn_implementation(own)
        reason = f"{type(model).__name__} needs masks of its own (its logits would be off by {error:.1e})"
        _keep_own(own, reason, fallbacks)
    return right


def choose_packing(
    config: Config,
    text: TokenizedText,
    model: PreTrainedModel,
    function: AttentionFunction,
    attends: bool,
    precision: Precision,
) -> bool:
    """Whether rows are packed: as `data.packing` says.

    `auto` packs rows wherever documents can be kept apart, unless padding fills rows better or the YAML says how to
    pad them.

    Args:
        attends: whether the model uses the backend.
        precision: what the run computes in; where that is half precision, other kernels are probed as well.

    Raises:
        ConfigError: `packing: true`, and documents would see each other.
    """
    if not wants_packing(config.data, text.data.has_rows):
        return False
    reason = _cannot_pack(config, model, function, attends, precision)
    if reason is None:
        return config.data.packing is True or packing_pays(config, text)
    if config.data.packing is True:
        hint = "set it to false, or to auto"
        raise ConfigError([Problem(key="data.packing", message=f"true, but {reason}", suggestion=hint)])
    logger.info("rows are padded, not packed: %s", reason)
    return False


def _cannot_pack(
    config: Config, model: PreTrainedModel, function: AttentionFunction, attends: bool, precision: Precision
) -> str | None:
    """Why documents in one row would see each other, or None."""
    backend = config.model.attention.backend
    if not can_pack(config.data):
        return f"the collator {config.data.collate.type} takes no packed rows"
    if not attends:
        return f"{type(model).__name__} keeps transformers' own attention"
    if "packed" not in capabilities_of(function):
        return f"the attention backend {backend} declares no packed rows"
    for half in (False, True) if precision.name != "none" else (False,):
        try:
            with precision.autocast() if half else nullcontext():
                errors = packed_errors(model, config.data.max_seq_len)
        except (TypeError, ValueError) as error:
            return f"{type(model).__name__} cannot run packed rows: {str(error).splitlines()[0]}"
        if errors.exceeded(half):
            return (
                f"in {type(model).__name__} packed documents see each other (exchanging one moves the other's logits "
                f"by {errors.leak:.1e}; packed and separate logits differ by {errors.separate:.1e})"
            )
    return None


def _keep_own(own: str, reason: str, fallbacks: Fallbacks) -> None:
    fallbacks.take(BACKEND, "sdpa without masks", f"transformers' own {own}", reason)
