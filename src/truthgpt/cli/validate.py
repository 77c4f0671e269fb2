"""`truthgpt validate`: every mistake of a configuration at once, without loading torch."""

from __future__ import annotations

from typing import Annotated

import typer

from truthgpt.cli.components import loaded_plugins
from truthgpt.cli.configuration import AllowPlugins, ConfigArguments, load_listed_plugins
from truthgpt.cli.output import emit_json, split_arguments
from truthgpt.errors import ConfigError


def validate(
    arguments: ConfigArguments = None,
    allow_plugins: AllowPlugins = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Check a configuration and report every mistake with its place and a fix."""
    from truthgpt.config.load import DEFAULT_CONFIG, load_raw
    from truthgpt.validate_config import validate_config

    source, overrides = split_arguments(arguments or [])
    try:
        raw = load_raw(source, overrides)
        load_listed_plugins(raw, allow_plugins)
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
