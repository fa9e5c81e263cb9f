"""Write the files that an experiment starts with: what to train, to sweep and to serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rayfin.advisor.answer import Recommendation
from rayfin.advisor.answer_text import summary
from rayfin.config import Config, EngineConfig, ServeConfig, build_config, dump_yaml, saved
from rayfin.config.serving import MAX_RANK
from rayfin.errors import StorageError
from rayfin.history.connect import without_password
from rayfin.language import answering_in, localized
from rayfin.paths import Storage, write_text
from rayfin.training import TrialSpec

TRIALS = 8
_RATE_SPREAD = 5.0
"""The factor by which a sweep goes beyond the recommended learning rates on either side."""


def scaffold(answer: Recommendation, directory: Path, *, name: str) -> dict[str, Path]:
    """Write train.yaml, sweep.yaml, serve.yaml and README.md, and return their paths by use.

    `name` is the adapter's. Nothing is overwritten: raises StorageError for a directory that holds
    one of the files already, or can't be written.
    """
    files = {
        "train": directory / "train.yaml",
        "sweep": directory / "sweep.yaml",
        "serve": directory / "serve.yaml",
        "commands": directory / "README.md",
    }
    taken = [path for path in files.values() if path.exists()]
    if taken:
        raise StorageError(f"'{taken[0]}' exists; give --scaffold a new directory")
    first = answer.choices[0]
    base = _anchored(first.config, name)
    sweep = _sweep(base, answer)
    texts = {
        "train": dump_yaml(base),
        "sweep": dump_yaml(sweep),
        "serve": _serve(base, sweep, name),
    }
    with answering_in(answer.lang):
        texts["commands"] = _guide(answer, base, name)
    try:
        for what, path in files.items():
            write_text(path, texts[what])
    except OSError as error:
        raise StorageError(
            f"'{directory}' can't be written ({error.strerror or error}); give --scaffold another"
        ) from error
    return files


def _anchored(config: Mapping[str, Any], name: str) -> Config:
    """Return the configuration with absolute local paths, as it may be read from any directory.

    The method's defaults are left out, as they would be kept if another method replaced it.
    """
    whole = build_config(dict(config), {})
    method = whole.method.model_dump(mode="json", exclude_defaults=True)
    spec = TrialSpec.of(whole)
    publish = {"name": name}
    if whole.publish is not None and whole.publish.storage is not None:
        publish["storage"] = str(Storage.at(whole.publish.storage).location)
    return whole.model_copy(
        update={
            "model": spec.model,
            "data": spec.data,
            "method": build_config({"method": method}, {}).method,
            "publish": build_config({"publish": publish}, {}).publish,
            "storage": str(Storage.at(whole.storage).location),
            "history": whole.history and without_password(whole.history),
        }
    )


def axes(base: Config, configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a sweep's axes around configurations of one method: learning rate and capacity.

    `configs` are nested as in a file; `base` is one of them, validated.
    """
    rates = [config["train"]["learning_rate"] for config in configs]
    parameters: dict[str, Any] = {
        "train.learning_rate": {
            "space": "loguniform",
            "lower": float(f"{min(rates) / _RATE_SPREAD:.2g}"),
            "upper": float(f"{min(1.0, max(rates) * _RATE_SPREAD):.2g}"),
        }
    }
    leaf = base.method.capacity
    if leaf is not None and base.method.capacity_is_free:
        middle = getattr(base.method, leaf)
        values = {middle, *(config["method"][leaf] for config in configs)}
        values |= {max(1, middle // 2), middle * 2}
        # Virtual tokens are part of the sample's length.
        most = base.data.max_length - 1 if base.method.virtual_tokens else MAX_RANK
        parameters[f"method.{leaf}"] = sorted(v for v in values if v <= max(middle, most))
    return parameters


def _sweep(base: Config, answer: Recommendation) -> Config:
    """Return a sweep around the recommended configurations that share the first one's method."""
    same = [
        choice.config
        for choice in answer.choices
        if choice.config["method"]["type"] == base.method.type
    ]
    parameters = axes(base, same)
    given = saved(base)
    # A sweep's trials run side by side, each in one process.
    scaling = given["scaling"] | {"num_workers": 1}
    sweep = given["sweep"] | {"num_samples": TRIALS, "parameters": parameters}
    if sweep["search"] == "grid":  # a range has none
        sweep["search"] = "auto"
    return build_config(given | {"scaling": scaling, "sweep": sweep}, {})


def _serve(base: Config, sweep: Config, name: str) -> str:
    longest = base.data.max_length
    method = base.method
    swept = sweep.sweep.parameters.get(f"method.{method.capacity}", ())
    # Each as PiSSA, say, saves it: with twice its rank.
    others = [
        method.model_copy(update=type(method).of_capacity(value))
        for value in swept
        if isinstance(value, int)
    ]
    ranks = [one.served_rank for one in (method, *others)]
    model = base.model.model_dump(mode="json")
    if base.method.changes_base:  # a model of its own, which lies there once it is trained
        model["name"] = str(_next_version(base, name))
    config = ServeConfig.model_validate(
        {
            "model": model,
            "engine": {
                "quantization_bit": base.method.quantization_bit,
                "max_length": max(256, 2 * longest),
                "max_rank": min(MAX_RANK, max(EngineConfig().max_rank, *ranks)),
            },
            "storage": base.registry_storage,
            "history": base.history,
        }
    )
    return yaml.safe_dump(
        config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True
    )


def _next_version(base: Config, name: str) -> Path:
    """Return the directory of the next version of the adapter, or of the whole model."""
    versions = Storage.at(base.registry_storage).adapters / name
    numbers = [int(path.name) for path in versions.glob("*") if path.name.isdecimal()]
    return versions / str(max(numbers, default=0) + 1)


def _guide(answer: Recommendation, base: Config, name: str) -> str:
    """Return the README.md: what was recommended, why, and the commands, in Markdown."""
    first = answer.choices[0]
    told = answer.explanation
    nothing = localized("nothing in particular")
    settings = [f"`{key}: {_shown(value)}`" for key, value in first.settings.items()]
    commands = (
        ("estimate train.yaml", localized("what it takes, before it runs")),
        ("train train.yaml", localized("one run, published as {name}", name=name)),
        (
            "sweep sweep.yaml",
            localized(
                "{trials} trials around it; the best is published as {name}",
                trials=TRIALS,
                name=name,
            ),
        ),
        ("serve serve.yaml", localized("answers as {name}", name=name)),
    )
    parts = [
        f"# {name}",
        localized("Train {what}", what=summary(answer.model_dump(mode="json"))),
        localized("{sentence}.", sentence=told[:1].upper() + told[1:]),
        localized("Run from this directory:"),
        "\n".join(["```", *(f"rayfin {what:22}# {why}" for what, why in commands), "```"]),
        *_notes(base, name),
        localized("Settings:"),
        _listed(settings),
        localized("For it:"),
        _listed(first.reasons or [nothing]),
        localized("Against it:"),
        _listed(first.risks or [nothing]),
        localized("served as {how}", how=first.deployment),
    ]
    return "\n\n".join(parts) + "\n"


def _notes(base: Config, name: str) -> list[str]:
    notes = []
    if base.method.changes_base:
        notes.append(
            localized(
                "serve.yaml serves the whole model that is trained first: {path}",
                path=_next_version(base, name),
            )
        )
    if base.history is not None and base.history.startswith("postgres"):
        notes.append(
            localized(
                "The history's password is in none of these files: set PGPASSWORD, or ~/.pgpass."
            )
        )
    return notes


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _shown(value: Any) -> str:
    """Return a setting's value as YAML has it."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).partition("\n")[0]
