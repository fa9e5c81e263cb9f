"""Trackers' own packages: what is sent to them is read back by their own readers."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rayfin.cli import main
from rayfin.history import History
from rayfin.paths import Storage
from rayfin.trackers import TRACKERS, Run
from rayfin.trackers import wandb as wandb_module
from rayfin.tuning.record import Recorder

GUIDE = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")
QUICK = [
    *("model.name=tiny", "method.type=lora", "method.quantization_bit=null", "train.max_steps=4"),
    *("train.eval_steps=2", "storage=runs", "scaling.use_gpu=false", "sweep.report_samples=0"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {n}", "completion": f"{n % 7} times"} for n in range(40)]
    Path("support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


def history() -> list[Any]:
    with History.open(f"sqlite:///{Path('runs/history.sqlite').resolve()}") as opened:
        return opened.trials()


@pytest.mark.long
def test_the_guide_s_command_is_read_back(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's own reader, W&B's offline files and Trackio's database."""
    for package in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(package)
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", here / "trackio")
    ((command, lines),) = re.findall(r"```console\n\$ (.*?)\n(.*?)```", GUIDE, re.DOTALL)
    assert main([*shlex.split(command)[1:], *QUICK, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["failed"] == [], "standard output is for results"
    pattern = r"\n".join(map(re.escape, lines.splitlines())).replace("…", r"(?:.|\n)*")
    assert re.search(pattern, err), err
    (row,) = history()
    losses = {p["step"]: p["loss"] for p in row.curve if "loss" in p}
    answers = [p["generations"] for p in row.curve if "generations" in p]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (directory,) = (here / "runs" / "tensorboard").iterdir()
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    read = {event.step: event.value for event in events.Scalars("train/loss")}
    assert read == {step: pytest.approx(loss) for step, loss in losses.items()}
    for name in ("train/learning_rate", "eval/loss", "system/peak_memory_bytes"):
        assert events.Scalars(name)[-1].step == 4, name
    (settings,) = [it.tensor_proto.string_val[0].decode() for it in events.Tensors("settings")]
    assert "| method.type | lora |" in settings
    shown = [it.tensor_proto.string_val[0].decode() for it in events.Tensors("answers")]
    assert len(shown) == len(answers) == 2 and answers[0][0]["reference"] in shown[0]
    assert "_hparams_/session_start_info" in events.summary_metadata

    (offline,) = (here / "runs" / "wandb").glob("offline-run-*/*.wandb")
    summaries, config = wandb_records(offline)
    assert summaries["train/loss"] == pytest.approx(losses[4])
    assert config["train.learning_rate"] == 2e-4 and config["rayfin.status"] == "finished"
    kept = offline.read_bytes() + b"".join(p.read_bytes() for p in offline.parent.rglob("*.json"))
    assert b"sample_generations=2" not in kept, "W&B keeps the command line"

    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("rayfin", row.trial_id)
    assert {it["step"]: it["train/loss"] for it in logs if "train/loss" in it} == losses


@pytest.mark.long
def test_wandb_drops_no_measurement_and_goes_on_after_a_failed_end(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    now = datetime.now(UTC)
    location = Storage.at(here).location
    run = Run("trial-1", "r=4", location, "finished", now, now, figures={"eval_loss": 1.0})
    tracker = TRACKERS["wandb"](here)
    native = tracker.start(run, "trial-1-abc", None, None)
    answer = {"prompt": "p", "answer": "a", "ended": True, "reference": "r"}
    tracker.log(native, [(1, {"train/loss": 3.0}), (2, {"train/loss": 2.0})])
    tracker.show(native, [(1, [answer]), (2, [answer])])
    tracker.log(native, [(3, {"train/loss": 1.0})])
    client: Any = tracker
    live = client._runs[native]
    with monkeypatch.context() as broken:
        broken.setattr(live, "finish", lambda exit_code: live.no_such_call())
        with pytest.raises(AttributeError):
            tracker.end(native, run)
    live.finish()
    assert tracker.start(run, "trial-1-abc", native, None) == native
    tracker.end(native, run)
    tracker.close()
    files = sorted(here.glob("wandb/offline-run-*/*.wandb"))
    points = [point for file in files for point in wandb_history(file)]
    assert [it["train/loss"] for it in points if "train/loss" in it] == ["3", "2", "1"]
    keys = " ".join(key for it in points for key in it)
    assert "answers/step_1" in keys and "answers/step_2" in keys, keys


@pytest.mark.long
def test_wandb_s_mode_disabled_needs_no_key(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb_module, "_logged_in", lambda url: False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()  # it keeps the settings that it read first
    try:
        tracker = TRACKERS["wandb"](here)
        assert tracker.location.startswith("nothing is kept or sent")
        now = datetime.now(UTC)
        run = Run("trial-1", "r=4", Storage.at(here).location, "finished", now, now)
        native = tracker.start(run, "trial-1-abc", None, None)
        tracker.configure(native, {"method.r": 4})
        tracker.log(native, [(1, {"train/loss": 3.0})])
        tracker.attach(native, here / "support.jsonl")
        tracker.end(native, run)
        tracker.close()
    finally:
        wandb.teardown()
    assert [it.name for it in here.iterdir()] == ["support.jsonl"]


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """The measurements in a file that W&B would send, a row each."""
    records = (record.history.item for record in wandb_file(file) if record.history.item)
    return [{it.key or ".".join(it.nested_key): it.value_json for it in items} for items in records]


def wandb_records(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last measurements and the configuration in a file that W&B would send."""
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for record in wandb_file(file):
        for into, items in (
            (summary, record.history.item),
            (config, [*record.run.config.update, *record.config.update]),
        ):
            for item in items:
                into[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return summary, config


def wandb_file(file: Path) -> Iterator[Any]:
    """The records in a file that W&B would send.

    It is LevelDB's log of W&B's records: after 7 bytes, blocks of 32 KiB of chunks, each with a
    checksum (4 bytes), a length (2) and whether it is all, the first, middle or last of a record.
    """
    from wandb.proto import wandb_internal_pb2

    contents, at, begun = file.read_bytes(), 7, b""
    while at + 7 <= len(contents):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", contents, at + 4)
        begun += contents[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(begun)
        begun = b""
        yield record


class Server:
    """MLflow's own server on the loopback, which may be killed and started again."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root = root
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = f"sqlite:///{self.root / 'mlflow.db'}"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"),
            *("--port", str(self.port), "--backend-store-uri", store),
            *("--artifacts-destination", str(self.root / "artifacts")),
        ]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.root / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=10):
                return
            assert self.process.poll() is None, (self.root / "server.log").read_text()[-2000:]
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
        pytest.fail("MLflow's server does not answer")

    def kill(self, processes: Any) -> None:
        if self.process is not None:
            processes.end_family(self.process)
        self.process = None


@pytest.fixture
def server(tmp_path: Path, processes: Any) -> Iterator[Server]:
    pytest.importorskip("mlflow")
    root = tmp_path / "mlflow"
    root.mkdir()
    server = Server(root)
    yield server
    server.kill(processes)


@pytest.mark.long
def test_mlflow_s_server_is_killed_in_the_middle_of_a_sweep(
    here: Path,
    server: Server,
    processes: Any,
    without_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter2@127.0.0.1:{server.port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.start()
    completed = Recorder.reports
    ended: list[str] = []

    def reports(self: Recorder, trial: Any, result: Any) -> None:
        completed(self, trial, result)
        if result.status == "finished":
            ended.append(trial.trial_id)
            if len(ended) == 1:  # with the runs of the sweep and of the first trial in it
                wait_for_runs(server, 2)
                server.kill(processes)

    monkeypatch.setattr(Recorder, "reports", reports)
    words = [
        *("sweep", "data.path=support.jsonl", "report_to=mlflow", "publish.name=support", *QUICK),
        *("sweep.parameters.method.r=[2, 4]", "sweep.search=grid", "sweep.scheduler=none"),
        "train.sample_generations=1",
    ]
    assert main(words) == 3, capfd.readouterr().err
    out, err = capfd.readouterr()
    assert "Best trial" in out and [row.status for row in history()] == ["finished"] * 2
    assert err.count("nothing waits for it, and what is missing there is sent when it answers") == 1
    assert re.search(r"report_to: mlflow lacks a part of \d runs: .*with --resume sends it", err)
    assert "hunter2" not in err

    server.start()
    assert main([*words, "--resume"]) == 0, capfd.readouterr().err
    assert len(ended) == 2, "nothing is trained again"
    from mlflow import MlflowClient

    client = MlflowClient(server.url)
    experiment = client.get_experiment_by_name("rayfin")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3 and {run.info.status for run in runs} == {"FINISHED"}
    (sweep,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    rows = {row.trial_id: row for row in history()}
    best = min(rows.values(), key=lambda row: row.metrics["eval_loss"]).trial_id
    for run in runs:
        if run is sweep:
            continue
        row = rows[run.data.tags["rayfin.trial_id"]]
        assert run.data.tags["mlflow.parentRunId"] == sweep.info.run_id
        assert run.data.params["method.r"] == str(row.spec["method"]["r"])
        read = client.get_metric_history(run.info.run_id, "train/loss")
        losses = [(p["step"], p["loss"]) for p in row.curve if "loss" in p]
        assert sorted((it.step, it.value) for it in read) == losses, "each once"
        assert run.data.metrics["eval_loss"] == row.metrics["eval_loss"]
        assert len(client.list_artifacts(run.info.run_id, "answers")) == 2
        adapter = "support@1" if row.trial_id == best else None
        assert run.data.tags.get("rayfin.adapter") == adapter
    assert [it.path for it in client.list_artifacts(sweep.info.run_id)] == ["report.html"]
    assert sweep.data.tags["rayfin.best_trial"] == best
    assert "hunter2" not in str([run.to_dictionary() for run in runs])


def wait_for_runs(server: Server, count: int) -> None:
    """Wait until the first trial is there as a run: what is killed then was in use."""
    from mlflow import MlflowClient

    client = MlflowClient(server.url)
    for _ in range(600):
        experiment = client.get_experiment_by_name("rayfin")
        if experiment and len(client.search_runs([experiment.experiment_id])) >= count:
            return
        with suppress(subprocess.TimeoutExpired):
            assert server.process is not None
            server.process.wait(0.1)
    pytest.fail("no run came")
