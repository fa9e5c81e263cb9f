"""`rayfin estimate`: what a configuration takes in memory, time and money, before it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from rayfin.cli.described import add_described, add_language, described
from rayfin.cli.settings import add_settings, split_settings
from rayfin.language import answering_in, locale_language, localized, localized_template

if TYPE_CHECKING:
    from rich.text import Text

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
    add_language(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.epilog = f"Example: {parser.prog} data.path=my.jsonl method.type=lora method.r=16"
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the estimate; returns exit code 0, whether the configuration fits or not."""
    with answering_in(args.lang or locale_language()):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
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
        table.add_row(f"  {_part(name)}", show_bytes(size))
    table.add_row(localized("peak memory"), *_shown(found.memory, show_bytes), style="bold")
    alone = found.strategy is None
    whose = localized("of the device") if alone else localized("of each worker's")
    table.add_row(f"  {whose}", show_bytes(found.room), _verdict(found.fits))
    time = Text(localized("training time"), style="bold")
    table.add_row(time, *_shown(found.seconds, show_seconds))
    if found.cost is not None:
        cost = Text(localized("cost"), style="bold")
        table.add_row(cost, *_shown(found.cost, "{:,.2f}".format))
    epochs, steps = config.train.num_train_epochs, found.steps
    length = localized("{steps} step{plural}", steps=steps, plural="s" * (steps != 1))
    if epochs is not None:
        length = localized(
            "{epochs:g} epoch{plural} ({steps})",
            epochs=epochs,
            plural="s" * (epochs != 1),
            steps=length,
        )
    what = localized(
        "{model}, {method}, {length} on {machine} ({device})",
        model=model,
        method=config.method.type,
        length=length,
        machine=localized_template(hardware.device_name),
        device=hardware.device,
    )
    # Text, so that brackets in a path are not taken for markup.
    console.print(Text(what, style="bold"))
    if found.strategy is not None:
        workers = config.scaling.num_workers
        each = (
            localized("each of {workers} workers", workers=workers)
            if workers > 1
            else localized("one worker")
        )
        console.print(Text(f"{each}, {found.strategy}: {found.strategy_why}"))
    console.print(table)
    console.print(
        Text(
            localized(
                "time and cost of the optimizer steps; evaluations and answers are not counted"
            )
        )
    )
    console.print(Text(_ground(found), style="dim"))


def _verdict(fits: bool | None) -> Text:
    from rich.text import Text

    if fits is None:
        return Text(localized("may not be enough"), style="yellow")
    return Text(localized("enough"), "green") if fits else Text(localized("not enough"), "red")


def _part(name: str) -> str:
    """Return the name of a part of the memory in the language in force."""
    return {
        "weights": localized("weights"),
        "adapter": localized("adapter"),
        "gradients": localized("gradients"),
        "optimizer": localized("optimizer"),
        "activations": localized("activations"),
        "overhead": localized("overhead"),
    }[name]


def _shown(interval: Interval, show: Callable[[float], str]) -> tuple[str, str]:
    low, high = show(interval.low), show(interval.high)
    return show(interval.expected), localized("{low} to {high}", low=low, high=high)


def show_bytes(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def _ground(found: Estimate) -> str:
    """Return what the figures rest on."""
    if found.trials:
        return localized(
            "the parts by formula; the totals corrected by {trials} measured trials, {near} of "
            "them of this model and method",
            trials=found.trials,
            near=found.near_trials,
        )
    if found.strategy is None:
        return localized("by formula alone: no trial on such a device has been measured yet")
    return localized(
        "by formula alone: no trial on such devices under {strategy} has been measured yet",
        strategy=found.strategy,
    )
