"""`truthgpt export`: a trained model as a Hugging Face folder."""

from __future__ import annotations

import logging
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from truthgpt.cli.output import emit_json, say
from truthgpt.errors import ConfigError


class Weights(StrEnum):
    """Choices of `--weights`."""

    ema = "ema"
    raw = "raw"


class StoredType(StrEnum):
    """Choices of `--dtype`."""

    auto = "auto"
    float32 = "float32"
    bf16 = "bf16"
    fp16 = "fp16"


def export(
    target: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|FOLDER", help="What to export.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; its parents are made.")],
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Merge adapters into their base.")] = False,
    dtype: Annotated[
        StoredType, typer.Option(help="With --merge-lora: type of the weights; auto: what the base is stored in.")
    ] = StoredType.auto,
    weights: Annotated[
        Weights, typer.Option(help="raw: a checkpoint's (of a run: best.pt's) without their average.")
    ] = Weights.ema,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there.")] = False,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu or mps.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write a run's model, a checkpoint or a folder as a Hugging Face folder: as it is, or with its adapters merged."""
    if dtype is not StoredType.auto and not merge_lora:
        raise ConfigError("--dtype is read with --merge-lora only; leave it out")
    from truthgpt.export_check import DTYPES
    from truthgpt.export_model import export_model
    from truthgpt.runtime.device import choose_device
    from truthgpt.runtime.run_log import attach_console, detach

    console = attach_console(logging.INFO)
    try:
        exported = export_model(
            target,
            out,
            choose_device(device),
            merge=merge_lora,
            dtype=DTYPES.get(dtype),
            raw=weights is Weights.raw,
            overwrite=overwrite,
        )
    finally:
        detach(console)
    check = exported.check
    if json_output:
        document = {"folder": str(exported.folder), "kind": exported.kind, "weights": exported.weights}
        emit_json({**document, "check": asdict(check)})
        return
    say(f"{exported.kind}: {exported.folder}")
    of = "the model" if check.adapter_effect is None else "base and adapters"
    effect = "" if check.adapter_effect is None else f"; the adapters move them by {check.adapter_effect:.2g}"
    say(
        f"written in {check.dtype} and loaded again: its logits differ from those of {of} by {check.difference:.2g} of "
        f"their size ({check.tolerance:.2g} is allowed{effect})"
    )
