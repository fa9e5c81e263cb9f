"""The command line's own work: arguments, exit codes, --json, tables. No trial is run here."""

from __future__ import annotations

import dataclasses
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayfin.cli import main
from rayfin.config import Config, leaf_names, load_config
from rayfin.errors import ConfigError, TrialError
from rayfin.history import TrialRecord
from rayfin.methods import METHODS
from rayfin.paths import Storage
from rayfin.tuning.plan import new_plan
from rayfin.tuning.progress import ProgressDisplay, settings, trials_table
from rayfin.tuning.sweep import EndedSweep, SweepOptions, best_trial

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PARAMETERS = "sweep.parameters={method.r: [4, 8]}"


def row(config: Config, number: int, **changes: Any) -> TrialRecord:
    """A finished trial of rank `number`."""
    spec = config.model_dump(mode="json")
    spec["method"]["r"] = number
    values: dict[str, Any] = {
        "trial_id": f"sweep-a-{number}",
        "sweep_id": "sweep-a",
        "fingerprint": f"f{number}",
        "status": "finished",
        "created_at": AT,
        "updated_at": AT,
        "spec": spec,
        "scenario": {},
        "metrics": {
            "steps": 60,
            "eval_loss": 1.0 + number / 100,
            "base_eval_loss": 2.0,
            "exact_match": number / 10,
            "tokens_per_second": 123.4,
        },
        "curve": [],
        "versions": {},
    }
    return TrialRecord(**(values | changes))


@pytest.fixture
def config() -> Config:
    return load_config(None, ["model.name=tiny", PARAMETERS])


class Sweep:
    """Stands in for run_sweep: keeps what it was asked for, and answers with rows."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.interrupted = False
        self.make = lambda config: [row(config, 4), row(config, 8)]

    def __call__(
        self, config: Config, history: Any, storage: Storage, options: SweepOptions
    ) -> EndedSweep:
        self.asked.append({"config": config, "storage": storage, **vars(options)})
        rows = self.make(config)
        plan = new_plan(config, storage)
        best = best_trial(rows, config.sweep.metric, config.sweep.direction)
        return EndedSweep(plan, rows, best, self.interrupted)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    fake = Sweep()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rayfin.tuning.sweep.run_sweep", fake)
    return fake


def test_json_is_one_line_for_machines(sweep: Sweep, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--json", "model.name=tiny", PARAMETERS]) == 0
    out, err = capfd.readouterr()
    assert (out.count("\n"), err) == (1, "")
    result = json.loads(out)
    assert set(result) == {
        "sweep_id", "interrupted", "trials", "notes", "best", "verdict", "adapter", "report",
        "history", "failed", "not_comparable",
    }  # fmt: skip
    assert result["best"] == "sweep-a-4"
    assert [trial["trial_id"] for trial in result["trials"]] == ["sweep-a-4", "sweep-a-8"]
    assert TrialRecord.model_validate(result["trials"][0]).metrics["eval_loss"] == 1.04
    assert Path(result["report"]).is_file()
    assert result["history"].startswith("sqlite:///")
    assert (result["interrupted"], result["adapter"]) == (False, None)


def test_the_table_names_report_and_history(
    sweep: Sweep, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "model.name=tiny", PARAMETERS]) == 0
    out = capfd.readouterr().out
    assert "r=4" in out and "2.0000 ->    1.0400" in out
    assert "report.html" in out and "history.sqlite" in out


def test_settings_may_stand_between_options(sweep: Sweep) -> None:
    Path("my.yaml").write_text("model: {name: tiny}\ntrain: {max_steps: 5, seed: 1}\n")
    command = ["sweep", "my.yaml", "--resume", PARAMETERS, "--rerun", "train.seed=2"]
    assert main([*command, "--address", "auto", "storage=here"]) == 0
    asked = sweep.asked[0]
    assert (asked["config"].train.max_steps, asked["config"].train.seed) == (5, 2)
    assert (asked["resume"], asked["rerun"], asked["address"]) == (True, True, "auto")
    assert asked["storage"].location.path == Path("here").resolve()


def test_a_setting_that_the_sweep_has_values_for_is_named(sweep: Sweep) -> None:
    Path("my.yaml").write_text("method: {r: 8}\nsweep: {parameters: {method.r: [4, 8]}}\n")
    assert main(["sweep", "my.yaml", "model.name=tiny"]) == 0
    assert main(["sweep", "my.yaml", "model.name=tiny", "method.r=32"]) == 0
    before, after = (asked["notes"] for asked in sweep.asked)
    assert before == ()
    (line,) = after
    assert line.startswith("method.r=32 is no trial's")
    assert line.endswith("sweep.parameters.method.r=[32] is this one alone")


def test_exit_codes_tell_how_it_ended(sweep: Sweep, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "--json", "model.name=tiny", PARAMETERS]
    sweep.interrupted = True
    assert main(command) == 130
    sweep.interrupted = False
    sweep.make = lambda config: [
        row(config, 4, status="failed", error="out of luck", metrics={"steps": 1})
    ]
    assert main(command) == 1
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["best"] is None


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a: 1 is\n  wrong; use 2"), 2, "rayfin: a: 1 is wrong; use 2\n"),
        (TrialError("it broke"), 1, "rayfin: it broke\n"),
        (KeyboardInterrupt(), 130, "rayfin: interrupted\n"),
    ],
)
def test_errors_are_one_line(
    sweep: Sweep,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(_: Config) -> list[TrialRecord]:
        raise error

    sweep.make = fail
    assert main(["sweep", "model.name=tiny", PARAMETERS]) == code
    assert capfd.readouterr() == ("", line)


def test_a_bug_is_no_usage_error(sweep: Sweep) -> None:
    def fail(_: Config) -> list[TrialRecord]:
        raise ZeroDivisionError

    sweep.make = fail
    with pytest.raises(ZeroDivisionError):
        main(["sweep", "model.name=tiny", PARAMETERS])


@pytest.mark.parametrize("verb", ["sweep", "train"])
def test_settings_lists_every_setting_with_its_meaning(
    verb: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--settings"])
    assert stop.value.code == 0
    out = capfd.readouterr().out
    listed = {line.split()[0] for line in out.splitlines() if line.strip()}
    for kind in METHODS:
        names = {*leaf_names(Config.model_validate({"method": {"type": kind}})), kind}
        assert names - {"publish"} <= listed, kind
    assert {"publish.name", "publish.alias"} <= listed
    assert "train.lr_scheduler_type = cosine  (linear | cosine" in out
    assert "Peak learning rate." in out


def test_help_names_the_list_of_settings(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--settings" in capfd.readouterr().out


def test_train_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rayfin.tuning.single.train_once", lambda config, **_: row(config, 4))
    assert main(["train", "--json", "model.name=tiny"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["trial"]["trial_id"], result["adapter"]) == ("sweep-a-4", None)


def test_train_keeps_standard_output_for_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error = "RuntimeError: [/pytorch/gloo/pair.cc:534] closed by peer [127.0.0.1]:1"  # no markup

    def train_once(config: Config, *, show: Any, **_: Any) -> TrialRecord:
        show("step 15/60")
        return row(config, 4, status="failed", error=error)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rayfin.tuning.single.train_once", train_once)
    assert main(["train", "model.name=tiny"]) == 1
    out, progress = capfd.readouterr()
    assert error in out
    assert "step 15/60" in progress and "step 15/60" not in out


def shown(table: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_table_has_a_line_a_trial(config: Config) -> None:
    rows = [
        row(config, 4),
        row(config, 8, status="running", metrics={"steps": 30}),
        row(config, 16, status="failed", error="the loss became NaN", metrics={"steps": 2}),
        row(config, 32, scenario={"recalled_from": "sweep-z-1"}),
    ]
    lines = shown(trials_table(config, rows)).splitlines()
    assert lines[0].split()[:4] == ["#", "status", "r", "step"]
    del lines[1]  # a rule
    assert len(lines) == 5
    assert lines[1].split() == ["1", "finished", "4", "60/60", "1.0400", "0.4000", "123"]
    assert "30/60" in lines[2]
    assert "the loss became NaN" in lines[3]
    assert "from the history" in lines[4]
    assert settings(config, rows[0]) == "r=4"


def test_what_rows_say_of_their_data_is_told_once(config: Config, tmp_path: Path) -> None:
    out = io.StringIO()
    progress = ProgressDisplay(Console(file=out, width=20))
    progress.begin(new_plan(config, Storage.at(tmp_path)), [])
    progress.tell(["data: of the files"])
    for r, cut in ((4, 1), (4, 1), (8, 2), (16, 1)):
        notes = ["data: of the files", f"data: {cut} of 9 samples cut"]
        progress.update(row(config, r, scenario={"data": {"notes": notes}}))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("data:")]
    assert lines == ["data: of the files", "data: 1 of 9 samples cut", "data: 2 of 9 samples cut"]


def test_progress_is_a_line_for_each_start_and_end(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("rayfin.tuning.progress.time.monotonic", lambda: clock[0])
    out = io.StringIO()
    progress = ProgressDisplay(Console(file=out, width=200))
    limited = config.model_copy(
        update={"sweep": config.sweep.model_copy(update={"num_samples": 3})}
    )
    plan = dataclasses.replace(new_plan(limited, Storage.at(tmp_path)), sweep_id="sweep-a")
    progress.begin(plan, [row(config, 4)])
    assert progress.eta_seconds() is None

    running = row(config, 8, status="running", metrics={"steps": 0})
    progress.update(running)
    clock[0] += 5
    progress.update(running.updated(metrics={"steps": 30, "eval_loss": 1.5}))
    assert progress.eta_seconds() == pytest.approx(15)  # half a trial in 5 s, one and a half left
    clock[0] += 5
    progress.update(row(config, 8))
    assert progress.eta_seconds() == pytest.approx(10)
    progress.end()

    lines = out.getvalue().splitlines()
    assert lines[0] == "sweep sweep-a: 3 trials, 1 trials already done"
    assert [line.split()[1:4] for line in lines[1:]] == [
        ["2/3", "running", "r=8"],
        ["2/3", "finished", "r=8"],
    ]
    assert "ETA 0:10" in lines[2]
