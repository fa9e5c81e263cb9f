"""What serving measures goes back to the trial that made the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.errors import HistoryError
from rayfin.history import History, TrialRecord, now
from rayfin.serving.api.history_metrics import (
    ADAPTER_BYTES,
    FIRST_TOKEN,
    REQUESTS,
    TOKENS,
    TOKENS_PER_SECOND,
    HistoryMetrics,
    ServingTotals,
)
from rayfin.serving.api.request_log import RequestRecord
from rayfin.serving.engine.request import AdapterSource


def trial(trial_id: str) -> TrialRecord:
    times = {"created_at": now(), "updated_at": now()}
    facts = {"sweep_id": "s", "fingerprint": "f", "metrics": {"eval_loss": 1.5}, **times}
    return TrialRecord.parse({"trial_id": trial_id, "status": "finished", **facts})


class Resident:
    """All that figures ask of an engine."""

    def resident(self) -> dict[str, int]:
        return {"a@1": 100}


def record(trial_id: str | None = "t", status: int = 200, ref: str = "a@1") -> RequestRecord:
    """A request that took 0.5 s to its first token and 2 s for the 8 tokens after it."""
    return RequestRecord(
        "/v1/completions",
        started=10.0,
        first_token=10.5,
        last_token=12.5,
        completion_tokens=9,
        choices=1,
        answered_by=ref,
        trial_id=trial_id,
        status=status,
    )


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'history.sqlite'}"
    with History.open(url) as history:
        history.put(trial("t"))
    return url


@pytest.fixture
def figures(url: str) -> Iterator[HistoryMetrics]:
    figures = HistoryMetrics(url, Resident(), period=3600)  # type: ignore[arg-type]
    yield figures
    figures.close()


def metrics(url: str, trial_id: str = "t") -> dict[str, Any]:
    with History.open(url) as history:
        return dict(history.get(trial_id).metrics)


def test_figures_are_added_to_those_of_before_and_of_others(
    url: str, figures: HistoryMetrics
) -> None:
    figures.count(record())
    figures.write()
    assert metrics(url) == {
        "eval_loss": 1.5,
        REQUESTS: 1,
        FIRST_TOKEN: 0.5,
        TOKENS: 8,
        TOKENS_PER_SECOND: 4.0,
        ADAPTER_BYTES: 100,
    }
    other = HistoryMetrics(url, Resident(), period=3600)  # type: ignore[arg-type]
    slow = record()
    slow.first_token = 12.5
    slow.last_token = 28.5
    other.count(slow)
    other.close()
    merged = metrics(url)
    assert merged[REQUESTS] == 2
    assert merged[FIRST_TOKEN] == pytest.approx((0.5 + 2.5) / 2)
    assert merged[TOKENS_PER_SECOND] == pytest.approx(16 / (2 + 16))
    assert (merged["eval_loss"], merged[ADAPTER_BYTES]) == (1.5, 100)


def test_only_whole_answers_of_trials_count(url: str, figures: HistoryMetrics) -> None:
    figures.count(record(None))
    figures.count(record(status=499))
    figures.count(record("unknown"))
    empty = record()
    empty.first_token = None
    figures.count(empty)
    figures.write()
    assert metrics(url) == {"eval_loss": 1.5}


def test_nothing_is_lost_while_the_history_is_away(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'later.sqlite'}"
    figures = HistoryMetrics(url, Resident(), period=3600)  # type: ignore[arg-type]
    figures.count(record())
    figures.write()
    assert not (tmp_path / "later.sqlite").exists()
    with History.open(url) as history:
        history.put(trial("t"))
    figures.count(record())
    figures.close()
    assert metrics(url)[REQUESTS] == 2


def test_what_others_wrote_into_the_metrics_is_no_reason_to_fail() -> None:
    assert ServingTotals.of({REQUESTS: "many", FIRST_TOKEN: 1.0}) == ServingTotals()
    assert ServingTotals.of({REQUESTS: 2}) == ServingTotals()
    assert ServingTotals.of({}) == ServingTotals()


def test_served_requests_reach_the_history(
    tools: Any, engine: Any, url: str, tmp_path: Path, tiny_adapters: dict[str, AdapterSource]
) -> None:
    registry = Registry(tmp_path / "adapters")
    registry.publish("ours", tiny_adapters["lora"].path, {"trial_id": "t"})
    registry.publish("theirs", tiny_adapters["ia3"].path)
    figures = HistoryMetrics(url, engine, period=3600)
    with tools.serving(engine, registry, tools.ApiConfig(), figures) as server:
        for _ in range(3):
            assert server.complete(model="ours", max_tokens=6, ignore_eos=True).status_code == 200
        assert server.complete(model="theirs").status_code == 200
        assert server.complete(model=tools.BASE).status_code == 200
        assert server.complete(model="unknown").status_code == 404
    # Closed with the app.
    found = metrics(url)
    assert (found[REQUESTS], found[TOKENS]) == (3, 15)
    assert found[FIRST_TOKEN] > 0 and found[TOKENS_PER_SECOND] > 0
    assert found[ADAPTER_BYTES] == engine.resident()["ours@1"] > 0


def test_serving_figures_are_no_part_of_what_a_trial_measured(
    url: str, figures: HistoryMetrics
) -> None:
    figures.count(record())
    figures.write()
    with History.open(url) as history:
        assert history.get("t").trained_metrics == {"eval_loss": 1.5}


def test_updates_of_metrics_lose_none_of_each_other(url: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def add(_: int) -> bool:
        with History.open(url) as history:
            return history.update_metrics("t", lambda m: {"count": m.get("count", 0) + 1})

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(add, range(40)))
    assert metrics(url) == {"eval_loss": 1.5, "count": 40}
    with History.open(url) as history:
        assert not history.update_metrics("unknown", lambda _: {"x": 1})


def test_a_row_that_cannot_be_read_holds_up_no_other(
    url: str, figures: HistoryMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    with History.open(url) as history:
        history.put(trial("unreadable"))
    update = History.update_metrics

    def fails(self: History, trial_id: str, change: Any) -> bool:
        if trial_id == "unreadable":
            raise HistoryError("a row can't be read")
        return update(self, trial_id, change)

    monkeypatch.setattr(History, "update_metrics", fails)
    figures.count(record("unreadable"))
    figures.count(record("t"))
    figures.write()
    assert metrics(url)[REQUESTS] == 1
    monkeypatch.undo()
    figures.write()
    assert metrics(url, "unreadable")[REQUESTS] == 1 and metrics(url)[REQUESTS] == 1
