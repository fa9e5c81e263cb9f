"""`rayfin serve` while adapters come and go and its processes are killed: answers, losses, figures.

    python experiments/benchmarks/soak.py [--minutes 5] [--quick]

The tiny model with two replicas of the engine and two of the API on a Ray of their own. Clients ask
adapters by version and by alias without a pause; meanwhile versions are published, promoted, rolled
back and removed, and every 15 seconds one process is ended with SIGKILL: an engine, an API replica,
the HTTP proxy and Serve's controller in turn. Each answer is compared with what plain PEFT decodes
for the version that it names. A request is lost that gets neither an answer nor a 429 or 503 with
Retry-After; connections to a proxy that was killed don't count.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import print_figure

MODEL, PROMPT, TOKENS = "tiny", "The sky is", 12
NAMES, VERSIONS, SPARE = 6, 2, 24
CLIENTS = 12
MARGIN = 1e-3
"""By how much the likeliest token must lead at each step: no rounding tips such an answer."""
SECONDS_BETWEEN_KILLS = 15.0
PROXY_SECONDS = 20.0
"""Connections may fail for so long after the HTTP proxy was killed, while Serve starts another.
Whatever else is killed, a request gets its answer or an error after which it can be sent again."""
PORT = 8766


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="how long (default 5; 60 is an hour)"
    )
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works")
    args = parser.parse_args()
    minutes = 1.0 if args.quick else args.minutes
    with tempfile.TemporaryDirectory() as folder:
        from rayfin.adapters import Registry
        from rayfin.config import load_serve_config
        from rayfin.serving.deployment_lifecycle import serving

        made = make_adapters(Path(folder) / "made", NAMES * VERSIONS + SPARE)
        registry = Registry(Path(folder) / "adapters")
        soak = Soak(registry, made)
        settings = [
            f"storage={folder}",
            f"model.name={MODEL}",
            "engine.slots=4",
            "engine.max_rows=8",
            "engine.max_length=128",
            "deployment.replicas=2",
            "deployment.api_replicas=2",
            "deployment.cpus=0.5",
            "deployment.health_check_seconds=1",
            f"deployment.port={PORT}",
        ]
        with serving(load_serve_config(None, settings), None) as deployed:
            soak.run(deployed.url, 60 * minutes)
        soak.tell(minutes)


def make_adapters(folder: Path, count: int) -> list[tuple[Path, str]]:
    """Directories of LoRA adapters, each with what plain PEFT decodes after the prompt.

    The answers differ from each other, and no token of them is a close call.
    """
    import peft
    import torch

    from rayfin.config.schema import ModelConfig
    from rayfin.models import load_base, load_tokenizer

    torch.set_num_threads(1)  # products this small only wait for a second one
    config = ModelConfig(name=MODEL)
    tokenizer = load_tokenizer(config)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(load_base(config, None, "cpu"), settings).eval()
    made: list[tuple[Path, str]] = []
    for seed in itertools.count():
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
            answer, lead = decode(model, ids)
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        if lead < MARGIN or text in {said for _, said in made}:
            continue
        path = folder / str(seed)
        model.save_pretrained(str(path), save_embedding_layers=False)
        made.append((path, text))
        if len(made) == count:
            return made
    raise AssertionError  # itertools.count has no end


def decode(model: Any, ids: Any) -> tuple[list[int], float]:
    """The likeliest tokens after `ids`, and the least lead that one of them had."""
    import torch

    answer, lead = [], float("inf")
    for _ in range(TOKENS):
        best = model(input_ids=ids).logits[0, -1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        answer.append(int(best.indices[0]))
        ids = torch.cat([ids, best.indices[:1].view(1, 1)], dim=1)
    return answer, lead


@dataclass
class Soak:
    """What is asked and done, and what was seen."""

    registry: Any
    made: list[tuple[Path, str]]
    says: dict[str, str] = field(default_factory=dict)
    """Version -> what it says; written before the version can be seen."""
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    fell: list[str] = field(default_factory=list)
    kills: list[tuple[float, str]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Resident MiB of all replicas, every five seconds."""

    def __post_init__(self) -> None:
        first, spare = self.made[: NAMES * VERSIONS], self.made[NAMES * VERSIONS :]
        # A spare one comes back long after the version that had it was removed.
        self._next = itertools.chain(first, itertools.cycle(spare))
        self._lock = threading.Lock()
        for number in range(NAMES):
            for _ in range(VERSIONS):
                self._publish(f"a{number}", alias="prod")

    def run(self, url: str, seconds: float) -> None:
        stop = threading.Event()
        works = (self._administer, self._kill, self._look, self._measure)
        with ThreadPoolExecutor(CLIENTS + len(works)) as pool:
            running = [pool.submit(self._ask, url, stop, number) for number in range(CLIENTS)]
            running += [pool.submit(work, url, stop) for work in works]
            wait(running, seconds, FIRST_EXCEPTION)
            stop.set()
        for one in running:
            one.result()

    def tell(self, minutes: float) -> None:
        print(f"{minutes:g} minutes, {CLIENTS} clients: {dict(self.seen)}")
        print(f"killed: {dict(Counter(kind for _, kind in self.kills))}")
        print(f"memory of all replicas, MiB, every 5 s: {self.memory}")
        for what in (*self.wrong[:5], *self.lost[:5], *self.fell[:5]):
            print(f"  {what}")
        print_figure("soak", "answers", self.seen["200"], "answers", 100.0 * minutes)
        print_figure("soak", "wrong_answers", len(self.wrong), "answers", 0.0, most=True)
        print_figure("soak", "lost", len(self.lost), "requests", 0.0, most=True)
        print_figure("soak", "figures_that_fell", len(self.fell), "figures", 0.0, most=True)
        half = len(self.memory) // 2
        growth = max(self.memory[half:]) - max(self.memory[:half])
        print_figure("soak", "memory_growth", growth, "MiB", 64.0, most=True)

    def _publish(self, name: str, alias: str | None = None) -> int:
        path, text = next(self._next)
        version = max(self.registry.versions(name), default=0) + 1
        self.says[f"{name}@{version}"] = text
        self.registry.publish(name, path, alias=alias)
        return version

    def _ask(self, url: str, stop: threading.Event, number: int) -> None:
        import httpx

        draw = random.Random(number)
        http = httpx.Client(base_url=url, timeout=120)
        while not stop.is_set():
            model = f"a{draw.randrange(NAMES)}{draw.choice(['', '@prod'])}"
            body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
            began = time.monotonic()
            try:
                answer = http.post("/v1/completions", json=body | {"ignore_eos": True})
            except httpx.HTTPError as error:
                self._failed(began, f"{model}: {error!r}", "no connection")
                http.close()
                http = httpx.Client(base_url=url, timeout=120)
                stop.wait(0.5)
                continue
            self._judge(began, model, answer)
            if answer.status_code != 200:
                stop.wait(0.2)
        http.close()

    def _judge(self, began: float, model: str, answer: Any) -> None:
        with self._lock:
            self.seen[str(answer.status_code)] += 1
        if answer.status_code == 200:
            value = answer.json()
            if value["choices"][0]["text"] != self.says.get(value["model"]):
                self.wrong.append(f"{model} as {value['model']}: {value['choices'][0]['text']!r}")
            if value["model"].partition("@")[0] != model.partition("@")[0]:
                self.wrong.append(f"{model} was answered by {value['model']}")
        elif answer.status_code not in (429, 503) or "retry-after" not in answer.headers:
            self._failed(began, f"{model}: {answer.status_code} {answer.text[:200]}", "no answer")
        else:
            with contextlib.suppress(json.JSONDecodeError, KeyError), self._lock:
                self.seen[f"{answer.status_code} {answer.json()['error']['code']}"] += 1

    def _failed(self, began: float, what: str, kind: str) -> None:
        """Lost, unless there was no proxy."""
        with self._lock:
            self.seen[kind] += 1
            away = kind == "no connection" and any(
                at + PROXY_SECONDS > began for at, killed in self.kills if killed == "ProxyActor"
            )
            if not away:
                self.lost.append(what)

    def _administer(self, url: str, stop: threading.Event) -> None:
        for number in itertools.cycle(range(NAMES)):
            name = f"a{number}"
            version = self._publish(name)
            steps = (
                partial(self.registry.promote, name, version),
                partial(self.registry.rollback, name),
                partial(self.registry.promote, name, version),
                partial(self.registry.remove, f"{name}@{version - 1}"),
            )
            for step in steps:
                if stop.wait(2.0):
                    return
                step()

    def _kill(self, url: str, stop: threading.Event) -> None:
        titles = ("rayfin:engine", "rayfin:api", "ProxyActor", "ServeController")
        for title in itertools.cycle(titles):
            if stop.wait(SECONDS_BETWEEN_KILLS):
                return
            with contextlib.suppress(StopIteration):
                process = next(processes([title]))
                self.kills.append((time.monotonic(), title))
                process.kill()

    def _look(self, url: str, stop: threading.Event) -> None:
        """What counts from the start never falls."""
        import httpx

        before: dict[str, float] = {}
        while not stop.wait(0.2):
            try:
                answer = httpx.get(f"{url}/metrics", timeout=60)
            except httpx.HTTPError:
                continue
            if answer.status_code != 200:
                continue
            for line in answer.text.splitlines():
                name, _, value = line.rpartition(" ")
                if line.startswith("#") or not any(
                    s in name for s in ("_total", "_count", "_bucket")
                ):
                    continue
                if float(value) < before.get(name, 0.0):
                    self.fell.append(f"{name} fell from {before[name]:g} to {value}")
                before[name] = float(value)

    def _measure(self, url: str, stop: threading.Event) -> None:
        import psutil

        while not stop.wait(5.0):
            total = 0
            for process in processes(["ServeReplica"]):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
            self.memory.append(total >> 20)


def processes(titles: Sequence[str]) -> Iterator[Any]:
    """This process's descendants whose command line has one of `titles`."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if any(title in line for title in titles):
                yield process


if __name__ == "__main__":
    main()
