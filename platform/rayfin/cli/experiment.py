"""What `sweep` and `train` share: their arguments, exit codes, and lines for people."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rayfin.cli.parser import print_error
from rayfin.cli.settings import add_settings, split_settings
from rayfin.metrics import BASE, score_names

if TYPE_CHECKING:
    from rayfin.config import Config
    from rayfin.history import TrialRecord
    from rayfin.library.results import SweepResult, TrainResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--rerun", action="store_true", help="train also what the history holds as finished"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(defaults=None)
    if parser.epilog is None:
        parser.epilog = (
            f"Example: {parser.prog} data.path=my.jsonl method.r=16 publish.name=mine. "
            f"All settings: {parser.prog} --settings. "
            "Exit codes: 0 done; 1 nothing was trained to its end; 2 a setting or place is wrong; "
            "3 trained, and publishing it or the report's sample answers failed; 130 interrupted."
        )


INCOMPLETE = 3
"""The exit code where what was trained is whole and recorded, and a step after it failed."""


def configuration(args: argparse.Namespace) -> Config:
    """Return the configuration that a command names; raises ConfigError for what can't be meant.

    Settings win over its file. A script has a configuration of its own in the file's place.
    """
    from rayfin.config import load_config

    file, settings = split_settings(args.settings)
    return load_config(file or args.defaults, settings)


def print_failed(result: SweepResult | TrainResult) -> None:
    """Print what failed after the training, each as a line on standard error."""
    for line in result.failed:
        print_error(line)


def comparison(row: TrialRecord) -> list[tuple[str, float, float]]:
    """Return (metric, base model's, trained model's) for every metric that both have."""
    return [
        (name, row.metrics[BASE + name], row.metrics[name])
        for name in score_names()
        if name in row.metrics and BASE + name in row.metrics
    ]


def comparison_lines(row: TrialRecord) -> list[str]:
    """Return the metrics of the base model and of the adapter as aligned lines."""
    return [f"  {name:15} {base:9.4f} -> {ours:9.4f}" for name, base, ours in comparison(row)]
