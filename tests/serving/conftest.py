"""Real adapters of every kind on a real model, and an engine that answers with them."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import peft
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayfin.adapters import Registry
from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig
from rayfin.errors import AdapterError
from rayfin.models import load_base, load_tokenizer
from rayfin.models.quiet import no_progress_bars
from rayfin.serving.engine.engine import Engine
from rayfin.serving.engine.request import AdapterSource, Chunk, Request, SamplingParams
from rayfin.serving.engine.vllm import VllmEngine
from rayfin.serving.engine.vllm_backend import Lora, sampling_arguments

ROOT = Path(__file__).parents[2]
PATIENCE = 540.0
STARTS = 560.0
"""Seconds within which a deployment is there, or says why not."""
PROMPT = "Hello"
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LINEAR: dict[str, Any] = {"target_modules": "all-linear", **TASK}
METHODS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, **LINEAR),
    "lora-r16-attention": peft.LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj"], **TASK),
    "rslora": peft.LoraConfig(r=9, lora_alpha=8, use_rslora=True, **LINEAR),
    "dora": peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, **LINEAR),
    "adalora": peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, tinit=1, tfinal=1, **LINEAR),
    "vera": peft.VeraConfig(r=24, **LINEAR),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=32, **TASK),
    "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=6, **TASK),
}


def make_adapter(
    directory: Path, model: str, settings: peft.PeftConfig, seed: int, size: float = 0.3
) -> AdapterSource:
    """A PEFT adapter with random weights that change what the model says."""
    base = load_base(ModelConfig(name=model), None, "cpu")
    with torch.random.fork_rng(devices=[]), no_progress_bars():
        torch.manual_seed(seed)
        # A copy: PEFT writes the name of the base into it.
        wrapped = peft.get_peft_model(base, copy.deepcopy(settings))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if not parameter.requires_grad:
                    continue
                if "ia3_l" in name or "magnitude" in name:
                    parameter.mul_(1 + size * torch.randn_like(parameter))
                else:
                    parameter.add_(size * torch.randn_like(parameter))
        wrapped.eval()
        wrapped.save_pretrained(str(directory), save_embedding_layers=False)
    return AdapterSource(f"{directory.name}@1", directory)


@dataclass
class Answer:
    """What came of one request."""

    request_id: str
    chunks: list[Chunk] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def take(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        if chunk.finish_reason is not None:
            self.ended.set()

    def wait(self) -> Answer:
        assert self.ended.wait(PATIENCE), "no answer"
        return self

    @property
    def token_ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def last(self) -> Chunk:
        return self.chunks[-1]


def greedy(tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, **changes)


_NUMBER = iter(range(10**9))


def ask(
    engine: Engine,
    prompt: Sequence[int],
    adapter: AdapterSource | None = None,
    params: SamplingParams | None = None,
    **more: Any,
) -> Answer:
    """`more`: of the Request."""
    answer = Answer(f"request-{next(_NUMBER)}")
    params = params or greedy(16)
    request = Request(answer.request_id, tuple(prompt), params, adapter, **more)
    engine.submit(request, answer.take)
    return answer


def peft_answers(
    model: str,
    adapter: AdapterSource | None,
    prompts: Iterable[Sequence[int]],
    tokens: int,
    quantization_bit: Any = None,
) -> list[list[int]]:
    """Plain PEFT's own greedy answers, one prompt at a time."""
    plain = _plain_peft(model, adapter, quantization_bit)
    return [_continued(plain, prompt, tokens)[0] for prompt in prompts]


def assert_peft_would_say(
    model: str,
    adapter: AdapterSource | None,
    prompt: Sequence[int],
    answer: Sequence[int],
    tie: float,
    quantization_bit: Any = None,
) -> None:
    """`answer` is what plain PEFT's own greedy decoding gives, token for token.

    Of two tokens that rounding can't tell apart either is right. Where PEFT takes the other one, it
    has to prefer it by no more than `tie` of its largest logit, and goes on from what was given.
    Ties are rare: one in 16 tokens at most.
    """
    plain, at, ties = _plain_peft(model, adapter, quantization_bit), 0, 0
    while at < len(answer):
        before = [*prompt, *answer[:at]]
        expected, logits = _continued(plain, before, len(answer) - at)
        pairs = enumerate(zip(expected, answer[at:], strict=True))
        other = next((place for place, (one, given) in pairs if one != given), None)
        if other is None:
            return
        assert_tie(logits[other], answer[at + other], tie, at + other)
        ties += 1
        assert_rare(ties, len(answer))
        at += other + 1


def assert_peft_prefers(
    plain: Any, prompt: Sequence[int], answer: Sequence[int], tie: float
) -> None:
    """`plain` finds every token of `answer` the likeliest after those before it.

    What `assert_peft_would_say` asserts of what is said, in one call of the model for all tokens.
    """
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0, -len(answer) :]
    pairs = enumerate(zip(logits.argmax(dim=-1).tolist(), answer, strict=True))
    others = [place for place, (likeliest, given) in pairs if likeliest != given]
    for place in others:
        assert_tie(logits[place], answer[place], tie, place)
    assert_rare(len(others), len(answer))


def assert_tie(scores: torch.Tensor, given: int, tie: float, place: int) -> None:
    ahead = float((scores.max() - scores[given]) / scores.abs().max())
    assert ahead <= tie, f"token {place}: {ahead:.2g} of the largest logit is no tie"


def assert_rare(ties: int, tokens: int) -> None:
    assert ties <= max(1, tokens // 16), f"{ties} ties in {tokens} tokens are no chance"


def _plain_peft(model: str, adapter: AdapterSource | None, quantization_bit: Any) -> Any:
    base: Any = load_base(ModelConfig(name=model), quantization_bit, "cpu")
    if adapter is None:
        return base
    return peft.PeftModel.from_pretrained(base, str(adapter.path)).eval()


def _continued(
    plain: Any, prompt: Sequence[int], tokens: int
) -> tuple[list[int], list[torch.Tensor]]:
    """The likeliest tokens after `prompt`, and the logits that each was chosen by."""
    ids = torch.tensor([list(prompt)])
    generated = plain.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # PEFT leaves the prompt out of what it returns for virtual tokens in some versions.
    answer: list[int] = generated.sequences[0].tolist()[-tokens:]
    return answer, [logits[0] for logits in generated.logits]


_UPDATE = """
import gc, sys, ray
from ray import serve
from rayfin.config import load_serve_config
from rayfin.serving.deployment import APP, build_app
ray.init(sys.argv[1], log_to_driver=False)
serve.run(build_app(load_serve_config(None, sys.argv[2:])), name=APP, route_prefix="/")
gc.freeze()  # or the interpreter's last collection takes longer than all this on a busy machine
"""


class Service:
    """The command as it runs, and what a client and an administrator do to it."""

    def __init__(self, processes: ModuleType, model: str, storage: Path, **settings: Any) -> None:
        """`settings` of the engine, beside two replicas on half a CPU each, and two of the API.

        `processes`: processes.py.
        """
        self._processes = processes
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.registry = Registry(storage / "adapters")
        given = {
            "model.name": model,
            "deployment.api_replicas": 2,
            "storage": storage,
            "deployment.replicas": 2,
            "deployment.cpus": 0.5,
            "deployment.health_check_seconds": 0.5,
            "deployment.drain_seconds": 500,  # of tests that fail alone; rayfin's own: 30
            "deployment.port": port,
            **{f"engine.{name}": value for name, value in settings.items()},
        }
        environment = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
        environment.pop("RAY_ADDRESS", None)
        self._log = (storage / "serve.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rayfin", "serve", "--json"]
            + [f"{key}={value}" for key, value in given.items()],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.lines = processes.Lines(self.process)
        try:
            self.told: dict[str, Any] = json.loads(self.lines.next(STARTS))
        except BaseException as error:  # also of a test that ran out of time
            errors = self.errors()
            self._end()  # what stays open would fail the next test too
            raise AssertionError(f"it did not start:\n{errors}") from error
        self.model: str = self.told["base"]
        self.given = [f"{key}={value}" for key, value in given.items()]
        self.http = self.client()

    def client(self) -> httpx.Client:
        """One of a thread's own: a pool that many share breaks when it closes idle connections."""
        return httpx.Client(base_url=self.told["url"], timeout=PATIENCE)

    def errors(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def ask(
        self, model: str, tokens: int = 8, http: httpx.Client | None = None, **more: Any
    ) -> httpx.Response:
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
        http = http or self.http
        return http.post("/v1/completions", json=body | {"ignore_eos": True} | more)

    def answer(self, model: str, tokens: int = 8) -> tuple[str, str]:
        """The version that answered, and what it said."""
        response = self.ask(model, tokens)
        assert response.status_code == 200, response.text
        value = response.json()
        return value["model"], value["choices"][0]["text"]

    def at_once(self, count: int, model: str, tokens: int = 8) -> list[httpx.Response]:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda _: self.ask(model, tokens), range(count)))

    def count(self, name: str) -> int:
        """An engine's figure, over all replicas; asks again where there is none now."""
        counts = self.until(self.counts)
        plain = f"rayfin_engine_{name}"
        return int(counts.get(plain, counts.get(f"{plain}_total", 0)))

    def counts(self, http: httpx.Client | None = None) -> dict[str, float]:
        """Every sample of /metrics, `name{labels}` -> value; empty where there is none now."""
        answer = (http or self.http).get("/metrics")
        if answer.status_code != 200:
            assert answer.status_code in (429, 503) and answer.json()["error"], answer.text
            return {}
        lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    @contextmanager
    def monotone(self) -> Iterator[None]:
        """What counts from the start never falls during the block, whoever is killed.

        The last looks are after it: while a replica is being killed there may be no figures.
        """
        stop = threading.Event()

        def watch() -> None:
            seen: dict[str, float] = {}
            looks_after = 0
            with self.client() as http:
                while looks_after < 3:
                    over = stop.wait(0.2)
                    now = self.counts(http)
                    for name, value in now.items():
                        if "_total" in name or "_count" in name or "_bucket" in name:
                            assert value >= seen.get(name, 0), f"{name} fell"
                    assert not now or not seen.keys() - now.keys() - _GAUGES, "a figure is gone"
                    seen |= now
                    looks_after += bool(now) and over

        with ThreadPoolExecutor(1) as pool:
            looks = pool.submit(watch)
            try:
                yield
            finally:
                stop.set()
            looks.result()

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of `api` or `engine`."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in family if f"ServeReplica:rayfin:{deployment}" in _title(p)]

    def stream(self, model: str, tokens: int, **more: Any) -> httpx.Response:
        """An answer that has begun."""
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "stream": True} | more
        request = self.http.build_request(
            "POST", "/v1/completions", json=body | {"ignore_eos": True}
        )
        return self.http.send(request, stream=True)

    @staticmethod
    def until(true: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """The first true answer, asked again and again."""
        give_up = time.monotonic() + seconds
        while not (answer := true()):
            assert time.monotonic() < give_up, "it did not come about"
            time.sleep(0.1)  # the service has to answer each question, too
        return answer

    def whole_without(self, gone: psutil.Process) -> None:
        """Waits until a new engine stands beside the other one, and both replicas of the API know.

        Each of these has its own view of how many engines there are, up to a second old.
        """
        self.until(lambda: gone not in (e := self.replicas("engine")) and len(e) == 2)
        self.until(lambda: all(self.count("replicas") == 2 for _ in range(8)))

    @property
    def port(self) -> int:
        return int(self.told["url"].rpartition(":")[2])

    def listening_ports(self) -> set[int]:
        """Of all its processes, on whatever address."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return {
            one.laddr.port
            for process in family
            for one in process.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN
        }

    def family_titles(self) -> str:
        family = psutil.Process(self.process.pid).children(recursive=True)
        return "\n".join(map(_title, family))

    def update(self, *settings: str) -> None:
        """Deploys it anew with other settings, as an operator of its Ray cluster would."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        (raylet,) = [process for process in family if process.name() == "raylet"]
        (address,) = [
            part.partition("=")[2] for part in raylet.cmdline() if part.startswith("--gcs-address=")
        ]
        result = subprocess.run(
            [sys.executable, "-c", _UPDATE, address, *self.given, *settings],
            env=raylet.environ(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert result.returncode == 0, result.stderr

    def stop(self, number: signal.Signals) -> int:
        """Ends it as `timeout` and a closed terminal do, which signal the whole process group."""
        os.killpg(self.process.pid, number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.http.close()
        self._end()

    def _end(self) -> None:
        try:
            if self.process.poll() is None:
                self.stop(signal.SIGTERM)
        finally:
            self._processes.end_family(self.process)
            self._log.close()


_GAUGES = {f"rayfin_engine_{name}" for name in ("waiting", "running", "host_bytes", "table_bytes")}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return ""


class AsVllm:
    """vLLM's rules over rayfin's own engine: weights are read once a number, and kept by it."""

    def __init__(self, model: str) -> None:
        self.engine = Engine(
            ModelConfig(name=model), EngineConfig(max_rows=8, max_length=1024), use_gpu=False
        )
        self.engine.start()
        self.kept: dict[int, AdapterSource] = {}
        self.names: set[str] = set()
        self.failure: BaseException | None = None
        self.broken = False
        self.stalled: str | None = None
        """The call that waits until this is another one."""
        self.adds = 0
        self.arguments: Mapping[str, Any] = {}

    def opened(self, arguments: Mapping[str, Any]) -> AsVllm:
        asyncio.get_running_loop()
        self.arguments = arguments
        return self

    async def generate(self, request: Request, lora: Lora | None) -> AsyncGenerator[Any, None]:
        if self.broken:
            raise ValueError("out of blocks")
        await self._stall("generate")
        source = None
        if lora is not None:
            self.names.add(lora.name)
            number = AdapterSource(f"kept@{lora.number}", lora.source.path)
            source = self.kept.setdefault(lora.number, number)
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Chunk]()
        params = sampling_arguments(request)
        params |= {name: tuple(params[name]) for name in ("stop", "stop_token_ids")}
        self.engine.submit(
            Request(request.request_id, request.prompt_ids, SamplingParams(**params), source),
            lambda chunk: loop.call_soon_threadsafe(arrived.put_nowait, chunk),  # type: ignore[arg-type,return-value]
        )
        try:
            reason = None
            while reason is None:
                chunk = await arrived.get()
                reason = chunk.finish_reason
                output = SimpleNamespace(
                    text=chunk.text,
                    token_ids=list(chunk.token_ids),
                    logprobs=None,
                    finish_reason=reason,
                )
                yield SimpleNamespace(outputs=[output])
        finally:
            self.engine.cancel(request.request_id)

    async def add(self, lora: Lora) -> None:
        self.adds += 1
        await self._stall("add")
        if not lora.source.path.is_dir():
            raise AdapterError(f"adapter '{lora.source.ref}': vLLM can't load it")

    async def _stall(self, call: str) -> None:
        while self.stalled == call:
            await asyncio.sleep(0.01)

    async def remove(self, lora: Lora) -> None:
        del self.kept[lora.number]

    def close(self) -> None:
        self.engine.close()


class Lab:
    """What the tests of this folder share (pytest's importlib mode imports no conftest)."""

    METHODS = METHODS
    PROMPT = PROMPT
    Service = Service
    AsVllm = AsVllm
    make_adapter = staticmethod(make_adapter)
    title = staticmethod(_title)
    greedy = staticmethod(greedy)
    ask = staticmethod(ask)
    peft_answers = staticmethod(peft_answers)
    assert_peft_would_say = staticmethod(assert_peft_would_say)
    assert_peft_prefers = staticmethod(assert_peft_prefers)


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with larger weights: as it is, it repeats its last token, whatever is asked.

    With a bias where Qwen2 has one, as adapters must treat it rightly too.
    """
    directory = tmp_path_factory.mktemp("models") / "tiny"
    base: Any = load_base(ModelConfig(name="tiny"), None, "cpu")
    settings = base.config.to_dict() | {"attention_bias": True}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), no_progress_bars():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        for name, parameter in model.named_parameters():
            if "layers" in name and "norm" not in name:
                parameter.normal_(std=0.2)
        model.save_pretrained(directory)
    load_tokenizer(ModelConfig(name="tiny")).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_adapters(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterSource]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(root / name, tiny, settings, seed)
        for seed, (name, settings) in enumerate(METHODS.items())
    }


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return load_tokenizer(ModelConfig(name="tiny"))


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine | VllmEngine]]:
    """Makes engines, and closes them; those of type vllm over what stands in for vLLM."""
    made: list[Engine | VllmEngine] = []

    def make(model: str, **settings: Any) -> Engine | VllmEngine:
        named, config = ModelConfig(name=model), EngineConfig(**settings)
        engine: Engine | VllmEngine
        if config.type == "vllm":
            engine = VllmEngine(named, config, AsVllm(model).opened)
        else:
            engine = Engine(named, config, use_gpu=False)
        made.append(engine)
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.close()
