"""What follows the training of a sweep or a run fails for real: what was trained is told first."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayfin import hardware
from rayfin.adapters import Registry
from rayfin.cli import main
from rayfin.cli.serve import _signals
from rayfin.config import ModelConfig
from rayfin.evaluation import samples
from rayfin.history import History
from rayfin.library.experiment import Experiment
from rayfin.models import load_base, load_tokenizer
from rayfin.training import TrialResult, trial

COLOURS = ("red", "blue", "green", "pink", "gold", "teal", "grey", "lime")


class Lab:
    """A trained trial, and a sweep that is answered by it without Ray."""

    def __init__(self, root: Path) -> None:
        self.root, self.storage, self.model = root, root / "runs", root / "model"
        load_base(ModelConfig(name="tiny"), None, "cpu").save_pretrained(self.model)
        load_tokenizer(ModelConfig(name="tiny")).save_pretrained(self.model)
        data = root / "colours.jsonl"
        rows = [
            {"prompt": f"say {c} {i}", "completion": c[::-1]} for c in COLOURS for i in range(3)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.settings = [
            f"model.name={self.model}", "method.type=lora", "method.r=2", f"data.path={data}",
            "data.max_length=32", "train.max_steps=2", "scaling.use_gpu=false",
            f"storage={self.storage}",
        ]  # fmt: skip

    def sweep(self, *more: str) -> int:
        one = ("sweep.num_samples=1", "sweep.parameters={method.r: [2]}", "sweep.report_samples=1")
        return main(["sweep", *self.settings, *one, *more])

    def report(self) -> str:
        """The newest sweep's."""
        found = max(
            self.storage.glob("sweeps/*/report.html"), key=lambda path: path.stat().st_mtime
        )
        return found.read_text()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    assert main(["train", *lab.settings, "publish=null"]) == 0
    return lab


@pytest.fixture
def model(lab: Lab) -> Iterator[Path]:
    """The sweep's base model; there again after the test."""
    kept = lab.root / "kept"
    shutil.copytree(lab.model, kept)
    yield lab.model
    shutil.rmtree(lab.model, ignore_errors=True)
    kept.rename(lab.model)


def one_line(err: str, *words: str) -> None:
    told = [line for line in err.splitlines() if line.startswith("rayfin: ")]
    assert len(told) == 1 and "Traceback" not in err, err
    assert all(word in told[0] for word in words), told[0]


def test_a_best_trial_that_cannot_be_published_is_reported_and_published_later(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = lab.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "adapters").touch()  # a file where the registry is to be
    publish = ("publish.name=colours", f"publish.storage={elsewhere}", "sweep.grace_period=2")
    assert lab.sweep(*publish, "--json") == 3
    out, err = capsys.readouterr()
    one_line(err, "not published as 'colours'", "can't be used", "with --resume publishes it")
    told = json.loads(out)
    assert told["best"] in lab.report() and told["adapter"] is None and len(told["failed"]) == 1
    assert 'class="sample"' in lab.report(), "one step that fails keeps no other from being done"
    (elsewhere / "adapters").unlink()
    trained = next(lab.storage.glob("sweeps/*/trials/*/adapter"))
    another = {"base_model": "another/base", "base_identity": ["another/base@1"]}
    Registry(elsewhere / "adapters").publish("colours", trained, another)
    assert lab.sweep(*publish, "--resume", "--json") == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["adapter"]["name"] == "colours" and not told["failed"]
    assert "colours@2" in lab.report()
    assert f"'colours' is colours@2 from now on, whose base is '{lab.model}' (local@" in err
    assert "and colours@1 has 'another/base' (another/base@1)" in err


@pytest.mark.parametrize("waits", [0, 1, 3])
def test_a_driver_killed_between_the_last_trial_and_its_adapter_publishes_later(
    lab: Lab, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first write to the registry, or at a later one: at the n-th time that it
    waits for the disk. Nothing half done is there, and the same command publishes it, whole.
    """
    settings = (f"publish.name=late-{waits}", "sweep.report_samples=0")
    publish, sync = Registry.publish, os.fsync

    def killed(*args: Any, **options: Any) -> Any:
        left = itertools.count(waits - 1, -1)

        def fsync(descriptor: int) -> None:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        if waits == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return publish(*args, **options)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Registry, "publish", killed)
        os._exit(lab.sweep(*settings))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    def whole_versions() -> list[str]:
        registry = Registry(lab.storage / "adapters")
        found, problems = registry.scan()
        assert not problems
        for version in found:
            registry.verify(version.ref)
        return [version.ref for version in found if version.name == f"late-{waits}"]

    assert whole_versions() == []
    assert lab.sweep(*settings) == 0
    assert whole_versions() == [f"late-{waits}@1"]


def test_a_model_that_is_gone_costs_the_samples_only(
    lab: Lab, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish = Experiment.publish

    def then_it_goes(experiment: Experiment, *trial: Any) -> Any:
        adapter = publish(experiment, *trial)
        shutil.rmtree(model)
        return adapter

    monkeypatch.setattr(Experiment, "publish", then_it_goes)
    assert lab.sweep("publish.name=kept") == 3
    out, err = capsys.readouterr()
    one_line(err, "the report goes without sample answers: ", str(model), "--resume")
    assert "Best trial" in out and "kept@1" in out and "kept@1" in lab.report()


def test_samples_that_run_out_of_memory_cost_the_samples_only(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = samples.answer_samples

    def without_memory(*args: Any, **options: Any) -> Any:
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms, before[1]))
        try:
            return answer(*args, max_new_tokens=2**28, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    monkeypatch.setattr(samples, "answer_samples", without_memory)
    assert lab.sweep() == 3
    out, err = capsys.readouterr()
    one_line(err, "without sample answers: MemoryError", "sweep.report_samples=0")
    assert "Best trial" in out and "report.html" in out and "Best" in lab.report()


def test_a_report_that_cannot_be_written_is_one_line(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "sweep.grace_period=1"  # --resume must not find another test's sweep of this second
    assert lab.sweep(own) == 0
    report = max(lab.storage.glob("sweeps/*/report.html"), key=lambda path: path.stat().st_mtime)
    report.unlink()
    report.mkdir()
    capsys.readouterr()
    assert lab.sweep(own, "--resume") == 2
    one_line(capsys.readouterr().err, "the report", str(report), "the trials are in the history")


def test_a_run_that_cannot_be_published_is_told_first(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = lab.root / "taken"
    elsewhere.mkdir()
    (elsewhere / "adapters").touch()
    assert main(["train", *lab.settings, "publish.name=mine", f"publish.storage={elsewhere}"]) == 3
    out, err = capsys.readouterr()
    one_line(err, "not published as 'mine'", "the same command publishes it")
    assert "Trained" in out


class Touch:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_no_pickle_in_a_sweeps_folders_is_run_by_a_resume(lab: Lab, tmp_path: Path) -> None:
    own = "sweep.grace_period=3"
    assert lab.sweep(own) == 0
    sweep = max(lab.storage.glob("sweeps/*/report.html"), key=lambda p: p.stat().st_mtime).parent
    trace = tmp_path / "unpickled"
    raw = pickle.dumps(Touch(trace))
    pickle.loads(raw)
    trace.unlink()  # it does what it is for
    encoded = json.dumps({"_type": "CLOUDPICKLE_FALLBACK", "value": raw.hex()})
    for folder in (sweep, lab.storage / "ray" / sweep.name):
        for inner in (folder, *folder.glob("trials/*"), folder / "trial_1"):
            inner.mkdir(parents=True, exist_ok=True)
            for name in ("tuner.pkl", "trainer.pkl", "error.pkl", "searcher-state-a.pkl",
                         "search_gen_state-a.json", "params.pkl"):  # fmt: skip
                (inner / name).write_bytes(raw)
            (inner / "experiment_state-a.json").write_text(encoded)
    assert lab.sweep(own, "--resume") == 0
    assert not trace.exists()


def test_a_sweep_whose_trials_all_failed_says_so(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("sweep.grace_period=4", "--json")
    assert lab.sweep(*own) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    with History.open(f"sqlite:///{lab.storage / 'history.sqlite'}") as history:
        (row,) = [row for row in history.trials() if row.trial_id == best]
        history.put(row.updated(status="failed", metrics={}, error="loss became nan at step 1"))
    assert lab.sweep(*own, "--resume") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["best"] is None and told["adapter"] is None
    assert "loss became nan at step 1" in lab.report()


@pytest.fixture
def in_the_background() -> Iterator[None]:
    """As a script starts `rayfin ... &`: Ctrl-C is not for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_background")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_ends_a_command_in_the_background(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starting(*_: Any) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    monkeypatch.setattr(hardware, "cluster_address", starting)
    assert main(["serve", "model.name=tiny", f"storage={tmp_path}"]) == code
    with _signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.is_set(), "what is ignored stays so"
        os.kill(os.getpid(), number)
        assert stop.is_set()


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """Python's own handler of Ctrl-C, whatever another test's library has put in its place."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if before is not None:  # it can be put back
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_what_ends_a_run_leaves_no_row_running(
    lab: Lab, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, a supervisor's word, and a terminal that is closed."""

    def interrupted(_: Any, report: Callable[[TrialResult], Any], **__: Any) -> TrialResult:
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    monkeypatch.setattr(trial, "run_trial", interrupted)
    assert main(["train", *lab.settings, f"train.seed={number}", "publish=null"]) == code
    with History.open(f"sqlite:///{lab.storage / 'history.sqlite'}") as history:
        row = history.trials(newest_first=True, limit=1)[0]
    assert row.spec["train"]["seed"] == number and row.status == "interrupted"
    assert "driver" not in row.scenario
