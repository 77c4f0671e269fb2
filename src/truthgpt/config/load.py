"""From files, presets, mappings and overrides to one raw mapping that knows where each value came from. Layer 1."""

from __future__ import annotations

import copy
import difflib
import importlib.resources
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truthgpt.config.names import ALIASES, BARE_NAME_SLOTS, COMPONENT_SLOTS
from truthgpt.config.schema import Config
from truthgpt.config.strict_yaml import (
    MAX_BYTES,
    MAX_DEPTH,
    KeyPath,
    dotted,
    flow,
    kind_of,
    parse_scalar_or_flow,
    quote,
    scan_yaml,
)
from truthgpt.errors import ConfigError, Problem

DEFAULT_CONFIG = "llm_default"
"""The packaged configuration that is used when none is named."""

_PYTHON = "python"
_NAMING_KEYS = ("type", "model_type", "backend", "policy")
_KEY_PART = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bsk-(?:[a-z0-9]+-)*[A-Za-z0-9_]{16,}|(?<=://)[^\s/@:]+:[^\s/@]+@")


@dataclass(frozen=True)
class Origin:
    """Where a value was written. `file` is None for the command line; `line` counts from 1."""

    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = self.file or "command line"
        return place if self.line is None else f"{place}:{self.line}"


@dataclass(frozen=True)
class RawConfig:
    """A configuration before validation: merged plain data, and the origin of every key in it.

    `problems` are mistakes found so far that leave the rest checkable; `validate_config` reports them with its own.
    `origins[()]` is the source itself.
    """

    data: dict[str, Any]
    origins: dict[KeyPath, Origin]
    problems: tuple[Problem, ...] = ()

    def problem(self, path: KeyPath, message: str, suggestion: str | None = None) -> Problem:
        """A problem at `path`, placed where the path or its nearest parent was written."""
        place = path
        while place and place not in self.origins:
            place = place[:-1]
        origin = self.origins.get(place, Origin())
        return Problem(redact_secrets(dotted(path)), message, origin.file, origin.line, suggestion)


def redact_secrets(text: str) -> str:
    """`text` with everything that looks like an access token or a password in a URL blotted out."""
    return _SECRET.sub("[secret]", text)


def shown(value: Any) -> str:
    """A value as messages show it: short, on one line, and never a secret."""
    if isinstance(value, dict | list) or value is None:
        return kind_of(value)
    if isinstance(value, str):
        text = quote(redact_secrets(value))[1:-1]
        return f"'{text}'" if len(text) <= 60 else f"'{text[:57]}...'"
    if isinstance(value, int) and value.bit_length() > 256:
        return "an integer of more than 77 digits"
    return flow(value) if isinstance(value, bool | int | float) else kind_of(value)


def preset_names() -> list[str]:
    """Names of the packaged configurations, each accepted wherever a file is."""
    return [DEFAULT_CONFIG, *sorted(file.stem for file in (_packaged_configs() / "presets").glob("*.yaml"))]


def load_raw(source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> RawConfig:
    """Read a configuration with everything it extends, and apply `key.path=value` overrides.

    Args:
        source: a YAML file, the name of a preset, a mapping, or None for the packaged `llm_default`.
        overrides: `key.path=value`, the value read as YAML; a mapping is replaced whole.

    Raises:
        ConfigError: a file that cannot be read at all, or an `extends` that leads nowhere. Lesser problems are held
            in the result.
    """
    problems: list[Problem] = []
    changes = _read_overrides(overrides, problems)
    try:
        layers = _read_layers(source, problems)
    except ConfigError as error:
        raise ConfigError([*error.problems, *problems]) from None
    merged = layers.pop()
    for layer in reversed(layers):
        _merge(merged, layer.data, layer, ())
    for path, layer in changes:
        _override(merged, path, layer)
    merged.origins[()] = layers[0].origins[()] if layers else merged.origins[()]
    raw = RawConfig(merged.data, merged.origins)
    problems += _find_secrets(raw)
    return replace(raw, problems=tuple(problems))


@dataclass(frozen=True)
class _Layer:
    """One file's or one mapping's share of a configuration."""

    data: dict[str, Any]
    origins: dict[KeyPath, Origin]


def _packaged_configs() -> Path:
    return Path(str(importlib.resources.files("truthgpt"))) / "configs"


def _locate(name: str | Path, folder: Path) -> tuple[Path, str]:
    """The file that `name` (a path relative to `folder`, or a preset) means, and its label for messages."""
    text = str(name)
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", text) and text in preset_names():
        relative = f"{text}.yaml" if text == DEFAULT_CONFIG else f"presets/{text}.yaml"
        return _packaged_configs() / relative, f"configs/{relative}"
    path = folder / name
    return path, "".join(c if c.isprintable() else "?" for c in str(path))  # labels stand in one-line comments


def _read_layers(source: str | Path | Mapping[str, Any] | None, problems: list[Problem]) -> list[_Layer]:
    """The layers of `source`, its own first, then what it extends."""
    if isinstance(source, Mapping):
        layer = _mapping_layer(source, problems)
        folder = Path()
        chain: dict[Path, str] = {}
    else:
        path, label = _locate(DEFAULT_CONFIG if source is None else source, Path())
        layer = _file_layer(path, label, problems, None)
        folder = path.parent
        chain = {path.resolve(): label}
    layers = [layer]
    while "extends" in layers[-1].data:
        layer = layers[-1]
        base = layer.data.pop("extends")
        origin = layer.origins.pop(("extends",))
        if not isinstance(base, str) or not base:
            message = f"must be the path of a YAML file or the name of a preset; found {kind_of(base)}"
            problems.append(Problem("extends", message, origin.file, origin.line))
            break
        path, label = _locate(base, folder)
        known = len(problems)
        layers.append(_file_layer(path, label, problems, origin))
        if path.resolve() in chain:  # after reading: a path that cannot be read may not be resolvable either
            circle = " -> ".join([*chain.values(), label])
            del problems[known:]  # read for the second time
            raise ConfigError([Problem("extends", f"goes round in a circle: {circle}", *_place(origin))])
        chain[path.resolve()] = label
        folder = path.parent
    return layers


def _place(origin: Origin) -> tuple[str | None, int | None]:
    return origin.file, origin.line


def _file_layer(path: Path, label: str, problems: list[Problem], extended_at: Origin | None) -> _Layer:
    """Read one file. `extended_at` is the `extends:` that named it, None for the file the user named."""
    where = _place(extended_at) if extended_at else (label, None)
    key = "extends" if extended_at else ""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"{label} cannot be read: {reason}" if extended_at else f"cannot be read: {reason}"
        raise ConfigError([Problem(key, message, *where, suggestion=_file_hint(path, label))]) from None
    if len(content) > MAX_BYTES:
        raise ConfigError([Problem("", f"more than {MAX_BYTES:,} bytes, which no configuration needs", label)])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem("", f"not UTF-8 text: byte {error.start} is invalid", label, line)]) from None
    parsed = scan_yaml(text, label)
    problems += parsed.problems
    origins = {path: Origin(label, line) for path, line in parsed.lines.items()}
    return _normalised(_Layer(parsed.data, {(): Origin(label), **origins}), problems)


def _file_hint(path: Path, label: str) -> str:
    if os.path.isdir(path):  # noqa: PTH112 - `Path.is_dir` raises for a name that is too long
        inside = path / "config.yaml"
        return f"use {inside}" if inside.is_file() else "name a YAML file, not a folder"
    if label == "-":
        return "standard input is /dev/stdin"
    presets = preset_names()
    near = difflib.get_close_matches(label, presets, n=1)
    if near:
        return f"did you mean the preset {near[0]}?"
    return f"give the path of a YAML file or a preset: {', '.join(presets)}"


def _mapping_layer(source: Mapping[str, Any], problems: list[Problem]) -> _Layer:
    data = _plain(source, (), problems)
    origins = {path: Origin(_PYTHON) for path in _paths(data, ())}
    return _normalised(_Layer(data, origins), problems)


def _plain(value: Any, path: KeyPath, problems: list[Problem]) -> Any:
    """A copy of a Python value made of what YAML has; anything else is a problem and becomes null."""
    if len(path) > MAX_DEPTH:
        raise ConfigError([Problem(dotted(path[:3]), f"nested more than {MAX_DEPTH} deep", _PYTHON)])
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                problems.append(Problem(dotted(path), f"a key must be text; found {kind_of(key)}", _PYTHON))
        return {k: _plain(item, (*path, k), problems) for k, item in value.items() if isinstance(k, str)}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, index), problems) for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        problems.append(Problem(dotted(path), "not valid Unicode text", _PYTHON))
        return None
    if value is None or type(value) in (str, int, float, bool):
        return value
    problems.append(Problem(dotted(path), f"must be a value that YAML has; found {kind_of(value)}", _PYTHON))
    return None


def _paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """`path` and the paths of everything in `value`."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _paths(item, (*path, index))


def _normalised(layer: _Layer, problems: list[Problem]) -> _Layer:
    """The layer with aliases under their own names and bare component names as `{type: name}`, in place."""
    for alias, name in ALIASES.items():
        section, old = alias.split(".")
        new = name.split(".")[1]
        values = layer.data.get(section)
        if not isinstance(values, dict) or old not in values:
            continue
        origin = layer.origins.pop((section, old))
        value = values.pop(old)
        if new in values:
            other = layer.origins[section, new]
            message = f"is a second name of {name}, which is set as well ({other})"
            problems.append(Problem(alias, message, *_place(origin), suggestion="keep one of them"))
            continue
        values[new] = value
        layer.origins[section, new] = origin
    for path in BARE_NAME_SLOTS:
        parent = layer.data if len(path) == 1 else layer.data.get(path[0])
        if isinstance(parent, dict) and isinstance(parent.get(path[-1]), str):
            parent[path[-1]] = {"type": parent[path[-1]]}
    return layer


def _names_another(base: dict[str, Any], top: dict[str, Any]) -> bool:
    """Whether both mappings name a component or model type, and not the same one."""
    return any(key in base and key in top and base[key] != top[key] for key in _NAMING_KEYS)


def _merge(merged: _Layer, top: dict[str, Any], layer: _Layer, path: KeyPath) -> None:
    """Merge `top`, the part of `layer` at `path`, over `merged`."""
    target: Any = merged.data
    for part in path:
        target = target[part]
    for key, value in top.items():
        here = (*path, key)
        old = target.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _names_another(old, value):
            merged.origins[here] = layer.origins[here]
            _merge(merged, value, layer, here)
            continue
        if key in target:
            _forget(merged, old, here)
        target[key] = copy.deepcopy(value)
        merged.origins.update({p: layer.origins[p] for p in _paths(value, here) if p in layer.origins})


def _forget(layer: _Layer, value: Any, path: KeyPath) -> None:
    for inner in _paths(value, path):
        layer.origins.pop(inner, None)


def _read_overrides(overrides: Sequence[str], problems: list[Problem]) -> list[tuple[KeyPath, _Layer]]:
    """The overrides, each as the path it sets and a layer that holds nothing but its value."""
    changes: list[tuple[KeyPath, _Layer]] = []
    written: dict[str, str] = {}
    for text in overrides:
        key, equals, value_text = text.partition("=")
        if not equals or not all(_KEY_PART.fullmatch(part) for part in key.split(".")) or key == "extends":
            problems.append(_bad_override(key, bool(equals)))
            continue
        try:
            value = _plain(parse_scalar_or_flow(value_text), (), problems)
        except ConfigError as error:
            problems += [replace(p, key=key, line=None, message=redact_secrets(p.message)) for p in error.problems]
            continue
        name = ALIASES.get(key, key)
        if written.setdefault(name, key) != key:
            message = f"means the same as {written[name]}, which is set as well"
            problems.append(Problem(key, message, suggestion="keep one of them"))
            continue
        path = tuple(name.split("."))
        nested: Any = value
        for part in reversed(path):
            nested = {part: nested}
        layer = _Layer(nested, dict.fromkeys(_paths(nested, ()), Origin()))
        changes.append((path, _normalised(layer, problems)))
    return changes


def _bad_override(key: str, has_value: bool) -> Problem:
    shown = dotted((redact_secrets(key),))
    if not has_value:
        return Problem("", f"{shown} is no override", suggestion="write key.path=value")
    if key == "extends":
        return Problem("extends", "can stand in a file only", suggestion="name the file or preset instead of CONFIG")
    return Problem("", f"{shown} is no key path", suggestion="write names joined by dots; a list is replaced whole")


def _override(merged: _Layer, path: KeyPath, layer: _Layer) -> None:
    """Set `path` to what `layer` holds there; naming another component drops what files gave the former one."""
    target: Any = merged.data
    value: Any = layer.data
    for part in path:
        value = value[part]
    for depth, part in enumerate(path[:-1], start=1):
        if not isinstance(target.get(part), dict):
            _forget(merged, target.get(part), path[:depth])
            target[part] = {}
            merged.origins[path[:depth]] = Origin()
        target = target[part]
    last = path[-1]
    if len(path) > 1 and last in _NAMING_KEYS and target.get(last, value) != value:
        for key in [k for k in target if merged.origins.get((*path[:-1], k)) != Origin()]:
            _forget(merged, target.pop(key), (*path[:-1], key))
    if last in target:
        _forget(merged, target[last], path)
    target[last] = value
    merged.origins.update({p: origin for p, origin in layer.origins.items() if p[: len(path)] == path})


def _find_secrets(raw: RawConfig) -> Iterator[Problem]:
    """A problem for every text that looks like a secret; the text itself is never shown."""
    for path in _paths(raw.data, ()):
        value: Any = raw.data
        for part in path:
            value = value[part]
        if isinstance(value, str) and _SECRET.search(value):
            message = "looks like an access token or a password; configurations are copied into every run"
            yield raw.problem(path, message, "log in with the service's own tool or set its environment variable")


def resolved_yaml(config: Config, origins: Mapping[KeyPath, Origin]) -> str:
    """The whole configuration as YAML, every line commented with its origin; `load_raw` reads it back.

    Args:
        config: a validated configuration.
        origins: the origins of the RawConfig it was made from.
    """
    return "\n".join([*_resolved_lines(config.model_dump(), (), origins), ""])


def _resolved_lines(
    values: Mapping[str, Any], path: tuple[str, ...], origins: Mapping[KeyPath, Origin]
) -> Iterator[str]:
    indent = "  " * len(path)
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{flow(key)}:"
            yield from _resolved_lines(value, here, origins)
            continue
        bare = path in COMPONENT_SLOTS and COMPONENT_SLOTS[path][1] == key and path in origins
        origin = origins[here] if here in origins else origins[path] if bare else "default"
        yield f"{indent}{flow(key)}: {flow(value)}  # {origin}"
