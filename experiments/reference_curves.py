"""Trains the trials whose curves rayfin learns to extrapolate from, and packs the curves.

    python experiments/reference_curves.py --data clinc150=clinc150.jsonl gsm8k=gsm8k.jsonl
        [--storage runs/curves] [--out FILE.jsonl.gz] [--minutes 9]

Every task is a model on a data set at a number of steps; each of its trials has a setting drawn
at random (a method, a learning rate over four decades, a capacity, a schedule, a seed) and is
scored on held-out samples sixteen times at equal distances. The trials of `rates …` are a ladder of
learning rates instead, on which experiments/benchmarks/probes.py replays probes. What the storage
holds is not trained again: the script stops after so many minutes, and goes on when it is started
anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

from rayfin.config import load_config
from rayfin.paths import Storage, write_json
from rayfin.training.trial import run_trial
from rayfin.training.trial_cache import TrialCache
from rayfin.tuning.curves import REFERENCE, Curve, pack
from rayfin.tuning.plan import new_plan

TRAINED = "a model of the size of tiny, wholly trained on another of the data sets"

# Threads that spin while they wait make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny 48": ({"model.name": "tiny", "data.max_samples": 200, "train.max_steps": 48}, 16),
    "trained 64": ({"model.name": TRAINED, "data.max_samples": 200, "train.max_steps": 64}, 24),
    "trained 160": ({"model.name": TRAINED, "data.max_samples": 200, "train.max_steps": 160}, 24),
    "rates 160": ({"model.name": TRAINED, "data.max_samples": 200, "train.max_steps": 160}, 17),
    "few rows 128": ({"model.name": TRAINED, "data.max_samples": 50, "train.max_steps": 128}, 16),
    "tiny 160": ({"model.name": "tiny", "data.max_samples": 200, "train.max_steps": 160}, 16),
    "smollm2 16": (
        {"model.name": "smollm2-135m", "data.max_samples": 60, "train.max_steps": 16},
        3,
    ),
}
"""Name -> settings of its trials, and how many each data set gets."""
LENGTHS = {"pydocs": 192, "clinc150": 128, "gsm8k": 320}
METHODS: dict[str, tuple[str | None, list[int], float]] = {
    "lora": ("method.r", [2, 8, 32], 1e-5),
    "ia3": (None, [], 1e-4),
    "p_tuning": ("method.num_virtual_tokens", [4, 16], 1e-4),
    "full": (None, [], 1e-5),
}
"""Method -> its capacity, values of it, and the least learning rate of four decades."""
EVALUATIONS = {"rates 160": 20}
"""How often a trial is scored, where that isn't 16 times."""
COSINE = {"train.lr_scheduler_type": "cosine", "train.seed": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--storage", type=Path, default=Path("runs/curves"))
    parser.add_argument("--out", type=Path, default=REFERENCE)
    parser.add_argument("--minutes", type=float, default=9.0)
    args = parser.parse_args()
    tasks = {"pydocs": "pydocs"} | dict(item.split("=", 1) for item in args.data)
    end = time.monotonic() + 60 * args.minutes
    (args.storage / "curves").mkdir(parents=True, exist_ok=True)
    cache = TrialCache()
    trials = [
        (number, kind, data)
        for kind, (_, count) in KINDS.items()
        for number in range(count)
        for data in tasks
    ]
    for number, kind, data in trials:
        file = args.storage / "curves" / f"{kind} {data} {number}.json".replace(" ", "-")
        if not file.exists() and time.monotonic() < end:
            write_json(file, train(kind, data, tasks, number, args.storage, cache))
    kept = [json.loads(file.read_text()) for file in sorted(args.storage.glob("curves/*.json"))]
    names = ("task", "shares", "base", "schedule", "learning_rate", "seconds")
    curves = [
        Curve.parse({name: one[name] for name in names} | {"values": one["losses"]})
        for one in kept
        if one["losses"]
    ]
    pack(curves, args.out)
    print(f"{len(curves)} curves, {args.out.stat().st_size / 1024:.0f} KiB: {args.out}")


def drawn(kind: str, data: str, number: int) -> dict[str, Any]:
    """The settings of a trial: the same ones for the same number."""
    if kind.startswith("rates"):
        rate = 1e-5 * 10 ** (number / 4)
        return {"method.type": "lora", "train.learning_rate": f"{rate:.3g}"} | COSINE
    rng = random.Random(f"{kind} {data} {number}")
    method = rng.choices(list(METHODS), weights=[5, 1, 2, 2])[0]
    capacity, values, least = METHODS[method]
    settings = {
        "method.type": method,
        "train.learning_rate": f"{least * math.exp(rng.random() * math.log(1e4)):.3g}",
        "train.lr_scheduler_type": rng.choice(["cosine", "cosine", "linear", "constant"]),
        "train.seed": rng.randrange(1000),
    }
    return settings | ({capacity: rng.choice(values)} if capacity else {})


def trained_on_another(data: str, tasks: dict[str, str], storage: Path, cache: TrialCache) -> str:
    """The directory of a model that is no stranger to language, and one to this data set."""
    names = list(tasks)
    other = names[(names.index(data) + 1) % len(names)]
    settings = {
        "model.name": "tiny",
        "method.type": "full",
        "train.learning_rate": 5e-3,
        "data.path": tasks[other],
        "data.max_length": LENGTHS.get(other, 192),
        "train.max_steps": 400,
        "train.eval_steps": 200,
        "data.val_size": 0.2,
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    plan = new_plan(load_config(None, overrides), Storage.open(str(storage / "trials")))
    planned = plan.trial({})
    made = storage / f"trained-on-{other}"
    if not made.exists():
        result = run_trial(planned.spec, lambda _: True, location=planned.location, warm=cache)
        if result.adapter is None:
            raise SystemExit(f"no model: {result.error}")
        result.adapter.path.rename(made)
    return str(made)


def train(
    kind: str, data: str, tasks: dict[str, str], number: int, storage: Path, cache: TrialCache
) -> dict[str, Any]:
    """One trial's curve, as `Curve` has it; without losses where it failed."""
    fixed, _ = KINDS[kind]
    if fixed["model.name"] == TRAINED:
        fixed = fixed | {"model.name": trained_on_another(data, tasks, storage, cache)}
    settings = {
        **fixed,
        **drawn(kind, data, number),
        "data.path": tasks[data],
        "data.max_length": LENGTHS.get(data, 192),
        "data.val_size": 0.2,
        "train.per_device_train_batch_size": 4,
        "train.eval_steps": fixed["train.max_steps"] // EVALUATIONS.get(kind, 16),
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    plan = new_plan(load_config(None, overrides), Storage.open(str(storage / "trials")))
    planned = plan.trial({})
    result = run_trial(planned.spec, lambda _: True, location=planned.location, warm=cache)
    points = [point for point in result.curve if "eval_loss" in point]
    steps = [point["step"] / planned.spec.train.max_steps for point in points]
    losses = [point["eval_loss"] for point in points]
    if result.status != "finished":
        print(f"{kind} {data} {number}: {result.status}, {result.error}")
        steps, losses = [], []
    print(kind, data, number, settings["method.type"], settings["train.learning_rate"], losses[-1:])
    return {
        "task": f"{kind} on {data}",
        "method": settings["method.type"],
        "learning_rate": float(settings["train.learning_rate"]),
        "schedule": settings["train.lr_scheduler_type"],
        "base": result.metrics.get("base_eval_loss"),
        "shares": steps,
        "losses": losses,
        "seconds": result.metrics.get("train_seconds"),
    }


if __name__ == "__main__":
    main()
