"""The adapter of the best evaluation, and trials that end early: alike after any interruption."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from rayfin.config import build_config
from rayfin.errors import ConfigError
from rayfin.paths import StoragePath
from rayfin.training import TrialSpec, checkpointed_trainer, trial
from rayfin.training.checkpoint import latest_checkpoint
from rayfin.training.combination import check_combination
from rayfin.training.selection import best_step, evaluations_without_gain
from rayfin.training.spec import TrialResult
from rayfin.tuning.progress import evaluation_line

RATES = {"full": 0.01, "adalora": 0.03, "lora": 0.003, "pissa": 0.01}
"""Rates at which the evaluation is best at step 2 or 4, and worse from then on."""
_LONG = [pytest.param(method, marks=pytest.mark.long) for method in ("adalora", "pissa")]


@pytest.fixture
def spec(lab: Any) -> Callable[..., TrialSpec]:
    """A trial that gets ever surer of the one answer that it sees; half of the held-out are others.

    So the evaluation gets worse, whatever the processor rounds.
    """
    files = {"path": ["aaaaaa"] * 16, "eval_path": ["aaaaaa"] * 4 + ["bbbbbb"] * 4}
    data = {name: str(lab.root / f"selection-{name}.jsonl") for name in files}
    for name, answers in files.items():
        rows = ({"prompt": f"say {n}", "completion": each} for n, each in enumerate(answers))
        Path(data[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def of(method: str = "lora", **train: Any) -> TrialSpec:
        settings = {
            "max_steps": 12,
            "eval_steps": 2,
            "learning_rate": RATES[method],
            "lr_scheduler_type": "constant",
            "keep": "best",
        }
        found: TrialSpec = lab.spec(method, data=data, **(settings | train))
        return found.model_copy(update={"metric": "eval_loss"})

    return of


def evaluated(result: TrialResult) -> dict[int, float]:
    return {p["step"]: p["eval_loss"] for p in result.curve if "eval_loss" in p}


def interrupted_at(lab: Any, spec: TrialSpec, step: int) -> Path:
    """The directory of a trial that ended by Ctrl-C while its evaluation at `step` was recorded."""
    directory: Path = lab.directory()

    def report(result: TrialResult) -> None:
        if result.metrics["steps"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.run(spec, report=report, directory=directory)
    return directory


def weights(result: TrialResult) -> dict[str, torch.Tensor]:
    assert result.adapter is not None, result.error
    return {
        f"{file.name}: {name}": tensor
        for file in sorted(result.adapter.path.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_end(one: TrialResult, other: TrialResult) -> None:
    assert (one.status, one.error, one.curve) == (other.status, other.error, other.curve)
    for name in ("eval_loss", "exact_match", "base_eval_loss", "steps", "eval_loss_change_se"):
        assert one.metrics[name] == other.metrics[name], name
    for name in ("early_stop", "kept_step"):
        assert one.scenario.get(name) == other.scenario.get(name), name
    assert one.max_steps == other.max_steps
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("method", ["lora", "full", *_LONG])
def test_the_kept_adapter_scores_the_best_evaluation_of_its_curve_in_plain_peft(
    method: str, lab: Any, spec: Callable[..., TrialSpec]
) -> None:
    kept = lab.finish(spec(method))
    losses = evaluated(kept.result)
    best = min(losses, key=losses.__getitem__)
    assert best in (2, 4), losses
    assert kept.result.scenario["kept_step"] == best and kept.result.metrics["steps"] == 12
    # The optimizer's state is of the last step, and would not belong to these weights.
    assert not (kept.adapter / "training_state.safetensors").exists()
    assert kept.result.metrics["eval_loss"] == losses[best]
    line = evaluation_line(kept.result, kept.spec.train.model_dump())
    assert line.startswith(f"step 12/12  eval_loss {losses[12]:.4f}"), "the last evaluation's"
    assert lab.plain_loss(lab.reload(kept), kept.spec) == lab.rounded(losses[best])
    assert lab.answers(lab.reload(kept), kept.spec) == kept.answers
    if method in ("lora", "full"):
        last = lab.finish(spec(method, keep="last").model_copy(update={"metric": None}))
        assert evaluated(last.result) == losses, "what is kept changes nothing of the training"
        assert last.result.metrics["eval_loss"] == losses[12]
        assert lab.plain_loss(lab.reload(last), last.spec) == lab.rounded(losses[12])


@pytest.mark.numeric
@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(m, marks=pytest.mark.long) for m in ("full", "adalora"))]
)
def test_a_trial_that_keeps_its_best_goes_on_to_the_same_end(
    method: str, lab: Any, spec: Callable[..., TrialSpec]
) -> None:
    one = spec(method, save_steps=1)
    whole = lab.finish(one).result
    best = whole.scenario["kept_step"]
    # After it the best checkpoint is older than the last two, which are all that others keep.
    directory = interrupted_at(lab, one, best + 6)
    names = {path.name for path in (directory / "checkpoints").glob("checkpoint-*")}
    assert f"checkpoint-{best}" in names and len(names) == 3
    assert_same_end(lab.run(one, directory=directory), whole)


@pytest.mark.parametrize("when", ["before its checkpoint", "while the adapter is written"])
def test_the_best_is_kept_whenever_a_trial_is_interrupted(
    when: str, lab: Any, spec: Callable[..., TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = spec(save_steps=100)  # what is saved is saved for being the best
    whole = lab.finish(one).result
    best = whole.scenario["kept_step"]
    if when == "before its checkpoint":
        directory = interrupted_at(lab, one, best)
        assert not (directory / "checkpoints" / f"checkpoint-{best}").exists()
    else:
        directory = lab.directory()

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(trial, "save_adapter", interrupt)
            with pytest.raises(KeyboardInterrupt):
                lab.run(one, directory=directory)
        assert (directory / "checkpoints" / f"checkpoint-{best}").exists()
    assert_same_end(lab.run(one, directory=directory), whole)


def test_a_trial_whose_best_checkpoint_is_damaged_goes_back_to_before_it(
    lab: Any, spec: Callable[..., TrialSpec], caplog: pytest.LogCaptureFixture
) -> None:
    one = spec()
    whole = lab.finish(one).result
    best = whole.scenario["kept_step"]
    directory = interrupted_at(lab, one, best + 6)
    checkpoints = StoragePath(directory / "checkpoints")
    (directory / "checkpoints" / f"checkpoint-{best}" / "training_state.safetensors").write_text("")
    assert latest_checkpoint(checkpoints) is not None
    resumed = lab.run(one, directory=directory)
    assert f"checkpoint-{best}, which it needs" in caplog.text
    assert_same_end(resumed, whole)


def test_a_torn_checkpoint_of_a_new_best_goes_back_to_the_one_before(
    lab: Any, spec: Callable[..., TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one needs the best before: the evaluation at step 4 is worse than that at step 2."""
    best = {0: None, 1: 2, 2: 2}
    monkeypatch.setattr(
        checkpointed_trainer,
        "best_step",
        lambda log, _: best.get(sum("eval_loss" in point for point in log), 6),
    )
    one = spec(max_steps=10)
    whole = lab.finish(one).result
    directory = interrupted_at(lab, one, 8) / "checkpoints"
    names = {path.name for path in directory.glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    (directory / "checkpoint-6" / "training_state.safetensors").write_text("")
    found = latest_checkpoint(StoragePath(directory), lambda _: "checkpoint-2")
    assert found is not None and found.name == "checkpoint-4"
    assert_same_end(lab.run(one, directory=directory.parent), whole)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_an_early_stop_is_a_finished_trial_and_the_same_after_an_interruption(
    keep: str, lab: Any, spec: Callable[..., TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = spec(keep=keep, early_stopping_patience=2, max_steps=40)
    finished = lab.finish(one)
    whole, losses = finished.result, evaluated(finished.result)
    stop, best = max(losses), min(losses, key=losses.__getitem__)
    assert whole.status == "finished" and whole.scenario["early_stop"] == stop < 40
    assert stop == best + 4 == whole.metrics["steps"] and whole.max_steps == 40
    kept = best if keep == "best" else stop
    assert whole.metrics["eval_loss"] == losses[kept]
    assert lab.plain_loss(lab.reload(finished), one) == lab.rounded(losses[kept])

    assert_same_end(lab.run(one, directory=interrupted_at(lab, one, stop - 2)), whole)
    directory = lab.directory()
    with monkeypatch.context() as patch:  # the end was decided, and its adapter not yet written
        patch.setattr(trial, "save_adapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lab.run(one, directory=directory)
    assert_same_end(lab.run(one, directory=directory), whole)


def test_patience_is_that_of_transformers() -> None:
    """On random curves, by a score of which less is better, and by one of which more is."""
    draw = random.Random(4)
    for _ in range(300):
        patience, threshold = draw.randint(1, 4), draw.choice([0.0, 0.5, 1.0])
        metric, greater = draw.choice([("eval_loss", False), ("exact_match", True)])
        values = [draw.randint(0, 8) / 2 for _ in range(12)]
        theirs, state = EarlyStoppingCallback(patience, threshold), TrainerState()
        args: Any = SimpleNamespace(metric_for_best_model=metric, greater_is_better=greater)
        for number, value in enumerate(values, 1):
            control = TrainerControl()
            named = metric if metric.startswith("eval_") else f"eval_{metric}"
            theirs.on_evaluate(args, state, control, metrics={named: value})
            best = state.best_metric
            if best is None or (value > best if greater else value < best):
                state.best_metric, state.best_global_step = value, number
            curve = [{"step": n, metric: v} for n, v in enumerate(values[:number], 1)]
            waited = evaluations_without_gain(curve, metric, threshold)
            assert (waited >= patience) == control.should_training_stop
            assert best_step(curve, metric) == state.best_global_step
            if control.should_training_stop:
                break


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"num_train_epochs": 2, "max_steps": 9}, "both say how long to train; give one of them"),
        ({"early_stopping_threshold": 0.1}, "has no effect without train.early_stopping_patience"),
    ],
)
def test_settings_that_leave_one_without_effect_are_refused(
    train: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_combination(build_config({"train": train}))
    nulls = {"train.max_steps": None, "train.early_stopping_patience": 2}
    check_combination(build_config({"train": train}, nulls))


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed-zero2", "deepspeed-zero3"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_workers_keep_the_best_as_one_does(
    strategy: str, method: str, lab: Any, spec: Callable[..., TrialSpec]
) -> None:
    one = spec(method, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    directory = lab.directory()
    directory.mkdir()
    job = {"spec": one.model_dump_json(), "workers": 2, "strategy": strategy}
    (result,) = lab.in_groups([job | {"directory": str(directory)}])
    assert (result["status"], result["error"]) == ("finished", None)
    losses = {p["step"]: p["eval_loss"] for p in result["curve"] if "eval_loss" in p}
    best = min(losses, key=losses.__getitem__)
    assert best in (2, 4) and result["scenario"]["kept_step"] == best
    assert result["metrics"]["eval_loss"] == lab.rounded(losses[best])
    model = lab.reloaded(one, directory / "adapter")
    assert lab.plain_loss(model, one) == lab.rounded(losses[best])


@pytest.mark.long
def test_the_best_is_kept_in_a_bucket_too(
    bucket: str, lab: Any, spec: Callable[..., TrialSpec]
) -> None:
    one = spec()
    whole = lab.finish(one).result
    location = StoragePath.at(f"{bucket}/trial")

    def report(result: TrialResult) -> None:
        if result.metrics["steps"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.run_trial(one, report, location=location, warm=lab.warm)
    names = set((location / "checkpoints").names())
    assert f"checkpoint-{whole.scenario['kept_step']}" in names
    resumed = trial.run_trial(one, lambda _: None, location=location, warm=lab.warm)
    assert resumed.adapter is not None and resumed.adapter.download()
    assert_same_end(resumed, whole)
