"""`rayfin sweep`: run trials, keep the best, publish it, and write a report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rayfin.cli import experiment
from rayfin.cli.parser import print_error, print_json
from rayfin.errors import StorageError

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion
    from rayfin.cli.experiment import Workplace
    from rayfin.config import Config
    from rayfin.evaluation.report import Sample
    from rayfin.evaluation.verdict import Verdict
    from rayfin.history import TrialRecord
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
    """Exit code 0: all is done; 1: no trial finished; 3: the trials and the report are there, and
    publishing or the sample answers failed; 130: interrupted.
    """
    from rayfin.advisor.fitting import MemoryCheck
    from rayfin.advisor.loop import sweep_advisor
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
            notes=_without_effect(args.settings, place.config),
        )
    # What follows a sweep may fail in more ways than training did: first what the trials are worth.
    report = _write_report(place, result)
    failed = experiment.Failures()
    adapter: AdapterVersion | None = None
    samples: Sequence[Sample] = ()
    if (best := result.best) is not None and not result.interrupted:
        with failed.noting(*experiment.unpublished(place.config, best, " with --resume")):
            adapter = place.publish(best)
        with failed.noting(
            "the report goes without sample answers",
            "the same command with --resume tries again, sweep.report_samples=0 asks for none",
        ):
            samples = _samples(place, best)
        if adapter is not None or samples:
            report = _write_report(place, result, adapter, samples)
    if args.json:
        told = _as_dict(place, result, adapter, report) | {"failed": failed.lines}
        print_json(told)
    else:
        _print(place, result, adapter, report)
    for line in failed.lines:
        print_error(line)
    if result.interrupted:
        return 130
    if result.best is None:
        return 1
    return experiment.INCOMPLETE if failed.lines else 0


def _without_effect(settings: Sequence[str], config: Config) -> list[str]:
    """Names what the command sets and the sweep has values of its own for."""
    pairs = [setting.partition("=")[::2] for setting in settings]
    return [
        f"{key}={value} is no trial's: the sweep has values of its own for it; "
        f"sweep.parameters.{key}=[{value}] is this one alone"
        for key, value in pairs
        if key in config.sweep.parameters
    ]


def _write_report(
    place: Workplace,
    result: SweepResult,
    adapter: AdapterVersion | None = None,
    samples: Sequence[Sample] = (),
) -> str:
    """Raises StorageError where it can't be written."""
    from rayfin.evaluation import write_sweep_report

    report = result.location / "report.html"
    try:
        write_sweep_report(
            report.path,
            result.trials,
            config=place.config,
            best=result.best,
            samples=samples,
            adapter=adapter.ref if adapter else None,
            interrupted=result.interrupted,
            notes=result.notes,
        )
    except OSError as error:
        raise StorageError(
            f"storage: the report '{report.path}' can't be written ({error.strerror or error}); "
            "the trials are in the history: mend that, and the same command with --resume writes it"
        ) from error
    report.publish_file()
    return str(report)


def _samples(place: Workplace, best: TrialRecord) -> Sequence[Sample]:
    """Answers side by side."""
    from rayfin.evaluation.samples import answer_samples

    count = place.config.sweep.report_samples
    # The trials' GPU may be on another machine, which this one does without.
    use_gpu: Literal["auto", False] = "auto" if place.config.scaling.use_gpu else False
    return answer_samples(best, count, use_gpu=use_gpu) if count else ()


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

    from rayfin.tables import output
    from rayfin.tuning.progress import settings, trials_table

    console = Console(highlight=False, soft_wrap=True)
    console.print()
    output().print(trials_table(place.config, result.trials))
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
