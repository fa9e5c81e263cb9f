"""`rayfin recommend`: what to train for a model, data and hardware, and how sure that is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.cli.described import add_described, add_language, described, values_of
from rayfin.cli.parser import print_json
from rayfin.cli.settings import add_settings, split_settings
from rayfin.language import answering_in, locale_language

if TYPE_CHECKING:
    from rayfin.advisor.answer import Choice, Recommendation
    from rayfin.config import Config
    from rayfin.hardware import Hardware

_CHOICES = {
    "latency": ("strict", "normal"),
    "priority": ("quality", "cost", "latency"),
}
_SCENARIO = {
    "latency": (str, "strict or normal: whether answers are waited for"),
    "priority": (str, "quality, cost or latency"),
    "latency-target-ms": (float, "milliseconds to the first token"),
    "budget-hours": (float, "hours that a training may take"),
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "what to train for a model, data and hardware, learned from all trials"
    parser = subparsers.add_parser("recommend", help=summary, description=f"{summary.capitalize()}")
    add_settings(parser)
    parser.add_argument("-k", type=_count, default=3, metavar="N", help="configurations (3)")
    add_described(parser)
    for name, (kind, meaning) in _SCENARIO.items():
        parser.add_argument(
            f"--{name}", type=kind, choices=_CHOICES.get(name), metavar="X", help=meaning
        )
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="quality against cost")
    parser.add_argument(
        "--scaffold", type=Path, metavar="DIR", help="write configurations to train, sweep, serve"
    )
    add_language(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.epilog = (
        f"Example: {parser.prog} model.name=smollm2-135m data.path=my.jsonl --scaffold mine. What "
        "the settings name is kept; the advisor chooses the rest. Exit code 1: nothing fits, and "
        "what would is said. Guide: docs/recommend.md"
    )
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the recommendation; returns exit code 0, or 1 where nothing fits.

    One line on standard error says what would fit.

    With --json the answer is printed either way, its `nothing_fits` the same line. Nothing is
    trained, and nothing is written where nothing fits.
    """
    with answering_in(args.lang or locale_language()):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from rayfin.config import load_config
    from rayfin.errors import NothingFits
    from rayfin.library import advice

    known = described(args) | values_of(args, _SCENARIO)
    config, facts = advice.scenario_of(load_config(*split_settings(args.settings)), known)
    if args.scaffold is not None:
        _check_named(known)
    answer = advice.answer(config, facts, args.k)
    if answer.nothing_fits is not None:
        if not args.json:
            raise NothingFits(answer.nothing_fits)
        print_json(answer.model_dump(mode="json"))
        return 1
    if args.picture is not None:
        _write_picture(answer, args.picture)
    written: dict[str, Path] = {}
    if args.scaffold is not None:
        from rayfin.advisor.scaffold import scaffold
        from rayfin.library.experiment import adapter_name

        written = scaffold(answer, args.scaffold, name=adapter_name(config))
    if args.json:
        print_json(answer.model_dump(mode="json"))
    else:
        _print(config, facts.hardware, answer, written)
    return 0


def _check_named(known: Mapping[str, Any]) -> None:
    """Raise ConfigError where files are to be written for a model or data without a name."""
    from rayfin.errors import ConfigError

    for option, setting in (("model_size_b", "model.name"), ("rows", "data.path")):
        if known[option] is not None:
            told = option.replace("_", "-")
            raise ConfigError(
                f"--scaffold writes files that train, and --{told} is not enough for them; name "
                f"{setting}, or leave --scaffold out"
            )


def _write_picture(answer: Recommendation, path: Path) -> None:
    from rayfin.advisor.trade_off_chart import picture
    from rayfin.errors import StorageError
    from rayfin.paths import write_text

    try:
        write_text(path, picture(answer))
    except OSError as error:
        raise StorageError(f"--picture: '{path}' can't be written ({error.strerror})") from error


def _print(
    config: Config, hardware: Hardware, answer: Recommendation, written: dict[str, Path]
) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    what = f"{config.model.name} on {config.data.title}, {hardware.device_name}"
    console.print(Text(what, style="bold"))
    console.print(Text(answer.explanation))
    for note in answer.notes:
        console.print(Text(note, style="dim"))
    for choice in answer.choices:
        console.print()
        _print_choice(console, choice)
    console.print()
    console.print(Text(f"The rules say: {answer.rule}", style="dim"))
    for name, path in written.items():
        console.print(f"  {name:9}{path}", markup=False)


def _print_choice(console: Any, choice: Choice) -> None:
    from rich.text import Text

    from rayfin.cli.estimate import show_bytes
    from rayfin.evaluation.quantities import show_seconds

    predicted, fits = choice.predictions, choice.feasibility
    console.print(Text(f"{choice.rank}. {choice.method}", style="bold"))
    settings = " ".join(f"{key}={value}" for key, value in choice.settings.items())
    console.print(Text(f"   {settings}"))
    short, chance = predicted.shortfall, predicted.divergence
    diverges = "" if chance is None else f", diverges {chance:.0%}"
    console.print(
        Text(
            f"   shortfall {short.expected:.2f} ({short.low:.2f} to {short.high:.2f}; 0 is the best"
            f" known, 1 the worst){diverges}"
        )
    )
    memory, seconds = predicted.memory_bytes, predicted.train_seconds
    verdict = "fits" if fits.memory else "may not fit"
    console.print(
        Text(
            f"   memory {show_bytes(memory.expected)} ({show_bytes(memory.low)} to "
            f"{show_bytes(memory.high)}; {verdict}), {_length(choice)}: "
            f"{show_seconds(seconds.expected)} ({show_seconds(seconds.low)} to "
            f"{show_seconds(seconds.high)})"
        )
    )
    for mark, lines in (("+", choice.reasons), ("-", choice.risks)):
        for line in lines:
            console.print(Text(f"   {mark} {line}"))
    for trial in choice.trials:
        console.print(Text(f"   {trial.similarity:4.0%} {trial.trial_id}: {trial.summary}", "dim"))
    console.print(Text(f"   served as {choice.deployment}", style="dim"))


def _length(choice: Choice) -> str:
    """Return `3 epochs (27 steps)`, or the steps alone, which the training time is that of."""
    train = choice.config["train"]
    steps, epochs = train["max_steps"], train["num_train_epochs"]
    counted = f"{steps} step{'' if steps == 1 else 's'}"
    if epochs is None:
        return f"training {counted}"
    return f"training {epochs:g} epoch{'' if epochs == 1 else 's'} ({counted})"


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number from 1 to 100")
    return int(text)
