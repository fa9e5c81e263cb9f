"""`rayfin train`: one run, recorded and published like a sweep's best trial."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rayfin.cli import experiment

if TYPE_CHECKING:
    from rayfin.config import Config
    from rayfin.library.results import TrainResult


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "train one adapter and publish it; an interrupted run is carried on"
    add_arguments(subparsers.add_parser("train", help=summary, description=summary.capitalize()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    experiment.add_arguments(parser)
    parser.add_argument("--address", help="a running Ray cluster, for scaling.num_workers above 1")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Train and print the result; returns the exit code.

    0: trained, or already in the history; 1: failed; 3: trained, and not published.
    """
    from rayfin.library.trials import train

    config = experiment.configuration(args)
    return show(train(config, **options(args, config)), as_json=args.json)


def options(args: argparse.Namespace, _: Config) -> Mapping[str, Any]:
    """Return the arguments of `rayfin.train` that stand for a command's options."""
    return {"rerun": args.rerun, "address": args.address}


def show(result: TrainResult, *, as_json: bool) -> int:
    """Print a training's result, for people or machines; returns the command's exit code."""
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        _print(result)
    experiment.print_failed(result)
    if result.trial.status != "finished":
        return 1
    return experiment.INCOMPLETE if result.failed else 0


def _print(result: TrainResult) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    row, adapter = result.trial, result.published
    if row.status != "finished":
        console.print(f"[red]{row.status}[/red]: {escape(row.error or '')}")
    else:
        console.print("[bold]Trained[/bold], base model -> adapter:")
        for line in experiment.comparison_lines(row):
            console.print(line)
    # A path may have brackets, which would be taken for markup.
    console.print(f"  trial    {row.trial_id}  {row.directory}", markup=False)
    console.print(f"  history  {result.history}", markup=False)
    if adapter is not None:
        console.print(f"  adapter  {adapter.ref}  {adapter.path}", markup=False)
