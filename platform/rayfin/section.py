"""The base class of a configuration's sections, and settings that take a registry's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Section(BaseModel):
    """A frozen section of a configuration, which refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class OneOf:
    """Annotates a text that must be one of the names in a registry at the time of validation.

    Errors are those of a `Literal` of these names.
    """

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self.names = names

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._checked, handler(str))

    def _checked(self, value: Any) -> str:
        names = [*self.names()]
        if isinstance(value, str) and value in names:
            return value
        *others, last = map(repr, names)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": expected}
        )


def registered_names(field: FieldInfo) -> tuple[str, ...]:
    """Return the names that a setting, or a list's item, annotated with `OneOf` takes, or none."""
    of_items = [it for item in get_args(field.annotation) for it in get_args(item)[1:]]
    found = (it for it in (*field.metadata, *of_items) if isinstance(it, OneOf))
    return tuple(name for it in found for name in it.names())
