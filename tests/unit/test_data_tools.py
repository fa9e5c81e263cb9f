"""`rayfin data` shows data as training reads them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from rayfin.cli import main

GUIDE = Path(__file__).parents[2] / "docs" / "data-tools.md"


@pytest.fixture(autouse=True)
def _tickets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": n, "prompt": f"what is {n}", "completion": str(n)} for n in range(1, 10)]
    lines = [json.dumps(row) + "\n" for row in [*rows, {"id": 10, "prompt": "no answer"}]]
    Path("tickets.jsonl").write_text("".join(lines))


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["data", *words]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_what_the_guide_shows_is_what_the_commands_print(
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = re.findall(r"```console\n\$ rayfin data (.*?)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert blocks
    for command, shown in blocks:
        said = [line.rstrip() for line in printed(capsys, *shlex.split(command)).splitlines()]
        assert said == [line.rstrip() for line in shown.splitlines()]


def test_what_is_learned_is_marked_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    said = printed(capsys, "inspect", "data.path=tickets.jsonl", "model.name=tiny", "--samples=1")
    assert re.search(r"assistant\n\x1b\[1;32m\d<\|im_end\|>", said) and "learned:" not in said


def test_what_is_read_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """A max_length that cuts every answer off is told, and nothing is hidden by it."""
    Path("mine.yaml").write_text(
        "model: {name: tiny}\ndata: {path: tickets.jsonl, max_length: 8}\n"
    )
    found = json.loads(printed(capsys, "inspect", "mine.yaml", "--json", "--samples=2"))
    assert (found["shape"], found["rows_train"], found["rows_eval"]) == ("prompt_completion", 8, 1)
    assert found["lengths"]["longest"] > 8 and found["lengths"]["percentiles"]["p50"] > 8
    assert (found["bad_rows"], len(found["samples"])) == (1, 2)
    assert "data.max_length: 8 cuts every answer off" in found["notes"][-1]
    assert [part["learned"] for part in found["samples"][0]] == [False, True, False]


def test_wrong_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "inspect", code=2)
    assert "nothing names the data; give a file, a directory or a hub id" in said
    assert "'none.jsonl' does not exist" in printed(capsys, "inspect", "none.jsonl", code=2)
