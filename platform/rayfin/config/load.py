"""From YAML and `section.key=value` overrides to one validated Config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rayfin.config.method import METHOD_CONFIGS
from rayfin.config.problems import describe
from rayfin.config.schema import Config
from rayfin.config.serving import ServeConfig
from rayfin.errors import ConfigError

# YAML 1.1 reads 2e-4 as a string; people write learning rates like that.
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()
) -> Config:
    """The configuration in `source` (a YAML file, or a mapping) with `overrides` applied over it.

    Raises ConfigError, naming key, value, what is allowed and the nearest known key.
    """
    return build_config(_tree(source), parse_overrides(overrides))


def load_serve_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()
) -> ServeConfig:
    """As `load_config`, of a deployment."""
    tree = _tree(source)
    for key, value in parse_overrides(overrides).items():
        _put(tree, key, value)
    try:
        return ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error, tree, ServeConfig)) from None


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
                f"{key}: '{value}' is not valid YAML ({_first_line(error)}); quote the value"
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


def dump_yaml(config: Config) -> str:
    """The resolved configuration, to be saved with a run and read back by `load_config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _tree(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    if source is None:
        return {}
    return _copy(source) if isinstance(source, Mapping) else _read_yaml(Path(source))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"configuration '{path}' does not exist; give the path of a YAML file, or settings as "
            "section.key=value"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"configuration '{path}' can't be read ({reason}); give the path of a YAML file"
        ) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping in a YAML text; `name` is what an error calls it."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"configuration '{name}' is not valid YAML ({_first_line(error)}); mend that line"
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"configuration '{name}' is a {type(tree).__name__}; it should be a mapping of "
            "sections, as in `train: {max_steps: 20}`"
        )
    return tree


def _change_method(tree: dict[str, Any], new_type: Any) -> None:
    method = tree.get("method")
    if not isinstance(method, dict) or method.get("type") == new_type:
        _put(tree, "method.type", new_type)
        return
    known = METHOD_CONFIGS.get(str(new_type))
    kept = set(known.model_fields) if known else set(method)
    # What the old method has by default (a quantised base, say) is not asked for by naming a new
    # one, and the new one may not even take it: ia3 has no all-linear.
    before = METHOD_CONFIGS.get(str(method.get("type", "qlora")))
    defaults = {k: field.default for k, field in before.model_fields.items()} if before else {}
    tree["method"] = {
        k: v
        for k, v in method.items()
        if k in kept and k != "quantization_bit" and (k not in defaults or v != defaults[k])
    }
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


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
