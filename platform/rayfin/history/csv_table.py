"""Read trials from a plain CSV table with one trial per line.

A column is taken by its name; case, spaces and hyphens do not matter:

- any setting of rayfin's `model`, `data`, `method` and `train` sections, dotted or not
  (`train.learning_rate`, `learning_rate`), and the names in `SYNONYMS` (`lr`, `lora_rank`, ...);
- any metric in `SYNONYMS` (`eval_loss`, `test_nll`, `accuracy`, `train_seconds`, ...), where
  minutes, hours, MB and GB become seconds and bytes; a wall time alone is the train time too;
- `status` or `diverged`, `error`, `created_at`, `sweep_id`.

Any other column is kept: numbers under `metrics.extra`, text under `spec.extra`. A rank without a
method is LoRA's. Equal lines are one trial.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rayfin.config import DataConfig, ModelConfig, Section, TrainConfig
from rayfin.errors import HistoryError
from rayfin.history.imported import imported_record, method_name, parse_time, ran_out_of_memory
from rayfin.history.record import TrialRecord, finite
from rayfin.methods import METHODS
from rayfin.metrics import METRICS, score_names
from rayfin.statuses import FAILED, Status

_SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
}

# The other names of each column.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "model.name": ("model", "model_name", "model_id", "base_model", "model_name_or_path"),
    "data.path": ("dataset", "data", "dataset_name"),
    "method.type": ("method", "method_type", "peft_type", "peft_method"),
    **{f"method.{name}": others for it in METHODS.values() for name, others in it.synonyms.items()},
    "train.learning_rate": ("lr",),
    "train.per_device_train_batch_size": ("batch_size",),
    "train.max_steps": ("steps", "num_steps"),
    **{f"metrics.{name}": it.synonyms for name, it in METRICS.items() if it.synonyms},
    "scenario.model.parameters": ("num_parameters", "model_parameters", "total_parameters"),
    "scenario.hardware.device_name": ("device_name", "gpu", "accelerator"),
    "status": ("state",),
    "diverged": (),
    "error": ("error_msg", "error_message"),
    "created_at": ("date", "timestamp", "started_at"),
    "sweep_id": ("sweep", "experiment"),
}
_UNITS = {"_minutes": 60.0, "_hours": 3600.0, "_mb": 2.0**20, "_gb": 2.0**30}
_STATUS: dict[str, Status] = {
    **dict.fromkeys(("finished", "success", "succeeded", "completed", "done", "ok"), "finished"),
    **dict.fromkeys(("failed", "failure", "error", "crashed", "diverged"), "failed"),
    **dict.fromkeys(("stopped", "canceled", "cancelled", "pruned", "terminated"), "stopped"),
    **dict.fromkeys(("oom", "out_of_memory"), "oom"),
}  # fmt: skip


def read_csv(path: Path, at: datetime) -> Iterator[TrialRecord | str]:
    """Yield the trials of a table, and for each unusable line the reason as a text.

    `at` is the time of trials that the table gives no time for. Raises HistoryError for a file that
    is not such a table.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True)
            columns = _columns(path, next(reader, []))
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    try:
                        yield _row(path, columns, cells, at)
                    except (HistoryError, ValueError) as error:
                        yield f"{path}:{reader.line_num}: {error}"
    except UnicodeDecodeError:
        raise HistoryError(f"'{path}' is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise HistoryError(f"'{path}' is not valid CSV ({error}); mend the quoting") from None


def _columns(path: Path, header: list[str]) -> list[tuple[str, str]]:
    """Return (name, target) of every column; a column whose target is taken becomes extra."""
    names = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in header]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise HistoryError(f"'{path}' names the column '{twice[0]}' twice; rename one")
    known: dict[str, str] = {}  # best names first
    for target, others in SYNONYMS.items():
        own = target.removeprefix("metrics.")
        known |= dict.fromkeys((own, *others), target)
    for name in _setting_names():
        known[name] = name
        known.setdefault(name.partition(".")[2], name)
    ranks = {name: rank for rank, name in enumerate(known)}
    taken: dict[str, str] = {}
    for name in sorted(names, key=lambda name: ranks.get(name, len(ranks))):
        if name in known and known[name] not in taken.values():
            taken[name] = known[name]
    if not any(f"metrics.{metric}" in taken.values() for metric in score_names()):
        raise HistoryError(
            f"'{path}' has no column for {' or '.join(score_names())}, its columns are "
            f"{', '.join(names) or 'none'}; rename one"
        )
    return [(name, taken.get(name, "extra")) for name in names]


def _setting_names() -> Iterator[str]:
    for section, config in _SECTIONS.items():
        yield from (f"{section}.{name}" for name in config.model_fields)
    for method in METHODS.values():
        yield from (f"method.{name}" for name in method.model_fields)


def _row(path: Path, columns: list[tuple[str, str]], cells: list[str], at: datetime) -> TrialRecord:
    if len(cells) != len(columns):
        raise ValueError(f"has {len(cells)} cells, the header has {len(columns)}")
    # An empty cell says nothing.
    given = {
        (name, target): cell.strip()
        for (name, target), cell in zip(columns, cells, strict=True)
        if cell.strip()
    }
    values = {target: text for (_, target), text in given.items() if target != "extra"}
    metrics, diverged = _metrics(given)
    spec = _spec(values)
    for (name, target), text in given.items():
        if target == "extra":
            value = _plain(text)
            if finite(value) is not None:
                metrics.setdefault("extra", {})[name] = value
            elif isinstance(value, str):
                spec.setdefault("extra", {})[name] = value
    status, error = _status(values, diverged)
    scenario: dict[str, Any] = {}
    if parameters := values.get("scenario.model.parameters"):
        scenario["model"] = {"parameters": int(_number("parameters", parameters))}
    if device := values.get("scenario.hardware.device_name"):
        scenario["hardware"] = {"device_name": device}
    return imported_record(
        "csv",
        {name: text for (name, _), text in given.items()},
        sweep_id=values.get("sweep_id", path.stem),
        status=status,
        created_at=parse_time(values["created_at"]) if "created_at" in values else at,
        spec=spec,
        scenario=scenario,
        metrics=metrics,
        error=error,
    )


def _metrics(given: Mapping[tuple[str, str], str]) -> tuple[dict[str, Any], str | None]:
    """Return the finite metrics, and the reason if a loss is not finite and the trial diverged."""
    metrics: dict[str, Any] = {}
    diverged = None
    for (name, target), text in given.items():
        if not target.startswith("metrics."):
            continue
        metric = target.removeprefix("metrics.")
        value = _number(name, text)
        if not math.isfinite(value):
            diverged = f"diverged: {name} is {text}" if METRICS[metric].diverges else diverged
            continue
        unit = next((factor for suffix, factor in _UNITS.items() if name.endswith(suffix)), None)
        value = value if unit is None else value * unit
        metrics[metric] = int(value) if METRICS[metric].whole else float(value)
    if "wall_seconds" in metrics:
        metrics.setdefault("train_seconds", metrics["wall_seconds"])
    return metrics, diverged


def _spec(values: Mapping[str, str]) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    method = values.get("method.type")
    if method is None and "method.r" in values:
        method = next(name for name, it in METHODS.items() if "r" in it.model_fields)
    if method is not None:
        spec["method"] = {"type": (method := method_name(method))}
    for target, text in values.items():
        section, _, leaf = target.partition(".")
        if target == "method.type" or section not in (*_SECTIONS, "method"):
            continue
        if text.lower() in ("none", "null"):  # as other programs write what is switched off
            continue
        config = METHODS.get(method or "") if section == "method" else _SECTIONS[section]
        fixed = {"type": method} if section == "method" else {}
        if config is not None and leaf not in config.model_fields:
            # Another name of one method's setting may be this method's own: LoHa's alpha.
            leaf = next((n for n in SYNONYMS.get(target, ()) if n in config.model_fields), leaf)
        spec.setdefault(section, {})[leaf] = _setting(config, leaf, text, fixed)
    return spec


def _setting(config: type[Section] | None, leaf: str, text: str, fixed: Mapping[str, Any]) -> Any:
    """Return a value as the configuration takes it; raises ValueError for an impossible one."""
    if config is None or leaf not in config.model_fields:
        return _plain(text)
    problems = []
    for value in (_plain(text), text):
        try:
            return getattr(config.model_validate({**fixed, leaf: value}), leaf)
        except ValidationError as error:
            problems = error.errors()
    # Other programs have choices (schedulers, dtypes) that rayfin has not, and mappings as text.
    if all(problem["type"] in ("literal_error", "tuple_type", "dict_type") for problem in problems):
        return text
    raise ValueError(f"{leaf} is '{text}'; {problems[0]['msg']}")


def _status(values: Mapping[str, str], diverged: str | None) -> tuple[Status, str | None]:
    error = values.get("error")
    if (text := values.get("diverged", "").lower()) not in ("", "0", "0.0", "false", "no"):
        if text not in ("1", "1.0", "true", "yes"):
            raise ValueError(f"diverged is '{text}'; give 0 or 1")
        diverged = diverged or "diverged"
    word = values.get("status", "failed" if error else "finished").lower().replace(" ", "_")
    if word not in _STATUS:
        raise ValueError(f"status is '{word}'; allowed: {', '.join(_STATUS)}")
    status = _STATUS[word]
    if diverged and status == "finished":
        status, error = "failed", error or diverged
    if status == "failed" and error and ran_out_of_memory(error):
        status = "oom"
    if status in FAILED:
        return status, error or diverged or word
    return status, error if status == "stopped" else None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} is '{text}'; give a number") from None


def _plain(text: str) -> int | float | bool | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)
