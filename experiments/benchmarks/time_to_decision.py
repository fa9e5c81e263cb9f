"""From a data set to an adapter: rayfin against a grid of 16 trials, and the same grid under ASHA.

    python experiments/benchmarks/time_to_decision.py [--data clinc150=FILE gsm8k=FILE]
        [--model smollm2-135m] [--quick]

For each task (a data set; `pydocs` comes with rayfin) the rows are divided into parts for
training, for validation and for the test. Three sides then start from the files of the first two:

- rayfin: `rayfin sweep` of 2 trials that the advisor chooses from the grid's ranges. It has seen no
  trial on the task's data: those of the shipped reference are taken out.
- grid: 4 learning rates by 4 ranks, each trial a Tune function that starts a TorchTrainer of one
  worker around TRL's SFTTrainer, the pattern of Ray's documentation.
- asha: the same trials under Ray's ASHAScheduler, which evaluates four times in a trial.

A side's time is its whole process, from the start until the best adapter by validation loss lies
on the disk. Then, on no clock, plain PEFT computes each adapter's mean loss over the completions'
tokens of the test rows. rayfin has decided as well where its loss is at most 1.02 times that of the
grid's adapter; a task where it is more counts as missed, and has no ratio. The number of rayfin's
trials was fixed before any of the tasks was run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from baseline import train_with_trl
from common import print_figure, run_side

TRIALS = 2
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RANKS = (4, 8, 16, 32)
WITHIN = 1.02
BATCH_SIZE = 8
PARTS = {"train": 200, "eval": 32, "test": 100}
"""The number of rows of each part."""
SIDES = ("rayfin", "grid", "asha")


@dataclass(frozen=True)
class Task:
    """One task, as its sides read it from `task.json`."""

    data: str
    model: str
    steps: int
    quick: bool

    @classmethod
    def read(cls, work: Path) -> Task:
        """Read the task of a working directory."""
        return cls(**json.loads((work / "task.json").read_text()))

    @property
    def grid(self) -> list[tuple[float, int]]:
        """The learning rate and the rank of each trial."""
        every = list(product(LEARNING_RATES, RANKS))
        return every[5:11:2] if self.quick else every


def configuration(task: Task, work: Path) -> Any:
    """Return the configuration of rayfin's sweep."""
    from rayfin.config import load_config

    return load_config(
        {
            "model": {"name": task.model},
            "data": {
                "path": str(work / "train.jsonl"),
                "eval_path": str(work / "eval.jsonl"),
                "max_length": 256,
            },
            "method": {"type": "lora", "lora_alpha": 16},
            "train": {
                "max_steps": task.steps,
                "eval_steps": task.steps,
                "per_device_train_batch_size": BATCH_SIZE,
            },
            "sweep": {
                "num_samples": TRIALS,
                "parameters": {
                    "method.r": list(RANKS),
                    "train.learning_rate": {
                        "space": "loguniform",
                        "lower": LEARNING_RATES[0],
                        "upper": LEARNING_RATES[-1],
                    },
                },
            },
            "publish": {"name": "decided"},
            "storage": str(work / "rayfin"),
        }
    )


def rayfin_side(work: Path) -> dict[str, Any]:
    """Run rayfin's sweep with a reference that lacks the trials on the task's data."""
    import rayfin
    from rayfin.advisor import knowledge

    task = Task.read(work)
    every = list(knowledge.reference_trials())
    unseen = [row for row in every if row.spec["data"]["path"] != task.data]
    knowledge.reference_trials = lambda **_: iter(unseen)
    result = rayfin.sweep(configuration(task, work), progress=False)
    assert result.published is not None
    return {
        "adapter": str(result.published.path),
        "trials": [
            [row.spec["train"]["learning_rate"], row.spec["method"]["r"], row.metrics["eval_loss"]]
            for row in result.trials
        ],
        "reference": [len(unseen), len(every)],
    }


def grid_side(work: Path) -> dict[str, Any]:
    """Run all trials of the grid to their end."""
    return _documented(work, None, evaluations=1)


def asha_side(work: Path) -> dict[str, Any]:
    """Run the grid under ASHA."""
    from ray.tune.schedulers import ASHAScheduler

    steps = Task.read(work).steps
    scheduler = ASHAScheduler(
        time_attr="step", max_t=steps, grace_period=max(1, steps // 4), reduction_factor=2
    )
    return _documented(work, scheduler, evaluations=4)


def _documented(work: Path, scheduler: Any, evaluations: int) -> dict[str, Any]:
    import ray
    import ray.train
    import ray.train.torch
    import ray.tune
    import torch
    from ray.tune.integration.ray_train import TuneReportCallback

    from rayfin.hardware import cpu_count

    threads, task = cpu_count(), Task.read(work)
    samples = json.loads((work / "samples.json").read_text())

    def train_loop(config: dict[str, Any]) -> None:
        # Ray gives this worker 1.5 CPUs, and so one thread: let it use the machine, as rayfin does.
        torch.set_num_threads(threads)
        train_with_trl(
            samples["model_path"],
            samples["train"],
            samples["eval"],
            learning_rate=config["cell"][0],
            rank=config["cell"][1],
            batch_size=BATCH_SIZE,
            max_steps=task.steps,
            output_dir=config["directory"],
            evaluate_every=max(1, task.steps // evaluations),
            evaluated=lambda step, loss: ray.train.report({"step": step, "eval_loss": loss}),
        )

    def tune_function(config: dict[str, Any]) -> None:
        trial = ray.tune.get_context().get_trial_id()
        trainer = ray.train.torch.TorchTrainer(
            train_loop,
            train_loop_config=config | {"directory": str(work / "trl" / str(trial))},
            scaling_config=ray.train.ScalingConfig(
                num_workers=1, resources_per_worker={"CPU": ray.cluster_resources()["CPU"] - 0.5}
            ),
            run_config=ray.train.RunConfig(
                name=f"train-{trial}",
                storage_path=str(work / "ray"),
                callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            ),
        )
        trainer.fit()

    # Without the dashboard's process, Ray Train doesn't give back what a stopped trial held, and
    # the next one waits for ever; where none is stopped, it would only take time.
    ray.init(address="local", include_dashboard=scheduler is not None, log_to_driver=False)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(tune_function, {"cpu": 0.5}),
        param_space={"cell": ray.tune.grid_search([*map(list, task.grid)])},
        tune_config=ray.tune.TuneConfig(
            metric="eval_loss", mode="min", max_concurrent_trials=1, scheduler=scheduler
        ),
        run_config=ray.tune.RunConfig(storage_path=str(work / "ray"), verbose=0),
    )
    grid = tuner.fit()
    results = [grid[number] for number in range(len(grid))]
    best = min(
        (one for one in results if one.metrics and one.metrics.get("step") == task.steps),
        key=lambda one: float((one.metrics or {})["eval_loss"]),
    )
    ray.shutdown()
    return {
        "adapter": str(work / "trl" / str((best.metrics or {})["trial_id"])),
        "trials": [
            [*(one.config or {})["cell"], (one.metrics or {}).get("eval_loss")] for one in results
        ],
    }


def write_task(task: Task, path: str, work: Path) -> None:
    """Write the rows of each part, the tokens for TRL and the test, and `task.json`."""
    from rayfin.config import load_config
    from rayfin.data import load_corpus, tokenize_corpus
    from rayfin.models import load_tokenizer, locate
    from rayfin.training.batches import plan_samples

    taken = sum(PARTS.values())
    data = load_config({"data": {"path": path, "max_samples": 4 * taken, "val_size": 0.1}}).data
    corpus = load_corpus(data)
    rows = [*corpus.train, *corpus.eval][:taken]
    for part, count in PARTS.items():
        own, rows = rows[:count], rows[count:]
        lines = [json.dumps({"messages": [*each.messages]}) + "\n" for each in own]
        (work / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    (work / "task.json").write_text(json.dumps(vars(task)))
    config = configuration(task, work)
    tokenizer = load_tokenizer(config.model)
    tokens = tokenize_corpus(load_corpus(config.data), tokenizer, config.data.max_length)
    held = config.data.model_copy(update={"eval_path": str(work / "test.jsonl")})
    test = tokenize_corpus(load_corpus(held), tokenizer, config.data.max_length).eval
    plan = plan_samples(
        [len(sample["input_ids"]) for sample in tokens.train],
        batch_size=BATCH_SIZE,
        max_steps=task.steps,
        seed=config.train.seed,
        group_by_length=True,
    )
    samples = {
        "model_path": locate(config.model),
        "train": [tokens.train[i] for i in plan],
        "eval": tokens.eval,
        "test": test,
    }
    (work / "samples.json").write_text(json.dumps(samples))


def main() -> None:
    """Run the tasks, and print what each side found and took."""
    args = _arguments()
    if args.side:
        sides: dict[str, Callable[[Path], dict[str, Any]]] = {
            "rayfin": rayfin_side, "grid": grid_side, "asha": asha_side,
        }  # fmt: skip
        args.out.write_text(json.dumps(sides[args.side](args.work)))
        return
    ratios: dict[str, list[float]] = {"grid": [], "asha": []}
    tasks = {"pydocs": "pydocs"} | dict(item.split("=", 1) for item in args.data)
    missed = 0
    for name, path in tasks.items():
        task = Task(name, args.model, 4 if args.quick else 20, args.quick)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            write_task(task, path, work)
            found = {side: run_side(__file__, side, work, quick=False) for side in SIDES}
            losses = {side: test_loss(work, Path(one["adapter"])) for side, one in found.items()}
        print(f"\n{name}, {args.model}, {task.steps} steps")
        for side, one in found.items():
            print(
                f"  {side:7} {one['wall_seconds']:8.1f} s, {len(one['trials']):2} trials, "
                f"test loss {losses[side]:.4f} ({losses[side] / losses['grid']:.3f} of the grid's)"
            )
        missed += losses["rayfin"] > WITHIN * losses["grid"]
        if losses["rayfin"] <= WITHIN * losses["grid"]:
            for side, of_tasks in ratios.items():
                of_tasks.append(found[side]["wall_seconds"] / found["rayfin"]["wall_seconds"])
    print_figure("time_to_decision", "tasks_missed", missed, "tasks", 0, most=True)
    for side, of_tasks in ratios.items():
        if of_tasks:
            median = statistics.median(of_tasks)
            print_figure("time_to_decision", f"{side}_ratio", median, "ratio", 10.0)


def _arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="3 trials of 4 steps")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def test_loss(work: Path, adapter: Path) -> float:
    """Return the mean loss of a token with a label over the test rows, with plain PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    samples = json.loads((work / "samples.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(samples["model_path"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for sample in samples["test"]:
            tokens, labels = (torch.tensor([sample[name]]) for name in ("input_ids", "labels"))
            scored = int((labels[:, 1:] != -100).sum())
            if scored:
                total += float(model(input_ids=tokens, labels=labels).loss) * scored
                count += scored
    return total / count


if __name__ == "__main__":
    main()
