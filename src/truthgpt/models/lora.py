"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a model of transformers.

peft makes them, with its initial values, and its format is what they are saved in; the forward pass is ours
(`adapted_linear`). It is an extra, and imported where it is used.
"""

from __future__ import annotations

import copy
import difflib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from truthgpt.errors import CheckpointError, ConfigError, Problem
from truthgpt.models.adapted_linear import AdaptedLinear
from truthgpt.models.added_tokens import add_saved_rows, add_token_rows
from truthgpt.models.dora_linear import DoraLinear
from truthgpt.models.quantized_base import is_quantized
from truthgpt.models.trained_weights import adapter_weights, load_adapter_weights
from truthgpt.runtime.flops import matrix_weights
from truthgpt.runtime.seeds import derive_seed, random_state_kept

ALL_LINEAR = "all-linear"
BASE_FOLDER = "base"
"""Below the adapters of a run that made their base itself, its weights."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = "default"
"""What peft calls an adapter that nobody named."""
_PREFIX = "base_model.model."
"""What peft puts before the names of the weights it saves."""
_TARGETS = "model.lora.target_modules"

Method = Literal["lora", "rslora", "dora"]


@dataclass(frozen=True)
class LoraSettings:
    """The adapters of a run; `target_modules` are endings of module names, or `all-linear` alone."""

    r: int
    alpha: int
    dropout: float
    target_modules: Sequence[str]
    method: Method = "lora"


def require_peft() -> None:
    """Raise ConfigError when peft cannot be imported."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        message = f"needs the package peft, which cannot be imported: {error}"
        hint = "pip install 'truthgpt[lora]'"
        raise ConfigError([Problem(key="model.lora.enabled", message=message, suggestion=hint)]) from error


def add_adapters(model: PreTrainedModel, settings: LoraSettings, base: str | None, seed: int) -> list[str]:
    """Freeze `model` and put untrained adapters on its linear layers, in place; they change no output yet.

    The adapters' weights are float32 whatever the base is in, and depend on `settings` and `seed` only.

    Args:
        base: where the base's weights can be loaded from, for whoever loads the adapters; None: nowhere yet.

    Returns:
        Full names of the layers that `all-linear` leaves out, since peft would not load their adapters again.

    Raises:
        ConfigError: a target that the model has not, or one that peft cannot adapt.
    """
    from peft import LoraConfig

    targets = _targets(model, settings.target_modules)
    taken_for_experts = _taken_for_experts(model, targets)
    if taken_for_experts and list(settings.target_modules) != [ALL_LINEAR]:
        kind, names = type(model).__name__, ", ".join(sorted({name.rpartition(".")[2] for name in taken_for_experts}))
        message = f"peft takes {names} of {kind} for its stacked experts, which are not adapted"
        raise ConfigError([Problem(key=_TARGETS, message=message, suggestion="leave them out")])
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.method == "rslora",
        use_dora=settings.method == "dora",
        target_modules=[name for name in targets if name not in taken_for_experts],
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    with random_state_kept():
        torch.manual_seed(derive_seed(seed, "adapters"))
        try:
            _inject(model, config)
        except ValueError as error:
            raise _not_adaptable(error) from error
    return taken_for_experts


def add_tokens(model: PreTrainedModel, added: int) -> None:
    """Let `model`, which has adapters, have `added` tokens more, whose rows are trained and saved with them.

    Raises:
        ConfigError: the output head of the model has a bias.
    """
    _peft_config(model).trainable_token_indices = add_token_rows(model, added)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers that text goes through: not those of a tower for images, nor the output head."""
    head = model.get_output_embeddings()
    of_several_parts = model.config.get_text_config() is not model.config
    decoder = set((model.get_decoder() if of_several_parts else model).modules())
    return [
        name
        for name, module in model.named_modules()
        if module in decoder and module is not head and _is_linear(module)
    ]


def base_name(model: PreTrainedModel) -> str | None:
    """Where the weights below the adapters of `model` can be loaded from; None: nowhere yet."""
    base: str | None = _peft_config(model).base_model_name_or_path
    return base


def method_name(model: PreTrainedModel) -> str:
    """What the adapters of `model` are, as people write it."""
    config = _peft_config(model)
    return "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"


def has_added_tokens(model: PreTrainedModel) -> bool:
    """Whether rows of new tokens are trained with the adapters of `model`."""
    return bool(_peft_config(model).trainable_token_indices)


def save_adapter_config(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write peft's `adapter_config.json`, with `base` for where the base's weights are."""
    config = copy.copy(_peft_config(model))
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set, in another order in every process
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))


def save_adapters(model: PreTrainedModel, folder: Path, as_safetensors: bool) -> None:
    """Write the adapters' present weights as `PeftModel.from_pretrained` reads them."""
    weights = {f"{_PREFIX}{name}": value.cpu().contiguous() for name, value in adapter_weights(model).items()}
    if as_safetensors:
        safetensors.torch.save_file(weights, folder / ADAPTER_WEIGHT_FILES[0], metadata={"format": "pt"})
    else:
        torch.save(weights, folder / ADAPTER_WEIGHT_FILES[1])
    # Of a run that ended before with the other setting; peft would read it in place of the new one.
    (folder / ADAPTER_WEIGHT_FILES[1 if as_safetensors else 0]).unlink(missing_ok=True)


def base_of_adapters(folder: Path) -> str:
    """Where the adapters in `folder` say that the weights of their base are.

    Raises:
        CheckpointError: they do not say.
    """
    base: str | None = _read_config(folder).get("base_model_name_or_path")
    if base is None:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    return base


def add_saved_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Put adapters of the shape of those saved in `folder` on `model`, in place; their weights are not loaded yet.

    Raises:
        CheckpointError: they are no LoRA, rsLoRA or DoRA adapters of linear layers of this model.
    """
    from peft import get_peft_config

    try:
        # As they were trained; the rows of tokens are put there by us.
        saved = _read_config(folder)
        tokens = saved.pop("trainable_token_indices", None)
        _inject(model, get_peft_config({**saved, "inference_mode": False}))
        add_saved_rows(model, tokens)
        _peft_config(model).trainable_token_indices = tokens
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the adapters in {folder} cannot be put on their base model: {reason}") from error


def load_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapters saved in `folder` on `model`, in place.

    Raises:
        CheckpointError: see `add_saved_adapters`; or their weights are missing, or of another shape.
    """
    add_saved_adapters(model, folder)
    newer, older = (folder / name for name in ADAPTER_WEIGHT_FILES)
    path = older if older.is_file() and not newer.is_file() else newer
    try:
        if path is newer:
            saved = safetensors.torch.load_file(path)
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        load_adapter_weights(model, {name.removeprefix(_PREFIX): value for name, value in saved.items()})
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the adapters in {path} cannot be loaded: {error}") from error


def _targets(model: PreTrainedModel, endings: Sequence[str]) -> list[str]:
    """Full names of the layers to adapt. Not peft's own `all-linear`: it takes in stacks of experts."""
    names = linear_layers(model)
    if list(endings) == [ALL_LINEAR]:
        return names
    found, problems = set(), []
    last_parts = sorted({name.rpartition(".")[2] for name in names})
    for ending in endings:
        matching = [name for name in names if name == ending or name.endswith(f".{ending}")]
        found.update(matching)
        if not matching:
            near = difflib.get_close_matches(ending, [ALL_LINEAR, *last_parts], n=1)
            message = f"no linear layer of {type(model).__name__} is called {ending!r}; there are: "
            hint = f"did you mean {near[0]}?" if near else f"or leave it out: {ALL_LINEAR} takes all of them"
            problems.append(Problem(key=_TARGETS, message=message + ", ".join(last_parts), suggestion=hint))
    if problems:
        raise ConfigError(problems)
    return [name for name in names if name in found]


def _is_linear(module: nn.Module) -> bool:
    """Whether `module` computes a product alone. A class of transformers' own that derives from nn.Linear may do more:
    a router gives scores and the experts that it chose."""
    if type(module) in (nn.Linear, Conv1D) or is_quantized(module):
        return True
    if not isinstance(module, nn.Linear):
        return isinstance(module, Conv1D)
    weight = module.weight
    try:
        with torch.no_grad():
            product = module(torch.zeros((1, module.in_features), dtype=weight.dtype, device=weight.device))
    except RuntimeError:  # it takes its input apart
        return False
    return isinstance(product, torch.Tensor) and product.shape == (1, module.out_features)


def _taken_for_experts(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Those of `targets` that peft would not adapt, but the stacked experts in their place.

    In families whose experts were linear layers before transformers 5, peft takes the experts' names (`gate_proj`) for
    the stacks wherever they stand, in dense layers and shared experts too, and when it loads adapters. Seen on a model
    without storage.
    """
    if not any(experts > 1 for _, experts in matrix_weights(model)):
        return []
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever peft says of the trial, it says of the model
        trial = type(model)(model.config)
        try:
            inject_adapter_in_model(LoraConfig(r=1, target_modules=list(targets)), trial)
        except ValueError as error:
            raise _not_adaptable(error) from error
    plain = {name for name, layer in trial.named_modules() if isinstance(layer, LoraLayer) and _kind(layer) is not None}
    return [name for name in targets if name not in plain]


def _not_adaptable(error: ValueError) -> ConfigError:
    message = f"peft cannot adapt this model: {' '.join(str(error).split())}"
    return ConfigError([Problem(key=_TARGETS, message=message, suggestion="list other layers")])


def _inject(model: PreTrainedModel, config: Any) -> None:
    """Let peft add its layers, and put ours in their places.

    Raises:
        ValueError: peft cannot, or what it adds is more than plain LoRA or DoRA on linear layers.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings():
        # It corrects `fan_in_fan_out` by the kind of every layer, and says so every time.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        inject_adapter_in_model(config, model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        kind = _kind(layer)
        if kind is None:
            raise ValueError(f"{name} would be more than a linear layer with an adapter of plain LoRA or DoRA")
        adapted = kind(
            layer.get_base_layer(),
            layer.lora_A[_NAME].float(),
            layer.lora_B[_NAME].float(),
            layer.lora_dropout[_NAME],
            layer.scaling[_NAME],
        )
        model.set_submodule(name, adapted.train(layer.training))


def _kind(layer: Any) -> type[AdaptedLinear] | None:
    """Our layer that computes what peft's `layer` does; None: none does."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    variant = layer.lora_variant.get(_NAME)
    if (type(layer) is not Linear and not is_quantized(layer.get_base_layer())) or layer.lora_bias[_NAME]:
        return None
    if variant is None:
        return AdaptedLinear
    return DoraLinear if type(variant) is DoraLinearVariant else None


def _peft_config(model: PreTrainedModel) -> Any:
    """What the adapters of `model` were made with; peft leaves it there."""
    return model.peft_config[_NAME]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from error
    return config
