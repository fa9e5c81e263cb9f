"""The command that trains a configuration, as it is typed in a shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from rayfin.advisor.description import is_described_data, is_described_model
from rayfin.config import Config, build_config, parse_overrides, saved
from rayfin.history.connect import without_password

YOUR_MODEL, YOUR_DATA = "YOUR_MODEL", "YOUR_DATA.jsonl"
"""What stands for a model and data that were only described, to be replaced by hand."""
_SECTIONS = ("model", "data", "method", "train", "scaling", "storage", "history", "publish")
_NAMED = ("model.name", "data.path", "method.type", "train.learning_rate")
"""Settings that are said even where they are the defaults, before all others."""


def training_command(config: Mapping[str, Any]) -> str:
    """Return `rayfin train section.key=value …` for a whole configuration, as a choice has it.

    Only what differs from the defaults is said. YOUR_MODEL and YOUR_DATA.jsonl stand for what was
    only described. A history's password is left out.
    """
    whole = build_config(dict(config))
    tree = saved(whole)
    usual = Config().model_dump(mode="json")
    method = tree["method"]["type"]
    usual["method"] = build_config({"method": {"type": method}}).method.model_dump(mode="json")
    places = {}
    if is_described_model(whole):
        places["model.name"] = YOUR_MODEL
    if is_described_data(whole):
        places["data.path"] = YOUR_DATA
    found = {
        name: places.get(name, value)
        for section in _SECTIONS
        for name, value in _leaves(section, tree[section])
        if (name in _NAMED and value is not None) or value != _at(usual, name)
    }
    if isinstance(history := found.get("history"), str):
        found["history"] = without_password(history)
    order = sorted(found, key=lambda name: name not in _NAMED)
    return shlex.join(
        ["rayfin", "train", *(f"{name}={_text(name, found[name])}" for name in order)]
    )


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


def _text(name: str, value: Any) -> str:
    """Return a value as an override that is read back as the same one."""
    if isinstance(value, str) and parse_overrides([f"{name}={value}"])[name] == value:
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False)
