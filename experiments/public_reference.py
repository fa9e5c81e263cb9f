"""Packs results that others have published as the advisor's second reference.

    python experiments/public_reference.py --sweep SWEEP.csv --peft DIRECTORY [--out FILE.jsonl.gz]

- `--sweep`: the table of tinker-cookbook's sweep over learning rates and LoRA ranks, one line a
  trial: model, learning_rate, lora_rank, test_nll, train_nll, wall_minutes, diverged. Its page
  names the rest of the setting (`SWEEP`).
- `--peft`: the directory of the result files of PEFT's method comparison.

Each is read as `rayfin history import` reads it, so that its trials have the ids that they have in
the history of whoever imports the same files. Every row says its origin and licence. The wall times
of the sweep are left out, as it does not say on which machines they were measured; PEFT's seconds
and bytes are kept with their GPU's name. No estimate rests on them: the lengths of the longest
samples were not published, and the peak of the memory is that of generating answers too.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reference_history import learn

from rayfin.advisor.published_models import known_model
from rayfin.history import TrialRecord
from rayfin.history.csv_table import read_csv
from rayfin.history.peft_results import read_peft_result
from rayfin.paths import write_whole

SWEEP: dict[str, Any] = {
    "origin": "thinking-machines-lab/tinker-cookbook, recipes/chat_sl/results/sft_sweep.md",
    "licence": "Apache-2.0",
    "data": {"path": "tulu3"},
    "train": {"per_device_train_batch_size": 128, "max_steps": 780},
    "method": {"target_modules": "all-linear", "lora_dropout": 0.0},
}
"""What the page of the sweep's results says of all its trials, and, under `method`, what the class
`LoraConfig` of the package tinker does: attention, feed-forward and output layers, no dropout."""
PEFT: dict[str, Any] = {
    "origin": "huggingface/peft, method_comparison/MetaMathQA",
    "licence": "Apache-2.0",
}
LEFT_OUT = ("train_seconds", "wall_seconds")
"""Metrics of the sweep that depend on a machine which it does not name."""
ADDED = datetime(2026, 12, 1, tzinfo=UTC)
"""The time of trials whose files give none: a fixed one, so that a file is packed to the same bytes
again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", type=Path, required=True, metavar="CSV")
    parser.add_argument("--peft", type=Path, required=True, metavar="DIRECTORY")
    parser.add_argument("--out", type=Path, default=Path("platform/rayfin/advisor/public.jsonl.gz"))
    args = parser.parse_args()
    rows = [*sweep_trials(args.sweep), *peft_trials(args.peft)]
    lines = sorted(json.dumps(row.model_dump(mode="json"), sort_keys=True) for row in rows)
    packed = gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0)
    with write_whole(args.out) as temporary:
        temporary.write_bytes(packed)
    print(f"{len(lines)} trials, {args.out.stat().st_size / 1024:.0f} KiB: {args.out}")
    learn(args.out.parent)


def sweep_trials(path: Path) -> Iterator[TrialRecord]:
    """The trials of the sweep's table; SystemExit for a line that is none."""
    for row in read_csv(path, ADDED):
        if isinstance(row, str):
            raise SystemExit(row)
        spec = dict(row.spec)
        spec["data"] = SWEEP["data"]
        for section in ("train", "method"):
            spec[section] = row.spec[section] | SWEEP[section]
        metrics = {name: value for name, value in row.metrics.items() if name not in LEFT_OUT}
        yield public(row, SWEEP, spec=spec, metrics=metrics, sweep_id="tinker-cookbook-sft-sweep")


def peft_trials(folder: Path) -> Iterator[TrialRecord]:
    """The trials of a directory of result files."""
    for path in sorted(folder.glob("*.json")):
        yield public(read_peft_result(path, ADDED), PEFT)


def public(row: TrialRecord, source: dict[str, Any], **changes: Any) -> TrialRecord:
    """A trial with where it comes from, and the shapes of its model where they are published."""
    name = row.spec["model"]["name"]
    facts, said = known_model(name), row.scenario.get("model", {})
    shapes: dict[str, int] = {}
    if facts is not None:
        shapes = {"parameters": facts.parameters, "hidden_size": facts.hidden_size}
    scenario = row.scenario | {
        "model": {"name": name} | shapes | said,
        "reference": True,
        "origin": source["origin"],
        "licence": source["licence"],
    }
    kept = {"scenario": scenario, "curve": [], "versions": {}, **changes}
    return TrialRecord.parse(row.model_dump() | kept)


if __name__ == "__main__":
    main()
