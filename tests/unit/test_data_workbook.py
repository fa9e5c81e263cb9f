"""Excel workbooks: which sheet is read, and what becomes of cells that are no plain text."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from rayfin.cli import main
from rayfin.config import DataConfig
from rayfin.data import Corpus, load_corpus
from rayfin.errors import DataError, DependencyError

HEADER = ("prompt", "completion")
ROWS = [(f"question {n}", f"answer {n}") for n in range(4)]


def write(path: Path, *rows: tuple[Any, ...], **sheets: list[tuple[Any, ...]]) -> Any:
    """Write a workbook; the first sheet is returned, to be changed and saved again."""
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    for title, more in {"Sheet": rows, **sheets}.items():
        other = sheet if title == "Sheet" else book.create_sheet(title)
        for row in more:
            other.append(row)
    book.save(path)
    return sheet


def load(path: Path, **settings: Any) -> Corpus:
    return load_corpus(DataConfig(path=str(path), **settings))


def pairs(corpus: Corpus) -> set[tuple[str, ...]]:
    examples = (*corpus.train, *corpus.eval)
    return {tuple(turn["content"] for turn in example.messages) for example in examples}


def test_the_sheet_is_the_first_one_or_that_of_data_name(tmp_path: Path) -> None:
    path = tmp_path / "book.xlsx"
    more = [("a", "b"), ("c", "d")]
    first = write(path, HEADER, *ROWS, Other=[HEADER, *more])
    corpus = load(path)
    assert pairs(corpus) == set(ROWS)
    assert corpus.notes == (
        f"data: {path} read as its sheet 'Sheet' (not read: 'Other'; data.path=book.xlsx and "
        "data.name=SHEET read another)",
    )
    assert pairs(load(path, name="Other")) == set(more) and not load(path, name="Other").notes
    with pytest.raises(DataError, match=r"data\.name: .* no sheet 'othr' \(did you mean 'Other'"):
        load(path, name="othr")
    first.sheet_state = "hidden"
    first.parent.active = 1
    first.parent.save(path)
    assert pairs(load(path)) == set(more)
    assert pairs(load(tmp_path)) == set(more), "a directory's workbooks are read, too"


def test_cells_are_read_as_excel_shows_them(tmp_path: Path) -> None:
    """And a column that isn't used may hold anything; rows are counted as in Excel."""
    path, day = tmp_path / "book.xlsx", datetime.fromisoformat("2026-03-01")
    cells: list[tuple[Any, str, str]] = [
        (14, "General", "14"),
        (0.1 + 0.2, "General", "0.3"),
        (0.345, "0.0%", "34.5%"),
        (2.5, "0", "3"),
        ("007", "@", "007"),
        (True, "General", "TRUE"),
        (day, "dd/mm/yyyy", "2026-03-01"),
        (day.replace(hour=12), "yyyy-mm-dd hh:mm", "2026-03-01 12:00:00"),
        ("two\nlines_x000D_\n", "General", "two\nlines\n"),
    ]
    sheet = write(path, (" Prompt", "completion", "price"))
    for line, (value, shown, _) in enumerate(cells, 2):
        sheet.append((f"q{line}", value, 1.5))
        sheet.cell(line, 2).number_format = shown
        sheet.cell(line, 3).number_format = "0.00 [$€]"
    sheet.append((None, None, None))
    sheet.append(("last", "row", "#N/A"))
    sheet.cell(500, 1).number_format = "0.00"
    sheet.parent.save(path)
    corpus = load(path)
    wanted = {(f"q{line}", text) for line, (*_, text) in enumerate(cells, 2)}
    assert pairs(corpus) == wanted | {("last", "row")}
    refused = {
        "=1+1": "cell B4 is a formula whose value was not saved",
        "#DIV/0!": "cell B4 has the error #DIV/0!",
    }
    for value, reason in refused.items():
        sheet["B4"] = value
        sheet.parent.save(path)
        with pytest.raises(DataError, match=f"book.xlsx:4: {reason}"):
            load(path)
        kept = wanted - {("q4", "34.5%")} | {("last", "row")}
        assert pairs(load(path, on_bad_row="skip")) == kept
    sheet["B4"] = 12
    sheet["B4"].number_format = "0.00 [$€]"
    sheet.parent.save(path)
    with pytest.raises(DataError, match="B4 is the number 12 in the format"):
        load(path)


def test_merged_cells(tmp_path: Path) -> None:
    """A value holds for all rows that its cell covers; a header or a row that is one is refused."""
    path = tmp_path / "book.xlsx"
    rows = [(f"q{n}", f"a{n}", "Be kind." if n == 1 else None) for n in range(4)]
    sheet = write(path, (*HEADER, "system"), *rows)
    sheet.merge_cells("C3:C4")
    sheet.parent.save(path)
    assert pairs(load(path)) == {
        ("q0", "a0"), ("Be kind.", "q1", "a1"), ("Be kind.", "q2", "a2"), ("q3", "a3")
    }  # fmt: skip
    sheet.merge_cells("A5:B5")
    sheet.parent.save(path)
    with pytest.raises(DataError, match=r"book\.xlsx:5: cells A5:B5 are merged"):
        load(path)
    for merged in ("A1:B1", "A1:A2"):
        sheet = write(path, HEADER, *ROWS)
        sheet.merge_cells(merged)
        sheet.parent.save(path)
        with pytest.raises(DataError, match=r"first: .*book\.xlsx:1: .* merged.*unmerge"):
            load(path)
    write(path, ("Our answers",), HEADER, *ROWS)
    with pytest.raises(DataError, match=r":2: column B has a value here and no name"):
        load(path)


def test_merged_cells_without_a_value_and_with_a_bad_one(tmp_path: Path) -> None:
    """Nothing stands in for them: rows of a bad one are bad, and an empty one fills no row."""
    path = tmp_path / "book.xlsx"
    rows = [("a", "b", None), ("c", "d", "#N/A"), ("e", "f", None), ("g", "h", None)]
    sheet = write(path, (*HEADER, "system"), *rows)
    sheet.merge_cells("C3:C4")
    sheet.merge_cells("A6:A9")
    sheet.parent.save(path)
    corpus = load(path, on_bad_row="skip")
    assert pairs(corpus) == {("a", "b"), ("g", "h")}
    assert any("2 bad rows" in note or "2 of 4 rows" in note for note in corpus.notes), corpus.notes


def test_columns_that_are_not_trained_on_are_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ignored ones too; a cell without plain text is left out or set aside, and said so."""
    path = tmp_path / "book.xlsx"
    sheet = write(path, (*HEADER, "price", "note"), ("a", "b", 12, "n"), ("c", "d", 1.5, None))
    sheet["C3"].number_format = "0.00 [$€]"
    sheet.append((None, None, 13.5, None))
    sheet.parent.save(path)
    new, ignored = tmp_path / "new.jsonl", tmp_path / "ignored.jsonl"
    words = ["data", "clean", str(path), "--output"]
    assert main([*words, str(ignored), "data.ignore_columns=[price]"]) == 0
    assert "- not written, as JSON has no form for it: price\n" in capsys.readouterr().out
    row = {"prompt": "a", "completion": "b", "price": "12", "note": "n"}
    assert [json.loads(line) for line in ignored.read_text().splitlines()] == [
        row, {"prompt": "c", "completion": "d", "note": None}
    ]  # fmt: skip
    assert main([*words, str(new)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "C3 is the number 1.5 in the format" in said
    assert "leave the column out with data.ignore_columns=[price]" in said
    assert [json.loads(line) for line in new.read_text().splitlines()] == [row]
    aside = new.with_suffix(".left_out.jsonl").read_text().splitlines()
    assert json.loads(aside[0]) == {"prompt": "c", "completion": "d", "price": "1.5"}


def test_without_openpyxl_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "book.xlsx", HEADER, *ROWS)
    monkeypatch.setattr("rayfin.data.workbook.find_spec", lambda _: None)
    with pytest.raises(DependencyError, match=r"book\.xlsx.* pip install 'rayfin\[excel\]', or"):
        load(tmp_path / "book.xlsx")
