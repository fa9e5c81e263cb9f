"""`rayfin data dedupe` and `rayfin data leaks`: rows that are equal or similar to others."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rayfin.cli.data_arguments import add_data, add_output, configuration, print_summary
from rayfin.cli.parser import print_json

_PARTS = ("whole", "prompt", "answer")


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the two verbs to `rayfin data`."""
    summary = "leave out rows that are equal or similar to an earlier one"
    dedupe = verbs.add_parser("dedupe", help=summary, description=summary.capitalize())
    add_data(dedupe)
    add_output(dedupe, "FILE", "a new .jsonl file")
    _add_comparison(dedupe, "whole")
    dedupe.epilog = f"Example: {dedupe.prog} my.jsonl --output unique.jsonl --threshold 0.9"
    dedupe.set_defaults(handler=dedupe_data)

    summary = "find rows to train on that are equal or similar to rows evaluated on"
    leaks = verbs.add_parser("leaks", help=summary, description=summary.capitalize())
    add_data(leaks)
    add_output(leaks, "FILE", "a new .jsonl file for the other rows to train on", needed=False)
    _add_comparison(leaks, "prompt, or whole where rows are plain texts")
    leaks.epilog = (
        f"Example: {leaks.prog} train.jsonl data.eval_path=test.jsonl. The exit code is 1 where "
        "there are leaks, unless --output wrote a file without them."
    )
    leaks.set_defaults(handler=find_leaks)


def _add_comparison(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="similarity from which rows are similar, 0.5 to 1 (0.8, and 0.95 for embeddings); "
        "1: equal rows alone",
    )
    parser.add_argument(
        "--embedding-model",
        metavar="NAME",
        help="a directory or hub id of a model by whose embeddings' cosine similarity rows are "
        "compared, rather than by the Jaccard similarity of their characters",
    )
    parser.add_argument("--part", choices=_PARTS, help=f"the part that is compared ({default})")


def dedupe_data(args: argparse.Namespace) -> int:
    """`rayfin data dedupe`"""
    from rayfin.data_tools.duplicates import dedupe_data
    from rayfin.data_tools.reports import report_beside, reported_rows

    config = configuration(args.settings)
    how = {"threshold": args.threshold, "embedding_model": args.embedding_model}
    report = dedupe_data(config, args.output, part=args.part or "whole", **how)
    file = report_beside(args.output)
    if args.json:
        print_json(json.loads(file.read_bytes()))
        return 0
    said = (
        f"{args.output}: {report['written']} of {report['rows']} rows; left out: "
        f"{report['equal']} equal, {report['similar']} similar, {report['unusable']} that can't be "
        "used"
    )
    lost = report["rows"] - report["written"]
    rest = f"{file} has all that was left out"
    print_summary(said, report["notes"], reported_rows(file), lost, rest)
    return 0


def find_leaks(args: argparse.Namespace) -> int:
    """`rayfin data leaks`"""
    from rayfin.data_tools import leaks
    from rayfin.data_tools.reports import report_beside

    config = configuration(args.settings)
    with tempfile.TemporaryDirectory() as folder:
        file = report_beside(args.output) if args.output else Path(folder) / "report.json"
        how = {"threshold": args.threshold, "embedding_model": args.embedding_model}
        report = leaks.find_leaks(config, file, args.output, part=args.part, **how)
        if args.json:
            print_json(json.loads(file.read_bytes()))
        else:
            _print_leaks(args.output, report, file)
    found: int = report["equal"] + report["similar"]
    return 1 if found and args.output is None else 0


def _print_leaks(output: Path | None, report: dict[str, Any], file: Path) -> None:
    from rayfin.data_tools.reports import reported_rows

    found = report["equal"] + report["similar"]
    evaluated = f"{report['eval_rows_in_train']} of the {report['eval_rows']} rows evaluated on"
    said = f"{report['path']}: {found} of {report['rows']} rows are leaks"
    if found:
        said += f" ({report['equal']} equal, {report['similar']} similar), from {evaluated}"
    if output:
        said += f"; {output}: {report['written']} rows"
    rest = f"{file} has all that was left out" if output else "--json lists all"
    notes, lost, what = report["notes"], reported_rows(file), "left out" if output else "leak"
    if output:
        found += report["unusable"]
    else:
        lost = (each for each in lost if "evaluated" in each)
        if report["unusable"]:
            notes = [*notes, f"{report['unusable']} of the rows can't be used, and aren't compared"]
    print_summary(said, notes, lost, found, rest, what=what)
