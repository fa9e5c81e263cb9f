"""Export and import lose nothing, double nothing, and say what they leave out."""

from __future__ import annotations

import json

import pytest

from rayfin.errors import HistoryError
from rayfin.history import History, ImportReport, export_history, import_history


@pytest.fixture
def other(tmp_path):
    with History.open(f"sqlite:///{tmp_path / 'other.sqlite'}") as history:
        yield history


@pytest.fixture(params=["jsonl", "parquet"])
def path(request, tmp_path):
    return tmp_path / "out" / f"trials.{request.param}"


def fill(history, record):
    history.put(record(1, metrics={"eval_loss": 1e16, "text": "中文\x00\n", "none": None}))
    history.put(record(2, status="failed", error="line\nline", metrics={}, directory=None))
    history.put(record(3, sweep_id="sweep-b", status="running", metrics={}, curve=[]))


def test_a_round_trip_is_exact(history, other, path, record):
    fill(history, record)
    assert export_history(history, path) == 3
    assert import_history(other, path) == ImportReport(added=3, replaced=0, unchanged=0)
    assert other.trials() == history.trials()
    assert repr(other.trials()) == repr(history.trials())
    assert import_history(other, path) == ImportReport(added=0, replaced=0, unchanged=3)
    assert [name.name for name in path.parent.iterdir()] == [path.name]


def test_one_sweep_is_exported(history, other, path, record):
    fill(history, record)
    assert export_history(history, path, sweep_id="sweep-b") == 1
    import_history(other, path)
    assert [trial.trial_id for trial in other.trials()] == ["trial-003"]
    with pytest.raises(HistoryError, match=r"sweep 'sweep-c' is not in .*did you mean 'sweep-b'"):
        export_history(history, path, sweep_id="sweep-c")


def test_an_empty_history_is_an_empty_file(history, other, path):
    assert export_history(history, path) == 0
    assert import_history(other, path) == ImportReport(added=0, replaced=0, unchanged=0)


def test_an_old_export_does_not_undo_progress(history, path, record):
    running = record(status="running", metrics={})
    history.put(running)
    export_history(history, path)
    history.put(running.updated(status="finished", metrics={"eval_loss": 1.0}))
    assert import_history(history, path).unchanged == 1
    assert history.get("trial-001").status == "finished"


def test_a_newer_export_replaces(history, other, path, record):
    running = record(status="running", metrics={})
    other.put(running)
    history.put(running.updated(status="finished", metrics={"eval_loss": 1.0}))
    export_history(history, path)
    assert import_history(other, path).replaced == 1
    assert other.trials() == history.trials()


def test_bad_lines_are_named_and_left_out(history, tmp_path, record):
    good = json.dumps(record().model_dump(mode="json"))
    nan = good.replace("1.01", "NaN")
    path = tmp_path / "mixed.jsonl"
    lines = [good.encode(), b"{", b"[]", b"", b'{"trial_id": "t"}', nan.encode(), b"\xff"]
    path.write_bytes(b"\n".join(lines))
    report = import_history(history, path)
    assert report.added == 1
    assert [line.removeprefix(f"{path}:").partition(":")[0] for line in report.skipped] == [
        *("2", "3", "5", "6", "7"),
    ]
    assert "metrics.eval_loss is nan" in report.skipped[3]
    assert history.trials() == [record()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "can't be read .No such file"),
        ("trials.txt", b"", "has no known ending; give a .jsonl"),
        ("trials.parquet", b"not parquet", "is not a Parquet file"),
        ("trials.csv", b"", "has no column for eval_loss or"),
        ("trials.csv", b"a,b\n1,2\n", "has no column for eval_loss or"),
        ("trials.csv", b"lr,eval_loss,lr\n1,2,3\n", "names the column 'lr' twice"),
        ("trials.csv", b"lr,eval_loss\n1,\xff\n", "is not UTF-8"),
        ("trials.csv", b'lr,eval_loss\n1,"2\n', "is not valid CSV"),
    ],
)
def test_a_file_that_is_none_is_an_error(other, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HistoryError, match=message) as caught:
        import_history(other, path)
    assert "\n" not in str(caught.value)
    assert other.trials() == []


def test_a_plain_parquet_file_is_skipped_row_by_row(other, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "other.parquet"
    parquet.write_table(pa.table({"lr": [0.1, 0.2]}), path)
    report = import_history(other, path)
    assert [line.split(":")[1] for line in report.skipped] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.csv", "has no known ending; give a .jsonl or .parquet file"),
        ("out", "has no known ending"),
        ("/dev/null/out.jsonl", "can't be written"),
    ],
)
def test_an_export_that_can_not_be_is_an_error(other, tmp_path, name, message):
    with pytest.raises(HistoryError, match=f"export: .*{message}"):
        export_history(other, tmp_path / name)
    assert not (tmp_path / name).exists()
