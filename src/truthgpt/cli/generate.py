"""`truthgpt generate`: continue prompts with a trained model."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from truthgpt.cli.output import emit_json, say
from truthgpt.errors import ConfigError, DataError


class KVCache(StrEnum):
    """Choices of `--kv-cache`."""

    auto = "auto"
    none = "none"


def generate(
    target: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|HF_DIR", help="What to load.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Prompt to continue; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Text file with one prompt a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens a prompt.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    kv_cache: Annotated[KVCache, typer.Option(help="auto: transformers' own cache; none: no cache.")] = KVCache.auto,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu or mps.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Continue prompts with a run's model, a checkpoint or a Hugging Face folder."""
    texts = _prompts(prompt, prompts)
    from truthgpt.inference.generate import GenerationSettings, generate_texts
    from truthgpt.load_model import load_model
    from truthgpt.runtime.device import choose_device

    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, use_cache=kv_cache is KVCache.auto
    )
    loaded = load_model(target, choose_device(device))
    if loaded.tokenizer is None:
        raise ConfigError(
            f"{target}: a {type(loaded.model).__name__} writes no text; truthgpt eval says how good it is"
        )
    generations = []
    for generation in generate_texts(loaded.model, loaded.tokenizer, texts, settings):
        generations.append(asdict(generation))
        if json_output:
            say(f"{len(generations)}/{len(texts)} prompts")
        else:
            typer.echo(f"{generation.prompt}{generation.text}\n")
    if json_output:
        emit_json(generations)


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    if (given is None) == (file is None):
        raise ConfigError("give either --prompt TEXT (repeatable) or --prompts FILE")
    if given is not None:
        return given
    assert file is not None
    try:
        lines = (sys.stdin if str(file) == "-" else file.open(encoding="utf-8")).read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts: {file} cannot be read: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"--prompts: {file} holds no prompt; write one a line")
    return prompts
