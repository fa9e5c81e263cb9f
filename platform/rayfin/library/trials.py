"""`rayfin.sweep` and `rayfin.train`: from a configuration to trained, published adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rayfin.errors import StorageError
from rayfin.library.experiment import ConfigSource, Experiment, Failures, configuration
from rayfin.library.messages import notes_to, progress_to
from rayfin.library.process import prepare_process
from rayfin.library.results import SweepResult, TrainResult
from rayfin.library.tracking import Tracking

if TYPE_CHECKING:
    from rayfin.adapters import AdapterVersion
    from rayfin.config import Config
    from rayfin.evaluation.report import Sample
    from rayfin.evaluation.verdict import SweepOutcome
    from rayfin.history import TrialRecord
    from rayfin.tuning.sweep import EndedSweep


def sweep(
    config: ConfigSource = None,
    *,
    resume: bool = False,
    rerun: bool = False,
    address: str | None = None,
    progress: bool = True,
    notes: Sequence[str] = (),
) -> SweepResult:
    """Run a sweep, publish its best trial, and write a report.

    - `config`: a Config, a mapping of its sections, or the path of a YAML file.
    - `resume`: carry on with the newest sweep that the same configuration started, if there is one.
    - `rerun`: train also what the history already holds as finished.
    - `address`: of a running Ray cluster; None is $RAY_ADDRESS, or Ray on this machine.
    - `progress`: show on standard error how the trials do. Without it, what there is to know of the
      data and of the sweep comes as warnings of Python's `logging`.
    - `notes`: lines to be told at the start and in the report beside the sweep's own.

    Ctrl-C ends the sweep in order, with `interrupted` set in the result. Trials that fail are rows
    of the history, and no error; what fails after the training is in `failed`. Raises UsageErrors
    before any work is done, and where the storage, the history or the report can't be written.
    """
    from rayfin.advisor.memory_check import MemoryCheck
    from rayfin.advisor.sweep_advisor import advisor_for_sweep
    from rayfin.tuning.progress import ProgressDisplay
    from rayfin.tuning.sweep import SweepOptions, run_sweep

    prepare_process()
    experiment = Experiment.open(configuration(config))
    display = ProgressDisplay() if progress else ProgressDisplay.silent()
    with Tracking(experiment.config, experiment.storage, display.say) as tracking:
        for line in tracking.locations:
            progress_to(progress)(line)
        with experiment.history as history:
            options = SweepOptions(
                resume=resume,
                rerun=rerun,
                address=address,
                notes=tuple(notes),
                advise=lambda plan: advisor_for_sweep(plan, history),
                refuse=MemoryCheck(history),
                progress=display,
                on_record=tracking.record,
            )
            ended = run_sweep(experiment.config, history, experiment.storage, options)
        # What follows may fail in more ways than training did: first what the trials are worth.
        report = _write_report(experiment, ended)
        failures = Failures()
        published: AdapterVersion | None = None
        samples: Sequence[Sample] = ()
        if (best := ended.best) is not None and not ended.interrupted:
            with failures.noting(*experiment.unpublished(best, " with --resume")):
                published = experiment.publish(best, notes_to(progress))
            with failures.noting(
                "the report goes without sample answers",
                "the same command with --resume tries again, sweep.report_samples=0 asks for none",
            ):
                samples = _samples(experiment.config, best)
            if published is not None:
                tracking.published(best, published)
            if published is not None or samples:
                report = _write_report(experiment, ended, published, samples)
        outcome = _outcome(experiment, ended, published)
        tracking.sweep_ended(ended.plan.sweep_id, outcome, ended.location / "report.html")
        failures.lines += [f"report_to: {it}" for it in tracking.missing(" with --resume")]
    return _result(experiment, ended, report, published, failures)


def _result(
    experiment: Experiment,
    ended: EndedSweep,
    report: str,
    published: AdapterVersion | None,
    failures: Failures,
) -> SweepResult:
    from rayfin.evaluation.verdict import sweep_verdict

    verdict = sweep_verdict(_outcome(experiment, ended, published))
    return SweepResult(
        config=experiment.config,
        sweep_id=ended.plan.sweep_id,
        trials=tuple(ended.trials),
        best=ended.best,
        verdict=verdict,
        report=report,
        history=experiment.history.shown_url,
        published=published,
        failed=tuple(failures.lines),
        notes=ended.notes,
        interrupted=ended.interrupted,
    )


def _outcome(
    experiment: Experiment, ended: EndedSweep, published: AdapterVersion | None
) -> SweepOutcome:
    from rayfin.evaluation.verdict import SweepOutcome

    adapter = published.ref if published else None
    return SweepOutcome(ended.trials, experiment.config, ended.best, adapter, ended.interrupted)


def _write_report(
    experiment: Experiment,
    ended: EndedSweep,
    published: AdapterVersion | None = None,
    samples: Sequence[Sample] = (),
) -> str:
    """Write the report and return where it lies; raises StorageError where that can't be."""
    from rayfin.evaluation import write_sweep_report

    report = ended.location / "report.html"
    try:
        write_sweep_report(
            report.path,
            _outcome(experiment, ended, published),
            samples=samples,
            notes=ended.notes,
        )
    except OSError as error:
        raise StorageError(
            f"storage: the report '{report.path}' can't be written ({error.strerror or error}); "
            "the trials are in the history: mend that, and the same command with --resume writes it"
        ) from error
    report.upload_file()
    return str(report)


def _samples(config: Config, best: TrialRecord) -> Sequence[Sample]:
    """Return held-out questions with the answers of the base model and of the best trial."""
    from rayfin.evaluation.samples import answer_samples

    count = config.sweep.report_samples
    # The trials' GPU may be on another machine, which this one does without.
    use_gpu: Literal["auto", False] = "auto" if config.scaling.use_gpu else False
    return answer_samples(best, count, use_gpu=use_gpu) if count else ()


def train(
    config: ConfigSource = None,
    *,
    rerun: bool = False,
    address: str | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train one adapter and publish it; an interrupted run is carried on.

    - `config`: a Config, a mapping of its sections, or the path of a YAML file.
    - `rerun`: train also what the history already holds as finished.
    - `address`: of a running Ray cluster, for scaling.num_workers above 1; None is $RAY_ADDRESS,
      or Ray on this machine. One worker trains in this process, without Ray.
    - `progress`: show each evaluation on standard error. Without it, what there is to know of the
      data and of the training comes as warnings of Python's `logging`.

    A training that fails is a row of the history, and no error: see `trial.status` and
    `trial.error` of the result. Raises UsageErrors before any work is done, and where the storage
    or the history can't be written.
    """
    from rayfin.training.starting_adapter import version_of
    from rayfin.tuning.single import train_once

    prepare_process()
    experiment = Experiment.open(configuration(config))
    show, note = progress_to(progress), notes_to(progress)
    with Tracking(experiment.config, experiment.storage, note) as tracking:
        for line in tracking.locations:
            show(line)
        with experiment.history as history:
            row = train_once(
                experiment.config,
                history=history,
                storage=experiment.storage,
                rerun=rerun,
                address=address,
                show=show,
                note=note,
                on_record=tracking.record,
            )
        failures, again = Failures(), " without --rerun" if rerun else ""
        lineage = row.scenario.get("init_from")
        start = str(lineage.get("adapter")) if isinstance(lineage, dict) else None
        if version_of(experiment.config.method.init_from, start) is not None:  # an alias may move
            again += f" with method.init_from={start}"
        published: AdapterVersion | None = None
        if row.status == "finished":
            with failures.noting(*experiment.unpublished(row, again)):
                published = experiment.publish(row, note)
        tracking.trained(row, published)
        failures.lines += [f"report_to: {it}" for it in tracking.missing(again)]
    return TrainResult(row, history.shown_url, published, tuple(failures.lines))
