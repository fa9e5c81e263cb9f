"""Read YAML by the type of each setting, so that a text setting gets the text as written.

YAML itself decides by how a scalar looks: the commit 51e8870 would be infinity, the version 1.10 a
number, the name `no` a boolean, and 010 eight. Here the setting decides: a text setting gets the
text, and all others get what YAML 1.2's core schema reads
(https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import functools
import json
import os
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from rayfin.config.schema import TrainConfig, train_section
from rayfin.config.sweep import Space
from rayfin.methods import METHODS, MethodConfig
from rayfin.objectives import OBJECTIVES

_NULL = ("", "~", "null", "Null", "NULL")
_INTEGER = re.compile(r"[+-]?\d{1,400}")
_BASED = re.compile(r"0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}")
_FLOAT = re.compile(r"[+-]?(\.\d+|\d+(\.\d*)?)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# YAML 1.1, for boolean settings, and for those whose type only another library knows.
_TRUTH = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}


class UnquotedScalar(str):
    """A scalar that was written without quotes, whose type is not decided yet."""

    __slots__ = ()


def load_yaml(text: str) -> Any:
    """Read a YAML document, with an `UnquotedScalar` for each scalar without quotes or a tag.

    Raises yaml.YAMLError, also for a duplicate key and for a value that contains itself.
    """
    document = yaml.load(text, _Loader)  # a SafeLoader
    try:
        json.dumps(document, default=str, skipkeys=True)
    except (ValueError, RecursionError):
        raise yaml.YAMLError("a value contains itself, or too many others") from None
    return document


@dataclass(frozen=True)
class SettingType:
    """The values that a setting takes; empty where that is unknown."""

    scalars: frozenset[type] = frozenset()
    """The types of scalars, out of str, int, float, bool and NoneType."""
    models: tuple[type[BaseModel], ...] = ()
    """The sections that a mapping may be."""
    items: SettingType | None = None
    """The type of a list's entries."""
    values: SettingType | None = None
    """The type of the values of a mapping with arbitrary keys."""
    axes: bool = False
    """Whether this is a mapping of dotted settings to lists of their values, or to ranges."""

    @property
    def text(self) -> bool:
        """Whether every scalar is text, however it looks."""
        return str in self.scalars and self.scalars <= {str, types.NoneType}

    @property
    def text_alone(self) -> bool:
        """Whether only text is taken, and no list or section."""
        return self.text and not self.models and self.items is None and self.values is None

    def of(self, key: str) -> SettingType:
        """Return the type of the setting `key` of this section."""
        sections = [section for model in self.models for section in _members(model)]
        kinds: list[Any] = [
            m.model_fields[key].annotation for m in sections if key in m.model_fields
        ]
        found = [_type_of(kind) for kind in kinds]
        return functools.reduce(_union, found) if found else self.values or SettingType()


def setting_type(kind: type[BaseModel], key: str) -> SettingType:
    """Return the type of a dotted setting of a configuration."""
    if key.startswith(_AXES):
        return _axis(setting_type(kind, key.removeprefix(_AXES)))
    return functools.reduce(SettingType.of, key.split("."), SettingType(models=(kind,)))


def typed(value: Any, kind: type[BaseModel], wanted: SettingType | None = None) -> Any:
    """Return a value that `load_yaml` read with every scalar converted to its setting's type.

    `wanted` is the type of the value, by default that of a whole configuration of `kind`. In a
    value that Python code made, paths become texts, ranges and arrays lists, and numpy's numbers
    Python's.
    """
    wanted = wanted or SettingType(models=(kind,))
    value = _plain(value)
    if isinstance(value, Mapping):
        if wanted.axes:
            inner = {k: typed(v, kind, _axis(setting_type(kind, str(k)))) for k, v in value.items()}
        else:
            inner = {k: typed(v, kind, wanted.of(str(k))) for k, v in value.items()}
        return {"" if key is None else str(key): item for key, item in inner.items()}
    if isinstance(value, list | tuple):
        return [typed(item, kind, wanted.items or SettingType()) for item in value]
    if not isinstance(value, str):
        return value
    if not wanted.text:
        # Quotes don't matter where text isn't taken; elsewhere they make a scalar text.
        known = wanted.scalars or isinstance(value, UnquotedScalar)
        return _core(value, wanted) if known else value
    null = isinstance(value, UnquotedScalar) and value in _NULL and types.NoneType in wanted.scalars
    return None if null else str(value)


def typed_override(text: str, kind: type[BaseModel], key: str) -> Any:
    """Return the value of `key=text`: the text itself for a setting that takes only text, else
    YAML.

    Quotes around a text are removed. Raises yaml.YAMLError.
    """
    wanted = setting_type(kind, key)
    if not wanted.text_alone:
        return typed(load_yaml(text), kind, wanted)
    text = text.strip()
    if text[:1] in ("'", '"') and text[-1] == text[0] and len(text) > 1:
        return load_yaml(text)
    return typed(UnquotedScalar(text), kind, wanted)


def _plain(value: Any) -> Any:
    """Return what YAML would have read in place of a path, a range, or an array or its number."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, range):
        return list(value)
    # Only numpy's numbers and arrays, torch's tensors and their like have it.
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


_AXES = "sweep.parameters."


class _Loader(yaml.SafeLoader):
    """Leaves the types of scalars open; << merges as usual."""

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
    return UnquotedScalar(text) if text else None


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_scalar)


def _core(text: str, wanted: SettingType) -> Any:
    """Return what the core schema reads: null, a boolean, a number, or the text itself."""
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
    """Return the sections that a section of this type may be: for a method, all registered ones."""
    if model is TrainConfig:
        return dict.fromkeys(map(train_section, OBJECTIVES))
    return METHODS.values() if model is MethodConfig else (model,)


@functools.cache
def _type_of(annotation: Any) -> SettingType:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_of(arguments[0])
    if origin in (Union, types.UnionType):
        return functools.reduce(_union, map(_type_of, arguments))
    if origin is Literal:
        return SettingType(frozenset(map(type, arguments)))
    if origin in (tuple, list):
        return SettingType(items=_type_of(arguments[0]))
    if origin is dict:
        values = _type_of(arguments[1])
        return (
            SettingType(axes=True) if values.items == SettingType() else SettingType(values=values)
        )
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return SettingType(models=(annotation,))
        if annotation in (str, int, float, bool, types.NoneType):
            return SettingType(frozenset({annotation}))
    return SettingType()


def _union(one: SettingType, other: SettingType) -> SettingType:
    return SettingType(
        one.scalars | other.scalars,
        (*one.models, *other.models),
        one.items if other.items is None else other.items,
        one.values if other.values is None else other.values,
        one.axes or other.axes,
    )


def _axis(setting: SettingType) -> SettingType:
    """Return the type of a sweep's axis: a list of a setting's values, or a range."""
    return SettingType(models=(Space,), items=setting)
