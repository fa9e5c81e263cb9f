"""What all tests share."""

import os

# Before any test loads torch: see rayfin.cli, which does the same for the command line.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray's workers give way to all else, and would starve beside another test.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
