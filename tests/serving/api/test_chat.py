"""`rayfin chat` against a real API, its input piped in as a script or a test would."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.cli import main
from rayfin.serving.engine.request import AdapterSource

Talk = Callable[..., tuple[int, str, str]]
Says = Callable[..., str]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Exit code, output and errors of a chat with these lines as its input."""

    def run(url: str | None, *lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", *(("--url", url) if url else ()), *options])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def says(server: Any) -> Says:
    """The API's own answer to a conversation."""

    def ask(model: str, *messages: tuple[str, str], tokens: int = 8) -> str:
        written = [{"role": role, "content": content} for role, content in messages]
        response = server.http.post(
            "/v1/chat/completions",
            json={"model": model, "messages": written, "max_tokens": tokens, "temperature": 0},
        )
        return str(response.json()["choices"][0]["message"]["content"])

    return ask


GREEDY = ("/set temperature=0", "/set max_tokens=8")


def test_a_conversation_goes_on_with_another_adapter(server: Any, talk: Talk, says: Says) -> None:
    code, out, err = talk(
        server.url,
        *GREEDY,
        "hello",
        "/use sales",
        "and you?",
        options=("--use", "support@prod", "--json"),
    )
    assert (code, err) == (0, "")
    first, second = map(json.loads, out.splitlines())
    assert (first["model"], second["model"]) == ("support@1", "sales@1")
    assert first["content"] == says("support@1", ("user", "hello"))
    talked = (("user", "hello"), ("assistant", first["content"]), ("user", "and you?"))
    assert second["content"] == says("sales", *talked)
    assert first["usage"]["completion_tokens"] <= 8


def test_what_people_see(server: Any, talk: Talk, says: Says) -> None:
    code, out, err = talk(
        server.url, *GREEDY, "/use support", "hello", "/models", "/help", "/quit", "x"
    )
    assert (code, err) == (0, "")
    assert "now talking to support (support@2)" in out
    assert "-- support@2, " in out
    assert "  support@prod\n" in out and "/system TEXT" in out


def test_with_json_standard_output_has_the_answers_alone(server: Any, talk: Talk) -> None:
    code, out, err = talk(
        server.url, *GREEDY, "/use support", "/models", "hello", "/help", options=("--json",)
    )
    assert code == 0
    assert [json.loads(line)["model"] for line in out.splitlines()] == ["support@2"]
    assert "  support@prod\n" in err and "/system TEXT" in err


def test_a_system_message_and_a_new_start(server: Any, talk: Talk, says: Says) -> None:
    lines = ("/system Be brief.", "hello", "/reset", "hi", "/system", "/reset", "hi")
    _, out, _ = talk(server.url, *GREEDY, *lines, options=("--json",))
    answers = [json.loads(line)["content"] for line in out.splitlines()]
    system = ("system", "Be brief.")
    assert answers == [
        says("tiny", system, ("user", "hello")),
        says("tiny", system, ("user", "hi")),
        says("tiny", ("user", "hi")),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/use suport", "did you mean 'support'?"),
        ("/use suport", "; 'tiny' goes on answering\n"),
        ("/use", "/models lists them; 'tiny' goes on answering"),
        ("/use ../etc", "neither the base"),
        ("/set temperature=hot", "'hot' is no number"),
        ("/set max_tokens=1.5", "whole number"),
        ("/set temprature=1", "did you mean 'temperature'?"),
        ("/set temperature", "KEY=VALUE"),
        ("/usr sales", "did you mean '/use'?"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_the_chat_goes_on(
    server: Any, talk: Talk, line: str, reason: str
) -> None:
    code, out, err = talk(server.url, *GREEDY, line, "hello", options=("--json",))
    assert code == 1
    assert err.startswith("rayfin: ") and err.count("\n") == 1 and reason in err
    assert json.loads(out)["model"] == "tiny"


def test_a_question_that_failed_is_not_part_of_the_conversation(
    server: Any, talk: Talk, says: Says
) -> None:
    lines = ("/set temperature=99", "lost", "/set temperature=0", "hello")
    code, out, err = talk(server.url, *GREEDY, *lines, options=("--json",))
    assert code == 1 and "temperature" in err
    assert json.loads(out)["content"] == says("tiny", ("user", "hello"))


def test_a_value_may_be_taken_back(server: Any, talk: Talk) -> None:
    _, out, _ = talk(server.url, *GREEDY, "/set max_tokens=2", "hi", options=("--json",))
    assert json.loads(out)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9", "can't be reached"),
        ("nonsense", "write http://HOST:PORT"),
        ("127.0.0.1:9", "write http://HOST:PORT"),
        ("ftp://127.0.0.1", "write http://HOST:PORT"),
        ("http://a:b", "no URL"),
    ],
)
def test_a_deployment_that_is_not_there(talk: Talk, url: str, reason: str) -> None:
    code, out, err = talk(url, "hello")
    assert code in (1, 2) and not out
    assert err.startswith("rayfin: ") and err.count("\n") == 1 and reason in err


def test_a_key_comes_from_the_environment(
    tools: Any, engine: Any, shared_registry: Registry, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tools.ApiConfig.model_validate({"api_keys": [{"key": "k"}]})
    with tools.serving(engine, shared_registry, config) as server:
        code, _, err = talk(server.url, "hello")
        assert code == 2 and err.count("\n") == 1
        monkeypatch.setenv("RAYFIN_API_KEY", "k")
        code, out, _ = talk(server.url, *GREEDY, "hello", options=("--json",))
        assert code == 0 and json.loads(out)["model"] == "tiny"


def test_without_a_deployment_the_model_runs_here(
    tiny: str, tiny_adapters: dict[str, AdapterSource], tmp_path: Path, talk: Talk
) -> None:
    Registry(tmp_path / "adapters").publish("ours", tiny_adapters["p_tuning"].path)
    options = (f"model.name={tiny}", f"storage={tmp_path}", "--use", "ours", "--json")
    code, out, err = talk(None, *GREEDY, "hello", options=options)
    assert (code, json.loads(out)["model"]) == (0, "ours@1")
    assert err == f"Loading {tiny} ...\n"


def test_settings_and_a_deployment_exclude_each_other(talk: Talk) -> None:
    code, _, err = talk("http://127.0.0.1:9", options=("engine.slots=3",))
    assert code == 2 and "leave one of them out" in err


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, url: str, *options: str, stdout: int | None = None) -> None:
        """`stdout`: where it goes instead."""
        ours, theirs = pty.openpty()
        self._ours = ours
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rayfin", "chat", "--url", url, *options],
            stdin=theirs,
            stdout=theirs if stdout is None else stdout,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(theirs)
        self.seen = ""

    def write(self, line: str) -> None:
        os.write(self._ours, f"{line}\n".encode())

    def until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 540
        while not happened():
            assert time.monotonic() < deadline, self.seen
            if select.select([self._ours], [], [], 0.02)[0]:
                self.seen += os.read(self._ours, 4096).decode(errors="replace")

    def close(self, prompt: str) -> int:
        """Ctrl-D at the prompt; before, the terminal would swallow it."""
        try:
            self.until(lambda: self.seen.endswith(prompt))
            os.write(self._ours, b"\x04")
            return self.process.wait(540)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._ours)


def test_ctrl_c_stops_an_answer_and_frees_its_row(server: Any) -> None:
    before = server.engine.stats().generated_tokens
    terminal = Terminal(server.url)

    def running() -> bool:
        return bool(server.http.get("/health").json()["running"])

    try:
        terminal.until(lambda: "tiny> " in terminal.seen)
        assert "adapters: sales, support" in terminal.seen
        terminal.write("/set temperature=0")
        # What was said is ever likelier to be said again: the tiny model goes on and on.
        terminal.write("/set frequency_penalty=-2")
        terminal.write("tell me all")
        terminal.until(running)
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.until(lambda: " -- tiny, stopped" in terminal.seen and not running())
        terminal.write("/use sales")
        terminal.until(lambda: "now talking to sales (sales@1)" in terminal.seen)
    finally:
        code = terminal.close("sales> ")
    assert code == 0
    stats = server.engine.stats()
    assert stats.generated_tokens - before < server.engine.max_length / 2


def test_prompts_are_no_part_of_json(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with path.open("w") as answers:
        terminal = Terminal(server.url, "--json", stdout=answers.fileno())
    try:
        for prompts, line in enumerate(("/set max_tokens=2", "hello"), 1):
            terminal.until(lambda count=prompts: terminal.seen.count("tiny> ") == count)
            terminal.write(line)
        terminal.until(lambda: terminal.seen.count("tiny> ") == 3)
    finally:
        code = terminal.close("tiny> ")
    assert code == 0
    assert [json.loads(line)["model"] for line in path.read_text().splitlines()] == ["tiny"]
