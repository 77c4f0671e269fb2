"""How a command is given its configuration: CONFIG, `key=value` ... and the plugins it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from truthgpt.cli.components import load_plugins, loaded_plugins
from truthgpt.cli.output import split_arguments

if TYPE_CHECKING:
    from truthgpt.config.load import RawConfig
    from truthgpt.config.schema import Config

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [key=value ...]", help="A YAML file or a preset, and what to change in it."),
]
AllowPlugins = Annotated[
    bool, typer.Option("--allow-plugins", help="Import the modules under `plugins:`, which runs their code.")
]


def read_config(arguments: list[str], allow_plugins: bool) -> Config:
    """The valid configuration that `arguments` describe.

    Raises:
        ConfigError: every problem found.
    """
    from truthgpt.config.load import load_raw
    from truthgpt.validate_config import validate_config

    raw = load_raw(*split_arguments(arguments))
    load_listed_plugins(raw, allow_plugins)
    return validate_config(raw, loaded_plugins())


def load_listed_plugins(raw: RawConfig, allow_plugins: bool) -> None:
    """Import the modules under `plugins:`, if the user allows it; what is no list of text is left to validation."""
    listed = raw.data.get("plugins")
    if allow_plugins and isinstance(listed, list):
        load_plugins([name for name in listed if isinstance(name, str)])
