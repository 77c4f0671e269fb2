"""`truthgpt inspect`: what a run would train on, token by token. The first thing to run when a model does not learn."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from truthgpt.cli.configuration import AllowPlugins, ConfigArguments, read_config
from truthgpt.cli.output import emit_json, print_table, say

if TYPE_CHECKING:
    from truthgpt.inspect_data import ImageInspection, InspectedToken, Inspection

BAR_WIDTH = 40
LEAST_TRAINED_SHARE = 0.01
"""Below this share of tokens that count for the loss, something is probably masked by mistake."""


def inspect(
    arguments: ConfigArguments = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples to show token by token.")] = 2,
    allow_plugins: AllowPlugins = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show what a configuration trains on: tokens and their mask, lengths, and how full batches are."""
    from truthgpt.runtime.run_log import attach_console, detach

    config = read_config(arguments or [], allow_plugins)

    from truthgpt.inspect_data import inspect_images, inspect_text

    console = attach_console(logging.INFO)
    try:
        if config.model.task == "image_classification":
            images = inspect_images(config)
            if json_output:
                emit_json(asdict(images))
            else:
                _print_images(images)
            return
        found = inspect_text(config, samples)
    finally:
        detach(console)
    if json_output:
        emit_json(found.to_json())
        return
    _print_counts(found)
    _print_lengths(found)
    _print_ways(found)
    _print_samples(found)


def _print_counts(found: Inspection) -> None:
    trained = found.trained_tokens / max(found.tokens, 1)
    read = "first documents of the stream" if found.partial else "training documents"
    lines = [
        (read, f"{found.documents:,}"),
        ("validation documents", f"{found.validation_documents:,}"),
        ("tokens", f"{found.tokens:,}"),
        ("trained tokens", f"{found.trained_tokens:,} ({trained:.1%})"),
        *([] if found.chosen == "joined" else [(f"longer than a row ({found.overlong})", f"{found.overlong_rows:,}")]),
        ("samples without a trained token", f"{found.unsupervised_samples:,} (left out)"),
        *((name.replace("_", " "), f"{count:,}") for name, count in found.problems.items() if count),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name:{width}}  {value}")
    if trained < LEAST_TRAINED_SHARE:
        say(f"warning: the loss counts {trained:.2%} of the tokens; look at data.train_on and the samples below")


def _print_lengths(found: Inspection) -> None:
    lengths = found.lengths
    of = "document, cut at the length of a row" if found.chosen == "joined" else "sample"
    typer.echo(
        f"\ntokens a {of}: mean {lengths.mean:.0f}, median {lengths.median}, 95% {lengths.p95}, 99% {lengths.p99}, "
        f"{lengths.shortest} to {lengths.longest}"
    )
    highest = max(count for _, _, count in lengths.histogram)
    for low, high, count in lengths.histogram:
        bar = "█" * round(BAR_WIDTH * count / highest) or ("▏" if count else "")
        typer.echo(f"{low:>7}-{high:<7} {count:>9,} {bar}".rstrip())


def _print_ways(found: Inspection) -> None:
    typer.echo("")
    header = ("batches by", "useful tokens", "steps an epoch", "")
    rows = [
        (
            way,
            f"{filled.useful_token_share:.1%}",
            f"{filled.steps_per_epoch:,}",
            "<- here" if way == found.chosen else "",
        )
        for way, filled in found.ways.items()
    ]
    print_table(header, rows)


def _print_samples(found: Inspection) -> None:
    # https://no-color.org: what the variable holds does not matter, only that it is not empty.
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    if found.first_samples:
        legend = "green is trained, grey is not" if coloured else "‹masked› is not trained, the rest is"
        typer.echo(f"\n{legend}; ↵ is a line end")
    for number, documents in enumerate(found.first_samples, start=1):
        for place, tokens in enumerate(documents, start=1):
            which = f", document {place} of {len(documents)}" if found.chosen == "packing" else ""
            counted = sum(token.trained for token in tokens)
            typer.echo(f"\n── sample {number}{which}: {len(tokens)} tokens, {counted} trained ──")
            typer.echo(_coloured(tokens) if coloured else _bracketed(tokens))


def _coloured(tokens: list[InspectedToken]) -> str:
    """Tokens with every second one a shade apart, so that their borders show."""
    parts = []
    for place, token in enumerate(tokens):
        colour = "magenta" if token.special else "green" if token.trained else "bright_black"
        text = typer.style(_visible(token.text), fg=colour, bold=token.trained and place % 2 == 0)
        parts.append(text)
    return "".join(parts)


def _bracketed(tokens: list[InspectedToken]) -> str:
    """Text with every stretch of masked tokens in brackets."""
    text, masked = "", False
    for token in tokens:
        if token.trained == masked:
            text += "›" if masked else "‹"
            masked = not masked
        text += _visible(token.text)
    return text + ("›" if masked else "")


def _visible(text: str) -> str:
    return text.replace("\n", "↵\n")


def _print_images(found: ImageInspection) -> None:
    rows = [(name, f"{count:,}", f"{found.validation_images[name]:,}") for name, count in found.training_images.items()]
    totals = (f"{sum(found.training_images.values()):,}", f"{sum(found.validation_images.values()):,}")
    print_table(("class", "training", "validation"), [*rows, ("all", *totals)])
