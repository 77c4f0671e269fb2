"""What all sections of the schema are made of: the base model and the value types they share."""

from __future__ import annotations

import os.path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator


class Section(BaseModel):
    """Base of all sections: immutable, strictly typed, unknown keys forbidden, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Component(Section):
    """A named component: `name`, or `{type: name, <its options>}`."""

    model_config = ConfigDict(extra="allow")

    type: str
    """Name of the component in its registry."""

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_name(cls, value: object) -> object:
        return {"type": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The component's own options, all of them once `validate_config` has filled in the defaults."""
        return dict(self.model_extra or {})


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


_OneOrMoreTexts = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, in which a leading `~` is the home directory, as in a shell."""
PathList = Annotated[list[str], BeforeValidator(_as_list), _OneOrMoreTexts]
NameList = Annotated[list[str], Field(min_length=1), BeforeValidator(_as_list), _OneOrMoreTexts]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]


def _refuse_integer(value: object) -> object:
    # 1 == True, so a Literal alone accepts 1 and 0. Text no choice is called gives the Literal's own message.
    return f"the integer {value}" if isinstance(value, int) and not isinstance(value, bool) else value


AutoBool = Annotated[Literal["auto", True, False], BeforeValidator(_refuse_integer)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
