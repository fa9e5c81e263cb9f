"""cluster/with_workers.py, on nodes that are made up; tests/ray/ has it on a Ray that grows."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "with_workers.py"

Bundles = list[dict[str, float]]


class Seen:
    """What is asked of the autoscaler, and what of it stood when the command began."""

    def __init__(self) -> None:
        self.requests: list[Bundles] = []
        self.standing: Bundles | None = None

    def request(self, bundles: Bundles) -> None:
        self.requests.append(bundles)

    def run(self, command: list[str]) -> int:
        self.standing = self.requests[-1]
        return 7


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cluster_with_workers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def seen(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Two living nodes of eight CPUs and a GPU each, and one that is gone."""
    resources = {"CPU": 8.0, "GPU": 1.0}
    nodes = [{"Alive": alive, "Resources": resources} for alive in (True, True, False)]
    made = Seen()
    for name, value in (("init", None), ("shutdown", None), ("nodes", nodes)):
        monkeypatch.setattr(script.ray, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(script, "request_resources", made.request)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setattr(script, "run", made.run)
    return made


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    command = [str(SCRIPT), *arguments, "--patience", "0", "--", "a", "command"]
    monkeypatch.setattr(script.sys, "argv", command)
    return script.main()


@pytest.mark.parametrize(
    ("arguments", "asked", "standing"),
    [
        (("2", "GPU"), [{"GPU": 1.0}] * 2, [{"GPU": 1.0}] * 2),
        # What comes after patience has run out would be paid for, and not be used.
        (("4", "GPU"), [{"GPU": 1.0}] * 4, [{"GPU": 1.0}] * 2),
        (("9", "CPU=4"), [{"CPU": 4.0}] * 9, [{"CPU": 4.0}] * 4),
    ],
)
def test_while_the_command_runs_what_was_found_is_asked_for(
    script: ModuleType,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    asked: Bundles,
    standing: Bundles,
) -> None:
    assert call(script, monkeypatch, *arguments) == 7
    assert seen.requests[0] == asked
    assert seen.standing == standing
    assert seen.requests[-1] == []


def test_without_any_the_command_does_not_run(
    script: ModuleType,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(script, monkeypatch, "2", "TPU") == 1
    assert capsys.readouterr().out == "0 of 2 times TPU=1 are there\n"
    assert seen.standing is None
    assert seen.requests == [[{"TPU": 1.0}] * 2, []]


def test_a_stop_while_the_command_starts_ends_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    command = [sys.executable, "-c", "import time; time.sleep(300)"]

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        """Start it, and be told to stop before anybody has the process in hand."""
        started.append(real(command))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    real = subprocess.Popen
    before = signal.signal(signal.SIGTERM, script._stop)
    try:
        monkeypatch.setattr(script.subprocess, "Popen", start)
        with pytest.raises(SystemExit) as ended:
            script.run(command)
        assert ended.value.code == 143
        assert started[0].poll() == -signal.SIGKILL
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in started:
            process.kill()
            process.wait()


def test_the_command_s_exit_code_is_returned(script: ModuleType) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert script.run([sys.executable, "-c", "raise SystemExit(7)"]) == 7
    finally:
        signal.signal(signal.SIGTERM, before)
