"""`--settings`: every setting with its values, default and meaning, as the configuration has it."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from rayfin.cli.completion import Kind, SettingsCompleter
from rayfin.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


_OF_DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""Endings of data files, which no configuration has."""


class ShowSettings(argparse.Action):
    """The action of --settings: prints the settings, as wide as --help is, and ends the command."""

    kind: Kind = "experiment"

    def lines(self) -> Iterator[str]:
        return settings_lines()

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        width = shutil.get_terminal_size().columns - 2  # what argparse leaves of it
        print("\n".join(_wrapped(line, width) for line in self.lines()))
        parser.exit()


class ShowServeSettings(ShowSettings):
    """The action of --settings for a deployment."""

    kind: Kind = "deployment"

    def lines(self) -> Iterator[str]:
        return serve_settings_lines()


def add_settings(parser: argparse.ArgumentParser, show: type[ShowSettings] = ShowSettings) -> None:
    """Add the arguments `[config.yaml] [section.key=value …]`, and `--settings`."""
    settings = parser.add_argument(
        "settings",
        nargs="*",
        metavar="config.yaml | section.key=value",
        help="a configuration file first, if any, and settings that win over it",
    )
    settings.completer = SettingsCompleter(show.kind)  # type: ignore[attr-defined]
    parser.add_argument(
        "--settings",
        dest="show_settings",
        nargs=0,
        action=show,
        help="list every setting with its default and meaning",
    )


def split_settings(settings: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the configuration file that goes first, if there is one, and the overrides.

    Raises UsageError for a file of data, which a setting names.
    """
    if settings and "=" not in settings[0]:
        if settings[0].lower().removesuffix(".gz").endswith(_OF_DATA):
            raise UsageError(
                f"'{settings[0]}' is data, and no configuration; write data.path={settings[0]}"
            )
        return Path(settings[0]), list(settings[1:])
    return None, list(settings)


def settings_lines() -> Iterator[str]:
    """Yield the settings of an experiment as lines for people, a section at a time."""
    from rayfin.config import Config, PublishConfig
    from rayfin.methods import METHODS
    from rayfin.objectives import OBJECTIVES

    for name, field in Config.model_fields.items():
        if name == "method":
            yield from ("", f"method.type = {field.default.type}")
            for kind, method in METHODS.items():
                yield f"  {kind:15}{_folded(method.__doc__)}"
            for kinds, model in _alike(METHODS):
                yield from _section("method", model, f"method, of type {', '.join(kinds)}")
        elif name == "train":
            yield from _top(name, field)
            for stage, objective in OBJECTIVES.items():
                if objective.settings_class.model_fields:
                    yield from _section(name, objective.settings_class, f"train, of stage {stage}")
        elif name == "publish":
            title = f"publish = null  {_folded(field.description)}"
            yield from _section(name, PublishConfig, title)
        else:
            yield from _top(name, field)


def serve_settings_lines() -> Iterator[str]:
    """Yield the settings of a deployment as lines for people, a section at a time."""
    from rayfin.config import ServeConfig

    for name, field in ServeConfig.model_fields.items():
        yield from _top(name, field)


def _top(name: str, field: FieldInfo) -> Iterator[str]:
    """Yield a section, or a setting that is in none."""
    if field.description:
        yield from ("", f"{name} = {_plain(field.default)}", f"      {_folded(field.description)}")
    else:
        yield from _section(name, type(field.default), name)


def _alike(methods: Mapping[str, type[BaseModel]]) -> list[tuple[list[str], type[BaseModel]]]:
    """Return the methods with their settings, those that have the same ones together."""
    groups: dict[str, tuple[list[str], type[BaseModel]]] = {}
    for kind, model in methods.items():
        text = "\n".join(_section("method", model, ""))
        groups.setdefault(text, ([], model))[0].append(kind)
    return list(groups.values())


def _section(name: str, model: type[BaseModel], title: str) -> Iterator[str]:
    yield from ("", title)
    for key, field in model.model_fields.items():
        if (name, key) != ("method", "type"):
            yield from _setting(f"{name}.{key}", field)


def _setting(key: str, field: FieldInfo) -> Iterator[str]:
    from rayfin.section import registered_names

    value = field.get_default(call_default_factory=True)
    default = "" if field.is_required() else f" = {_plain(value)}"
    values = " | ".join(registered_names(field)) or _values(field.annotation)
    yield f"  {key}{default}{f'  ({values})' if values else ''}"
    if field.description:
        yield f"      {_folded(field.description)}"


def _values(annotation: Any) -> str:
    """Return `auto | float32 | …` for a choice; empty where the default says what is wanted."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(_plain, get_args(annotation)))
    return ""


def _folded(text: str | None) -> str:
    return " ".join((text or "").split())


def _wrapped(line: str, width: int) -> str:
    """Break a line between words; what goes on is under the meaning that the line begins."""
    start = re.match(r" *(\S+ {2,})?", line)
    assert start is not None
    lines = textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * max(6, len(start[0])),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return re.sub(r"e-0(\d)", r"e-\1", json.dumps(value))
