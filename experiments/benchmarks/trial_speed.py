"""Training tokens a second: `run_trial` against a bare TRL script on the same samples.

    python experiments/benchmarks/trial_speed.py [--quick]

LoRA on SmolLM2, batches of 8 samples of similar length, the same order on both sides; only the
training loop is timed (no loading, no evaluation). The sides alternate, each time in a fresh
process, and the ratio is that of neighbouring runs.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from baseline import train_with_trl
from common import parse_arguments, print_figure, run_side, spread

BATCH_SIZE = 8


def specification(quick: bool) -> Any:
    from rayfin.config import load_config
    from rayfin.training import TrialSpec

    steps = 4 if quick else 12
    config = load_config(
        {
            "data": {"path": "pydocs", "max_samples": 200, "max_length": 128},
            "method": {"type": "lora", "r": 8, "lora_alpha": 16},
            "train": {
                "max_steps": steps,
                "eval_steps": steps,
                "save_steps": steps,
                "per_device_train_batch_size": BATCH_SIZE,
            },
        }
    )
    return TrialSpec.of(config)


def planned(spec: Any, warm: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples in the order in which rayfin trains on them, and those of the evaluation."""
    from rayfin.training.batches import plan_samples

    data = warm.tokenized(spec)
    plan = plan_samples(
        [len(sample["input_ids"]) for sample in data.train],
        batch_size=BATCH_SIZE,
        max_steps=spec.train.max_steps,
        seed=spec.train.seed,
        group_by_length=True,
    )
    return [data.train[i] for i in plan], data.eval


def run_one_side(args: Namespace) -> dict[str, Any]:
    from rayfin.models import locate
    from rayfin.paths import StoragePath
    from rayfin.training.trial import run_trial
    from rayfin.training.trial_cache import TrialCache

    spec, warm = specification(args.quick), TrialCache()
    train, evaluation = planned(spec, warm)
    tokens = sum(len(sample["input_ids"]) for sample in train)
    if args.side == "rayfin":
        result = run_trial(
            spec, lambda _: True, location=StoragePath.at(args.work / "trial"), warm=warm
        )
        if result.status != "finished":
            raise SystemExit(result.error)
        seconds, eval_loss = result.metrics["train_seconds"], result.metrics["eval_loss"]
    else:
        trl = train_with_trl(
            locate(spec.model),
            train,
            evaluation,
            learning_rate=spec.train.learning_rate,
            batch_size=BATCH_SIZE,
            max_steps=spec.train.max_steps,
            output_dir=str(args.work / "trl"),
        )
        seconds, eval_loss = trl["train_seconds"], trl["eval_loss"]
    return {"tokens_per_second": tokens / seconds, "eval_loss": eval_loss, "tokens": tokens}


def main() -> None:
    args = parse_arguments(__doc__ or "", sides=("rayfin", "trl"))
    if args.side:
        args.out.write_text(json.dumps(run_one_side(args)))
        return
    from rayfin.models import locate

    locate(specification(args.quick).model)  # convert the model before any clock runs
    runs: dict[str, list[dict[str, Any]]] = {"rayfin": [], "trl": []}
    for _ in range(1 if args.quick else 3):
        for side, results in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                results.append(run_side(__file__, side, Path(folder), quick=args.quick))
    print("tokens a second, median (least to greatest)")
    for side, results in runs.items():
        speeds = [result["tokens_per_second"] for result in results]
        print(f"  {side:8} {spread(speeds, 1)}   eval_loss {results[0]['eval_loss']:.4f}")
    ratios = [
        mine["tokens_per_second"] / other["tokens_per_second"]
        for mine, other in zip(runs["rayfin"], runs["trl"], strict=True)
    ]
    print(f"  ratio    {spread(ratios)}, {runs['trl'][0]['tokens']} tokens a run")
    ratio = statistics.median(ratios)
    print_figure("trial_speed", "tokens_per_second_ratio", ratio, "ratio", 1.0)


if __name__ == "__main__":
    main()
