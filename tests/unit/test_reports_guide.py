"""What docs/reports.md shows is what the commands print; the trials come from the history."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rayfin.cli import main

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "reports.md").read_text(encoding="utf-8")
QUICK = ["model.name=tiny", "train.max_steps=4", "storage=runs", "scaling.use_gpu=false"]
SEARCH = ["sweep.search=grid", "sweep.report_samples=1", "sweep.scheduler=none"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's configuration with two points, which the history has."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {n}", "completion": f"{n % 7} times"} for n in range(120)]
    Path("support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my-sweep.yaml").write_text(
        "data: {path: support.jsonl, max_length: 64, val_size: 0.2}\n"
        "method: {type: lora}\n"
        "sweep: {parameters: {method.r: [4, 8]}}\n"
    )
    for rank in (4, 8):
        assert main(["train", "my-sweep.yaml", *QUICK, f"method.r={rank}", "publish=null"]) == 0
    return tmp_path


def shown() -> list[tuple[str, list[str]]]:
    blocks = re.findall(r"```console\n\$ (.*?)\n(.*?)```", GUIDE, re.DOTALL)
    return [(command, lines.splitlines()) for command, lines in blocks]


def test_the_guide_s_commands_print_what_it_shows(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """… stands for what differs, or for more lines."""
    capfd.readouterr()
    for command, lines in shown():
        arguments = shlex.split(command)[1:]
        quick = QUICK + (SEARCH if arguments[0] == "sweep" else [])
        assert main([*arguments, *(s for s in quick if s.partition("=")[0] not in command)]) == 0
        out, _ = capfd.readouterr()
        pattern = r"\n".join(map(re.escape, lines)).replace("…", r"(?:.|\n)*")
        assert re.fullmatch(pattern, out.strip()), (pattern, out)
        # The verdict is the last line, and what the report begins with.
        if arguments[0] == "sweep":
            (report,) = re.findall(r"^  report +(.*)$", out, re.MULTILINE)
            page = Path(report).read_text("utf-8").replace("\u2060", "")
            sentence = re.findall(r"<h1>(.*?)</h1>", page)[0]
            assert out.splitlines()[-1].startswith(sentence)
    assert ElementTree.parse("candidates.svg").getroot().get("role") == "img"


def test_the_verdict_is_in_the_json_too(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["sweep", "my-sweep.yaml", *QUICK, *SEARCH, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    best = next(row for row in told["trials"] if row["trial_id"] == told["best"])
    change = told["verdict"]["change"]
    assert told["verdict"]["outcome"] in GUIDE
    gain = best["metrics"]["base_eval_loss"] - best["metrics"]["eval_loss"]
    assert change["gain"] == pytest.approx(gain)
    assert change["low"] < gain < change["high"]
    assert change["samples"] == 24
    # 2.0687: Student's t with 23 degrees of freedom.
    reach = 2.0687 * best["metrics"]["eval_loss_change_se"]
    assert change["high"] - gain == pytest.approx(reach, rel=1e-3)
