"""Tables in a terminal of any width and in a pipe: nothing is cut, and what is missing is said."""

from __future__ import annotations

import io
import json
import os
import pty
from pathlib import Path

import pytest
from rich.console import Console

from rayfin.cli import main
from rayfin.config import load_config
from rayfin.history import History, TrialRecord
from rayfin.tables import TableColumn, TextTable
from rayfin.tuning.progress import trials_table

SETTINGS = {
    "method.type": ["prefix_tuning"],
    "method.num_virtual_tokens": [20],
    "train.learning_rate": [0.00234],
    "train.per_device_train_batch_size": [16],
}


def at(width: int, table: TextTable) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def a_sweep(error: str | None = None) -> TextTable:
    config = load_config(None, ["model.name=tiny", f"sweep.parameters={json.dumps(SETTINGS)}"])
    spec = config.model_dump(mode="json")
    for name, [value] in SETTINGS.items():
        section, _, leaf = name.partition(".")
        spec[section][leaf] = value
    metrics = {"steps": 60, "eval_loss": 1.0234, "exact_match": 0.25, "tokens_per_second": 12345.0}
    row = TrialRecord(
        trial_id="a-1",
        sweep_id="a",
        fingerprint="f",
        status="failed" if error else "finished",
        error=error,
        created_at="2026-01-02T03:04:05Z",
        updated_at="2026-01-02T03:04:05Z",
        spec=spec,
        scenario={},
        metrics=metrics,
        curve=[],
        versions={},
    )
    return trials_table(config, [row])


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
@pytest.mark.parametrize("error", [None, "the loss became NaN at step 3: too fast"])
def test_no_header_and_no_number_is_cut(width: int, error: str | None) -> None:
    lines = at(width, a_sweep(error))
    whole = "\n".join(lines)
    assert "…" not in whole
    assert max(map(len, map(str.rstrip, lines))) <= width
    # Of a header over several lines all parts are there.
    for part in ("learning_", "rate", "num_", "virtual_", "tokens", "eval_", "loss", "type"):
        assert part in whole, part
    for value in ("prefix_tuning", "0.00234", "1.0234", "16"):
        assert value in whole, value


def test_what_is_left_out_is_named_least_important_first() -> None:
    columns = [
        TableColumn("name"),
        TableColumn("first_to_go", leaves=2),
        TableColumn("second", leaves=1),
    ]
    rows = [["x" * 20, "y" * 20, "z" * 20]]
    assert "not shown" not in "".join(at(80, TextTable(columns, rows)))
    at_50 = at(50, TextTable(columns, rows))
    said = " ".join(" ".join(at_50).split())
    assert said.endswith("not shown in 50 columns: first_to_go; --json shows all")
    assert "z" * 20 in at_50[2]
    at_30 = at(30, TextTable(columns, rows))
    assert "30 columns: second, first_to_go;" in " ".join(" ".join(at_30).split())
    assert (
        at(10, TextTable(columns, rows))[0] == "name: "
    )  # a block of lines, where nothing else helps


def test_brackets_are_text() -> None:
    table = TextTable([TableColumn("path")], [["[bold]x[/bold]"]])
    assert at(40, table)[2] == "[bold]x[/bold]"


def a_history(directory: Path) -> None:
    config = load_config(None, ["model.name=tiny"])
    with History.open(f"sqlite:///{directory}/history.sqlite") as history:
        history.put(
            TrialRecord(
                trial_id="support-tickets-of-2026-qlora-20261130-050027-ea2b7f-00001",
                sweep_id="support-tickets-of-2026-qlora-20261130-050027-ea2b7f",
                fingerprint="f",
                status="finished",
                created_at="2026-01-02T03:04:05Z",
                updated_at="2026-01-02T03:04:05Z",
                spec=config.model_dump(mode="json"),
                scenario={},
                metrics={"eval_loss": 1.0234, "exact_match": 0.25, "train_seconds": 12.5},
                curve=[],
                versions={},
            )
        )


def test_a_pipe_gets_one_line_a_trial(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a_history(tmp_path)
    assert main(["history", "list", f"storage={tmp_path}"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3
    for word in ("ea2b7f-00001", "ea2b7f ", "finished", "qlora 8", "1.0234", "0.250", "12.5"):
        assert word in lines[2]
    assert main(["history", "list", "--sweeps", f"storage={tmp_path}"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 3


def test_a_terminal_of_80_columns_gets_whole_identifiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_history(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        assert main(["history", "list", f"storage={tmp_path}"]) == 0
        terminal.flush()
        shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "support-tickets-of-2026-qlora-20261130-050027-ea2b7f-00001" in shown
    assert "…" not in shown
    assert "1.0234" in shown
