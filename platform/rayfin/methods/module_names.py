"""Module names in settings: which modules of a model they name, and whether PEFT agrees."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field


def _no_expression(name: str) -> str:
    """PEFT takes names in patterns for regular expressions, whose engine others may not share."""
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError(
            f"{name!r} is no module's name; write one, such as q_proj or layers.0.self_attn.q_proj"
        )
    return name


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
"""One module name at least."""
Name = Annotated[str, AfterValidator(_no_expression)]
Number = TypeVar("Number", int, float)


def is_named(module: str, name: str) -> bool:
    """Return whether `name` is a module's whole name or its last parts."""
    return module == name or module.endswith(f".{name}")


def may_be_named(end: str, layer: int | None, name: str) -> bool:
    """Return whether `name` may be that of the module in `layer` whose name has this end.

    `layer` is None for a module that is in none.
    """
    same = name == end or name.endswith(f".{end}") or end.endswith(f".{name}")
    return same and layer_of(name) in (None, layer)


def layer_of(module: str) -> int | None:
    """Return the number of the layer that a module is in; None where it is in none."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def own_value(pattern: Mapping[str, Number], meant: Callable[[str], bool]) -> Number | None:
    """Return the value of the first name in `pattern` that is `meant`; None where none is."""
    return next((value for name, value in pattern.items() if meant(name)), None)


def listed(names: str | tuple[str, ...] | None) -> str | list[str] | None:
    """Return module names as PEFT takes them."""
    return list(names) if isinstance(names, tuple) else names
