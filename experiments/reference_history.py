"""Runs the sweeps that the advisor's reference history is made of, and packs it.

    python experiments/reference_history.py --data clinc150=clinc150.jsonl gsm8k=gsm8k.jsonl
        [--storage runs/reference] [--out FILE.jsonl.gz] [--quick]

Every task (a model on a data set) is swept over the same grid of learning rates and ranks, or
virtual tokens, without stopping weak trials early: the advisor learns from these what to expect of
a setting, and experiments/benchmarks/advisor_sweep.py replays searches on them. It takes about two
hours on two cores; what the storage, or the packed file, holds already is not run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

from rayfin.advisor.knowledge import LEARNED, REFERENCES
from rayfin.advisor.quality_model import QualityModel
from rayfin.advisor.trial_table import TrialTable
from rayfin.config import load_config
from rayfin.history import History, TrialRecord
from rayfin.paths import Storage, write_json, write_whole
from rayfin.tuning.sweep import SweepOptions, run_sweep

MODELS = {
    "tiny": {"train.max_steps": 160, "data.max_samples": 400, "data.max_length": 192},
    "smollm2-135m": {"train.max_steps": 20, "data.max_samples": 240, "data.max_length": 128},
}
"""Model -> what a trial of it costs a few seconds with."""
SWEEPS: dict[str, dict[str, list[Any]]] = {
    "lora": {
        "train.learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        "method.r": [2, 8, 32],
    },
    "qlora": {"train.learning_rate": [3e-4, 1e-3, 3e-3], "method.r": [2, 8, 32]},
    "p_tuning": {
        "train.learning_rate": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        "method.num_virtual_tokens": [4, 16],
    },
}
KEPT = ("train", "peak_memory", "eval_loss", "steps", "tokens", "exact_match", "base_")
"""Beginnings of the metrics that are packed."""


# Threads that spin while they wait make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--storage", default="runs/reference")
    parser.add_argument(
        "--out", type=Path, default=Path("platform/rayfin/advisor/reference.jsonl.gz")
    )
    parser.add_argument("--quick", action="store_true", help="the tiny model on pydocs only")
    args = parser.parse_args()
    tasks = {"pydocs": "pydocs"} | dict(item.split("=", 1) for item in args.data)
    models = ["tiny"] if args.quick else list(MODELS)
    data = ["pydocs"] if args.quick else list(tasks)
    storage = Storage.open(args.storage)
    packed = read(args.out)
    with History.open(storage.history_url) as history:
        for model in models:
            for name in data:
                for method in SWEEPS:
                    if len([row for row in packed if what(row) == (model, name, method)]) < size(
                        method
                    ):
                        sweep(model, tasks[name], method, history, storage)
        rows = history.trials()
    known = {row.fingerprint for row in rows}
    rows += [row for row in packed if row.fingerprint not in known]
    pack(rows, {str(Path(path).resolve()): name for name, path in tasks.items()}, args.out)


def read(path: Path) -> list[TrialRecord]:
    """The trials that were packed before; none where there is no such file yet."""
    if not path.exists():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [TrialRecord.parse(json.loads(line)) for line in lines]


def what(row: TrialRecord) -> tuple[str, str, str]:
    """The model, the name of the data, and the method of a packed trial."""
    return row.spec["model"]["name"], row.spec["data"]["path"], row.spec["method"]["type"]


def size(method: str) -> int:
    """Trials of its grid."""
    return math.prod(len(values) for values in SWEEPS[method].values())


def sweep(model: str, path: str, method: str, history: History, storage: Storage) -> None:
    """Runs one grid; Ctrl-C ends the script, and what has ended is kept."""
    axes = SWEEPS[method]
    settings: dict[str, object] = {
        "model.name": model,
        "data.path": path,
        "data.val_size": 0.2,
        "method.type": method,
        "train.per_device_train_batch_size": 8,
        **MODELS[model],
        "sweep.search": "grid",
        "sweep.scheduler": "none",
        "sweep.num_samples": size(method),
        **{f"sweep.parameters.{axis}": values for axis, values in axes.items()},
        "storage": storage.location.path,
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    result = run_sweep(load_config(None, overrides), history, storage, SweepOptions(resume=True))
    if result.interrupted:
        raise SystemExit(130)


def pack(rows: list[TrialRecord], names: dict[str, str], out: Path) -> None:
    """The trials without what only this machine knows, in a fixed order."""
    lines = []
    rows = [row for row in rows if row.status != "running" and "recalled_from" not in row.scenario]
    for row in rows:
        data = dict(row.spec["data"])
        data["path"] = names.get(data["path"], Path(data["path"]).name)
        metrics = {n: v for n, v in row.metrics.items() if n.startswith(KEPT)}
        kept = row.model_copy(
            update={
                "spec": row.spec | {"data": data},
                "scenario": {n: v for n, v in row.scenario.items() if n != "worker"}
                | {"reference": True},
                "metrics": metrics,
                "directory": None,
                "curve": [],
            }
        )
        lines.append(json.dumps(kept.model_dump(mode="json"), sort_keys=True))
    with write_whole(out) as temporary, gzip.GzipFile(temporary, "wb", mtime=0) as file:
        file.write("".join(f"{line}\n" for line in sorted(lines)).encode())
    print(f"{len(lines)} trials, {out.stat().st_size / 1024:.0f} KiB: {out}")
    learn(out.parent)


def learn(folder: Path) -> None:
    """Learns the hyperparameters from the references in a folder, for whatever they are used."""
    rows = [row for name in REFERENCES for row in read(folder / name)]
    table = TrialTable.of(sorted(rows, key=lambda row: row.trial_id))
    learned = {"parameters": QualityModel.of(table).parameters.values}
    write_json(folder / LEARNED, learned)
    print(f"learned from {len(table)} of {len(rows)} trials: {folder / LEARNED}")


if __name__ == "__main__":
    main()
