"""`truthgpt validate`: every mistake of a configuration at once, without loading torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from truthgpt.cli.components import loaded_plugins
from truthgpt.cli.configuration import AllowPlugins, ConfigArguments, load_listed_plugins
from truthgpt.cli.output import emit_json, say, split_arguments
from truthgpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from truthgpt.config.data_section import DataConfig, MixedSource
    from truthgpt.config.load import RawConfig
    from truthgpt.config.schema import Config
    from truthgpt.config.strict_yaml import KeyPath


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
        config = validate_config(raw, loaded_plugins())
    except ConfigError as error:
        if not json_output:
            raise
        emit_json({"ok": False, "errors": [problem.to_json() for problem in error.problems]})
        raise typer.Exit(error.exit_code) from None
    _warn_of_missing_files(raw, config)
    if json_output:
        emit_json({"ok": True, "errors": []})
    else:
        typer.echo(f"{source or DEFAULT_CONFIG}: ok")


def _warn_of_missing_files(raw: RawConfig, config: Config) -> None:
    """Say which data is not there, where training would stop.

    It is no error: the configuration is right, and may be looked at on another machine than the one that has the data.
    """
    from truthgpt.data.paths import look_for

    for key, pattern in _local_paths(config):
        try:
            look_for(pattern)
        except DataError as error:
            say(f"warning: {raw.problem(key, str(error))}")


def _local_paths(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """Every path that a source of ours reads, by its key; braces, which one of them expands, are left to it."""
    from truthgpt.factories.datasets import LOCAL_FILES

    data = config.data
    own = {item.source for item in data.sources}
    sections: list[tuple[KeyPath, DataConfig | MixedSource, set[str]]] = [(("data",), data, own or {data.source.type})]
    sections += [(("data", "sources", index), item, {item.source}) for index, item in enumerate(data.sources)]
    for section, values, sources in sections:
        for name in ("path", "validation_path") if sources & LOCAL_FILES else ():
            yield from (((*section, name), path) for path in getattr(values, name) or () if "{" not in path)
