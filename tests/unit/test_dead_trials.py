"""What the row of a trial says whose process died."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rayfin.history import TrialRecord, now
from rayfin.tuning.rows import died

TRACE = """\
\x1b[36mray::GroupTrainable.train()\x1b[39m (pid=7, ip=127.0.0.1, actor=3c, repr=<GroupTrainable>)
  File "trainable.py", line 329, in train
    result = self.step()
rayfin.errors.TrialError: the process between the workers and this one died
"""


def test_of_a_trace_that_ray_has_coloured_the_row_has_the_error_alone() -> None:
    began = {"created_at": now(), "updated_at": now()}
    row = TrialRecord(trial_id="a", sweep_id="s", fingerprint="f", status="running", **began)
    told = "rayfin.errors.TrialError: the process between the workers and this one died"
    assert died(row, TRACE).error == f"worker process died: {told}"


def test_of_a_dead_trial_the_notes_are_read_and_no_pickle(tmp_path: Path) -> None:
    from rayfin.tuning.hooks import _reason

    class Touch:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "unpickled",))

    raw = pickle.dumps(Touch())
    pickle.loads(raw)
    (tmp_path / "unpickled").unlink()  # it does what it is for
    (tmp_path / "error.pkl").write_bytes(raw)
    (tmp_path / "error.txt").write_text("Failure # 1 (occurred at 2026)\nit died\n")
    trial: Any = SimpleNamespace(
        error_file=str(tmp_path / "error.txt"),
        pickled_error_file=str(tmp_path / "error.pkl"),
        get_pickled_error=lambda: pickle.loads(raw),
        get_error=lambda: pickle.loads(raw),
    )
    assert _reason(trial) == "it died"
    (tmp_path / "error.txt").unlink()
    assert _reason(trial) is None
    assert not (tmp_path / "unpickled").exists()
