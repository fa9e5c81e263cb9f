"""A process that renders chat templates that nobody vouches for, within limits.

Reads jobs from standard input and answers on standard output, a line of JSON each, with the job's
number: what one conversation wrote is never taken for another's. A first line says that it has
started. The renderer is a child of this process, so that one that runs into a limit is replaced
without loading anything.
Started by `rayfin.serving.api.templates`.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

KILLED = "killed"
"""The answer for a renderer that ran into a limit."""
LOST = "lost"
"""The answer for one that somebody else has ended: the system, where it is short of memory."""

_TAKING = b"\xff" * 8
"""In the place of a job's number, while it is being read."""
_MEMORY = 256 * 2**20
_MAX_OUTPUT = 8 * 2**20


def render(
    template: str,
    messages: list[dict[str, Any]],
    special_tokens: dict[str, Any],
    *,
    opens: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Render a conversation by `template`; `opens` adds the opening of the next answer.

    transformers' own renderer, in its sandbox; raises whatever the template does.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[messages],
        tools=[*tools] if tools is not None else None,
        chat_template=template,
        add_generation_prompt=opens,
        **special_tokens,
    )
    texts, _ = rendered
    text = str(texts[0])
    text.encode()  # raises for half a surrogate pair, which is no text
    return text


def main() -> None:
    # Here, and not in the child: what is imported before the fork is there after it.
    import transformers.utils.chat_template_utils  # noqa: F401

    # The number of the job that the renderer is at, for whoever outlives it; 0: of none.
    at = mmap.mmap(-1, 8)
    _answer({"number": 0})
    while True:
        child = os.fork()
        if child == 0:
            _serve(at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:  # there are no more jobs
            return
        if at[:] == _TAKING:  # the job is lost: by this end its sender knows, and starts anew
            return
        if number := int.from_bytes(at[:], "little"):
            # No limit of ours ends a process by this signal.
            lost = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            _answer({"error": LOST if lost else KILLED, "number": number})


def _serve(at: mmap.mmap) -> None:
    _limit_memory()
    at[:] = bytes(8)
    while True:
        # One that is killed while it waits takes no job along: nothing is read before it is said.
        select.select([sys.stdin.buffer], [], [])
        at[:] = _TAKING
        if not (line := sys.stdin.buffer.readline()):
            return
        job = json.loads(line)
        at[:] = job["number"].to_bytes(8, "little")
        # Processor time, so that a busy machine refuses no template. The signal's default action
        # ends the process, even in the middle of one endless operation.
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])
        answer = _render(job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer({**answer, "number": job["number"]})
        at[:] = bytes(8)


def _render(job: dict[str, Any]) -> dict[str, str]:
    try:
        text = render(
            job["template"],
            job["messages"],
            job["special_tokens"],
            opens=job["opens"],
            tools=job["tools"],
        )
    except Exception as error:  # noqa: BLE001  # whatever a template raises is its answer
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    if len(text) > _MAX_OUTPUT:
        return {"error": f"it wrote {len(text)} characters; at most {_MAX_OUTPUT}"}
    return {"text": text}


def _limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    usage = Path("/proc/self/statm")
    if usage.exists():  # elsewhere than on Linux the processor's time is the only limit
        now = int(usage.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, now + _MEMORY))


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
