"""`rayfin adapters add`: an adapter that was trained elsewhere, checked and published."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayfin.cli.parser import print_json
from rayfin.cli.settings import ShowServeSettings, add_settings, split_settings
from rayfin.redaction import printable

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion
    from rayfin.config import ServeConfig
    from rayfin.serving.add_adapter import AddedAdapter


def register(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb `add`; it sets `handler`, which returns the exit code."""
    summary = "check an adapter from elsewhere, copy it and publish it"
    parser = verbs.add_parser(
        "add",
        help=summary,
        description=f"{summary.capitalize()}. Its base model must be here, or on the hub: the "
        "adapter is held against that, but no weights of the base are loaded.",
    )
    parser.add_argument(
        "source",
        metavar="DIR|ZIP|HUB-ID",
        help="a directory that PEFT wrote, a ZIP file of one, or OWNER/NAME on the hub",
    )
    parser.add_argument("name", metavar="NAME", help="publish it as the next version of NAME")
    add_settings(parser, ShowServeSettings)
    parser.add_argument("--alias", help="an alias to point at it, beside latest")
    parser.add_argument(
        "--base-is-right",
        action="store_true",
        help="you answer for the base, model.name or the one the adapter names, where that can't "
        "be told from the files",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.epilog = f"Example: {parser.prog} ./lora support model.name=./base storage=./runs"
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0: it is in the registry. Raises UsageErrors for what can't be served."""
    from rayfin.adapters import Registry
    from rayfin.config import load_serve_config
    from rayfin.paths import Storage
    from rayfin.serving.add_adapter import add_adapter

    config = load_serve_config(*split_settings(args.settings)).anchored(Path.cwd())
    added = add_adapter(
        Registry(Storage.at(config.storage).adapters),
        args.source,
        args.name,
        config,
        alias=args.alias,
        base_is_right=args.base_is_right,
    )
    for note in added.notes:
        print(printable(note), file=sys.stderr, flush=True)
    if args.json:
        print_json(added.version.as_dict() | {"is_new": added.is_new}, indent=2)
        return 0
    _print(added)
    if added.version.peft_type != "FULL":
        print(printable(f"Talk to it: {_chat(added.version, added.config, args.settings)}"))
    return 0


def _print(added: AddedAdapter) -> None:
    version = added.version
    aliases = ", ".join(version.aliases)
    state = "is published" if added.is_new else "was published before"
    print(printable(f"{version.ref} {state} ({version.peft_type}; {aliases})"))
    print(printable(f"  base model  {version.base_model or version.path}"))
    print(printable(f"  path        {version.path}"))


def _chat(version: AdapterVersion, config: ServeConfig, given: Sequence[str]) -> str:
    """Returns a command that talks to the adapter, by the settings with which it was checked."""
    from rayfin.models import max_positions

    file, settings = split_settings(given)
    # The other sections are no business of a chat, and may hold secrets.
    kept = [setting for setting in settings if setting.startswith(("model", "engine"))]
    positions = max_positions(config.model)
    if positions is not None and config.engine.max_length > positions:
        kept.append(f"engine.max_length={positions}")
    start = ["rayfin", "chat", *([str(file)] if file is not None else [])]
    return shlex.join([*start, "--use", version.name, *kept, f"storage={config.storage}"])
