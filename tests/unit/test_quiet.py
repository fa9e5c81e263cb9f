"""What a command prints is what rayfin wrote: no library speaks beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from rayfin.cli import guarded, main

def all_of_it():
    settings = [
        "model.name=tiny", "data.path=rows.jsonl", "data.max_length=64", "train.max_steps=2",
        "storage=runs",
    ]
    assert main(["train", "--json", *settings, "method.type=p_tuning"]) == 0
    # Its head is tied to the embeddings, of which PEFT would warn.
    assert main(["train", "--json", *settings, "method.modules_to_save=[lm_head]"]) == 0
    # As a sweep does for its report.
    from rayfin.evaluation.samples import answer_samples
    from rayfin.history import History
    with History.open("sqlite:///runs/history.sqlite") as history:
        trials = history.trials()
    assert [len(answer_samples(trial, 2)) for trial in trials] == [2, 2]
    import os
    os.environ.pop("DS_ACCELERATOR")  # a trial sets it; other parts import DeepSpeed as well
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        del sys.modules[name]
    from deepspeed.accelerator import get_accelerator
    get_accelerator()
    return 0

sys.exit(guarded(all_of_it))
"""


def test_nothing_but_rayfins_own_lines(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i % 3}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    environment = {name: v for name, v in os.environ.items() if name != "DS_ACCELERATOR"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if not line.startswith("{")] == []
    step = re.compile(r"step \d/2  eval_loss [\d.]+  exact_match [\d.]+  \d+ tokens/s")
    assert [line for line in result.stderr.splitlines() if not step.fullmatch(line)] == []
