"""`rayfin sweep`: run trials, keep the best, publish it, and write a report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayfin.cli import experiment
from rayfin.cli.parser import print_json

if TYPE_CHECKING:
    from rayfin.config import Config
    from rayfin.library.results import SweepResult


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `sweep`."""
    summary = "run a sweep, publish its best trial, and write a report"
    add_arguments(subparsers.add_parser("sweep", help=summary, description=summary.capitalize()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a sweep, for the command and for scripts."""
    experiment.add_arguments(parser)
    parser.add_argument(
        "--resume", action="store_true", help="carry on with this sweep where it was interrupted"
    )
    parser.add_argument("--address", help="a running Ray cluster (default: $RAY_ADDRESS, or local)")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Run a sweep and print its result; returns the exit code.

    0: all is done; 1: no trial finished; 3: the trials and the report are there, and publishing or
    the sample answers failed; 130: interrupted.
    """
    from rayfin.library.trials import sweep

    config = experiment.configuration(args)
    return show(sweep(config, **options(args, config)), as_json=args.json)


def options(args: argparse.Namespace, config: Config) -> Mapping[str, Any]:
    """Return the arguments of `rayfin.sweep` that stand for a command's options."""
    return {
        "resume": args.resume,
        "rerun": args.rerun,
        "address": args.address,
        "notes": _without_effect(args.settings, config),
    }


def _without_effect(settings: Sequence[str], config: Config) -> list[str]:
    """Name what the command sets and the sweep has values of its own for."""
    pairs = [setting.partition("=")[::2] for setting in settings]
    return [
        f"{key}={value} is no trial's: the sweep has values of its own for it; "
        f"sweep.parameters.{key}=[{value}] is this one alone"
        for key, value in pairs
        if key in config.sweep.parameters
    ]


def show(result: SweepResult, *, as_json: bool) -> int:
    """Print a sweep's result, for people or machines; returns the command's exit code."""
    if as_json:
        print_json(result.as_dict())
    else:
        _print(result)
    experiment.print_failed(result)
    if result.interrupted:
        return 130
    if result.best is None:
        return 1
    return experiment.INCOMPLETE if result.failed else 0


def _print(result: SweepResult) -> None:
    from rich.console import Console
    from rich.markup import escape

    from rayfin.tables import output
    from rayfin.tuning.progress import settings, trials_table

    console = Console(highlight=False, soft_wrap=True)
    console.print()
    output().print(trials_table(result.config, result.trials))
    console.print()
    for note in result.notes:
        console.print(note, markup=False)
    best, adapter = result.best, result.published
    if best is not None:
        chosen = settings(result.config, best) or best.trial_id
        console.print(f"[bold]Best trial[/bold] {escape(chosen)}, base model -> adapter:")
        for line in experiment.comparison_lines(best):
            console.print(line)
        console.print()
    # A path may have brackets, which would be taken for markup.
    console.print(f"  report   {result.report}", markup=False)
    console.print(f"  history  {result.history}", markup=False)
    if adapter is not None:
        console.print(f"  adapter  {adapter.ref}  {adapter.path}", markup=False)
    if result.interrupted:
        console.print("\nInterrupted.")
    console.print()
    console.print(result.verdict.text, markup=False)
