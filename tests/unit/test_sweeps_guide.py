"""What docs/sweeps.md shows is what the commands print; trials are trained here, without Ray."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayfin.cli import main
from rayfin.history import History

GUIDE = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
QUICK = ("model.name=tiny", "train.max_steps=2", "storage=runs", "scaling.use_gpu=false")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_ray: None) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{"prompt": f"what is {n}", "completion": f"{n}"} for n in range(12)]
    Path("support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (file,) = re.findall(r"```yaml\n# (my-sweep\.yaml)\n", GUIDE)
    Path(file).write_text(re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[0])
    return tmp_path


def shown() -> Iterator[tuple[str, list[str]]]:
    for block in re.findall(r"```console\n(.*?)```", GUIDE, re.DOTALL):
        for part in block.removeprefix("$ ").split("\n$ "):
            command, *lines = part.splitlines()
            yield command, lines


def test_the_guide_s_commands_print_what_it_shows(
    here: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """… stands for what differs, and at the end for more lines."""
    for command, lines in shown():
        caplog.clear()
        refused = lines[0].startswith("…")
        quick = [s for s in QUICK if s.partition("=")[0] not in command]
        arguments = shlex.split(command)[1:]
        assert main([*arguments, *quick]) == (2 if refused else 0), command
        out, err = capfd.readouterr()
        told = "\n".join([*caplog.messages, err])
        pattern = r"\n".join(map(re.escape, lines)).replace("…", r".*")
        assert re.search(pattern, told), (pattern, told)
        if "of 5 trials" in told:
            assert "4 distinct settings of 5 trials" in out
            (ia3,) = [line for line in out.splitlines() if re.search(r"finished +ia3", line)]
            assert ia3.split()[1:5] == ["finished", "ia3", "–", "–"]
            (report,) = [line for line in out.splitlines() if line.startswith("  report")]
            page = Path(report.split(maxsplit=1)[1]).read_text("utf-8")
            assert "4 distinct settings of 5 trials" in page
            assert "method.r is for lora; ia3 and p_tuning have no such setting" in page
    with History.open(f"sqlite:///{here / 'runs' / 'history.sqlite'}") as history:
        rows = [row for row in history.trials() if row.sweep_id != "train"]
    swept = [row for row in rows if row.spec["method"]["type"] != "lora"]
    assert sorted(row.spec["method"]["type"] for row in swept) == ["ia3", "p_tuning"]
    assert {row.status for row in rows} == {"finished"} and len(rows) == 3 + 4 + 1 + 1
    for row in rows:
        if row.spec["method"]["type"] == "lora":
            assert row.spec["method"]["lora_alpha"] == 16
