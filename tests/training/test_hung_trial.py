"""A trial of a sweep that hangs, without a Ray: what Tune's worker does about it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from rayfin import heartbeat
from rayfin.errors import TrialHung
from rayfin.paths import Place
from rayfin.tuning import worker
from rayfin.tuning.plan import PlannedTrial
from rayfin.tuning.rows import died, started


class Impatient(worker.WarmTrial):
    def setup(self, config: dict[str, Any], **_: Any) -> None:
        super().setup(config, hang_minutes=0.1, use_gpu=False)


def test_a_trial_that_is_stuck_reading_its_checkpoint_fails_and_takes_its_process_along(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.run(lab.spec())  # what takes time in a first trial, such as imports, is no hang
    torn = tmp_path / "trial" / "checkpoints" / "checkpoint-2"
    torn.mkdir(parents=True)
    os.mkfifo(torn / "sums.json")  # whoever reads it waits, as on a disk that stalls
    planned = PlannedTrial("s-f", "f", {}, lab.spec(), Place(tmp_path / "trial"))
    monkeypatch.setattr(worker, "_draining", lambda: False)
    # This process is the tests' own.
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    trial = Impatient(planned.as_tune_config())
    with pytest.raises(
        TrialHung, match=r"no progress for 0.1 minutes in reading the checkpoint: "
    ) as hung:
        trial.train()
    said = str(hung.value)
    assert "open (pathlib:" in said and "_damaged (rayfin.training.checkpoint:" in said
    # Tune ends the actor of a trial that raised: only the end of the process ends that thread.
    ended: list[int] = []
    monkeypatch.setattr(worker.os, "_exit", ended.append)
    (torn / "sums.json").open("w").close()  # else the thread of this test would wait for ever
    trial.stop()
    assert ended == [1]
    assert str(pickle.loads(pickle.dumps(hung.value))) == said

    row = died(started(planned), f"ray.exceptions.RayTaskError\nrayfin.errors.TrialHung: {said}")
    assert (row.status, row.error) == ("failed", said)
