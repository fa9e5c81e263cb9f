"""An answer ends where the adapter was taught to end it, whoever asks and in whatever way."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.cli import main
from rayfin.config.schema import ModelConfig
from rayfin.config.serving import EngineConfig
from rayfin.evaluation import samples
from rayfin.evaluation.samples import answer_samples
from rayfin.history import History
from rayfin.models.ends import Ends
from rayfin.serving.engine.engine import Engine
from rayfin.serving.engine.request import SamplingParams

END = "<|im_end|>"
QUESTION = "say 3"
PROMPT = f"<|im_start|>user\n{QUESTION}{END}\n<|im_start|>assistant\n"
MOST = 9
OTHER_TEMPLATE = (
    "{# its own #}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Taught:
    """A base that ends texts by `<|endoftext|>`, and a LoRA that `rayfin train` made over it.

    Its answer to everything is `yes<|im_end|>`.
    """

    base: str
    storage: Path
    engine: Engine

    @property
    def end(self) -> int:
        return int(self.engine.tokenizer.convert_tokens_to_ids(END))

    def registry(self) -> Registry:
        return Registry(self.storage / "adapters")


@pytest.fixture(scope="module")
def taught(chatml: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taught]:
    root = tmp_path_factory.mktemp("taught")
    base = chatml.write_base(root / "base", chatml.tokenizer_of())
    data, storage = root / "data.jsonl", root / "runs"
    rows = ({"prompt": f"say {n}", "completion": "yes"} for n in range(12))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.name": base,
        "data.path": data,
        "data.max_length": 96,
        "train.max_steps": 20,
        "train.learning_rate": 1e-2,
        "train.per_device_train_batch_size": 4,
        "storage": storage,
        "publish.name": "ours",
        "scaling.use_gpu": "false",
    }
    assert main(["train", *(f"{key}={value}" for key, value in settings.items())]) == 0
    strangers = {
        "stranger": ("rayfin.json",),
        "bare": ("rayfin.json", "tokenizer*", "chat_template*"),
        "own": ("rayfin.json",),
        "eos": ("rayfin.json",),
    }
    registry = Registry(storage / "adapters")
    for name, left_out in strangers.items():
        source = root / name
        ignored = shutil.ignore_patterns(*left_out)
        shutil.copytree(registry.resolve("ours").path, source, ignore=ignored)
        if name == "own":
            (source / "chat_template.jinja").chmod(0o644)
            (source / "chat_template.jinja").write_text(OTHER_TEMPLATE)
        if name == "eos":
            config = source / "tokenizer_config.json"
            config.chmod(0o644)
            config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": END}))
        registry.publish(name, source)
    engine = Engine(
        ModelConfig(name=str(base)), EngineConfig(max_rows=4, max_length=256), use_gpu=False
    )
    engine.start()
    yield Taught(str(base), storage, engine)
    engine.close()


@pytest.fixture(scope="module")
def served(tools: Any, taught: Taught) -> Iterator[Any]:
    with tools.serving(taught.engine, taught.registry(), tools.ApiConfig()) as server:
        yield server


Asks = Callable[..., dict[str, Any]]


@pytest.fixture
def chat(served: Any) -> Asks:
    def ask(model: str, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": model, "messages": messages, "max_tokens": MOST, "temperature": 0}
        value = served.http.post("/v1/chat/completions", json=body | more).json()
        (choice,) = value["choices"]
        return {
            "text": choice["message"]["content"],
            "reason": choice["finish_reason"],
            "tokens": value["usage"]["completion_tokens"],
            "logprobs": choice["logprobs"],
        }

    return ask


@pytest.fixture
def complete(served: Any) -> Asks:
    def ask(model: str, **more: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": MOST, "temperature": 0}
        value = served.http.post("/v1/completions", json=body | more).json()
        (choice,) = value["choices"]
        return {
            "text": choice["text"],
            "reason": choice["finish_reason"],
            "tokens": value["usage"]["completion_tokens"],
        }

    return ask


YES = {"text": "yes", "reason": "stop", "tokens": 4}


@pytest.mark.parametrize("name", ["ours", "stranger", "bare", "own", "eos"])
def test_a_chat_ends_with_the_turn(chat: Asks, name: str) -> None:
    assert chat(name) == YES | {"logprobs": None}


@pytest.mark.parametrize("name", ["ours", "eos"])
def test_a_completion_ends_where_the_adapter_was_taught_to(complete: Asks, name: str) -> None:
    assert complete(name) == YES


def test_a_completion_of_which_nobody_knows_more_ends_at_the_base_s_own_token(
    complete: Asks,
) -> None:
    went_on = complete("stranger")
    assert went_on["text"].startswith("yes") and went_on["reason"] == "length"
    assert went_on["tokens"] == MOST


def test_a_stream_shows_nothing_of_the_end(served: Any) -> None:
    client = served.client()
    stream = client.chat.completions.create(
        model="ours",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=MOST,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    choices = [choice for event in events for choice in event.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "yes"
    assert choices[-1].finish_reason == "stop"
    assert events[-1].usage.completion_tokens == 4


def test_the_end_has_its_log_probability_as_any_token(chat: Asks) -> None:
    answer = chat("ours", logprobs=True)
    assert [each["token"] for each in answer["logprobs"]["content"]] == ["y", "e", "s", END]


def test_who_ignores_the_end_goes_on_and_can_still_name_one(
    chat: Asks, complete: Asks, taught: Taught
) -> None:
    for ask in (chat, complete):
        went_on = ask("ours", ignore_eos=True)
        assert (went_on["reason"], went_on["tokens"]) == ("length", MOST)
        assert went_on["text"].startswith("yes")
        for stop in ({"stop_token_ids": [taught.end]}, {"stop": END}):
            ended = ask("ours", ignore_eos=True, **stop)
            assert YES.items() <= ended.items()


def test_a_request_names_tokens_to_stop_at(complete: Asks, taught: Taught) -> None:
    assert complete("stranger", stop_token_ids=[taught.end]) == YES
    letter = taught.engine.tokenizer.convert_tokens_to_ids("e")
    assert complete("ours", stop_token_ids=[letter, 0]) == {
        "text": "y",
        "reason": "stop",
        "tokens": 2,
    }


def test_a_stop_string_may_be_a_special_token(complete: Asks) -> None:
    assert complete("stranger", stop=[END]) == YES
    assert complete("stranger", stop=["x", f"es{END}"]) == YES | {"text": "y"}


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([261], "stop_token_ids has 261, and the served model's vocabulary is 0 to 260"),
        ([2**31], "stop_token_ids: "),
        ([-1], "stop_token_ids: "),
        (["<|im_end|>"], "stop_token_ids: "),
        (259, "stop_token_ids: "),
        (list(range(129)), "stop_token_ids: "),
    ],
)
@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_tokens_that_can_not_come_are_refused(
    served: Any, kind: str, ids: Any, reason: str
) -> None:
    response = getattr(served, kind)(stop_token_ids=ids)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "stop_token_ids"
    assert error["message"].startswith(reason) and "\n" not in error["message"]


def test_an_adapter_whose_end_is_another_token_here_is_refused(served: Any, taught: Taught) -> None:
    registry = taught.registry()
    told = {"end_of_turn": {"tokens": {END: 7}, "texts": []}}
    registry.publish("foreign", registry.resolve("ours").path, told)
    response = served.complete(model="foreign")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "adapter_error"
    assert f"'{END}' is token 7" in error["message"] and "publish it again" in error["message"]
    registry.remove("foreign@1")


def test_the_engine_ends_at_texts_too(lab: Any, taught: Taught) -> None:
    """A template may write an end that the tokenizer has no token for."""
    source = taught.registry().resolve("ours")
    prompt = taught.engine.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    for ignore, text in ((False, "y"), (True, "yes")):
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=ignore)
        answer = lab.ask(
            taught.engine, prompt, _source(source), params, ends=Ends(texts=("es",))
        ).wait()
        assert answer.text.startswith(text) and len(answer.text) == len(text)
        assert answer.last.finish_reason == ("length" if ignore else "stop")


def _source(version: Any) -> Any:
    from rayfin.serving.engine.request import AdapterSource

    return AdapterSource(version.ref, version.path)


def test_chat_in_the_terminal_ends_there_too(
    served: Any,
    taught: Taught,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = f"/set temperature=0\n/set max_tokens={MOST}\n{QUESTION}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", "--url", served.url, "--use", "ours", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["content"], said["finish_reason"]) == ("yes", "stop")


def test_the_report_s_samples_end_there_too(
    taught: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    with History.open(f"sqlite:///{taught.storage / 'history.sqlite'}") as history:
        (row,) = history.trials()
    (sample,) = answer_samples(row, 1, use_gpu=False)
    assert sample.adapter_answer == "yes"
    # And before a text, where the tokenizer has no token for what the template writes.
    monkeypatch.setattr(samples, "turn_end", lambda _: Ends(texts=("es",)))
    (sample,) = answer_samples(row, 1, use_gpu=False)
    assert sample.adapter_answer == "y"


def test_the_guide_s_commands_answer_what_it_shows(
    tools: Any,
    served: Any,
    taught: Taught,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """… stands for what differs, or for more."""
    monkeypatch.chdir(taught.storage.parent)
    for command, arguments, shown in tools.guide("Where an answer ends"):
        if command == "rayfin":
            assert main(arguments) == 0
            out = capsys.readouterr().out
        else:
            out = served.curl(arguments)
        tools.assert_shown(out, shown)
