"""What sweeps, the history and the data do for an objective other than supervised fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import rayfin
from rayfin.cli import main
from rayfin.config import Config, build_config, dump_yaml, load_config, parse_yaml
from rayfin.data import survey_corpus
from rayfin.data.stream import plan_sample_ranges
from rayfin.data.tokenization import tokenize_corpus
from rayfin.errors import ConfigError, DataError
from rayfin.hardware import describe_hardware
from rayfin.history import now
from rayfin.metrics import METRICS, Column, Score
from rayfin.metrics import register as register_metric
from rayfin.objectives import OBJECTIVES, SFT, objective_of, register
from rayfin.paths import Storage
from rayfin.samples import NO_LOSS, TokenizedSample
from rayfin.section import Section
from rayfin.training import TrialSpec, trial_cache
from rayfin.training.batches import PlannedSamples, batches_from_start
from rayfin.training.streams import _tokenize
from rayfin.training.trial_cache import TrialCache
from rayfin.tuning.plan import SweepPlan
from rayfin.tuning.space import SearchSpace
from rayfin.tuning.space_check import variants


class OwnSettings(Section):
    smoothing: float = 0.0
    """A setting of the loss."""
    form: str = "plain"
    """A setting of the data."""


class MoreIsBetter(type(SFT)):  # type: ignore[misc]
    """Supervised fine-tuning that is judged by a score of its own, of which more is better."""

    name = "other"
    title = "another objective"
    metrics = ("right_tokens",)
    settings_class = OwnSettings
    data_settings = ("form",)
    score_settings = ()

    def scores(self, table: torch.Tensor) -> dict[str, float]:
        return {"right_tokens": super().scores(table)["token_accuracy"]}

    def change(self, table: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
        return {}


@pytest.fixture
def other() -> Iterator[str]:
    register_metric(
        Score(
            name="right_tokens",
            label="Right tokens",
            kind="share",
            better="more",
            says="has {value} of the tokens of {on}",
            progress=Column("right", 4),
        )
    )
    register(MoreIsBetter)
    yield MoreIsBetter.name
    del OBJECTIVES[MoreIsBetter.name], METRICS["right_tokens"]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"say {n}", "completion": f"yes {n}"} for n in range(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name": "tiny"},
        "data": {"path": str(file), "max_length": 48},
        "method": {"type": "lora"},
        "train": {"stage": "other", "max_steps": 2},
        "scaling": {"use_gpu": False},
        "publish": {"name": "mine"},
        "storage": str(tmp_path / "runs"),
    }


def test_training_again_finds_the_trial_of_the_history(
    other: str, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    first = rayfin.train(settings, progress=False)
    assert (first.trial.status, "eval_loss" in first.trial.metrics) == ("finished", False)
    again = rayfin.train(settings)
    assert "already in the history" in capfd.readouterr().err
    assert again.trial == first.trial
    assert first.published is not None and again.published == first.published


def test_the_mode_of_a_sweep_is_checked_against_the_metric_of_the_objective(other: str) -> None:
    config = load_config({"sweep": {"mode": "max"}}, ["train.stage=other"])
    assert (config.sweep.metric, config.sweep.direction) == ("right_tokens", "max")
    with pytest.raises(
        ConfigError,
        match=r"^sweep: mode min would look for the worst right_tokens; set sweep.mode=max, or",
    ):
        load_config({"sweep": {"mode": "min"}}, ["train.stage=other"])
    with pytest.raises(ConfigError, match=r"^sweep: mode max would look for the worst eval_loss;"):
        load_config(None, ["sweep.mode=max"])


def test_a_metric_that_nobody_wrote_changes_with_the_objective(other: str) -> None:
    config = load_config(None, ["train.stage=other", "sweep.num_samples=3"])
    assert load_config(config, ["train.stage=sft"]).sweep.metric == "eval_loss"
    assert load_config(config).sweep.metric == "right_tokens"
    assert load_config(parse_yaml(dump_yaml(config), "saved")) == config
    written = build_config({"train": {"stage": "other"}, "sweep": {"metric": "right_tokens"}})
    assert load_config(written, ["train.learning_rate=1e-3"]).sweep.metric == "right_tokens"
    assert "metric: eval_loss" in dump_yaml(Config())


def test_a_corpus_read_for_one_objective_is_checked_for_another(
    other: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = build_config(settings | {"train": {}})
    monkeypatch.setattr(MoreIsBetter, "shapes", ("text",))
    plan, spec = SweepPlan("one", sft, Storage.open(str(tmp_path))), TrialSpec.of(sft)
    cache = TrialCache()
    cache.tokenized(spec)
    trained_on = plan.corpus(spec.data)
    assert cache.tokenized(spec).train and trained_on.train
    refused = TrialSpec.of(build_config(settings))
    for read in (
        lambda: cache.tokenized(refused),
        lambda: plan.corpus(spec.data, OBJECTIVES[other]()),
    ):
        with pytest.raises(DataError, match=r"prompt_completion, which train.stage=other can't"):
            read()


def test_tokens_and_base_scores_are_made_again_only_for_settings_that_matter(
    other: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(*arguments: Any) -> Any:
        made.append("tokens")
        return tokenize_corpus(*arguments)

    def score(*_: Any, **__: Any) -> torch.Tensor:
        made.append("scores")
        return torch.zeros(1)

    monkeypatch.setattr(trial_cache, "tokenize_corpus", counted)
    monkeypatch.setattr(trial_cache, "score", score)
    monkeypatch.setattr(trial_cache, "_MOST_KEPT", 2)
    cache, hardware = TrialCache(), describe_hardware(False)

    def trial(**own: Any) -> list[str]:
        made.clear()
        spec = TrialSpec.of(build_config(settings | {"train": {"stage": "other", **own}}))
        cache.base_scores(spec, objective_of(spec.train), hardware)
        cache.tokenized(spec)
        return sorted(made)

    assert trial() == ["scores", "tokens"]
    assert trial(smoothing=0.5) == trial(smoothing=0.1) == []
    assert trial(form="a") == trial(form="b") == ["scores", "tokens"]
    assert trial(form="b") == trial(form="a") == []
    assert trial() == ["scores", "tokens"]  # the two that were used last are kept


def test_preflight_tries_the_settings_of_the_objective(
    other: str, settings: dict[str, Any]
) -> None:
    axes = {"train.smoothing": [0.0, 0.5], "train.form": ["a", "b"], "train.seed": [1, 2, 3]}
    space = SearchSpace(build_config(settings | {"sweep": {"parameters": axes}}))
    tried = [
        (it.train.model_dump()["smoothing"], it.train.model_dump()["form"])
        for it in variants(space)
    ]
    assert sorted(tried) == [(0.0, "a"), (0.0, "b"), (0.5, "a"), (0.5, "b")]


def test_a_sweep_in_the_history_has_the_best_trial_of_its_objective(
    other: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trial = rayfin.train(settings, progress=False).trial
    with rayfin.open_history(settings["storage"]) as history:
        history.put(
            trial.updated(
                trial_id="worse", metrics=trial.metrics | {"right_tokens": -1.0, "eval_loss": 0.1}
            )
        )
        history.put(
            trial.updated(
                trial_id="of-sft",
                created_at=now(),
                spec=trial.spec | {"train": {}},
                metrics={"right_tokens": 2.0, "eval_loss": 0.1},
            )
        )
        (sweep,) = history.sweeps()
    assert (sweep.best_trial_id, sweep.best_metric) == (trial.trial_id, "right_tokens")
    assert main(["history", "list", "--sweeps", f"storage={settings['storage']}"]) == 0
    shown = capsys.readouterr().out
    assert "best score" in shown and f"right_tokens {sweep.best_value:.4f}" in shown


# --- from examples to batches -----------------------------------------------------------------


class WithWeights(type(SFT)):  # type: ignore[misc]
    """Supervised fine-tuning whose samples have a list more."""

    def encode(self, examples: Any, tokenize: Any) -> list[TokenizedSample]:
        samples: list[Any] = tokenize(examples)
        return [sample | {"weights": [1] * len(sample["input_ids"])} for sample in samples]

    def truncate(self, sample: TokenizedSample, max_length: int) -> TokenizedSample | None:
        cut = super().truncate(sample, max_length)
        return None if cut is None else cut | {"weights": sample["weights"][:max_length]}  # type: ignore


def test_streamed_samples_keep_the_lists_of_their_objective(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = [
        {"prompt": "say " * 200 if n % 2 else f"say {n}", "completion": "yes"} for n in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["train"] = {}
    settings["data"]["streaming"] = True
    spec = TrialSpec.of(build_config(settings))
    stream = survey_corpus(spec.data).stream
    assert stream is not None
    ranges = plan_sample_ranges(stream, lanes=[0], of=1, seed=0, first=0, last=20)
    table = _tokenize(
        pa.Table.from_pylist([asdict(each) for each in ranges]),
        replace(stream, ranges=(), rows=()),
        spec,
        WithWeights(),
        0,
        48,
    )
    samples = table.to_pylist()
    short = [sample for sample in samples if len(sample["input_ids"]) == 2]
    assert 0 < len(short) < len(samples)
    assert all(sample["weights"] == [1] * len(sample["input_ids"]) for sample in samples)
    assert all(sample["labels"] == [NO_LOSS] * 2 for sample in short)


def test_batches_of_samples_without_a_label_end_in_an_error() -> None:
    def batches(*labels: int) -> Iterator[Any]:
        samples: list[TokenizedSample] = [
            {"input_ids": [1, 2], "labels": [NO_LOSS, label]} for label in labels
        ]
        planned = PlannedSamples(
            samples, [*range(len(samples))], SFT.length, SFT.without_loss(samples[0])
        )
        return batches_from_start(planned, SFT, 0, labelled=3)

    few = batches(NO_LOSS, 5)
    assert next(few)["input_ids"].shape == next(few)["input_ids"].shape == (6, 2)
    with pytest.raises(DataError, match="no answer begins within it in the 2 samples that"):
        next(batches(NO_LOSS, NO_LOSS))


def test_a_row_with_a_pair_that_can_t_be_read_is_no_conversation(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    row = {"messages": said, "chosen": {"no": "text"}, "rejected": "b"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    settings["train"] = {}
    with pytest.raises(DataError, match=r"has preference pairs .chosen, rejected., which train.st"):
        TrialCache().corpus(TrialSpec.of(build_config(settings)))
    settings["data"]["format"] = "messages"
    with pytest.raises(
        DataError,
        match=r"chosen and rejected: rows of this format can't be preference pairs; "
        r"data.ignore_columns=.chosen,rejected. trains on the rest",
    ):
        TrialCache().corpus(TrialSpec.of(build_config(settings)))
