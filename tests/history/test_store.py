"""What every history does, on every database."""

from __future__ import annotations

import pytest

from rayfin.errors import HistoryError
from rayfin.history import History


def test_what_goes_in_comes_out(history, url, record):
    nasty = {
        "text": "中文 🐟 \x00 'quoted' \"%s\" \\ :name",
        "numbers": [0.1, 1e16, 1e-300, -0.0, 2**70, 5e-324, 1, True, None],
        "empty": [{}, [], ""],
    }
    kept = record(spec=nasty, metrics={"eval_loss": 1e22, "extra": nasty}, curve=[nasty])
    history.put(kept)
    with History.open(url) as again:
        found = again.get("trial-001")
    assert found == kept
    assert repr(found) == repr(kept)  # 1e16 is still a float, 1 is still whole


def test_any_text_of_a_crash_can_be_kept(history, record):
    history.put(record(status="failed", error="bytes \x00 and \udcff", spec={"path": "\udcff"}))
    found = history.get("trial-001")
    assert (found.error, found.spec["path"]) == ("bytes � and ?", "?")


def test_put_replaces_by_id(history, record):
    running = record(status="running", metrics={}, curve=[])
    history.put(running)
    history.put(running.updated(status="failed", error="out of luck"))
    assert [trial.status for trial in history.trials()] == ["failed"]
    assert history.get("trial-001").error == "out of luck"


def test_trials_are_filtered_and_ordered(history, record):
    failed = {"status": "failed", "error": "no"}
    for trial in (record(3), record(1), record(2, **failed), record(4, sweep_id="sweep-b")):
        history.put(trial)

    def ids(**query):
        return [trial.trial_id[-1] for trial in history.trials(**query)]

    assert ids() == ["1", "2", "3", "4"]
    assert ids(newest_first=True, limit=2) == ["4", "3"]
    assert ids(sweep_id="sweep-a") == ["1", "2", "3"]
    assert ids(sweep_id="sweep-a", status="finished") == ["1", "3"]
    assert ids(fingerprint="f3") == ["3"]
    assert ids(sweep_id="none") == []


def test_equal_times_have_one_order_everywhere(history, record):
    at = record().created_at
    names = ["b", "A", "a_1", "a-1", "B", "a"]
    for name in names:
        history.put(record(trial_id=name, created_at=at))
    assert [trial.trial_id for trial in history.trials()] == sorted(names)


def test_finished_is_the_newest_that_finished(history, record):
    history.put(record(1, fingerprint="same"))
    history.put(record(2, fingerprint="same"))
    history.put(record(3, fingerprint="same", status="running"))
    history.put(record(4, fingerprint="other"))
    assert history.finished("same") == record(2, fingerprint="same")
    assert history.finished("none") is None


def test_get_suggests_the_nearest(history, record):
    history.put(record())
    with pytest.raises(
        HistoryError, match=r"trial 'trial-002' is not in .*did you mean 'trial-001'"
    ):
        history.get("trial-002")


def test_find_takes_a_unique_beginning(history, record):
    for name in ("Trial-1", "trial-12", "trial-123", "other"):
        history.put(record(trial_id=name))
    assert history.find("o").trial_id == "other"
    assert history.find("T").trial_id == "Trial-1"
    assert history.find("trial-12").trial_id == "trial-12"
    with pytest.raises(
        HistoryError, match="'trial' could be any of trial-12, trial-123; give more"
    ):
        history.find("trial")
    for absent in ("x", "", "%", "tri_l"):
        with pytest.raises(HistoryError, match="is not in"):
            history.find(absent)


def test_a_number_of_hundreds_of_digits_breaks_nothing(history, record):
    history.put(record(1, metrics={"eval_loss": 2.0, "exact_match": 10**400}))
    history.put(record(2, metrics={"eval_loss": 1.0, "exact_match": 0.5}))
    (sweep,) = history.sweeps(metric="exact_match", mode="max")
    assert (sweep.best_trial_id, sweep.best_value) == ("trial-002", 0.5)


def test_sweeps_are_summed_up(history, record):
    history.put(record(2))
    history.put(record(1, metrics={"eval_loss": 3.0, "exact_match": 0.9}))
    history.put(record(3, status="failed", error="no", metrics={"eval_loss": 0.1}))
    history.put(record(4, sweep_id="sweep-b", status="running", metrics={}))
    first, second = history.sweeps()
    assert (first.sweep_id, first.trials, first.counts) == (
        "sweep-a",
        3,
        {"finished": 2, "failed": 1},
    )
    assert (first.best_trial_id, first.best_value) == ("trial-002", 1.02)
    assert (first.created_at, first.updated_at) == (record(1).created_at, record(3).updated_at)
    assert (second.sweep_id, second.best_trial_id, second.best_value) == ("sweep-b", None, None)
    assert history.sweeps(metric="exact_match", mode="max")[0].best_trial_id == "trial-001"


def test_merge_puts_all_or_nothing(history, record):
    def broken():
        yield record(1)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        history.merge(broken())
    assert history.trials() == []


def test_merge_never_replaces_the_newer(history, record):
    old = record(1, status="running")
    new = old.updated(status="finished")
    history.put(new)
    counts = history.merge([old, record(2), record(2)])
    assert (counts.added, counts.replaced, counts.unchanged) == (1, 0, 2)
    assert history.get("trial-001") == new
    newest = new.updated(directory="moved")
    assert history.merge([newest]).replaced == 1
    assert history.get("trial-001") == newest
