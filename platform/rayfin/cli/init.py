"""`rayfin init`: a commented configuration to start from, made from one's own data."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from rayfin.cli.settings import add_settings, split_settings
from rayfin.errors import StorageError, UsageError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `init`."""
    summary = "write a commented configuration for a sweep over your own data"
    parser = subparsers.add_parser("init", help=summary, description=summary.capitalize())
    add_settings(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("my-sweep.yaml"),
        metavar="FILE",
        help="what to write (my-sweep.yaml); a file that is there is kept",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.epilog = f"Example: {parser.prog} data.path=my.jsonl. What the settings name is kept"
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0: the file is written. Nothing is trained."""
    from rayfin.advisor.draft import draft
    from rayfin.config import load_config
    from rayfin.library.experiment import adapter_name, read_data
    from rayfin.library.messages import notes_to
    from rayfin.paths import write_text

    file, settings = split_settings(args.settings)
    config = load_config(file, settings)
    if "data" not in config.model_fields_set or not (
        {"path", "sources"} & config.data.model_fields_set
    ):
        raise UsageError("init looks at your data; name them with data.path=FILE")
    if args.output.exists():
        raise StorageError(f"'{args.output}' exists; give another with --output FILE")
    text = draft(config, read_data(config, notes_to(True)), name=adapter_name(config))
    try:
        write_text(args.output, text)
    except OSError as error:
        raise StorageError(
            f"--output: '{args.output}' can't be written ({error.strerror or error}); give another"
        ) from error
    run_it = f"rayfin sweep {shlex.quote(str(args.output))}"
    if args.json:
        print(json.dumps({"path": str(args.output), "command": run_it}))
    else:
        print(f"{args.output} is written; look at it, then run: {run_it}")
    return 0
