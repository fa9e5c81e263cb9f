"""A sweep as one HTML file that needs nothing else: no network, no other file, no server.

`assets/report.html.j2` says what is on the page; tables and texts are in the HTML, so that they
are there without scripts. The charts are drawn in the browser from one JSON block
(`chart_data.py`) by the scripts beside the template.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rayfin.advisor.chart_marks import DARK, LIGHT, MARKS
from rayfin.config import Config, dump_yaml
from rayfin.evaluation.change import change_of
from rayfin.evaluation.chart_data import chart_data, ordered
from rayfin.evaluation.importance import LEAST_TRIALS, comparable_trials, parameter_importance
from rayfin.evaluation.notes import sweep_notes
from rayfin.evaluation.quantities import (
    MISSING,
    setting,
    show_between,
    show_gain,
    show_number,
    show_quantity,
    show_seconds,
    show_setting,
)
from rayfin.evaluation.verdict import SweepOutcome, sweep_verdict
from rayfin.history.comparable import not_comparable
from rayfin.history.record import finite
from rayfin.metrics import BASE, FIGURES, METRICS, score_names
from rayfin.paths import Storage, write_text
from rayfin.redaction import redact
from rayfin.statuses import ENDED, STATUS_WORDS, UNFINISHED
from rayfin.tuning.generations import generations_of
from rayfin.tuning.rows import early_stop

if TYPE_CHECKING:
    from rayfin.history.record import TrialRecord

_SCRIPTS = ("plot.js", "charts.js", "parallel.js", "page.js")


@dataclass(frozen=True)
class Sample:
    """One evaluation prompt with what the base model and the best adapter answered."""

    prompt: str
    reference: str
    base_answer: str
    adapter_answer: str


def write_sweep_report(
    path: Path,
    outcome: SweepOutcome,
    *,
    samples: Sequence[Sample] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the report of a sweep to `path`, and return it.

    `notes` are sentences that follow those of `sweep_notes`: what only the caller knows, not the
    rows.
    """
    trials, config, best = ordered(outcome.trials), outcome.config, outcome.best
    environment = Environment(
        loader=PackageLoader("rayfin.evaluation", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        **_assets(),
        **_header(trials, config),
        verdict=sweep_verdict(outcome),
        best=_best(trials, best, config, outcome.adapter),
        notes=[redact(note) for note in [*sweep_notes(trials, config), *notes]],
        importance=_importance(trials, config),
        samples=samples,
        generations=_generations(best),
        table=_table(trials, config, best),
        data=_json(chart_data(trials, config, best)),
        least_trials=LEAST_TRIALS,
        most_steps=_most_steps(trials, config),
        config_yaml=dump_yaml(config),
    )
    write_text(path, page)
    return path


def _most_steps(trials: Sequence[TrialRecord], config: Config) -> int | None:
    """Return the optimizer steps of the longest trial; None where epochs have not been counted."""
    sections = (row.spec.get("train") or {} for row in trials)
    counts = [it["max_steps"] for it in sections if isinstance(it.get("max_steps"), int)]
    return max(counts, default=config.train.steps)


def _assets() -> dict[str, Any]:
    """Style and script with their hashes: the page's policy lets nothing else apply or run."""
    folder = files("rayfin.evaluation") / "assets"
    style = _colours() + (folder / "report.css").read_text(encoding="utf-8")
    parts = [(folder / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return {
        "style": Markup(style),
        "script": Markup(script),
        "style_hash": digest(style),
        "script_hash": digest(script),
    }


def _colours() -> str:
    """The methods' ten colours as style, for light and dark pages and for paper."""

    def root(colours: Sequence[str]) -> str:
        return f":root{{{''.join(f'--c{n}:{colour};' for n, colour in enumerate(colours))}}}"

    return "\n".join(
        [
            root(LIGHT),
            f"@media screen and (prefers-color-scheme:dark){{{root(DARK)}}}",
            *(f".series.c{n}{{color:var(--c{n % len(LIGHT)})}}" for n in range(len(MARKS))),
            "",
        ]
    )


def _header(trials: Sequence[TrialRecord], config: Config) -> dict[str, Any]:
    counts: Counter[str] = Counter(trial.status for trial in trials)
    return {
        "sweep_id": trials[0].sweep_id if trials else None,
        "config": config,
        "methods": _methods(config),
        "counts": [
            (key, counts[key], STATUS_WORDS[key]) for key in (*ENDED, *UNFINISHED) if counts[key]
        ],
        "when": _when(trials),
        "hardware": _distinct(_hardware(trial.scenario.get("hardware")) for trial in trials),
        "versions": _distinct(
            " · ".join(f"{k} {v}" for k, v in sorted(trial.versions.items())) for trial in trials
        ),
        "metric_label": METRICS[config.sweep.metric].label,
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _methods(config: Config) -> str:
    swept = config.sweep.parameters.get("method.type")
    return f"{len(swept)} methods" if isinstance(swept, list | tuple) else config.method.type


def _when(trials: Sequence[TrialRecord]) -> str:
    if not trials:
        return MISSING
    first = min(trial.created_at for trial in trials)
    last = max(trial.updated_at for trial in trials)
    return f"{first:%Y-%m-%d %H:%M} UTC, {show_seconds((last - first).total_seconds())}"


def _hardware(facts: Any) -> str:
    """Hardware.as_dict() in words."""
    if not isinstance(facts, Mapping):
        return str(facts or "")
    kind = facts.get("device", "")
    name = facts.get("device_name") or kind
    number = facts.get("device_count" if kind == "cuda" else "cpu_count")
    memory = finite(facts.get("device_memory"))
    parts = [f"{number} × {name}" if kind == "cuda" else f"{name}, {number} CPU cores"]
    if memory:
        parts.append(f"{memory / 2**30:.0f} GiB")
    return ", ".join(parts)


def _distinct(texts: Any) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]


def _best(
    trials: Sequence[TrialRecord], best: TrialRecord | None, config: Config, adapter: str | None
) -> dict[str, Any] | None:
    if best is None:
        return None
    return {
        "trial_id": best.trial_id,
        "number": next((i for i, t in enumerate(trials, 1) if t.trial_id == best.trial_id), None),
        "scores": [row for key in score_names() if (row := _compare(key, best))],
        "parameters": [
            (key, show_setting(value))
            for key in config.sweep.parameters
            for has, value in [setting(best.spec, key)]
            if has
        ],
        "costs": [
            (METRICS[key].label, show_quantity(key, best.metrics[key]))
            for key in FIGURES
            if finite(best.metrics.get(key)) is not None
        ],
        "adapter": adapter,
        "commands": _commands(adapter, config) if adapter else [],
    }


def _commands(adapter: str, config: Config) -> list[str]:
    """How to look at the published adapter, and how to load it without rayfin."""
    storage = Storage.at(config.registry_storage)
    name, _, version = adapter.partition("@")
    # A version directory is a plain PEFT adapter; that layout is part of the registry's promise.
    path = str(storage.adapters / name / version)
    return [
        f"rayfin adapters show {adapter} {shlex.quote(f'storage={storage.location}')}",
        f"model = peft.PeftModel.from_pretrained(base_model, {path!r})",
    ]


def _compare(key: str, trial: TrialRecord) -> dict[str, str] | None:
    """A row base -> best, and by how much it is better."""
    now = finite(trial.metrics.get(key))
    if now is None:
        return None
    row = {
        "label": METRICS[key].label,
        "base": show_quantity(key, trial.metrics.get(BASE + key)),
        "best": show_quantity(key, now),
        "change": MISSING,
        "interval": "",
        "verdict": "",
    }
    if (change := change_of(trial, key)) is None:
        return row
    row["change"] = show_gain(key, change.gain, change.low, change.high)
    if change.low is not None and change.high is not None:
        row["interval"] = show_between(key, change.low, change.high)
        row["verdict"] = "better" if change.low > 0 else "worse" if change.high < 0 else ""
    return row


def _generations(best: TrialRecord | None) -> list[dict[str, Any]]:
    """A held-out question of train.sample_generations each, with the answers by their steps."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for step, answers in generations_of(best.curve) if best is not None else ():
        for one in answers:
            question = one["prompt"], one["reference"]
            found.setdefault(question, []).append({"step": step, **one})
    return [
        {"prompt": prompt, "reference": reference, "answers": answers}
        for (prompt, reference), answers in found.items()
    ]


def _importance(trials: Sequence[TrialRecord], config: Config) -> dict[str, Any]:
    sweep = config.sweep
    shares = parameter_importance(trials, sweep.metric, sweep.direction, list(sweep.parameters))
    return {
        "trials": len(comparable_trials(trials, sweep.metric)),
        "bars": [(name, share * 100) for name, share in shares.items()],
    }


def _table(
    trials: Sequence[TrialRecord], config: Config, best: TrialRecord | None
) -> dict[str, Any]:
    """Columns that any trial has a value for, and a row a trial."""
    measured = [
        key
        for key in (*score_names(), *FIGURES)
        if any(finite(t.metrics.get(key)) is not None for t in trials)
    ]
    names = list(config.sweep.parameters)
    others = not_comparable(trials, config.sweep.metric, best)
    rows = []
    for number, (trial, other) in enumerate(zip(trials, others, strict=True), 1):
        cells = []
        for name in names:
            has, value = setting(trial.spec, name)
            shown = show_setting(value) if has else MISSING
            cells.append((shown, finite(value) if finite(value) is not None else shown))
        for key in measured:
            value = finite(trial.metrics.get(key))
            cells.append((show_quantity(key, value), "" if value is None else value))
        rows.append(
            {
                "number": number,
                "trial_id": trial.trial_id,
                "best": best is not None and trial.trial_id == best.trial_id,
                "status": trial.status,
                "status_word": STATUS_WORDS.get(trial.status, trial.status),
                "cells": cells,
                "reason": _reason(trial, other=other),
            }
        )
    return {"columns": names + [METRICS[key].label for key in measured], "rows": rows}


def _reason(trial: TrialRecord, *, other: bool) -> dict[str, str]:
    """Why a trial is not a finished one: a line, and the whole text where there is more."""
    text = redact((trial.error or "").strip())
    if not text:
        steps = finite(trial.metrics.get("steps"))
        stopped = trial.status == "stopped" and steps is not None
        line = f"after {show_number(steps or 0)} steps" if stopped else early_stop(trial)
        scored = "scored on other held-out tokens" if other else ""
        return {"line": ", ".join(filter(None, (line, scored))), "rest": ""}
    # The last line of a traceback is the one that says what happened.
    lines = text.splitlines()
    line = (lines[-1] if lines[0].startswith("Traceback") else lines[0]).strip()
    short = line if len(line) <= 160 else line[:157] + "..."
    return {"line": short, "rest": text if short != text else ""}


def _json(value: Any) -> Markup:
    """JSON that can stand in a script element whatever the strings in it say."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
