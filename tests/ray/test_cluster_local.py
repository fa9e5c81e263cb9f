"""`ray up`, a sweep by `ray job submit`, and `ray down`, over SSH to loopback."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CLUSTER = Path(__file__).parents[2] / "cluster"
PATIENCE = 1100.0


def wanting() -> str:
    """What this machine lacks for it, by the script's own account."""
    code = "import loopback; print(', '.join(loopback.missing()))"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=CLUSTER, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_own_machines_from_up_to_down(processes: ModuleType) -> None:
    if lacks := wanting():
        pytest.skip(f"a cluster over SSH to loopback can't be had, for want of {lacks}")
    command = [sys.executable, str(CLUSTER / "try_local.py")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        printed, _ = process.communicate(timeout=PATIENCE)
    finally:
        processes.end_family(process)
    assert process.returncode == 0, printed
    assert "finished on head" in printed and "finished on worker" in printed, printed
