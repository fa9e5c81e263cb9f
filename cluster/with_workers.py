"""Runs a command on a cluster that has grown to so many workers, and lets go of them after it.

    ray job submit --working-dir . -- python cluster/with_workers.py 4 GPU -- \
        python experiments/sweep_qlora.py storage=/mnt/shared/runs

A sweep plans with the nodes that are there when it begins. This asks the autoscaler for COUNT times
RESOURCE (`GPU`, or `CPU=8` for so many on one node), waits for them, and starts the command. Where
the cloud has fewer within --patience seconds, the command starts with those, and no more are asked
for; with none, it doesn't.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import ray
from ray.autoscaler.sdk import request_resources


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, help="how many")
    parser.add_argument("resource", type=parse_resource, help="GPU, or NAME=AMOUNT")
    parser.add_argument("--patience", type=float, default=1200.0, help="seconds (1200)")
    parser.add_argument("command", nargs="+", help="after --: what to run")
    args = parser.parse_args()
    name, amount = args.resource
    ray.init(address="auto", log_to_driver=False)
    # The request stands, and is paid for, until it is taken back: by `ray job stop` too.
    signal.signal(signal.SIGTERM, _stop)
    request_resources(bundles=[{name: amount}] * args.count)
    try:
        found = wait_for(args.count, name, amount, args.patience)
        if found == 0:
            print(f"with_workers.py: no node with {name}={amount:g} came", file=sys.stderr)
            return 1
        if found < args.count:
            # The command would not use what comes later, and it would be paid for.
            request_resources(bundles=[{name: amount}] * found)
        return run(args.command)
    finally:
        request_resources(bundles=[])
        ray.shutdown()


_STOPPED = 143
"""The exit code of what SIGTERM ends."""


def _stop(*_: object) -> None:
    sys.exit(_STOPPED)


def run(command: Sequence[str]) -> int:
    """Run the command and return its exit code; SIGTERM ends both, whenever it comes."""
    asked: list[int] = []
    # An exception amid the start would leave a process that nobody knows of.
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    process = subprocess.Popen(command)
    try:
        signal.signal(signal.SIGTERM, _stop)
        if asked:
            _stop()
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def parse_resource(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    return name, float(amount or 1)


def wait_for(count: int, name: str, amount: float, patience: float) -> int:
    """How many times the living nodes hold `amount`, `count` at most."""
    deadline = time.monotonic() + patience
    found = -1
    while True:
        living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        now = min(count, sum(int(node.get(name, 0.0) // amount) for node in living))
        if now != found:
            print(f"{now} of {count} times {name}={amount:g} are there", flush=True)
        found = now
        if found >= count or time.monotonic() > deadline:
            return found
        time.sleep(2)


if __name__ == "__main__":
    sys.exit(main())
