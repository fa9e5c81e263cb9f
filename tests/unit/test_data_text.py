"""Text files as people have them: their encodings, their quotes, JSON over several lines."""

import gzip
import json
from pathlib import Path

import pytest

from rayfin.config import DataConfig
from rayfin.data import load_corpus
from rayfin.errors import DataError

ROWS = [{"prompt": f"Code of {city}?", "completion": city[:3]} for city in ("Oslo", "Lima", "Rom")]
CHINESE = [{"prompt": f"{city} 的代码？", "completion": "完"} for city in ("Oslo", "Lima")]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def samples(path: Path, **settings: object) -> dict[str, str]:
    """Question -> answer of every sample."""
    corpus = load_corpus(DataConfig.model_validate({"path": str(path), **settings}))
    messages = [example.messages for example in corpus.train + corpus.eval]
    return {asked["content"]: answered["content"] for asked, answered in messages}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz", "a.csv", "a.tsv", "tab.csv"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    if "json" in name:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in CHINESE)
    else:
        separator = "," if name == "a.csv" else "\t"  # as spreadsheets write "Unicode text"
        text = f"prompt{separator}completion\r\n"
        text += "".join(f"{row['prompt']}{separator}{row['completion']}\r\n" for row in CHINESE)
    raw = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert samples(tmp_path / name) == {row["prompt"]: row["completion"] for row in CHINESE}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES.replace("}\n", "},\n"),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        ",\n".join(json.dumps(row, indent=2) for row in ROWS),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n\n" + json.dumps({"data": ROWS}, indent=1),
    ],
)
def test_json_by_lines_in_a_list_or_over_several_lines(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    assert samples(tmp_path / name) == {row["prompt"]: row["completion"] for row in ROWS}


def test_objects_over_several_lines_are_named_by_the_line_they_begin_on(tmp_path: Path) -> None:
    """Each line is counted once, however many objects there are."""
    rows = [*ROWS * 3, {"prompt": "no answer"}]
    (tmp_path / "a.json").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    with pytest.raises(DataError, match=r"a\.json:37: completion missing"):
        samples(tmp_path / "a.json")


def test_a_broken_line_spoils_none_but_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for at in (0, 1, 3):
        lines = LINES.splitlines()
        lines.insert(at, '{"prompt": "x')
        path.write_text("\n".join(lines))
        with pytest.raises(DataError, match=rf"a\.jsonl:{at + 1}: broken JSON"):
            samples(path)
        assert len(samples(path, on_bad_row="skip")) == 3


def test_nan_is_no_value(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"instruction": r["prompt"], "input": None, "output": r["completion"]} for r in ROWS]
    path.write_text(json.dumps(rows).replace("null", "NaN"))
    assert samples(path) == {row["prompt"]: row["completion"] for row in ROWS}
    path.write_text(json.dumps(rows).replace('"Osl"', "NaN"))
    with pytest.raises(DataError, match=r":1: output missing"):
        samples(path)


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        # A quote within a cell, at its start or at its end is a character.
        (['"Hi" said A, what?', '"Hi" said B'], ['"Hi" said A, what?', '"Hi" said B']),
        (['"Hi" they said', 'they said 12"', '"'], ['"Hi" they said', 'they said 12"', '"']),
        (['"Hi!"', "Ho!"], ['"Hi!"', "Ho!"]),
        (['"open', 'closed"'], ['"open', 'closed"']),
        # Quotes enclose cells where all of a column have them, or where one doubles those within.
        (['"Hi!"', '"Ho!"'], ["Hi!", "Ho!"]),
        (['"He said ""Hi"""', "Ho!"], ['He said "Hi"', "Ho!"]),
        (['"two\nlines"', "Ho!"], ["two\nlines", "Ho!"]),
        (['"a\ttab"', "Ho!"], ["a\ttab", "Ho!"]),
    ],
)
def test_quotes_in_a_tsv(tmp_path: Path, cells: list[str], wanted: list[str]) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("prompt\tcompletion\n" + "".join(f"{c}\tx{n}\n" for n, c in enumerate(cells)))
    assert list(samples(path)) and set(samples(path)) == set(wanted)


def test_what_an_open_quote_takes_along_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = [f"question {n},answer {n}" for n in range(9)]
    lines[4] = '"question 4,answer 4'
    path.write_text("\n".join(["prompt,completion", *lines]))
    with pytest.raises(DataError, match=r"a\.csv:6: .*opened on line 6 .* \(5 of 9 rows are bad\)"):
        samples(path)
    config = DataConfig(path=str(path), on_bad_row="skip")
    corpus = load_corpus(config)
    assert len(corpus.train + corpus.eval) == 4
    assert corpus.skipped_rows == 5
    assert corpus.notes[0].startswith("data: 5 of 9 rows are bad and left out, first ")
    # Where the record begins is not where the quote does.
    path.write_text('prompt,completion\n"a\nb","c\nd,e\nf,g\n')
    with pytest.raises(DataError, match=r"a\.csv:2: .*the quote opened on line 3 is never closed"):
        samples(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('q1,"a1\nq2,a2\nq3,a3\nq4,a4"\nq5,a5\nq6,a6\n', "3 lines within quoted cells of 1 row"),
        ('"q1,a1\nq2,a2\nq3",a3\n"x\ny,z",b\nq4,a4\n', "2 lines within quoted cells of 2 rows"),
        # Cells of several lines as people write them: prose, a letter, a list.
        ('q1,"Well, yes.\nIt is, indeed.\nDear Sir,\n- one\n- two"\nq2,a2\nq3,a3\n', None),
        ('q1,a1\nq2,"a\n\nb"\n', None),
    ],
)
def test_rows_that_a_quoted_cell_may_have_taken_along_are_told(
    tmp_path: Path, text: str, said: str | None
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,completion\n{text}")
    notes = load_corpus(DataConfig(path=str(path))).notes
    if said is None:
        assert notes == ()
    else:
        (note,) = notes
        assert said in note and f"first {path}:2" in note
    # With one column each line of a cell would look like a row.
    path.write_text('text\n"one\ntwo\nthree"\nfour\n')
    assert load_corpus(DataConfig(path=str(path))).notes == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps({"train": ROWS, "test": ROWS}), "several lists (train, test); write each to a"),
        (json.dumps({str(n): row for n, row in enumerate(ROWS)}), "of rows by their names; write"),
        (json.dumps({"prompt": {"0": "a"}, "completion": {"0": "b"}}), "orient='records', lines="),
        (json.dumps({"columns": ["a"], "index": [0], "data": [["b"]]}), "orient='records', lines="),
        (json.dumps(ROWS) + "\n" + json.dumps(ROWS), "not a list; jq -c '.[]' FILE writes the"),
        (json.dumps(ROWS, indent=1)[:-2] + ",\n]", "nothing between a comma and ]; take the comma"),
    ],
)
def test_json_that_is_no_list_of_rows_is_refused_with_a_remedy(
    tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as caught:
        samples(tmp_path / "a.json")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "Code of Oslo?,OSL\nCode of Lima?,LIM\n", "no header, as its first line reads"),
        ("a.jsonl.gz", LINES, "is not packed, though its name ends in .gz; take that"),
        ("a.md", "# What?\nThat.\n", "a.md --output NAME.jsonl makes rows of its questions and"),
        ("a.zip", "PK", ".xlsx (texts also with .gz, .zst, .bz2, .xz after it)"),
    ],
)
def test_files_that_are_not_what_they_seem(
    tmp_path: Path, name: str, text: str, reason: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        samples(tmp_path / name)
    assert reason in str(caught.value) and "data.columns={" not in str(caught.value)
