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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from truthgpt.errors import ConfigError, RunDirectoryError
from truthgpt.export_check import Expected, ExportCheck, Merging, check_written, expect, logits_of, name_of
from truthgpt.load_model import EVERY_WEIGHT_FILE, LoadedModel, load_model, trained_folder
from truthgpt.models.causal_lm import quiet_transformers
from truthgpt.models.lora import ADAPTER_CONFIG, BASE_FOLDER, save_adapters
from truthgpt.models.merge import merged_model, without_adapters
from truthgpt.models.trained_weights import has_adapters
from truthgpt.runtime.atomic_file import rust_disk_errors

logger = logging.getLogger(__name__)

_CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """What was written to `folder`, and how far what it computes is from what was to be exported."""

    folder: Path
    kind: Literal["model", "adapters", "merged"]
    weights: Literal["ema", "raw"]
    check: ExportCheck


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
        CheckpointError: nothing to load, or what was written, loaded again, does not compute what the model does.
        RunDirectoryError: `out` is there, or cannot be written.
    """
    quiet_transformers()
    if raw:
        target = _checkpoint(target)
    folder = None if target.is_file() else trained_folder(target)
    _refuse_occupied(out, folder or target, overwrite)
    with _new_folder(out) as written:
        # Written in a call, behind which nothing holds the model: what was written is loaded next.
        if merge:
            expected = _write_merged(load_model(target, device, not raw, stored_type=True), written, dtype, target)
        else:
            expected = _write(load_model(target, device, not raw, stored_type=True), written, folder)
        check = check_written(written, expected)
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


def _write(loaded: LoadedModel, written: Path, folder: Path | None) -> Expected:
    """Copy `folder`, or write a checkpoint's weights where there is none; what is to be found there."""
    expected = expect(loaded)
    if folder is not None:
        logger.info("copying %s", folder)
        shutil.copytree(folder, written, dirs_exist_ok=True)
    else:
        _write_loaded(loaded, written)
    return expected


def _write_loaded(loaded: LoadedModel, written: Path) -> None:
    """A checkpoint's weights beside the description of its run's model."""
    leave_out: tuple[str, ...] = ()
    with rust_disk_errors():
        if has_adapters(loaded.model):
            save_adapters(loaded.model, written, as_safetensors=True)
            if (loaded.folder / BASE_FOLDER).is_dir():
                shutil.copytree(loaded.folder / BASE_FOLDER, written / BASE_FOLDER)
        else:
            loaded.model.save_pretrained(written)
            leave_out = ("config.json",)  # what was written says the type of these weights
    # Afterwards: transformers writes a generation configuration too, without the run's stop and padding ids.
    _copy_description(loaded.folder, written, leave_out)


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


def _write_merged(loaded: LoadedModel, written: Path, dtype: torch.dtype | None, target: Path) -> Expected:
    """Write the model with its adapters merged; what is to be found there."""
    model = loaded.model
    if not has_adapters(model):
        raise ConfigError(f"--merge-lora: {target} has no adapters; leave it out")
    dtype = dtype or model.get_input_embeddings().weight.dtype
    logger.info("merging the adapters of %s into their base, in %s", target, name_of(dtype))
    expected = expect(loaded)
    with without_adapters(model):
        base = logits_of(model, expected.inputs)
    with rust_disk_errors():
        merged_model(model, dtype).save_pretrained(written)
    _copy_description(loaded.folder, written, leave_out=(ADAPTER_CONFIG, "config.json"))
    return replace(expected, merging=Merging(dtype, base))


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
    except shutil.Error as error:  # of a folder: a line for each of its files
        raise RunDirectoryError(f"{out} cannot be written: {error.args[0][0][2]}") from error
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
