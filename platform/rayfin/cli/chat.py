"""`rayfin chat`: a conversation in the terminal, with any adapter, switched in the middle of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rayfin.cli.parser import print_error
from rayfin.cli.settings import ShowServeSettings, add_settings, split_settings
from rayfin.errors import RayfinError, RequestError, UsageError, did_you_mean
from rayfin.redaction import printable

if TYPE_CHECKING:
    from rayfin.serving.client import Client
    from rayfin.serving.local_api import Endpoint

API_KEY = "RAYFIN_API_KEY"
"""Environment variable with the key of the deployment at --url."""

HELP = """\
  /use NAME         go on with NAME, NAME@VERSION, NAME@ALIAS or the base model
  /models           all names that answer here
  /system TEXT      a system message; without TEXT there is none
  /set KEY=VALUE    temperature, top_p, max_tokens, seed and others; without a
                    value it is the default again
  /reset            forget the conversation
  /help  /quit      Ctrl-C stops an answer, Ctrl-D ends the chat"""

_OPTIONS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "seed": int,
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "talk to an adapter in the terminal, and switch to another by /use"
    parser = subparsers.add_parser(
        "chat",
        help=summary,
        description=f"{summary.capitalize()}.\nWithout --url the model runs in this process.",
    )
    add_settings(parser, ShowServeSettings)
    parser.add_argument(
        "--use",
        metavar="NAME",
        help="who answers first; the base model if left out. Without model.name its base is loaded",
    )
    parser.add_argument(
        "--url", help=f"a running deployment; its key, if it asks for one, in {API_KEY}"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each answer")
    parser.epilog = f"Example: {parser.prog} --use support storage=./runs\n{HELP}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where input that was piped in had an error."""
    if args.url is not None and args.settings:
        raise UsageError(
            f"'{args.settings[0]}' is a setting of a model in this process, and --url names a "
            "deployment that has its own; leave one of them out"
        )
    from rayfin.serving.client import Client

    out = sys.stdout if args.json else None
    # Machines read the answers: prompts, /help and what libraries print go to standard error.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with aside, _endpoint(args) as endpoint, Client(endpoint) as client:
        return Chat(client, json_to=out, use=args.use).run()


@contextmanager
def _endpoint(args: argparse.Namespace) -> Iterator[Endpoint]:
    from rayfin.library.deployments import serve_configuration
    from rayfin.serving.local_api import Endpoint, local_api

    if args.url is not None:
        yield Endpoint(args.url, os.environ.get(API_KEY))
        return
    source, settings = split_settings(args.settings)
    config = serve_configuration(source, settings, use=args.use, own=False)
    print(f"Loading {config.model.name} ...", file=sys.stderr, flush=True)
    with local_api(config) as endpoint:
        yield endpoint


class Chat:
    """One conversation."""

    def __init__(self, client: Client, *, json_to: TextIO | None, use: str | None) -> None:
        """`json_to` gets a line for each answer; None: people read standard output."""
        self._client, self._json_to = client, json_to
        self._interactive = sys.stdin.isatty()
        names = client.models()
        if not names:
            raise RequestError(f"nothing that is served at {client.url} is for this key")
        self._model = names[0]
        self._messages: list[dict[str, str]] = []
        self._system: str | None = None
        self._options: dict[str, Any] = {}
        self._failed = False
        if self._interactive and json_to is None:
            adapters = ", ".join(name for name in names[1:] if "@" not in name) or "none yet"
            print(f"{printable(names[0])} at {client.url}; adapters: {printable(adapters)}.")
            print("/help lists commands.")
        if use is not None:
            self._use(use)

    def run(self) -> int:
        if self._interactive and self._json_to is None:  # it writes to the real standard output
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (editing and recall of lines, for input())
        while (line := self._read()) is not None:
            try:
                if not self._take(line.strip()):
                    break
            except RayfinError as error:
                self._failed = True
                print_error(error)
            except KeyboardInterrupt:  # while the server was asked for something else
                print()
        return 1 if self._failed and not self._interactive else 0

    def _read(self) -> str | None:
        """The next line; None at the end of the input."""
        try:
            line = input(f"{printable(self._model)}> " if self._interactive else "")
            # Bytes that are no UTF-8 come as halves of characters, which no request can hold.
            return line.encode("utf-8", "replace").decode("utf-8")
        except EOFError:
            if self._interactive:
                print()
            return None
        except UnicodeDecodeError:
            print_error("a line of the input is no UTF-8, and was left out")
            self._failed = True
            return ""
        except KeyboardInterrupt:
            print()
            return None

    def _take(self, line: str) -> bool:
        """Does what a line says; False to end."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line.startswith("/"):
            if line:
                self._ask(line)
        elif command == "/quit":
            return False
        elif command == "/use":
            try:
                self._use(rest)
            except RayfinError as error:
                raise RequestError(f"{error}; '{self._model}' goes on answering") from error
        elif command == "/models":
            print("\n".join(f"  {printable(name)}" for name in self._client.models()))
        elif command == "/system":
            self._system = rest or None
        elif command == "/set":
            self._set(rest)
        elif command == "/reset":
            self._messages.clear()
        elif command == "/help":
            print(HELP)
        else:
            known = ("/use", "/models", "/system", "/set", "/reset", "/help", "/quit")
            raise RequestError(f"'{command}' is no command{did_you_mean(command, known)}; /help")
        return True

    def _use(self, name: str) -> None:
        if not name:
            raise RequestError("/use needs a name; /models lists them")
        version = self._client.resolve(name)
        self._model = name
        if self._json_to is None:
            shown = name if name == version else f"{name} ({version})"
            print(f"now talking to {printable(shown)}", flush=True)

    def _set(self, text: str) -> None:
        name, equals, value = text.partition("=")
        name, value = name.strip(), value.strip()
        if name not in _OPTIONS or not equals:
            raise RequestError(
                f"/set '{text}': give one of {', '.join(_OPTIONS)} as KEY=VALUE"
                f"{did_you_mean(name, _OPTIONS)}"
            )
        if not value:
            self._options.pop(name, None)
            return
        try:
            number = _OPTIONS[name](value)
            if not math.isfinite(number):
                raise ValueError
            self._options[name] = number
        except (ValueError, OverflowError) as error:
            kind = "whole number" if _OPTIONS[name] is int else "number"
            raise RequestError(f"/set {name}: '{value}' is no {kind}") from error

    def _ask(self, question: str) -> None:
        asked = [*self._messages, {"role": "user", "content": question}]
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        reply = self._client.chat(self._model, [*system, *asked], self._options)
        try:
            for piece in reply:
                if self._json_to is None:
                    print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            reply.close()
            reply.finish_reason = "stopped"
        if self._json_to is not None:
            line = {"model": reply.model, "content": reply.text, "usage": reply.usage}
            text = json.dumps(line | {"finish_reason": reply.finish_reason})
            print(text, file=self._json_to, flush=True)
        else:
            tokens = reply.usage.get("completion_tokens")
            who = printable(reply.model) or self._model
            print(f"\n  -- {who}, {reply.finish_reason}" + f", {tokens} tokens" * bool(tokens))
        # Only now: a question that had no answer is none that was asked.
        if not reply.model:
            return
        self._messages = [*asked, {"role": "assistant", "content": reply.text}]
