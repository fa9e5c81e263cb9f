"""vLLM behind rayfin's calls: the seam everywhere, vLLM itself where it can be imported."""

from __future__ import annotations

import errno
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayfin.cli import main
from rayfin.config import load_serve_config
from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig
from rayfin.errors import (
    AdapterError,
    ConfigError,
    EngineFailed,
    Overloaded,
    RequestError,
    Unavailable,
)
from rayfin.models import base_of, meta_model
from rayfin.models.ends import Ends
from rayfin.serving.engine import vllm as vllm_module
from rayfin.serving.engine.layout import linears_of
from rayfin.serving.engine.request import AdapterSource, Chunk, Request, SamplingParams
from rayfin.serving.engine.vllm import VllmEngine
from rayfin.serving.engine.vllm_backend import (
    as_chunk,
    as_vllm_stops,
    check_lora,
    sampling_arguments,
    vllm_arguments,
)

Adapters = dict[str, AdapterSource]
LONG = 900


@pytest.fixture
def backend(lab: Any, tiny: str) -> Any:
    return lab.AsVllm(tiny)


@pytest.fixture
def engine(tiny: str, backend: Any) -> Iterator[VllmEngine]:
    config = EngineConfig(type="vllm", max_rows=4, max_queue=4, max_length=1024)
    engine = VllmEngine(ModelConfig(name=tiny), config, backend.opened)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def prompt(tiny_tokenizer: Any) -> list[int]:
    ids: list[int] = tiny_tokenizer("What is a list, and why?")["input_ids"]
    return ids


def linears(model: str) -> dict[str, tuple[int, int]]:
    return linears_of(meta_model(ModelConfig(name=model)))


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 540
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def test_it_answers_as_peft_does(
    lab: Any, engine: VllmEngine, tiny: str, tiny_adapters: Adapters, prompt: list[int]
) -> None:
    asked = {
        name: lab.ask(engine, prompt, name and tiny_adapters[name])
        for name in (None, "lora", "rslora", "lora-r16-attention")
    }
    for name, answer in asked.items():
        source = name and tiny_adapters[name]
        assert answer.wait().token_ids == lab.peft_answers(tiny, source, [prompt], 16)[0], name
        assert answer.last.finish_reason == "length"
    assert list(engine.resident()) and all(engine.resident().values())
    until(lambda: engine.stats().finished == 4)
    assert engine.stats().generated_tokens == 4 * 16


def test_the_same_name_with_new_weights_never_answers_with_the_old_ones(
    lab: Any,
    engine: VllmEngine,
    backend: Any,
    tiny: str,
    tiny_adapters: Adapters,
    prompt: list[int],
) -> None:
    first = AdapterSource("red@1", tiny_adapters["lora"].path)
    second = AdapterSource("red@2", tiny_adapters["rslora"].path)
    answers = [lab.ask(engine, prompt, source).wait().token_ids for source in (first, second)]
    expected = [
        lab.peft_answers(tiny, tiny_adapters[name], [prompt], 16)[0] for name in ("lora", "rslora")
    ]
    assert answers == expected
    engine.forget("red@1")
    until(lambda: len(backend.kept) == 1)
    # Even a reference that comes back, as after another registry was put in place.
    again = AdapterSource("red@1", tiny_adapters["rslora"].path)
    assert lab.ask(engine, prompt, again).wait().token_ids == expected[1]
    # vLLM keeps computed prefixes by name.
    assert len(backend.names) == 3


def test_a_removed_version_stays_while_a_request_uses_it(
    lab: Any, engine: VllmEngine, backend: Any, tiny_adapters: Adapters, prompt: list[int]
) -> None:
    answer = lab.ask(engine, prompt, tiny_adapters["lora"], lab.greedy(LONG))
    until(lambda: answer.chunks)
    engine.forget(tiny_adapters["lora"].ref)
    time.sleep(0.05)
    assert len(backend.kept) == 1
    assert len(answer.wait().token_ids) == LONG
    until(lambda: not backend.kept)


@pytest.mark.parametrize("method", ["dora", "adalora", "ia3", "p_tuning", "prefix_tuning"])
def test_what_vllm_cannot_serve_is_refused_with_the_reason(
    lab: Any, engine: VllmEngine, tiny_adapters: Adapters, prompt: list[int], method: str
) -> None:
    last = lab.ask(engine, prompt, tiny_adapters[method]).wait().last
    assert last.finish_reason == "error"
    assert "vLLM serves LoRA, QLoRA, rank-stabilised LoRA" in str(last.error)
    assert "engine.type=transformers" in str(last.error)
    with pytest.raises(AdapterError, match="vLLM serves"):
        engine.check(tiny_adapters[method])
    assert not engine.resident()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 65}, "engine.max_rank"),
        ({"r": 8}, "shape"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"base_model_name_or_path": "org/other"}, "was trained on 'org/other'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_settings_that_vllm_would_not_look_at_are_refused(
    tiny: str, tiny_adapters: Adapters, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    directory = tmp_path / "changed"
    shutil.copytree(tiny_adapters["lora"].path, directory)
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(AdapterError, match=reason):
        check_lora(
            AdapterSource("changed@1", directory),
            base_of(ModelConfig(name=tiny)),
            linears(tiny),
            64,
        )


def test_a_pickle_is_never_left_to_vllm(tiny: str, tiny_adapters: Adapters, tmp_path: Path) -> None:
    directory = tmp_path / "pickled"
    shutil.copytree(tiny_adapters["lora"].path, directory)
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(AdapterError, match="safetensors"):
        check_lora(
            AdapterSource("pickled@1", directory),
            base_of(ModelConfig(name=tiny)),
            linears(tiny),
            64,
        )


def test_cancelling_ends_a_request(
    lab: Any, engine: VllmEngine, backend: Any, prompt: list[int]
) -> None:
    answer = lab.ask(engine, prompt, None, lab.greedy(LONG))
    until(lambda: answer.chunks)
    engine.cancel("unknown")
    engine.cancel(answer.request_id)
    assert answer.wait().last.finish_reason == "cancelled"
    until(lambda: backend.engine.stats().running == 0)
    assert (engine.stats().waiting, engine.stats().running) == (0, 0)


def test_too_much_is_refused_and_the_same_id_twice(
    lab: Any, engine: VllmEngine, prompt: list[int]
) -> None:
    answers = [lab.ask(engine, prompt, None, lab.greedy(LONG)) for _ in range(8)]
    with pytest.raises(Overloaded):
        lab.ask(engine, prompt)
    with pytest.raises(RequestError, match="in use"):
        engine.submit(
            Request(answers[0].request_id, tuple(prompt), SamplingParams()), lambda _: None
        )
    assert (engine.stats().running, engine.stats().waiting) == (4, 4)
    engine.close()
    assert {answer.wait().last.finish_reason for answer in answers} == {"cancelled"}
    with pytest.raises(Overloaded):
        lab.ask(engine, prompt)


def test_requests_at_work_may_end_before_it_closes(
    lab: Any, engine: VllmEngine, prompt: list[int]
) -> None:
    answer = lab.ask(engine, prompt, None, lab.greedy(100))
    engine.close(drain_seconds=60)
    assert answer.wait().last.finish_reason == "length"


def test_what_fails_in_vllm_fails_alone_and_says_why(
    lab: Any, engine: VllmEngine, backend: Any, prompt: list[int]
) -> None:
    backend.broken = True
    last = lab.ask(engine, prompt).wait().last
    assert isinstance(last.error, EngineFailed) and "ValueError" in str(last.error)
    backend.broken = False
    assert engine.health_problem is None
    assert lab.ask(engine, prompt).wait().last.finish_reason == "length"
    backend.failure = RuntimeError("the GPU is gone")
    assert engine.health_problem is not None
    with pytest.raises(Overloaded):
        lab.ask(engine, prompt)


def test_a_client_that_raises_ends_its_own_request(
    lab: Any, engine: VllmEngine, backend: Any, prompt: list[int]
) -> None:
    called = threading.Event()

    def sink(_: Chunk) -> None:
        called.set()
        raise ValueError("gone")

    engine.submit(Request("gone", tuple(prompt), lab.greedy(LONG)), sink)
    assert called.wait(540)
    until(lambda: backend.engine.stats().running == 0)
    assert len(lab.ask(engine, prompt).wait().token_ids) == 16


def test_settings_in_vllms_words(tiny: str) -> None:
    config = EngineConfig(
        type="vllm",
        slots=3,
        max_rank=20,
        max_rows=5,
        max_length=100,
        quantization_bit=4,
        vllm={"gpu_memory_utilization": 0.4, "max_cpu_loras": 7},
    )
    arguments = vllm_arguments(ModelConfig(name=tiny), config)
    assert arguments["model"] == tiny
    assert (arguments["max_loras"], arguments["max_lora_rank"]) == (3, 32)
    assert (arguments["max_num_seqs"], arguments["max_model_len"]) == (5, 100)
    assert arguments["quantization"] == "bitsandbytes"
    assert (arguments["gpu_memory_utilization"], arguments["max_cpu_loras"]) == (0.4, 7)
    assert "trust_remote_code" not in arguments
    with pytest.raises(ConfigError, match="max_rank=600"):
        vllm_arguments(ModelConfig(name=tiny), EngineConfig(type="vllm", max_rank=600))


@pytest.mark.parametrize(
    ("gpus", "positions", "settings", "expected"),
    [
        (0.0, 4096, {}, (16, 16 + 256, 2048, None)),  # of vLLM's build for CPUs
        (1.0, 131072, {}, (256, 256 + 2048, 8192, None)),
        (1.0, 4096, {}, (256, 256 + 2048, 4096, None)),
        (1.0, None, {"max_rows": 16, "max_length": 16384}, (16, 16 + 2048, 16384, None)),
        (0.5, 4096, {"prefill_chunk": 256}, (256, 256 + 256, 4096, 0.45)),
        (0.5, 4096, {"vllm": {"gpu_memory_utilization": 0.4}}, (256, 256 + 2048, 4096, 0.4)),
    ],
)
def test_vllm_gets_the_limits_of_its_device_and_those_that_were_set(
    tiny: str,
    gpus: float,
    positions: int | None,
    settings: dict[str, Any],
    expected: tuple[int, int, int, float | None],
) -> None:
    config = EngineConfig(type="vllm", **settings).fitted(gpus, positions)
    told = vllm_arguments(ModelConfig(name=tiny), config)
    names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization")
    assert tuple(map(told.get, names)) == expected
    assert config.fitted(float(gpus > 0), positions) == config, "the engine itself decides again"


def test_what_does_not_end_in_vllm_is_a_reason_to_replace_it(
    lab: Any, engines: Any, tiny: str, tiny_adapters: Adapters, prompt: list[int]
) -> None:
    engine = engines(tiny, type="vllm", step_seconds=0.2)
    backend = engine._backend
    lab.ask(engine, prompt, tiny_adapters["lora"]).wait()
    ended = time.monotonic()
    until(lambda: time.monotonic() > ended + 0.3)
    assert engine.health_problem is None, "it has nothing to do"
    for stalled, source in (("generate", None), ("add", tiny_adapters["rslora"])):
        backend.stalled = stalled
        answer = lab.ask(engine, prompt, source)
        until(lambda: engine.health_problem is not None)
        assert re.match(
            r"a step of vLLM has taken \d+ s \(engine.step_seconds\)", engine.health_problem
        )
        backend.stalled = None
        assert len(answer.wait().token_ids) == 16
        until(lambda: engine.health_problem is None)


def test_an_adapter_that_vllm_does_not_load_in_time_fails_its_requests_alone(
    lab: Any,
    engines: Any,
    tiny: str,
    tiny_adapters: Adapters,
    prompt: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engines(tiny, type="vllm")
    backend, adapters = engine._backend, engine._adapters
    source = tiny_adapters["lora"]
    expected = lab.ask(engine, prompt, source).wait().token_ids
    backend.stalled = "add"
    monkeypatch.setattr(
        adapters, "_config", engine.config.model_copy(update={"load_seconds": 0.05})
    )
    answers = [lab.ask(engine, prompt, source) for _ in range(3)]
    assert len(lab.ask(engine, prompt).wait().token_ids) == 16
    for answer in answers:
        error = answer.wait().last.error
        assert isinstance(error, Unavailable) and "vLLM is loading adapter 'lora@1'" in str(error)
    assert backend.adds == 2, "vLLM was asked again for what it loads already"
    monkeypatch.undo()
    backend.stalled = None
    assert lab.ask(engine, prompt, source).wait().token_ids == expected


def test_a_disk_that_goes_while_vllm_reads_it_is_not_the_adapters_fault(
    lab: Any,
    engines: Any,
    tiny: str,
    tiny_adapters: Adapters,
    prompt: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engines(tiny, type="vllm")

    async def add(lora: Any) -> None:
        def gone(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(vllm_module, "check_lora", gone)
        raise AdapterError(f"adapter '{lora.source.ref}': vLLM can't load it")

    monkeypatch.setattr(engine._backend, "add", add)
    error = lab.ask(engine, prompt, tiny_adapters["lora"]).wait().last.error
    assert isinstance(error, Unavailable) and "Input/output error" in str(error)


def test_sampling_in_vllms_words() -> None:
    params = SamplingParams(max_tokens=9, temperature=0.5, top_k=3, stop=("a", "b"), seed=1)
    arguments = sampling_arguments(Request("x", (1,), params))
    assert arguments["stop"] == ["a", "b"] and arguments["stop_token_ids"] == []
    stops = {"stop": None, "stop_token_ids": None}
    assert arguments | stops == vars(params) | stops


def test_vllm_is_told_all_that_ends_an_answer(
    lab: Any, engine: VllmEngine, tiny_tokenizer: Any, prompt: list[int]
) -> None:
    """The base's tokens and the adapter's, texts, and stop strings that vLLM would not see."""
    whole = lab.ask(engine, prompt).wait()
    third = whole.token_ids[2]
    assert third not in whole.token_ids[:2] and third not in tiny_tokenizer.all_special_ids
    for ends in (Ends((third,)), Ends(texts=(tiny_tokenizer.decode(third),))):
        ended = lab.ask(
            engine, prompt, None, SamplingParams(max_tokens=9, temperature=0), ends=ends
        )
        assert ended.wait().token_ids == whole.token_ids[:3]
        assert (ended.text, ended.last.finish_reason) == (
            tiny_tokenizer.decode(whole.token_ids[:2]),
            "stop",
        )
        assert lab.ask(engine, prompt, ends=ends).wait().token_ids == whole.token_ids
    asked = SamplingParams(stop=("a", "<|im_start|>"), stop_token_ids=(5, 12))
    told = sampling_arguments(
        as_vllm_stops(
            Request("x", (1,), asked, ends=Ends((7, 13))), (8, 9), {"<|im_start|>": 6}, 12
        )
    )
    assert (told["stop"], told["stop_token_ids"]) == (["a"], [5, 6, 7, 8, 9])
    with pytest.raises(RequestError, match=r"has the special token '<.im_end.>'"):
        lab.ask(engine, prompt, None, SamplingParams(stop=("b<|im_end|>",)))


def test_vllm_is_told_every_end_of_a_list_in_the_generation_configuration(
    tiny: str, backend: Any, lab: Any, prompt: list[int], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    first = lab.peft_answers(tiny, None, [prompt], 1)[0][0]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 258]}))
    engine = VllmEngine(ModelConfig(name=str(base)), EngineConfig(type="vllm"), backend.opened)
    engine.start()
    try:
        answer = lab.ask(engine, prompt, None, SamplingParams(max_tokens=9, temperature=0)).wait()
        assert (answer.token_ids, answer.text) == ([first], "")
        assert len(lab.ask(engine, prompt).wait().token_ids) == 16
    finally:
        engine.close()


def test_log_probabilities_from_vllms_form() -> None:
    known = {
        7: SimpleNamespace(logprob=-3.0, rank=5),
        1: SimpleNamespace(logprob=-0.1, rank=1),
        2: SimpleNamespace(logprob=-2.0, rank=2),
    }
    output = SimpleNamespace(text="x", token_ids=[7], logprobs=[known], finish_reason=None)
    (written,) = as_chunk(output, 2).logprobs
    assert (written.token_id, written.logprob) == (7, -3.0)
    assert written.top == ((1, -0.1), (2, -2.0))
    assert as_chunk(output, 0).logprobs[0].top == ()
    assert as_chunk(output, None).logprobs == ()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["engine.type=vllm", "engine.weights=int8"], "weights=int8"),
        (["engine.type=vllm", "engine.quantization_bit=8"], "quantization_bit=4"),
        (["engine.vllm.max_cpu_loras=3"], "engine.type=vllm"),
        (["engine.type=vllm", "engine.vllm.max_model_len=9"], "engine.max_length here; set that"),
        (["engine.type=vllm", "engine.vllm.max_num_seqs=9"], "engine.max_rows here; set that"),
        (["engine.type=vlm"], "vllm"),
    ],
)
def test_settings_of_the_other_engine_are_refused(settings: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_serve_config(None, settings)


def test_without_vllm_the_command_says_so_before_it_starts(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    if _installed():
        pytest.skip("vLLM is installed")
    command = ["serve", "model.name=tiny", "engine.type=vllm", f"storage={tmp_path}"]
    result = subprocess.run(
        [sys.executable, "-m", "rayfin", *command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("rayfin: engine.type: vllm is not installed")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "option", "elsewhere"),
    [
        (None, "there", True),
        ("there", None, True),
        ("there", "local", False),
        ("local", None, False),
        (None, None, False),
    ],
)
def test_on_a_cluster_vllm_need_not_be_here(
    environment: str | None,
    option: str | None,
    elsewhere: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if _installed():
        pytest.skip("vLLM is installed")
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        there = f"127.0.0.1:{cluster.getsockname()[1]}"
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if environment is not None:
            monkeypatch.setenv("RAY_ADDRESS", there if environment == "there" else environment)
        options = [] if option is None else ["--address", there if option == "there" else option]
        # What is looked at after vLLM has a mistake, too: nothing is ever started.
        settings = ["model.name=./nowhere", "engine.type=vllm", f"storage={tmp_path}"]
        assert main(["serve", *settings, *options]) == 2
    error = capfd.readouterr().err
    assert ("nowhere" if elsewhere else "vllm is not installed") in error


def _installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(not _installed(), reason="vLLM is not installed (rayfin[vllm])")
@pytest.mark.slow
def test_vllm_itself_answers_as_peft_does(lab: Any, tmp_path: Path) -> None:
    import peft

    model = "smollm2-135m"
    settings = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    sources = [lab.make_adapter(tmp_path / f"a{i}", model, settings, i, 0.02) for i in range(2)]
    config = EngineConfig(type="vllm", max_length=512, vllm={"enforce_eager": True})
    engine = VllmEngine(ModelConfig(name=model, dtype="float32"), config)
    engine.start()
    try:
        prompt = engine.tokenizer("The capital of France is")["input_ids"]
        answers = [lab.ask(engine, prompt, source) for source in (None, *sources)]
        for source, answer in zip((None, *sources), answers, strict=True):
            expected = lab.peft_answers(model, source, [prompt], 16)[0]
            # Another library's kernels: the first tokens, before rounding may tip a close call.
            assert answer.wait().token_ids[:8] == expected[:8]
    finally:
        engine.close()
