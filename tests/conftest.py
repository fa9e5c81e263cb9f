"""What all tests share."""

import os

# Before any test loads torch: see rayfin.cli, which does the same for the command line.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
