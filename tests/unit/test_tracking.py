"""Trackers (report_to): what they are shown, and that none of them stops or slows a trial."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import rayfin
from rayfin.adapters import AdapterVersion
from rayfin.config import Config, load_config
from rayfin.config.schema import PublishConfig
from rayfin.errors import ConfigError, DependencyError
from rayfin.evaluation import SweepOutcome
from rayfin.history import TrialRecord
from rayfin.library import tracking as module
from rayfin.library.tracking import Tracking
from rayfin.paths import Storage
from rayfin.trackers import TRACKERS, Answers, Point, Run, Tracker, check_installed, register
from rayfin.trackers.base import one_line
from rayfin.tuning import single

START = datetime(2026, 5, 6, 7, tzinfo=UTC)
SECRET = "postgresql+psycopg://me:hunter2@db/x"


class Notes(Tracker):
    """A tracker in one file that registers itself: it notes what it is shown."""

    name = "notes"
    package = "json"
    runs: dict[str, dict[str, Any]]
    away: threading.Event
    hangs: threading.Event
    released: threading.Event
    calls: list[str]
    removed: set[str]
    unended: list[str]
    held_back: str | None = None

    address = "here"

    @property
    def location(self) -> str:
        return "in a dictionary"

    def _called(self, what: str) -> None:
        self.calls.append(what)
        if self.hangs.is_set():
            self.released.wait(540)
        if self.away.is_set():
            raise ConnectionError("refused https://me:hunter2@notes.example/")

    def start(self, run: Run, key: str, native: str | None, parent: str | None) -> str:
        self._called("start")
        if run.run_id in self.removed:
            raise LookupError(f"no run {run.run_id}")
        native = native or key
        new = {"points": [], "answers": {}, "tags": {}, "files": {}, "settings": {}, "ends": []}
        self.runs.setdefault(native, new | {"parent": parent, "title": run.title})
        self.runs[native]["ends"].append("running")
        return native

    def configure(self, native: str, settings: Mapping[str, Any]) -> None:
        self._called("configure")
        assert not self.runs[native]["settings"], "once a run"
        self.runs[native]["settings"] = dict(settings)

    def log(self, native: str, points: Sequence[Point]) -> None:
        self._called("log")
        self.runs[native]["points"] += points

    def show(self, native: str, answers: Sequence[Answers]) -> None:
        self._called("show")
        self.runs[native]["answers"] |= dict(answers)

    def tag(self, native: str, tags: Mapping[str, str]) -> None:
        self._called("tag")
        self.runs[native]["tags"] |= tags

    def attach(self, native: str, file: Path) -> None:
        self._called("attach")
        self.runs[native]["files"][file.name] = file.read_text()

    def end(self, native: str, run: Run) -> None:
        self._called("end")
        if self.unended:
            self.unended.pop()
            raise LookupError(f"no end of {run.run_id}")
        self.runs[native]["ends"].append(run.status)
        self.runs[native]["figures"] = dict(run.figures)

    def close(self) -> None:
        self.calls.append("close")
        if self.held_back is not None:
            raise RuntimeError(self.held_back)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Notes]]:
    monkeypatch.setattr(Notes, "runs", {}, raising=False)
    monkeypatch.setattr(Notes, "calls", [], raising=False)
    monkeypatch.setattr(Notes, "removed", set(), raising=False)
    monkeypatch.setattr(Notes, "unended", [], raising=False)
    for event in ("away", "hangs", "released"):
        monkeypatch.setattr(Notes, event, threading.Event(), raising=False)
    register(Notes)
    yield Notes
    del TRACKERS["notes"]
    Notes.hangs.clear()
    Notes.released.set()


def row(number: int, status: str = "running", step: int = 0, **changes: Any) -> TrialRecord:
    """A trial of the sweep as it stands at a step."""
    curve: list[dict[str, Any]] = []
    for at in range(2, step + 1, 2):
        curve.append({"step": at, "loss": 3 - at / 10, "learning_rate": at / 1000})
    if step:
        curve.append({"step": step, "eval_loss": 2 - step / 10})
        said = {"prompt": "p", "reference": "r", "answer": f"a{step}", "ended": True}
        curve.append({"step": step, "generations": [said]})
    metrics = {"eval_loss": 2 - step / 10, "steps": step, "tokens_per_second": 10.0 + step}
    config = configuration()
    values = {
        "trial_id": f"sweep-0-{number:08x}",
        "sweep_id": "sweep-0",
        "fingerprint": f"{number:08x}{number:08x}",
        "status": status,
        "created_at": START,
        "updated_at": START + timedelta(seconds=step),
        "spec": {
            name: section
            for name, section in config.model_dump(mode="json").items()
            if name in ("model", "data", "method", "train")
        },
        "metrics": metrics if step else {},
        "curve": curve,
        "error": f"lost {SECRET}" if status in ("failed", "oom") else None,
        "directory": None,
    }
    return TrialRecord.parse(values | changes)


def configuration() -> Config:
    return load_config(
        {
            "method": {"type": "lora", "r": 4},
            "sweep": {"parameters": {"method.r": [4, 8]}},
            "data": {"path": "https://me:hunter2@files.example/rows.jsonl"},
            "history": SECRET,
            "report_to": ["notes"],
        }
    )


class Driver:
    """A command: its trackers, and the lines that it told."""

    def __init__(self, storage: Path) -> None:
        self.told: list[str] = []
        self.tracking = Tracking(configuration(), Storage.at(storage), self.told.append)
        self.storage = storage

    def run(self, *rows: TrialRecord) -> list[str]:
        for one in rows:
            self.tracking.record(one)
        return self.tracking.missing()

    def end(self, *rows: TrialRecord, adapter: str | None = None) -> list[str]:
        report = self.storage / "report.html"
        report.write_text("the report")
        best = next((one for one in rows if one.status == "finished"), None)
        outcome = SweepOutcome(rows, configuration(), best, adapter)
        if adapter is not None and best is not None:
            name, _, number = adapter.partition("@")
            version = AdapterVersion(name, int(number), report, {}, "LORA", None, ())
            self.tracking.published(best, version)
        self.tracking.sweep_ended("sweep-0", outcome, Storage.at(report).location)
        return self.tracking.missing()


@pytest.fixture
def driver(notes: type[Notes], tmp_path: Path) -> Callable[[], Driver]:
    return lambda: Driver(tmp_path)


def found(notes: type[Notes], run: str) -> dict[str, Any]:
    (one,) = [value for key, value in notes.runs.items() if key[:-7] == run]
    return one


def test_a_sweep_is_a_run_with_its_trials_in_it(
    notes: type[Notes], driver: Callable[[], Driver]
) -> None:
    first = driver()
    for one in (row(1), row(1, step=4), row(1, step=8), row(1, "finished", 8)):
        first.tracking.record(one)
    first.tracking.record(row(2, "failed"))
    first.tracking.record(row(3, "finished", 8, scenario={"recalled_from": "other-1"}))
    ended = [row(1, "finished", 8), row(2, "failed"), row(3, "finished", 8)]
    assert first.end(*ended, adapter="support@3") == [] and first.told == []
    sweep, trial = found(notes, "sweep-0"), found(notes, row(1).trial_id)
    assert len(notes.runs) == 4 and notes.runs[trial["parent"]] is sweep
    assert trial["title"] == "r=4" and trial["settings"]["method.r"] == 4
    assert trial["settings"]["train.learning_rate"] == 2e-4
    steps = [step for step, _ in trial["points"]]
    assert steps == [2, 4, 6, 8], "each once"
    assert trial["points"][0] == (2, {"train/loss": 2.8, "train/learning_rate": 0.002})
    last = dict(trial["points"])[8]
    assert last["eval/loss"] == pytest.approx(1.2) and last["eval/perplexity"] > 1
    assert last["system/tokens_per_second"] == 18.0
    assert trial["answers"][8][0]["answer"] == "a8"
    assert trial["ends"][0] == "running" and trial["ends"][-1] == "finished"
    assert trial["figures"]["eval_loss"] == pytest.approx(1.2)
    assert trial["tags"]["rayfin.adapter"] == sweep["tags"]["rayfin.adapter"] == "support@3"
    assert sweep["tags"]["rayfin.best_trial"] == row(1).trial_id
    assert sweep["files"] == {"report.html": "the report"} and sweep["ends"][-1] == "finished"
    assert found(notes, row(2).trial_id)["tags"]["rayfin.status"] == "failed"
    assert found(notes, row(3).trial_id)["tags"]["rayfin.recalled_from"] == "other-1"
    assert "hunter2" not in json.dumps(notes.runs)


def test_a_resumed_sweep_goes_on_with_the_same_runs(
    notes: type[Notes], driver: Callable[[], Driver]
) -> None:
    driver().run(row(1), row(1, step=4), row(1, "interrupted", 4))
    second = driver()
    second.tracking.record(row(1))
    second.tracking.record(row(1, step=8))
    second.tracking.record(row(1, "finished", 8))
    assert second.end(row(1, "finished", 8)) == []
    trial = found(notes, row(1).trial_id)
    assert [step for step, _ in trial["points"]] == [2, 4, 6, 8]
    assert trial["ends"] == ["running", "interrupted", "running", "finished"]
    notes.calls.clear()
    assert driver().end(row(1, "finished", 8)) == []
    assert notes.calls == ["close"], "nothing is left to be sent"


def test_a_trial_that_is_trained_anew_is_another_run(notes: type[Notes], tmp_path: Path) -> None:
    def alone(status: str = "running", step: int = 0) -> TrialRecord:
        return row(1, status, step, trial_id="train-00000001", sweep_id="train")

    Driver(tmp_path).run(alone(), alone("finished", 4))
    Driver(tmp_path).run(alone(), alone(step=4), alone("finished", 8))
    assert sorted(len(one["points"]) for one in notes.runs.values()) == [2, 4]
    assert all(one["parent"] is None for one in notes.runs.values())


def test_what_a_tracker_missed_is_sent_when_it_is_back(
    notes: type[Notes], driver: Callable[[], Driver]
) -> None:
    notes.away.set()
    first = driver()
    first.tracking.record(row(1))
    first.tracking.record(row(1, step=4))
    first.tracking.record(row(1, "finished", 8))
    while not first.told:
        threading.Event().wait(0.01)
    notes.away.clear()
    assert first.tracking.missing() == []
    away, back = first.told
    assert away.endswith(
        "; nothing waits for it, and what is missing there is sent when it answers"
    )
    assert back == "notes answers again, and has what it missed"
    assert "hunter2" not in "".join(first.told)
    trial = found(notes, row(1).trial_id)
    assert [step for step, _ in trial["points"]] == [2, 4, 6, 8]
    assert trial["points"][1][1]["system/tokens_per_second"] == 14.0, "of each evaluation"


def test_what_can_t_be_sent_is_told_and_sent_by_the_same_command(
    notes: type[Notes], driver: Callable[[], Driver]
) -> None:
    notes.away.set()
    first = driver()
    first.tracking.record(row(1, "finished", 8))
    (line,) = first.end(row(1, "finished", 8))
    assert line.startswith("notes lacks a part of 2 runs: ConnectionError: refused https://me:***@")
    assert line.endswith("; the same command sends it")
    assert len(first.told) == 1 and notes.runs == {}
    notes.away.clear()
    assert driver().end(row(1, "finished", 8)) == []
    assert found(notes, "sweep-0")["files"] and found(notes, row(1).trial_id)["points"]


def test_a_run_that_somebody_removed_there_holds_up_no_other(
    notes: type[Notes], driver: Callable[[], Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes.removed.add(row(1).trial_id)
    (line,) = driver().run(*(row(number, "finished", 4) for number in (1, 2, 3)))
    assert line == (
        f"notes lacks a part of 1 run: LookupError: no run {row(1).trial_id}; the same command "
        "sends it"
    )
    assert all(found(notes, row(n).trial_id)["ends"][-1] == "finished" for n in (2, 3))
    notes.removed.clear()
    monkeypatch.setattr(notes, "held_back", "1 runs are not sent; `notes sync` sends them")
    (line,) = driver().run(row(1, "finished", 4))
    assert line == "notes: RuntimeError: 1 runs are not sent; `notes sync` sends them"
    assert found(notes, row(1).trial_id)["ends"][-1] == "finished"


def test_two_removed_runs_hold_up_no_other_at_the_end(
    notes: type[Notes], driver: Callable[[], Driver]
) -> None:
    def alone(number: int) -> TrialRecord:
        return row(number, "finished", 4, trial_id=f"train-{number:08x}", sweep_id="train")

    first = driver()
    notes.hangs.set()
    first.tracking.record(alone(5))
    while not notes.calls:
        threading.Event().wait(0.01)
    notes.removed |= {alone(1).trial_id, alone(2).trial_id}
    for number in (1, 2, 3, 4):
        first.tracking.record(alone(number))
    (sender,) = first.tracking._senders
    sender.ask_to_close()  # so that the next try is the last
    notes.hangs.clear()
    notes.released.set()
    (line,) = first.tracking.missing()
    assert line.startswith("notes lacks a part of 2 runs: ")
    assert all(found(notes, alone(n).trial_id)["ends"][-1] == "finished" for n in (3, 4, 5))


def test_a_run_whose_end_failed_is_gone_on_with(
    notes: type[Notes], driver: Callable[[], Driver]
) -> None:
    notes.unended.append("once")
    first = driver()
    first.tracking.record(row(1))
    first.tracking.record(row(1, "finished", 4))
    while not first.told:
        threading.Event().wait(0.01)
    assert first.tracking.missing() == []
    assert found(notes, row(1).trial_id)["ends"] == ["running", "running", "finished"]


def test_a_finished_run_has_no_error_of_before(
    notes: type[Notes], driver: Callable[[], Driver]
) -> None:
    driver().run(row(1, "failed"))
    assert found(notes, row(1).trial_id)["tags"]["rayfin.error"]
    driver().run(row(1), row(1, "finished", 4), row(2, "finished", 4))
    assert found(notes, row(1).trial_id)["tags"]["rayfin.error"] == ""
    assert "rayfin.error" not in found(notes, row(2).trial_id)["tags"]


def test_a_tracker_that_hangs_holds_nobody(
    notes: type[Notes], driver: Callable[[], Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.2)
    notes.hangs.set()
    first = driver()
    for step in range(2, 200, 2):
        first.tracking.record(row(1, step=step))
    (line,) = first.tracking.missing()
    assert (
        line
        == "notes lacks a part of 2 runs: it does not answer in time; the same command sends it"
    )
    assert len(notes.calls) == 1


def test_names_are_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"report_to: 'mlfow' is not allowed; it should be"):
        load_config({}, ["report_to=mlfow"])
    assert load_config({}, ["report_to=none"]).report_to == ()
    assert load_config({}, ["report_to=[wandb, wandb]"]).report_to == ("wandb",)
    monkeypatch.setattr(TRACKERS["wandb"], "package", "no_such_package")
    with pytest.raises(DependencyError, match=r"run: pip install 'rayfin\[wandb\]'$"):
        check_installed(["wandb"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI=http"):
        TRACKERS["mlflow"](None)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    with pytest.raises(ConfigError, match="TENSORBOARD_LOGGING_DIR=DIR"):
        TRACKERS["tensorboard"](None)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    with pytest.raises(ConfigError, match="TRACKIO_SPACE_ID names another place"):
        TRACKERS["trackio"](None)


def test_another_address_gets_what_the_first_one_has(
    notes: type[Notes], driver: Callable[[], Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert driver().run(row(1, "finished", 8)) == []
    monkeypatch.setattr(Notes, "address", "elsewhere")
    notes.runs.clear()
    notes.away.set()
    (line,) = driver().run(row(1, "finished", 8))
    assert line.startswith("notes lacks a part of 1 run")
    notes.away.clear()
    assert driver().run(row(1, "finished", 8)) == []
    assert [step for step, _ in found(notes, row(1).trial_id)["points"]] == [2, 4, 6, 8]


@pytest.mark.parametrize("publishes", [True, False])
def test_a_published_training_ends_once(
    notes: type[Notes],
    driver: Callable[[], Driver],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    publishes: bool,
) -> None:
    first, later, end, sent = driver(), row(2, "failed"), Notes.end, threading.Event()

    def ended(self: Notes, native: str, run: Run) -> None:
        end(self, native, run)
        if run.run_id == later.trial_id:
            sent.set()

    monkeypatch.setattr(Notes, "end", ended)
    config = configuration().model_copy(update={"publish": PublishConfig(name="support")})
    first.tracking = Tracking(config, Storage.at(tmp_path), first.told.append)
    one = row(1, "finished", 8, trial_id="train-00000001", sweep_id="train")
    first.tracking.record(one)
    first.tracking.record(later)
    assert sent.wait(540)  # what came before it would have been sent first
    if publishes:
        version = AdapterVersion("support", 1, tmp_path, {}, "LORA", None, ())
        first.tracking.trained(one, version)
    assert first.tracking.missing() == []
    run = found(notes, one.trial_id)
    assert run["ends"] == ["running", "finished"]
    assert run["tags"].get("rayfin.adapter") == ("support@1" if publishes else None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no such run", "no such run"),
        ("x" * 300, "x" * 199 + "…"),
        ("refused: " + "x" * 300, "refused: " + "x" * 190 + "…"),
        ("word " * 60, "word " * 39 + "…"),
    ],
)
def test_an_error_is_cut_to_a_line_that_still_says_it(text: str, shown: str) -> None:
    assert one_line(ValueError(text)) == f"ValueError: {shown}"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("file:///no/such/mlruns", "file:///no/such/mlruns"),
        ("foo://me:hunter2@x", "foo://me:***@x"),
    ],
)
def test_an_mlflow_address_that_it_can_t_use_is_refused_in_one_line(
    uri: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError) as refused:
        TRACKERS["mlflow"](None)
    line = str(refused.value)
    assert line.startswith(f"report_to=mlflow: MLFLOW_TRACKING_URI={shown} can't be used (")
    assert line.endswith("or a file of its own by MLFLOW_TRACKING_URI=sqlite:///mlflow.db")
    assert "hunter2" not in line and "\n" not in line


def test_what_trains_nothing_has_no_rerun(
    notes: type[Notes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = {"scenario": {"init_from": {"adapter": "support@3"}}}
    one = row(1, "failed", trial_id="train-00000001", sweep_id="train", **told)
    monkeypatch.setattr(single, "train_once", lambda *_, **__: one)
    notes.removed.add(one.trial_id)
    method = configuration().method.model_copy(update={"init_from": "support"})
    changes = {"history": "sqlite:///history.sqlite", "method": method}
    config = configuration().model_copy(update=changes)
    (line,) = rayfin.train(config, rerun=True, progress=False).failed
    assert line.endswith(
        "; the same command without --rerun with method.init_from=support@3 sends it"
    )
