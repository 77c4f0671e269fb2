"""A registry maps a name in the YAML to a builder and to the options that name accepts.

Names resolve only here: nothing in a YAML is ever imported or evaluated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, create_model

Builder = TypeVar("Builder", bound=Callable[..., Any])


class Options(BaseModel):
    """Base of the options models: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class NoOptions(Options):
    """For an entry that takes no options."""


@dataclass(frozen=True)
class Availability:
    """Whether an entry can do its job on this machine; if not, why, and what stands in for it."""

    available: bool
    reason: str | None = None
    fallback: str | None = None


def always_available() -> Availability:
    """The probe of an entry that needs nothing beyond the core dependencies."""
    return Availability(True)


@dataclass(frozen=True)
class Entry:
    """One registered component: its name, builder, options model and availability probe."""

    name: str
    build: Callable[..., Any]
    options: type[BaseModel]
    probe: Callable[[], Availability] = always_available

    @property
    def summary(self) -> str:
        """First line of the builder's docstring, for listings."""
        return (inspect.getdoc(self.build) or "").split("\n", 1)[0]


class Registry:
    """The named components of one kind, for example all optimizers.

    Args:
        kind: what the entries are, singular, for messages ("optimizer").
        runtime: names of the run-time arguments `build` may pass to a builder, next to the options of the YAML.
    """

    def __init__(self, kind: str, runtime: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.runtime = runtime
        self._entries: dict[str, Entry] = {}

    def register(
        self,
        name: str,
        *,
        options: type[BaseModel] | None = None,
        probe: Callable[[], Availability] = always_available,
    ) -> Callable[[Builder], Builder]:
        """Decorator that adds a builder under `name`.

        Without an `options` model the builder's own keyword parameters, less the run-time arguments, are its options.

        Raises:
            ValueError: `name` is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is already registered")

        def add(builder: Builder) -> Builder:
            model = options if options is not None else options_from_signature(builder, self.runtime)
            self._entries[name] = Entry(name, builder, model, probe)
            return builder

        return add

    def unregister(self, name: str) -> None:
        """Remove an entry; for tests and for notebooks that define a component again."""
        del self._entries[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries[name] for name in self.names())

    def entry(self, name: str) -> Entry:
        """The entry called `name`; KeyError lists what exists."""
        if name not in self._entries:
            raise KeyError(f"no {self.kind} is called {name!r}; there are: {', '.join(self.names())}")
        return self._entries[name]

    def build(self, name: str, options: Mapping[str, Any] | None = None, /, **runtime: Any) -> Any:
        """Build the component `name`.

        The builder receives its checked options, and of `runtime` the arguments its signature names (all of them if it
        takes `**kwargs`).

        Raises:
            KeyError: no such entry.
            pydantic.ValidationError: the options do not fit the entry's options model.
            TypeError: a run-time argument was passed that this registry does not declare.
        """
        undeclared = sorted(set(runtime) - set(self.runtime))
        if undeclared:
            raise TypeError(f"{self.kind} builders take no run-time argument {', '.join(undeclared)}")
        entry = self.entry(name)
        checked = entry.options.model_validate(dict(options or {}))
        keywords = {field: getattr(checked, field) for field in type(checked).model_fields}
        return entry.build(**keywords, **{k: v for k, v in runtime.items() if accepts(entry.build, k)})


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` can be called with the keyword argument `name`."""
    parameters = inspect.signature(function).parameters
    if name in parameters:
        return parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def options_from_signature(builder: Callable[..., Any], runtime: tuple[str, ...]) -> type[BaseModel]:
    """Options model made of a builder's keyword parameters; `**kwargs` opens nothing to the YAML."""
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(builder, eval_str=True).parameters.values():
        variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if variadic or parameter.name in runtime:
            continue
        annotation = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (annotation, default)
    name = "".join(part.title() for part in builder.__name__.split("_")) + "Options"
    model: type[BaseModel] = create_model(name, __base__=Options, **fields)
    return model
