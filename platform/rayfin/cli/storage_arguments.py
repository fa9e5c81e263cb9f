"""The arguments by which verbs find results: `[config.yaml] [storage=DIR] [history=URL]`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rayfin.cli.completion import Kind, SettingsCompleter
from rayfin.cli.settings import split_settings
from rayfin.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from rayfin.config import Config


def add_storage_arguments(parser: argparse.ArgumentParser, kind: Kind) -> None:
    """Add the arguments `[config.yaml] [storage=DIR]`, and `[history=URL]` where `kind` has it."""
    both = kind == "storage and history"
    settings = parser.add_argument(
        "settings",
        nargs="*",
        metavar="config.yaml | storage=DIR" + " | history=URL" * both,
        help="where results lie, as in any configuration: storage=DIR (./runs)"
        + ", history=URL (sqlite:///PATH or postgresql+psycopg://…)" * both,
    )
    settings.completer = SettingsCompleter(kind)  # type: ignore[attr-defined]
    parser.set_defaults(storage_settings=("storage", "history") if both else ("storage",))


def storage_config(args: argparse.Namespace) -> Config:
    """Return the configuration, of which the verb needs only where results lie.

    A file may have all the rest. Raises UsageErrors, also for a setting that the verb wouldn't use.
    """
    from rayfin.config import load_config, parse_overrides

    file, settings = split_settings(args.settings)
    known = args.storage_settings
    for key in parse_overrides(settings):
        if key not in known:
            raise UsageError(
                f"'{key}' is no setting that {args.parser.prog} uses"
                f"{did_you_mean(key, known)}; it takes {' and '.join(known)}"
            )
    return load_config(file, settings)
