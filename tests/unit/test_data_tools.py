"""`rayfin data` shows data as training reads them, divides and converts them, and loses no row."""

from __future__ import annotations

import json
import re
import shlex
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayfin.cli import main
from rayfin.cli.completion import DataCompleter
from rayfin.config import DataConfig, load_config
from rayfin.data import load_corpus
from rayfin.data_tools.new_files import write_new
from rayfin.data_tools.row_files import RowStream, RowWriter
from rayfin.samples import Example

GUIDE = Path(__file__).parents[2] / "docs" / "data-tools.md"


PASSWORD = "How do I reset my password when I have lost the phone that I signed up with?"
INVOICE = "Can I pay by invoice?"
FAQ = """# Support

Our most common questions.

## How do I reset my password?

Open **Settings**, then *Security*.

```
# not a heading
```

## Billing

### Can I pay by invoice?
Yes, from 100 seats on.

### Who can see the invoices?
"""


@pytest.fixture(autouse=True)
def _tickets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": n, "prompt": f"what is {n}", "completion": str(n)} for n in range(1, 10)]
    Path("faq.md").write_text(FAQ)
    lines = [json.dumps(row) + "\n" for row in [*rows, {"id": 10, "prompt": "no answer"}]]
    Path("tickets.jsonl").write_text("".join(lines))
    answers = ("Open\xa0**Settings**.\r\n", "\u200b", "```python\nif x:\n\tgo()  \n```\n", "k")
    lines = [json.dumps({"prompt": "How?", "completion": answer}) for answer in answers]
    Path("scraped.jsonl").write_text("\n".join([*lines, '{"prompt": "Why?", "completion']))
    asked = (PASSWORD, INVOICE, PASSWORD, PASSWORD.replace("my ", "the "), "Is there a discount?")
    for name, prompts in (("questions", asked), ("held", [INVOICE])):
        pairs = [json.dumps({"prompt": each, "completion": "See Settings."}) for each in prompts]
        Path(f"{name}.jsonl").write_text("\n".join(pairs))


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["data", *words]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_what_the_guide_shows_is_what_the_commands_print(
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = re.findall(r"```console\n\$ rayfin data (.*?)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 6
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
    """A max_length that cuts every answer off is told beside the lengths; no sample is trained."""
    Path("mine.yaml").write_text(
        "model: {name: tiny}\ndata: {path: tickets.jsonl, max_length: 8}\n"
    )
    found = json.loads(printed(capsys, "inspect", "mine.yaml", "--json", "--samples=2"))
    assert (found["shape"], found["rows_train"], found["rows_eval"]) == ("prompt_completion", 8, 1)
    assert found["lengths"]["longest"] > 8 and found["lengths"]["percentiles"]["p50"] > 8
    assert (found["bad_rows"], found["samples"]) == (1, [])
    assert "data.max_length: 8 cuts every answer off" in found["notes"][-1]
    found = json.loads(printed(capsys, "inspect", "mine.yaml", "data.max_length=99", "--json"))
    assert [part["learned"] for part in found["samples"][0]] == [False, True, False]


def test_wrong_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "inspect", code=2)
    assert "nothing names the data; give a file, a directory or a hub id" in said
    assert "'none.jsonl' does not exist" in printed(capsys, "inspect", "none.jsonl", code=2)


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_split_loses_no_row_and_parts_no_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    """And training takes the files for what they are."""
    rows = [
        {"prompt": f"ask {n // 2}", "completion": f"\u00e4 {n}", "id": n, "extra": {"k": [n, None]}}
        for n in range(100)
    ]
    Path("rows.json").write_text(json.dumps([*rows, {"prompt": "none"}]))
    words = ["split", "rows.json", "--output=parts", "--test-size=0.2", "data.on_bad_row=skip"]
    report = json.loads(printed(capsys, *words, "--json"))
    parts = {name: rows_of(f"parts/{name}.jsonl") for name in ("train", "validation", "test")}
    assert sorted((r for part in parts.values() for r in part), key=lambda r: r["id"]) == rows
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 70,
        "validation": 10,
        "test": 20,
    }
    prompts = [{row["prompt"] for row in part} for part in parts.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert [part["id"] for part in parts["train"]] == sorted(r["id"] for r in parts["train"])
    assert (report["rows"], report["left_out"][0]["row"]) == (101, {"prompt": "none"})
    corpus = load_corpus(DataConfig(path="parts", ignore_columns=("id", "extra")))
    assert (len(corpus.train), len(corpus.eval), corpus.eval_split) == (70, 10, "validation")
    assert corpus.notes[1:] == ("data: not read: test.jsonl (split test)",)


def test_a_command_that_is_ended_leaves_no_half_of_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(Path().iterdir())

    def killed(_: RowWriter, path: Path, values: Any) -> int:
        path.write_bytes(b"half")
        if path.name in ("train.jsonl",):
            return 0
        raise KeyboardInterrupt

    monkeypatch.setattr("rayfin.data_tools.row_files.RowWriter.write", killed)
    for words in (
        ["split", "tickets.jsonl", "--output=parts", "data.on_bad_row=skip"],
        ["convert", "faq.md", "--output=out.jsonl"],
    ):
        assert main(["data", *words]) == 130
    left = [path.name for path in sorted(Path().iterdir()) if path not in before]
    assert left == []


def test_what_killed_commands_left_is_removed(capsys: pytest.CaptureFixture[str]) -> None:
    """But nothing that another command is still writing, and nothing of another name."""
    Path(".parts-0badcafe").mkdir()
    Path(".parts-0badcafe/train.jsonl").write_text("half")
    others = [Path(".out.jsonl-0badcafe"), Path(".out.report.json-0badcafe")]
    for path in others:
        path.write_text("half")
    with write_new(Path("out.jsonl")) as written:
        written.write_text("whole")
        printed(capsys, "convert", "faq.md", "--output=out.jsonl")
        assert written.read_text() == "whole" and not any(path.exists() for path in others)
        Path("out.jsonl").unlink()
    printed(capsys, "split", "tickets.jsonl", "--output=parts", "data.on_bad_row=skip")
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []
    assert Path("out.jsonl").read_text() == "whole"


_PAIRS = "data.format=prompt_completion"


@pytest.mark.parametrize(
    ("content", "words", "says"),
    [
        ("", ["split", "x.jsonl", "--output=o"], "'x.jsonl' is empty"),
        (
            '{"prompt": "a", "completion": "b"}\n' * 9,
            ["split", "x.jsonl", "--output=o"],
            "'x.jsonl' has too few different rows for a validation split",
        ),
        ('{"text": "a"}', ["split", "x.jsonl", "--output=o", "--val-size=1"], "val_size 1 and"),
        ('{"text": "a"}', ["split", "x.jsonl", "--output=faq.md"], "'faq.md' exists"),
        (
            '{"text": "a"}\n{"text": "b"}\n',
            ["split", "x.jsonl", "--output=/dev/null/y"],
            "'/dev/null/y' can't be written (File exists); give --output a place that",
        ),
        ("", ["convert", "x.jsonl", "--output=o.jsonl"], "'x.jsonl' is empty"),
        ('{"text": "a"}', ["convert", "x.jsonl", "--output=o.csv"], "'o.csv' is no JSON Lines"),
        ('{"text": "a"}', ["convert", "x.jsonl", "--output=tickets.jsonl"], "jsonl' exists"),
        ("just words", ["convert", "x.md", "--output=o.jsonl"], "'x.md' has no question: neither"),
        (
            '{"prompt": "a"}\n',
            ["convert", "x.jsonl", "--output=o.jsonl", "data.on_bad_row=skip", _PAIRS],
            "'x.jsonl' has no valid row (the first: x.jsonl:1: completion missing",
        ),
        (
            '[{"text": "a"}]',
            ["convert", "x.report.json", "--output=x.jsonl"],
            "'x.report.json' exists; give --output",
        ),
        ("# Only\n", ["convert", "x.md", "--output=o.jsonl"], "no question with an answer: line 1"),
    ],
)
def test_what_cannot_be_written_is_refused(
    capsys: pytest.CaptureFixture[str], content: str, words: list[str], says: str
) -> None:
    Path(words[1]).write_text(content)
    before = sorted(Path().iterdir())
    said = printed(capsys, *words, code=2)
    assert says in said and said.count("\n") == 1
    assert sorted(Path().iterdir()) == before


def test_any_format_becomes_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same samples, with what is not learned of them."""
    talk = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello", "weight": 0},
        {"from": "human", "value": "1+1?"},
        {"from": "gpt", "value": "2"},
    ]
    Path("talks.json").write_text(
        json.dumps([{"conversations": t, "id": 1} for t in (talk, talk[1:])])
    )
    Path("table.csv").write_text("question,answer\n" + "".join(f"q {n},{n}\n" for n in range(4)))
    for name, shape in (("talks.json", "messages"), ("table.csv", "prompt_completion")):
        target = Path(name).with_suffix(".jsonl")
        report = json.loads(printed(capsys, "convert", name, f"--output={target}", "--json"))
        assert report["format"] == shape and report["left_out"] == []
        old, new = (
            load_corpus(DataConfig(path=str(path), split="all")) if path.exists() else None
            for path in (Path(name), target)
        )
        assert old is not None and new is not None and old.digest == new.digest
    assert rows_of("talks.jsonl")[0]["messages"][2] == {
        "role": "assistant",
        "content": "Hello",
        "weight": 0,
    }


_SECTIONS = ("Billing", "Shipping")

MARKED = """Intro
Q: Where is it?
A: In the box.

Look again.
**Q2:** And now?
**A2:** **Here.**
- Question: Unanswered?
Q. Last?
A. Yes: A list
a. one
"""


def test_a_page_whose_questions_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("page.md").write_text(MARKED)
    report = json.loads(printed(capsys, "convert", "page.md", "--output=page.jsonl", "--json"))
    assert [tuple(row.values()) for row in rows_of("page.jsonl")] == [
        ("Where is it?", "In the box.\n\nLook again."),
        ("And now?", "**Here.**"),
        ("Last?", "Yes: A list\na. one"),
    ]
    assert [(each["line"], each["reason"]) for each in report["left_out"]] == [
        (1, "text before the first question"),
        (8, "the question 'Unanswered?' has no answer"),
    ]


def test_a_split_of_a_table_keeps_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are not trained on, too; what JSON has no form for is refused by its name."""
    day = date(2026, 11, 30)
    columns = {
        "prompt": [f"ask {n}" for n in range(4)],
        "completion": ["b"] * 4,
        "id": [7] * 4,
        "at": [day] * 4,
        "score": [float("nan")] * 4,
        "skipped": ["kept"] * 4,
    }
    table = pa.table(columns)
    pq.write_table(table, "t.parquet")
    with pa.ipc.new_file("t.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("t.parquet", "t.arrow"):
        to = name.removeprefix("t.")
        printed(capsys, "split", name, f"--output={to}", "data.ignore_columns=[skipped]")
        rows = rows_of(f"{to}/train.jsonl") + rows_of(f"{to}/validation.jsonl")
        rest = {"id": 7, "at": "2026-11-30", "score": None, "skipped": "kept"}
        assert sorted(rows, key=lambda row: str(row["prompt"])) == [
            {"prompt": f"ask {n}", "completion": "b", **rest} for n in range(4)
        ]
    pq.write_table(table.append_column("photo", pa.array([b"\x89PNG"] * 4)), "t.parquet")
    said = printed(capsys, "split", "t.parquet", "--output=refused", code=2)
    assert "the column 'photo' holds a value of type bytes" in said
    assert "leave it out with data.ignore_columns=[photo]" in said
    assert not Path("refused").exists()
    said = printed(
        capsys, "split", "t.parquet", "--output=pale", "data.ignore_columns=[photo,skipped]"
    )
    assert "- not written, as JSON has no form for it: photo\n" in said
    assert rows_of("pale/train.jsonl") and all(
        "photo" not in row and row["skipped"] == "kept" for row in rows_of("pale/train.jsonl")
    )


def test_what_was_guessed_and_what_has_no_effect_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And rows that an open quote swallowed are counted."""
    lines = ["question,answer,id", *(f"q {n},a,{n}" for n in range(4)), '"open,a,5', "q 6,a,6"]
    Path("t.csv").write_text("\n".join(lines) + "\n")
    words = ["data.on_bad_row=skip", "data.max_samples=2", "model.name=tiny"]
    for command, output in (("split", "parts"), ("convert", "t.jsonl")):
        said = printed(capsys, command, "t.csv", f"--output={output}", *words)
        assert "- read as prompt_completion (prompt=question, completion=answer)\n" in said
        assert "- not used, and not trained on: id;" in said
        assert "- no effect on what is written: data.max_samples, model\n" in said
    report = json.loads(Path("t.report.json").read_text())
    assert (report["rows"], report["written"], report["left_out"][0]["rows"]) == (6, 4, 2)
    assert len(report["notes"]) == 3


def test_what_is_told_of_a_page_holds_no_commands_to_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("page.md").write_text("# A\nyes\n# \x1b[2J\n")
    said = printed(capsys, "convert", "page.md", "--output=page.jsonl")
    assert "the heading '\ufffd[2J' has no answer" in said


@pytest.mark.parametrize(
    ("page", "rows", "reasons"),
    [
        (
            "## Billing\nQ: a\nA: b\n\n## Shipping\nQ: c\nA: d\n",
            [("a", "b"), ("c", "d")],
            [f"heading of the section '{n}', whose questions are marked" for n in _SECTIONS],
        ),
        (
            "Q: a\u2028b\x0cc\nA: d\n\n```\nQ: code\n```\n",
            [("a\u2028b\x0cc", "d\n\n```\nQ: code\n```")],
            [],
        ),
        ("# a\u2028\u0085b\nc\n# d\ne\n", [("a\u2028\u0085b", "c"), ("d", "e")], []),
        (
            "Q: Which?\nA. Red\nB. Blue\nA: Red\n",
            [("Which?\nA. Red\nB. Blue", "Red")],
            [],
        ),
        (
            "# How?\nSo.\n\nQuestion: why so?\n# When?\nNow.\n# Who?\nWe.\n",
            [("How?", "So.\n\nQuestion: why so?"), ("When?", "Now."), ("Who?", "We.")],
            [],
        ),
        (
            "## Q: How?\nA: So.\n\n## Q2. When?\n**A:** Now.\n",
            [("How?", "So."), ("When?", "Now.")],
            [],
        ),
    ],
)
def test_marks_and_headings_of_a_page(
    capsys: pytest.CaptureFixture[str],
    page: str,
    rows: list[tuple[str, str]],
    reasons: list[str],
) -> None:
    Path("page.md").write_text(page, encoding="utf-8")
    report = json.loads(printed(capsys, "convert", "page.md", "--output=page.jsonl", "--json"))
    assert [tuple(row.values()) for row in rows_of("page.jsonl")] == rows
    assert [each["reason"] for each in report["left_out"]] == reasons


def test_a_file_of_data_is_completed() -> None:
    found = DataCompleter("experiment")("tick")
    assert list(found) == ["tickets.jsonl"] and "data.eval_path=" in DataCompleter("experiment")(
        "da"
    )


def test_rows_are_streamed_anew_at_each_iteration() -> None:
    """And the first row that tells the format may come late."""
    lines = ['{"note": 1}\n'] * 1200 + ['{"prompt": "a", "completion": "b"}\n'] * 2
    Path("late.jsonl").write_text("".join(lines))
    stream = RowStream(load_config(None, ["data.path=late.jsonl", "data.on_bad_row=skip"]))
    for _ in range(2):
        used = [row.line for row, it in stream if isinstance(it, Example)]
        assert (stream.shape, used) == ("prompt_completion", [1201, 1202])
        assert (stream.count, stream.bad) == (1202, 1200)
        stream.check()
