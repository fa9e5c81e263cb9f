"""A laboratory for trials: real ones, on a model and a file small enough for a second each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from rayfin.data import TokenizedSample
from rayfin.methods import METHODS
from rayfin.models import load_base
from rayfin.paths import StoragePath
from rayfin.training import TrialResult, TrialSpec, trial
from rayfin.training.trial_cache import TrialCache

COLOURS = ("red", "blue", "green", "pink", "gold", "teal", "grey", "lime")
# Small enough for seconds, and with dropout wherever a method has it: a resume must draw the same.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.2},
    "qlora": {"lora_dropout": 0.2},
    "dora": {"lora_dropout": 0.2},
    "rslora": {"lora_dropout": 0.2},
    "adalora": {"init_r": 6, "target_r": 3, "lora_dropout": 0.2},
    "vera": {"r": 24, "vera_dropout": 0.2},
    "loha": {"r": 4, "rank_dropout": 0.2},
    "oft": {"oft_block_size": 8, "module_dropout": 0.2},
    "p_tuning": {"num_virtual_tokens": 4},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora with patterns": (
        "lora",
        {
            "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"v_proj": 7},
            "exclude_modules": ["k_proj", "layers.0.mlp.down_proj"],
        },
    ),
    "lora of layers": (
        "lora",
        {
            "target_modules": ["q_proj", "gate_proj", "down_proj"],
            "layers_to_transform": [1],
            "loraplus_lr_ratio": 4,
            "lora_dropout": 0.2,
        },
    ),
    "lora with tables": ("lora", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "rslora with norms": ("rslora", {"modules_to_save": ["model.norm", "k_proj"]}),
    "qlora with a head": ("qlora", {"modules_to_save": ["lm_head"], "lora_dropout": 0.2}),
    "vera with a head": ("vera", {"r": 24, "modules_to_save": ["lm_head"]}),
    "pissa": (
        "lora",
        {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "lora_dropout": 0.1},
    ),
    "pissa_niter_16": ("rslora", {"init_lora_weights": "pissa_niter_16", "r": 4}),
    "olora": ("rslora", {"init_lora_weights": "olora", "alpha_pattern": {"o_proj": 4}}),
    "loftq": ("qlora", {"init_lora_weights": "loftq", "rank_pattern": {"q_proj": 2}}),
    "eva": ("lora", {"init_lora_weights": "eva", "r": 4, "lora_dropout": 0.2}),
    "eva over 4 bits": ("dora", {"init_lora_weights": "eva", "quantization_bit": 4, "r": 2}),
}
"""Settings that change how a method is trained or saved: name -> method, settings."""
LONGEST_SUM = {"tiny": 128, "smollm2-135m": 1536}
"""Terms: the inner width of their feed-forward layers."""
LEARNING_RATES = {
    "full": 3e-3,
    "rslora": 1e-2,
    "adalora": 5e-2,
    "ia3": 1e-1,
    "prefix_tuning": 2e-1,
    "prompt_tuning": 2e-1,
    "eva over 4 bits": 1e-2,
    "pissa": 2e-3,
    "pissa_niter_16": 2e-3,
    "olora": 2e-3,
    "lora with tables": 5e-3,
    "rslora with norms": 5e-3,
}


@dataclass
class Finished:
    """A trial that ran to its end, and what its model said while it was still in memory."""

    spec: TrialSpec
    result: TrialResult
    answers: list[list[int]]

    @property
    def adapter(self) -> Path:
        assert self.result.adapter is not None, self.result.error
        return self.result.adapter.path


class Lab:
    every_method = (*METHODS, *VARIANTS)

    def __init__(self, root: Path, loss_error: Callable[[float, int], float]) -> None:
        """`loss_error`: of rounding.py."""
        self.root, self._loss_error = root, loss_error
        self.data = root / "colours.jsonl"
        rows = [
            {"prompt": f"say {name}{' please' * (i % 4)} {i}", "completion": name[::-1]}
            for name in COLOURS
            for i in range(5)
        ]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.warm = TrialCache()
        self._forks = Forks(root / "forks.log")
        self._kept: dict[str, Finished] = {}

    def spec(
        self,
        method: str = "lora",
        settings: dict[str, Any] | None = None,
        *,
        data: dict[str, Any] | None = None,
        model: str = "tiny",
        **train: Any,
    ) -> TrialSpec:
        """A trial of 8 steps, evaluated in the middle and at the end.

        `method` may be the name of one of the VARIANTS, too.
        """
        rate = LEARNING_RATES.get(method, 2e-2)
        method, own = VARIANTS.get(method, (method, SETTINGS.get(method, {})))
        return TrialSpec.model_validate(
            {
                "model": {"name": model},
                "data": {"path": str(self.data), "max_length": 64, **(data or {})},
                "method": {"type": method, **(own | (settings or {}))},
                "train": {
                    name: value
                    for name, value in {
                        "max_steps": 8,
                        "eval_steps": 4,
                        "learning_rate": rate,
                        **train,
                    }.items()
                    if value is not None
                },
            }
        )

    def directory(self) -> Path:
        return self.root / f"trial-{len(list(self.root.iterdir()))}"

    def run(
        self,
        spec: TrialSpec,
        *,
        report: Callable[[TrialResult], bool | None] = lambda _: None,
        warm: TrialCache | None = None,
        directory: Path | None = None,
    ) -> TrialResult:
        directory = directory or self.directory()
        directory.mkdir(exist_ok=True)
        return trial.run_trial(
            spec, report, location=StoragePath(directory), warm=warm or self.warm
        )

    def finish(self, spec: TrialSpec) -> Finished:
        """Runs `spec` and asks its model for greedy answers before it is taken apart; kept."""
        key = spec.model_dump_json()
        if key in self._kept:
            return self._kept[key]
        answers: list[list[int]] = []
        save = trial.save_adapter

        def answer_and_save(model: torch.nn.Module, *others: Any) -> None:
            save(model, *others)
            answers.extend(self.answers(model, spec))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trial, "save_adapter", answer_and_save)
            result = self.run(spec)
        self._kept[key] = Finished(spec, result, answers)
        return self._kept[key]

    def answers(self, model: Any, spec: TrialSpec) -> list[list[int]]:
        """Greedy continuations of three prompts."""
        model.eval()
        return [self.continued(model, self.prompt(sample)) for sample in self.held_out(spec)[:3]]

    @staticmethod
    def prompt(sample: TokenizedSample) -> list[int]:
        """What generation is given: the tokens before the first that is learned."""
        first = next(at for at, label in enumerate(sample["labels"]) if label >= 0)
        return sample["input_ids"][:first]

    def continued(self, model: Any, prompt: list[int], tokens: int = 6) -> list[int]:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return [int(token) for token in output[0, len(prompt) :]]

    def held_out(self, spec: TrialSpec) -> list[TokenizedSample]:
        return self.warm.tokenized(spec).eval

    def plain_loss(self, model: torch.nn.Module, spec: TrialSpec) -> float:
        """Mean loss over the labels of the held-out samples, one sample at a time, no padding."""
        total, count = 0.0, 0
        model.eval()
        with torch.no_grad():
            for sample in self.held_out(spec):
                ids, labels = (torch.tensor([sample[key]]) for key in ("input_ids", "labels"))
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                last = logits[0, -ids.shape[1] : -1]
                total += float(functional.cross_entropy(last, labels[0, 1:], reduction="sum"))
                count += int((labels[:, 1:] != -100).sum())
        return total / count

    def rounded(self, losses: Any, model: str = "tiny") -> Any:
        """Equal to a loss of `model`, or to several, that were added up in another order."""
        largest = max(losses) if isinstance(losses, list) else losses
        return pytest.approx(losses, rel=0, abs=self._loss_error(largest, LONGEST_SUM[model]))

    def reload(self, finished: Finished) -> Any:
        """The saved adapter through plain PEFT, on a base loaded anew."""
        return self.reloaded(finished.spec, finished.adapter)

    def reloaded(self, spec: TrialSpec, adapter: Path) -> Any:
        """`adapter` through plain PEFT, on a base loaded anew."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        if spec.method.type == "full":
            return AutoModelForCausalLM.from_pretrained(adapter)
        base = load_base(spec.model, spec.method.quantization_bit, "cpu")
        return PeftModel.from_pretrained(base, adapter)

    @staticmethod
    def losses(result: TrialResult) -> list[float]:
        return [point["loss"] for point in result.curve if "loss" in point]

    def killed(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Runs trials in processes of their own that kill themselves; see killed_trials.py.

        With as many threads as this process has, and so with the same sums in the same order.
        """
        threads = {"threads": torch.get_num_threads()}
        ends: list[dict[str, Any]] = self._forks.ask("killed", [threads | job for job in jobs])
        return ends

    def in_groups(self, jobs: list[dict[str, Any]]) -> list[Any]:
        """Runs trials on several workers each; see group_trials.py."""
        environment = {"environment": dict(os.environ)}
        results: list[Any] = self._forks.ask("group", [environment | job for job in jobs])
        return results

    def close(self) -> None:
        self._forks.close()


class Forks:
    """The process from which trials are forked, from the first time that one is needed."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def ask(self, run: str, jobs: list[dict[str, Any]]) -> Any:
        process = self._process = self._process or self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps({"run": run, "jobs": jobs}), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, self._log.read_text()[-3000:]
        except BaseException:  # of a test that ran out of time, too: the next wants its own answer
            self.close()
            raise
        return json.loads(answer)

    def _started(self) -> subprocess.Popen[str]:
        with self._log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", Path(__file__).with_name("forked_trials.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,
            )

    def close(self) -> None:
        """Ends it, and what it has forked."""
        if (process := self._process) is None:
            return
        self._process = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(540)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, rounding: Any) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"), rounding.loss_error)
    yield lab
    lab.close()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from a second thread, and waits for it on a busy machine.

    `make test-numerics` asks for another number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "every_method" in metafunc.fixturenames:
        metafunc.parametrize("every_method", Lab.every_method)
