"""Decoding attention of the serving engine: the kernel in C beside torch's, in one process.

    python experiments/benchmarks/attention.py [--pairs 15] [--weights int8]

Both sides use the same cache of SmolLM2 (9 query and 3 key/value heads of 64 values, float32) and
take turns. Times are milliseconds, by the clock and of the processor (all threads'); a ratio is the
median over neighbouring pairs of torch's time divided by the kernel's, so that above 1 the kernel
is faster. "attention" is the call of one layer with the writing of its keys and values, "step" a
whole decode step of the engine's model.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import print_figure, spread

MAX_LENGTH, MOST_ROWS = 1024, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15, help="timings of each side")
    parser.add_argument("--weights", choices=("auto", "int8"), default="auto")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from serving_sides import make_engine

    print(f"processor: {processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    engine = make_engine(max_length=MAX_LENGTH, max_rows=MOST_ROWS, weights=args.weights)
    engine.close()
    model = engine.model
    figures: dict[str, float] = {}
    with torch.inference_mode():
        for name, lengths in shapes().items():
            print(f"\n{name}")
            for what, run, repeats in (("attention", one_layer, 30), ("step", one_step, 1)):
                figures[f"{what}, {name}"] = compare(model, what, lengths, run, args.pairs, repeats)
    for figure, value in figures.items():
        print_figure("attention", figure, value, "ratio", 1.0)


def processor() -> str:
    """Return the processor's name as the kernel tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor()


def shapes() -> dict[str, list[int]]:
    """Return the tokens that each row holds when the step begins."""
    made: dict[str, list[int]] = {}
    for rows in (8, 32):
        made |= {
            f"{rows} rows, 64 tokens each": [64] * rows,
            f"{rows} rows, 500 tokens each": [500] * rows,
            f"{rows} rows, 32 to 1000 tokens": [32 + 968 * r // (rows - 1) for r in range(rows)],
            f"{rows} rows, one of 1000 tokens, others 32": [1000] + [32] * (rows - 1),
        }
    return made


def compare(
    model: Any,
    what: str,
    lengths: list[int],
    run: Callable[[Any, list[int]], Callable[[], None]],
    pairs: int,
    repeats: int,
) -> float:
    """Print how long both sides take, and return the median of torch's times over the kernel's."""
    kernel = model.cache.kernel
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    sides: dict[str, list[dict[str, float]]] = {"kernel": [], "torch": []}
    for number in range(pairs + 1):
        order = list(sides) if number % 2 else list(sides)[::-1]
        for name in order:
            model.cache.kernel = kernel if name == "kernel" else None
            once = run(model, lengths)
            started = {clock: read() for clock, read in clocks.items()}
            for _ in range(repeats):
                once()
            taken = {c: (read() - started[c]) / repeats * 1e3 for c, read in clocks.items()}
            if number:
                sides[name].append(taken)
    model.cache.kernel = kernel
    digits = 3 if what == "attention" else 1
    medians = {}
    for clock in clocks:
        ours, theirs = ([one[clock] for one in sides[name]] for name in ("kernel", "torch"))
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        print(
            f"  {what:9} {clock:9} kernel {spread(ours, digits)} ms, torch "
            f"{spread(theirs, digits)} ms, ratio {spread(ratios)}"
        )
        medians[clock] = statistics.median(ratios)
    return medians["wall"]


def pieces(lengths: list[int]) -> list[Any]:
    from rayfin.serving.engine.batch import RowSpan

    return [RowSpan(row, 0, length, [100 + row], True) for row, length in enumerate(lengths)]


def one_layer(model: Any, lengths: list[int]) -> Callable[[], None]:
    """Return a function that writes one layer's keys and values and attends, as the model does."""
    import torch

    from rayfin.serving.engine.batch import Batch

    cache = model.cache
    cache.begin(Batch(pieces(lengths), model.device))
    shared, dim = cache.keys[0].shape[1], cache.keys[0].shape[3]
    heads = model.base.config.num_attention_heads
    query = torch.randn(len(lengths), heads, dim).transpose(0, 1)
    new = torch.randn(1, len(lengths), shared, dim).transpose(1, 2)
    scaling = dim**-0.5

    def once() -> None:
        cache.update(new, new, 0)
        cache.attend(0, query, scaling)

    return once


def one_step(model: Any, lengths: list[int]) -> Callable[[], None]:
    return lambda: model.forward(pieces(lengths))


if __name__ == "__main__":
    main()
