"""`truthgpt generate`: continue prompts with a trained model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from truthgpt.cli.output import emit_json, for_terminal, say, standard_input
from truthgpt.cli.sizes import parse_size
from truthgpt.errors import ConfigError, DataError, NonFiniteError, RunDirectoryError
from truthgpt.runtime.atomic_file import commit_file, temporary_beside


class KVCache(StrEnum):
    """Choices of `--kv-cache`."""

    paged = "paged"
    none = "none"


class ComputeType(StrEnum):
    """Choices of `--dtype`."""

    auto = "auto"
    float32 = "float32"
    bf16 = "bf16"


def generate(
    target: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|HF_DIR", help="What to load.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Prompt to continue; repeatable.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help='A prompt a line; a .jsonl file has {"prompt": ...} a line; -: standard input.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens a prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that sum up to this; 1: all.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Makes tokens of the text less likely; 1: off.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends an answer; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    kv_cache: Annotated[
        KVCache, typer.Option(help="paged: keep what was seen, in blocks; none: run the whole text for every token.")
    ] = KVCache.paged,
    block_size: Annotated[int, typer.Option(help="Positions of a block of the paged cache.", min=1)] = 16,
    cache_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the paged cache, such as 4GiB.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu or mps.")] = "auto",
    dtype: Annotated[
        ComputeType, typer.Option(help="auto: bf16 on a GPU that has it, float32 elsewhere.")
    ] = ComputeType.auto,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="On a GPU, compile the layers: pays for many prompts.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the answers to this file, one JSON object a line.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --out, once all answers are there.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Continue prompts with a run's model, a checkpoint or a Hugging Face folder."""
    if overwrite and out is None:
        raise ConfigError("--overwrite is read with --out only; leave it out")
    if out is not None:
        _check_out(out, overwrite)
    texts = _prompts(prompt, prompts)
    size = None if cache_memory is None else parse_size(cache_memory, "--cache-memory")
    from truthgpt.inference.generate import generate_texts
    from truthgpt.inference.open_engine import EngineOptions
    from truthgpt.inference.request import Sampling
    from truthgpt.serve_model import ServingOptions, open_text_model

    sampling = Sampling(*(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed), stop=tuple(stop or ()))
    options = ServingOptions(device, dtype.value, kv_cache.value, block_size, EngineOptions(size, compiled))
    generations = []
    with open_text_model(target, options) as model, _lines(out, overwrite) as file:
        for generation in generate_texts(model.engine, model.tokenizer, texts, sampling):
            generations.append(asdict(generation))
            _give_out(generations[-1], file, f"{len(generations)}/{len(texts)} prompts", json_output)
    if json_output:
        emit_json(generations)
    failed = sum(generation["finish"] == "error" for generation in generations)
    if failed:
        raise NonFiniteError(f"{failed} of {len(texts)} answers ended early: the model's logits are not finite")


def _give_out(generation: dict[str, Any], file: IO[str] | None, progress: str, json_output: bool) -> None:
    """An answer as it comes: into the file if there is one, and to the terminal what belongs there."""
    if file is not None:
        file.write(json.dumps(generation, ensure_ascii=False) + "\n")
    if json_output or file is not None:
        say(progress)
    else:
        typer.echo(for_terminal(f"{generation['prompt']}{generation['text']}\n"))


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    if (given is None) == (file is None):
        raise ConfigError("give either --prompt TEXT (repeatable) or --prompts FILE")
    if given is not None:
        return given
    assert file is not None
    where = "standard input" if str(file) == "-" else str(file)
    try:
        text = standard_input().read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--prompts: {where} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts: {where}: byte {error.start} is not UTF-8") from error
    lines = text.split("\n")  # not splitlines: a text may hold other characters that Unicode counts as ends of lines
    if file.suffix == ".jsonl":
        prompts = [_prompt_of(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"--prompts: {where} holds no prompt; write one a line")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"--prompts: {where}: no JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f'--prompts: {where}: expected an object with a text "prompt", such as {{"prompt": "Once"}}')
    return str(row["prompt"])


def _check_out(out: Path, overwrite: bool) -> None:
    with _unwritable(out):
        if out.is_dir():
            raise RunDirectoryError(f"--out: {out} is a folder: name a file in it")
        if not out.parent.is_dir():
            raise RunDirectoryError(f"--out: {out} cannot be written: there is no folder {out.parent}")
        if _is_occupied(out) and not overwrite:
            raise RunDirectoryError(f"--out: {out} is there already: give another --out, or --overwrite to replace it")
        opened = out.exists() and not _is_occupied(out)  # what is replaced is written beside, as what is new
        place = out if opened else out.resolve().parent
        if not os.access(place, os.W_OK):
            raise RunDirectoryError(f"--out: {out} cannot be written: {place} is not writable")


def _is_occupied(out: Path) -> bool:
    """Whether something would be lost: not in an empty file, nor in a device such as /dev/stdout."""
    return out.is_file() and out.stat().st_size > 0


@contextmanager
def _lines(out: Path | None, overwrite: bool) -> Iterator[IO[str] | None]:
    """A file to write to. One that replaces another lies beside it until the end, and is removed where there is none;
    others are there from the beginning, with the lines so far."""
    if out is None:
        yield None
        return
    _check_out(out, overwrite)  # again: loading a model takes a while
    replaced = out.resolve() if _is_occupied(out) else None
    written = out if replaced is None else temporary_beside(replaced)
    try:
        with _unwritable(out):
            with written.open("w", encoding="utf-8", buffering=1) as file:
                yield file
            if replaced is not None:
                shutil.copymode(replaced, written)
                commit_file(written, replaced)
    finally:
        if replaced is not None:
            written.unlink(missing_ok=True)


@contextmanager
def _unwritable(out: Path) -> Iterator[None]:
    """Say so of an OSError: of a name that is too long, a folder of somebody else's, a disk that is full."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(f"--out: {out} cannot be written: {error.strerror}") from error
