"""One worker, many trials: each as if it were the first."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rayfin.models import load_base
from rayfin.training import TrialResult
from rayfin.training.trainer import TrialTrainer
from rayfin.training.trial_cache import TrialCache


@pytest.fixture
def warm() -> TrialCache:
    return TrialCache()


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["lora", "ia3", "prompt_tuning"])
def test_a_warm_worker_computes_what_a_cold_one_does(name: str, lab: Any, warm: TrialCache) -> None:
    spec = lab.spec(name)
    lab.run(lab.spec("lora", gradient_checkpointing=True, max_steps=2, seed=5), warm=warm)
    again = lab.run(spec, warm=warm)
    assert again.status == "finished", again.error
    assert warm.loads == 1
    cold = lab.run(spec, warm=TrialCache())
    assert lab.losses(again) == lab.losses(cold)
    assert again.metrics["eval_loss"] == cold.metrics["eval_loss"]
    assert again.metrics["base_eval_loss"] == cold.metrics["base_eval_loss"]


def test_the_base_is_loaded_once_for_all_methods_that_share_it(lab: Any, warm: TrialCache) -> None:
    for name in ("lora", "ia3", "prompt_tuning", "adalora"):
        assert lab.run(lab.spec(name, max_steps=4), warm=warm).status == "finished"
    assert warm.loads == 1
    lab.run(lab.spec("lora", {"quantization_bit": 8}, max_steps=1), warm=warm)
    assert warm.loads == 2


def test_full_fine_tuning_leaves_nothing_of_itself_to_the_next(lab: Any, warm: TrialCache) -> None:
    spec = lab.spec("lora", max_steps=2)
    before = lab.run(spec, warm=warm)
    lab.run(lab.spec("full", max_steps=2), warm=warm)
    after = lab.run(spec, warm=warm)
    assert lab.losses(after) == lab.losses(before)


@pytest.mark.parametrize("spoils", ["full", "fails"])
def test_a_base_that_was_dropped_is_gone_before_the_next_trial_trains(
    spoils: str, lab: Any, warm: TrialCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two base models at once would be the next trial's lack of memory."""
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def load_and_count(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(base() is not None for base in loaded))
        base = load_base(*arguments, **options)
        loaded.append(weakref.ref(base))
        return base

    monkeypatch.setattr("rayfin.training.trial_cache.load_base", load_and_count)
    lab.run(lab.spec("lora", max_steps=1), warm=warm)
    if spoils == "full":
        lab.run(lab.spec("full", max_steps=1), warm=warm)
    else:
        diverging = lab.spec("lora", max_steps=2, learning_rate=1e30)
        assert lab.run(diverging, warm=warm).status == "failed"
    lab.run(lab.spec("lora", max_steps=1), warm=warm)
    assert alive == [0, 0]


def test_seeds_differ(lab: Any, warm: TrialCache) -> None:
    first, second = (lab.run(lab.spec(max_steps=2, seed=seed), warm=warm) for seed in (0, 1))
    assert lab.losses(first) != lab.losses(second)


# --- trials that end badly ----------------------------------------------------------------


@pytest.fixture
def next_is_right(lab: Any, warm: TrialCache) -> Iterator[None]:
    """After the test, the same worker still computes what a fresh one does."""
    yield
    spec = lab.spec()
    after = lab.run(spec, warm=warm)
    assert after.status == "finished", after.error
    assert lab.losses(after) == lab.losses(lab.finish(spec).result)


@pytest.mark.usefixtures("next_is_right")
@pytest.mark.parametrize("name", ["full", "dora", "prefix_tuning"])
def test_a_trial_that_fails_on_the_way(name: str, lab: Any, warm: TrialCache) -> None:
    def report(_: TrialResult) -> None:
        raise ConnectionError("the driver\nis gone")

    directory = lab.directory()
    failed = lab.run(lab.spec(name), report=report, warm=warm, directory=directory)
    assert (failed.status, failed.error) == ("failed", "ConnectionError: the driver is gone")
    assert failed.adapter is None and not (directory / "adapter").exists()
    assert "in evaluate" in (directory / "error.txt").read_text()


@pytest.mark.usefixtures("next_is_right")
def test_a_trial_that_diverges_names_the_learning_rate(lab: Any, warm: TrialCache) -> None:
    failed = lab.run(lab.spec("full", learning_rate=1e30), warm=warm)
    assert failed.status == "failed"
    assert "learning_rate (1e+30)" in str(failed.error) and "nan" in str(failed.error)


@pytest.mark.usefixtures("next_is_right")
def test_a_trial_that_needs_too_much_memory(
    lab: Any, warm: TrialCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_loss = TrialTrainer.compute_loss

    def greedy(self: TrialTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            torch.empty(1 << 50)
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrialTrainer, "compute_loss", greedy)
        failed = lab.run(lab.spec(), warm=warm)
    assert failed.status == "oom"
    assert "train.per_device_train_batch_size" in str(failed.error)
    assert "\n" not in str(failed.error)


@pytest.mark.usefixtures("next_is_right")
def test_modules_that_do_not_exist(lab: Any, warm: TrialCache) -> None:
    failed = lab.run(lab.spec("lora", {"target_modules": ["c_attn"]}), warm=warm)
    assert failed.status == "failed"
    assert "method.target_modules" in str(failed.error) and "q_proj" in str(failed.error)


@pytest.mark.usefixtures("next_is_right")
def test_a_report_of_false_stops_the_trial(lab: Any, warm: TrialCache) -> None:
    seen: list[TrialResult] = []

    def report(result: TrialResult) -> bool:
        seen.append(result)
        return len(seen) < 2

    directory: Path = lab.directory()
    spec = lab.spec(eval_steps=2)
    stopped = lab.run(spec, report=report, warm=warm, directory=directory)
    assert (stopped.status, stopped.error, stopped.adapter) == ("stopped", None, None)
    assert stopped.metrics["steps"] == 4
    assert [result.status for result in seen] == ["running", "running"]
    assert [result.metrics["steps"] for result in seen] == [2, 4]
    assert seen[-1].metrics["eval_loss"] == stopped.metrics["eval_loss"]
    assert list(directory.iterdir()) == []


def test_the_last_evaluation_is_not_asked_about(lab: Any, warm: TrialCache) -> None:
    asked: list[int] = []
    result = lab.run(
        lab.spec(eval_steps=3), report=lambda r: asked.append(r.metrics["steps"]), warm=warm
    )
    assert asked == [3, 6]
    assert result.metrics["steps"] == 8
