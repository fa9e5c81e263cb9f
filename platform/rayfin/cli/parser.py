"""The argument parser that all verbs share: its errors are one line, as all of rayfin's are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rayfin.errors import RayfinError


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
    print(f"rayfin: {' '.join(str(error).split())}", file=sys.stderr)
