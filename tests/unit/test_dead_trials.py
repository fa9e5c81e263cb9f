"""What the row of a trial says whose process died."""

from rayfin.history import TrialRecord, now
from rayfin.tuning.rows import died

TRACE = """\
\x1b[36mray::GroupTrial.train()\x1b[39m (pid=7, ip=127.0.0.1, actor_id=3c, repr=<GroupTrial>)
  File "trainable.py", line 329, in train
    result = self.step()
rayfin.errors.TrialError: the process between the workers and this one died
"""


def test_of_a_trace_that_ray_has_coloured_the_row_has_the_error_alone() -> None:
    began = {"created_at": now(), "updated_at": now()}
    row = TrialRecord(trial_id="a", sweep_id="s", fingerprint="f", status="running", **began)
    told = "rayfin.errors.TrialError: the process between the workers and this one died"
    assert died(row, TRACE).error == f"worker process died: {told}"
