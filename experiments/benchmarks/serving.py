"""The serving engine beside PEFT's and transformers' own generation, on the same requests.

    python experiments/benchmarks/serving.py [--rounds 5] [--only PART] [--plot steps.svg]

SmolLM2 in float32 on this machine; 16 requests at once, 32 new tokens each, greedy. The sides take
turns in one process, and a figure is the ratio of their medians. Everything runs as a user would
have it: the engine takes requests one by one, PEFT and transformers get one padded batch. Threads
of all sides wait as rayfin has them wait, without spinning; OMP_WAIT_POLICY=ACTIVE changes that.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import print_figure, spread
from serving_http import api_alone, clients, deployment
from serving_plot import write_plot
from serving_sides import (
    ENGINE,
    MODEL,
    REQUESTS,
    TOKENS,
    alternate,
    figure,
    load,
    make_adapters,
    make_engine,
    prompts,
    through_engine,
    through_generate,
)

PARTS = ("generation", "mixtures", "int8", "loading", "http", "steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each side")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (all-linear)")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part, may be repeated")
    parser.add_argument("--plot", type=Path, help="write decode step times as an SVG file here")
    args = parser.parse_args()
    policy = os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    print(f"OMP_WAIT_POLICY={policy}")
    rounds = args.rounds
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder), 32, args.rank)
        parts: dict[str, Callable[[], None]] = {
            "generation": lambda: generation(adapters, rounds),
            "mixtures": lambda: mixtures(adapters, rounds),
            "int8": lambda: int8(rounds),
            "loading": lambda: loading(Path(folder), rounds),
            "http": lambda: http(adapters, rounds),
            "steps": lambda: steps(adapters, 2 * rounds, args.plot),
        }
        for name in args.only or PARTS:
            parts[name]()


def generation(adapters: Sequence[Any], rounds: int) -> None:
    """The engine beside `generate`: the bare base, and 8 adapters mixed."""
    import peft

    print(f"\n{REQUESTS} requests, {TOKENS} new tokens each: engine, transformers, PEFT")
    engine, plain = make_engine(), load()
    tokenizer = engine.tokenizer
    mixed = peft.PeftModel.from_pretrained(load(), adapters[0].path, adapter_name="a0").eval()
    for number in range(1, 8):
        mixed.load_adapter(adapters[number].path, adapter_name=f"a{number}")
    names = [f"a{i % 8}" for i in range(REQUESTS)]
    speeds = alternate(
        rounds,
        {
            "engine, base": lambda: through_engine(engine, []),
            "generate, base": lambda: through_generate(plain, tokenizer),
            "engine, 8 adapters": lambda: through_engine(engine, adapters[:8]),
            "PEFT, 8 adapters": lambda: through_generate(mixed, tokenizer, adapter_names=names),
        },
    )
    engine.close()
    figure("mixed8_vs_peft", speeds["engine, 8 adapters"], speeds["PEFT, 8 adapters"], 3.0)
    figure("mixed8_vs_base", speeds["engine, 8 adapters"], speeds["engine, base"], 0.75)
    figure("base_vs_generate", speeds["engine, base"], speeds["generate, base"], 1.0)


def mixtures(adapters: Sequence[Any], rounds: int) -> None:
    """More adapters than rows' worth, and more than slots."""
    print("\n32 requests: 8 and 32 adapters in as many slots; 16 adapters in 8 and in 16 slots")
    many = make_engine(max_rows=32, slots=32)
    speeds = alternate(
        rounds,
        {
            "32 requests, 8 adapters": lambda: through_engine(many, adapters[:8], requests=32),
            "32 requests, 32 adapters": lambda: through_engine(many, adapters, requests=32),
        },
    )
    many.close()
    figure(
        "mixed32_vs_mixed8",
        speeds["32 requests, 32 adapters"],
        speeds["32 requests, 8 adapters"],
        0.85,
    )
    few, enough = make_engine(slots=8), make_engine(slots=16)
    speeds = alternate(
        rounds,
        {
            "16 adapters, 8 slots": lambda: through_engine(few, adapters[:16], requests=48),
            "16 adapters, 16 slots": lambda: through_engine(enough, adapters[:16], requests=48),
        },
    )
    few.close()
    enough.close()
    figure(
        "double_working_set", speeds["16 adapters, 8 slots"], speeds["16 adapters, 16 slots"], 0.5
    )


def int8(rounds: int) -> None:
    """8-bit weights beside `generate` in float32, and how often both say the same."""
    print("\nengine with weights: int8, and generate in float32")
    engine, plain = make_engine(weights="int8"), load()
    speeds = alternate(
        rounds,
        {
            "engine, int8": lambda: through_engine(engine, []),
            "generate, float32": lambda: through_generate(plain, engine.tokenizer),
        },
    )
    _, ours = through_engine(engine, [])
    _, theirs = through_generate(plain, engine.tokenizer)
    engine.close()
    agreeing = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), TOKENS)
        for x, y in zip(ours, theirs, strict=True)
    ]
    print(f"tokens until the first difference, of {TOKENS}: {sorted(agreeing)}")
    print_figure(
        "serving", "int8_greedy_agreement", statistics.mean(agreeing) / TOKENS, "share", 0.0
    )
    figure("int8_vs_generate", speeds["engine, int8"], speeds["generate, float32"], 1.6)


def loading(folder: Path, rounds: int) -> None:
    """A cold adapter of rank 16: disk to host memory, host memory to slot, and the first token."""
    print("\ncold load of an adapter of rank 16 on all linear layers")
    sources = make_adapters(folder, rounds + 1, 16)
    engine = make_engine(slots=rounds + 2)
    reads, fills, firsts = [], [], []
    for source in sources:
        started = time.perf_counter()
        adapter = engine.read(source)
        read = time.perf_counter()
        engine.model.fill(rounds + 2, adapter)
        filled = time.perf_counter()
        reads.append((read - started) * 1e3)
        fills.append((filled - read) * 1e3)
    for source in sources:
        firsts.append(through_engine(engine, [source], requests=1, tokens=1)[0] * 1e3)
    warm = [through_engine(engine, [source], requests=1, tokens=1)[0] * 1e3 for source in sources]
    same = [through_engine(engine, sources[:1], requests=1, tokens=1)[0] * 1e3 for _ in sources]
    engine.close()
    for name, values in (
        ("disk to host memory", reads[1:]),
        ("host memory to slot", fills[1:]),
        ("cold to first token", firsts[1:]),
        ("resident, switching", warm),
        ("resident, the same", same),
    ):
        print(f"{name:24} {spread(values, 1)} ms")
    both = statistics.median(reads[1:]) + statistics.median(fills[1:])
    print_figure("serving", "disk_to_slot", both, "ms", 150.0, most=True)
    print_figure("serving", "slot_fill", statistics.median(fills[1:]), "ms", 20.0, most=True)
    print_figure(
        "serving",
        "switch_vs_same",
        statistics.median(warm) / statistics.median(same),
        "ratio",
        1.1,
        most=True,
    )


def http(adapters: Sequence[Any], rounds: int) -> None:
    """The same requests over HTTP, through `rayfin serve` and the API alone, and to an engine."""
    print("\nthrough HTTP (not streamed, and streamed) and through the engine")
    engine, used = make_engine(), adapters[:8]
    settings = {f"engine.{name}": value for name, value in ENGINE.items()} | {"model.name": MODEL}
    asked = prompts(engine.tokenizer, REQUESTS)
    with (
        deployment(used, settings) as served,
        api_alone(engine, used) as alone,
        clients(used, asked, TOKENS) as ask,
    ):
        speeds = alternate(
            rounds,
            {
                "engine": lambda: through_engine(engine, used),
                "rayfin serve": lambda: ask(served, stream=False),
                "rayfin serve, streamed": lambda: ask(served, stream=True),
                "API alone": lambda: ask(alone, stream=False),
                "API alone, streamed": lambda: ask(alone, stream=True),
            },
        )
    engine.close()
    figure("http_vs_engine", speeds["rayfin serve"], speeds["engine"], 0.9)
    figure("http_streamed_vs_engine", speeds["rayfin serve, streamed"], speeds["engine"], 0.9)
    figure("api_alone_vs_engine", speeds["API alone"], speeds["engine"], 0.9)


def steps(adapters: Sequence[Any], repeats: int, plot: Path | None) -> None:
    """Milliseconds of one decode step against rows and adapters."""
    print("\nmilliseconds of a decode step at 64 tokens of context, median")
    engine = make_engine(max_rows=32, slots=32)
    engine.close()
    table: dict[int, dict[int, float]] = {}
    for slot, source in enumerate(adapters, 1):
        engine.model.fill(slot, engine.read(source))
    for distinct in (0, 1, 4, 8, 16, 32):
        for rows in (1, 2, 4, 8, 16, 32):
            if distinct <= rows:
                table.setdefault(distinct, {})[rows] = _step(engine, rows, distinct, repeats)
    print(f"{'adapters':>8} | " + " ".join(f"{rows:>6} rows" for rows in (1, 2, 4, 8, 16, 32)))
    for distinct, times in table.items():
        cells = [f"{times[r]:11.1f}" if r in times else " " * 11 for r in (1, 2, 4, 8, 16, 32)]
        print(f"{distinct:>8} | " + "".join(cells))
    if plot is not None:
        write_plot(plot, table)
        print(f"plot: {plot}")
    del engine
    gc.collect()


def _step(engine: Any, rows: int, distinct: int, repeats: int) -> float:
    from rayfin.serving.engine.batch import RowSpan

    seconds = []
    for number in range(repeats + 1):
        pieces = [
            RowSpan(row, 1 + row % distinct if distinct else 0, 64 + number, [100 + row], True)
            for row in range(rows)
        ]
        started = time.perf_counter()
        engine.model.forward(pieces)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) * 1e3


if __name__ == "__main__":
    main()
