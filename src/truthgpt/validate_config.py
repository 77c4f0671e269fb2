"""From a raw mapping to a frozen Config, or one ConfigError that lists every problem. Layer 4; never imports torch."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from truthgpt.config.data_section import MixedSource
from truthgpt.config.load import RawConfig, load_raw, redact_secrets, shown
from truthgpt.config.load import resolved_yaml as resolved_yaml
from truthgpt.config.names import ALIASES, COMPONENT_SLOTS, FOREIGN_NAMES, FOREIGN_VALUES, LIST_SLOTS
from truthgpt.config.schema import Config
from truthgpt.config.strict_yaml import KeyPath, boolean_hint, dotted, writing_hint
from truthgpt.config_rules import Broken, broken_rules
from truthgpt.errors import ConfigError, Problem
from truthgpt.factories.catalog import REGISTRIES
from truthgpt.factories.registry import Registry

MAX_REPORTED = 200
"""Mistakes explained one by one; a file with more is no configuration."""

_EXPECTED = {
    "int": "must be an integer",
    "float": "must be a number",
    "finite": "must be a finite number",
    "string": "must be text",
    "bool": "must be true or false",
    "list": "must be a list",
    "dict": "must be a mapping",
    "model": "must be a mapping",
}
"""What the first word of a pydantic error type asks for."""
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_LABEL = "must be letters, digits, '.', '_' or '-', beginning with a letter or digit"


def load_config(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    loaded_plugins: frozenset[str] = frozenset(),
) -> Config:
    """Load and validate: `load_raw`, then `validate_config`.

    Raises:
        ConfigError: every problem found.
    """
    return validate_config(load_raw(source, overrides), loaded_plugins)


def validate_config(raw: RawConfig | Mapping[str, Any], loaded_plugins: frozenset[str] = frozenset()) -> Config:
    """Check a raw configuration against the schema, the registries and the rules between keys.

    Args:
        raw: what `load_raw` returned, or a mapping.
        loaded_plugins: names of the plugin modules that are imported.

    Returns:
        The configuration with every default filled in, those of the components included.

    Raises:
        ConfigError: every problem found, those held in `raw` included.
    """
    if not isinstance(raw, RawConfig):
        raw = load_raw(raw)
    findings = _Findings(raw)
    data = copy.deepcopy(raw.data)
    _resolve_components(data, findings)
    config = _check_schema(data, findings)
    for broken in broken_rules(config, loaded_plugins):
        findings.add_rule(broken)
    if findings.problems:
        raise ConfigError(sorted(findings.problems, key=lambda p: (p.file or "", p.line or 0)))
    return config


class _Findings:
    """The problems found so far, and the paths whose values cannot be trusted because of them."""

    def __init__(self, raw: RawConfig) -> None:
        self.raw = raw
        self.problems: list[Problem] = list(raw.problems)
        self._doubtful: list[KeyPath] = []
        self._ruled: set[KeyPath] = set()

    def add(self, path: KeyPath, message: str, suggestion: str | None = None, meant: str | None = None) -> None:
        """Report a problem at `path`; `meant` is the dotted key that was probably meant."""
        self.problems.append(self.raw.problem(path, message, suggestion))
        self._doubtful.append(path)
        if meant is not None:
            self._doubtful.append(tuple(meant.split(".")))

    def add_rule(self, broken: Broken) -> None:
        """Report a broken rule, unless a mistake reported already may be its cause, or is about the same key."""
        if broken.path in self._ruled:
            return
        self._ruled.add(broken.path)
        for path in (broken.path, *broken.depends):
            if any(_overlap(path, doubtful) for doubtful in self._doubtful):
                return
        self.problems.append(self.raw.problem(broken.path, broken.message, broken.suggestion))


def _overlap(first: KeyPath, second: KeyPath) -> bool:
    shared = min(len(first), len(second))
    return first[:shared] == second[:shared]


# --- components ------------------------------------------------------------------------------------------------------


def _resolve_components(data: dict[str, Any], findings: _Findings) -> None:
    """Check the options of every named component and fill in their defaults, in place."""
    defaults = Config().model_dump()
    for slot, (registry_name, key) in COMPONENT_SLOTS.items():
        parent: Any = data
        default: Any = defaults
        for part in slot[:-1]:
            parent = parent.setdefault(part, {}) if isinstance(parent, dict) else None
            default = default[part]
        if not isinstance(parent, dict):
            continue
        registry = REGISTRIES[registry_name]
        value = parent.setdefault(slot[-1], default[slot[-1]])
        if slot in LIST_SLOTS and isinstance(value, list):
            items = [{key: item} if isinstance(item, str) else item for item in value]
            fields = tuple(MixedSource.model_fields) if slot == ("data", "sources") else (key,)
            parent[slot[-1]] = [
                _resolve(item, (*slot, index), registry, key, fields, findings) for index, item in enumerate(items)
            ]
        elif slot not in LIST_SLOTS:
            own = _section_at(slot).model_fields
            if isinstance(value, dict) and key not in value:
                value = {key: default[slot[-1]][key], **value}
            parent[slot[-1]] = _resolve(value, slot, registry, key, tuple(own), findings)


def _resolve(value: Any, path: KeyPath, registry: Registry, key: str, own: tuple[str, ...], findings: _Findings) -> Any:
    """One component with its options checked and filled in. `own` are the keys of the section itself."""
    if not isinstance(value, dict) or key not in value or not isinstance(value[key], str):
        return value  # the schema says what is wrong with it
    name = value[key]
    name_path = (*path, key) if (*path, key) in findings.raw.origins else path
    if name not in registry:
        message = f"no {registry.kind} is called {shown(name)}; there are: {', '.join(registry.names())}"
        near = difflib.get_close_matches(name, registry.names(), n=1)
        findings.add(name_path, message, f"did you mean {near[0]}?" if near else None)
        return {k: v for k, v in value.items() if k in own}
    entry = registry.entry(name)
    options = {k: v for k, v in value.items() if k not in own}
    kept = {k: v for k, v in value.items() if k in own}
    try:
        return {**kept, **entry.options.model_validate(options).model_dump()}
    except ValidationError as error:
        label = f"{registry.kind} {name}"
        allowed = [*entry.options.model_fields, *own]
        for details in error.errors(include_url=False)[:MAX_REPORTED]:
            _report(details, path, allowed, label, findings)
        return kept


# --- the schema ------------------------------------------------------------------------------------------------------


def _check_schema(data: dict[str, Any], findings: _Findings) -> Config:
    """The Config that `data` describes; wrong values are reported, and left out so that the rest can be judged."""
    first = True
    while True:
        try:
            return Config.model_validate(data)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        if first:  # later ones are consequences of what was left out
            for details in errors[:MAX_REPORTED]:
                allowed = list(_section_at(details["loc"][:-1]).model_fields)
                _report(details, (), allowed, None, findings)
            if len(errors) > MAX_REPORTED:
                findings.problems.append(findings.raw.problem((), f"{len(errors) - MAX_REPORTED} more mistakes"))
        first = False
        paths = {details["loc"][:-1] if details["type"] == "missing" else details["loc"] for details in errors}
        for path in sorted(paths, key=_removal_order, reverse=True):
            _remove(data, path)


def _removal_order(path: KeyPath) -> tuple[int, str, int]:
    last = path[-1] if path else 0
    return len(path), dotted(path[:-1]), last if isinstance(last, int) else 0


def _remove(data: Any, path: KeyPath) -> None:
    """Delete what stands at `path`; longest path and last list item first, so that positions stay right."""
    for part in path[:-1]:
        data = data[part]
    del data[path[-1]]


def _section_at(path: KeyPath) -> type[BaseModel]:
    """The section of the schema at `path`, or the nearest one above it."""
    section: type[BaseModel] = Config
    for part in path:
        found = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(found, type) and issubclass(found, BaseModel)):
            break
        section = found
    return section


def _report(
    details: ErrorDetails, base: KeyPath, allowed: list[str], component: str | None, findings: _Findings
) -> None:
    """Report a pydantic error below `base`. `component` names the owner of the options, None for the schema."""
    path = (*base, *details["loc"])
    if details["type"] == "extra_forbidden":
        name = str(path[-1])
        what = f"{component} has no option of this name" if component else "unknown key"
        meant, suggestion = _nearest(name, path[:-1], allowed)
        findings.add(path, f"{what}; allowed here: {', '.join(sorted(allowed))}", suggestion, meant)
    elif details["type"] == "missing":
        findings.add(path, f"missing; {component or 'it'} needs it")
    else:
        value = _value_at(findings.raw.data, path, details["input"])
        message, suggestion = _explain(details, value)
        findings.add(path, f"{message}; found {shown(value)}", suggestion)


def _value_at(data: Any, path: KeyPath, otherwise: Any) -> Any:
    """What the user wrote at `path`; validators may have seen something else."""
    for part in path:
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if not in_list and not (isinstance(data, dict) and part in data):
            return otherwise
        data = data[part]
    return data


def _explain(details: ErrorDetails, value: Any) -> tuple[str, str | None]:
    """What is allowed where pydantic found `value`, and how to fix it."""
    kind = details["type"]
    limits = details.get("ctx") or {}
    first = kind.split("_")[0]
    if kind == "literal_error":
        expected = str(limits["expected"]).replace("True", "true").replace("False", "false")
        choices = re.findall(r"'([^']*)'", expected)
        fix = boolean_hint(value) if "true" in expected else None
        return f"must be {expected}", fix or _nearest_choice(value, choices)
    for name, words in _LIMITS.items():
        if name in limits:
            return f"must be {words} {limits[name]}", None
    if kind == "string_pattern_mismatch":
        return _LABEL, None
    if first == "string" and "max_length" in limits:
        return f"must be at most {limits['max_length']} characters long", None
    if kind in ("too_short", "too_long"):
        bound = f"at least {limits['min_length']}" if kind == "too_short" else f"at most {limits['max_length']}"
        return f"must have {bound} items, not {limits['actual_length']}", None
    if first not in _EXPECTED:
        return redact_secrets(details["msg"]).removeprefix("Value error, "), None
    return _EXPECTED[first], writing_hint(first, value)


def _nearest_choice(value: Any, choices: list[str]) -> str | None:
    """What other trainers' `value` is called here, else the choice that is spelt most like it, as a suggestion."""
    if not isinstance(value, str):
        return None
    meant = FOREIGN_VALUES.get(value.lower())
    if meant in choices:
        return f"here this is {meant}"
    near = difflib.get_close_matches(value, choices, n=1)
    return f"did you mean {near[0]}?" if near else None


@cache
def _keys_by_name() -> dict[str, list[str]]:
    """Every key of the schema, dotted, by its last name; aliases under their own name."""
    found: dict[str, list[str]] = {}

    def collect(section: type[BaseModel], path: KeyPath) -> None:
        for name in section.model_fields:
            found.setdefault(name, []).append(dotted((*path, name)))
            inner = _section_at((*path, name))
            if inner is not section:
                collect(inner, (*path, name))

    collect(Config, ())
    for alias, name in ALIASES.items():
        found.setdefault(alias.split(".")[-1], []).append(name)
    return found


def _nearest(name: str, parent: KeyPath, allowed: list[str]) -> tuple[str | None, str | None]:
    """The key (dotted) that an unknown `name` under `parent` probably means, and the suggestion that says so."""
    if name in FOREIGN_NAMES:
        return FOREIGN_NAMES[name], f"here this is {FOREIGN_NAMES[name]}"
    keys = _keys_by_name()
    if name in keys and len(keys[name]) <= 2:
        return keys[name][0], f"did you mean {' or '.join(keys[name])}?"
    name = name[:80]
    second = {alias.split(".")[-1] for alias in ALIASES if tuple(alias.split(".")[:-1]) == parent}
    for choice in difflib.get_close_matches(name, [*allowed, *second], n=1):
        key = dotted((*parent, choice))
        return ALIASES.get(key, key), f"did you mean {choice}?"
    for choice in difflib.get_close_matches(name, keys, n=1, cutoff=0.8):
        return keys[choice][0], f"did you mean {' or '.join(keys[choice][:2])}?"
    return None, None
