"""`rayfin data clean`: mend the texts of rows, and leave out those that can't be trained on."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rayfin.cli.data_arguments import add_data, add_output, configuration, print_summary
from rayfin.cli.parser import print_json
from rayfin.data_tools.text_cleaning import CHANGES

# What runs at `rayfin --help` stays light: heavy imports stand inside the functions.
if TYPE_CHECKING:
    from pathlib import Path


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to `rayfin data`."""
    summary = "mend white space and characters, and leave out broken, empty, short and long rows"
    clean = verbs.add_parser("clean", help=summary, description=summary.capitalize())
    add_data(clean)
    add_output(clean, "FILE", "a new .jsonl file")
    clean.add_argument(
        "--min-chars",
        type=int,
        default=1,
        metavar="N",
        help="fewest characters of each learned answer, or of a plain text (1)",
    )
    clean.add_argument(
        "--max-chars",
        type=int,
        metavar="N",
        help="most characters of each learned answer, or of a plain text (no limit)",
    )
    clean.add_argument(
        "--keep",
        action="append",
        default=[],
        choices=CHANGES,
        metavar="KIND",
        help=f"leave this as it is, may be given again: {', '.join(CHANGES)}",
    )
    clean.add_argument(
        "--unicode-form", choices=("NFC", "NFKC"), help="normalise texts (left as they are)"
    )
    clean.epilog = f"Example: {clean.prog} my.jsonl --output clean.jsonl --min-chars 2"
    clean.set_defaults(handler=clean_data)


def clean_data(args: argparse.Namespace) -> int:
    """`rayfin data clean`"""
    from rayfin.data_tools.cleaning import CleaningRules, clean_data, left_out_beside
    from rayfin.data_tools.reports import report_beside, reported_rows

    rules = CleaningRules(args.min_chars, args.max_chars, tuple(args.keep), args.unicode_form)
    report = clean_data(configuration(args.settings), args.output, rules)
    file = report_beside(args.output)
    if args.json:
        print_json(json.loads(file.read_bytes()))
        return 0
    rest = f"{file} has all reasons"
    if report["left_out_file"]:
        rest = f"{left_out_beside(args.output)} has the rows left out, {file} all reasons"
    lost = report["left_out_rows"]
    notes = [*_changes(report), *report["notes"]]
    print_summary(_summary(args.output, report), notes, reported_rows(file), lost, rest)
    return 0


def _summary(output: Path, report: dict[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["reasons"].items())
    said = f"{output}: {report['written']} of {report['rows']} rows; "
    return said + (f"left out: {kinds}" if kinds else "nothing left out")


def _changes(report: dict[str, Any]) -> list[str]:
    """Return a line on what was changed."""
    from rayfin.data.splits import count_rows

    kinds = [f"{kind} in {found['rows']}" for kind, found in report["changes"].items()]
    return [f"changed: {count_rows(report['changed'])}{': ' if kinds else ''}{', '.join(kinds)}"]
