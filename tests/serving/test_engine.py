"""What the engine promises beside right answers: slots, queues, cancelling, and failures alone."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig
from rayfin.errors import (
    AdapterError,
    ConfigError,
    HardwareError,
    ModelError,
    Overloaded,
    RequestError,
)
from rayfin.serving.engine import attention, cache
from rayfin.serving.engine.open import open_engine
from rayfin.serving.engine.request import AdapterSource, Chunk, Request, SamplingParams

Adapters = dict[str, AdapterSource]


@pytest.fixture
def prompt(tiny_tokenizer: Any) -> list[int]:
    ids: list[int] = tiny_tokenizer("What is a list, and why?")["input_ids"]
    return ids


def test_more_adapters_than_slots_answer_as_if_alone(
    lab: Any, engines: Any, tiny: str, tiny_adapters: Adapters, prompt: list[int]
) -> None:
    engine = engines(tiny, max_rows=4, slots=2, max_length=128, prefill_chunk=8)
    alone = {
        name: lab.ask(engine, prompt, source).wait().token_ids
        for name, source in tiny_adapters.items()
    }
    asked = [
        (name, lab.ask(engine, prompt, source))
        for _ in range(4)
        for name, source in tiny_adapters.items()
    ]
    for name, answer in asked:
        assert answer.wait().token_ids == alone[name], name
    stats = engine.stats()
    assert stats.slot_evictions > 0
    assert (stats.running, stats.waiting) == (0, 0)
    # Each was read from disk once; the slots took them from host memory.
    assert stats.host_loads == len(tiny_adapters)
    assert len(engine.resident()) == 2


def test_rows_join_and_leave_at_any_step(
    lab: Any, engines: Any, tiny: str, tiny_adapters: Adapters, tiny_tokenizer: Any
) -> None:
    engine = engines(tiny, max_rows=3, max_length=256, prefill_chunk=8)
    prompts = [tiny_tokenizer("word " * n)["input_ids"] for n in range(1, 13)]
    sources = [*tiny_adapters.values(), None]
    jobs = [(p, sources[i % len(sources)], 1 + 5 * (i % 4)) for i, p in enumerate(prompts)]
    alone = [lab.ask(engine, p, s, lab.greedy(n)).wait().token_ids for p, s, n in jobs]
    together = [lab.ask(engine, p, s, lab.greedy(n)) for p, s, n in jobs]
    assert [answer.wait().token_ids for answer in together] == alone
    assert [len(ids) for ids in alone] == [n for _, _, n in jobs]


def test_a_seed_draws_the_same_whatever_is_beside_it(
    lab: Any, engines: Any, tiny: str, tiny_adapters: Adapters, prompt: list[int]
) -> None:
    engine = engines(tiny, max_rows=8, max_length=128)
    drawn = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True)
    alone = lab.ask(engine, prompt, tiny_adapters["lora"], drawn).wait().token_ids
    others = [lab.ask(engine, prompt, source) for source in tiny_adapters.values()]
    beside = lab.ask(engine, prompt, tiny_adapters["lora"], drawn).wait().token_ids
    for other in others:
        other.wait()
    assert beside == alone
    assert alone != lab.ask(engine, prompt, tiny_adapters["lora"]).wait().token_ids[:20]


def test_an_adapter_that_cant_be_read_fails_alone_and_evicts_nothing(
    lab: Any,
    engines: Any,
    tiny: str,
    tiny_adapters: Adapters,
    prompt: list[int],
    tmp_path: Path,
) -> None:
    engine = engines(tiny, slots=2, max_length=128)
    for name in ("lora", "ia3"):
        lab.ask(engine, prompt, tiny_adapters[name]).wait()
    resident = set(engine.resident())
    copy = tmp_path / "later"
    missing = AdapterSource("later@1", copy)
    beside = lab.ask(engine, prompt, tiny_adapters["lora"], lab.greedy(60))
    failed = lab.ask(engine, prompt, missing).wait().last
    assert failed.finish_reason == "error"
    assert "later@1" in str(failed.error)
    with pytest.raises(AdapterError):
        engine.check(missing)
    assert set(engine.resident()) == resident == {"lora@1", "ia3@1"}
    assert len(beside.wait().token_ids) == 60
    # A failed load leaves nothing behind: once the files are there, they answer.
    shutil.copytree(tiny_adapters["rslora"].path, copy)
    expected = lab.ask(engine, prompt, tiny_adapters["rslora"]).wait().token_ids
    assert lab.ask(engine, prompt, missing).wait().token_ids == expected


def test_a_rank_above_the_limit_is_refused_with_the_remedy(
    lab: Any, engines: Any, tiny: str, tiny_adapters: Adapters, prompt: list[int]
) -> None:
    engine = engines(tiny, max_rank=8, max_length=128)
    failed = lab.ask(engine, prompt, tiny_adapters["lora-r16-attention"]).wait().last
    assert "rank 16" in str(failed.error) and "engine.max_rank" in str(failed.error)


def test_a_cancelled_request_frees_its_row_and_its_slot(
    lab: Any, engines: Any, tiny: str, tiny_adapters: Adapters, prompt: list[int]
) -> None:
    engine = engines(tiny, max_rows=1, slots=1, max_length=4096)
    begun = threading.Event()
    ended: list[Chunk] = []

    def sink(chunk: Chunk) -> None:
        begun.set()
        ended.append(chunk)

    endless = lab.greedy(4000)
    engine.submit(Request("running", tuple(prompt), endless, tiny_adapters["lora"]), sink)
    assert begun.wait(540)
    waiting = lab.ask(engine, prompt, tiny_adapters["ia3"])
    gone: list[Chunk] = []
    engine.submit(Request("waiting", tuple(prompt), endless, tiny_adapters["dora"]), gone.append)
    engine.cancel("waiting")
    engine.cancel("running")
    engine.cancel("never heard of")
    # It had to wait for the only row and the only slot.
    assert waiting.wait().last.finish_reason == "length"
    assert ended[-1].finish_reason == "cancelled" and len(ended) < 4000
    assert [chunk.finish_reason for chunk in gone] == ["cancelled"]
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_full_queue_refuses_and_recovers(
    lab: Any, engines: Any, tiny: str, prompt: list[int]
) -> None:
    engine = engines(tiny, max_rows=1, max_queue=2, max_length=4096)
    accepted, refused = [], []
    for _ in range(20):
        try:
            accepted.append(lab.ask(engine, prompt, None, lab.greedy(200)))
        except Overloaded as error:
            refused.append(error.retry_after)
    assert refused and min(refused) >= 1
    assert 2 <= len(accepted) < 20
    for answer in accepted:
        assert len(answer.wait().token_ids) == 200
    assert lab.ask(engine, prompt).wait().last.finish_reason == "length"


def test_lengths_are_kept(
    lab: Any, engines: Any, tiny: str, tiny_adapters: Adapters, prompt: list[int]
) -> None:
    engine = engines(tiny, max_length=64)
    answer = lab.ask(engine, prompt, None, lab.greedy(10**9)).wait()
    assert answer.last.finish_reason == "length"
    assert len(prompt) + len(answer.token_ids) == 64
    with pytest.raises(RequestError, match=r"70 tokens.*engine\.max_length"):
        lab.ask(engine, [65] * 70)
    with pytest.raises(RequestError, match="empty"):
        lab.ask(engine, [])
    with pytest.raises(RequestError, match="vocabulary"):
        lab.ask(engine, [10**6])
    # 61 fit, but not behind the adapter's 5 virtual tokens.
    failed = lab.ask(engine, [65] * 61, tiny_adapters["p_tuning"]).wait().last
    assert failed.finish_reason == "error" and "5 virtual" in str(failed.error)
    assert len(lab.ask(engine, [65] * 61).wait().token_ids) == 3


def test_stop_strings_and_the_end_token(
    lab: Any, engines: Any, tiny: str, tiny_tokenizer: Any, prompt: list[int]
) -> None:
    engine = engines(tiny, max_length=128)
    whole = lab.ask(engine, prompt, None, lab.greedy(40)).wait()
    stop = whole.text[3:5]
    cut = lab.ask(engine, prompt, None, lab.greedy(40, stop=(stop,))).wait()
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.last.finish_reason == "stop"


def test_a_sink_that_fails_ends_its_own_request_only(
    lab: Any, engines: Any, tiny: str, prompt: list[int]
) -> None:
    engine = engines(tiny, max_length=256)

    def broken(chunk: Chunk) -> None:
        raise ValueError("gone")

    beside = lab.ask(engine, prompt, None, lab.greedy(50))
    engine.submit(Request("broken", tuple(prompt), lab.greedy(50)), broken)
    assert len(beside.wait().token_ids) == 50
    assert lab.ask(engine, prompt).wait().last.finish_reason == "length"
    assert engine.stats().running == 0


def test_closing_drains_what_runs_and_refuses_what_comes(
    lab: Any, engines: Any, tiny: str, prompt: list[int]
) -> None:
    engine = engines(tiny, max_length=256)
    answers = [lab.ask(engine, prompt, None, lab.greedy(30)) for _ in range(3)]
    engine.close(drain_seconds=60)
    assert [len(answer.wait().token_ids) for answer in answers] == [30] * 3
    with pytest.raises(Overloaded):
        lab.ask(engine, prompt)


def test_closing_at_once_cancels(lab: Any, engines: Any, tiny: str, prompt: list[int]) -> None:
    engine = engines(tiny, max_rows=1, max_length=4096)
    answers = [lab.ask(engine, prompt, None, lab.greedy(4000)) for _ in range(3)]
    engine.close()
    assert {answer.wait().last.finish_reason for answer in answers} == {"cancelled"}


def test_attention_may_lay_its_result_out_token_by_token(
    lab: Any, engines: Any, tiny: str, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of CUDA's kernels do, and no GPU is needed to try it."""
    monkeypatch.setattr(attention, "kernel_for", lambda device, dtype, group: None)
    engine = engines(tiny, max_length=128)
    expected = lab.ask(engine, prompt).wait().token_ids
    plain = cache.functional.scaled_dot_product_attention
    asked = []

    def turned(*args: Any, **options: Any) -> torch.Tensor:
        asked.append(args)
        return plain(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(cache.functional, "scaled_dot_product_attention", turned)
    assert lab.ask(engine, prompt).wait().token_ids == expected
    assert any(query.shape[2] > 1 for query, *_ in asked[2:]), "queries that share a head"


def test_int8_weights_answer_close_to_float(
    lab: Any, engines: Any, tiny_adapters: Adapters, tiny: str, prompt: list[int]
) -> None:
    """8-bit weights change digits, not the adapters' part: most first tokens stay the same."""
    exact, rough = engines(tiny, max_length=128), engines(tiny, max_length=128, weights="int8")
    same = 0
    for source in (*tiny_adapters.values(), None):
        one = lab.greedy(1)
        first = lab.ask(exact, prompt, source, one).wait().token_ids
        same += first == lab.ask(rough, prompt, source, one).wait().token_ids
    assert same >= 6


def test_a_window_shorter_than_the_answers_is_refused(
    engines: Any, tiny: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "windowed")
    path = tmp_path / "windowed" / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention"],
    }
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="sliding_attention"):
        engines(str(tmp_path / "windowed"), max_length=128)
    with pytest.raises(ConfigError, match=r"engine\.max_length=5000"):
        engines(tiny, max_length=5000)


def test_rows_that_the_memory_has_no_room_for_say_how_much_they_take() -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_rows=1024 rows of .*take \d+\.\d GiB"):
        cache.KVCache(
            layers=1,
            rows=1024,
            heads=8,
            max_length=2**30,
            head_dim=64,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_a_gpu_that_torch_does_not_see_is_said_before_anything_is_loaded(kind: str) -> None:
    """Ray counts GPUs by itself, and gives them to whatever torch there is."""
    with pytest.raises(HardwareError, match=r"CUDA build of torch, or set deployment\.gpus=0"):
        open_engine(ModelConfig(name="./nowhere"), EngineConfig(type=kind), use_gpu=True)


def test_rows_are_no_longer_than_the_model_takes_unless_that_was_set(
    tiny: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 128}))
    model = ModelConfig(name=str(base))
    engine = open_engine(model, EngineConfig(), use_gpu=False)
    engine.close()
    assert engine.max_length == 128
    with pytest.raises(ConfigError, match="the 128 positions"):
        open_engine(model, EngineConfig(max_length=129), use_gpu=False)
