"""From YAML and `section.key=value` overrides to one validated Config, with errors people can act on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rayfin.config.method import METHOD_CONFIGS
from rayfin.config.schema import Config
from rayfin.errors import ConfigError, did_you_mean

# YAML 1.1 reads 2e-4 as a string; people write learning rates like that.
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()
) -> Config:
    """The configuration in `source` (a YAML file, or a mapping) with `overrides` applied over it.

    Raises ConfigError, naming key, value, what is allowed and the nearest known key.
    """
    if source is None:
        tree: dict[str, Any] = {}
    elif isinstance(source, Mapping):
        tree = _copy(source)
    else:
        tree = _read_yaml(Path(source))
    return build_config(tree, parse_overrides(overrides))


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["train.max_steps=20"]` -> `{"train.max_steps": 20}`; values are YAML."""
    parsed: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{text}' is not an override; write section.key=value")
        try:
            parsed[key] = _number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{key}: '{value}' is not valid YAML ({_first_line(error)})"
            ) from error
    return parsed


def build_config(tree: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """`tree` with the dotted `overrides` put in, validated."""
    merged = _copy(tree)
    overrides = dict(overrides or {})
    # A new type first: the settings of the old one that the new one does not know go away.
    if (new_type := overrides.pop("method.type", None)) is not None:
        _change_method(merged, new_type)
    for key, value in overrides.items():
        _put(merged, key, value)
    merged = _default_method(merged)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe(error, merged)) from None


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` with dotted names set, validated again."""
    return build_config(config.model_dump(mode="json"), values)


def leaf_names(config: Config) -> list[str]:
    """Dotted names of all settings of `config`, as overrides and sweep axes take them."""

    def walk(model: BaseModel, prefix: str) -> Iterable[str]:
        for name in type(model).model_fields:
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    return list(walk(config, ""))


def dump_yaml(config: Config) -> str:
    """The resolved configuration, to be saved with a run and read back by `load_config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe(error: ValidationError, tree: Mapping[str, Any]) -> str:
    """All problems of a validation in one line."""
    return "; ".join(_describe_one(dict(problem), tree) for problem in error.errors())


def _describe_one(problem: dict[str, Any], tree: Mapping[str, Any]) -> str:
    # pydantic puts the union's tag (`lora`) into the location, after `method`; people did not write it.
    location = [str(part) for part in problem["loc"]]
    if len(location) > 1 and location[0] == "method" and location[1] in METHOD_CONFIGS:
        del location[1]
    if location[:2] == ["sweep", "parameters"]:
        key = f"sweep.parameters.{location[2]}" if len(location) > 2 else "sweep.parameters"
    else:
        key = ".".join(part for part in location if not part.startswith("function-"))
    value = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{did_you_mean(key, _known_keys(tree))}"
        case "union_tag_invalid" | "union_tag_not_found":
            given = value.get("type") if isinstance(value, Mapping) else value
            return (
                f"method.type: '{given}' is not a method; allowed: {', '.join(METHOD_CONFIGS)}"
                f"{did_you_mean(str(given), METHOD_CONFIGS)}"
            )
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case "string_pattern_mismatch":
            return f"{key}: {value!r} does not match {problem['ctx']['pattern']}"
        case "missing":
            return f"{key}: is missing; give it a value"
        case _:
            message = problem["msg"].removeprefix("Input should be ")
            return f"{key}: {_short(value)} is not allowed; it should be {message}"


def _known_keys(tree: Mapping[str, Any]) -> list[str]:
    method = tree.get("method")
    kind = method.get("type") if isinstance(method, Mapping) else None
    defaults = Config.model_validate({"method": {"type": kind}} if kind in METHOD_CONFIGS else {})
    return [*leaf_names(defaults), *Config.model_fields, "publish.name", "publish.alias"]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"configuration '{path}' does not exist; give the path of a YAML file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration '{path}' can't be read: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping in a YAML text; `name` is what an error calls it."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"configuration '{name}' is not valid YAML: {_first_line(error)}"
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"configuration '{name}' is a {type(tree).__name__}; it should be a mapping"
        )
    return tree


def _change_method(tree: dict[str, Any], new_type: Any) -> None:
    method = tree.get("method")
    if not isinstance(method, dict) or method.get("type") == new_type:
        _put(tree, "method.type", new_type)
        return
    known = METHOD_CONFIGS.get(str(new_type))
    kept = set(known.model_fields) if known else set(method)
    # A base quantised for the old method is not asked for by naming a new one.
    tree["method"] = {k: v for k, v in method.items() if k in kept and k != "quantization_bit"}
    tree["method"]["type"] = new_type


def _default_method(tree: dict[str, Any]) -> dict[str, Any]:
    """Without a type, settings under `method` are those of the default, qlora."""
    method = tree.get("method")
    if isinstance(method, dict) and "type" not in method:
        tree["method"] = {"type": "qlora", **method}
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    # Axes are dotted names themselves: sweep.parameters.method.r is one key under parameters.
    if sections[:2] == ["sweep", "parameters"]:
        sections, leaf = ["sweep", "parameters"], key.removeprefix("sweep.parameters.")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: '{section}' is a value, not a section")
        node = child
    node[leaf] = value


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else _number(v) for k, v in tree.items()}


def _number(value: Any) -> Any:
    if isinstance(value, str) and _FLOAT.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
