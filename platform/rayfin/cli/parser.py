"""The argument parser that all verbs share: its errors are one line, as all of rayfin's are."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rayfin.errors import RayfinError, did_you_mean
from rayfin.redaction import is_command, printable, redact

_PLACE = re.compile(r"(storage|history)=")


class Parser(argparse.ArgumentParser):
    """argparse, with one-line errors that point to --help, and settings between the options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # An abbreviated option would change its meaning with the next one that is added.
        super().__init__(*args, **{"allow_abbrev": False, **options})
        # The innermost parser's default wins: it is the one of the verb that was given.
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; see {self.prog} --help")
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own message lists all choices in Python's notation, and suggests none."""
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        near = did_you_mean(str(value), known)
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"'{value}' is no command of {self.prog}{near}; it has: {', '.join(known)}")
        name = "/".join(action.option_strings) or action.metavar or action.dest
        self.error(f"{name}: '{value}' is not allowed{near}; it should be {' or '.join(known)}")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Parses as argparse does, with two liberties.

        `--resume x.y=1` is taken too: argparse stops at the first run of settings. And
        `storage=DIR` and `history=URL` may stand before a verb's own arguments.
        """
        words = list(sys.argv[1:] if args is None else args)
        places = [word for word in words if _PLACE.match(word)]
        parsed, rest = self.parse_known_args([w for w in words if w not in places], namespace)
        if unknown := next((word for word in rest if word.startswith("-")), None):
            following = words[words.index(unknown) + 1 :]
            _no_option(parsed.parser, unknown, next(iter(following), ""))
        beyond = [*rest, *places]
        if beyond and not hasattr(parsed, "settings"):
            parsed.parser.error(f"'{beyond[0]}' is no argument of {parsed.parser.prog}")
        if beyond:
            parsed.settings = [*parsed.settings, *beyond]
        return parsed


def _no_option(parser: argparse.ArgumentParser, word: str, following: str) -> NoReturn:
    """Ends with a word on what was meant: another option, or a setting written as an option."""
    option, equals, value = word.partition("=")
    if not equals and not following.startswith("-"):
        value = following
    options = [name for action in parser._actions for name in action.option_strings]
    settings = next((a for a in parser._actions if a.dest == "settings"), None)
    name = option.lstrip("-").replace("-", "_")
    hint = did_you_mean(option, options)
    if settings is not None:
        names = settings.completer.names()  # type: ignore[attr-defined]
        if found := [known for known in names if name in (known, known.rpartition(".")[2])]:
            hint = f"; it is a setting, write {found[0]}={value or 'VALUE'}"
    parser.error(f"'{word}' is no option of {parser.prog}{hint}")


def print_error(error: RayfinError | str) -> None:
    """One line on stderr, whatever a path or a library put into the message."""
    print(f"rayfin: {printable(redact(' '.join(str(error).split())))}", file=sys.stderr)


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Prints `value` as JSON, with an escape for every character that would steer a terminal."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    print("".join(f"\\u{ord(c):04x}" if is_command(c) else c for c in text))
