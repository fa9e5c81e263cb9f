"""`rayfin train`: one run, recorded and published like a sweep's best trial."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from rayfin.cli import experiment
from rayfin.cli.parser import print_error
from rayfin.redaction import printable

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion
    from rayfin.cli.experiment import Workplace
    from rayfin.history import TrialRecord


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "train one adapter and publish it; an interrupted run is carried on"
    add_arguments(subparsers.add_parser("train", help=summary, description=summary.capitalize()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    experiment.add_arguments(parser)
    parser.add_argument("--address", help="a running Ray cluster, for scaling.num_workers above 1")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0: trained, or already in the history; 1: failed; 3: trained, and not published."""
    from rayfin.tuning.single import train_once

    place = experiment.Workplace.open(args)
    with place.history:
        row = train_once(
            place.config,
            history=place.history,
            storage=place.storage,
            rerun=args.rerun,
            address=args.address,
            # Standard output is the result's, which machines read with --json.
            show=lambda line: print(printable(line), file=sys.stderr, flush=True),
        )
    failed = experiment.Failures()
    adapter: AdapterVersion | None = None
    if row.status == "finished":
        with failed.noting(*experiment.unpublished(place.config, row, "")):
            adapter = place.publish(row)
    if args.json:
        published = adapter.as_dict() if adapter else None
        told = {"trial": row.model_dump(mode="json"), "adapter": published, "failed": failed.lines}
        print(json.dumps(told))
    else:
        _print(place, row, adapter)
    for line in failed.lines:
        print_error(line)
    if row.status != "finished":
        return 1
    return experiment.INCOMPLETE if failed.lines else 0


def _print(place: Workplace, row: TrialRecord, adapter: AdapterVersion | None) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    if row.status != "finished":
        console.print(f"[red]{row.status}[/red]: {escape(row.error or '')}")
    else:
        console.print("[bold]Trained[/bold], base model -> adapter:")
        for line in experiment.comparison_lines(row):
            console.print(line)
    # A path may have brackets, which would be taken for markup.
    console.print(f"  trial    {row.trial_id}  {row.directory}", markup=False)
    console.print(f"  history  {place.history.shown_url}", markup=False)
    if adapter is not None:
        console.print(f"  adapter  {adapter.ref}  {adapter.path}", markup=False)
