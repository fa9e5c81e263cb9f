"""Read trials from the result files of PEFT's method_comparison, one JSON document per trial.

- `run_info.train_config` and `peft_config` become spec.model, data, method and train under rayfin's
  names; settings that rayfin has no name for stay under `spec.extra`. LORA with use_dora or
  use_rslora is dora or rslora, in 4 bit it is qlora; a method that rayfin lacks keeps its name, and
  LORA with another `use_NAME` is NAME. An optimiser other than AdamW is train.optim.
- `train_info` becomes the metrics: exact_match is `test accuracy`, train_seconds the sum of the
  `train time`s (without evaluation), wall_seconds `train_time`, peak_memory_bytes
  `accelerator_memory_max`; there is no eval_loss. Measurements along the way are the curve.
- `meta_info` becomes versions and the scenario (accelerator, parameters of the base, data sets).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rayfin.errors import HistoryError
from rayfin.history.imported import imported_record, method_name, parse_time, ran_out_of_memory
from rayfin.history.record import TrialRecord, finite
from rayfin.methods import METHODS
from rayfin.statuses import Status

_TRAIN = {
    "batch_size": "per_device_train_batch_size",
    "batch_size_eval": "per_device_eval_batch_size",
    "max_steps": "max_steps",
    "eval_steps": "eval_steps",
    "lr_scheduler": "lr_scheduler_type",
    "grad_norm_clip": "max_grad_norm",
    "use_gc": "gradient_checkpointing",
    "seed": "seed",
}
_ELSEWHERE = {"model_id", "dtype", "max_seq_length", "optimizer_kwargs"}
_CURVE = {
    "step": "step",
    "train loss": "loss",
    "eval loss": "eval_loss",
    "valid accuracy": "exact_match",
    "elapsed time": "seconds",
    "tokens / sec": "tokens_per_second",
}
# Bookkeeping, and AdaLoRA's final ranks: no settings, but of methods that have them.
_NOT_SETTINGS = {
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "auto_mapping", "rank_pattern", "megatron_core"),
}
_KNOWN_VARIANTS = ("use_dora", "use_rslora")
_STATUS: dict[str, Status] = {"success": "finished", "failed": "failed", "canceled": "stopped"}


def read_peft_result(path: Path, at: datetime) -> TrialRecord:
    """Read the trial in a result file; raises HistoryError for any other file.

    `at` is the time of a trial that the file gives no time for.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _record(document, at)
    except (ValueError, RecursionError) as error:
        raise HistoryError(
            f"{path}:{getattr(error, 'lineno', 1)}: is not valid JSON: {error}"
        ) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise HistoryError(
            f"{path}:1: is not a result of PEFT's method_comparison "
            f"({type(error).__name__}: {error}); it has run_info, train_info and meta_info"
        ) from None
    except HistoryError as error:
        raise HistoryError(f"{path}:1: {error}") from None


def _record(document: Mapping[str, Any], at: datetime) -> TrialRecord:
    run, train, meta = document["run_info"], document["train_info"], document.get("meta_info") or {}
    metrics = _metrics(train)
    status, error = _status(train, run.get("error_msg") or "")
    created = run.get("created_at")
    packages = meta.get("package_info") or {}
    return imported_record(
        "peft",
        document,
        sweep_id="peft-method-comparison",
        status=status,
        created_at=parse_time(created) if created else at,
        spec=_spec(run, meta),
        scenario=_scenario(run, train, meta),
        metrics=metrics,
        curve=_curve(train),
        error=error,
        versions={
            name.removesuffix("-version"): str(version)
            for name, version in packages.items()
            if name.endswith("-version") and version
        },
    )


def _spec(run: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    config = run["train_config"]
    model = {"name": config["model_id"], "dtype": config.get("dtype")}
    if revision := (meta.get("model_info") or {}).get("sha"):
        model["revision"] = revision
    optimizer = config.get("optimizer_kwargs") or {}
    train = {ours: config[theirs] for theirs, ours in _TRAIN.items() if theirs in config}
    train |= {
        ours: optimizer[theirs]
        for theirs, ours in (("lr", "learning_rate"), ("weight_decay", "weight_decay"))
        if theirs in optimizer
    }
    optim = str(config.get("optimizer_type") or "AdamW")
    if optim.lower() != "adamw":  # a rate for one optimiser says nothing of another's
        train["optim"] = optim
    method, peft_rest = _method(run.get("peft_config"), str(config.get("dtype")))
    others = {
        name: value
        for name, value in config.items()
        if name not in _TRAIN and name not in _ELSEWHERE and not _empty(value)
    }
    extra = {"experiment_name": run.get("experiment_name"), "train_config": others} | (
        {"peft_config": peft_rest} if peft_rest else {}
    )
    data = {"path": next(iter(meta.get("dataset_info") or {}), None)}
    data["max_length"] = config.get("max_seq_length")
    return {
        "model": model,
        "data": {name: value for name, value in data.items() if value is not None},
        "method": method,
        "train": train,
        "extra": extra,
    }


def _method(config: Mapping[str, Any] | None, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return spec.method, and the settings that it does not have."""
    bits = {"int4": 4, "nf4": 4, "int8": 8}.get(dtype)
    quantised = {} if bits is None else {"quantization_bit": bits}
    if not config:
        return {"type": "full", **quantised}, {}
    named = method_name(config["peft_type"])
    kind = next((own for own, it in METHODS.items() if it.is_pefts(named, config, bits)), named)
    others = (name for name in config if name.startswith("use_") and name not in _KNOWN_VARIANTS)
    variant = next((name for name in others if named == "lora" and not _empty(config[name])), None)
    if variant is not None:
        kind = method_name(variant.removeprefix("use_"))
    known = METHODS[kind].model_fields if kind in METHODS else config.keys() - _NOT_SETTINGS
    settings = {
        # PEFT writes sets, in no fixed order.
        name: sorted(value) if name.endswith("_modules") and isinstance(value, list) else value
        for name, value in config.items()
        if (name in known or name not in _NOT_SETTINGS) and not _empty(value)
    }
    method = {n: v for n, v in settings.items() if n in known and n != "type"}
    return {"type": kind, **method, **quantised}, {
        n: v for n, v in settings.items() if n not in known
    }


def _empty(value: Any) -> bool:
    # Not `in (..., False)`: that would drop the setting 0.0.
    return value is None or value is False or value in ("", [], {})


def _scenario(
    run: Mapping[str, Any], train: Mapping[str, Any], meta: Mapping[str, Any]
) -> dict[str, Any]:
    model: dict[str, Any] = {"name": run["train_config"]["model_id"]}
    if total := train.get("num_total_params"):
        # The total counts the adapter's own, unless the model itself was trained.
        added = train.get("num_trainable_params", 0) if run.get("peft_config") else 0
        model["parameters"] = total - added
    scenario: dict[str, Any] = {"model": model}
    if sets := meta.get("dataset_info"):
        scenario["data"] = {"datasets": {name: info.get("sha") for name, info in sets.items()}}
    accelerator = (meta.get("system_info") or {}).get("accelerator")
    if accelerator and accelerator != "N/A":
        cuda = "NVIDIA" in accelerator.upper()
        scenario["hardware"] = {"device_name": accelerator} | ({"device": "cuda"} if cuda else {})
    return scenario


def _metrics(train: Mapping[str, Any]) -> dict[str, Any]:
    points = train.get("metrics") or []
    last = {key: value for point in points[-2:] for key, value in point.items()}
    seconds = [
        point["train time"] for point in points if finite(point.get("train time")) is not None
    ]
    speeds = [
        point["tokens / sec"] for point in points if finite(point.get("tokens / sec")) is not None
    ]
    metrics = {
        "exact_match": last.get("test accuracy", last.get("valid accuracy")),
        "eval_loss": last.get("test loss", last.get("eval loss")),
        "train_loss": last.get("train loss"),
        "forgetting": last.get("forgetting"),
        "steps": last.get("step"),
        "train_seconds": sum(seconds) if seconds else train.get("train_time"),
        "wall_seconds": train.get("train_time"),
        "tokens_per_second": sum(speeds) / len(speeds) if speeds else None,
        "peak_memory_bytes": train.get("accelerator_memory_max"),
        "trainable_parameters": train.get("num_trainable_params"),
        "adapter_bytes": train.get("file_size"),
    }
    return {name: value for name, value in metrics.items() if finite(value) is not None}


def _curve(train: Mapping[str, Any]) -> list[dict[str, Any]]:
    # The last point repeats the step with the test set's figures, which are the metrics.
    points = [point for point in train.get("metrics") or [] if "test accuracy" not in point]
    return [
        {
            ours: point[theirs]
            for theirs, ours in _CURVE.items()
            if finite(point.get(theirs)) is not None
        }
        for point in points
    ]


def _status(train: Mapping[str, Any], message: str) -> tuple[Status, str | None]:
    word = train["status"]
    if word not in _STATUS:
        raise HistoryError(f"train_info.status is '{word}'; allowed: {', '.join(_STATUS)}")
    if ran_out_of_memory(message):
        return "oom", message
    status = _STATUS[word]
    if status == "finished":
        losses = [point.get("train loss") for point in train.get("metrics") or []]
        # NaN and infinity are floats that `finite` refuses.
        if losses and isinstance(losses[-1], float) and finite(losses[-1]) is None:
            return "failed", f"diverged: train loss is {losses[-1]}"
        return "finished", None
    return status, message or str(word)
