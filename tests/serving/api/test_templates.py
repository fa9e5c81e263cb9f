"""Chat templates: an adapter's own is used, and a hostile one hurts nobody else."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from rayfin.adapters import Registry
from rayfin.config.schema import ModelConfig
from rayfin.errors import AdapterError, Overloaded, RequestError, Unavailable
from rayfin.serving.api import adapter_tokenizers
from rayfin.serving.api.adapter_tokenizers import (
    MAX_TEMPLATE,
    AdapterTokenizer,
    AdapterTokenizers,
    read_template,
)
from rayfin.serving.api.templates import SubprocessRenderer
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.timed_executor import TimedExecutor

OWN = "{% for m in messages %}[{{ m['role'] }}|{{ m['content'] }}]{% endfor %}>"
HELLO = [{"role": "user", "content": "hello"}]

Publish = Callable[..., None]


@pytest.fixture
def publish(registry: Registry, tmp_path: Path) -> Publish:
    """Publishes support@1 again under a name, with a chat template."""

    def publish(name: str, template: Any, file: str = "chat_template.jinja") -> None:
        source = tmp_path / f"source-{name}"
        shutil.copytree(registry.root / "support" / "1", source)
        if file == "chat_template.jinja":
            (source / file).write_text(template)
        else:
            (source / file).write_text(json.dumps({"chat_template": template}))
        registry.publish(name, source)

    return publish


@pytest.fixture
def patient(tools: Any, engine: Any, registry: Registry) -> Iterator[Any]:
    with tools.serving(engine, registry, tools.ApiConfig(template_seconds=0.3)) as server:
        yield server


def test_an_adapters_own_template_is_used(patient: Any, publish: Publish) -> None:
    publish("jinja", OWN)
    publish("config", OWN, "tokenizer_config.json")
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OWN}]
    publish("several", named, "tokenizer_config.json")
    publish("without", None, "tokenizer_config.json")
    tokenizer = patient.engine.tokenizer
    own = tokenizer("[user|hello]>")["input_ids"]
    base = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
    for model, prompt in {
        "jinja": own,
        "config": own,
        "several": own,
        "without": base,
        "support": base,
        "tiny": base,
    }.items():
        body = {"model": model, "messages": HELLO}
        assert patient.http.post("/tokenize", json=body).json()["tokens"] == list(prompt)
        assert patient.chat(model).json()["usage"]["prompt_tokens"] == len(prompt)


def test_templates_are_rendered_as_transformers_does(patient: Any, publish: Publish) -> None:
    template = (
        "{{ bos_token }}{% for m in messages if m.content is defined %}{% if loop.index > 2 %}"
        "{% break %}{% endif %}{{ m | tojson }}{% endfor %}{{ eos_token }}"
        "{% if add_generation_prompt %}<{{ namespace(x=1).x }}>{% endif %}"
    )
    publish("rich", template)
    messages = [*HELLO, {"role": "assistant", "content": "ho"}, *HELLO]
    tokenizer = patient.engine.tokenizer
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True
    )
    body = {"model": "rich", "messages": messages}
    assert patient.http.post("/tokenize", json=body).json()["tokens"] == encoded["input_ids"]


def test_tools_are_written_by_the_template_that_writes_them(patient: Any, publish: Publish) -> None:
    publish("caller", "{% for t in tools or [] %}({{ t | tojson }}){% endfor %}" + OWN)
    tools = [{"type": "function", "function": {"strict": True, "name": "f"}}]
    tokenizer = patient.engine.tokenizer
    plain = tokenizer("[user|hello]>")["input_ids"]
    offered = tokenizer(f"({json.dumps(tools[0])})[user|hello]>")["input_ids"]
    asked = {"model": "caller", "messages": HELLO, "max_tokens": 1}
    for extra, prompt in (
        ({"tools": tools}, offered),
        ({"tools": tools, "tool_choice": "auto"}, offered),
        ({"tools": tools, "tool_choice": "none"}, plain),
        ({"tools": []}, plain),
    ):
        answered = patient.http.post("/v1/chat/completions", json=asked | extra)
        assert answered.json()["usage"]["prompt_tokens"] == len(prompt)
    body = {"model": "caller", "messages": HELLO, "tools": tools}
    assert patient.http.post("/tokenize", json=body).json()["tokens"] == offered
    for model, extra, why in (
        ("tiny", {}, "the chat template of the base model writes no tools"),
        ("caller", {"tool_choice": "required"}, "tool_choice"),
        ("caller", {"tools": [{"type": "search"}]}, "a tool is {'type': 'function'"),
    ):
        body = asked | {"tools": tools, "model": model} | extra
        refused = patient.http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400
        assert why in refused.json()["error"]["message"]


# A loop without end is made of loops whose ranges the sandbox allows.
ENDLESS = "{% for a in range(99999) %}" * 4 + "{% set x = 1 %}" + "{% endfor %}" * 4
HOSTILE = {
    "endless loop": ENDLESS,
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "endless power": "{% set x = 9 %}{{ x ** (9 ** 9) }}",
    "power while compiling": "{{ 9 ** (9 ** 9) }}",
    "huge text": "{{ 'x' * 10 ** 11 }}",
    "huge output": "{% for a in range(99999) %}{{ 'x' * 10 ** 6 }}{% endfor %}",
    "doubling": "{% set ns = namespace(x='x') %}{% for a in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "large output": "{{ 'x' * 2 ** 24 }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "attribute by name": "{{ messages | map(attribute='__class__') | list | first }}"
    "{{ ''|attr('__class__')|attr('__mro__') }}{{ ().__class__.__bases__ }}",
    "format string": "{{ '{0.__class__.__mro__}'.format('') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "raises": "{{ raise_exception('no such role') }}",
    "no template": "{% for",
    "division": "{{ 1 / 0 }}",
    "not text": "{{ messages[0].content + 1 }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "half a character": "{{ '\\ud800' }}",
}


def test_hostile_templates_end_in_an_error_and_nobody_else_notices(
    patient: Any, publish: Publish
) -> None:
    for number, template in enumerate(HOSTILE.values()):
        publish(f"hostile-{number}", template)
    publish("own", OWN)
    answers = {name: patient.chat(f"hostile-{number}") for number, name in enumerate(HOSTILE)}
    statuses = {name: answer.status_code for name, answer in answers.items()}
    assert statuses == dict.fromkeys(HOSTILE, 400)
    for answer in answers.values():
        message = answer.json()["error"]["message"]
        assert len(message) < 500 and "chat template" in message
        assert "root:" not in message and "<class" not in message
    assert "no such role" in answers["raises"].json()["error"]["message"]
    for model in ("own", "support", "tiny"):
        assert patient.chat(model).status_code == 200
    # Completions need no template.
    assert patient.complete(model="hostile-0").status_code == 200


def test_a_template_that_takes_too_long_keeps_no_one_waiting(
    patient: Any, publish: Publish
) -> None:
    publish("endless", ENDLESS)
    publish("own", OWN)
    assert patient.chat("own").status_code == 200

    async def ask_all() -> list[int]:
        client = openai.AsyncOpenAI(
            api_key="x", base_url=f"{patient.url}/v1", max_retries=0, timeout=540
        )

        async def ask(model: str) -> int:
            try:
                await client.chat.completions.create(model=model, messages=HELLO, max_tokens=1)
            except openai.APIStatusError as error:
                return error.status_code
            return 200

        async with client:
            return await asyncio.gather(*map(ask, ["endless"] * 8 + ["own", "support", "tiny"]))

    assert asyncio.run(ask_all()) == [400] * 8 + [200] * 3


def test_a_template_that_is_too_large_or_no_text_is_refused(
    registry: Registry, publish: Publish, tmp_path: Path
) -> None:
    publish("large", "x" * (MAX_TEMPLATE + 1))
    publish("largest", "x" * MAX_TEMPLATE)
    publish("number", 7, "tokenizer_config.json")
    sources = {
        name: AdapterSource(f"{name}@1", registry.root / name / "1")
        for name in ("large", "largest", "number")
    }
    with pytest.raises(AdapterError, match="65537 characters"):
        read_template(sources["large"])
    assert read_template(sources["largest"]) == "x" * MAX_TEMPLATE
    assert read_template(sources["number"]) is None

    for name, make in {
        "link": lambda path: path.symlink_to("/etc/passwd"),
        "directory": lambda path: path.mkdir(),
        "bytes": lambda path: path.write_bytes(b"\xff\xfe"),
    }.items():
        directory = tmp_path / name
        directory.mkdir()
        make(directory / "chat_template.jinja")
        with pytest.raises(AdapterError, match="no text file"):
            read_template(AdapterSource(f"{name}@1", directory))


def test_a_pipe_in_the_place_of_a_template_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(AdapterError, match="no text file"):
        read_template(AdapterSource("pipe@1", tmp_path))


@pytest.mark.parametrize("config", ["[" * 100_000, "{", '{"chat_template": [1]}', "[]"])
def test_a_broken_tokenizer_config_is_an_adapter_error(tmp_path: Path, config: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(AdapterError, match=r"tokenizer_config\.json"):
        read_template(AdapterSource("broken@1", tmp_path))


def test_a_renderer_outlives_its_process() -> None:
    async def render() -> list[str]:
        renderer = SubprocessRenderer(seconds=5)
        try:
            texts = [await renderer.render("a@1", OWN, HELLO, {})]
            assert renderer._process is not None
            os.killpg(renderer._process.pid, signal.SIGKILL)
            with pytest.raises(Overloaded, match="send the request again"):
                await renderer.render("a@1", OWN, HELLO, {})
            return [*texts, await renderer.render("a@1", OWN, HELLO, {})]
        finally:
            renderer.close()

    assert asyncio.run(render()) == ["[user|hello]>"] * 2


def test_a_renderer_that_dies_idle_mixes_up_no_conversations() -> None:
    async def render() -> list[str]:
        renderer = SubprocessRenderer(seconds=5)
        try:
            texts = [await renderer.render("a@1", OWN, HELLO, {})]
            assert renderer._process is not None
            (child,) = psutil.Process(renderer._process.pid).children()
            child.kill()
            for name in ("b", "c", "d"):
                said = [{"role": "user", "content": name}]
                texts.append(await renderer.render(f"{name}@1", OWN, said, {}))
            return texts
        finally:
            renderer.close()

    assert asyncio.run(render()) == ["[user|hello]>", "[user|b]>", "[user|c]>", "[user|d]>"]


def test_no_renderer_that_dies_idle_takes_a_job_along() -> None:
    async def render() -> None:
        renderer = SubprocessRenderer(seconds=5)
        try:
            for number in range(100):
                said = [{"role": "user", "content": str(number)}]
                assert await renderer.render("a@1", OWN, said, {}) == f"[user|{number}]>"
                assert renderer._process is not None
                # A signal that has not arrived yet may find it with the next job before it.
                for child in psutil.Process(renderer._process.pid).children():
                    child.kill()
        finally:
            renderer.close()

    asyncio.run(render())


def test_a_renderer_that_dies_amid_reading_a_job_is_started_anew() -> None:
    async def render() -> str:
        renderer = SubprocessRenderer(seconds=5)
        try:
            await renderer.render("a@1", OWN, HELLO, {})
            process = renderer._process
            assert process is not None and process.stdin is not None
            (child,) = psutil.Process(process.pid).children()
            process.stdin.write(b'{"number": 7, ')
            process.stdin.flush()
            unread = bytearray(4)
            while fcntl.ioctl(process.stdin, termios.FIONREAD, unread) or any(unread):
                await asyncio.sleep(0.01)
            child.kill()
            process.wait(540)
            with pytest.raises(Overloaded, match="send the request again"):
                await renderer.render("a@1", OWN, HELLO, {})
            return await renderer.render("a@1", OWN, HELLO, {})
        finally:
            renderer.close()

    assert asyncio.run(render()) == "[user|hello]>"


@pytest.mark.parametrize("happens", ["kill", "suspend"])
def test_what_the_machine_does_to_a_renderer_is_no_template_refused_for(happens: str) -> None:
    async def render() -> str:
        renderer = SubprocessRenderer(seconds=30)
        try:
            await renderer.render("a@1", OWN, HELLO, {})
            assert renderer._process is not None
            patience = renderer._patience
            if happens == "suspend":  # else it would be waited for so long
                renderer._patience = 3.0
            (child,) = psutil.Process(renderer._process.pid).children()
            before = child.cpu_times().user
            asked = asyncio.create_task(renderer.render("a@1", ENDLESS, HELLO, {}))
            with contextlib.suppress(psutil.NoSuchProcess):  # on a machine that is slower
                while child.cpu_times().user <= before:
                    await asyncio.sleep(0.01)
                getattr(child, happens)()
            with pytest.raises(Overloaded, match="send the request again"):
                await asked
            renderer._patience = patience
            return await renderer.render("a@1", OWN, HELLO, {})
        finally:
            renderer.close()

    assert asyncio.run(render()) == "[user|hello]>"


def test_a_slow_start_is_not_the_templates_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(3)")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    async def render() -> str:
        renderer = SubprocessRenderer(seconds=20, patience=0.1)
        try:
            return await renderer.render("a@1", OWN, HELLO, {})
        finally:
            renderer.close()

    assert asyncio.run(render()) == "[user|hello]>"


def test_a_refused_template_is_tried_again_later() -> None:
    now = 0.0

    async def render() -> None:
        nonlocal now
        renderer = SubprocessRenderer(seconds=0.2, clock=lambda: now)
        try:
            for _ in range(2):
                with pytest.raises(AdapterError, match="too much time"):
                    await renderer.render("a@1", ENDLESS, HELLO, {})
            # The same name stands for the same template: only a test can tell that it was not
            # tried again.
            with pytest.raises(AdapterError, match="too much time"):
                await renderer.render("a@1", OWN, HELLO, {})
            now += 60
            assert await renderer.render("a@1", OWN, HELLO, {}) == "[user|hello]>"
        finally:
            renderer.close()

    asyncio.run(render())


def test_too_many_at_once_are_refused() -> None:
    async def render() -> list[Any]:
        renderer = SubprocessRenderer(seconds=5)
        try:
            jobs = [renderer.render(f"a@{i}", OWN, HELLO, {}) for i in range(100)]
            return await asyncio.gather(*jobs, return_exceptions=True)
        finally:
            renderer.close()

    answers = asyncio.run(render())
    assert answers.count("[user|hello]>") == 64
    assert all(isinstance(answer, (str, Overloaded)) for answer in answers)


def test_a_base_without_a_template_says_what_to_do(
    tools: Any, engines: Any, tiny: str, shared_registry: Registry, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny, plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    assert ModelConfig(name=str(plain))
    engine = engines(str(plain), max_length=256)
    with tools.serving(engine, shared_registry, tools.ApiConfig()) as server:
        response = server.chat("tiny")
        assert response.status_code == 400
        assert "use /v1/completions" in response.json()["error"]["message"]
        assert server.complete().status_code == 200


def test_what_the_base_template_refuses_is_the_requests_fault() -> None:
    from rayfin.models import load_tokenizer
    from rayfin.serving.api.templates import Templates

    tokenizer = load_tokenizer(ModelConfig(name="tiny"))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"

    async def render() -> None:
        looks = TimedExecutor("files", threads=1, seconds=60, most_stuck=1)
        templates = Templates(tokenizer, 1.0, AdapterTokenizers(looks))
        try:
            await templates.render(None, HELLO)
        finally:
            templates.close()
            looks.close()

    with pytest.raises(RequestError, match="roles must alternate"):
        asyncio.run(render())


def test_what_is_away_is_read_when_it_is_back(tmp_path: Path) -> None:
    """A disk that was not mounted would else leave an adapter without its template for ever."""
    source = AdapterSource("away@1", tmp_path / "away")

    async def read() -> list[AdapterTokenizer]:
        looks = TimedExecutor("files", threads=1, seconds=60, most_stuck=1)
        own = AdapterTokenizers(looks)
        found = [await own.of(source)]
        source.path.mkdir()
        (source.path / "chat_template.jinja").write_text(OWN)
        (source.path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<x>"}}')
        found.append(await own.of(source))
        shutil.rmtree(source.path)
        found.append(await own.of(source))
        looks.close()
        return found

    brought = AdapterTokenizer(OWN, "<x>")
    assert asyncio.run(read()) == [AdapterTokenizer(), brought, brought]


def test_files_that_stall_hold_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = threading.Event()

    def stalls(source: AdapterSource) -> str | None:
        if source.ref == "stuck@1":
            leave.wait(540)
        return read_template(source)

    monkeypatch.setattr(adapter_tokenizers, "read_template", stalls)
    (tmp_path / "chat_template.jinja").write_text(OWN)

    async def read() -> AdapterTokenizer:
        looks = TimedExecutor("files", threads=1, seconds=2.0, most_stuck=2)
        own = AdapterTokenizers(looks)
        with pytest.raises(Unavailable, match="the tokenizer of adapter 'stuck@1' is being read"):
            await own.of(AdapterSource("stuck@1", tmp_path))
        found = await own.of(AdapterSource("other@1", tmp_path))
        leave.set()
        looks.close()
        return found

    assert asyncio.run(read()).template == OWN
