"""`truthgpt validate`: every mistake of a configuration at once, without loading torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from truthgpt.cli.components import load_plugins, loaded_plugins
from truthgpt.cli.output import emit_json, split_arguments
from truthgpt.errors import ConfigError

if TYPE_CHECKING:
    from truthgpt.config.load import RawConfig


def validate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [key=value ...]", help="A YAML file or a preset, and what to change in it."),
    ] = None,
    allow_plugins: Annotated[
        bool, typer.Option("--allow-plugins", help="Import the modules under `plugins:`, which runs their code.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Check a configuration and report every mistake with its place and a fix."""
    from truthgpt.config.load import DEFAULT_CONFIG, load_raw
    from truthgpt.validate_config import validate_config

    source, overrides = split_arguments(arguments or [])
    try:
        raw = load_raw(source, overrides)
        if allow_plugins:
            load_plugins(listed_plugins(raw))
        validate_config(raw, loaded_plugins())
    except ConfigError as error:
        if not json_output:
            raise
        emit_json({"ok": False, "errors": [problem.to_json() for problem in error.problems]})
        raise typer.Exit(error.exit_code) from None
    if json_output:
        emit_json({"ok": True, "errors": []})
    else:
        typer.echo(f"{source or DEFAULT_CONFIG}: ok")


def listed_plugins(raw: RawConfig) -> list[str]:
    """The module names under `plugins:`; what is no list of text is left to validation."""
    listed = raw.data.get("plugins")
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
