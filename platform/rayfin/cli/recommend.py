"""`rayfin recommend`: what to train for a model, data and hardware, and how sure that is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.cli.described import add_described, add_language, described, values_of
from rayfin.cli.parser import print_json
from rayfin.cli.settings import add_settings, split_settings
from rayfin.language import answering_in, locale_language, localized

if TYPE_CHECKING:
    from rayfin.advisor.answer import Recommendation

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
    parser.add_argument(
        "--probe",
        metavar="N|TIME",
        help="train the first steps of a few learning rates on this machine: 4, or for 5m",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="quality against cost")
    parser.add_argument(
        "--scaffold", type=Path, metavar="DIR", help="write configurations to train, sweep, serve"
    )
    parser.add_argument(
        "--why", action="store_true", help="also reasons, risks and the trials it rests on"
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
    trained without --probe, and nothing is written where nothing fits.
    """
    with answering_in(args.lang or locale_language()):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from rayfin.config import load_config
    from rayfin.errors import NothingFits
    from rayfin.library import advice
    from rayfin.library.messages import progress_to
    from rayfin.library.probing import ProbeBudget, check_here, probed

    budget = None if args.probe is None else ProbeBudget.parse(args.probe)
    known = described(args) | values_of(args, _SCENARIO)
    if budget is not None:
        check_here(known)
    config, facts = advice.scenario_of(load_config(*split_settings(args.settings)), known)
    if args.scaffold is not None:
        _check_named(known)
    answer = advice.answer(config, facts, args.k)
    if budget is not None:
        answer = probed(
            answer,
            config,
            lambda other: advice.answer(other, facts, 1),
            budget,
            progress_to(shown=True),
        )
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
        _print(answer, written, why=args.why)
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


def _print(answer: Recommendation, written: Mapping[str, Path], *, why: bool) -> None:
    from rayfin.advisor.answer_text import answer_text

    print(answer_text(answer.model_dump(mode="json"), why=why))
    if written:
        for name, path in written.items():
            print(f"  {name:9}{path}")
    elif not why:
        print(localized("--why says why; --json has all of it"))


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number from 1 to 100")
    return int(text)
