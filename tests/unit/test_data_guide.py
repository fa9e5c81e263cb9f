"""What docs/data.md shows is what the commands print."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfin.cli import main

GUIDE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def shown_in(section: str) -> Iterator[tuple[str, list[str]]]:
    """(command, the lines that are shown beneath it) of a section of the guide."""
    text = re.split(r"^## ", GUIDE.partition(f"## {section}\n")[2], flags=re.MULTILINE)[0]
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for shown in block.removeprefix("$ ").split("\n$ "):
            command, *lines = shown.splitlines()
            yield command, lines


def write_rows(path: Path, first: int, count: int) -> None:
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_directories_and_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("support").mkdir()
    for first, (name, count) in enumerate((("train", 8), ("validation", 2), ("test", 2))):
        write_rows(Path(f"support/{name}.jsonl"), 100 * first, count)
    shown = dict(shown_in("Directories and splits"))
    assert (
        sorted(path.name for path in Path("support").iterdir())
        == shown.pop("ls support")[0].split()
    )
    assert len(shown) == 3
    for command, lines in shown.items():
        assert main(shlex.split(command)[1:]) == 0
        told = capsys.readouterr().err.splitlines()
        assert told[: len(lines)] == lines
    capsys.readouterr()
    assert main(["history", "show", "train-", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["scenario"]["data"]
    assert (data["rows_train"], data["rows_eval"], data["eval_split"]) == (8, 2, "validation")
    assert data["notes"] == next(iter(shown.values()))


@pytest.mark.parametrize(
    "section",
    [
        *("Layouts of rows", "What is not learned", "Rows that are left out"),
        "Files and encodings",
    ],
)
def test_columns_and_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    section: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = [{"prompt": f"what is {n}", "completion": str(n)} for n in range(8)]
    turns = [("user", "prompt"), ("assistant", "completion")]
    tickets: list[dict[str, Any]] = [
        {"id": n, "messages": [{"role": role, "content": row[name]} for role, name in turns]}
        for n, row in enumerate(plain)
    ]
    tickets[2]["messages"][0]["name"] = "Ann"
    long = [{**row, "prompt": row["prompt"] * (20 if n == 2 else 1)} for n, row in enumerate(plain)]
    long[4]["completion"] *= 100
    for name, rows in {
        "labels": [{**row, "label": True} for row in plain],
        "mails": [{"mail": row["prompt"], "reply": f"it is {n}"} for n, row in enumerate(plain)],
        "tickets": tickets,
        "long": [*long, {"prompt": "no answer"}],
    }.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(f"{name}.jsonl").write_text(text)
    for name, encoding, rows in (
        ("faq", "utf-8", ["Question,Answer", *(f"q {n},a {n}" for n in range(8))]),
        (
            "chinese",
            "gb18030",
            ["prompt,completion", *(f"第{n}个问题是什么？,是的。" for n in range(8))],
        ),
        ("italian", "windows-1252", ["prompt,completion", *(f"è {n}?,più" for n in range(8))]),
    ):
        Path(f"{name}.csv").write_text("\n".join(rows), encoding=encoding)
    shown = list(shown_in(section))
    assert shown
    for command, lines in shown:
        refused = any(line.startswith("rayfin:") for line in lines)
        assert main(shlex.split(command)[1:]) == (2 if refused else 0)
        err = capsys.readouterr().err.splitlines()
        assert [line for line in err if line.startswith(("data:", "rayfin:"))] == lines


def test_a_sweep_says_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, however many of its settings read the same data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rayfin.tuning.tune.run_trials", lambda *_, **__: True)
    for name in ("train", "dev"):
        write_rows(tmp_path / f"{name}.jsonl", 0, 3)
    settings = ["model.name=tiny", "method.type=lora", "sweep.parameters.data.max_length=[64, 128]"]
    assert main(["sweep", f"data.path={tmp_path}", *settings]) == 1
    told = capsys.readouterr().err
    assert told.count("trains on 3 rows of train.jsonl, evaluates on 3 rows of dev.jsonl") == 1
    assert told.count("3 of the 3 rows evaluated on are trained on, too") == 1
