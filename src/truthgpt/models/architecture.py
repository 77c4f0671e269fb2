"""The model's configuration: read from a folder, the hub or the YAML, and checked before any data is read."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from truthgpt.errors import ConfigError, Problem
from truthgpt.runtime.hub import cache_when_unreachable


@dataclass(frozen=True)
class ModelKind:
    """What models of one task are called in messages, which types of them transformers has, and a few to name."""

    name: str
    types: Collection[str]
    examples: str


CAUSAL_LM = ModelKind(
    "causal language model", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "gpt2, llama, qwen3, gemma3_text, mistral"
)
_LEGACY_ROPE_NAMES = ("rope_scaling", "rope_theta")
"""Names transformers rewrites into `rope_parameters` for models that have rotary embeddings."""


def load_architecture(
    name_or_path: str | None, overrides: Mapping[str, Any], trust_remote_code: bool, kind: ModelKind = CAUSAL_LM
) -> PreTrainedConfig:
    """The transformers configuration of a model.

    Args:
        name_or_path: hub id or folder to start from; None: `overrides` names a `model_type`.
        overrides: `model.config` of the YAML.
        trust_remote_code: let transformers run code that comes with the model.
        kind: what the model must be; code that comes with a model may bring a type that transformers has not.

    Raises:
        ConfigError: unknown model type, key or value, a model of another kind, or nothing at `name_or_path`.
    """
    if name_or_path is None:
        return _from_scratch(overrides, kind)
    _refuse_wrong_place(name_or_path)
    try:
        with cache_when_unreachable(name_or_path):
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            [
                Problem(
                    key="model.name_or_path",
                    message=f"no model can be read from {name_or_path!r}: {_first_line(error)}",
                    suggestion="give a local folder with a config.json, or a hub id while online",
                )
            ]
        ) from error
    if config.model_type not in kind.types and not trust_remote_code:
        message = f"{name_or_path} is a {config.model_type} model: transformers has no {kind.name} of this type"
        raise ConfigError(
            [Problem(key="model.name_or_path", message=message, suggestion=f"for example {kind.examples}")]
        )
    _refuse_unknown_keys(type(config), overrides)
    if overrides.get("model_type", config.model_type) != config.model_type:
        raise _problem("model_type", f"{name_or_path} is a {config.model_type} model, not {overrides['model_type']}")
    own = config.to_dict()
    merged = {**own, **_with_own_rope(own.get("rope_parameters"), overrides)}
    return _taken(type(config), merged, overrides)


def _refuse_wrong_place(name_or_path: str) -> None:
    """A path that holds no model, said in the words of the file system: transformers takes it for a hub id."""
    place = Path(name_or_path)
    suggestion = "give a local folder with a config.json, or a hub id while online"
    if place.is_file():
        found = "is a file"
    elif place.is_dir():
        if any((place / name).is_file() for name in ("config.json", "adapter_config.json")):
            return
        found = "has no config.json"
        if (place / "model" / "config.json").is_file():
            found, suggestion = "is a run; its model is one folder below", f"set it to {place / 'model'}"
    elif place.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        found = "does not exist" if place.is_absolute() else f"does not exist in {Path.cwd()}"
    else:
        return  # a hub id
    raise ConfigError([Problem("model.name_or_path", f"{name_or_path} {found}", suggestion=suggestion)])


def context_length(architecture: PreTrainedConfig) -> int | None:
    """Positions the model can tell apart; None when its configuration does not limit them."""
    length = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def check_context(architecture: PreTrainedConfig, max_seq_len: int, from_scratch: bool) -> None:
    """Raise ConfigError when samples would be longer than the model's context; one from scratch can be given more."""
    limit = context_length(architecture)
    if limit is not None and max_seq_len > limit:
        longer = ", or raise model.config.max_position_embeddings" if from_scratch else ""
        raise ConfigError(
            [
                Problem(
                    key="data.max_seq_len",
                    message=f"{max_seq_len} tokens do not fit the model's {limit} positions",
                    suggestion=f"set data.max_seq_len to at most {limit}{longer}",
                )
            ]
        )


def _from_scratch(overrides: Mapping[str, Any], kind: ModelKind) -> PreTrainedConfig:
    model_type = overrides["model_type"]
    if model_type not in kind.types:
        near = difflib.get_close_matches(str(model_type), kind.types, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"for example {kind.examples}"
        raise _problem("model_type", f"transformers has no {kind.name} of type {model_type!r}", hint)
    config_class = CONFIG_MAPPING[model_type]
    _refuse_unknown_keys(config_class, overrides)
    return _taken(config_class, overrides, overrides)


def _refuse_unknown_keys(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> None:
    """transformers stores any key it is given; a misspelt one would be ignored in silence."""
    known = {field.name for field in dataclasses.fields(config_class) if not field.name.startswith("_")}
    known |= set(config_class.attribute_map) | {"model_type"}
    if "rope_parameters" in known:
        known |= set(_LEGACY_ROPE_NAMES)
    problems = []
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(sorted(known))}"
            message = f"{config_class.model_type} models have no such setting"
            problems.append(Problem(key=f"model.config.{key}", message=message, suggestion=hint))
    if problems:
        raise ConfigError(problems)


def _taken(
    config_class: type[PreTrainedConfig], values: Mapping[str, Any], overrides: Mapping[str, Any]
) -> PreTrainedConfig:
    """The configuration of `values`.

    Raises:
        ConfigError: one of `overrides` that another one switches off, as `use_sliding_window` does `sliding_window` in
            Qwen 2; not one that is kept as another number, as the layers of HRM are.
    """
    values = {key: value for key, value in values.items() if key != "model_type"}
    config = _construct(config_class, values)
    taken, problems = config.to_dict(), []
    for name in sorted(overrides.keys() - set(_LEGACY_ROPE_NAMES)):
        value = overrides[name]
        found = taken.get(config.attribute_map.get(name, name), value)
        if isinstance(value, bool | int | float) and found != value and not _matters(config, values, name):
            message = f"{value!r} has no effect: by its other settings the model has {found!r}"
            problems.append(Problem(f"model.config.{name}", message, suggestion="leave it out, or change those"))
    if problems:
        raise ConfigError(problems)
    return config


def _matters(config: PreTrainedConfig, values: Mapping[str, Any], name: str) -> bool:
    """Whether the configuration of `values` would be another one than `config` if the number `name` were."""
    other = not values[name] if isinstance(values[name], bool) else values[name] + 1
    try:
        return bool(_construct(type(config), {**values, name: other}).to_dict() != config.to_dict())
    except ConfigError:
        return True


def _with_own_rope(own: Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` with their rotary settings as whole `rope_parameters`; what they leave open is the model's own.

    transformers would pass over a `rope_theta` beside the `rope_parameters` that every saved model has, and give new
    ones without a `rope_theta` its own default, not the model's.

    Raises:
        ConfigError: one setting for a model that has several.
    """
    given = [key for key in ("rope_parameters", *_LEGACY_ROPE_NAMES) if key in overrides]
    if not own or not given:
        return dict(overrides)
    changed = {key: value for key, value in overrides.items() if key not in given}
    wanted = overrides.get("rope_scaling" if "rope_scaling" in given else "rope_parameters", own)
    kinds = {kind: settings for kind, settings in own.items() if isinstance(settings, Mapping)}
    if kinds:
        if given != ["rope_parameters"] or not isinstance(wanted, Mapping) or not set(wanted) <= set(own):
            message = f"the model has rotary settings for {' and '.join(kinds)} apart"
            example = f"{{{next(iter(kinds))}: {{rope_type: default, rope_theta: 1000000.0}}}}"
            raise _problem(given[-1], message, f"set model.config.rope_parameters, for example {example}")
        filled = {kind: _filled(wanted.get(kind, settings), settings) for kind, settings in kinds.items()}
        return {**changed, "rope_parameters": {**own, **filled}}
    rope = _filled(wanted, own)
    if "rope_theta" in given:
        rope["rope_theta"] = overrides["rope_theta"]
    return {**changed, "rope_parameters": rope}


def _filled(wanted: Mapping[str, Any] | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """`wanted`, or no scaling where it is None, with the rotary base and share of the model's own."""
    kept = {key: own[key] for key in ("rope_theta", "partial_rotary_factor") if key in own}
    return {**kept, **({"rope_type": "default"} if wanted is None else wanted)}


def _construct(config_class: type[PreTrainedConfig], values: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return config_class(**copy.deepcopy(dict(values)))  # it writes into the dicts that it is given
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        raise ConfigError([Problem(key="model.config", message=f"transformers refuses it: {text}")]) from error


def _problem(key: str, message: str, suggestion: str | None = None) -> ConfigError:
    return ConfigError([Problem(key=f"model.config.{key}", message=message, suggestion=suggestion)])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
