"""`rayfin doctor`: what is installed, which devices, what would be used, and what is wrong."""

from __future__ import annotations

import argparse
from typing import Any

from rayfin.cli.parser import print_json
from rayfin.cli.storage_arguments import add_storage_arguments, storage_config


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `doctor`, whose `handler` returns 0 where nothing is wrong and 1 where something is."""
    summary = "what is installed, which devices, what would be used, what is wrong"
    parser = subparsers.add_parser("doctor", help=summary, description=summary.capitalize())
    add_storage_arguments(parser, "storage and history")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.set_defaults(handler=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from rayfin.cli.checks import examine

    storage, history = "./runs", None
    if args.settings:  # else not even the configuration's own libraries need be there
        config = storage_config(args)
        storage, history = config.storage, config.history
    sections, problems = examine(storage, history)
    if args.json or not _print(sections, problems):
        print_json({**sections, "problems": problems}, indent=2)
    return 1 if problems else 0


def _print(sections: dict[str, dict[str, Any]], problems: list[str]) -> bool:
    """Prints the report for people; False where rich isn't there to do it."""
    try:
        from rich.table import Table
        from rich.text import Text

        from rayfin.tables import output
    except ImportError:
        return False
    console = output()
    width = max(len(_label(key)) for section in sections.values() for key in section)
    for name, section in sections.items():
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=width + 2)
        table.add_column(overflow="fold")
        for key, value in section.items():
            # Text, so that brackets in a path are not taken for markup.
            table.add_row(Text(f"  {_label(key)}"), Text(_shown(name, key, value)))
        console.print(Text(name, style="bold"))
        console.print(table)
    if not problems:
        console.print(Text("nothing is wrong", style="bold green"))
        return True
    console.print(Text("PROBLEMS", style="bold red"))
    for problem in problems:
        console.print(Text(f"  - {problem}"), soft_wrap=True)
    return True


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _shown(section: str, key: str, value: Any) -> str:
    from rayfin.cli.checks import OPTIONAL

    if value is None and section == "optional":
        return f"not installed (pip install '{OPTIONAL[key]}')"
    if value is None:
        return "not installed" if section == "versions" else "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes"):
        return f"{value / 1e9:,.1f} GB"
    if isinstance(value, list):
        return ", ".join(_gpu(one) for one in value) or "none"
    return str(value)


def _gpu(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['name']} ({gpu['free_bytes'] / 1e9:.1f} of {gpu['memory_bytes'] / 1e9:.1f} GB free)"
    )
