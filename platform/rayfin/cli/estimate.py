"""`rayfin estimate`: what a configuration takes in memory, time and money, before it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from rayfin.cli.described import add_described, described
from rayfin.cli.settings import add_settings, split_settings

if TYPE_CHECKING:
    from rayfin.advisor.estimate import Estimate, Interval
    from rayfin.config import Config
    from rayfin.hardware import Hardware


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "memory, time and cost of a configuration before it runs"
    parser = subparsers.add_parser("estimate", help=summary, description=summary.capitalize())
    add_settings(parser)
    parser.add_argument(
        "--price-per-hour",
        type=float,
        metavar="X",
        help="what all that the run uses costs an hour, in any currency",
    )
    add_described(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.epilog = f"Example: {parser.prog} data.path=my.jsonl method.type=lora method.r=16"
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the estimate; returns exit code 0, whether the configuration fits or not."""
    from rayfin.config import load_config
    from rayfin.library.advice import estimate_on

    config = load_config(*split_settings(args.settings))
    found, hardware, facts = estimate_on(config, described(args), args.price_per_hour)
    if args.json:
        print(json.dumps({**found.as_dict(), "hardware": hardware.as_dict()}))
    else:
        _print(config, facts.name, found, hardware)
    return 0


def _print(config: Config, model: str, found: Estimate, hardware: Hardware) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rayfin.evaluation.quantities import show_seconds

    console = Console(highlight=False, soft_wrap=True)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for name, size in asdict(found.parts).items():
        table.add_row(f"  {name}", show_bytes(size))
    table.add_row("[bold]peak memory[/bold]", *_shown(found.memory, show_bytes), style="bold")
    whose = "  of the device" if found.strategy is None else "  of each worker's"
    table.add_row(whose, show_bytes(found.room), _VERDICTS[found.fits])
    table.add_row("[bold]training time[/bold]", *_shown(found.seconds, show_seconds))
    if found.cost is not None:
        table.add_row("[bold]cost[/bold]", *_shown(found.cost, "{:,.2f}".format))
    epochs = config.train.num_train_epochs
    length = (
        _counted(found.steps, "step")
        if epochs is None
        else f"{_counted(epochs, 'epoch')} ({_counted(found.steps, 'step')})"
    )
    what = f"{model}, {config.method.type}, {length}"
    # Text, so that brackets in a path are not taken for markup.
    console.print(Text(f"{what} on {hardware.device_name} ({hardware.device})", style="bold"))
    if found.strategy is not None:
        workers = config.scaling.num_workers
        each = f"each of {workers} workers" if workers > 1 else "one worker"
        console.print(Text(f"{each}, {found.strategy}: {found.strategy_why}"))
    console.print(table)
    console.print(
        Text("time and cost of the optimizer steps; evaluations and answers are not counted")
    )
    console.print(Text(_ground(found), style="dim"))


_VERDICTS = {
    True: "[green]enough[/green]",
    False: "[red]not enough[/red]",
    None: "[yellow]may not be enough[/yellow]",
}


def _counted(count: float, what: str) -> str:
    return f"{count:g} {what}{'' if count == 1 else 's'}"


def _shown(interval: Interval, show: Callable[[float], str]) -> tuple[str, str]:
    return show(interval.expected), f"{show(interval.low)} to {show(interval.high)}"


def show_bytes(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def _ground(found: Estimate) -> str:
    """Return what the figures rest on."""
    if not found.trials:
        such = "such a device" if found.strategy is None else f"such devices under {found.strategy}"
        return f"by formula alone: no trial on {such} has been measured yet"
    return (
        f"the parts by formula; the totals corrected by {found.trials} measured trials, "
        f"{found.near_trials} of them of this model and method"
    )
