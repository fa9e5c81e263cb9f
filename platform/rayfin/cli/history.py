"""`rayfin history`: look at the trials that ran, and move them between histories."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rayfin.cli.parser import print_json
from rayfin.cli.storage_arguments import add_storage_arguments, storage_config
from rayfin.statuses import STATUSES

# What runs at `rayfin --help` stays light: the history and its database load inside the handlers.
if TYPE_CHECKING:
    from rayfin.history import History, SweepSummary, TrialRecord
    from rayfin.tables import TextTable


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `history` and its verbs to the command line."""
    summary = "list, show, export and import trials"
    history = subparsers.add_parser("history", help=summary, description=summary.capitalize())
    verbs = history.add_subparsers(dest="verb", metavar="VERB", required=True)

    listing = _verb(verbs, "list", "the newest trials, or all sweeps", list_trials)
    listing.add_argument("--sweep", metavar="ID", help="only this sweep's trials")
    listing.add_argument(
        "--status",
        choices=STATUSES,
        metavar="STATUS",
        help=f"only trials of this status: {', '.join(STATUSES)}",
    )
    listing.add_argument("--limit", type=_count, metavar="N", help="show N trials (20; 0 is all)")
    listing.add_argument("--sweeps", action="store_true", help="one line a sweep")

    its_id = "its id, or the beginning of it"
    _verb(verbs, "show", "everything about one trial", show_trial, trial=its_id)

    export = _verb(
        verbs, "export", "write trials to a file", export_trials, path=".jsonl, .parquet"
    )
    export.add_argument("--sweep", metavar="ID", help="only this sweep's trials")

    readable = (
        ".jsonl or .parquet export, .csv table, or .json results (a directory, too) of PEFT's "
        "method_comparison"
    )
    _verb(verbs, "import", "add the trials in a file", import_trials, path=readable)


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    verb: str,
    summary: str,
    handler: Callable[[argparse.Namespace], int],
    *,
    trial: str | None = None,
    path: str | None = None,
) -> argparse.ArgumentParser:
    """A verb with what it is about, as its help says it, before the settings."""
    parser = verbs.add_parser(verb, help=summary, description=summary.capitalize())
    if trial is not None:
        parser.add_argument("trial", metavar="TRIAL", help=trial)
    if path is not None:
        parser.add_argument("path", metavar="FILE", help=path)
    add_storage_arguments(parser, "storage and history")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.set_defaults(handler=handler)
    return parser


def list_trials(args: argparse.Namespace) -> int:
    """`rayfin history list`"""
    with _open(args) as history:
        if args.sweeps:
            sweeps = history.sweeps()
            _print(args, [_sweep_json(sweep) for sweep in sweeps], _sweep_table(sweeps))
            return 0
        # Machines do not expect a page.
        limit = (0 if args.json else 20) if args.limit is None else args.limit
        trials = history.trials(
            sweep_id=args.sweep, status=args.status, limit=limit or None, newest_first=True
        )
        table = _trial_table(trials)
        _print(args, [trial.model_dump(mode="json") for trial in trials], table)
        if not args.json and len(trials) == limit:
            print(f"the newest {limit}; --limit 0 shows all")
    return 0


def show_trial(args: argparse.Namespace) -> int:
    """`rayfin history show TRIAL`"""
    with _open(args) as history:
        trial = history.find(args.trial)
    _print(args, trial.model_dump(mode="json"), _detail_table(trial))
    return 0


def export_trials(args: argparse.Namespace) -> int:
    """`rayfin history export FILE`"""
    from rayfin.history import export_history

    with _open(args) as history:
        count = export_history(history, args.path, sweep_id=args.sweep)
    _print(args, {"path": args.path, "trials": count}, f"{count} trials -> {args.path}")
    return 0


def import_trials(args: argparse.Namespace) -> int:
    """`rayfin history import FILE`; a file of which nothing could be used is an error."""
    from dataclasses import asdict

    from rayfin.errors import HistoryError
    from rayfin.history import import_history

    with _open(args, create=True) as history:
        report = import_history(history, args.path)
        where = history.shown_url
    if report.skipped and not report.added + report.replaced + report.unchanged:
        raise HistoryError(
            f"import: nothing in '{args.path}' could be used "
            f"({len(report.skipped)} skipped), first: {report.skipped[0]}"
        )
    lines = [
        f"{report.added} added, {report.replaced} replaced, "
        f"{report.unchanged} unchanged -> {where}",
        *(f"skipped {problem}" for problem in report.skipped),
    ]
    _print(args, asdict(report), "\n".join(lines))
    return 0


def _open(args: argparse.Namespace, *, create: bool = False) -> History:
    from rayfin.history import History
    from rayfin.history.driver import mark_lost_trials
    from rayfin.library.stores import history_url
    from rayfin.paths import Storage

    config = storage_config(args)
    if create and config.history is None:  # reading must not leave an empty storage behind
        Storage.open(config.storage)
    history = History.open(history_url(config), create=create)
    mark_lost_trials(history)
    return history


def _print(args: argparse.Namespace, value: Any, human: TextTable | str) -> None:
    if args.json:
        print_json(value)
        return
    from rayfin.tables import output

    # Paths and messages are the user's own text, not markup.
    output().print(human, markup=False, soft_wrap=isinstance(human, str))


def _trial_table(trials: list[TrialRecord]) -> TextTable | str:
    if not trials:
        return "no trials"
    from rayfin.methods import METHODS, capacities
    from rayfin.metrics import METRICS as MEASURED
    from rayfin.metrics import Score
    from rayfin.objectives import DEFAULT, OBJECTIVES
    from rayfin.tables import TableColumn, TextTable

    # Scores of other objectives than the usual one, where any of these trials has them.
    usual = OBJECTIVES[DEFAULT].metrics
    measured = [
        (name, it.history)
        for name, it in MEASURED.items()
        if it.history
        and (
            name in usual
            or not isinstance(it, Score)
            or any(name in trial.metrics for trial in trials)
        )
    ]
    columns = [
        TableColumn("trial"),
        TableColumn("sweep", folds=True, leaves=3),  # a trial's id begins with it
        TableColumn("status"),
        TableColumn("method"),
        TableColumn("lr"),
        *(TableColumn(shown.header, right=True, leaves=shown.leaves) for _, shown in measured),
    ]
    rows = []
    for trial in trials:
        method = trial.spec.get("method") or {}
        kind = method.get("type", "?")
        capacity = next((value for name in capacities() if (value := method.get(name))), None)
        label = METHODS[kind].capacity_label if kind in METHODS else ""
        rows.append(
            [
                trial.trial_id,
                trial.sweep_id,
                trial.status,
                f"{kind}{f' {label}{capacity}' if capacity else ''}",
                _figure((trial.spec.get("train") or {}).get("learning_rate"), "g"),
                *(_figure(trial.metrics.get(key), f".{it.decimals}f") for key, it in measured),
            ]
        )
    return TextTable(columns, rows)


def _sweep_table(sweeps: list[SweepSummary]) -> TextTable | str:
    if not sweeps:
        return "no sweeps"
    from rayfin.tables import TableColumn, TextTable

    usual = all(sweep.best_metric == "eval_loss" for sweep in sweeps)

    def best(sweep: SweepSummary) -> str:
        value = _figure(sweep.best_value, ".4f")
        return value if usual or sweep.best_value is None else f"{sweep.best_metric} {value}"

    columns = [
        TableColumn("sweep"),
        TableColumn("started", leaves=2),
        TableColumn("trials", right=True),
        TableColumn("counts", folds=True, leaves=1),
        TableColumn("best loss" if usual else "best score", right=True),
        TableColumn("best trial", leaves=1),
    ]
    rows = [
        [
            sweep.sweep_id,
            f"{sweep.created_at:%Y-%m-%d %H:%M}",
            str(sweep.trials),
            ", ".join(f"{count} {status}" for status, count in sweep.counts.items()),
            best(sweep),
            sweep.best_trial_id or "-",
        ]
        for sweep in sweeps
    ]
    return TextTable(columns, rows)


def _detail_table(trial: TrialRecord) -> TextTable:
    from rayfin.tables import TableColumn, TextTable

    rows: list[list[str]] = []
    for name, value in trial.model_dump(mode="json").items():
        if name == "curve":
            rows.append(["curve", f"{len(value)} points (--json shows them)"])
        elif isinstance(value, dict):
            rows += [[f"{name}.{key}", _short(item)] for key, item in value.items()]
        elif value is not None:
            rows.append([name, str(value)])
    return TextTable([TableColumn(""), TableColumn("", folds=True)], rows)


def _sweep_json(sweep: SweepSummary) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(sweep) | {
        "created_at": sweep.created_at.isoformat(),
        "updated_at": sweep.updated_at.isoformat(),
    }


def _figure(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0")
    return int(text)
