"""JSON Schema of a YAML file, for editors and for `truthgpt schema`. Layer 4; never imports torch."""

from __future__ import annotations

from typing import Any

from truthgpt.config.names import ALIASES, COMPONENT_SLOTS, LIST_SLOTS
from truthgpt.config.schema import Config
from truthgpt.factories.catalog import REGISTRIES
from truthgpt.factories.registry import Entry


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a YAML file, with the options of every registered component inside its slot."""
    from pydantic.json_schema import models_json_schema  # 30 ms that validation need not pay

    entries = {name: list(registry) for name, registry in REGISTRIES.items()}
    models = {Config} | {entry.options for group in entries.values() for entry in group}
    ordered = sorted(models, key=lambda model: (model.__module__, model.__qualname__))
    references, document = models_json_schema([(model, "validation") for model in ordered])
    definitions: dict[str, Any] = document["$defs"]
    named = {model: definitions[references[model, "validation"]["$ref"].rsplit("/", 1)[-1]] for model in ordered}
    root = named[Config]
    for slot, (registry_name, key) in COMPONENT_SLOTS.items():
        section = root
        for part in slot[:-1]:
            section = _followed(section["properties"][part], definitions)
        _fill_slot(
            section["properties"], slot, key, [(e, named[e.options]) for e in entries[registry_name]], definitions
        )
    for alias, target in ALIASES.items():
        group, old = alias.split(".")
        keys = _followed(root["properties"][group], definitions)["properties"]
        keys[old] = {**keys[target.split(".")[1]], "description": f"Second name of `{target}`."}
    extends = "YAML file (relative to this one) or preset whose values this file changes."
    root["properties"]["extends"] = {"type": "string", "description": extends}
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **root, "title": "TruthGPT configuration", "$defs": definitions}


def _followed(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The definition a property refers to."""
    definition: dict[str, Any] = definitions[schema["$ref"].rsplit("/", 1)[-1]]
    return definition


def _fill_slot(
    properties: dict[str, Any],
    slot: tuple[str, ...],
    key: str,
    entries: list[tuple[Entry, dict[str, Any]]],
    definitions: dict[str, Any],
) -> None:
    """Replace the free options of a slot by those of the registered components."""
    free = properties[slot[-1]]
    in_list = slot in LIST_SLOTS
    own = dict(_followed(free["items"] if in_list else free, definitions)["properties"])
    del own[key]
    default = None if in_list else free["default"][key]
    choices: list[dict[str, Any]] = [] if slot[0] == "model" else [{"enum": [entry.name for entry, _ in entries]}]
    for entry, options in entries:
        needed = options.get("required") or []
        choices.append(
            {
                "type": "object",
                "description": entry.summary,
                "properties": {
                    key: {"const": entry.name},
                    **own,
                    **(options.get("properties") or {}),
                },
                "required": [*needed] if entry.name == default else [key, *needed],
                "additionalProperties": False,
            }
        )
    rest = {k: v for k, v in free.items() if k in ("default", "description")}
    items = {"anyOf": choices}
    properties[slot[-1]] = {**rest, "type": "array", "items": items} if in_list else {**rest, **items}
