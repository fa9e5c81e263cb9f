"""The command that trains a configuration, as it is typed in a shell."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from rayfin.config import Config, build_config, parse_overrides, saved
from rayfin.history.connect import without_password

YOUR_MODEL, YOUR_DATA = "YOUR_MODEL", "YOUR_DATA.jsonl"
"""What stands for a model and data that were only described, to be replaced by hand."""
_DESCRIBED = {
    "model.name": (re.compile(r"a model of \S+B"), YOUR_MODEL),
    "data.path": (re.compile(r"\d+ rows"), YOUR_DATA),
}
_SECTIONS = ("model", "data", "method", "train", "scaling", "storage", "history", "publish")
_NAMED = ("model.name", "data.path", "method.type", "train.learning_rate")
"""Settings that are said even where they are the defaults, each the first of its section."""


def training_command(config: Mapping[str, Any]) -> str:
    """Return `rayfin train section.key=value …` for a whole configuration, as a choice has it.

    Only what differs from the defaults is said. YOUR_MODEL and YOUR_DATA.jsonl stand for what was
    only described. A history's password is left out.
    """
    tree = saved(build_config(dict(config)))
    usual = Config().model_dump(mode="json")
    method = tree["method"]["type"]
    usual["method"] = build_config({"method": {"type": method}}).method.model_dump(mode="json")
    words = ["rayfin", "train"]
    for section in _SECTIONS:
        leaves = sorted(_leaves(section, tree[section]), key=lambda leaf: leaf[0] not in _NAMED)
        for name, value in leaves:
            if (name in _NAMED and value is not None) or value != _at(usual, name):
                words.append(f"{name}={_text(name, _said(name, value))}")
    return shlex.join(words)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a section by their dotted names, the section itself if it is one."""
    if name not in Config.model_fields or not isinstance(value, Mapping):
        yield name, value
        return
    for leaf, inner in value.items():
        yield f"{name}.{leaf}", inner


def _at(tree: Mapping[str, Any], name: str) -> Any:
    section, _, leaf = name.partition(".")
    found = tree.get(section)
    return found.get(leaf) if leaf and isinstance(found, Mapping) else found if not leaf else None


def _said(name: str, value: Any) -> Any:
    if name == "history" and isinstance(value, str):
        return without_password(value)
    described = _DESCRIBED.get(name)
    if described and isinstance(value, str) and described[0].fullmatch(value):
        return described[1]
    return value


def _text(name: str, value: Any) -> str:
    """Return a value as an override that is read back as the same one."""
    if isinstance(value, str) and parse_overrides([f"{name}={value}"])[name] == value:
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)
