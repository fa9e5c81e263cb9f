"""Sweeps over how long trials train: their lengths, their resume, and which scores compare."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import rayfin
from rayfin.advisor.features import setting_row
from rayfin.config import Config, build_config, dump_yaml, load_config
from rayfin.config.load import parse_yaml
from rayfin.errors import ConfigError
from rayfin.evaluation.verdict import SweepOutcome, sweep_verdict
from rayfin.history import TrialRecord
from rayfin.history.comparable import comparable, comparison_groups
from rayfin.paths import Storage
from rayfin.tuning.comparison import comparison_notes
from rayfin.tuning.early_stopping import longest_trial
from rayfin.tuning.plan import find_resumable, new_plan
from rayfin.tuning.progress import ProgressDisplay, trials_table
from rayfin.tuning.rows import started
from rayfin.tuning.space_check import check_space
from rayfin.tuning.sweep import best_trial


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of 36 training and 4 held-out rows; the answers of some end beyond 40 tokens."""
    rows = [{"prompt": f"say {n}", "completion": f"{n} " * (1 + n % 30)} for n in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_config(
        {
            "model": {"name": "tiny"},
            "data": {"path": str(data), "max_length": 64},
            "method": {"type": "lora", "r": 2},
            "train": {"per_device_train_batch_size": 8, "learning_rate": 1e-2},
            "scaling": {"use_gpu": False},
            "sweep": {"num_samples": 5, "search": "grid", "report_samples": 0},
            "storage": str(tmp_path / "runs"),
        }
    )


def swept(config: Config, parameters: dict[str, Any], **sweep: Any) -> Config:
    return build_config(
        config.model_dump(mode="json", exclude_unset=True),
        {"sweep.parameters": parameters} | {f"sweep.{k}": v for k, v in sweep.items()},
    )


def test_a_sweep_over_lengths_runs_resumes_and_compares_what_is_comparable(
    config: Config, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {
        "train.num_train_epochs": [1, 2],
        "method.type": ["lora", "ia3"],
        "data.max_length": [40, 128],
    }
    config = swept(config, axes)
    update, ended = ProgressDisplay.update, list[str]()

    def interrupt(self: ProgressDisplay, row: TrialRecord) -> None:
        update(self, row)
        ended.append(row.status)
        if ended.count("finished") == 2 and row.status == "running" and row.metrics:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rayfin.sweep(config, progress=False)
    result = rayfin.sweep(swept(config, axes, num_samples=8), resume=True, progress=False)
    rows = result.trials
    assert [row.status for row in rows] == ["finished"] * 8
    assert sum(row.sweep_id == rows[0].sweep_id for row in rows) == 8
    for row in rows:
        train = row.spec["train"]
        each = -(-row.scenario["data"]["rows_train"] // 8)
        assert train["max_steps"] == row.metrics["steps"] == train["num_train_epochs"] * each
    lengths = (row.spec["data"]["max_length"] for row in rows)
    groups = set(zip(lengths, comparison_groups(rows, "eval_loss"), strict=True))
    assert len(groups) == len(set(comparison_groups(rows, "eval_loss"))) == 2
    assert result.best is not None and result.best.spec["data"]["max_length"] == 128
    uncut = [row for row in rows if row.spec["data"]["max_length"] == 128]
    assert result.best.metrics["eval_loss"] == min(row.metrics["eval_loss"] for row in uncut)
    cut = [n for n, row in enumerate(rows, 1) if row.spec["data"]["max_length"] == 40]
    (note,) = [note for note in result.notes if "other held-out tokens" in note]
    assert note.startswith(
        f"trials {cut[0]}, {cut[1]}, {cut[2]} and {cut[3]} with data.max_length=40"
    )
    assert note in Path(result.report).read_text("utf-8")
    assert result.verdict.caution is not None and "among 4 trials" in result.verdict.caution
    console = Console(width=120, file=io.StringIO())
    console.print(trials_table(config, rows))
    assert re.search(r"#.* epoch +step ", (shown := console.file.getvalue())), shown
    assert re.search(r"finished.* 2/2 +10/10 ", shown), shown


def test_trials_of_any_length_compare_where_nothing_is_cut(
    config: Config, without_ray: None
) -> None:
    axes = {"train.num_train_epochs": [0.5, 1], "data.max_length": [128, 200]}
    result = rayfin.sweep(swept(config, axes, num_samples=4), progress=False)
    assert len(set(comparison_groups(result.trials, "eval_loss"))) == 1
    assert not [note for note in result.notes if "other held-out tokens" in note]
    assert len(comparable(result.trials, "eval_loss")) == 4


def test_the_best_is_chosen_among_all_where_rows_do_not_tell(config: Config) -> None:
    """They are of an earlier version."""
    plan = new_plan(swept(config, {"data.max_length": [40, 64]}), Storage.at(config.storage))
    rows = [
        started(plan.trial({"data.max_length": length})).updated(
            status="finished", metrics={"eval_loss": loss}
        )
        for length, loss in ((40, 1.0), (64, 2.0))
    ]
    assert best_trial(rows, "eval_loss", "min") == rows[0]


@pytest.mark.parametrize("old", [{"max_length": 40}, {"max_length": 64}, {"val_size": 0.2}])
def test_rows_of_an_earlier_version_compare_with_those_of_their_own_settings(
    config: Config, old: dict[str, Any]
) -> None:
    """They have no digest; of settings that no other row has, they are taken for the most."""
    axes = {"data.max_length": [40, 64], "data.val_size": [0.1, 0.2], "method.r": [2, 4, 8]}
    plan = new_plan(swept(config, axes), Storage.at(config.storage))

    def row(r: int, loss: float, digest: str | None, **data: Any) -> TrialRecord:
        values = {f"data.{n}": v for n, v in ({"max_length": 64, "val_size": 0.1} | data).items()}
        return started(plan.trial(values | {"method.r": r})).updated(
            status="finished",
            metrics={"eval_loss": loss},
            scenario={"data": {} if digest is None else {"eval_digest": digest}},
        )

    # As the version before wrote it: without the settings that have come since, at their defaults.
    earlier = row(2, 0.5, None, **old)
    data = {k: v for k, v in earlier.spec["data"].items() if k not in ("truncation", "system")}
    earlier = earlier.updated(spec=earlier.spec | {"data": data})
    rows = [earlier, row(4, 1.0, "a"), row(8, 2.0, "a"), row(4, 0.1, "b", max_length=40)]
    other = old == {"max_length": 40}
    expected = {False: [earlier, *rows[1:3]], True: rows[:1] + rows[3:]}[other]
    keys = comparison_groups(rows, "eval_loss")
    assert [r for r, key in zip(rows, keys, strict=True) if key == keys[0]] == expected
    assert best_trial(rows, "eval_loss", "min") == rows[1 if other else 0]
    (note,) = comparison_notes(plan.space, rows)
    assert note.startswith("trials 1 and 4 with" if other else "trial 4 with")
    verdict = sweep_verdict(SweepOutcome(rows, plan.config, best_trial(rows, "eval_loss", "min")))
    assert f"{2 if other else 3} " in verdict.sentence, verdict.sentence


def test_steps_follow_from_each_trial_s_epochs_samples_and_batch(config: Config) -> None:
    axes = {
        "train.num_train_epochs": [1, 2.5],
        "train.per_device_train_batch_size": [4, 8],
        "data.max_samples": [None, 20],
    }
    plan = new_plan(swept(config, axes), Storage.at(config.storage))
    steps = {}
    for values in plan.space.grid():
        spec = plan.trial(values).spec.model_dump(mode="json")
        steps[tuple(values.values())] = spec["train"]["max_steps"]
        (row,) = [setting_row(spec)]
        assert row is not None and 2 ** row["steps"] == pytest.approx(steps[tuple(values.values())])
    assert steps[1, 4, None] == 9 and steps[2.5, 4, None] == 23 and steps[2.5, 8, None] == 13
    assert steps[1, 4, 20] == 5 and steps[2.5, 8, 20] == 8  # 18 rows to train on
    assert longest_trial(plan) == 23
    row = started(plan.trial({"train.num_train_epochs": 2.5, "data.max_samples": 20}))
    again = plan.trial(plan.space.values_in(row.spec))
    assert again.fingerprint == row.fingerprint and again.spec.train.max_steps == 8


@pytest.mark.parametrize(
    ("axis", "choices"),
    [
        ("data.val_size", [0.5, 0.1]),
        ("data.sources", [[{"path": "{half}"}], [{"path": "{half}"}, {"path": "{other}"}]]),
        ("data.max_length", [40, 64]),
    ],
    ids=["val_size", "sources", "max_length"],
)
def test_the_longest_trial_is_that_of_the_most_rows(
    config: Config, axis: str, choices: list[Any]
) -> None:
    """ASHA ends what has come to the steps of the longest, and leaves it without an adapter."""
    written = config.model_dump(mode="json", exclude_unset=True)
    lines = Path(written["data"]["path"]).read_text().splitlines(keepends=True)
    halves = {"half": lines[:20], "other": lines[20:]}
    for name, own in halves.items():
        Path(written["data"]["path"]).with_name(f"{name}.jsonl").write_text("".join(own))
    if axis == "data.sources":
        folder = Path(written["data"].pop("path")).parent
        choices = [
            [
                {"path": one["path"].format(**{n: folder / f"{n}.jsonl" for n in halves})}
                for one in c
            ]
            for c in choices
        ]
    config = swept(build_config(written, {"train.num_train_epochs": 1}), {axis: choices})
    plan = new_plan(config, Storage.at(config.storage))
    steps = [plan.trial(values).spec.train.max_steps for values in plan.space.grid()]
    assert longest_trial(plan) == max(steps)
    assert (len(set(steps)) == 1) == (axis == "data.max_length")


@pytest.mark.parametrize("axis", ["method.r", "train.num_train_epochs"])
def test_a_saved_configuration_of_epochs_is_the_same_when_it_is_read(
    config: Config, axis: str
) -> None:
    written = config.model_dump(mode="json", exclude_unset=True)
    epochs = {"train.num_train_epochs": 2} if axis == "method.r" else {}
    config = swept(build_config(written, epochs), {axis: [2, 4]})
    plan = new_plan(config, Storage.at(config.storage))
    plan.save()
    again = load_config(parse_yaml(dump_yaml(config), "config.yaml"))
    assert again.train.num_train_epochs == epochs.get("train.num_train_epochs")
    assert "max_steps" not in again.train.model_fields_set
    check_space(new_plan(again, plan.storage).space)
    found = find_resumable(config, plan.storage)
    assert found is not None and found.sweep_id == plan.sweep_id


@pytest.mark.parametrize("axis", ["train.num_train_epochs", "train.max_steps"])
def test_an_axis_beside_the_other_length_is_refused(config: Config, axis: str) -> None:
    other = {"train.num_train_epochs": "max_steps", "train.max_steps": "num_train_epochs"}[axis]
    written = config.model_dump(mode="json", exclude_unset=True)
    config = swept(build_config(written, {f"train.{other}": 3}), {axis: [2, 4]})
    with pytest.raises(ConfigError, match=rf"sweep\.parameters\.{axis}.*both say how long"):
        check_space(new_plan(config, Storage.at(config.storage)).space)


def test_an_estimate_counts_the_steps_of_the_epochs(config: Config) -> None:
    written = config.model_dump(mode="json", exclude_unset=True)
    found = [
        rayfin.estimate(build_config(written, {f"train.{name}": value}), progress=False)
        for name, value in (("num_train_epochs", 4), ("max_steps", 20), ("max_steps", 40))
    ]
    assert [one.steps for one in found] == [20, 20, 40]
    assert found[0].seconds == found[1].seconds != found[2].seconds


def test_too_few_steps_for_a_method_are_refused_before_anything_starts(config: Config) -> None:
    config = build_config(config.model_dump(mode="json", exclude_unset=True) | {"method": {}})
    config = swept(config, {"train.num_train_epochs": [0.5, 9], "method.type": ["adalora"]})
    with pytest.raises(rayfin.errors.MethodError, match="use at least 4 steps"):
        rayfin.sweep(config, progress=False)
