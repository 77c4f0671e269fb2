"""`truthgpt components`: what is registered and whether it works here; and the plugins that register more."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from truthgpt.cli.output import emit_json, print_table, say
from truthgpt.errors import ConfigError

ENTRY_POINT_GROUP = "truthgpt.plugins"
"""Installed packages name their plugin modules here."""

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_loaded: set[str] = set()  # like the registries that plugins fill, one for the whole process


def load_plugins(modules: Iterable[str]) -> None:
    """Import plugin modules, each of which registers components. A module may lie in the current folder.

    Raises:
        ConfigError: a module that cannot be imported, or registers a name that is taken.
    """
    for module in modules:
        if _MODULE.fullmatch(module) is None:
            raise ConfigError(f"plugin {module!r} is no module name; write it as in Python's import, without .py")
        # At the end: a file here never stands in for an installed module.
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)
        try:
            importlib.import_module(module)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"plugin {module} cannot be imported: {error}") from error
        _loaded.add(module)


def load_installed_plugins() -> None:
    """Import the plugins of installed packages; one that fails is reported and left out."""
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except (ImportError, AttributeError, ValueError) as error:
            say(f"warning: installed plugin {entry_point.name} ({entry_point.value}) is left out: {error}")
            continue
        _loaded.add(entry_point.module)


def loaded_plugins() -> frozenset[str]:
    """Names of the plugin modules imported so far."""
    return frozenset(_loaded)


def components(
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List every component a YAML can name, and whether it works on this machine."""
    rows = _rows()
    if json_output:
        emit_json(rows)
        return
    lines = []
    for row in rows:
        state = "yes" if row["available"] else f"no: {row['reason']}"
        if row["fallback"] is not None:
            state += f" (falls back to {row['fallback']})"
        lines.append([row["registry"], row["name"], state])
    print_table(["registry", "name", "available"], lines)


def _rows() -> list[dict[str, Any]]:
    from truthgpt.factories.catalog import REGISTRIES

    rows = []
    for registry_name, registry in REGISTRIES.items():
        for entry in registry:
            state = entry.probe()
            rows.append(
                {
                    "registry": registry_name,
                    "name": entry.name,
                    "available": state.available,
                    "fallback": state.fallback,
                    "reason": state.reason,
                }
            )
    return rows
