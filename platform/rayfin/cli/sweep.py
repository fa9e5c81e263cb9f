"""`rayfin sweep`: run trials, keep the best, publish it, and write a report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rayfin.cli import experiment
from rayfin.cli.parser import print_error
from rayfin.errors import UsageError

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion
    from rayfin.cli.experiment import Workplace
    from rayfin.evaluation.report import Sample
    from rayfin.evaluation.verdict import Verdict
    from rayfin.tuning.sweep import SweepResult


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "run a sweep, publish its best trial, and write a report"
    add_arguments(subparsers.add_parser("sweep", help=summary, description=summary.capitalize()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    experiment.add_arguments(parser)
    parser.add_argument(
        "--resume", action="store_true", help="carry on with this sweep where it was interrupted"
    )
    parser.add_argument("--address", help="a running Ray cluster (default: $RAY_ADDRESS, or local)")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0: a trial finished; 1: none did; 130: interrupted."""
    from rayfin.recommend.fitting import MemoryCheck
    from rayfin.recommend.loop import sweep_advisor
    from rayfin.tuning.sweep import run_sweep

    place = experiment.Workplace.open(args)
    with place.history:
        result = run_sweep(
            place.config,
            history=place.history,
            storage=place.storage,
            resume=args.resume,
            rerun=args.rerun,
            address=args.address,
            advise=lambda plan: sweep_advisor(plan, place.history),
            refuse=MemoryCheck(place.history),
        )
    adapter = place.publish(result.best) if result.best and not result.interrupted else None
    report = _write_report(place, result, adapter)
    if args.json:
        print(json.dumps(_as_dict(place, result, adapter, report), ensure_ascii=False))
    else:
        _print(place, result, adapter, report)
    if result.interrupted:
        return 130
    return 0 if result.best else 1


def _write_report(place: Workplace, result: SweepResult, adapter: AdapterVersion | None) -> str:
    from rayfin.evaluation import write_sweep_report

    report = result.place / "report.html"
    write_sweep_report(
        report.path,
        result.trials,
        config=place.config,
        best=result.best,
        samples=_samples(place, result),
        adapter=adapter.ref if adapter else None,
        interrupted=result.interrupted,
        notes=result.notes,
    )
    report.publish_file()
    return str(report)


def _samples(place: Workplace, result: SweepResult) -> Sequence[Sample]:
    """Answers side by side; none, and a word why, where this machine can't give them."""
    from rayfin.evaluation.samples import answer_samples

    count = place.config.sweep.report_samples
    if result.best is None or result.interrupted or not count:
        return ()
    # The trials' GPU may be on another machine, which this one does without.
    use_gpu: Literal["auto", False] = "auto" if place.config.scaling.use_gpu else False
    try:
        return answer_samples(result.best, count, use_gpu=use_gpu)
    except UsageError as error:
        # A trial from the history may name data or a model by where they lay then.
        print_error(f"the report goes without sample answers: {error}")
        return ()


def _verdict(place: Workplace, result: SweepResult, adapter: AdapterVersion | None) -> Verdict:
    from rayfin.evaluation.verdict import sweep_verdict

    return sweep_verdict(
        result.trials,
        place.config,
        result.best,
        adapter=adapter.ref if adapter else None,
        interrupted=result.interrupted,
    )


def _as_dict(
    place: Workplace, result: SweepResult, adapter: AdapterVersion | None, report: str
) -> dict[str, Any]:
    return {
        "sweep_id": result.plan.sweep_id,
        "interrupted": result.interrupted,
        "trials": [row.model_dump(mode="json") for row in result.trials],
        "notes": list(result.notes),
        "best": result.best.trial_id if result.best else None,
        "verdict": _verdict(place, result, adapter).as_dict(),
        "adapter": adapter.as_dict() if adapter else None,
        "report": report,
        "history": place.history.shown_url,
    }


def _print(
    place: Workplace, result: SweepResult, adapter: AdapterVersion | None, report: str
) -> None:
    from rich.console import Console
    from rich.markup import escape

    from rayfin.tuning.progress import settings, trials_table

    console = Console(highlight=False, soft_wrap=True)
    console.print()
    console.print(trials_table(place.config, result.trials))
    console.print()
    for note in result.notes:
        console.print(note, markup=False)
    best = result.best
    if best is not None:
        chosen = settings(place.config, best) or best.trial_id
        console.print(f"[bold]Best trial[/bold] {escape(chosen)}, base model -> adapter:")
        for line in experiment.comparison_lines(best):
            console.print(line)
        console.print()
    # A path may have brackets, which would be taken for markup.
    console.print(f"  report   {report}", markup=False)
    console.print(f"  history  {place.history.shown_url}", markup=False)
    if adapter is not None:
        console.print(f"  adapter  {adapter.ref}  {adapter.path}", markup=False)
    if result.interrupted:
        console.print("\nInterrupted.")
    console.print()
    console.print(_verdict(place, result, adapter).text, markup=False)
