"""Render chat templates, the adapter's own or the base's, without trusting them.

The base's template is the operator's choice, as the base is, and is rendered in this process. An
adapter's own, where it differs, may be anybody's: it is rendered in transformers' sandbox in
another process, which ends when it takes too much processor time or memory. What that does not
give: the other process has this one's rights, so a hole in the sandbox is a hole in the server;
and limits on memory hold on Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rayfin.errors import AdapterError, Overloaded, RequestError
from rayfin.models.ends import PROBES, Ends, turn_ends
from rayfin.serving.api.adapter_tokenizers import AdapterTokenizers
from rayfin.serving.api.template_worker import KILLED, LOST, render
from rayfin.serving.engine.request import AdapterSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_MAX_WAITING = 64
_REMEMBERED = 1024
_REFUSED_SECONDS = 30.0
# By the clock on the wall, for each second of processor time: only a renderer that is stuck, or on
# a machine that has no time for it, takes so long. And for the start, which is nobody's fault.
_PATIENCE = 60.0
_START_SECONDS = 300.0

Conversation = list[dict[str, Any]]
Tools = list[dict[str, Any]]


class Templates:
    """Finds the template that writes a request's conversation, and renders it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, seconds: float, own: AdapterTokenizers
    ) -> None:
        self._base = _base_template(tokenizer)
        self._base_for_tools = _base_template(tokenizer, tools=[{}])
        self._special_tokens = {
            name: str(token) for name, token in tokenizer.special_tokens_map.items()
        }
        self._tokenizer = tokenizer
        self._own = own
        self._ends: OrderedDict[str | None, Ends] = OrderedDict()
        self._write_tools: OrderedDict[AdapterSource | None, bool] = OrderedDict()
        self._apart = SubprocessRenderer(seconds)

    async def render(
        self, source: AdapterSource | None, messages: Conversation, tools: Tools | None = None
    ) -> str:
        """Return the text of a conversation, with the opening of the next answer.

        Raises RequestError, also where the template leaves `tools` out, AdapterError or Overloaded.
        """
        text = await self._write(source, messages, opens=True, tools=tools)
        if tools and source not in self._write_tools:
            if text == await self._write(source, messages, opens=True):
                whose = "the base model" if source is None else f"'{source.ref}'"
                raise RequestError(
                    f"the chat template of {whose} writes no tools; leave 'tools' out, or serve an "
                    "adapter that was trained with tools"
                )
            self._write_tools[source] = True
            while len(self._write_tools) > _REMEMBERED:
                self._write_tools.popitem(last=False)
        return text

    async def ends(self, source: AdapterSource | None) -> Ends:
        """Returns what the template ends an answer with; raises AdapterError or Overloaded."""
        own = None if source is None else (await self._own.of(source)).template
        # A version never changes: neither does what its template writes.
        key = source.ref if source is not None and own not in (None, self._base) else None
        if key not in self._ends:
            texts = [await self._probed(source, list(probe)) for probe in PROBES]
            self._ends[key] = turn_ends(texts, self._tokenizer)
            while len(self._ends) > _REMEMBERED:
                self._ends.popitem(last=False)
        return self._ends[key]

    def close(self) -> None:
        self._apart.close()

    async def _probed(self, source: AdapterSource | None, probe: Conversation) -> str:
        """Returns what the template makes of `probe`; an empty text where it refuses it."""
        try:
            return await self._write(source, probe, opens=False)
        except RequestError:
            return ""

    async def _write(
        self,
        source: AdapterSource | None,
        messages: Conversation,
        *,
        opens: bool,
        tools: Tools | None = None,
    ) -> str:
        own = None if source is None else (await self._own.of(source)).template
        template = own or self._base
        if template is None:
            where = "the base model has" if source is None else f"'{source.ref}' and its base have"
            raise RequestError(
                f"{where} no chat template; use /v1/completions, or publish an adapter that "
                "brings one (chat_template.jinja)"
            )
        tokens = self._special_tokens
        if template != self._base:
            assert source is not None
            return await self._apart.render(
                source.ref, template, messages, tokens, opens=opens, tools=tools
            )
        if tools:  # of several templates, one may be for tools
            template = self._base_for_tools or template
        try:
            return await asyncio.to_thread(
                render, template, messages, tokens, opens=opens, tools=tools
            )
        except Exception as error:  # whatever a template raises is about these messages
            raise _refusal("the base model", f"{type(error).__name__}: {error}") from error


class SubprocessRenderer:
    """Renders in another process, one template at a time, each in `seconds` of processor time.

    A template that ran into a limit is refused for a while without being tried. One whose renderer
    was ended by something else, or got no processor for too long, is not.
    """

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        patience: float = _PATIENCE,
    ) -> None:
        self._seconds, self._clock = seconds, clock
        self._patience = patience * max(1.0, seconds)
        # Its own thread: requests that need no such template never wait behind one.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="templates")
        self._waiting = 0
        self._numbers = itertools.count(1)
        self._refused: OrderedDict[str, float] = OrderedDict()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[Any, Any] | None = None

    async def render(
        self,
        ref: str,
        template: str,
        messages: Conversation,
        special_tokens: dict[str, str],
        *,
        opens: bool = True,
        tools: Tools | None = None,
    ) -> str:
        """Returns the conversation as `template` writes it.

        With `opens`, the opening of the next answer follows.

        Raises RequestError, AdapterError or Overloaded.
        """
        self._check(ref)
        if self._waiting >= _MAX_WAITING:
            raise Overloaded(f"{self._waiting} chat templates wait to be rendered; try again soon")
        job = {
            "template": template,
            "messages": messages,
            "special_tokens": special_tokens,
            "opens": opens,
            "tools": tools,
            "seconds": self._seconds,
        }
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._executor, self._ask, ref, job)
        finally:
            self._waiting -= 1
        if answer.get("error") == KILLED:
            self._refused[ref] = self._clock() + _REFUSED_SECONDS
            self._refused.move_to_end(ref)
            while len(self._refused) > _REMEMBERED:
                self._refused.popitem(last=False)
            raise _too_much(ref)
        if "error" in answer:
            raise _refusal(f"adapter '{ref}'", answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        """Ends what is being rendered too."""
        if (process := self._process) is not None:
            _kill(process)
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._end()

    def _check(self, ref: str) -> None:
        """Raises AdapterError for a template that is refused now."""
        if self._refused.get(ref, 0.0) > self._clock():
            raise _too_much(ref)

    def _ask(self, ref: str, job: dict[str, Any]) -> dict[str, Any]:
        self._check(ref)  # again: this has waited for its turn
        answer: dict[str, Any] = {}
        try:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            with _ended_after(self._patience, process):
                number = next(self._numbers)
                process.stdin.write(json.dumps({**job, "number": number}).encode() + b"\n")
                process.stdin.flush()
                while answer.get("number") != number:
                    answer = json.loads(process.stdout.readline())
        except (OSError, ValueError) as error:  # it is gone, or died in the middle of its answer
            self._end()
            raise _lost() from error
        if answer.get("error") == LOST:
            raise _lost()
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process, started; raises OSError or ValueError where it doesn't start."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rayfin.serving.api.template_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # so that it ends with the renderer that it has forked
            )
            self._stop = weakref.finalize(self, _end, self._process)
            assert self._process.stdout is not None
            with _ended_after(_START_SECONDS, self._process):
                json.loads(self._process.stdout.readline())
        return self._process

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def _base_template(tokenizer: PreTrainedTokenizerFast, tools: Tools | None = None) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError:  # several, and none of them the default
        return None


def _too_much(ref: str) -> AdapterError:
    return AdapterError(
        f"adapter '{ref}': its chat template takes too much time or memory; "
        "publish it with another, or use /v1/completions"
    )


def _lost() -> Overloaded:
    log.warning("the process that renders adapters' own chat templates has ended or stands still")
    return Overloaded(
        "the process that renders this adapter's chat template has ended, or gets no processor; "
        "send the request again"
    )


def _refusal(whose: str, reason: str) -> RequestError:
    gist = reason.partition("\n")[0][:200]
    return RequestError(f"the chat template of {whose} can't write these messages ({gist})")


def _environment() -> dict[str, str]:
    """Return what Python needs to start as it did here, and none of this process's secrets."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def _ended_after(seconds: float, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kills the process if the block takes longer."""
    timer = threading.Timer(seconds, _kill, (process,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(OSError):  # what was left to write has no reader
            stream.close()
    process.wait()
