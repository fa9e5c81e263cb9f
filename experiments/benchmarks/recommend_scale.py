"""How long the advisor takes to learn from a large history, and to answer from it.

python experiments/benchmarks/recommend_scale.py [--trials 100000] [--quick]

The history is made up: scenarios of 50 trials each, over models of many sizes and tasks. `fit`
reads it and learns (what the first `rayfin recommend` after a large import does), `read` takes what
was kept, `answer` is `recommend()` itself, `command` all of `rayfin recommend` on the history that
comes with rayfin, start-up included.
"""

from __future__ import annotations

import argparse
import math
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as rayfin's commands do

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from common import print_figure

from rayfin.advisor.knowledge import knowledge_of
from rayfin.advisor.recommendation import ScenarioFacts, recommend
from rayfin.advisor.scenario import Scenario
from rayfin.config import ModelConfig
from rayfin.hardware import describe_hardware
from rayfin.history import History, TrialRecord
from rayfin.models import describe_model

OF_SCENARIO = 50
FAMILIES = ("qwen2.5", "qwen3", "llama-3.1", "llama-3.2", "gemma-2", "mistral", "smollm2", "phi-4")
REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="2,000 trials")
    args = parser.parse_args()
    trials = 2_000 if args.quick else args.trials
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/history.sqlite"
        with History.open(url) as history:
            history.merge(made_up(trials))
            cache = Path(folder) / "cache"
            fit, _ = timed(lambda: knowledge_of(history, cache=cache))
            read, knowledge = timed(lambda: knowledge_of(history, cache=cache))
        facts, hardware = describe_model(ModelConfig(name="smollm2-135m")), describe_hardware(False)
        place = ScenarioFacts(
            Scenario("cpu", "small", "normal"), facts, hardware, {"digest": "task 3"}
        )
        answers = [timed(lambda: recommend(place, knowledge))[0] for _ in range(REPEATS + 1)][1:]
        command = [sys.executable, "-m", "rayfin", "recommend", "model.name=smollm2-135m"]
        command += ["data.path=pydocs", f"storage={folder}/none", "--json"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        commands = [
            timed(
                lambda: subprocess.run(
                    command, check=True, stdout=subprocess.DEVNULL, env=environment
                )
            )[0]
            for _ in range(REPEATS + 1)
        ][1:]
    answer, whole = statistics.median(answers), statistics.median(commands)
    print(f"{trials} trials: fit {fit:.1f} s, read {read:.2f} s")
    print(f"answer {1000 * answer:.0f} ms, command {whole:.2f} s (medians of {REPEATS})")
    print_figure("recommend_scale", "fit", fit, "s", 60, most=True)
    print_figure("recommend_scale", "answer", 1000 * answer, "ms", 300, most=True)
    print_figure("recommend_scale", "command", whole, "s", 3, most=True)


def made_up(trials: int) -> Iterator[TrialRecord]:
    """Bowls over the learning rate, deeper at larger ranks, whose place varies with the size."""
    draw = random.Random(0)
    now = datetime.now(UTC)
    for number in range(trials):
        scenario = number // OF_SCENARIO
        size = 0.1 * 2 ** (scenario % 10)
        family, task = FAMILIES[scenario % len(FAMILIES)], f"task {scenario % 37}"
        rate, rank = 10 ** draw.uniform(-5, -2), 2 ** draw.randrange(8)
        away = math.log10(rate / 3e-4) + 0.2 * math.log10(size)
        loss = 2 + 0.3 * away**2 - 0.01 * math.log2(rank) + draw.gauss(0, 0.01)
        yield TrialRecord(
            trial_id=f"t{number}",
            sweep_id=f"s{scenario}",
            fingerprint=f"{number:016x}",
            status="finished",
            created_at=now,
            updated_at=now,
            spec={
                "model": {"name": f"{family}-{size:g}b-{scenario}"},
                "data": {"path": task},
                "method": {"type": "lora", "r": rank, "lora_alpha": 16.0},
                "train": {"learning_rate": rate, "max_steps": 100},
            },
            scenario={"data": {"digest": task, "rows_train": 1000}},
            metrics={"eval_loss": loss},
        )


T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
