"""Forks the processes in which trials run, for all tests of a session.

What trials import takes longer than they do: here it is imported once. A line of JSON on stdin is
{run, jobs}, `run` being killed or group; the answer is a line of JSON on stdout. This
process has no other thread, which a fork would lose.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys

import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        request = json.loads(line)
        module = importlib.import_module(f"{request['run']}_trials")
        warm = module.loaded(request["jobs"])
        # A forked process that collects garbage would copy all that it looks at.
        gc.freeze()
        print(
            json.dumps([module.run(job, warm) for job in request["jobs"]]), file=answers, flush=True
        )
