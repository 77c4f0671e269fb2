"""The attention half of build: a backend for the model, probed on it, and whether documents can be packed. Layer 4."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from truthgpt.attention.base import AttentionFunction, capabilities_of, obstacle_of
from truthgpt.attention.install import check_attention, install_attention
from truthgpt.attention.probe import (
    HALF_TOLERANCE,
    LEAK_TOLERANCE,
    TOLERANCE,
    dense_error,
    future_error,
    packed_errors,
)
from truthgpt.build_data import TokenizedText, can_pack, packing_pays, wants_packing
from truthgpt.config.schema import Config
from truthgpt.errors import ConfigError, Problem
from truthgpt.factories.attention import ATTENTION_BACKENDS, FALLBACK
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.precision import Precision

logger = logging.getLogger(__name__)

BACKEND = "model.attention.backend"
OWN_BACKENDS = ("sdpa", "flash", "triton")


@dataclass(frozen=True)
class Backend:
    """An attention backend and its name in the registry."""

    name: str
    function: AttentionFunction


def build_attention(
    config: Config, architecture: PreTrainedConfig, device: torch.device, precision: Precision, fallbacks: Fallbacks
) -> Backend:
    """The backend of `model.attention`, or `sdpa` where that one cannot serve this machine, model or precision; checked
    against the model's configuration before any data is read.

    Raises:
        ConfigError: the backend would silently compute this model wrongly.
    """
    wanted = config.model.attention
    available = ATTENTION_BACKENDS.entry(wanted.backend).probe()
    reason = available.reason
    if available.available:
        function: AttentionFunction = ATTENTION_BACKENDS.build(wanted.backend, wanted.model_extra)
        reason = obstacle_of(function, architecture, device, precision.name)
    if reason is None:
        backend = Backend(wanted.backend, function)
    else:
        fallbacks.take(BACKEND, wanted.backend, FALLBACK, reason)
        backend = Backend(FALLBACK, ATTENTION_BACKENDS.build(FALLBACK))
    check_attention(backend.name, backend.function, architecture, config.data.max_seq_len)
    return backend


def check_causal(model: PreTrainedModel) -> None:
    """Raise ConfigError when tokens of `model` see those after them, which they are to predict: transformers lists BERT
    and others of its kind among the causal models too, and they are one only as a decoder."""
    if not future_error(model) > LEAK_TOLERANCE:  # NaN tells nothing
        return
    message = f"tokens of this {type(model).__name__} see those after them: nothing is left to predict"
    hint = "choose a causal language model"
    if getattr(model.config, "is_decoder", None) is False:
        hint = f"set model.config.is_decoder: true, or {hint}"
    raise ConfigError([Problem(key="model", message=message, suggestion=hint)])


def attend(
    config: Config, model: PreTrainedModel, backend: Backend, precision: Precision, fallbacks: Fallbacks
) -> bool:
    """Make `model` use the backend; whether it does.

    A model that calls no attention function, or needs masks that only transformers builds for it, keeps transformers'
    own attention: one line says so. The backend is compared with transformers' own on one row first, in float32 and in
    the run's precision, as `model.attention.verify` says; a plugin's may be an approximation on purpose.

    Raises:
        ConfigError: the model calls no attention function, and another backend than `sdpa` is asked for; or a plugin's
            backend is to be verified and is off.
    """
    own = str(model.config._attn_implementation)
    if not model._supports_attention_backend or own == "eager":
        reason = f"{type(model).__name__} calls no attention function"
        if backend.name != FALLBACK:
            raise ConfigError([Problem(key=BACKEND, message=f"{backend.name}: {reason}", suggestion="use sdpa")])
        _keep_own(own, reason, fallbacks)
        return False
    model.set_attn_implementation(install_attention(backend.name, backend.function))
    ours = backend.name in OWN_BACKENDS
    if config.model.attention.verify is False or (config.model.attention.verify == "auto" and not ours):
        return True
    error = _error(model, config.data.max_seq_len, precision)
    if error is None:
        return True
    if not ours:
        message = f"{backend.name} is not this model's attention: {error}"
        hint = "correct it, or set model.attention.verify=false where it is meant to differ"
        raise ConfigError([Problem(key=BACKEND, message=message, suggestion=hint)])
    model.set_attn_implementation(own)
    _keep_own(own, f"{type(model).__name__} needs masks of its own ({error})", fallbacks)
    return False


def _error(model: PreTrainedModel, seq_len: int, precision: Precision) -> str | None:
    """How far the backend's logits are off, in words; None when they are not."""
    error = dense_error(model, seq_len)
    if not error <= TOLERANCE:  # NaN is not
        return f"its logits would be off by {error:.1e}"
    if precision.name == "none":
        return None
    with precision.autocast():
        error = dense_error(model, seq_len)
    return None if error <= HALF_TOLERANCE else f"in {precision.name} its logits would be off by {error:.1e}"


def choose_packing(
    config: Config,
    text: TokenizedText,
    model: PreTrainedModel,
    backend: Backend,
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
    reason = _cannot_pack(config, model, backend, attends, precision)
    if reason is None:
        return config.data.packing is True or packing_pays(config, text)
    if config.data.packing is True:
        hint = "set it to false, or to auto"
        raise ConfigError([Problem(key="data.packing", message=f"true, but {reason}", suggestion=hint)])
    logger.info("rows are padded, not packed: %s", reason)
    return False


def _cannot_pack(
    config: Config, model: PreTrainedModel, backend: Backend, attends: bool, precision: Precision
) -> str | None:
    """Why documents in one row would see each other, or None."""
    if not can_pack(config.data):
        return f"the collator {config.data.collate.type} takes no packed rows"
    if not attends:
        return f"{type(model).__name__} keeps transformers' own attention"
    if "packed" not in capabilities_of(backend.function):
        return f"the attention backend {backend.name} declares no packed rows"
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
