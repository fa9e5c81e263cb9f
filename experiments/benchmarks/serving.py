"""The serving engine beside PEFT's and transformers' own generation, on the same requests.

    python experiments/benchmarks/serving.py [--quick] [--rank 8] [--plot steps.svg]

SmolLM2 in float32 on this machine; 16 requests at once, 32 new tokens each, greedy. The sides take
turns in one process, and a figure is the ratio of their medians. Everything runs as a user would
have it: the engine takes requests one by one, PEFT and transformers get one padded batch.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import print_figure, spread
from serving_http import http_throughput
from serving_plot import write_plot

MODEL = "smollm2-135m"
REQUESTS, TOKENS = 16, 32
QUESTIONS = (
    "How do I reset my password?",
    "What does the function os.path.join do, and when would I rather use pathlib?",
    "My card was charged twice.",
    "Translate 'good morning' into French, German and Italian, please.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, to see that it works")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (all-linear)")
    parser.add_argument("--plot", type=Path, help="write decode step times as an SVG file here")
    args = parser.parse_args()
    rounds = 2 if args.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder), 32, args.rank)
        generation(adapters, rounds)
        mixtures(adapters, rounds)
        int8(rounds)
        loading(Path(folder), rounds)
        http(adapters, rounds)
        steps(adapters, 2 if args.quick else 10, args.plot)


# --- the sides ------------------------------------------------------------------------------------


def make_adapters(folder: Path, count: int, rank: int) -> list[Any]:
    """LoRA adapters on all linear layers, with small random weights."""
    import peft
    import torch

    from rayfin.serving.engine.request import AdapterSource

    base = load()
    settings = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    sources = []
    for number in range(count):
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.02)
        path = folder / f"r{rank}-{number}"
        model.save_pretrained(str(path))
        sources.append(AdapterSource(f"r{rank}-{number}@1", path))
    return sources


def load() -> Any:
    from rayfin.config.schema import ModelConfig
    from rayfin.models import load_base

    return load_base(ModelConfig(name=MODEL), None, "cpu")


def make_engine(**settings: Any) -> Any:
    from rayfin.config.schema import ModelConfig
    from rayfin.config.serving import EngineConfig
    from rayfin.serving.engine.engine import Engine

    given = {"max_length": 512, "max_rows": REQUESTS, "slots": 8} | settings
    engine = Engine(ModelConfig(name=MODEL), EngineConfig(**given), use_gpu=False)
    engine.start()
    return engine


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of questions in the model's chat template."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for i in range(count)
    ]


def through_engine(
    engine: Any, adapters: Sequence[Any], *, requests: int = REQUESTS, tokens: int = TOKENS
) -> tuple[float, list[list[int]]]:
    """Seconds until all requests have their answers (request i asks adapter i), and the answers."""
    from rayfin.serving.engine.request import Request, SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    answers: list[list[int]] = [[] for _ in range(requests)]
    left = threading.Semaphore(0)

    def sink(number: int) -> Callable[[Any], None]:
        def take(chunk: Any) -> None:
            answers[number] += chunk.token_ids
            if chunk.finish_reason is not None:
                assert chunk.finish_reason == "length", chunk.error
                left.release()

        return take

    asked = prompts(engine.tokenizer, requests)
    started = time.perf_counter()
    for number, prompt in enumerate(asked):
        adapter = adapters[number % len(adapters)] if adapters else None
        name = f"{time.monotonic_ns()}-{number}"
        engine.submit(Request(name, tuple(prompt), params, adapter), sink(number))
    for _ in range(requests):
        left.acquire()
    return time.perf_counter() - started, answers


def through_generate(model: Any, tokenizer: Any, **options: Any) -> tuple[float, list[list[int]]]:
    """The same for one static, left-padded batch."""
    import torch

    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": prompts(tokenizer, REQUESTS)}, return_tensors="pt")
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            **batch,
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    return time.perf_counter() - started, out[:, batch["input_ids"].shape[1] :].tolist()


def alternate(rounds: int, sides: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Tokens a second of each side, the sides in turn; a warm-up round is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            seconds, answers = run()
            if number:
                speeds[name].append(sum(map(len, answers)) / seconds)
    for name, values in speeds.items():
        print(f"{name:24} {spread(values, 1)} tokens/s")
    return speeds


def figure(name: str, ours: Sequence[float], theirs: Sequence[float], bar: float) -> None:
    print_figure("serving", name, statistics.median(ours) / statistics.median(theirs), "ratio", bar)


# --- the figures ----------------------------------------------------------------------------------


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
    """The same requests through the API, by HTTP, and by calling the engine."""
    print("\nthrough HTTP (not streamed, and streamed) and through the engine")
    engine = make_engine()
    with http_throughput(engine, adapters[:8], prompts(engine.tokenizer, REQUESTS), TOKENS) as ask:
        speeds = alternate(
            rounds,
            {
                "engine": lambda: through_engine(engine, adapters[:8]),
                "HTTP": lambda: ask(stream=False),
                "HTTP, streamed": lambda: ask(stream=True),
            },
        )
    engine.close()
    figure("http_vs_engine", speeds["HTTP"], speeds["engine"], 0.9)
    figure("http_streamed_vs_engine", speeds["HTTP, streamed"], speeds["engine"], 0.9)


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
    from rayfin.serving.engine.batch import Piece

    seconds = []
    for number in range(repeats + 1):
        pieces = [
            Piece(row, 1 + row % distinct if distinct else 0, 64 + number, [100 + row], True)
            for row in range(rows)
        ]
        started = time.perf_counter()
        engine.model.forward(pieces)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) * 1e3


if __name__ == "__main__":
    main()
