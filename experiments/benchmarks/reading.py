"""Reads, checks and hashes a million rows of JSON Lines on one core, beside `json.loads` alone.

What rayfin does with them is what `data.streaming=true` does before training: each row is parsed,
its format and every column and turn checked, and its content hashed (the split, the fingerprint and
the profile's sample come of that). With `data.streaming=false` all samples are held in memory and
ordered, too. The tokens are not counted. The time is the processor's, of one process; medians of
three rounds of all sides in turn.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import parse_arguments, print_figure

from rayfin.config import load_config
from rayfin.data import load_corpus

_WORDS = "time year people way day thing world life school state group country problem".split()  # noqa: SIM905


def write_rows(path: Path, count: int, layout: str) -> None:
    """Rows of about 800 bytes, which the words of questions and answers fill."""
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            question = f"{number} {' '.join(rng.choices(_WORDS, k=40))}"
            answer = " ".join(rng.choices(_WORDS, k=90))
            row: dict[str, object] = {"instruction": question, "input": "", "output": answer}
            if layout == "messages":
                said = (("user", question), ("assistant", answer))
                row = {"messages": [{"role": role, "content": text} for role, text in said]}
            file.write(json.dumps(row) + "\n")


def parse(path: Path) -> None:
    """The side that rayfin is compared with."""
    with path.open("rb") as file:
        for line in file:
            json.loads(line)


def read(path: Path, *, streaming: bool) -> None:
    """What rayfin does before a trial."""
    load_corpus(load_config(None, [f"data.path={path}", f"data.streaming={streaming}"]).data)


def processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def seconds(work: Callable[[Path], None], path: Path) -> float:
    """The processor's seconds of this process."""
    started = time.process_time()
    work(path)
    return time.process_time() - started


def main() -> None:
    """Print the rates and their ratio for each layout."""
    quick = parse_arguments(__doc__ or "").quick
    count = 20_000 if quick else 1_000_000
    print(f"processor: {processor()}")
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("messages", "instruction"):
            path = Path(folder) / f"{layout}.jsonl"
            write_rows(path, count, layout)
            sides = (parse, partial(read, streaming=True), partial(read, streaming=False))
            rounds = [[seconds(side, path) for side in sides] for _ in range(3)]
            parsed, *wholes = (statistics.median(side) for side in zip(*rounds, strict=True))
            size = path.stat().st_size / 1e6
            for how, whole in zip(("streamed", "in memory"), wholes, strict=True):
                what = f"{count} rows of {layout}, {how}"
                print_figure("reading", what, size / whole, "MB/s", 60)
                print_figure(
                    "reading", f"{what}: time of json.loads", whole / parsed, "times", 8, most=True
                )
            path.unlink()


if __name__ == "__main__":
    main()
