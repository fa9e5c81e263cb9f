"""The argument parser that all verbs share: its errors are one line, as all of rayfin's are."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any, NoReturn

from rayfin.errors import RayfinError

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class Parser(argparse.ArgumentParser):
    """argparse, with one-line errors that point to --help, and settings between the options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # An abbreviated option would change its meaning with the next one that is added.
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}; see {self.prog} --help")
        raise SystemExit(2)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """As argparse's, but takes `--resume x.y=1` too: it stops at the first run of settings."""
        parsed, rest = self.parse_known_args(args, namespace)
        if any(text.startswith("-") for text in rest) or (rest and not hasattr(parsed, "settings")):
            unknown = next((text for text in rest if text.startswith("-")), rest[0])
            self.prog = f"{self.prog} {getattr(parsed, 'command', '')}".strip()
            self.error(f"'{unknown}' is no option of this command")
        if rest:
            parsed.settings = [*parsed.settings, *rest]
        return parsed


def print_error(error: RayfinError | str) -> None:
    """One line on stderr, whatever a path or a library put into the message."""
    print(f"rayfin: {printable(' '.join(str(error).split()))}", file=sys.stderr)


def printable(text: str) -> str:
    """`text` without what a terminal takes for a command: a model, or a file, may say anything."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _commands(c) else c for c in text)


def _commands(character: str) -> bool:
    """Control characters but line ends and tabs, half surrogate pairs, changes of direction."""
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS
