"""What the advisor learned is kept, noticed to be old, and done without where it can't be kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayfin.advisor import knowledge as module
from rayfin.advisor.knowledge import Knowledge, knowledge_of
from rayfin.errors import HistoryError
from rayfin.history import SERVING, History, TrialRecord

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
COUNT = 12


def trial(number: int, **changes: Any) -> TrialRecord:
    at = AT + timedelta(minutes=number)
    rate = 1e-4 * 2 ** (number % 6)
    values: dict[str, Any] = {
        "trial_id": f"t{number}",
        "sweep_id": "s",
        "fingerprint": f"f{number}",
        "status": "finished",
        "created_at": at,
        "updated_at": at,
        "spec": {
            "model": {"name": "tiny"},
            "data": {"path": "pydocs"},
            "method": {"type": "lora", "r": 2 + number},
            "train": {"learning_rate": rate, "max_steps": 60},
        },
        "scenario": {
            "model": {"name": "tiny", "identity": "tiny@1", "parameters": 90_688},
            "data": {"digest": "d"},
            "hardware": {"device": "cpu", "device_name": "x"},
        },
        "metrics": {"eval_loss": 3.0 + abs(number % 6 - 3), "steps": 60, "train_seconds": 2.0},
    }
    return TrialRecord(**(values | changes))


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.open(f"sqlite:///{tmp_path / 'history.sqlite'}") as opened:
        opened.merge(trial(n) for n in range(COUNT))
        yield opened


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of trials that a table was made of: one a time that a history is read whole."""
    times: list[int] = []
    ordered = module._in_order

    def counted(records: Any) -> Any:
        times.append(len(records))
        return ordered(records)

    monkeypatch.setattr(module, "_in_order", counted)
    monkeypatch.setattr(module, "_reference", lambda: b"")
    return times


def equal(one: Knowledge, other: Knowledge) -> bool:
    groups, others = one.quality_model.groups, other.quality_model.groups
    return (
        dict(one.quality_model.parameters.values) == dict(other.quality_model.parameters.values)
        and list(one.ids) == list(other.ids)
        and groups.keys() == others.keys()
        and all(
            np.array_equal(groups[key].rows, others[key].rows, equal_nan=True)
            and np.array_equal(groups[key].regrets, others[key].regrets)
            for key in groups
        )
        and list(one.measured) == list(other.measured)
        and list(one.served) == list(other.served)
        and (one.trials, one.reference) == (other.trials, other.reference)
    )


def files(cache: Path) -> list[Path]:
    return sorted((cache / "advisor").rglob("*.*"))


def test_what_was_learned_is_read_back(history: History, cache: Path, readings: list[int]) -> None:
    first = knowledge_of(history, cache=cache)
    assert first.trials == COUNT and len(first.ids) == COUNT
    assert readings == [COUNT]
    assert [path.name[:5] for path in files(cache)] == ["learn", "table"]
    assert equal(knowledge_of(history, cache=cache), first)
    assert readings == [COUNT]
    assert first.look_up("t3") == history.get("t3")
    assert first.look_up("gone") is None


def test_new_trials_are_seen_at_once_and_change_no_scale(history: History, cache: Path) -> None:
    before = knowledge_of(history, cache=cache)
    for number in range(COUNT, COUNT + 6):
        history.put(trial(number))
    many = knowledge_of(history, cache=cache)
    assert (many.trials, len(many.ids)) == (COUNT + 6, COUNT + 6)
    assert many.quality_model.parameters == before.quality_model.parameters


def test_what_serving_measures_is_seen_and_no_reason_to_read_the_trials_again(
    history: History, cache: Path, readings: list[int]
) -> None:
    before = knowledge_of(history, cache=cache)
    assert before.served == []
    name = f"{SERVING}time_to_first_token_seconds"
    for seconds in (0.5, 0.25, 0.125):
        history.update_metrics("t1", lambda _: {name: seconds})  # noqa: B023
        after = knowledge_of(history, cache=cache)
        assert [one.seconds for one in after.served] == [seconds]
        assert equal(knowledge_of(history, cache=cache), after)
    assert len(readings) == 2  # once more for the trial that was not served before
    history.update_metrics("t1", lambda _: {"eval_loss": 9.0})
    changed = knowledge_of(history, cache=cache)
    assert len(readings) == 3
    assert not equal(changed, after)


def test_the_order_in_which_trials_came_does_not_matter(tmp_path: Path, cache: Path) -> None:
    found = []
    for name, numbers in (("one", range(COUNT)), ("other", reversed(range(COUNT)))):
        with History.open(f"sqlite:///{tmp_path / name}.sqlite") as opened:
            for number in numbers:
                opened.put(trial(number, created_at=AT, updated_at=AT))
                if number % 5 == 0:
                    knowledge_of(opened, cache=cache)
            found.append(knowledge_of(opened, cache=cache))
    assert equal(*found)


def test_histories_are_kept_apart(history: History, cache: Path, tmp_path: Path) -> None:
    knowledge_of(history, cache=cache)
    with History.open(f"sqlite:///{tmp_path / 'other.sqlite'}") as other:
        other.merge(trial(n) for n in range(3))
        assert knowledge_of(other, cache=cache).trials == 3
    assert knowledge_of(history, cache=cache).trials == COUNT
    assert len(files(cache)) == 4


def test_an_empty_history_is_known_to_be(tmp_path: Path, cache: Path) -> None:
    with History.open(f"sqlite:///{tmp_path / 'empty.sqlite'}") as empty:
        for _ in range(2):
            found = knowledge_of(empty, cache=cache)
            assert (found.trials, list(found.ids), dict(found.quality_model.groups)) == (0, [], {})


def broken(text: str) -> list[bytes]:
    """What may lie where `learned.json` does."""
    notes = json.loads(text)
    return [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        text.encode()[: len(text) // 2],
        *(
            json.dumps(changed).encode()
            for changed in (
                {name: notes[name] for name in notes if name != "measured"},
                notes | {"mark": [0, ""]},
                notes | {"mark": "never"},
                notes | {"mark": [None, *notes["mark"][1:]]},
                notes | {"columns": []},
                notes | {"measured": [{"trial_id": 3}]},
            )
        ),
    ]


def test_a_broken_cache_is_made_anew(history: History, cache: Path, readings: list[int]) -> None:
    first = knowledge_of(history, cache=cache)
    notes, table = files(cache)
    good = notes.read_text()
    for content in broken(good):
        notes.write_bytes(content)
        assert equal(knowledge_of(history, cache=cache), first)
        before = len(readings)
        assert equal(knowledge_of(history, cache=cache), first)
        assert len(readings) == before, content
    whole = table.read_bytes()
    for content in (b"", whole[:100], b"{}"):
        table.write_bytes(content)
        assert equal(knowledge_of(history, cache=cache), first)
        assert table.stat().st_size == len(whole)
    table.unlink()
    assert equal(knowledge_of(history, cache=cache), first)


def test_a_cache_that_can_not_be_written_is_done_without(
    history: History, cache: Path, readings: list[int]
) -> None:
    cache.write_text("not a directory")
    for _ in range(2):
        found = knowledge_of(history, cache=cache)
        assert found.trials == COUNT and len(found.quality_model.groups) == 1
    assert readings == [COUNT, COUNT]


def test_a_disk_that_is_full_leaves_the_kept_knowledge_whole(
    history: History, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowledge_of(history, cache=cache)
    before = [path.read_bytes() for path in files(cache)]
    history.put(trial(COUNT))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", full)
        assert knowledge_of(history, cache=cache).trials == COUNT + 1
    assert [path.read_bytes() for path in files(cache)] == before
    assert knowledge_of(history, cache=cache).trials == COUNT + 1


def test_another_process_that_writes_meanwhile_is_no_harm(history: History, cache: Path) -> None:
    """Its notes are still to come, or its table was taken away by one with other notes."""
    first = knowledge_of(history, cache=cache)
    notes, old_table = files(cache)
    old_notes, old_rows = notes.read_bytes(), old_table.read_bytes()
    history.put(trial(COUNT))
    newer = knowledge_of(history, cache=cache)
    _, table = files(cache)
    new_notes, rows = notes.read_bytes(), table.read_bytes()
    assert table != old_table, "the table of another state was written over"
    for left, right in ((old_notes, {table: rows}), (new_notes, {old_table: old_rows})):
        for path in (table, old_table):
            path.unlink(missing_ok=True)
        notes.write_bytes(left)
        for path, content in right.items():
            path.write_bytes(content)
        assert list(knowledge_of(history, cache=cache).ids) == list(newer.ids)
        assert files(cache) == [notes, table]
    assert len(first.ids) == COUNT


def test_a_history_that_was_begun_anew_is_learned_anew(
    tmp_path: Path, cache: Path, readings: list[int]
) -> None:
    """Under the same name, and with as many trials: what the old one taught is not kept."""
    url = f"sqlite:///{tmp_path / 'anew.sqlite'}"
    for start in (0, 100):
        (tmp_path / "anew.sqlite").unlink(missing_ok=True)
        with History.open(url) as opened:
            opened.merge(trial(n) for n in range(start, start + COUNT))
            assert knowledge_of(opened, cache=cache).trials == COUNT
    assert readings == [COUNT, COUNT]


def test_what_is_merged_is_seen_though_it_is_old(history: History, cache: Path) -> None:
    """Neither the count nor the newest change tells that an older row was brought up to date."""
    old = knowledge_of(history, cache=cache)
    changed = trial(3, updated_at=trial(5).updated_at, metrics={"eval_loss": 9.0, "steps": 60})
    assert history.merge([changed]).replaced == 1
    new = knowledge_of(history, cache=cache)
    (before,), (after,) = old.quality_model.groups.values(), new.quality_model.groups.values()
    assert not np.array_equal(before.regrets, after.regrets)


WRITER = """
import sys
from pathlib import Path
from rayfin.history import History
from rayfin.advisor import knowledge
knowledge._reference = lambda: b""
with History.open(sys.argv[1], create=False) as history:
    for _ in range(5):
        cached = knowledge._CachedKnowledge(Path(sys.argv[2]))
        found = cached.renew(history, [*history.mark(), "", 0, 0, 0], [])
        print(len(found.ids))
"""


def test_processes_may_write_at_the_same_time(
    history: History, cache: Path, popen: Callable[..., subprocess.Popen[str]]
) -> None:
    knowledge_of(history, cache=cache)
    folder = files(cache)[0].parent
    command = [sys.executable, "-c", WRITER, history.shown_url, str(folder)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    writers = [popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        assert knowledge_of(history, cache=cache).trials == COUNT
    for writer in writers:
        out, _ = writer.communicate()
        assert writer.returncode == 0
        assert len(set(out.split())) == 1
    assert knowledge_of(history, cache=cache).trials == COUNT
    assert {path.name[:6] for path in folder.iterdir()} == {"learne", "table-"}


def test_another_version_learns_anew(
    history: History, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    knowledge_of(history, cache=cache)
    shipped = trial(99, scenario=trial(99).scenario | {"reference": True})
    line = json.dumps(shipped.model_dump(mode="json")).encode()
    monkeypatch.setattr(module, "_reference", lambda: gzip.compress(line, mtime=0))
    found = knowledge_of(history, cache=cache)
    assert (found.trials, found.reference, len(found.ids)) == (COUNT, 1, COUNT + 1)
    basis = found.supporting_trial(list(found.ids).index("t99"), 0.25, 0.5)
    assert basis.reference is True
    monkeypatch.setattr(module, "__version__", "9.9.9")
    before = files(cache)[0].read_bytes()
    knowledge_of(history, cache=cache)
    assert files(cache)[0].read_bytes() != before


def test_what_was_kept_by_other_rules_is_not_gone_on_with(
    history: History, cache: Path, readings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the same trials teach has changed: the kept state is not used."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_FORMAT", module._FORMAT - 1)
        knowledge_of(history, cache=cache)
    knowledge_of(history, cache=cache)
    assert readings == [COUNT, COUNT]


def test_a_history_that_can_not_be_read_is_an_error(tmp_path: Path, cache: Path) -> None:
    with History.open(f"sqlite:///{tmp_path / 'gone.sqlite'}") as history:
        history.put(trial(1))
    (tmp_path / "gone.sqlite").write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    with pytest.raises(HistoryError):
        knowledge_of(history, cache=cache)


# --- what a trial was, for people ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "summary"),
    [
        ({}, "lora learning_rate=0.0002 r=3, tiny on pydocs: eval_loss 5"),
        (
            {"status": "failed", "error": "diverged", "metrics": {}},
            "lora learning_rate=0.0002 r=3, tiny on pydocs: diverged",
        ),
        ({"spec": {}}, "a trial, a model on s: eval_loss 5"),
        (
            {"spec": {name: [1] for name in ("model", "data", "method", "train")}},
            "a trial, a model on s: eval_loss 5",
        ),
        (
            {"spec": {"method": {"type": "p_tuning", "num_virtual_tokens": 4}, "train": "fast"}},
            "p_tuning num_virtual_tokens=4, a model on s: eval_loss 5",
        ),
        (
            {
                "metrics": {"eval_loss": "low", "perplexity": 3.25},
                "scenario": {"source": "csv"},
                "spec": {"model": {"name": "/models/m"}, "data": {"path": "/data/d.jsonl"}},
            },
            "a trial, m on d.jsonl: perplexity 3.25",
        ),
    ],
)
def test_a_trial_is_summed_up_whatever_it_holds(changes: dict[str, Any], summary: str) -> None:
    record = trial(1, **changes)
    assert module._summary(record) == summary


def test_only_some_trials_of_a_kind_are_kept_for_the_estimates() -> None:
    rows = [trial(n) for n in range(40)]
    strange: list[Any] = [None, [], "x", 3]
    for n, value in enumerate(strange):
        scenario = {"model": value, "hardware": value}
        rows.append(trial(100 + n, scenario=scenario, spec={"method": value}))
    rows.append(trial(200, scenario=trial(1).scenario | {"source": "csv"}))
    kept = module._informative(rows)
    assert [row.trial_id for row in kept] == [f"t{n}" for n in range(39, 27, -1)]


def test_before_a_history_is_begun_the_reference_is_read_once(
    cache: Path, readings: list[int]
) -> None:
    first, again = (module.knowledge_of(None, cache=cache) for _ in range(2))
    assert len(readings) == 1
    assert equal(first, again)
    assert first.trials == again.trials == 0
