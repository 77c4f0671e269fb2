"""`truthgpt schema`: the JSON Schema of a YAML file; and the meaning of every key, for pages and comments."""

from __future__ import annotations

from truthgpt.cli.output import emit_json


def schema() -> None:
    """Print the JSON Schema of a YAML file, with the options of every component, for editors."""
    from truthgpt.json_schema import json_schema

    emit_json(json_schema())


def key_meanings() -> dict[tuple[str, ...], str]:
    """What each key of the schema means, sections included, on one line each."""
    from pydantic import BaseModel

    from truthgpt.config.schema import Config

    meanings: dict[tuple[str, ...], str] = {}

    def collect(section: type[BaseModel], path: tuple[str, ...]) -> None:
        for name, field in section.model_fields.items():
            meanings[*path, name] = " ".join((field.description or "").split())
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                collect(field.annotation, (*path, name))

    collect(Config, ())
    return meanings
