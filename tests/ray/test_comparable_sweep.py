"""A sweep over epochs, optimizers, methods and lengths of samples, interrupted and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from rayfin.history import TrialRecord
from rayfin.history.comparable import comparison_groups
from rayfin.tuning.progress import ProgressDisplay

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

AXES = {
    "train.num_train_epochs": [1, 2],
    "train.optim": ["adafactor", "adamw_torch"],
    "method.type": ["lora", "ia3"],
    "data.max_length": [40, 128],
}


def test_a_resumed_sweep_over_everything_compares_only_what_compares(
    lab: Any, cluster: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"say {n}", "completion": f"{n} " * (1 + n % 30)} for n in range(40)]
    data = lab.root / "lengths.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep = [
        *(s for s in lab.settings if not s.startswith(("data.", "method."))),
        f"data.path={data}",
        "train={learning_rate: 0.005, eval_steps: 2}",
        f"sweep.parameters={json.dumps(AXES)}",
        "sweep.search=grid",
        "sweep.num_samples=16",
    ]
    update, ended = ProgressDisplay.update, set[str]()

    def interrupt(self: ProgressDisplay, row: TrialRecord) -> None:
        update(self, row)
        if row.status in ("finished", "stopped"):
            ended.add(row.trial_id)
        if len(ended) == 3 and row.status == "running" and row.metrics:
            ended.add("interrupted")
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "update", interrupt)
        assert lab.rayfin_here("sweep", *sweep) == 130
    assert "interrupted" in ended
    before = {row.trial_id: row for row in lab.rows()}
    capsys.readouterr()

    assert lab.rayfin_here("sweep", *sweep, "--resume", "--json") == 0
    out, err = capsys.readouterr()
    told, rows = json.loads(out), lab.rows()
    assert len({row.fingerprint for row in rows}) == len(rows) == 16
    assert {row.status for row in rows} <= {"finished", "stopped"}
    for row in rows:
        was = before.get(row.trial_id)
        assert was is None or was.status == "interrupted" or was == row, (
            "an ended trial was touched"
        )
        each = -(
            -row.scenario["data"]["rows_train"] // row.spec["train"]["per_device_train_batch_size"]
        )
        assert row.spec["train"]["max_steps"] == row.spec["train"]["num_train_epochs"] * each

    # What compares is what was scored on the same tokens: here, the trials of one length.
    by_length: dict[int, list[TrialRecord]] = {}
    for row in rows:
        by_length.setdefault(row.spec["data"]["max_length"], []).append(row)
    groups = [set(comparison_groups(some, "eval_loss")) for some in by_length.values()]
    assert [len(group) for group in groups] == [1, 1] and groups[0] != groups[1]
    finished = {n: [r for r in some if r.status == "finished"] for n, some in by_length.items()}
    assert all(finished.values()), "ASHA has ended every trial of a group"
    chosen = max(finished, key=lambda length: (len(finished[length]), length))
    (other,) = by_length.keys() - {chosen}
    best = min(finished[chosen], key=lambda row: row.metrics["eval_loss"])
    assert told["best"] == best.trial_id
    assert told["not_comparable"] == [row.trial_id for row in by_length[other]]
    start, end = [note for note in told["notes"] if "held-out tokens" in note]
    assert start.startswith("data.max_length decides which held-out tokens are scored")
    assert f"with data.max_length={other} were scored on other held-out tokens than the" in end
    assert f"best of {len(finished[chosen])} finished trials" in told["verdict"]["sentence"]
    assert start in err

    page = Path(told["report"]).read_text("utf-8")
    assert end in page and start in page
    found = re.search(r'id="report-data">(.*?)</script>', page, re.S)
    assert found is not None
    shown = {trial["id"]: trial for trial in json.loads(found.group(1))["trials"]}
    for length, some in by_length.items():
        for row in some:
            trial = shown[row.trial_id]
            assert (trial["metric"] is None) == (trial["evalLoss"] == []) == (length == other)
    assert page.count("scored on other held-out tokens</div>") == len(by_length[other])
