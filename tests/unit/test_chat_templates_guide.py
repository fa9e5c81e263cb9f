"""What docs/chat-templates.md shows is what the commands print."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from rayfin.cli import main
from rayfin.models.chat_templates import template_names

GUIDE = (Path(__file__).parents[2] / "docs" / "chat-templates.md").read_text(encoding="utf-8")


def test_the_guide_has_the_templates_that_there_are() -> None:
    assert tuple(re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)) == template_names()


def test_the_guide_s_commands_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (row,) = re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)
    value = json.loads(row)
    lines = []
    for count in range(8):
        value["messages"][2]["content"] = str(count)
        lines.append(json.dumps(value) + "\n")
    Path("calls.jsonl").write_text("".join(lines))
    blocks = re.findall(r"```console\n\$ (.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        command, *shown = block.splitlines()
        refused = shown[0].startswith("rayfin:")
        assert main(shlex.split(command)[1:]) == (2 if refused else 0)
        err = capsys.readouterr().err.splitlines()
        assert [line for line in err if line.startswith(("data:", "rayfin:"))] == shown
