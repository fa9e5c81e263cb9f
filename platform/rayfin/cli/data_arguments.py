"""What the verbs of `rayfin data` share: the arguments, the configuration, the printed report."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.cli.completion import DataCompleter
from rayfin.cli.parser import print_json
from rayfin.cli.settings import add_settings
from rayfin.errors import UsageError

_LEFT_OUT_SHOWN = 5

# What runs at `rayfin --help` stays light: heavy imports stand inside the functions.
if TYPE_CHECKING:
    from rayfin.config import Config


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the argument DATA, and settings after it."""
    add_settings(parser)
    for action in parser._actions:
        if action.dest == "settings":
            action.completer = DataCompleter("experiment")  # type: ignore[attr-defined]
            action.metavar = "DATA | config.yaml | section.key=value"
            action.help = (
                "a file, directory or hub id (data.path) or a configuration file first, if any, "
                "and settings that win over it"
            )


def add_output(
    parser: argparse.ArgumentParser, what: str, meaning: str, *, needed: bool = True
) -> None:
    """Add --output, which may be `needed`, and --json."""
    parser.add_argument("--output", type=Path, required=needed, metavar=what, help=meaning)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def configuration(settings: list[str]) -> Config:
    """Return the configuration of DATA or a configuration file, and settings.

    Raises UsageError where nothing names the data.
    """
    from rayfin.config import load_config

    file: Path | None = None
    named: list[str] = []
    if settings and "=" not in settings[0]:
        if settings[0].lower().endswith((".yaml", ".yml")):
            file = Path(settings[0])
        else:
            named = [f"data.path={settings[0]}"]
        settings = settings[1:]
    config = load_config(file, [*named, *settings])
    if not {"path", "sources"} & config.data.model_fields_set:
        raise UsageError("nothing names the data; give a file, a directory or a hub id")
    return config


def print_report(args: argparse.Namespace, report: dict[str, Any], said: str, file: Path) -> None:
    """Print what was written, and what was left out, of which the report in `file` has all."""
    if args.json:
        print_json(report)
        return
    lost = report["left_out"]
    count = sum(each.get("rows", 1) for each in lost)
    print_summary(said, report["notes"], lost, count, f"{file} has all that was left out")


def print_summary(
    said: str,
    notes: Iterable[str],
    rows: Iterable[dict[str, Any]],
    count: int,
    rest: str,
    *,
    what: str = "left out",
) -> None:
    """Print what was done, notes, and the first of `count` rows that are `what`, with the reasons.

    `rest` says where all of them are.
    """
    from rich.text import Text

    from rayfin.redaction import printable
    from rayfin.tables import output

    console = output()
    console.print(Text(printable(said)))
    for note in notes:
        console.print(Text(printable(f"- {note.removeprefix('data: ')}")))
    shown = 0
    for each in islice(rows, _LEFT_OUT_SHOWN):
        shown += each.get("rows", 1)
        reason = f"- {what}: {each['file']}:{each['line']}: {each['reason']}"
        console.print(Text(printable(reason)))
    if count > shown:
        console.print(Text(f"- and {count - shown} more"))
    if count:
        console.print(Text(printable(rest)))
