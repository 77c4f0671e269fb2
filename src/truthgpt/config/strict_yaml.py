"""YAML read strictly: the core scalars of YAML 1.2, and a line for every value. Layer 1.

PyYAML scans and parses; the tree is composed here from its events, because its own composer recurses without a limit,
keeps the last of two equal keys in silence, reads `no` as false, `1e-5` as text and `012` as 10, and expands aliases
without bound. Nothing in a file is ever constructed beyond mappings, lists, text, numbers, booleans and null.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml
from yaml.reader import Reader

from truthgpt.errors import ConfigError, Problem

MAX_BYTES = 1 << 20
"""Largest file read."""
MAX_DEPTH = 32
"""Deepest nesting, aliases expanded."""
MAX_ALIASED = 10_000
"""Most values that the aliases of one file may expand to."""
MAX_NUMBER_LENGTH = 64
"""Longest number; Python refuses to print integers of more than 4,300 digits, and no setting needs 64."""

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys of mappings and positions in lists, from the root."""

_TAG = "tag:yaml.org,2002:"
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PLAIN_TEXT = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_YES_NO = {"off": "false", "no": "false", "n": "false", "yes": "true", "on": "true", "y": "true"}
_SIMPLE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
# The C scanner is about ten times faster on a file near the size limit; wheels of PyYAML have it, some builds do not.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class ParsedYaml:
    """A YAML document: plain data, and the line (from 1) of every key and list item.

    `problems` are the mistakes that leave the rest readable, such as a duplicate key, whose first value is kept.
    """

    data: dict[str, Any]
    lines: dict[KeyPath, int]
    problems: tuple[Problem, ...] = ()


@dataclass(eq=False)
class _Node:
    """A composed value. `count` and `height` include its children, aliases expanded."""

    value: Any
    line: int
    children: list[tuple[str | int, int, _Node]] = field(default_factory=list)
    count: int = 1
    height: int = 1
    open: bool = False


def dotted(path: KeyPath) -> str:
    """A path as users write it: `training.callbacks[0].type`; a key with unusual characters is quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _SIMPLE_KEY.fullmatch(part) else quote(part if len(part) <= 60 else part[:57] + "...")
            text += f".{name}" if text else name
    return text


def quote(text: str) -> str:
    """`text` as a double-quoted YAML scalar on one line."""
    escaped = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escaped.get(c) or (c if c.isprintable() else f"\\U{ord(c):08X}") for c in text) + '"'


def flow(value: Any) -> str:
    """A plain value as YAML on one line, which readers of YAML 1.1 read the same."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    if isinstance(value, str):
        plain = _PLAIN_TEXT.fullmatch(value) and value.lower() not in _YES_NO and resolve_scalar(value) == value
        return value if plain else quote(value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value)
    if text in ("inf", "-inf", "nan"):
        return text.replace("inf", ".inf").replace("nan", ".nan")
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def resolve_scalar(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means in YAML 1.2: `012` is 12, `1e-5` a number, `off` and `2024-01-01` text.

    Raises:
        ValueError: a number of more than 64 characters.
    """
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", ""))
    integer = _INTEGER.fullmatch(text)
    if integer is None and _FLOAT.fullmatch(text) is None:
        return text
    if len(text) > MAX_NUMBER_LENGTH:
        raise ValueError(f"a number of {len(text)} characters; at most {MAX_NUMBER_LENGTH} are read")
    if integer is None:
        return float(text)
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    return int(text)


def parse_yaml(text: str, file: str) -> ParsedYaml:
    """The mapping that `text` holds; `file` is its name for messages.

    Raises:
        ConfigError: anything the module's rules refuse, each with its line.
    """
    parsed = scan_yaml(text, file)
    if parsed.problems:
        raise ConfigError(parsed.problems)
    return parsed


def scan_yaml(text: str, file: str) -> ParsedYaml:
    """Like `parse_yaml`, but mistakes that leave the rest readable are returned in `problems`.

    Raises:
        ConfigError: nothing can be read: syntax, size, nesting, aliases, several documents, no mapping at the root.
    """
    composer = _Composer(file)
    root = composer.compose(text)
    if root is None or root.value is None:
        composer.refuse("empty: nothing to read", None, suggestion="write at least `extends: llm_default`")
    if not isinstance(root.value, dict):
        composer.refuse(f"must be a mapping of keys to values; found {kind_of(root.value)}", root.line)
    lines: dict[KeyPath, int] = {}
    data: dict[str, Any] = _expand(root, (), lines)
    return ParsedYaml(data, lines, tuple(composer.problems))


def parse_scalar_or_flow(text: str) -> Any:
    """The value of a command-line override, read as YAML: `1e-3`, `[a, b]`, `{type: byte}`.

    Raises:
        ConfigError: not valid YAML, or refused by the rules for files; the problem's key is empty.
    """
    composer = _Composer(None)
    root = composer.compose(text)
    if composer.problems:
        raise ConfigError(composer.problems)
    return None if root is None else _expand(root, (), {})


def kind_of(value: object) -> str:
    """The YAML kind of a value, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {dict: "a mapping", list: "a list", str: "text", int: "an integer", float: "a number"}
    return kinds.get(type(value), f"a Python {type(value).__name__}")


def _expand(node: _Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    """Plain data of a node; every alias becomes a copy of its own. `lines` receives the line of each path."""
    if isinstance(node.value, dict | list):
        expanded: list[tuple[Any, Any]] = []
        for key, line, child in node.children:
            lines[(*path, key)] = line
            expanded.append((key, _expand(child, (*path, key), lines)))
        return dict(expanded) if isinstance(node.value, dict) else [value for _, value in expanded]
    return node.value


def writing_hint(expected: str, value: Any) -> str | None:
    """How to write `value` so that it is an `int`, `float`, `bool` or `list`; None when that is unclear."""
    if expected == "bool":
        return boolean_hint(value)
    if expected == "list" and isinstance(value, str):
        return f"write [{flow(value)}]"
    if expected in ("int", "float") and isinstance(value, str):
        try:
            number = resolve_scalar(value.replace("_", "").replace(",", ""))
        except ValueError:
            return None
        if type(number) in (int, float):
            return f"write {flow(number)}"
    if expected == "int" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return None


def boolean_hint(value: Any) -> str | None:
    """How to write the boolean that `value` probably means; None when it means none."""
    if isinstance(value, int):
        return f"write {'true' if value else 'false'}" if value in (0, 1) else None
    word = value.lower() if isinstance(value, str) else ""
    if word in ("true", "false"):
        return f"write {word} without quotes"
    return f"write {_YES_NO[word]}" if word in _YES_NO else None


class _Composer:
    """Builds nodes from parser events; recursion is bounded because depth is checked on the events."""

    def __init__(self, file: str | None) -> None:
        self.problems: list[Problem] = []
        self._file = file
        self._anchors: dict[str, _Node] = {}
        self._aliased = 0

    def refuse(self, message: str, line: int | None, suggestion: str | None = None) -> NoReturn:
        """Give up on the whole text."""
        found = Problem(key="", message=message, file=self._file, line=line, suggestion=suggestion)
        raise ConfigError([*self.problems, found])

    def compose(self, text: str) -> _Node | None:
        """The only document of `text`; None when there is none."""
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:
            self.refuse("not valid Unicode text", None)
        if size > MAX_BYTES:
            self.refuse(f"{size:,} bytes; at most {MAX_BYTES:,} are read", None)
        if character := Reader.NON_PRINTABLE.search(text):
            line = text.count("\n", 0, character.start()) + 1
            self.refuse(f"the character U+{ord(character[0]):04X} is not allowed in YAML", line)
        loader = _LOADER(text)
        try:
            return self._documents(iter(loader.get_event, None))
        except yaml.MarkedYAMLError as error:
            self._refuse_syntax(error)
        finally:
            loader.dispose()

    def _refuse_syntax(self, error: yaml.MarkedYAMLError) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        context = f" {error.context}" if error.context else ""
        message = _one_line(f"{error.problem or 'syntax error'}{context}")
        if mark is None:
            self.refuse(f"invalid YAML: {message}", None)
        hint = "quote text that begins so; indent with spaces, not tabs" if "token" in message else None
        self.refuse(f"invalid YAML at column {mark.column + 1}: {message}", mark.line + 1, hint)

    def _documents(self, events: Iterator[Any]) -> _Node | None:
        root: _Node | None = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    self.refuse("a second YAML document begins here; a file holds one", _line(event))
                root = self._node(next(events), events, (), 1)
        return root

    def _node(self, event: Any, events: Iterator[Any], path: KeyPath, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            self.refuse(f"nested more than {MAX_DEPTH} deep", _line(event))
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        node = _Node(None, _line(event), open=True)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        if isinstance(event, yaml.ScalarEvent):
            node.value = self._scalar(event, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            self._check_tag(event, path, "seq")
            node.value = []
            self._items(node, events, path, depth)
        else:
            self._check_tag(event, path, "map")
            node.value = {}
            self._pairs(node, events, path, depth)
        node.count += sum(child.count for _, _, child in node.children)
        node.height += max((child.height for _, _, child in node.children), default=0)
        node.open = False
        return node

    def _alias(self, event: Any, depth: int) -> _Node:
        line = _line(event)
        if event.anchor not in self._anchors:
            self.refuse(f"alias *{event.anchor} has no anchor &{event.anchor} before it", line)
        node = self._anchors[event.anchor]
        if node.open:
            self.refuse(f"alias *{event.anchor} stands inside its own anchor", line)
        self._aliased += node.count
        if self._aliased > MAX_ALIASED:
            self.refuse(f"aliases expand to more than {MAX_ALIASED:,} values", line)
        if depth + node.height - 1 > MAX_DEPTH:
            self.refuse(f"nested more than {MAX_DEPTH} deep", line)
        return node

    def _items(self, node: _Node, events: Iterator[Any], path: KeyPath, depth: int) -> None:
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            index = len(node.children)
            child = self._node(event, events, (*path, index), depth + 1)
            node.children.append((index, _line(event), child))

    def _pairs(self, node: _Node, events: Iterator[Any], path: KeyPath, depth: int) -> None:
        seen: dict[str, int] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            line = _line(event)
            key = self._key(event, events, path, depth)
            child = self._node(next(events), events, path if key is None else (*path, key), depth + 1)
            if key is None:
                continue
            if key in seen:
                where = f"written twice, on lines {seen[key]} and {line}"
                self._report((*path, key), line, where, "keep one of them")
                continue
            seen[key] = line
            node.children.append((key, line, child))

    def _key(self, event: Any, events: Iterator[Any], path: KeyPath, depth: int) -> str | None:
        """The key an event stands for, or None after reporting that it cannot be one."""
        line = _line(event)
        merge = isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]
        node = self._node(event, events, path, depth + 1)
        if merge:
            self._report((*path, "<<"), line, "merge keys are not read", "use `extends: other.yaml`")
            return None
        if not isinstance(node.value, str):
            fix = "write it in quotes" if not isinstance(node.value, dict | list) else None
            self._report(path, line, f"a key must be text; found {kind_of(node.value)}", fix)
            return None
        return node.value

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> Any:
        tag = event.tag
        quoted = tag is None and not event.implicit[0]
        if quoted or tag in ("!", f"{_TAG}str"):
            return event.value
        try:
            value = resolve_scalar(event.value)
        except ValueError as error:
            self._report(path, _line(event), str(error))
            return None
        if tag is None or tag == f"{_TAG}{_tag_of(value)}":
            return value
        if tag == f"{_TAG}float" and type(value) is int:
            return float(value)
        self._report(path, _line(event), f"the tag {_shown_tag(tag)} is not read here", "leave the tag out")
        return None

    def _check_tag(self, event: Any, path: KeyPath, own: str) -> None:
        if event.tag not in (None, "!", f"{_TAG}{own}"):
            self._report(path, _line(event), f"the tag {_shown_tag(event.tag)} is not read", "leave the tag out")

    def _report(self, path: KeyPath, line: int, message: str, suggestion: str | None = None) -> None:
        self.problems.append(Problem(dotted(path), message, self._file, line, suggestion))


def _tag_of(value: str | int | float | bool | None) -> str:
    if value is None:
        return "null"
    return {bool: "bool", int: "int", float: "float", str: "str"}[type(value)]


def _shown_tag(tag: str) -> str:
    shown = tag.replace(_TAG, "!!")
    return _one_line(shown if len(shown) <= 60 else shown[:57] + "...")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _line(event: Any) -> int:
    line: int = event.start_mark.line + 1
    return line
