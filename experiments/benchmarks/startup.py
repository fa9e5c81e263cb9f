"""How long the command line takes to answer: each measurement is a fresh Python process.

python experiments/benchmarks/startup.py [--quick]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import parse_arguments, print_figure, spread

COMMANDS = {
    "bare_python": ([sys.executable, "-c", "pass"], None),
    "import_rayfin": ([sys.executable, "-c", "import rayfin"], 0.2),
    "rayfin_help": ([sys.executable, "-m", "rayfin", "--help"], 0.4),
}


def main() -> None:
    args = parse_arguments(__doc__ or "")
    repeats = 5 if args.quick else 21
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(repeats + 1):
        for name, (command, _) in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if repeat:  # the first reads files from disk
                seconds[name].append(time.perf_counter() - started)
    print(f"seconds, median of {repeats} (least to greatest)")
    for name, values in seconds.items():
        print(f"  {name:14} {spread(values, 3)}")
    for name, (_, bar) in COMMANDS.items():
        if bar is not None:
            print_figure("startup", name, statistics.median(seconds[name]), "s", bar, most=True)


if __name__ == "__main__":
    main()
