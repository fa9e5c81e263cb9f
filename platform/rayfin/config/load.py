"""From YAML and `section.key=value` overrides to one validated Config."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rayfin.config.problems import describe, shown, swept_methods
from rayfin.config.scalars import load_yaml, typed, typed_override, wanted_at
from rayfin.config.schema import Config
from rayfin.config.serving import ServeConfig
from rayfin.errors import ConfigError
from rayfin.methods import METHODS
from rayfin.redaction import HIDDEN, is_secret, redacted_settings

log = logging.getLogger(__name__)


def load_config(
    source: Config | str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()
) -> Config:
    """The configuration in `source` (a YAML file, a mapping, or one that was made before) with
    `overrides` applied over it.

    Raises ConfigError, naming key, value, what is allowed and the nearest known key. Settings of
    `source` that an override leaves out, by another method or a whole section, are named in a
    warning.
    """
    tree, values = _tree(source, Config), parse_overrides(overrides)
    _tell_replaced(tree, values)
    if "method.type" in values and (left := _method_over(tree, values["method.type"])[1]):
        settings = ", ".join(f"method.{name}={shown(value)}" for name, value in left.items())
        log.warning(
            "method.type=%s has no such setting: %s; left out", values["method.type"], settings
        )
    return build_config(tree, values)


def load_serve_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()
) -> ServeConfig:
    """As `load_config`, of a deployment."""
    tree, values = _tree(source, ServeConfig), parse_overrides(overrides, ServeConfig)
    _tell_replaced(tree, values)
    for key, value in values.items():
        _put(tree, key, value)
    try:
        return ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error, tree, ServeConfig)) from None


def parse_overrides(overrides: Iterable[str], kind: type[BaseModel] = Config) -> dict[str, Any]:
    """`["train.max_steps=20"]` -> `{"train.max_steps": 20}`, as the settings of `kind` take it.

    Values are YAML; what is given for a setting of text is that text.
    """
    parsed: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{text}' is not an override; write section.key=value")
        try:
            parsed[key] = typed_override(value, kind, key)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{key}: '{HIDDEN if is_secret(key) else value}' is not valid YAML "
                f"({'no scalar' if is_secret(key) else _first_line(error)}); quote the value"
            ) from error
    return parsed


def build_config(tree: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """`tree` with the dotted `overrides` put in, validated.

    Of a method that an override changes, all that the new one has stays.
    """
    merged = _copy(tree)
    overrides = dict(overrides or {})
    if "method.type" in overrides:
        merged["method"], _ = _method_over(merged, overrides.pop("method.type"))
    for key, value in overrides.items():
        _put(merged, key, value)
    merged = _default_method(merged)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe(error, merged)) from None


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` with dotted names set, validated again.

    What was not written in `config` is left to its defaults, which another method may have others
    of.
    """
    return build_config(config.model_dump(mode="json", exclude_unset=True), values)


def dump_yaml(config: Config) -> str:
    """The configuration without secrets, to be shown and saved with a run.

    `load_config` reads it back; of `method` it has what was written.
    """
    return yaml.safe_dump(redacted_settings(saved(config)), sort_keys=False, allow_unicode=True)


def saved(config: Config) -> dict[str, Any]:
    """The settings of `config`, from which `build_config` makes it again.

    All of them, but of `method` the type and what was written: another method that takes its place,
    or that is swept, has defaults of its own.
    """
    method = config.method.model_dump(mode="json", exclude_unset=True)
    return config.model_dump(mode="json") | {"method": method}


def _tree(
    source: BaseModel | str | Path | Mapping[str, Any] | None, kind: type[BaseModel]
) -> dict[str, Any]:
    """What was written, each value as the settings of `kind` take it."""
    if source is None:
        return {}
    if isinstance(source, BaseModel):
        return source.model_dump(mode="json", exclude_unset=True)
    written = source if isinstance(source, Mapping) else _read_yaml(Path(source))
    return dict(typed(written, kind))


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
    """The mapping in a YAML text, for `load_config`; `name` is what an error calls it."""
    try:
        tree = load_yaml(text)
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


def _method_over(tree: Mapping[str, Any], new_type: Any) -> tuple[Any, dict[str, Any]]:
    """The section `method` with another type, and what was written there that it doesn't have."""
    method = tree.get("method")
    if method is not None and not isinstance(method, Mapping):
        raise ConfigError("method.type: 'method' is a value, not a section")
    written = {name: value for name, value in (method or {}).items() if name != "type"}
    known = METHODS.get(str(new_type))
    left = (
        {} if known is None else {k: v for k, v in written.items() if k not in known.model_fields}
    )
    # An unknown setting is no other method's: it stays, to be refused with the nearest name.
    left = {k: v for k, v in left.items() if any(k in m.model_fields for m in METHODS.values())}
    return {"type": new_type} | {k: v for k, v in written.items() if k not in left}, left


def _default_method(tree: dict[str, Any]) -> dict[str, Any]:
    """Without a type, settings under `method` are those of the default.

    Or of the first method that is swept, as the default may be none of the trials'.
    """
    method, swept = tree.get("method", {}), swept_methods(tree)
    if isinstance(method, dict) and "type" not in method and ("method" in tree or swept):
        default = Config.model_fields["method"].default.type
        tree["method"] = {"type": swept[0] if swept else default, **method}
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for length in range(1, len(sections) + 1):
        # Keys of some settings are dotted names themselves: an axis, or a module with its rank.
        wanted = wanted_at(Config, ".".join(sections[:length]))
        if wanted.axes or wanted.values is not None:
            sections, leaf = sections[:length], ".".join(key.split(".")[length:])
            break
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: '{section}' is a value, not a section")
        node = child
    node[leaf] = value


def _tell_replaced(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Names what whole sections among the overrides take the place of."""
    for key, value in overrides.items():
        before: Any = tree
        for part in key.split("."):
            before = before.get(part) if isinstance(before, Mapping) else None
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            left = [str(name) for name in before if name not in value]
            if left:
                log.warning("%s={…} is the whole section: left out %s", key, ", ".join(left))


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
