"""Describe the problems of a configuration in one line: key, value, and what is allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from rayfin.config.schema import Config, PublishConfig
from rayfin.config.sources import SourceConfig
from rayfin.errors import did_you_mean
from rayfin.methods import METHODS
from rayfin.objectives import OBJECTIVES
from rayfin.redaction import is_secret

# pydantic's own messages for these name Python classes.
_WANTED = {
    "model_type": "a section of key: value pairs",
    "model_attributes_type": "a section of key: value pairs",
    "dict_type": "a section of key: value pairs",
    "tuple_type": "a list",
    "list_type": "a list",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_too_short": "a text that isn't empty",
    "too_short": "a list that isn't empty",
    "string_pattern_mismatch": (
        "letters, digits, '.', '_' and '-', at most 64, the first a letter or digit"
    ),
}


_INTERVAL = "a whole number of steps from 1, or a share of all steps above 0 and below 1"
_ALLOWED = {
    "train.eval_steps": _INTERVAL,
    "train.save_steps": _INTERVAL,
    "train.warmup_steps": "a whole number from 0; a share of all steps is train.warmup_ratio",
    "data.val_size": (
        "greater than 0 and less than 1: trials are compared on held-out samples, few of them by "
        "0.01, say, or those of a file of their own by data.eval_path"
    ),
}
"""What is allowed of settings of which pydantic's words say too little."""

_MEANT = {
    "train.dropout": "method.lora_dropout",
    "train.lora_dropout": "method.lora_dropout",
    "train.metric_for_best_model": "sweep.metric",
    "train.load_best_model_at_end": "train.keep",
    "train.bf16": "model.dtype",
    "train.fp16": "model.dtype",
}
"""Settings by Transformers' and other tools' names, and rayfin's for the same."""


def describe(
    error: ValidationError, tree: Mapping[str, Any], kind: type[BaseModel] = Config
) -> str:
    """Return one line with all problems of a validation."""
    wanted: dict[tuple[str, str], list[str]] = {}
    sentences: list[str] = []
    for problem in error.errors():
        key, value = _key(problem["loc"], tree), problem.get("input")
        if (part := key.rpartition(".")[2]).count(":") == 1:
            sentences.append(
                f"{key}: YAML takes {part!r} for a name without a value; put a space after the "
                f"colon, as in {{{part.replace(':', ': ')}}}"
            )
            continue
        match problem["type"]:
            case "extra_forbidden":
                sentences.append(
                    _of_another_method(key, value, tree) or _unknown(key, _known_keys(tree, kind))
                )
            case "unknown_method":
                sentences.append(_no_method(value))
            case "value_error":
                # A problem of several sections has no key, and names them itself.
                sentences.append(f"{key}: {problem['ctx']['error']}".removeprefix(": "))
            case "missing":
                sentences.append(f"{key}: is missing; give it a value")
            case other:
                words = _WANTED.get(other, problem["msg"].removeprefix("Input should be "))
                if other == "literal_error":
                    words = re.sub(r"\b(True|False)\b", lambda found: found[0].lower(), words)
                # Every member of a union reports a problem of its own: they are one.
                given = "what is given" if is_secret(key) else format_value(value)
                wanted.setdefault((key, given), []).append(words)
    for (key, given), choices in wanted.items():
        allowed = _ALLOWED.get(key) or " or ".join(dict.fromkeys(choices))
        sentences.append(f"{key}: {given} is not allowed; it should be {allowed}")
    return "; ".join(dict.fromkeys(sentences))


def leaf_names(config: BaseModel) -> list[str]:
    """Return the dotted names of all settings, as overrides and sweep axes take them."""

    def walk(model: BaseModel, prefix: str) -> Iterable[str]:
        for name in type(model).model_fields:
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    return list(walk(config, ""))


def format_value(value: Any) -> str:
    """Return a value as YAML writes it, cut to 60 characters."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def swept_methods(tree: Mapping[str, Any]) -> list[Any]:
    """Return the methods that a nested configuration sweeps, if any."""
    sweep = tree.get("sweep")
    axes = sweep.get("parameters") if isinstance(sweep, Mapping) else None
    methods = axes.get("method.type") if isinstance(axes, Mapping) else None
    return list(methods) if isinstance(methods, list | tuple) else []


def _of_another_method(key: str, value: Any, tree: Mapping[str, Any]) -> str | None:
    """Return the remedy for a setting that only other methods of the sweep have, else None."""
    section, _, name = key.partition(".")
    methods = [m for m in swept_methods(tree) if isinstance(m, str) and m in METHODS]
    having = [m for m in methods if name in METHODS[m].model_fields]
    if section != "method" or not having:
        return None
    own = tree["method"].get("type")
    return (
        f"{key}: method.type={own} has no such setting, and {', '.join(having)} of "
        "sweep.parameters.method.type would not get it; give it to those as an axis, "
        f"sweep.parameters.{key}=[{format_value(value)}]"
    )


def _key(location: tuple[int | str, ...], tree: Mapping[str, Any]) -> str:
    """Return the key as it was written: pydantic's location without the members of unions."""
    parts: list[str] = []
    node: Any = tree
    for index, part in enumerate(location):
        last_missing = index == len(location) - 1 and isinstance(part, str) and part.isidentifier()
        if isinstance(node, Mapping) and (part in node or last_missing):
            node = node.get(part)
        elif isinstance(node, (list, tuple)) and isinstance(part, int):
            node = node[part]
        else:
            continue
        parts.append(str(part))
    return ".".join(parts)


def _unknown(key: str, known: list[str]) -> str:
    axes = "sweep.parameters."
    if key in known or key.startswith(axes):  # the setting is known: its name was written with dots
        names = key.split(".", 2) if key.startswith(axes) else key.split(".")
        nested = "…"
        for name in reversed(names):
            nested = f"{{'{name}': {nested}}}"
        return f"{key}: unknown key; write {nested}"
    meant = _MEANT.get(key)
    if near := did_you_mean(meant if meant in known else key, known):
        return f"{key}: unknown key{near}"
    section, dot, _ = key.rpartition(".")
    prefix = section + dot
    beside = {n.removeprefix(prefix).partition(".")[0] for n in known if n.startswith(prefix)}
    return f"{key}: unknown key; allowed: {', '.join(sorted(beside))}"


def _no_method(value: Any) -> str:
    given = value.get("type") if isinstance(value, Mapping) else value
    return (
        f"method.type: {format_value(given)} is not a method; allowed: {', '.join(METHODS)}"
        f"{did_you_mean(str(given), METHODS)}"
    )


def _known_keys(tree: Mapping[str, Any], kind: type[BaseModel]) -> list[str]:
    if kind is not Config:
        return [*leaf_names(kind()), *kind.model_fields]
    method = tree.get("method")
    type_ = method.get("type") if isinstance(method, Mapping) else None
    train = tree.get("train")
    stage = train.get("stage") if isinstance(train, Mapping) else None
    known = {"method": {"type": type_}} if type_ in METHODS else {}
    known |= {"train": {"stage": stage}} if stage in OBJECTIVES else {}
    defaults = Config.model_validate(known)
    publish = [f"publish.{name}" for name in PublishConfig.model_fields]
    return [*leaf_names(defaults), *Config.model_fields, *publish, *_source_keys(tree)]


def _source_keys(tree: Mapping[str, Any]) -> list[str]:
    """Return the dotted settings of the sources of data in a nested configuration."""
    data = tree.get("data")
    sources = data.get("sources") if isinstance(data, Mapping) else None
    count = len(sources) if isinstance(sources, (list, tuple)) else 0
    return [f"data.sources.{n}.{name}" for n in range(count) for name in SourceConfig.model_fields]
