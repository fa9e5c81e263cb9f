"""`experiments/serve_adapters.py`, as a user runs it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_two_adapters_are_trained_served_and_switched(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    environment.pop("RAY_ADDRESS", None)
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "experiments" / "serve_adapters.py"),
            "model.name=tiny",
            f"storage={tmp_path}",
            f"deployment.port={port}",
        ],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    _, _, shown = run.stdout.partition("Everybody at once")
    at_once, _, in_turn = shown.partition("One after the other")
    assert re.findall(r"^  (\S+) +[\d.]+ s", at_once, re.M) == [
        "tiny",
        "pydocs-p-tuning@1",
        "pydocs-lora@1",
    ]
    switched = re.findall(r"^  (\S+) +[\d.]+ s", in_turn, re.M)
    assert switched == ["pydocs-p-tuning@1", "pydocs-lora@1"] * 3
