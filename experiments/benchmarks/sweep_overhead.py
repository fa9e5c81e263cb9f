"""What a trial costs beside its training: rayfin against the pattern of Ray's documentation.

    python experiments/benchmarks/sweep_overhead.py [--quick]

The same 8 short LoRA trials on SmolLM2 (same samples in the same order, seeds, steps and learning
rates), once through rayfin's warm workers, once through a Tune function that launches a 1-worker
TorchTrainer around TRL's SFTTrainer, as the guide on tuning with Ray Train shows. Wall clock is of
the whole process, from its start to its end.
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from baseline import train_with_trl
from common import parse_arguments, print_figure, run_side

BATCH_SIZE = 4
LEARNING_RATES = (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3)


def settings(quick: bool) -> tuple[tuple[float, ...], int]:
    """Learning rates (one a trial) and steps (5 of 4 samples are about 7 s on 2 cores)."""
    return (LEARNING_RATES[:2], 2) if quick else (LEARNING_RATES, 5)


def configuration(work: Path, quick: bool) -> Any:
    from rayfin.config import load_config

    rates, steps = settings(quick)
    return load_config(
        {
            # Few validation samples: evaluation is no overhead, and both sides do it once a trial.
            "data": {"path": "pydocs", "max_samples": 60, "max_length": 128, "val_size": 0.07},
            "method": {"type": "lora", "r": 8, "lora_alpha": 16},
            "train": {
                "max_steps": steps,
                "eval_steps": steps,
                "save_steps": steps,
                "per_device_train_batch_size": BATCH_SIZE,
            },
            "sweep": {
                "num_samples": len(rates),
                "search": "grid",
                "scheduler": "none",
                "parameters": {"train.learning_rate": list(rates)},
            },
            "storage": str(work / "rayfin"),
        }
    )


def rayfin_side(args: Namespace) -> list[dict[str, Any]]:
    from rayfin.history import History
    from rayfin.paths import Storage
    from rayfin.tuning.sweep import SweepOptions, run_sweep

    config = configuration(args.work, args.quick)
    storage = Storage.open(config.storage)
    with History.open(storage.history_url) as history:
        result = run_sweep(config, history, storage, SweepOptions(rerun=True))
    return [
        {
            "learning_rate": row.spec["train"]["learning_rate"],
            "train_seconds": row.metrics["train_seconds"],
            "losses": [point["loss"] for point in row.curve if "loss" in point],
            "eval_loss": row.metrics["eval_loss"],
        }
        for row in result.trials
    ]


def documented_side(args: Namespace) -> list[dict[str, Any]]:
    import ray
    import ray.train
    import ray.train.torch
    import ray.tune
    import torch
    from ray.tune.integration.ray_train import TuneReportCallback

    from rayfin.hardware import cpu_count

    threads = cpu_count()
    rates, steps = settings(args.quick)
    samples = json.loads((args.work / "samples.json").read_text())

    def train_loop(config: dict[str, Any]) -> None:
        # Ray gives this worker 1.5 CPUs, and so one thread: let it use the machine, as rayfin does.
        torch.set_num_threads(threads)
        result = train_with_trl(
            samples["model_path"],
            samples["train"],
            samples["eval"],
            learning_rate=config["learning_rate"],
            batch_size=BATCH_SIZE,
            max_steps=steps,
            output_dir=str(args.work / "trl"),
        )
        ray.train.report(result | config)

    def tune_function(config: dict[str, Any]) -> None:
        trainer = ray.train.torch.TorchTrainer(
            train_loop,
            train_loop_config=config,
            scaling_config=ray.train.ScalingConfig(
                num_workers=1, resources_per_worker={"CPU": ray.cluster_resources()["CPU"] - 0.5}
            ),
            run_config=ray.train.RunConfig(
                name=f"train-{ray.tune.get_context().get_trial_id()}",
                storage_path=str(args.work / "ray"),
                callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            ),
        )
        trainer.fit()

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(tune_function, {"cpu": 0.5}),
        param_space={"learning_rate": ray.tune.grid_search(list(rates))},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=1),
        run_config=ray.tune.RunConfig(storage_path=str(args.work / "ray"), verbose=0),
    )
    grid = tuner.fit()
    results = [grid[number].metrics or {} for number in range(len(grid))]
    ray.shutdown()
    names = ("learning_rate", "train_seconds", "losses", "eval_loss")
    return [{name: metrics[name] for name in names} for metrics in results]


def write_samples(work: Path, quick: bool) -> None:
    """What rayfin will train on, for the other side; converts the model before any clock runs."""
    from rayfin.data import load_corpus, tokenize_corpus
    from rayfin.models import load_tokenizer, locate
    from rayfin.training.batches import plan_samples

    config = configuration(work, quick)
    model_path = locate(config.model)
    tokenizer = load_tokenizer(config.model)
    data = tokenize_corpus(load_corpus(config.data), tokenizer, config.data.max_length)
    plan = plan_samples(
        [len(sample["input_ids"]) for sample in data.train],
        batch_size=BATCH_SIZE,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        group_by_length=True,
    )
    samples = {
        "model_path": model_path,
        "train": [data.train[i] for i in plan],
        "eval": data.eval,
    }
    (work / "samples.json").write_text(json.dumps(samples))


def main() -> None:
    args = parse_arguments(__doc__ or "", sides=("rayfin", "documented"))
    if args.side:
        side = rayfin_side if args.side == "rayfin" else documented_side
        args.out.write_text(json.dumps({"trials": side(args)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_samples(work, args.quick)
        ours = run_side(__file__, "rayfin", work, quick=args.quick)
        theirs = run_side(__file__, "documented", work, quick=args.quick)

    print(f"{'learning_rate':>13} | {'eval_loss':^19} | {'train_seconds':^19} | last train loss")
    print(f"{'':13} | {'rayfin':>9} {'documented':>9} | {'rayfin':>9} {'documented':>9} |")
    pairs = zip(
        sorted(ours["trials"], key=lambda t: t["learning_rate"]),
        sorted(theirs["trials"], key=lambda t: t["learning_rate"]),
        strict=True,
    )
    difference = 0.0
    for mine, other in pairs:
        difference = max(difference, abs(mine["eval_loss"] - other["eval_loss"]))
        print(
            f"{mine['learning_rate']:13g} | {mine['eval_loss']:9.4f} {other['eval_loss']:10.4f}"
            f" | {mine['train_seconds']:9.2f} {other['train_seconds']:10.2f}"
            f" | {mine['losses'][-1]:.4f} {other['losses'][-1]:.4f}"
        )
    print(f"largest difference of eval_loss: {difference:.5f}")

    def overhead(side: dict[str, Any]) -> float:
        return float(side["wall_seconds"] - sum(t["train_seconds"] for t in side["trials"]))

    for name, run in (("rayfin", ours), ("documented", theirs)):
        print(f"{name:10} wall {run['wall_seconds']:.1f} s, beside training {overhead(run):.1f} s")
    wall_ratio = theirs["wall_seconds"] / ours["wall_seconds"]
    print_figure("sweep_overhead", "wall_ratio", wall_ratio, "ratio", 3.5)
    print_figure(
        "sweep_overhead", "overhead_ratio", overhead(theirs) / overhead(ours), "ratio", 8.0
    )


if __name__ == "__main__":
    main()
