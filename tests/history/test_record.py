"""A record refuses a state that contradicts itself."""

from __future__ import annotations

import math
import pickle
from datetime import UTC, datetime, timedelta, timezone

import pytest
from pydantic import ValidationError

from rayfin.errors import HistoryError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {}}, "without a number for eval_loss"),
        ({"metrics": {"exact_match": 0.5}}, "without a number for eval_loss"),
        ({"metrics": {"eval_loss": None}}, "without a number for eval_loss"),
        ({"metrics": {"eval_loss": True}}, "without a number for eval_loss"),
        ({"metrics": {"eval_loss": math.nan}}, "metrics.eval_loss is nan"),
        ({"metrics": {"eval_loss": 1.0, "perplexity": math.inf}}, "metrics.perplexity is inf"),
        ({"curve": [{"step": 1}, {"loss": math.nan}]}, r"curve\[1\].loss is nan"),
        ({"spec": {"train": {"learning_rate": -math.inf}}}, "spec.train.learning_rate is -inf"),
        ({"spec": {"path": object()}}, "spec.path is a object"),
        ({"scenario": {"facts": {1: 2}}}, "scenario.facts has the key 1"),
        ({"error": "odd"}, "status is 'finished' with error 'odd'"),
        ({"status": "running", "error": "odd"}, "status is 'running' with error 'odd'"),
        ({"status": "failed"}, "'failed' without an error"),
        ({"status": "oom", "error": ""}, "'oom' without an error"),
        ({"scenario": {"source": "csv"}, "metrics": {"loss": 1}}, "or exact_match or"),
    ],
)
def test_a_contradiction_is_refused(record, changes, message):
    with pytest.raises(HistoryError, match=f"^trial 'trial-001': .*{message}") as caught:
        record(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "running", "metrics": {}},
        {"status": "stopped", "metrics": {}},
        {"status": "stopped", "error": "behind at step 15"},
        {"status": "failed", "error": "the loss is NaN", "metrics": {}},
        {"status": "oom", "error": "out of memory", "metrics": {}},
        {"scenario": {"source": "peft"}, "metrics": {"exact_match": 0.4}},
    ],
)
def test_every_status_has_its_place(record, changes):
    assert record(**changes).status == changes.get("status", "finished")


@pytest.mark.parametrize("trial_id", ["", "../up", "a b", "-x", "x" * 129, "a\nb"])
def test_an_id_can_name_a_directory(record, trial_id):
    with pytest.raises(ValidationError):
        record(trial_id=trial_id)


def test_records_do_not_change(record):
    with pytest.raises(ValidationError):
        record().status = "failed"
    with pytest.raises(ValidationError):
        record(loss=1.0)


def test_an_update_is_validated_and_dated(record):
    running = record(status="running", metrics={})
    finished = running.updated(status="finished", metrics={"eval_loss": 1.5})
    assert (finished.status, finished.created_at) == ("finished", running.created_at)
    assert finished.updated_at > running.updated_at
    with pytest.raises(HistoryError, match="without a number"):
        running.updated(status="finished")


def test_times_are_utc(record):
    there = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=8)))
    kept = record(created_at=there).created_at
    assert (kept, kept.tzinfo) == (there, UTC)
    with pytest.raises(ValidationError):
        record(created_at=datetime(2026, 1, 1))  # noqa: DTZ001


def test_a_malformed_mapping_is_one_line(record):
    with pytest.raises(
        HistoryError, match=r"trial 't' is not a trial record: sweep_id: .*"
    ) as caught:
        type(record()).parse({"trial_id": "t", "status": "lost"})
    assert "\n" not in str(caught.value)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), HistoryError)
