"""What the serving benchmarks compare: our engine, PEFT and transformers, on the same requests."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import print_figure, spread

MODEL = "smollm2-135m"
REQUESTS, TOKENS = 16, 32
ENGINE: dict[str, Any] = {"max_length": 512, "max_rows": REQUESTS, "slots": 8}
QUESTIONS = (
    "How do I reset my password?",
    "What does the function os.path.join do, and when would I rather use pathlib?",
    "My card was charged twice.",
    "Translate 'good morning' into French, German and Italian, please.",
)


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

    engine = Engine(ModelConfig(name=MODEL), EngineConfig(**ENGINE | settings), use_gpu=False)
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
