"""Load a validated configuration from YAML and `section.key=value` overrides."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rayfin.config.problems import describe, format_value, swept_methods
from rayfin.config.scalars import load_yaml, setting_type, typed, typed_override
from rayfin.config.schema import Config
from rayfin.config.serving import ServeConfig
from rayfin.errors import ConfigError
from rayfin.methods import METHODS
from rayfin.redaction import HIDDEN, is_secret, redacted_settings

log = logging.getLogger(__name__)


def load_config(
    source: Config | str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()
) -> Config:
    """Return the configuration in `source` (a YAML file, a mapping or a Config) with overrides.

    Raises ConfigError, which names the key, the value, what is allowed and the nearest known key. A
    warning names settings of `source` that an override drops, by another method or a whole section.
    """
    tree, values = _tree(source, Config), parse_overrides(overrides)
    _tell_replaced(tree, values)
    if "method.type" in values and (left := _method_over(tree, values["method.type"])[1]):
        settings = ", ".join(f"method.{name}={format_value(value)}" for name, value in left.items())
        log.warning(
            "method.type=%s has no such setting: %s; left out", values["method.type"], settings
        )
    return build_config(tree, values)


def load_serve_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()
) -> ServeConfig:
    """Return the configuration of a deployment, as `load_config` does that of an experiment."""
    tree, values = _tree(source, ServeConfig), parse_overrides(overrides, ServeConfig)
    _tell_replaced(tree, values)
    for key, value in values.items():
        _put(tree, key, value)
    try:
        return ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error, tree, ServeConfig)) from None


def parse_overrides(overrides: Iterable[str], kind: type[BaseModel] = Config) -> dict[str, Any]:
    """Parse overrides for a configuration of this kind: `train.max_steps=20` is an integer.

    Values are YAML, except that a text setting takes the text as it stands. Returns values by
    dotted names. Raises ConfigError for anything but `section.key=value`.
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
    """Return the validated configuration of a nested mapping with dotted overrides.

    Where an override changes the method, the settings that the new method also has are kept.
    """
    merged = _copy(tree)
    overrides = dict(overrides or {})
    if "method.type" in overrides:
        merged["method"], _ = _method_over(merged, overrides.pop("method.type"))
    for key, value in overrides.items():
        _put(merged, key, value)
    written = merged.get("method")
    merged = _default_method(merged)
    injected = merged.get("method") is not written
    if isinstance(train := merged.get("train"), dict) and train.get("max_steps", 0) is None:
        del train["max_steps"]  # null over a file that has it leaves room for num_train_epochs
    try:
        found = Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe(error, merged)) from None
    if injected:
        found.method.model_fields_set.discard("type")  # nobody wrote it
    return found


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a validated copy of a configuration with dotted settings changed.

    Settings that were not given in `config` stay at their defaults, which may differ for another
    method.
    """
    return build_config(config.model_dump(mode="json", exclude_unset=True), values)


def dump_yaml(config: Config) -> str:
    """Return the configuration as YAML without secrets, to be shown and saved with a run.

    `load_config` reads it back; of `method` it has the given settings only.
    """
    return yaml.safe_dump(redacted_settings(saved(config)), sort_keys=False, allow_unicode=True)


def saved(config: Config) -> dict[str, Any]:
    """Return the settings of a configuration, from which `build_config` builds it again.

    They are complete, except that `method` has only its type and the given settings, as another
    method that replaces it, or that is swept, has its own defaults; and that train.max_steps, which
    num_train_epochs decides, is left out beside it, or beside an axis of it.
    """
    written = config.method.model_dump(mode="json", exclude_unset=True)
    found = config.model_dump(mode="json") | {"method": {"type": config.method.type} | written}
    swept = "train.num_train_epochs" in config.sweep.parameters
    given = "max_steps" in config.train.model_fields_set
    if config.train.num_train_epochs is not None or (swept and not given):
        del found["train"]["max_steps"]
    return found


def _tree(
    source: BaseModel | str | Path | Mapping[str, Any] | None, kind: type[BaseModel]
) -> dict[str, Any]:
    """Return the given settings as a nested mapping, with values typed for this kind."""
    if source is None:
        return {}
    if isinstance(source, BaseModel):
        return source.model_dump(mode="json", exclude_unset=True)
    if isinstance(source, Mapping):
        written = source
    elif isinstance(source, str | os.PathLike):
        written = _read_yaml(Path(source))
    else:
        raise ConfigError(
            f"configuration {format_value(source)} is of type {type(source).__name__}; give a "
            f"{kind.__name__}, a mapping of sections, as in {{'model': {{'name': 'tiny'}}}}, or "
            "the path of a YAML file"
        )
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
    """Return the mapping in a YAML text, for `load_config`; errors refer to it by `name`."""
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
    """Return the section `method` with another type, and the given settings that this one lacks."""
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
    """Fill in a missing `method.type`: the default, or the first method that is swept.

    No trial may have the default method where methods are swept.
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
        wanted = setting_type(Config, ".".join(sections[:length]))
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
    """Warn of settings that an override with a whole section drops."""
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
