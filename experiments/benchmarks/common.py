"""What the benchmarks share: running a side as its own process, and printing figures."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse_arguments(description: str, sides: Sequence[str] = ()) -> argparse.Namespace:
    """`--quick` for a short run; `--side` and `--out` are how a benchmark calls itself."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    if sides:
        parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
        parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
        parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_side(script: str, side: str, work: Path, *, quick: bool) -> dict[str, Any]:
    """Runs one side of a comparison in a fresh process; its result, with its `wall_seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, script, "--side", side, "--work", str(work), "--out", str(out)]
        command += ["--quick"] if quick else []
        started = time.perf_counter()
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=quiet_environment()
        )
        wall = time.perf_counter() - started
        if done.returncode != 0:
            raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
    return result | {"wall_seconds": wall}


def quiet_environment() -> dict[str, str]:
    """The same for both sides; PASSIVE is what rayfin's commands set, and helps a busy machine."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (least to greatest)`."""
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_figure(
    benchmark: str, figure: str, value: float, unit: str, bar: float, *, most: bool = False
) -> None:
    """One JSON line; `most` marks a bar that must not be exceeded."""
    line = {
        "benchmark": benchmark,
        "figure": figure,
        "value": round(value, 4),
        "unit": unit,
        "bar": bar,
    }
    print(json.dumps(line | ({"at_most": True} if most else {})))
