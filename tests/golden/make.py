"""Writes `storage_v1`: what a rayfin leaves behind, for later ones to go on with. See README.md.

Usage: make.py DIRECTORY. Run by the rayfin that is to be remembered, and never again: the copy
tells what *that* one wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

COLOURS = ("red", "blue", "green", "pink", "gold", "teal", "grey", "lime")
TRAINED = {"model.name": "tiny", "data.max_length": 64, "train.max_steps": 12}
# Rates so large that each adapter says something of its own.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method.r": 1, "method.target_modules": "[q_proj, v_proj]"},
    "dora": {"method.r": 1, "method.target_modules": "[q_proj, v_proj]"},
    "adalora": {
        "method.init_r": 2,
        "method.target_r": 1,
        "method.target_modules": "[q_proj, v_proj]",
    },
    "ia3": {},
    "p_tuning": {"method.num_virtual_tokens": 4, "method.encoder_hidden_size": 64},
    "prefix_tuning": {"method.num_virtual_tokens": 2},
}
RATES = {"lora": 5e-2, "dora": 5e-2, "adalora": 1e-1, "ia3": 2e-1, "p_tuning": 1.0}
PROMPTS = ("say red please 1", "say lime", "Hello", "gold", "2 + 2 =", "你好")
KILLED = {
    "method.type": "lora",
    "method.r": 2,
    "method.lora_dropout": 0.1,
    "method.target_modules": "[q_proj, v_proj]",
    "train.learning_rate": 2e-3,
    "train.eval_steps": 4,
    "train.save_steps": 2,
    "train.seed": 7,
}
KILLED_IN = 7
"""The step that the killed trial does not end."""

DIE = """
import os, signal, sys
from rayfin.cli import main
from rayfin.training.trainer import TrialTrainer
compute = TrialTrainer.compute_loss
def deadly(self, *args, **kwargs):
    if self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(self, *args, **kwargs)
step = int(sys.argv.pop())
TrialTrainer.compute_loss = deadly
raise SystemExit(main(sys.argv[1:]))
"""

SWEEP = """\
model:
  name: tiny
data:
  path: colours.jsonl
  max_length: 64
method:
  type: lora
  lora_dropout: 0.1
  target_modules: [q_proj, v_proj]
train:
  max_steps: 60
  eval_steps: 6
sweep:
  search: grid
  scheduler: none
  num_samples: 4
  max_concurrent_trials: 1
  report_samples: 0
  parameters:
    method.r: [1, 2]
    train.learning_rate: [1.0e-3, 2.0e-3]
storage: runs
"""


def words(settings: dict[str, Any], storage: str = "runs") -> list[str]:
    """The arguments of `rayfin train`."""
    given = TRAINED | {"data.path": "colours.jsonl", "storage": storage} | settings
    return ["train", *(f"{name}={value}" for name, value in given.items())]


def rows() -> list[Any]:
    from rayfin.history import History

    with History.open("sqlite:///runs/history.sqlite") as history:
        return history.trials()


def adapters() -> list[list[str]]:
    """Returns the arguments of the runs that finished."""
    from rayfin.adapters import Registry
    from rayfin.cli import main

    done = []
    for method, seed in [*((method, 0) for method in METHODS), ("lora", 1)]:
        settings = {"method.type": method} | METHODS[method]
        settings |= {"train.learning_rate": RATES.get(method, 2e-1), "train.seed": seed}
        settings |= {"train.max_steps": 40, "train.eval_steps": 20}
        done.append(words(settings))
        publish = {"publish.name": method.replace("_", "-"), "publish.storage": "runs"}
        assert main(words(settings | publish)) == 0
    registry = Registry(Path("runs/adapters"))
    registry.promote("lora", 2)
    registry.promote("lora", 1)
    registry.promote("ia3", 1, "staging")
    # It diverges.
    assert main(words({"method.type": "lora", "method.r": 1, "train.learning_rate": 1e30})) != 0
    return done


def answers() -> dict[str, list[list[tuple[int, float]]]]:
    """The engine's greedy tokens with their log-probabilities, by adapter and prompt."""
    from rayfin.adapters import Registry
    from rayfin.config.schema import ModelConfig
    from rayfin.config.serving import EngineConfig
    from rayfin.models import load_tokenizer
    from rayfin.serving.engine.engine import Engine
    from rayfin.serving.engine.request import AdapterSource, Request, SamplingParams

    engine = Engine(ModelConfig(name="tiny"), EngineConfig(max_length=256), use_gpu=False)
    engine.start()
    tokenizer = load_tokenizer(ModelConfig(name="tiny"))
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0)
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for version in [None, *Registry(Path("runs/adapters")).list()]:
        name = "base" if version is None else str(version.ref)
        source = None if version is None else AdapterSource(name, version.path)
        for prompt in PROMPTS:
            said: list[tuple[int, float]] = []
            ended = threading.Event()

            def take(chunk: Any, said: Any = said, ended: Any = ended) -> None:
                said.extend(
                    zip(chunk.token_ids, [one.logprob for one in chunk.logprobs], strict=True)
                )
                if chunk.finish_reason is not None:
                    assert chunk.error is None, chunk.error
                    ended.set()

            ids = tuple(tokenizer(prompt)["input_ids"])
            engine.submit(Request(f"{name} {prompt}", ids, params, source), take)
            assert ended.wait(60)
            found.setdefault(name, []).append(said)
    engine.close()
    return found


def killed() -> dict[str, Any]:
    """Leaves a trial that was killed half-way; returns what one that ran through came to."""
    command = [sys.executable, "-c", DIE, *words(KILLED), str(KILLED_IN)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    from rayfin.cli import main
    from rayfin.history import History

    assert main(words(KILLED, "whole")) == 0
    with History.open("sqlite:///whole/history.sqlite") as history:
        (row,) = history.trials()
    shutil.rmtree("whole")
    names = ("eval_loss", "exact_match", "token_accuracy", "base_eval_loss", "steps")
    curve = [{k: v for k, v in point.items() if k != "seconds"} for point in row.curve]
    return {
        "words": words(KILLED),
        "trial": row.trial_id,
        "curve": curve,
        "metrics": {name: row.metrics[name] for name in names},
    }


def half_a_sweep() -> None:
    """Leaves a sweep of four trials that was interrupted in the third."""
    Path("sweep.yaml").write_text(SWEEP)
    command = [sys.executable, "-m", "rayfin", "sweep", "sweep.yaml"]
    before = len(rows())
    sweep = subprocess.Popen(command, start_new_session=True)
    while True:
        assert sweep.poll() is None
        time.sleep(0.05)
        new = rows()[before:]
        if len(new) == 3 and len(new[2].curve) > 4:
            break
    os.killpg(sweep.pid, signal.SIGINT)
    assert sweep.wait(120) == 130
    assert [row.status for row in rows()[before:]] == ["finished", "finished", "interrupted"]


def strip() -> None:
    """Removes what nobody goes on with, and all checkpoints but the newest of each trial."""
    doomed = [Path("runs/ray")]
    for checkpoints in Path("runs").rglob("checkpoints"):
        found = sorted(
            checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])
        )
        doomed += found[:-1]
    for path in doomed:
        shutil.rmtree(path)
    for pattern in ("report.*", "sweeps/**/README.md", "error.txt"):
        for file in Path("runs").rglob(pattern):
            file.unlink()


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True)
    os.chdir(directory)
    lines = [
        {"prompt": f"say {name}{' please' * (i % 4)} {i}", "completion": name[::-1]}
        for name in COLOURS
        for i in range(3)
    ]
    Path("colours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finished = adapters()
    half_a_sweep()
    whole = killed()
    from rayfin.history import History, export_history

    with History.open("sqlite:///runs/history.sqlite") as history:
        export_history(history, "history.jsonl")
    strip()
    told = {"finished": finished, "prompts": PROMPTS, "answers": answers(), "whole": whole}
    Path("expected.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
