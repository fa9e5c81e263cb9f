"""`rayfin data clean` mends what nobody means, keeps the rest, and accounts for every row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfin.cli import main
from rayfin.config import DataConfig, load_config
from rayfin.data import load_corpus
from rayfin.data.rows import Row
from rayfin.data_tools.cleaning import clean_data
from rayfin.data_tools.text_cleaning import TextCleaner


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows_of(name: str) -> list[Any]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").split("\n")[:-1]]


def clean(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """The report of a command, or its error."""
    assert main(["data", "clean", *words, *(() if code else ("--json",))]) == code
    captured = capsys.readouterr()
    return captured.err if code else json.loads(captured.out)


MEANT = (
    "def f():\n\treturn 1\n\n\nclass A:\n    x = 1",
    "    return x",
    "```diff\n a \n \n\n\n\n\n+b  \n```\nend",
    "- step\n  ~~~\n  a  \n  ~~~~\n- next",
    "👩‍🚀 ❤️‍🔥 👨‍👩‍👧 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "می‌خواهم",
    "क्‍ष र्‍",
    "สวัสดี\u200bครับ",
    "\u3000日本語　の文",
    "two  spaces | a\tb",
    "\u200fשלום",
)


@pytest.mark.parametrize("text", MEANT)
def test_what_is_meant_survives(text: str) -> None:
    cleaner = TextCleaner()
    assert cleaner.clean(text) == text and not cleaner.counts


@pytest.mark.parametrize(
    ("text", "cleaned", "kind"),
    [
        ("a\r\nb\rc\x0cd\u2028e", "a\nb\nc\nd\ne", "line-ends"),
        ("a\x00b\x07\x7f \x1b[1;31mred\x1b[0m \x1b]0;t\x07x", "ab red x", "control-characters"),
        ("press \x1bThen\x1bM go", "press Then go", "control-characters"),
        ("\x1b]0;t\nall this\x07", "]0;t\nall this", "control-characters"),
        ("don\x92t \x93so\x94\x85", "don’t “so”…", "control-characters"),
        ("\ufeffa\ufeffb\u200bc\u2060d\xade", "abcde", "invisible-characters"),
        ("Auf\u200clage, a\u200d b", "Auflage, a b", "invisible-characters"),
        ("10\xa0000\u202f€\u2009x", "10 000 € x", "special-spaces"),
        ("a  \nb\t\n\tc \u3000", "a\nb\n\tc", "trailing-spaces"),
        (" Hello", "Hello", "trailing-spaces"),
        ("\n \n  a\n\n\n\n\n\nb\n\n", "  a\n\n\nb", "blank-lines"),
        ("```\na \n\n\n\n\n``` \n\n\n\n\n\nb", "```\na \n\n\n\n\n```\n\n\nb", "blank-lines"),
        ("\ufeff \u200b\n\x00", "", "invisible-characters"),
    ],
)
def test_what_nobody_means_goes_unless_it_is_kept(text: str, cleaned: str, kind: str) -> None:
    cleaner = TextCleaner()
    assert cleaner.clean(text) == cleaned and cleaner.counts[kind] > 0
    assert cleaner.clean(cleaned) == cleaned
    assert TextCleaner([kind]).clean(text) != cleaned


@pytest.mark.parametrize(
    "piece", ["```\n", " \t", "\n \n", "\n~~~\n```", "\x1b]", "\u200c", "\x1b[1;"]
)
def test_long_runs_are_cleaned_in_one_pass(piece: str) -> None:
    """A pattern that looks back or ahead at every place would not end within the test's bound."""
    assert TextCleaner().clean(f"{piece * 300_000}\nx\xad").endswith("x")


def test_unicode_is_normalised_on_request_only() -> None:
    assert TextCleaner().clean("e\u0301ﬁ") == "e\u0301ﬁ"
    assert TextCleaner(unicode_form="NFC").clean("e\u0301ﬁ ") == "éﬁ"
    assert TextCleaner(unicode_form="NFKC").clean("e\u0301ﬁ") == "éfi"


def test_no_row_is_lost_and_those_left_out_can_be_mended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 1, "prompt": "how ", "completion": "So.\r\n", "note": "as\xa0it is "},
        {"id": 2, "prompt": "nothing", "completion": "\u200b\n"},
        {"id": 3, "prompt": "null", "completion": None},
        {"id": 4, "prompt": "short", "completion": "k"},
        {"id": 5, "prompt": "long", "completion": "k" * 9},
        {"id": 6, "prompt": "other"},
        {"id": 7, "prompt": "clean", "completion": "yes"},
    ]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    broken = [
        b'{"id": 8, "prompt": "open, "completion": "x"}\n',
        b'{"prompt": "\xe9"}\n',
        b"word\n",
    ]
    Path("raw.jsonl").write_bytes(b"".join([*lines, *broken]))
    words = ["raw.jsonl", "--output=new.jsonl", "--min-chars=2", "--max-chars=8"]
    report = clean(capsys, *words)
    assert rows_of("new.jsonl") == [{**rows[0], "prompt": "how", "completion": "So."}, rows[6]]
    aside = Path("new.left_out.jsonl").read_bytes().splitlines(keepends=True)
    assert [json.loads(line) for line in aside[:5]] == rows[1:6]
    assert aside[5:] == [*broken[:2], b'{"unreadable": "word"}\n']
    assert (report["rows"], report["written"], report["left_out_rows"]) == (10, 2, 8)
    expected = {"empty": 2, "too short": 1, "too long": 1, "unusable": 1, "unreadable": 3}
    assert report["reasons"] == expected
    assert [each["line"] for each in report["left_out"]] == [2, 3, 4, 5, 6, 8, 9, 10]
    assert [each["left_out_line"] for each in report["left_out"]] == list(range(1, 9))
    assert report["left_out"][2]["reason"] == "the answer has 1 character, fewer than --min-chars=2"
    assert report["changes"]["line-ends"] == {"rows": 1, "places": 1, "first": ["raw.jsonl:1"]}
    assert (report["changed"], report["keep"]) == (1, [])
    assert json.loads(Path("new.report.json").read_text(encoding="utf-8")) == report

    mended = [json.dumps({"prompt": f"q {n}", "completion": "mended"}) + "\n" for n in range(8)]
    Path("new.left_out.jsonl").write_text("".join(mended))
    clean(capsys, "new.left_out.jsonl", "--output=more.jsonl")
    assert len(rows_of("more.jsonl")) == 8 and not Path("more.left_out.jsonl").exists()
    Path("raw.jsonl").unlink()
    corpus = load_corpus(DataConfig(path="."))
    assert len(corpus.train) + len(corpus.eval) == 10
    assert any("not read: new.left_out.jsonl" in note for note in corpus.notes)


def test_what_is_printed_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text(
        "question,answer,tag\nhow?,so\xa0,1\nwhat?,,2\ncells,two\n\x07x,y,3\ns,\ufffd,4\n"
        '"open,x,5\nlost,y,6\nlost,y,7\nlost,y,8\n',
        encoding="utf-8",
    )
    assert main(["data", "clean", "t.csv", "--output=t.jsonl", "data.on_bad_row=error"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("t.jsonl: 3 of 9 rows; left out: 1 empty, 5 unreadable\n")
    assert "- changed: 2 rows: " in said and "special-spaces in 1" in said
    assert "- 1 row with U+FFFD, for characters that were lost before, first t.csv:6;" in said
    assert "- no effect on what is written: data.on_bad_row\n" in said
    assert "- left out: t.csv:7: " in said and "more" not in said, (
        "all are told, 4 rows in one line"
    )
    assert said.endswith("t.left_out.jsonl has the rows left out, t.report.json all reasons\n")
    assert rows_of("t.jsonl")[1] == {"question": "x", "answer": "y", "tag": "3"}
    assert rows_of("t.left_out.jsonl")[1:] == [
        {"unreadable": "cells,two"},
        {"unreadable": '"open,x,5\nlost,y,6\nlost,y,7\nlost,y,8'},
    ]


def test_conversations_are_cleaned_turn_by_turn(capsys: pytest.CaptureFixture[str]) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": " \\u00a0"}'}}
    tools = [{"type": "function", "function": {"name": "f", "description": "d\xa0 "}}]
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be\xa0brief. "},
        {"role": "user", "content": [{"type": "text", "text": "Hi\u200b"}, "all\r"]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3\r\n"},
        {"role": "assistant", "content": "Three ", "weight": 0},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "\ufeffFour"},
    ]
    expected = json.loads(json.dumps(turns))
    for number, text in ((0, "Be brief."), (3, "3"), (4, "Three"), (6, "Four")):
        expected[number]["content"] = text
    expected[1]["content"] = [{"type": "text", "text": "Hi"}, "all"]
    empty = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\ufeff"}]
    rows = [{"messages": turns, "tools": tools, "id": " 1 "}, {"messages": empty}]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = clean(capsys, "chat.jsonl", "--output=new.jsonl", "--min-chars=4")
    assert rows_of("new.jsonl") == [{"messages": expected, "tools": tools, "id": " 1 "}]
    assert report["reasons"] == {"empty": 1}
    said = [
        {"from": "human", "value": "a\r"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": " "}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "b "},
    ]
    pairs = [["q ", "a"], ["r", "s "]]
    others: dict[str, tuple[Any, Any]] = {
        "conversations": (said, [{**said[0], "value": "a"}, *said[1:3], {**said[3], "value": "b"}]),
        "dialog": ([{"human": "a ", "bot": "b\r"}], [{"human": "a", "bot": "b"}]),
    }
    for name, (before, after) in others.items():
        Path("x.jsonl").write_text(json.dumps({name: before}) + "\n")
        clean(capsys, "x.jsonl", f"--output={name}.jsonl")
        assert rows_of(f"{name}.jsonl") == [{name: after}]
    Path("x.jsonl").write_text(
        json.dumps({"instruction": "i ", "output": "o\r", "history": pairs}) + "\n"
    )
    clean(capsys, "x.jsonl", "--output=history.jsonl")
    assert rows_of("history.jsonl") == [
        {"instruction": "i", "output": "o", "history": [["q", "a"], ["r", "s"]]}
    ]
    cell = json.dumps([{"role": "user", "content": "a "}, {"role": "assistant", "content": "b"}])
    Path("x.jsonl").write_text(json.dumps({"messages": cell}) + "\n")
    clean(capsys, "x.jsonl", "--output=cell.jsonl")
    assert rows_of("cell.jsonl") == [{"messages": cell.replace("a ", "a")}]


def test_what_cannot_be_told_of_a_row_does_not_end_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bad row that is nested too deeply for a report, or has numbers that JSON lacks."""
    deep = '{"prompt": "a", "x": ' + "[" * 600 + "]" * 600 + "}\n"
    row = '{"prompt": "a", "completion": "b", "x": 1e999}\n'
    Path("x.jsonl").write_text(deep + '{"prompt": "b", "x": [1e999]}\n' + row)
    words = ["x.jsonl", "data.on_bad_row=skip"]
    assert main(["data", "convert", *words, "--output=c.jsonl"]) == 0
    assert main(["data", "dedupe", *words, "data.ignore_columns=[x]", "--output=d.jsonl"]) == 0
    assert "- not written, as JSON has no form for it: x\n" in capsys.readouterr().out
    for name in "cd":
        lost = json.loads(Path(f"{name}.report.json").read_text())["left_out"]
        assert "row" not in lost[0] and lost[1]["row"] == {"prompt": "b", "x": ["(inf)"]}
        assert rows_of(f"{name}.jsonl") == [{"prompt": "a", "completion": "b"}]
    Path("x.jsonl").write_text(row)
    said = clean(capsys, "x.jsonl", "--output=e.jsonl", code=2)
    assert "the column 'x' holds inf, for which JSON has no form; leave it out with" in said


@pytest.mark.parametrize(
    ("content", "words", "says"),
    [
        ("", [], "'x.jsonl' is empty"),
        (
            '{"prompt": "a", "completion": "\u200b"}\n',
            [],
            "has no valid row (the first: x.jsonl:1: completion is",
        ),
        ('{"text": "abc"}\n', ["--min-chars=4"], "no row would remain: 1 too short; nothing is"),
        ('{"text": "a"}\n', ["--min-chars=0"], "--min-chars: 0 is not allowed; give 1 or more"),
        ('{"text": "a"}\n', ["--max-chars=4", "--min-chars=5"], "--max-chars: 4 is less than"),
        ('{"text": "a"}\n', ["--output=there.jsonl"], "'there.left_out.jsonl' exists"),
        ('{"text": "a"}\n', ["--output=/dev/null/y.jsonl"], "can't be written (File exists); give"),
        ('{"text": "a"}\n', ["data.ignore_columns=[b]"], "no row has 'b'"),
    ],
)
def test_what_cannot_be_cleaned_is_refused(
    capsys: pytest.CaptureFixture[str], content: str, words: list[str], says: str
) -> None:
    Path("x.jsonl").write_text(content, encoding="utf-8")
    Path("there.left_out.jsonl").write_text("mine")
    before = sorted(Path().iterdir())
    said = clean(capsys, "x.jsonl", "--output=new.jsonl", *words, code=2)
    assert says in said and said.count("\n") == 1
    assert sorted(Path().iterdir()) == before


def test_equal_rows_are_no_reason_to_leave_one_out(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.jsonl").write_text('{"text": "a "}\n' * 9)
    report = clean(capsys, "x.jsonl", "--output=new.jsonl", "--keep=trailing-spaces")
    assert (report["written"], report["changed"]) == (9, 0)
    assert rows_of("new.jsonl") == [{"text": "a "}] * 9


def test_rows_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first thousand, by which their format is found."""
    alive = most = 0

    class Counted(dict[str, Any]):
        def __init__(self, *args: Any, **values: Any) -> None:
            nonlocal alive, most
            super().__init__(*args, **values)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def rows(*_: object) -> Iterator[Row]:
        for n in range(5000):
            yield Row("x.jsonl", n + 1, Counted(text="a" * (n % 3)))

    Path("x.jsonl").write_text("{}")
    monkeypatch.setattr("rayfin.data_tools.row_files.read_rows", rows)
    report = clean_data(load_config(None, ["data.path=x.jsonl"]), Path("new.jsonl"))
    assert (report["written"], report["left_out_rows"]) == (3333, 1667)
    assert 1000 <= most < 1010


_KILLED = """
import os, signal, sys
from rayfin.cli import main
from rayfin.data_tools.row_files import RowWriter
whole, lines = RowWriter.line, []
def line(self, value):
    lines.append(value)
    if len(lines) == 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, value)
for command in sys.argv[1:]:
    if (child := os.fork()) == 0:
        RowWriter.line = line
        os._exit(main(["data", *command.split()]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.long
def test_a_killed_command_leaves_the_data_and_no_half_of_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the next one succeeds and clears away what it left."""
    lines = [json.dumps({"prompt": f"ask {n}", "completion": f"{n} "}) for n in range(200)]
    Path("x.jsonl").write_text("\n".join(lines))
    content = Path("x.jsonl").read_bytes()
    commands = [
        "clean x.jsonl --output clean.jsonl",
        "convert x.jsonl --output converted.jsonl",
        "split x.jsonl --output parts",
    ]
    process = [sys.executable, "-W", "ignore", "-c", _KILLED, *commands]
    ended = subprocess.run(process, capture_output=True, text=True, timeout=540, check=True)
    assert ended.stdout.split() == ["-9"] * 3, ended.stderr
    left = [path.name for path in Path().iterdir() if path.name != "x.jsonl"]
    assert len(left) >= 3 and all(name.startswith(".") for name in left)
    for command in commands:
        assert main(["data", *command.split()]) == 0
    capsys.readouterr()
    assert not [path.name for path in Path().iterdir() if path.name.startswith(".")]
    assert len(rows_of("clean.jsonl")) == len(rows_of("converted.jsonl")) == 200
    assert len(rows_of("parts/train.jsonl")) + len(rows_of("parts/validation.jsonl")) == 200
    assert Path("x.jsonl").read_bytes() == content


def test_turns_that_a_table_spells_as_json_are_written_as_lists(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In JSON Lines, JSON text is text."""
    turns = [[{"role": role, "content": "Hm."}] for role in ("user", "assistant")]
    cells = ",".join('"' + json.dumps(each).replace('"', '""') + '"' for each in turns)
    Path("a.csv").write_text(f"prompt,completion\n{cells}\nWhat?,[1]\n")
    report = clean(capsys, "data.path=a.csv", "--output=b.jsonl")
    assert rows_of("b.jsonl")[0] == dict(zip(("prompt", "completion"), turns, strict=True))
    assert rows_of("b.jsonl")[1] == {"prompt": "What?", "completion": "[1]"}
    assert len([note for note in report["notes"] if "1 row read as turns" in note]) == 2
    found = [load_corpus(DataConfig(path=name)).digest for name in ("a.csv", "b.jsonl")]
    assert found[0] == found[1]
