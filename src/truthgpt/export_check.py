"""Whether an exported folder, loaded as anyone loads it, computes what was to be exported. Layer 4.

Of the two models only the logits of a small batch meet: the one that is exported is given up before what was written is
loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from truthgpt.errors import CheckpointError
from truthgpt.load_model import LoadedModel
from truthgpt.models.image_processor import pixel_format_of
from truthgpt.models.lora import ADAPTER_CONFIG, BASE_FOLDER, base_of_adapters
from truthgpt.models.quantized_base import prepare_quantized
from truthgpt.runtime.precision import in_float32

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT32_NOISE = 1e-4
"""Difference of logits that is put down to another order of the sums in float32."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROWS, _TOKENS = 4, 64
_TEXTS = (
    "The cat saw 12,345 dogs.",
    " two  spaces\n\tand a tab",
    "déjà vu, naïve, 東京, 🙂",
    "def f(x):\n    return x\n",
)
_WIDER = ", or with --dtype float32"


@dataclass(frozen=True)
class ExportCheck:
    """How far the logits of what was written are from those of what was to be exported, both in float32.

    Root mean square over a probe batch, relative to that of the logits. `tolerance` is `FLOAT32_NOISE`; for merged
    adapters four times the spacing of `dtype`, what the weights are written in: merging rounds every weight by up to
    half of one, once, and the layers' errors add up at random; a wrong merge is off by far more. `adapter_effect`, of
    those alone, is how far the adapters move the base's logits, which rounding must not swallow: a change of less than
    half a spacing would be gone.
    """

    dtype: str
    difference: float
    tolerance: float
    adapter_effect: float | None = None


@dataclass(frozen=True)
class Merging:
    """The type that adapters are merged in, and the logits of their base without them."""

    dtype: torch.dtype
    base_logits: torch.Tensor


@dataclass(frozen=True)
class Expected:
    """What a model to be exported computes.

    Attributes:
        inputs: the probe batch, as the model is called with it: `input_ids` (B, T) or `pixel_values` (B, C, H, W).
        logits: (B, T, V) or (B, classes), float32.
        tokens: how its tokenizer encodes some texts; None for an image classifier.
        merging: None: it is written as it is.
    """

    inputs: Mapping[str, torch.Tensor]
    logits: torch.Tensor
    tokens: list[list[int]] | None
    merging: Merging | None = None


def expect(loaded: LoadedModel) -> Expected:
    """What `loaded` computes for a batch of random tokens, or of random pixels."""
    inputs = _probe(loaded)
    tokens = None if loaded.tokenizer is None else _encoded(loaded.tokenizer)
    return Expected(inputs, logits_of(loaded.model, inputs), tokens)


def check_written(written: Path, expected: Expected) -> ExportCheck:
    """Load the folder `written` by the Auto classes of transformers, adapters by peft on their base, and compare.

    Raises:
        CheckpointError: it cannot be loaded, or computes or encodes something else.
    """
    logger.info("loading what was written and comparing its logits")
    try:
        model = _read(written, expected)
        tokens = None if expected.tokens is None else _encoded(_read_tokenizer(written))
    except (OSError, ValueError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"what was exported cannot be loaded again: {reason}") from error
    if tokens != expected.tokens:
        raise CheckpointError("the exported tokenizer does not encode texts as the model's own does")
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    merging = expected.merging
    check = ExportCheck(
        dtype=name_of(dtype),
        difference=_distance(logits_of(model, expected.inputs), expected.logits),
        tolerance=FLOAT32_NOISE if merging is None else max(FLOAT32_NOISE, 4 * torch.finfo(merging.dtype).eps),
        adapter_effect=None if merging is None else _distance(merging.base_logits, expected.logits),
    )
    if check.adapter_effect is not None:
        _refuse_lossy_merge(check, check.adapter_effect)
    elif not check.difference <= check.tolerance:  # NaN is not
        raise CheckpointError(
            f"what was exported does not compute what the model does: its logits differ by {check.difference:.2g} of "
            f"their size, {check.tolerance:.2g} is allowed{_why(written)}"
        )
    return check


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits, computed in float32 without a float32 copy of the whole model."""
    if "pixel_values" in inputs:
        images: torch.Tensor = model(**inputs).logits
        return images.float()
    with in_float32(model):
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits.float()


def name_of(dtype: torch.dtype) -> str:
    """What `--dtype` calls it."""
    return _NAMES.get(dtype, str(dtype))


def _probe(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    model, generator = loaded.model, torch.Generator().manual_seed(0)
    if loaded.tokenizer is None:
        pixels = pixel_format_of(model.config, str(loaded.folder))
        images = torch.randn((_ROWS, pixels.channels, *pixels.size), generator=generator)
        return {"pixel_values": images.to(model.device)}
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, vocabulary, (_ROWS, _TOKENS), generator=generator)
    ids = ids[:, : getattr(model.config.get_text_config(), "max_position_embeddings", None) or _TOKENS]
    return {"input_ids": ids.to(model.device)}


def _read(written: Path, expected: Expected) -> PreTrainedModel:
    device = expected.logits.device
    if expected.tokens is None:
        model = AutoModelForImageClassification.from_pretrained(written, dtype=torch.float32, trust_remote_code=False)
    elif (written / ADAPTER_CONFIG).is_file():
        model = _read_adapters(written, device)
    else:
        model = AutoModelForCausalLM.from_pretrained(written, dtype="auto", trust_remote_code=False)
    return cast(PreTrainedModel, model.to(device).eval())


def _read_adapters(written: Path, device: torch.device) -> PreTrainedModel:
    """Base and adapters by transformers and peft; a base that was quantised for training is quantised again."""
    from peft import PeftModel

    own = written / BASE_FOLDER
    options: dict[str, Any] = {"dtype": "auto"}
    described = written / "config.json"
    quantization = json.loads(described.read_bytes()).get("quantization_config") if described.is_file() else None
    if quantization is not None:
        config = BitsAndBytesConfig.from_dict(quantization)
        options = {"quantization_config": config, "dtype": config.bnb_4bit_compute_dtype, "device_map": {"": device}}
    base = AutoModelForCausalLM.from_pretrained(
        str(own) if own.is_dir() else base_of_adapters(written), trust_remote_code=False, **options
    )
    if quantization is not None:
        prepare_quantized(base)
    if json.loads((written / ADAPTER_CONFIG).read_bytes()).get("trainable_token_indices"):
        base.resize_token_embeddings(len(_read_tokenizer(written)), mean_resizing=False)
    adapted = PeftModel.from_pretrained(base, str(written), trust_remote_code=False)
    return cast(PreTrainedModel, adapted.get_base_model())


def _read_tokenizer(written: Path) -> PreTrainedTokenizerBase:
    return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(written, trust_remote_code=False))


def _encoded(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of some texts, with the tokenizer's special tokens and the newest tokens of its vocabulary among them."""
    newest = tokenizer.convert_ids_to_tokens(list(range(max(0, len(tokenizer) - _TOKENS), len(tokenizer))))
    texts = [*_TEXTS, " ".join([*tokenizer.all_special_tokens, *(token for token in newest if token)])]
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of `second`."""
    return float((first - second).norm() / second.norm())


def _why(written: Path) -> str:
    if not (written / ADAPTER_CONFIG).is_file():
        return ""
    return (
        "; peft puts the adapters on their base as its own folder describes it, without the run's model.config: "
        "export with --merge-lora, which writes a whole model"
    )


def _refuse_lossy_merge(check: ExportCheck, adapter_effect: float) -> None:
    """Raise CheckpointError when the merged model is not the one that was trained."""
    if not check.difference <= check.tolerance:  # NaN is not
        raise CheckpointError(
            f"the merged model does not compute what base and adapters do: its logits differ by "
            f"{check.difference:.2g} of their size, {check.tolerance:.2g} is allowed in {check.dtype}; export without "
            f"--merge-lora{_WIDER if check.dtype != 'float32' else ''}"
        )
    if check.difference > max(FLOAT32_NOISE, adapter_effect / 2):
        raise CheckpointError(
            f"{check.dtype} rounds away what the adapters learned: they move the logits by {adapter_effect:.2g} "
            f"of their size, the merged model is off by {check.difference:.2g}; export without --merge-lora{_WIDER}"
        )
