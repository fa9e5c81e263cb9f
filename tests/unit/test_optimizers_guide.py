"""What docs/optimizers.md shows is what the commands say, and its tables have all that there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest

from rayfin.cli import main
from rayfin.config.optimizers import OPTIMIZERS, Schedule

GUIDE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")


def rows(section: str) -> list[list[str]]:
    """The cells of the rows of a section's table."""
    text = GUIDE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_what_is_refused_is_said_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```console\n(.*?)```", GUIDE, re.DOTALL)
    shown = [it for block in blocks for it in block.removeprefix("$ ").split("\n$ ")]
    assert len(shown) == 5
    for command, *lines in map(str.splitlines, shown):
        assert main(shlex.split(command)[1:]) == 2
        assert capsys.readouterr().err.splitlines() == lines


def test_every_optimizer_stands_with_what_it_takes() -> None:
    told: dict[str, list[str]] = {}
    before = ""
    for names, _, takes in rows("Optimizers"):
        before = before if takes == "the same" else takes
        told |= {name: [before, names] for name in re.findall(r"`(\w+)`", names)}
    assert set(told) == set(OPTIMIZERS)
    for name, facts in OPTIMIZERS.items():
        takes, names = told[name]
        assert ("(GPU)" in names) == facts.paged, name
        mentioned = set(re.findall(r"`(\w+)`", takes)) - {"optim_args"}
        wanted = {*facts.arguments} | ({*facts.settings} if "AdamW's" not in takes else set())
        assert mentioned == wanted, name


def test_every_schedule_stands_with_what_it_takes() -> None:
    from rayfin.training.schedules import _arguments

    told: dict[str, Any] = {}
    for names, takes in rows("Schedules"):
        for name in re.findall(r"`(\w+)`", names):
            told[name] = re.findall(r"`(\w+)`", takes)
    assert set(told) == set(get_args(Schedule))
    for name, arguments in told.items():
        assert set(arguments) == set(_arguments(name)), name
