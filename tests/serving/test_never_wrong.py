"""Never the wrong adapter: each of 32 says its own word, and 64 clients hold it to that.

At last the cluster under them is taken away.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import peft
import psutil
import pytest
import torch

from rayfin.adapters import Registry
from rayfin.config.schema import ModelConfig
from rayfin.models import load_base
from rayfin.models.quiet import no_progress_bars

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ADAPTERS, MORE = 32, 12
CLIENTS, REQUESTS, SLOTS = 64, 1000, 8
STEPS, LEAD = 200, 0.1
"""At most so many, until every letter is likelier than any other by so much (the tiny model's
scores lie close together)."""
GONE_WITHIN = 180.0
"""Seconds."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def train_words(
    model: str, tokenizer: Any, prompt: str, words: list[str], folder: Path
) -> dict[str, Path]:
    """Word -> a LoRA adapter that was trained to answer `prompt` with it, of ranks 2 to 8."""
    base: Any = load_base(ModelConfig(name=model), None, "cpu")
    asked = tokenizer(prompt)["input_ids"]
    saved = {}
    for number, word in enumerate(words):
        settings = peft.LoraConfig(
            r=2 + number % 7,
            lora_alpha=16,
            use_rslora=number % 3 == 0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(number)
        with no_progress_bars():
            wrapped = peft.get_peft_model(base, settings)
        said = [*tokenizer(word, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([asked + said])
        labels = torch.tensor([[-100] * len(asked) + said])
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        for _ in range(STEPS):
            answer = wrapped(input_ids=ids, labels=labels)
            likeliest = answer.logits[0, len(asked) - 1 : -1].topk(2)
            lead = (likeliest.values[:, 0] - likeliest.values[:, 1]).min()
            if likeliest.indices[:, 0].tolist() == said and lead > LEAD:
                break
            answer.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            pytest.fail(f"'{word}' was not learned")
        wrapped.eval()
        saved[word] = folder / word
        wrapped.save_pretrained(str(saved[word]), save_embedding_layers=False)
        base = wrapped.unload()
    return saved


class Administrator:
    """Publishes, promotes, rolls back and removes, and knows which word each version says."""

    def __init__(self, registry: Registry, words: dict[str, Path]) -> None:
        self.registry, self._words = registry, words
        self.says: dict[str, str] = {}
        """Version -> its word; written before the version can be seen."""
        self.done: Counter[str] = Counter()
        self._spare = list(words)
        for number in range(ADAPTERS):
            self._publish(f"a{number:02}", alias="prod")

    def _publish(self, name: str, alias: str | None = None) -> int:
        word = self._spare.pop(0)
        version = max(self.registry.versions(name), default=0) + 1
        self.says[f"{name}@{version}"] = word
        published = self.registry.publish(name, self._words[word], alias=alias)
        assert published.version == version
        return version

    def work(self, stop: threading.Event) -> None:
        """A new version of one adapter after the other: promoted, taken back, the old removed."""
        for number in range(MORE):
            name = f"a{number:02}"
            steps = {
                "publish": lambda: self._publish(name),  # noqa: B023  (called in this round)
                "promote": lambda: self.registry.promote(name, 2),  # noqa: B023
                "rollback": lambda: self.registry.rollback(name),  # noqa: B023
                "promote again": lambda: self.registry.promote(name, 2),  # noqa: B023
                "remove": lambda: self.registry.remove(f"{name}@1"),  # noqa: B023
            }
            for what, step in steps.items():
                if stop.wait(0.1):
                    return
                step()
                self.done[what] += 1


@pytest.fixture(scope="module")
def service(
    lab: Any,
    tiny: str,
    tiny_tokenizer: Any,
    processes: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Any, Administrator]]:
    folder = tmp_path_factory.mktemp("words")
    draw = random.Random(0)
    words = ["".join(draw.sample(LETTERS, 5)) for _ in range(ADAPTERS + MORE)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small only wait for a second one
    try:
        trained = train_words(tiny, tiny_tokenizer, lab.PROMPT, words, folder)
    finally:
        torch.set_num_threads(threads)
    storage = tmp_path_factory.mktemp("served")
    administrator = Administrator(Registry(storage / "adapters"), trained)
    service = lab.Service(
        processes, tiny, storage, slots=SLOTS, max_rows=16, max_queue=64, max_length=128
    )
    yield service, administrator
    service.close()


def test_every_answer_belongs_to_the_version_that_it_names(
    service: tuple[Any, Administrator],
) -> None:
    served, administrator = service
    left = iter(range(REQUESTS))
    taking = threading.Lock()
    refused: Counter[int] = Counter()
    answered: Counter[str] = Counter()

    def ask(http: httpx.Client, number: int) -> None:
        name = f"a{random.Random(number).randrange(ADAPTERS):02}"
        # By name, by alias, by the base's name before it, and by version where it stays for good.
        fixed = f"{name}@1" if int(name[1:]) >= MORE else name
        model = (name, f"{name}@prod", f"{served.model}:{name}@prod", fixed)[number % 4]
        while (response := served.ask(model, 16, http, ignore_eos=False)).status_code == 429:
            refused[429] += 1  # told to come again: not lost
        assert response.status_code == 200, f"{model}: {response.text}"
        value = response.json()
        version, text = value["model"], value["choices"][0]["text"]
        assert text == administrator.says[version], (model, version)
        assert version.partition("@")[0] == name, (model, version)
        answered[version] += 1

    def client() -> None:
        with served.client() as http:
            while True:
                with taking:
                    number = next(left, None)
                if number is None:
                    return
                ask(http, number)

    stop = threading.Event()
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        works = pool.submit(administrator.work, stop)
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        try:
            for done in clients:
                done.result()
        finally:
            stop.set()
        works.result()
    assert answered.total() == REQUESTS
    assert administrator.done["remove"] > 0, "the administrator was too slow to matter"
    assert any(version.endswith("@2") for version in answered)
    assert served.count("slot_evictions") > 0
    served.until(lambda: served.count("running") == served.count("waiting") == 0)


def test_what_was_removed_is_gone_and_what_stayed_still_says_its_word(
    service: tuple[Any, Administrator],
) -> None:
    served, administrator = service
    for name in (f"a{number:02}" for number in range(ADAPTERS)):
        for version in served.registry.versions(name):
            ref = f"{name}@{version}"
            value = served.ask(ref, tokens=16, ignore_eos=False).json()
            assert (value["model"], value["choices"][0]["text"]) == (ref, administrator.says[ref])
    removed = [ref for ref in administrator.says if not _is_there(served.registry, ref)]
    assert removed
    for ref in removed:
        served.until(lambda ref=ref: served.ask(ref).status_code == 404)


def _is_there(registry: Registry, ref: str) -> bool:
    name, _, version = ref.partition("@")
    return int(version) in registry.versions(name)


def test_a_cluster_that_is_gone_ends_the_command(
    lab: Any, service: tuple[Any, Administrator]
) -> None:
    """The last test of the deployment, which is gone after it."""
    served, _ = service
    assert served.ask(served.model).status_code == 200
    family = psutil.Process(served.process.pid).children(recursive=True)
    engines = served.replicas("engine")
    (head,) = [process for process in family if "gcs_server" in lab.title(process)]
    head.kill()
    assert served.process.wait(GONE_WITHIN) == 1
    assert "the Ray cluster at" in served.errors() and "is gone" in served.errors()
    assert "Traceback" not in served.errors()
    assert engines and not psutil.wait_procs(engines, GONE_WITHIN)[1]
