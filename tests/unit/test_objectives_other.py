"""What sweeps, the history and the data do for an objective other than supervised fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rayfin
from rayfin.config import Config, build_config, dump_yaml, load_config, parse_yaml
from rayfin.errors import ConfigError
from rayfin.metrics import METRICS, Column, Score
from rayfin.metrics import register as register_metric
from rayfin.objectives import OBJECTIVES, SFT, register


class MoreIsBetter(type(SFT)):  # type: ignore[misc]
    """Supervised fine-tuning that is judged by a score of its own, of which more is better."""

    name = "other"
    title = "another objective"
    metrics = ("right_tokens",)

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
