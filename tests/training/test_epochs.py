"""Epochs: every row is seen as often as there are epochs, by any number of workers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayfin.config import TrainConfig
from rayfin.config.steps import position, share_of_steps, steps_of_epochs, steps_of_share
from rayfin.data.stream import FileRange, Stream, has_sample, plan_epoch_ranges
from rayfin.training import TrialSpec
from rayfin.training.batches import plan_epochs
from rayfin.training.spec import TrialResult
from rayfin.training.trainer import TrialTrainer
from rayfin.training.trial_cache import TrialCache

ROWS, EPOCHS = 101, 3
STEPS = 21  # of 16 samples: six and a last one of five in each epoch


@pytest.fixture(params=["held", "streamed"])
def spec(request: pytest.FixtureRequest, lab: Any, tmp_path: Path) -> TrialSpec:
    """A trial of three epochs over 101 rows, in steps of 2 batches of 8."""
    rows = [{"prompt": f"say {'so ' * (n % 7)}{n}", "completion": f"{n}!"} for n in range(112)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: TrialSpec = lab.spec(
        settings={"lora_dropout": 0.0},
        data={"path": str(path), "streaming": request.param == "streamed"},
        max_steps=None,
        eval_steps=None,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,  # at which AdamW makes nothing of rounding
    )
    return found


def seen_by(trained: list[list[int]]) -> Counter[tuple[int, ...]]:
    """How often each sample was trained on; a sample without its answer fills a step up."""
    return Counter(tuple(ids) for ids in trained if len(ids) > 2)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_every_row_is_seen_three_times_by_one_worker_and_by_two(
    workers: int, spec: TrialSpec, lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[list[int]] = []
    steps: list[int] = []
    compute_loss = TrialTrainer.compute_loss

    def noted(self: TrialTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        trained.extend(ids[mask.bool()].tolist() for ids, mask in rows)
        steps.append(self.state.global_step)
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TrialTrainer, "compute_loss", noted)
    alone = lab.run(spec, warm=TrialCache())
    assert (alone.status, alone.error) == ("finished", None)
    seen = seen_by(trained)
    assert len(seen) == ROWS == alone.scenario["data"]["rows_train"]
    assert set(seen.values()) == {EPOCHS}
    assert Counter(steps) == dict.fromkeys(range(STEPS), 2)
    assert alone.metrics["steps"] == alone.max_steps == STEPS
    assert [p["step"] for p in alone.curve if "eval_loss" in p] == [6, 12, 18, 21]

    if workers == 1:
        return
    directory, notes = tmp_path / "two", tmp_path / "notes"
    directory.mkdir()
    notes.mkdir()
    job = {"spec": spec.model_dump_json(), "workers": 2, "directory": str(directory)}
    (pair,) = lab.in_groups([job | {"strategy": "ddp", "notes": str(notes)}])
    assert (pair["status"], pair["error"]) == ("finished", None)
    each = [json.loads(path.read_text()) for path in notes.iterdir()]
    assert len(each) == 2 and seen_by(each[0] + each[1]) == seen
    losses = [[p["loss"] for p in curve if "loss" in p] for curve in (alone.curve, pair["curve"])]
    assert len(losses[0]) == STEPS and losses[1] == lab.rounded(losses[0])


@pytest.mark.parametrize(
    "spec", ["held", pytest.param("streamed", marks=pytest.mark.long)], indirect=True
)
def test_a_trial_of_epochs_that_was_interrupted_ends_as_one_that_ran_through(
    spec: TrialSpec, lab: Any
) -> None:
    whole, directory = lab.run(spec, warm=TrialCache()), lab.directory()
    with pytest.raises(KeyboardInterrupt):  # the newest checkpoint is that of step 6
        lab.run(spec, warm=TrialCache(), directory=directory, report=later(12))
    resumed = lab.run(spec, warm=TrialCache(), directory=directory)
    assert (resumed.status, resumed.curve) == ("finished", whole.curve)
    assert resumed.metrics["eval_loss"] == whole.metrics["eval_loss"]


def later(step: int) -> Callable[[TrialResult], None]:
    def report(result: TrialResult) -> None:
        if result.metrics["steps"] == step:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize(("rows", "size"), [(101, 16), (96, 16), (5, 16), (1000, 3)])
def test_each_pass_has_every_sample_in_steps_of_its_own(
    rows: int, size: int, group_by_length: bool
) -> None:
    each = -(-rows // size)
    plan = plan_epochs(
        [n % 13 for n in range(rows)],
        batch_size=size,
        max_steps=3 * each,
        seed=7,
        group_by_length=group_by_length,
    )
    passes = [plan[n * each * size : (n + 1) * each * size] for n in range(3)]
    for one in passes:
        assert sorted(i for i in one if i is not None) == list(range(rows))
        steps = [one[n : n + size] for n in range(0, len(one), size)]
        assert sum(None in step for step in steps) == (rows % size > 0)
        assert all(any(i is not None for i in step) for step in steps)
    assert passes[0] != passes[1] or rows < size  # where a step has them all, in their order


@pytest.mark.parametrize("of", [1, 4, 7])
@pytest.mark.parametrize("counts", [(5, 0, 8, 3, 1), (2,), (40, 41)])
def test_streamed_passes_have_every_sample_whoever_reads_which_lanes(
    counts: tuple[int, ...], of: int
) -> None:
    ranges = tuple(FileRange("f.jsonl", n, n + 1) for n in range(len(counts)))
    stream = Stream((), ranges, counts, 0)
    rows, first_lanes = sum(counts), list(range(0, of, 2))
    each = -(-rows // of)
    groups = [first_lanes, [lane for lane in range(of) if lane not in first_lanes]]

    def read(first: int) -> dict[tuple[int, int], tuple[int, int, int]]:
        """What each step and lane gets: the pass, the range and the place in it."""
        found = {}
        for lanes in groups:
            for one in plan_epoch_ranges(
                stream, lanes=lanes, of=of, seed=3, first=first, last=2 * each
            ):
                for n in range(one.start, one.stop):
                    key = (one.step + n - one.start, one.lane)
                    assert key not in found
                    found[key] = (one.epoch, one.number, n)
        return found

    whole = read(0)
    assert len(set(whole.values())) == len(whole) == 2 * rows
    assert {(epoch, step // each) for (step, _), (epoch, _, _) in whole.items()} == {(0, 0), (1, 1)}
    places = {(step, lane) for step in range(2 * each) for lane in range(of)}
    assert {at for at in places if has_sample(rows, *at, of)} == whole.keys()
    for first in {0, 1, each, 2 * each - 1}:
        assert read(first) == {at: one for at, one in whole.items() if at[0] >= first}


def test_steps_are_those_of_transformers() -> None:
    assert [steps_of_epochs(e, 101, 16) for e in (0.01, 0.5, 1, 1.5, 3)] == [1, 4, 7, 11, 21]
    assert steps_of_epochs(0.1, 30, 1) == 3  # 0.1 * 30 is above 3 in floating point
    assert [steps_of_share(share, 30) for share in (0.1, 0.25, 0.001, 7)] == [3, 8, 1, 7]
    assert share_of_steps(steps_of_share(0.3, 10), 10) >= 0.1 * 3
    train = TrainConfig(eval_steps=0.2, save_steps=0.5, max_steps=50)
    assert (train.evaluate_every, train.save_every) == (10, 25)


@pytest.mark.parametrize("epochs", [1, 1.5, 2.25, 3])
@pytest.mark.parametrize("each", [1, 7, 40])
def test_the_epoch_shown_is_one_after_a_whole_pass(epochs: float, each: int) -> None:
    total = steps_of_epochs(epochs, each, 1)
    train = {"num_train_epochs": epochs, "max_steps": total}
    assert position(train, each) == f"epoch 1/{epochs:g}, step {each}/{total}"
    assert position(train, total) == f"epoch {epochs:g}/{epochs:g}, step {total}/{total}"


def test_a_section_of_epochs_keeps_its_steps_wherever_it_goes() -> None:
    import pickle

    written = TrainConfig(num_train_epochs=2, per_device_train_batch_size=10)
    counted = written.with_rows(95)
    assert (counted.max_steps, counted.evaluate_every) == (20, 5)
    assert "max_steps" not in counted.model_fields_set
    again = pickle.loads(pickle.dumps(counted))
    assert (again, again.max_steps) == (counted, 20)
    assert TrainConfig().with_rows(7) == TrainConfig()


def test_a_trial_counts_its_steps_on_the_samples_that_are_left(lab: Any, tmp_path: Path) -> None:
    """Of which max_length has cut the answers off, are no samples to learn from."""
    rows = [{"prompt": f"{n} " * (60 if n % 2 else 1), "completion": "so"} for n in range(40)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = lab.spec(
        data={"path": str(path), "max_length": 32},
        max_steps=None,
        eval_steps=None,
        num_train_epochs=1,
        per_device_train_batch_size=4,
    )
    result = lab.run(spec)
    assert result.status == "finished", result.error
    left = result.scenario["data"]["rows_train"]
    assert left < 30 and result.max_steps == result.metrics["steps"] == -(-left // 4)
    assert replace(result, curve=[]).as_dict()["max_steps"] == result.max_steps


def test_a_method_that_needs_more_steps_than_the_epochs_have_fails_with_the_remedy(
    lab: Any,
) -> None:
    spec = lab.spec(
        "adalora",
        max_steps=None,
        eval_steps=None,
        num_train_epochs=1,
        per_device_train_batch_size=20,
    )
    result = lab.run(spec)
    assert result.status == "failed"
    assert "use at least 4 steps" in result.error


def test_packed_rows_of_a_short_step_are_trained_too(lab: Any) -> None:
    spec = lab.spec(
        max_steps=None,
        eval_steps=None,
        num_train_epochs=1,
        per_device_train_batch_size=7,
        packing=True,
    )
    result = lab.run(spec)
    assert (result.status, result.metrics["steps"]) == ("finished", 6), result.error
    assert all(torch.isfinite(torch.tensor(p["loss"])) for p in result.curve if "loss" in p)
