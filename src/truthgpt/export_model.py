"""A trained model as a Hugging Face folder elsewhere: copied, from a checkpoint, or with its adapters merged. Layer 4.

The folder is written beside its place and moved there when it is whole, so that a failure leaves nothing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from truthgpt.errors import CheckpointError, ConfigError, RunDirectoryError
from truthgpt.load_model import EVERY_WEIGHT_FILE, LoadedModel, load_model, trained_folder
from truthgpt.models.causal_lm import quiet_transformers
from truthgpt.models.lora import ADAPTER_CONFIG, BASE_FOLDER, save_adapters
from truthgpt.models.merge import merged_model, without_adapters
from truthgpt.models.trained_weights import has_adapters
from truthgpt.runtime.precision import in_float32

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CARD = "README.md"
_PROBE_ROWS, _PROBE_TOKENS = 4, 64
_WIDER = ", or with --dtype float32"
FLOAT32_NOISE = 1e-4
"""Difference of logits that is put down to another order of the sums in float32."""


@dataclass(frozen=True)
class MergeCheck:
    """How far the logits of a merged model, as written, are from those of base and adapters, both in float32.

    Root mean square over a probe batch, relative to that of the logits. `tolerance` is four times the spacing of
    `dtype`: merging rounds every weight by up to half of one, once, and the layers' errors add up at random; a wrong
    merge is off by far more. `adapter_effect` is how far the adapters move the base's logits, which rounding must not
    swallow: a change of less than half a spacing would be gone.
    """

    dtype: str
    difference: float
    tolerance: float
    adapter_effect: float


@dataclass(frozen=True)
class Exported:
    """What was written to `folder`; `check` for merged adapters."""

    folder: Path
    kind: Literal["model", "adapters", "merged"]
    weights: Literal["ema", "raw"]
    check: MergeCheck | None


def export_model(
    target: Path,
    out: Path,
    device: torch.device,
    merge: bool = False,
    dtype: torch.dtype | None = None,
    raw: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write the model of `target`, a run, a checkpoint or a folder, to the new folder `out`.

    Args:
        device: where it is loaded, when its weights have to be.
        merge: merge its adapters into their base.
        dtype: what a merged model is written in; None: what its base is stored in.
        raw: the weights of the last step, without their average; for runs and checkpoints.
        overwrite: replace a model folder that is there.

    Raises:
        ConfigError: `merge` for a model without adapters, or `raw` for a folder that is no run.
        CheckpointError: nothing to load, or the merged model does not compute what base and adapters do.
        RunDirectoryError: `out` is there, or cannot be written.
    """
    quiet_transformers()
    if raw:
        target = _checkpoint(target)
    folder = None if target.is_file() else trained_folder(target)
    _refuse_occupied(out, folder or target, overwrite)
    with _new_folder(out) as written:
        check = None
        if merge:
            check = _write_merged(load_model(target, device, not raw, stored_type=True), written, dtype, target)
        elif folder is not None:
            logger.info("copying %s", folder)
            shutil.copytree(folder, written, dirs_exist_ok=True)
        else:
            _write_loaded(load_model(target, device, averaged=not raw), written)
        _name_own_base(written, out)
        adapters = (written / ADAPTER_CONFIG).is_file()
    return Exported(out, "merged" if merge else "adapters" if adapters else "model", "raw" if raw else "ema", check)


def _checkpoint(target: Path) -> Path:
    """The checkpoint with the raw weights of `target`: itself, or the one that a run's final model is from."""
    if target.is_file():
        return target
    for name in ("best.pt", "last.pt"):
        if (target / "checkpoints" / name).is_file():
            return target / "checkpoints" / name
    raise ConfigError(f"--weights raw: {target} has no checkpoints; give a run directory or a checkpoint file")


def _write_loaded(loaded: LoadedModel, written: Path) -> None:
    """A checkpoint's weights beside the description of its run's model."""
    _copy_description(loaded.folder, written)
    if has_adapters(loaded.model):
        save_adapters(loaded.model, written, as_safetensors=True)
        if (loaded.folder / BASE_FOLDER).is_dir():
            shutil.copytree(loaded.folder / BASE_FOLDER, written / BASE_FOLDER)
    else:
        loaded.model.save_pretrained(written)


def _copy_description(folder: Path, written: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Configuration, tokenizer and the like, without weights and without a card, which tells of other weights."""
    for path in folder.iterdir():
        weights = path.suffix in (".safetensors", ".bin") or path.name in EVERY_WEIGHT_FILE
        if path.is_file() and not weights and path.name not in (_CARD, *leave_out):
            shutil.copyfile(path, written / path.name)


def _name_own_base(written: Path, out: Path) -> None:
    """A base that lies below its adapters is named where it will be."""
    path = written / ADAPTER_CONFIG
    if path.is_file() and (written / BASE_FOLDER).is_dir():
        described = json.loads(path.read_bytes())
        described["base_model_name_or_path"] = str(out.absolute() / BASE_FOLDER)
        path.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _write_merged(loaded: LoadedModel, written: Path, dtype: torch.dtype | None, target: Path) -> MergeCheck:
    model = loaded.model
    if not has_adapters(model):
        raise ConfigError(f"--merge-lora: {target} has no adapters; leave it out")
    dtype = dtype or model.get_input_embeddings().weight.dtype
    tokens = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, tokens, (_PROBE_ROWS, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids[:, : getattr(model.config.get_text_config(), "max_position_embeddings", _PROBE_TOKENS)].to(model.device)
    logger.info("merging the adapters of %s into their base, in %s", target, _NAMES.get(dtype, str(dtype)))
    wanted = _logits(model, ids)
    with without_adapters(model):
        base = _logits(model, ids)
    merged_model(model, dtype).save_pretrained(written)
    _copy_description(loaded.folder, written, leave_out=(ADAPTER_CONFIG, "config.json"))
    del model, loaded
    logger.info("comparing what was written with base and adapters")
    merged = AutoModelForCausalLM.from_pretrained(written, dtype="auto", trust_remote_code=False)
    found = _logits(merged.to(ids.device).eval(), ids)
    tolerance = max(FLOAT32_NOISE, 4 * torch.finfo(dtype).eps)
    check = MergeCheck(_NAMES.get(dtype, str(dtype)), _distance(found, wanted), tolerance, _distance(base, wanted))
    _refuse_lossy(check)
    return check


def _refuse_lossy(check: MergeCheck) -> None:
    """Raise CheckpointError when the merged model is not the one that was trained."""
    if not check.difference <= check.tolerance:  # NaN is not
        raise CheckpointError(
            f"the merged model does not compute what base and adapters do: its logits differ by "
            f"{check.difference:.2g} of their size, {check.tolerance:.2g} is allowed in {check.dtype}; export without "
            f"--merge-lora{_WIDER if check.dtype != 'float32' else ''}"
        )
    if check.difference > max(FLOAT32_NOISE, check.adapter_effect / 2):
        raise CheckpointError(
            f"{check.dtype} rounds away what the adapters learned: they move the logits by {check.adapter_effect:.2g} "
            f"of their size, the merged model is off by {check.difference:.2g}; export without --merge-lora{_WIDER}"
        )


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with in_float32(model):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of `second`."""
    return float((first - second).norm() / second.norm())


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, or is removed."""
    written, replaced = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    try:
        written.mkdir(parents=True)
        yield written
        if out.exists():
            out.rename(replaced)
        written.rename(out)
    except OSError as error:
        raise RunDirectoryError(f"{out} cannot be written: {error}") from error
    finally:
        for path in (written, replaced):
            shutil.rmtree(path, ignore_errors=True)


def _refuse_occupied(out: Path, source: Path, overwrite: bool) -> None:
    if source.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(source.resolve()):
        raise RunDirectoryError(f"{out} and {source}, which is exported, lie in one another: give another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise RunDirectoryError(f"{out} is there already: give another --out, or --overwrite to replace it")
    if not any((out / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise RunDirectoryError(f"{out} is no model folder (no config.json): --overwrite replaces only those")
