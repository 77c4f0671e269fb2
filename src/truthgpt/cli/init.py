"""`truthgpt init`: a first YAML, commented, that extends a preset."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from truthgpt.cli.output import say
from truthgpt.cli.schema import key_meanings
from truthgpt.errors import ConfigError, RunDirectoryError

_FINE_TUNING: dict[str, dict[str, str]] = {"model": {"name_or_path": "gpt2"}, "data": {"path": "train.jsonl"}}
_OWN_VALUES = {"finetune": _FINE_TUNING, "lora_fast": _FINE_TUNING, "performance_max": _FINE_TUNING}
"""What a preset leaves to its user, by section, with values to replace."""

_HEADER = """\
# yaml-language-server: $schema=./truthgpt.schema.json
# The line above lets editors check and complete this file, once there is: truthgpt schema > truthgpt.schema.json
#   truthgpt validate {file}
#   truthgpt train {file}

extends: {preset}
run_name: {run_name}

# What the preset sets stands below as comments. To change a value, uncomment its line and those of its sections.
"""


def init(
    file: Annotated[Path, typer.Argument(help="File to write.")] = Path("truthgpt.yaml"),
    preset: Annotated[str, typer.Option(help="Preset to start from.")] = "llm_default",
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Write a commented YAML file that extends a preset."""
    from truthgpt.config.load import preset_names

    if preset not in preset_names():
        raise ConfigError(f"--preset: there is no preset {preset!r}; there are: {', '.join(preset_names())}")
    text = starter_yaml(file, preset)
    try:
        with file.open("w" if force else "x", encoding="utf-8") as target:
            target.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} exists; --force overwrites it") from None
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be written: {error.strerror}") from error
    say(f"wrote {file}; next: truthgpt validate {file}, then truthgpt train {file}")


def starter_yaml(file: Path, preset: str) -> str:
    """The text of a configuration that extends `preset`; what the preset sets stands in it as comments."""
    from truthgpt.config.load import load_raw
    from truthgpt.config.strict_yaml import flow

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("._-")[:128]
    values = load_raw(preset).data
    del values["run_name"]
    live: set[tuple[str, ...]] = set()
    for section, own in _OWN_VALUES[preset].items() if preset in _OWN_VALUES else ():
        values[section] = {**own, **values[section]}
        live |= {(section,), *((section, key) for key in own)}
    lines = _setting_lines(values, (), key_meanings())
    text = _HEADER.format(file=file, preset=preset, run_name=flow(name or "run"))
    return text + "".join(f"{line}\n" if path in live else f"# {line}\n" for path, line in lines)


def _setting_lines(
    values: Mapping[str, Any], path: tuple[str, ...], meanings: Mapping[tuple[str, ...], str]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The path and the line of every key, with the first sentence of its meaning."""
    from truthgpt.config.strict_yaml import flow

    for key, value in values.items():
        here = (*path, key)
        indent = "  " * len(path)
        if isinstance(value, Mapping):
            yield here, f"{indent}{key}:"
            yield from _setting_lines(value, here, meanings)
            continue
        line = f"{indent}{key}: {flow(value)}"
        meaning = re.split(r"\. |\.$|; ", meanings[here], maxsplit=1)[0] if here in meanings else ""
        yield here, f"{line.ljust(34)}  # {meaning}" if meaning else line
