"""Runs the numeric tests with other instruction sets and other orders of summation than usual.

python tests/numerics.py [SETTING ...]: each in turn, by default all of them but `native`. Prints a
line for each, and all that pytest says of one that fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
MARK = "pytest.mark.numeric"
SETTINGS: dict[str, dict[str, str]] = {
    # As this processor is: `make test` has run them so.
    "native": {},
    # As on a processor without AVX-512; in one thread, where the serving tests have several.
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OMP_NUM_THREADS": "1",
    },
    # As little as there is; our C adds in the order in which it is written and rounds each product.
    # In two threads, where the training tests have one.
    "plain": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "2",
        "RAYFIN_CFLAGS": "-O2 -ffp-contract=off -fno-associative-math",
    },
}
VARIABLES = sorted({name for setting in SETTINGS.values() for name in setting})


def arithmetic() -> list[str]:
    """What decides how numbers are rounded, for the head of pytest's report."""
    import torch

    from rayfin.serving.engine.native import compiler_flags

    given = " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    using, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return [
        f"arithmetic: torch {using}, {threads} threads; processor: {_instruction_sets()}",
        f"our C: {' '.join(compiler_flags())}",
        f"asked for: {given or 'nothing'}",
    ]


def _instruction_sets() -> str:
    """Those of this processor that torch, oneDNN, MKL and our C choose by."""
    try:
        told = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "unknown"
    known = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")
    return " ".join(name for name in known if name in told) or "none of " + ", ".join(known)


def run(name: str) -> bool:
    """Whether the tests pass under the setting; prints its line."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    # Named one by one: to import all other tests takes as long as to run these.
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if MARK in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "numeric", "-n", "2", "--dist", "loadfile"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *map(str, files)],
        cwd=TESTS.parent,
        env=environment | SETTINGS[name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        print(done.stdout)
    # Libraries may say something after pytest's last line.
    summaries = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    ended = re.sub(r" in [\d.]+s.*", "", summaries[-1].strip("= ")) if summaries else "no test ran"
    using = next((line for line in lines if line.startswith("arithmetic: ")), "")
    seconds = time.monotonic() - started
    print(f"{name}: {ended} in {seconds:.0f} s ({using.removeprefix('arithmetic: ')})", flush=True)
    return done.returncode == 0


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        print(f"no setting '{unknown[0]}'; there are {', '.join(SETTINGS)}", file=sys.stderr)
        return 2
    passed = [run(name) for name in names or [name for name in SETTINGS if name != "native"]]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
