"""`rayfin history`: for people and for machines."""

from __future__ import annotations

import json

import pytest

from rayfin.cli.history import register
from rayfin.cli.parser import Parser
from rayfin.errors import HistoryError
from rayfin.history import History
from rayfin.paths import Storage


def run(*words):
    parser = Parser(prog="rayfin")
    register(parser.add_subparsers())
    args = parser.parse_args(["history", *map(str, words)])
    return args.handler(args)


@pytest.fixture
def storage(tmp_path, record):
    root = tmp_path / "runs"
    with History.open(Storage.open(root).history_url) as history:
        history.put(record(1))
        history.put(record(2, status="failed", error="[red]no[/red]", metrics={}))
        history.put(record(3, sweep_id="sweep-b"))
    return root


def test_list_shows_the_newest_first(storage, capsys):
    assert run("list", f"storage={storage}") == 0
    out = capsys.readouterr().out
    assert out.index("trial-003") < out.index("trial-002") < out.index("trial-001")
    assert "lora 8" in out
    assert "1.0300" in out


def test_list_does_not_call_a_block_size_a_rank(tmp_path, record, capsys):
    with History.open(Storage.open(tmp_path / "runs").history_url) as history:
        method = {"type": "oft", "oft_block_size": 32}
        history.put(record(1, spec={"method": method, "train": {"learning_rate": 2e-4}}))
    assert run("list", f"storage={tmp_path / 'runs'}") == 0
    assert "oft block 32" in capsys.readouterr().out


def test_list_filters_and_speaks_json(storage, capsys):
    run("list", f"storage={storage}", "--json", "--sweep", "sweep-a", "--status", "finished")
    (trial,) = json.loads(capsys.readouterr().out)
    assert trial["trial_id"] == "trial-001"
    run("list", f"storage={storage}", "--limit", 1)
    assert "the newest 1" in capsys.readouterr().out


def test_list_sums_up_sweeps(storage, capsys):
    run("list", f"storage={storage}", "--sweeps")
    assert "1 finished, 1 failed" in capsys.readouterr().out
    run("list", f"storage={storage}", "--sweeps", "--json")
    sweeps = json.loads(capsys.readouterr().out)
    assert [sweep["best_trial_id"] for sweep in sweeps] == ["trial-001", "trial-003"]


def test_show_takes_the_beginning_of_an_id(storage, capsys, record):
    run("show", f"storage={storage}", "trial-002")
    assert "[red]no[/red]" in capsys.readouterr().out
    run("show", f"storage={storage}", "trial-003", "--json")
    assert json.loads(capsys.readouterr().out) == record(3, sweep_id="sweep-b").model_dump(
        mode="json"
    )
    with pytest.raises(HistoryError, match="could be any of"):
        run("show", f"storage={storage}", "trial")


EVIL = "=HYPERLINK(1)\n\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202e"


@pytest.mark.parametrize("words", [["list"], ["list", "--sweeps"], ["show", "trial-009"]])
@pytest.mark.parametrize("as_json", [False, True])
def test_what_a_row_says_steers_no_terminal(storage, capsys, record, words, as_json):
    with History.open(Storage.open(storage).history_url) as history:
        spec = {"method": {"type": "lora", "r": 8}, "model": {"name": EVIL}, "data": {"path": EVIL}}
        history.put(record(9, status="failed", error=EVIL, metrics={}, spec=spec, directory=EVIL))
    run(*words, f"storage={storage}", *(["--json"] if as_json else []))
    out = capsys.readouterr().out
    assert "red" in out or words != ["show", "trial-009"]
    assert not set(out) & set("\x1b\x07\r\x9b\u202e")


def test_an_export_has_a_line_for_each_row_whatever_it_says(storage, tmp_path, record, capsys):
    """And none that a spreadsheet would compute: there is no export as CSV."""
    file = tmp_path / "all.jsonl"
    with History.open(Storage.open(storage).history_url) as history:
        history.put(record(9, status="failed", error=EVIL, metrics={}))
    run("export", f"storage={storage}", file)
    lines = file.read_bytes().splitlines()
    assert len(lines) == 4 and all(line.startswith(b"{") for line in lines)
    assert EVIL in [json.loads(line)["error"] for line in lines]
    assert not any(byte < 32 for line in lines for byte in line)
    with pytest.raises(HistoryError, match=r"give a \.jsonl or \.parquet file"):
        run("export", f"storage={storage}", tmp_path / "all.csv")


def test_export_and_import_by_url(storage, tmp_path, capsys):
    file, url = tmp_path / "all.jsonl", f"sqlite:///{tmp_path / 'new.sqlite'}"
    run("export", f"storage={storage}", file, "--json")
    assert json.loads(capsys.readouterr().out) == {"path": str(file), "trials": 3}
    run("import", f"history={url}", file, "--json")
    assert json.loads(capsys.readouterr().out)["added"] == 3
    run("import", f"history={url}", file)
    assert "0 added, 0 replaced, 3 unchanged" in capsys.readouterr().out


def test_import_says_what_it_skipped(tmp_path, capsys):
    file, storage = tmp_path / "table.csv", tmp_path / "runs"
    file.write_text("lr,eval_loss\n1,2\n1,low\n")
    assert run("import", f"storage={storage}", file) == 0
    assert f"skipped {file}:3: eval_loss is 'low'" in capsys.readouterr().out
    file.write_text("lr,eval_loss\n1,low\n")
    with pytest.raises(HistoryError, match=r"nothing in .* could be used \(1 skipped\), first: "):
        run("import", f"storage={storage}", file)


@pytest.mark.parametrize("words", [["list"], ["show", "x"], ["export", "x.jsonl"]])
def test_reading_makes_no_storage(tmp_path, words):
    with pytest.raises(HistoryError, match="does not exist; run a trial first"):
        run(*words, f"storage={tmp_path / 'runs'}")
    assert list(tmp_path.iterdir()) == []
