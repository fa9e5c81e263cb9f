"""What docs/training.md shows is what the commands print; trials are trained in this process."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayfin.cli import main
from rayfin.history import History

GUIDE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
QUICK = ("model.name=tiny", "storage=runs", "scaling.use_gpu=false", "data.max_length=64")


def shown() -> Iterator[tuple[str, list[str]]]:
    for block in re.findall(r"```console\n(.*?)```", GUIDE, re.DOTALL):
        for part in block.removeprefix("$ ").split("\n$ "):
            command, *lines = part.splitlines()
            yield command, lines


def test_the_guide_s_commands_print_what_it_shows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """… stands for what differs, and at the end for more lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{"prompt": f"what is {n}", "completion": f"{n}"} for n in range(40)]
    Path("support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command, lines in shown():
        caplog.clear()
        refused = "both say" in lines[0]
        assert main([*shlex.split(command)[1:], *QUICK]) == (2 if refused else 0), command
        out, err = capfd.readouterr()
        told = "\n".join([*caplog.messages, err, out])
        pattern = r"\n".join(map(re.escape, lines)).replace("…", r".*")
        assert re.search(pattern, told, re.DOTALL), (pattern, told)
    with History.open(f"sqlite:///{tmp_path}/runs/history.sqlite") as history:
        epochs, early, best = history.trials()
    assert (epochs.spec["train"]["num_train_epochs"], epochs.spec["train"]["max_steps"]) == (3, 27)
    assert epochs.metrics["steps"] == 27
    assert (early.status, early.scenario["early_stop"], early.metrics["steps"]) == (
        "finished",
        12,
        12,
    )
    losses = {p["step"]: p["eval_loss"] for p in best.curve if "eval_loss" in p}
    assert best.metrics["eval_loss"] == losses[best.scenario["kept_step"]] == min(losses.values())
