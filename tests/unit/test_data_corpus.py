"""Any common format becomes the same examples; bad rows are named; the split never moves."""

import csv
import gzip
import json
import random
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayfin.config import DataConfig
from rayfin.data import Corpus, Example, load_corpus
from rayfin.data.load import hold_out
from rayfin.errors import DataError

QUESTIONS = [(f"question {i}", f"answer {i}") for i in range(6)]
MESSAGES = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in QUESTIONS
]
SHAPES = {
    "messages": MESSAGES,
    "instruction": [
        {"instruction": q, "input": None if i % 2 else "", "output": a}
        for i, (q, a) in enumerate(QUESTIONS)
    ],
    "conversations": [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for q, a in QUESTIONS
    ],
    "prompt_completion": [{"prompt": q, "completion": a} for q, a in QUESTIONS],
}


def load(path: object, **settings: object) -> Corpus:
    return load_corpus(DataConfig.model_validate({"path": str(path), **settings}))


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions_of(corpus: Corpus) -> set[str]:
    return {example.messages[0]["content"] for example in corpus.train + corpus.eval}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_becomes_the_same_corpus(tmp_path: Path, shape: str) -> None:
    corpus = load(jsonl(tmp_path / "rows.jsonl", SHAPES[shape]))
    expected = load(jsonl(tmp_path / "expected.jsonl", MESSAGES))
    assert corpus.shape == shape
    assert (corpus.train, corpus.eval) == (expected.train, expected.eval)
    assert corpus.digest == expected.digest
    assert load(tmp_path / "rows.jsonl", format=shape) == corpus


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "a.NDJSON", "a.jsonl.gz", "a.json", "o.json", "l.json"),
        *("a.csv", "a.csv.gz", "s.csv", "a.tsv", "a.parquet"),
    ],
)
def test_every_file_format(tmp_path: Path, name: str) -> None:
    rows = SHAPES["prompt_completion"]
    path = tmp_path / name
    lines = "\r\n\r\n".join(json.dumps(row) for row in rows)
    separator = "\t" if "tsv" in name else ";" if name[0] == "s" else ","
    table = f"prompt{separator}completion\r\n" + "".join(
        f'"{r["prompt"]}"{separator}{r["completion"]}\r\n' for r in rows
    )
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif "csv" in name or "tsv" in name:
        raw = b"\xef\xbb\xbf" + table.encode()
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    elif name == "a.json":
        path.write_text(json.dumps(rows, indent=1))
    elif name == "o.json":
        path.write_text(json.dumps({"version": 1, "data": rows}))
    elif name.endswith("gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert load(path) == load(jsonl(tmp_path / "expected.jsonl", rows))


def test_a_directory_is_read_in_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    jsonl(tmp_path / "b.jsonl", MESSAGES[:2])
    jsonl(tmp_path / "sub" / "a.jsonl", MESSAGES[2:])
    jsonl(tmp_path / "sub" / ".git" / "c.jsonl", [{"text": "no"}])
    (tmp_path / ".hidden.jsonl").write_text("broken")
    (tmp_path / "README.md").write_text("about")
    assert questions_of(load(tmp_path)) == {q for q, _ in QUESTIONS}
    jsonl(tmp_path / "z.jsonl", [{"text": "of another shape"}])
    with pytest.raises(
        DataError, match=r"z\.jsonl:1: has format text, but the data has format mes"
    ):
        load(tmp_path)


def test_richer_rows(tmp_path: Path) -> None:
    def only(row: dict[str, object]) -> tuple[dict[str, str], ...]:
        corpus = load(jsonl(tmp_path / "rows.jsonl", [row, {**row, "more": 1}, *extra]))
        return next(e.messages for e in corpus.train + corpus.eval if "six" in str(e.messages))

    extra: list[object] = [{"instruction": "a", "output": "b"}]
    row: dict[str, object] = {
        "instruction": "Add.",
        "input": "2 and 4",
        "output": "six",
        "split": "x",
    }
    assert only(row)[0] == {"role": "user", "content": "Add.\n\n2 and 4"}

    extra = [{"prompt": "a", "completion": "b"}]
    system = {"role": "system", "content": "Be brief."}
    asked = {"role": "user", "content": "2 and 4"}
    answer = {"role": "assistant", "content": "six"}
    assert only({"prompt": [system, asked], "completion": [answer]}) == (system, asked, answer)
    assert only({"prompt": [system, asked], "completion": "six"}) == (system, asked, answer)

    extra = [MESSAGES[0]]
    turns = [{**system, "content": ""}, asked, answer, asked, answer]
    assert only({"messages": turns}) == (asked, answer, asked, answer)


def test_plain_text(tmp_path: Path) -> None:
    corpus = load(jsonl(tmp_path / "a.jsonl", [{"text": f"line {i}"} for i in range(5)]))
    assert corpus.shape == "text"
    assert sorted(e.text or "" for e in corpus.train + corpus.eval) == [
        f"line {i}" for i in range(5)
    ]


def turns(*pairs: tuple[object, object]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "broken JSON: Expecting property name"),
        (b'{"messages": "\xff"}', "not UTF-8 (byte 0xff)"),
        (b"[1]", "must be an object with columns, not a list"),
        (b"[" * 100_000, "can't be read"),
        (
            b'{"other": 1}',
            "messages missing: format messages needs messages (or conversation, dialogue); found o",
        ),
        (b'{"messages": null}', "messages missing"),
        (b'{"messages": 3}', "must be a list of turns, not a number"),
        (b'{"messages": []}', "messages is empty"),
        (b'{"messages": [7]}', "messages[0] must be an object, not a number"),
        (b'{"messages": [{"role": "user"}]}', "messages[0].content is missing"),
        (turns(("tool", "x")), "messages has a tool turn that follows no assistant turn"),
        (turns(("user", "x"), ("assistant", " \n")), "messages[1].content is empty"),
        (turns(("user", "x"), ("assistant", 4)), "messages[1].content must be a string, not a num"),
        (turns(("user", "x"), ("assistant", [7])), "content[0] must be an object, not a number"),
        (turns(("user", "x"), ("assistant", {})), "must be a string, not an object"),
        (turns(("me", "x")), "is 'me'; allowed are system, developer, user, human, pro"),
        (turns(("user", "x"), ("assistant", "\ud800")), "not valid UTF-8 text"),
        (turns(("user", "x")), "ends with a user turn, not an assistant turn"),
        (turns(("assistant", "x")), "has no user turn before the answer"),
        (turns(("user", "x"), ("system", "y"), ("assistant", "z")), "system turn that is not the"),
        (b'{"instruction": "a", "output": "b"}', "has format instruction, but the data has format"),
    ],
)
def test_a_bad_row_is_named_or_skipped(
    tmp_path: Path, line: bytes | dict[str, object], reason: str
) -> None:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(row).encode() for row in MESSAGES]
    path.write_bytes(b"\n".join([good[0], b"", raw, *good[1:]]))
    with pytest.raises(DataError) as caught:
        load(path)
    assert f"{path}:3: " in str(caught.value)
    assert reason in str(caught.value)
    assert "data.on_bad_row=skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    corpus = load(path, on_bad_row="skip")
    assert questions_of(corpus) == {q for q, _ in QUESTIONS}
    assert str(corpus.skipped[0]).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a"}, "output missing: format instruction needs instruction, output"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"instruction": "a", "output": 4}, "output must be a string, not a number"),
        ({"instruction": "a", "input": [1], "output": "b"}, "input must be a string, not a list"),
        ({"prompt": "a"}, "completion missing"),
        ({"prompt": " ", "completion": "b"}, "prompt is empty"),
        (
            {"prompt": 4, "completion": "b"},
            "a text or a list of turns, not a number; put it in quotes, ",
        ),
        (
            {"conversations": [{"from": "me", "value": "x"}]},
            "from is 'me'; allowed are system, developer, user, human",
        ),
        ({"text": ""}, "text is empty"),
        ({"question": "a"}, "completion (or answer, response); found question"),
        ({"sentence": "a"}, "none of the known columns: rename sentence to those of a format"),
    ],
)
def test_no_valid_row(tmp_path: Path, row: dict[str, object], reason: str) -> None:
    with pytest.raises(DataError, match="has no valid row") as caught:
        load(jsonl(tmp_path / "rows.jsonl", [row, row]), on_bad_row="skip")
    assert "rows.jsonl:1: " in str(caught.value)
    assert reason in str(caught.value)


def test_bad_csv_rows_are_named_by_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"instruction,output\n"
        b'"two\nlines",fine\n'
        b"a,b,c\n"
        b"a\n"
        b"a,\xff\n"
        b"a,n\0l\n"
        b"a,\n"
        b"\n"
        b'also,"fi""ne"\n'
        b'a,"never closed\nb,c\n'
    )
    corpus = load(path, on_bad_row="skip")
    assert questions_of(corpus) == {"two\nlines", "also"}
    assert [(bad.line, bad.reason) for bad in corpus.skipped] == [
        (
            4,
            "has 3 cells where the header has 2; put a cell that holds the delimiter in quotes",
        ),
        (5, "has 1 cells where the header has 2"),
        (6, "not UTF-8 (byte 0xff); if the file is windows-1252, set data.encoding=windows-1252"),
        (7, "holds a NUL character"),
        (8, "output is empty"),
        (
            11,
            "broken CSV: the quote opened on line 11 is never closed, and takes the 2 lines from "
            "here on along; double each quote within a cell",
        ),
    ]
    with pytest.raises(DataError, match="7 of 9 rows are bad"):
        load(path)


def test_turns_in_a_csv_cell_and_a_huge_cell(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "messages"])
        writer.writerows([i, json.dumps(row["messages"])] for i, row in enumerate(MESSAGES))
        long = turns(("user", "x" * 200_000), ("assistant", "y"))
        writer.writerow([9, json.dumps(long["messages"])])
    assert len(questions_of(load(tmp_path / "a.csv"))) == 7


def test_bad_parquet_rows_and_unused_columns(tmp_path: Path) -> None:
    rows = [*SHAPES["instruction"], {"instruction": "x", "output": None, "input": None}]
    table = pa.Table.from_pylist(rows).append_column("raw", pa.array([b"\xff"] * len(rows)))
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = load(tmp_path / "a.parquet", on_bad_row="skip")
    assert [bad.line for bad in corpus.skipped] == [7]
    assert "raw; where that is meant, set data.ignore_columns=[raw]" in corpus.notes[0]

    not_text = pa.StringArray.from_buffers(
        2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")
    )
    pq.write_table(pa.table({"text": not_text}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet:2: not UTF-8"):
        load(tmp_path / "b.parquet")

    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="broken Parquet"):
        load(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "does not exist; give"),
        ("x" * 5000, None, "does not exist; give"),
        ("a\0.jsonl", None, "does not exist; give"),
        ("absent", None, "does not exist; give"),
        ("a.txt", b"x", "unsupported extension '.txt'; give a file ending in .jsonl"),
        ("a.ods", b"x", "is a workbook of a kind that is not read; save it as .xlsx, or the"),
        (
            "a.xlsx",
            b"\xd0\xcf\x11\xe0",
            "can't be read as a workbook (File is not a zip file)",
        ),
        ("a.parquet.gz", b"x", "unsupported extension"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.csv", b"text\n", "is empty"),
        ("a.json", b" ", "is empty"),
        ("a.json", b"[1, 2", "broken JSON"),
        ("a.json", b"\n\xff", "a.json:2: not UTF-8"),
        ("a.csv", b"\0t", "a.csv:1: holds a NUL"),
        ("a.csv", b"text,text\na,b\n", "a.csv:1: the header has 'text' twice; rename one of them"),
        ("a.jsonl.gz", b"no gzip", "is not packed, though its name ends in .gz; take that"),
        (
            "a.jsonl",
            b'{"text": "one"}',
            "has 1 usable row; training and evaluation need at least 2",
        ),
        ("a.jsonl", b'{"text": "one"}\n' * 3, "all 3 rows are the same"),
        (
            "a.jsonl",
            b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 3,
            "preference pairs (chosen, rejected), which train.stage=sft can't train on; give",
        ),
    ],
)
def test_unusable_sources(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(DataError, match="has no data file; give files ending in"):
        load(tmp_path)


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, str | None]] = []

    def load_dataset(name: str, *, split: str | None) -> object:
        asked.append((name, split))
        if name == "owner/absent":
            raise ConnectionError("the hub can't be reached\nand more")
        return list(MESSAGES) if split else {"train": list(MESSAGES)}

    hub = types.ModuleType("datasets")
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert len(questions_of(load("owner/name"))) == 6
    load("owner/name:test")
    assert asked == [("owner/name", None), ("owner/name", "test")]
    with pytest.raises(DataError, match=r"no local path.*\(the hub can't be reached\); give"):
        load("owner/absent")
    with pytest.raises(DataError, match=r"'owner/absent\.jsonl' does not exist"):
        load("owner/absent.jsonl")


def many(count: int, start: int = 0) -> list[object]:
    """Rows of which every fifth asks what another one asks."""
    return [
        {"prompt": f"question {i - 1 if i % 5 == 4 else i}", "completion": f"answer {i}"}
        for i in range(start, start + count)
    ]


def test_the_split_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = many(200)
    corpus = load(jsonl(tmp_path / "a.jsonl", rows), val_size=0.2)
    random.Random(0).shuffle(rows)
    assert load(jsonl(tmp_path / "b.jsonl", rows), val_size=0.2) == corpus
    assert len(corpus.eval) == 40
    prompts = [{e.messages[0]["content"] for e in split} for split in (corpus.train, corpus.eval)]
    assert not prompts[0] & prompts[1]


def test_new_rows_move_few_old_ones(tmp_path: Path) -> None:
    before = load(jsonl(tmp_path / "a.jsonl", many(500)))
    after = load(jsonl(tmp_path / "b.jsonl", many(525)))
    held = [{e.canonical() for e in corpus.eval} for corpus in (before, after)]
    assert len(held[0] - held[1]) <= 8
    assert before.digest != after.digest


def test_max_samples_is_a_sample_not_the_head(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", many(300))
    small, large = load(path, max_samples=50), load(path, max_samples=100)
    assert len(small.train) + len(small.eval) == 50
    assert questions_of(small) < questions_of(large)
    assert not questions_of(small) <= {f"question {i}" for i in range(100)}


def test_the_source_is_one_for_all_samples_and_splits_of_the_data(tmp_path: Path) -> None:
    rows = many(300)
    whole = load(jsonl(tmp_path / "a.jsonl", rows))
    some = load(tmp_path / "a.jsonl", max_samples=20, val_size=0.5)
    assert some.source == whole.source and some.digest != whole.digest
    random.Random(0).shuffle(rows)
    assert load(jsonl(tmp_path / "b.jsonl", rows)).source == whole.source
    others = {load(jsonl(tmp_path / "c.jsonl", many(300, start))).source for start in (1000, 2000)}
    assert len(others | {whole.source}) == 3


@pytest.mark.parametrize(
    ("rows", "val_size", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.34, 3)]
)
def test_both_splits_always_have_samples(
    tmp_path: Path, rows: int, val_size: float, expected: int
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(rows)])
    assert len(load(path, val_size=val_size).eval) == expected


def test_one_prompt_for_all_splits_whole_samples(tmp_path: Path) -> None:
    rows = [{"prompt": "Write.", "completion": f"answer {i % 10}"} for i in range(20)]
    corpus = load(jsonl(tmp_path / "a.jsonl", rows), val_size=0.2)
    splits = [{e.messages[1]["content"] for e in split} for split in (corpus.train, corpus.eval)]
    assert len(corpus.eval) == 4
    assert not splits[0] & splits[1]


def test_the_split_of_today_stays() -> None:
    # Another split means that no history's trials compare with new ones: never by accident.
    examples = [Example(text=f"sample {i}") for i in range(10)]
    assert [e.text for e in hold_out(examples, 0.3)[1]] == ["sample 0", "sample 4", "sample 7"]
