"""`rayfin data`: look at data, clean, divide and convert it before it is trained on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rayfin.cli import data_clean, data_duplicates
from rayfin.cli.data_arguments import add_data, add_output, configuration, print_report
from rayfin.cli.parser import print_json

_MARKED = "bold green"
"""The style of what is learned of a sample."""

# What runs at `rayfin --help` stays light: heavy imports stand inside the handlers.
if TYPE_CHECKING:
    from rayfin.config import Config
    from rayfin.data_tools.inspection import Inspection, Lengths, SamplePart
    from rayfin.tables import TextTable


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `data` and its verbs to the command line."""
    summary = "look at data, clean, divide and convert it before training"
    data = subparsers.add_parser("data", help=summary, description=summary.capitalize())
    verbs = data.add_subparsers(dest="verb", metavar="VERB", required=True)

    summary = "what is read as what, how long it is, and some samples as they are trained on"
    inspect = verbs.add_parser("inspect", help=summary, description=summary.capitalize())
    add_data(inspect)
    inspect.add_argument(
        "--samples", type=_count, default=3, metavar="N", help="show N training samples (3)"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON for machines")
    inspect.epilog = f"Example: {inspect.prog} my.jsonl model.name=smollm2-135m"
    inspect.set_defaults(handler=inspect_data)

    summary = "divide data into files for training, validation and test"
    split = verbs.add_parser("split", help=summary, description=summary.capitalize())
    add_data(split)
    add_output(split, "DIRECTORY", "a new directory for the files")
    split.add_argument(
        "--val-size", type=float, default=0.1, metavar="X", help="share for validation (0.1)"
    )
    split.add_argument(
        "--test-size", type=float, default=0.0, metavar="X", help="share for test (0: no test)"
    )
    split.epilog = f"Example: {split.prog} my.jsonl --output mine --test-size 0.1"
    split.set_defaults(handler=split_data)

    summary = "bring data, or a FAQ in Markdown, into JSON Lines"
    convert = verbs.add_parser("convert", help=summary, description=summary.capitalize())
    add_data(convert)
    add_output(convert, "FILE", "a new .jsonl file")
    convert.epilog = f"Example: {convert.prog} faq.md --output faq.jsonl"
    convert.set_defaults(handler=convert_data)

    data_clean.register(verbs)
    data_duplicates.register(verbs)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no number; give 0 or more")
    return int(text)


def inspect_data(args: argparse.Namespace) -> int:
    """`rayfin data inspect`"""
    from rayfin.data_tools import inspection
    from rayfin.library.process import prepare_process

    config = configuration(args.settings)
    prepare_process()
    found = inspection.inspect_data(config, args.samples)
    if args.json:
        print_json(found.as_dict())
    else:
        _print_inspection(config, found)
    return 0


def split_data(args: argparse.Namespace) -> int:
    """`rayfin data split`"""
    from rayfin.data_tools.splitting import split_data

    config = configuration(args.settings)
    report = split_data(config, args.output, val_size=args.val_size, test_size=args.test_size)
    names = [name for name in ("train", "validation", "test") if name in report]
    counts = ", ".join(f"{report[name]} in {name}.jsonl" for name in names)
    print_report(args, report, f"{args.output}: {counts}", args.output / "report.json")
    return 0


def convert_data(args: argparse.Namespace) -> int:
    """`rayfin data convert`"""
    from rayfin.data_tools.conversion import convert_data

    report = convert_data(configuration(args.settings), args.output)
    said = f"{args.output}: {report['written']} of {report['rows']} rows as {report['format']}"
    print_report(args, report, said, args.output.with_suffix(".report.json"))
    return 0


def _print_inspection(config: Config, found: Inspection) -> None:
    from rich.text import Text

    from rayfin.data.splits import count_rows
    from rayfin.redaction import printable
    from rayfin.tables import output

    console = output()
    held = "held out" if found.eval_split == "held_out" else found.eval_split
    console.print(
        Text(
            f"{config.data.title}: read as {found.shape}; {found.rows_train} rows to train on, "
            f"{found.rows_eval} to evaluate on ({held})",
            style="bold",
        )
    )
    # The bad rows follow one by one.
    notes = (note for note in found.notes if " rows are bad and left out, first " not in note)
    for note in notes:
        console.print(Text(printable(f"- {note.removeprefix('data: ')}")))
    if found.bad_rows:
        console.print(Text(f"{count_rows(found.bad_rows)} can't be used:", style="bold red"))
        for reason in found.first_bad_rows:
            console.print(Text(printable(f"- {reason}")))
        if found.bad_rows > len(found.first_bad_rows):
            console.print(Text(f"- and {found.bad_rows - len(found.first_bad_rows)} more"))
    console.print(_lengths_table(config, found))
    for number, parts in enumerate(found.samples, 1):
        _print_sample(number, parts)


def _lengths_table(config: Config, found: Inspection) -> TextTable:
    from rayfin.tables import TableColumn, TextTable

    percentiles = list(found.lengths.percentiles)
    names = ["mean", *percentiles, "max"]
    columns = [TableColumn(f"tokens of {config.model.name}", folds=True)]

    def row(title: str, lengths: Lengths) -> list[str]:
        numbers = (lengths.percentiles[name] for name in percentiles)
        return [title, f"{lengths.mean:.0f}", *map(str, numbers), str(lengths.longest)]

    return TextTable(
        [*columns, *(TableColumn(name, right=True) for name in names)],
        [
            row(f"whole, of {found.tokenized} samples", found.lengths),
            row("learned", found.learned),
        ],
    )


def _print_sample(number: int, parts: tuple[SamplePart, ...]) -> None:
    """Print a sample with what is learned of it in bold; in a pipe, that stands beneath it."""
    from rich.text import Text

    from rayfin.redaction import printable
    from rayfin.tables import output

    console = output()
    legend = (", learned is ", (_MARKED, _MARKED)) if console.is_terminal else ()
    console.print(Text.assemble("\n", (f"sample {number}", "bold"), *legend))
    shown = [(printable(each.text), _MARKED if each.learned else "") for each in parts]
    console.print(Text.assemble(*shown))
    if not console.is_terminal:
        for each in parts:
            if each.learned:
                console.print(Text(f"learned: {each.text!r}"))
