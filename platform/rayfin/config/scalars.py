"""YAML read by what each setting takes: a setting of text has the text that was written.

YAML alone decides by how a scalar looks: the commit 51e8870 would be infinity, the version 1.10 a
number, the name `no` a truth value, and 010 eight. Here the setting decides: one that takes text
gets the text, and all others what YAML 1.2's core schema reads
(https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from rayfin.config.schema import Space
from rayfin.methods import METHODS, MethodConfig

_NULL = ("", "~", "null", "Null", "NULL")
_INTEGER = re.compile(r"[+-]?\d{1,400}")
_BASED = re.compile(r"0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}")
_FLOAT = re.compile(r"[+-]?(\.\d+|\d+(\.\d*)?)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Of YAML 1.1, for settings that are true or false, and those whose kind only another library knows.
_TRUTH = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}


class Plain(str):
    """A scalar as it was written, without quotes: no one has said yet what it means."""

    __slots__ = ()


def load_yaml(text: str) -> Any:
    """The document in `text`, with a `Plain` for each scalar without quotes or a tag.

    Raises yaml.YAMLError, also for a key that is there twice, or a value that contains itself.
    """
    document = yaml.load(text, _Loader)  # a SafeLoader
    try:
        json.dumps(document, default=str, skipkeys=True)
    except (ValueError, RecursionError):
        raise yaml.YAMLError("a value contains itself, or too many others") from None
    return document


@dataclass(frozen=True)
class Wanted:
    """What a setting takes; empty where that isn't known."""

    scalars: frozenset[type] = frozenset()
    """Kinds of scalars that are taken, of str, int, float, bool and NoneType."""
    models: tuple[type[BaseModel], ...] = ()
    """Sections, one of which a mapping is."""
    items: Wanted | None = None
    """What the entries of a list take."""
    values: Wanted | None = None
    """What the values of a mapping with any keys take."""
    axes: bool = False
    """A mapping whose keys are dotted settings, and whose values are lists of theirs, or ranges."""

    @property
    def text(self) -> bool:
        """Whether a scalar is text, however it looks."""
        return str in self.scalars and self.scalars <= {str, types.NoneType}

    @property
    def text_alone(self) -> bool:
        """Whether nothing but text is taken, no list or section either."""
        return self.text and not self.models and self.items is None and self.values is None

    def of(self, key: str) -> Wanted:
        """What the setting `key` of this section takes."""
        sections = [section for model in self.models for section in _members(model)]
        kinds: list[Any] = [
            m.model_fields[key].annotation for m in sections if key in m.model_fields
        ]
        found = [_wanted(kind) for kind in kinds]
        return functools.reduce(_either, found) if found else self.values or Wanted()


def wanted_at(kind: type[BaseModel], key: str) -> Wanted:
    """What the dotted setting `key` of a configuration takes."""
    if key.startswith(_AXES):
        return _axis(wanted_at(kind, key.removeprefix(_AXES)))
    return functools.reduce(Wanted.of, key.split("."), Wanted(models=(kind,)))


def typed(value: Any, kind: type[BaseModel], wanted: Wanted | None = None) -> Any:
    """`value`, which `load_yaml` read, with every scalar as the setting takes it.

    `wanted`: what `value` is, for a part of a configuration of `kind`.
    """
    wanted = wanted or Wanted(models=(kind,))
    if isinstance(value, Mapping):
        if wanted.axes:
            inner = {k: typed(v, kind, _axis(wanted_at(kind, str(k)))) for k, v in value.items()}
        else:
            inner = {k: typed(v, kind, wanted.of(str(k))) for k, v in value.items()}
        return {"" if key is None else str(key): item for key, item in inner.items()}
    if isinstance(value, list | tuple):
        return [typed(item, kind, wanted.items or Wanted()) for item in value]
    if not isinstance(value, str):
        return value
    if not wanted.text:
        # Quotes say nothing where text isn't taken; elsewhere they say that it is.
        known = wanted.scalars or isinstance(value, Plain)
        return _core(value, wanted) if known else value
    null = isinstance(value, Plain) and value in _NULL and types.NoneType in wanted.scalars
    return None if null else str(value)


def typed_override(text: str, kind: type[BaseModel], key: str) -> Any:
    """The value of `key=text`: text as it stands where the setting takes nothing else, else YAML.

    Quotes around a text are no part of it. Raises yaml.YAMLError.
    """
    wanted = wanted_at(kind, key)
    if not wanted.text_alone:
        return typed(load_yaml(text), kind, wanted)
    text = text.strip()
    if text[:1] in ("'", '"') and text[-1] == text[0] and len(text) > 1:
        return load_yaml(text)
    return typed(Plain(text), kind, wanted)


_AXES = "sweep.parameters."


class _Loader(yaml.SafeLoader):
    """Leaves open what a scalar means; << merges as ever."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1 and key != "<<"), None):
            raise yaml.composer.ComposerError(
                None, None, f"'{twice}' is there twice", node.start_mark
            )
        return node


def _construct_scalar(loader: _Loader, node: yaml.ScalarNode) -> str | None:
    text = loader.construct_scalar(node)
    if node.style is not None:
        return str(text)
    return Plain(text) if text else None


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_scalar)


def _core(text: str, wanted: Wanted) -> Any:
    """What the core schema reads: nothing, a truth value, a number, or the text itself."""
    if text in _NULL:
        return None
    truth = _TRUTH.get(text.lower())
    if truth is not None and (not wanted.scalars or bool in wanted.scalars):
        return truth
    if _INTEGER.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _NOT_FINITE.fullmatch(text) else str(text)


def _members(model: type[BaseModel]) -> Iterable[type[BaseModel]]:
    """The sections that a section of this kind may be: of a method, all that are registered."""
    return METHODS.values() if model is MethodConfig else (model,)


@functools.cache
def _wanted(annotation: Any) -> Wanted:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _wanted(arguments[0])
    if origin in (Union, types.UnionType):
        return functools.reduce(_either, map(_wanted, arguments))
    if origin is Literal:
        return Wanted(frozenset(map(type, arguments)))
    if origin in (tuple, list):
        return Wanted(items=_wanted(arguments[0]))
    if origin is dict:
        values = _wanted(arguments[1])
        return Wanted(axes=True) if values.items == Wanted() else Wanted(values=values)
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return Wanted(models=(annotation,))
        if annotation in (str, int, float, bool, types.NoneType):
            return Wanted(frozenset({annotation}))
    return Wanted()


def _either(one: Wanted, other: Wanted) -> Wanted:
    return Wanted(
        one.scalars | other.scalars,
        (*one.models, *other.models),
        one.items if other.items is None else other.items,
        one.values if other.values is None else other.values,
        one.axes or other.axes,
    )


def _axis(setting: Wanted) -> Wanted:
    """A list of what a setting takes, or a range."""
    return Wanted(models=(Space,), items=setting)
