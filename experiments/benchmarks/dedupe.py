"""Deduplicates a million short rows, with duplicates planted among them, and counts what was found.

The rows have 30 to 60 words, drawn as often as words of a language are (Zipf). One in twenty
repeats an earlier row, one in ten repeats one with up to eight words changed; which of these are
similar, at the threshold of 0.8, is computed here from the texts themselves. The other side is
datasketch as its guide uses it, on some of the rows: a MinHash that is updated with one shingle
after the other, and a MinHashLSH. The times that are compared are those of the processors, of all
processes; memory is what all of rayfin's held at most, shared pages counted once.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from attention import processor
from common import parse_arguments, print_figure, quiet_environment
from datasketch import MinHash, MinHashLSH
from streaming import held

_WORDS = 20_000
_THRESHOLD = 0.8
_PLAIN_ROWS = 1000


def write_rows(path: Path, count: int) -> dict[int, tuple[int, float]]:
    """Write the rows; return by their lines the planted ones: the line of which, how similar."""
    rng = random.Random(0)
    letters = "eeeetttaaaooiinnsshhrrddllcumwfgypbvkjxqz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 10))) for _ in range(_WORDS)]
    weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(_WORDS)))
    fresh: list[tuple[int, list[str]]] = []
    planted: dict[int, tuple[int, float]] = {}
    with path.open("w") as file:
        for line in range(1, count + 1):
            kind = rng.random() if len(fresh) > 1000 else 1.0
            if kind >= 0.15:
                row = rng.choices(words, cum_weights=weights, k=rng.randint(30, 60))
                if len(fresh) < 100_000:
                    fresh.append((line, row))
            else:
                original, first = rng.choice(fresh)
                row = list(first)
                if kind >= 0.05:
                    for place in rng.sample(range(len(row)), rng.randint(1, 8)):
                        row[place] = rng.choice(words)
                similarity = jaccard(text(first), text(row)) if row != first else 1.0
                planted[line] = original, similarity
            prompt, completion = " ".join(row[:12]), " ".join(row[12:])
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return planted


def text(row: list[str]) -> str:
    """Return a row's text as rayfin compares it."""
    return f"{' '.join(row[:12])} {' '.join(row[12:])}"


def shingles(of: str) -> set[str]:
    """Return all sequences of five characters."""
    return {of[n : n + 5] for n in range(len(of) - 4)}


def jaccard(first: str, second: str) -> float:
    """Return the similarity of two texts."""
    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


def plain(path: Path, count: int) -> float:
    """Return the processor's seconds of datasketch's plain loop over the first rows."""
    with path.open() as file:
        rows = [json.loads(line) for line in itertools.islice(file, count)]
    index = MinHashLSH(threshold=_THRESHOLD, num_perm=128)
    started = time.process_time()
    for number, row in enumerate(rows):
        signature = MinHash(num_perm=128)
        for shingle in shingles(f"{row['prompt']} {row['completion']}"):
            signature.update(shingle.encode())
        if not index.query(signature):
            index.insert(number, signature)
    return time.process_time() - started


def dedupe(path: Path, output: Path) -> tuple[float, float, int]:
    """Run the command; return its seconds, those of the processors, and the most bytes it held."""
    command = [sys.executable, "-m", "rayfin", "data", "dedupe", str(path), "--output", str(output)]
    command += ["--threshold", str(_THRESHOLD)]
    before, started, peak = processor_seconds(), time.perf_counter(), 0
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=quiet_environment())
    own = psutil.Process(running.pid)
    while running.poll() is None:
        peak = max(peak, sum(map(held, [own, *own.children(recursive=True)])))
        time.sleep(0.25)
    wall = time.perf_counter() - started
    if running.returncode:
        raise SystemExit("rayfin data dedupe failed")
    return wall, processor_seconds() - before, peak


def processor_seconds() -> float:
    """Return those of all processes that have ended and that this one has started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_report(file: Path) -> tuple[dict[str, Any], dict[int, tuple[int, float]]]:
    """Return the counts of a report, and of each line left out which it duplicates, how similar."""
    report = json.loads(file.read_bytes())
    lost = {
        each["line"]: (each["duplicate_of"]["line"], float(each["similarity"]))
        for each in report.pop("left_out")
    }
    return report, lost


def main() -> None:
    """Print the times, the memory, and how much of what was planted was found."""
    quick = parse_arguments(__doc__ or "").quick
    count = 20_000 if quick else 1_000_000
    print(f"processor: {processor()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        planted = write_rows(path, count)
        size = path.stat().st_size / 1e6
        similarities = [similarity for _, similarity in planted.values()]
        equal = similarities.count(1)
        similar = sum(_THRESHOLD <= similarity < 1 for similarity in similarities)
        print(
            f"{count} rows, {size:.0f} MB; planted: {equal} equal, {similar} similar, "
            f"{len(planted) - equal - similar} less similar",
            flush=True,
        )
        per_row = plain(path, _PLAIN_ROWS) / _PLAIN_ROWS
        wall, used, peak = dedupe(path, Path(folder) / "unique.jsonl")
        report, lost = read_report(Path(folder) / "unique.report.json")
    if report["rows"] != count or count != report["written"] + len(lost):
        raise SystemExit("rows were lost")
    print(
        f"rayfin data dedupe: {wall:.0f} s, {used:.0f} s of the processors "
        f"({used / count * 1e6:.0f} us a row), {peak / 2**20:.0f} MiB; left out: "
        f"{report['equal']} equal, {report['similar']} similar\n"
        f"datasketch in a plain loop: {per_row * 1e6:.0f} us a row"
    )
    wanted = {line for line, (_, similarity) in planted.items() if similarity >= _THRESHOLD}
    right = wanted & lost.keys()
    off = [
        abs(lost[line][1] - planted[line][1]) for line in right if lost[line][0] == planted[line][0]
    ]
    print_figure("dedupe", "rows_per_second", count / wall, "rows/s", 5000)
    print_figure("dedupe", "plain_loop_vs_rayfin", per_row * count / used, "times", 10)
    print_figure("dedupe", "peak_memory", peak / 2**20, "MiB", 1024, most=True)
    print_figure("dedupe", "recall", len(right) / len(wanted), "share", 0.98)
    print_figure("dedupe", "precision", len(right) / len(lost), "share", 0.999)
    print_figure("dedupe", "similarity_off_by", max(off), "share", 0.000001, most=True)


if __name__ == "__main__":
    main()
