"""One trial, from a specification to a result: the only place that trains."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.collector import collector_paused
from rayfin.compat.bitsandbytes import forget_optimizers
from rayfin.data.accepted import streamed_note
from rayfin.errors import StorageError, TrialOutOfMemory
from rayfin.hardware import Hardware, describe_hardware
from rayfin.heartbeat import beat, pause
from rayfin.methods import attach, detach
from rayfin.models import Base, import_bitsandbytes, locate
from rayfin.models.ends import Ends
from rayfin.paths import StoragePath, unfinished_writes, write_directory_whole, write_text
from rayfin.statuses import Status
from rayfin.training.checkpoint import (
    clear_checkpoints,
    latest_checkpoint,
    save_adapter,
    staging,
    vouch,
)
from rayfin.training.combination import counted
from rayfin.training.companions import of_companions
from rayfin.training.failures import classified
from rayfin.training.memory import PeakMemory, release_memory
from rayfin.training.noise import embedding_noise
from rayfin.training.optimization import check_device
from rayfin.training.spec import Report, TrialResult, TrialSpec
from rayfin.training.starting_adapter import Beginning, begin, state_to_continue
from rayfin.training.strategies import WorkerLayout
from rayfin.training.trial_cache import TrialCache, pad_token_id

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from rayfin.training.trainer import TrialTrainer

log = logging.getLogger(__name__)


def run_trial(
    spec: TrialSpec,
    report: Report,
    *,
    location: StoragePath,
    hardware: Hardware | None = None,
    warm: TrialCache | None = None,
    group: WorkerLayout | None = None,
    warned: Callable[[], bool] | None = None,
) -> TrialResult:
    """Train `spec` in this process and return how it ended; errors become a result, not a raise.

    It resumes from the newest checkpoint in `location`. On success the adapter lies in
    `location/adapter`; the checkpoints stay until whoever records the result lets them go, or a
    trial whose end nobody heard of would begin anew. `report` gets the trial at each evaluation but
    the last, and stops it by returning False. In a Ray Train worker group every worker calls this
    with the same arguments; `group` says of what size it is, and how it shares the trial. `warned`:
    whether the machines are about to be taken away, asked by all workers together; a checkpoint is
    saved then.
    """
    hardware = hardware or describe_hardware()
    warm, group = warm or TrialCache(), group or WorkerLayout()
    scenario: dict[str, Any] = {}  # also of a trial that fails: what ran out of memory, and where
    try:
        with collector_paused():
            scenario = {
                "model": warm.facts(spec.model).as_dict(),
                "hardware": hardware.as_dict() | {"num_workers": group.size},
            }
            if group.size > 1 or group.strategy != "ddp":
                scenario["hardware"] |= {"strategy": group.strategy, "strategy_why": group.why}
                scenario["hardware"] |= {"cpu_offload": group.cpu_offload}
            if companions := of_companions(spec.train, spec.model, warm.facts):
                scenario["companions"] = {key: it.as_dict() for key, it in companions.items()}
            scenario["data"] = warm.tokenized(spec).profile.as_dict()
            if (start := warm.start(spec)) is not None:
                scenario["init_from"] = start.as_dict(spec.course(warm.corpus(spec).digest))
        worker = _Worker(hardware, warm, group, warned)
        return _train(spec, report, location, worker, scenario)
    except Exception as error:
        # Whatever happened, the next trial of this worker starts from a freshly loaded base.
        warm.drop_models()
        failure = classified(error)
        log.debug("trial failed", exc_info=error)
        # It may have failed of just that: a full disk, say.
        with contextlib.suppress(OSError, StorageError):
            trace = location / "error.txt"
            write_text(trace.path, "".join(traceback.format_exception(error)))
            if not isinstance(failure, StorageError):
                trace.upload_file()
        return TrialResult(
            status="oom" if isinstance(failure, TrialOutOfMemory) else "failed",
            scenario=scenario,
            error=f"{failure}",
            storage_failed=isinstance(failure, StorageError),
        )


@dataclass(frozen=True)
class _Worker:
    """The process that trains, alone or as one of several."""

    hardware: Hardware
    cache: TrialCache
    layout: WorkerLayout
    preempted: Callable[[], bool] | None


def _train(
    spec: TrialSpec,
    report: Report,
    location: StoragePath,
    worker: _Worker,
    scenario: dict[str, Any],
) -> TrialResult:
    hardware, cache, layout = worker.hardware, worker.cache, worker.layout
    check_device(spec.model, spec.train, hardware.device)
    with collector_paused():
        if (
            hardware.device == "cpu"
        ):  # else DeepSpeed, where it is installed, warns of what it finds
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import_bitsandbytes()  # before Trainer imports PEFT, which would import it the slow way
        from transformers import set_seed

        from rayfin.training.batches import StreamedSamples, samples_of
        from rayfin.training.generation import sample_generator
        from rayfin.training.initialization import initialize
        from rayfin.training.parallel_strategies import parallel_strategy
        from rayfin.training.trainer import TrialTrainer
        from rayfin.training.trial_inputs import TrialCallbacks, TrialData

    started = time.perf_counter()
    checkpoints = location / "checkpoints"
    release_memory()  # of the worker's trial before, which by now nobody holds
    peak = PeakMemory(hardware.device)
    with collector_paused():
        data, tokenizer = cache.tokenized(spec), cache.tokenizer(spec)
        spec = counted(spec, data.profile.rows_train)
        strategy = parallel_strategy(layout, hardware, spec.train)
        # Alone, the scores are kept from trial to trial; several workers share the work of them,
        # and a base that is to be sharded is not loaded whole for them.
        objective = cache.objective(spec, hardware)  # before ZeRO-3, say, changes how models load
        alone = layout.size == 1 and not strategy.on_host
        base_scores = cache.base_scores(spec, objective, hardware) if alone else None
        with strategy.loading():
            base = cache.base(spec, hardware, on_host=strategy.on_host)

        generate, notes = sample_generator(spec, cache, strategy)
        scenario["data"]["notes"] = [*scenario["data"]["notes"], *notes]

    def stands(
        trainer: TrialTrainer, status: Status, adapter: StoragePath | None = None
    ) -> TrialResult:
        metrics = {
            **objective.all_scores(trainer.scores, trainer.base_scores),
            "train_seconds": trainer.train_seconds,
            "wall_seconds": time.perf_counter() - started,
            "tokens_per_second": trainer.tokens_per_second,
            "peak_memory_bytes": peak.bytes(),
            "trainable_parameters": trainer.trainable_parameters,
            "steps": trainer.state.global_step,
        }
        told: dict[str, Any] = {}
        if trainer.ended_early:
            told["early_stop"] = trainer.state.global_step
        if trainer.kept_step is not None:
            told["kept_step"] = trainer.kept_step
        steps = spec.train.max_steps
        return TrialResult(
            status, metrics, trainer.curve, scenario | told, adapter=adapter, max_steps=steps
        )

    # After the base's scores, so that a trial draws the same numbers on a cold and a warm worker.
    set_seed(spec.train.seed)
    beat("attaching the method", bulk=True)
    with collector_paused():
        model = attach(
            base,
            spec.method,
            spec.train.max_steps,
            locate(spec.model),
            task_type=objective.task_type,
            keep_dtype=strategy.keeps_dtype,
        )
        course = spec.course(cache.corpus(spec).digest)
        begun = begin(model, spec.method, cache.start(spec), course)
    trainer: TrialTrainer | None = None
    try:
        beat("preparing the training", bulk=True)
        trainer = TrialTrainer(
            model,
            spec,
            TrialData(
                objective=objective,
                planned=samples_of(
                    spec, objective, data, strategy.share, cache.reader(spec), begun.steps
                ),
                held_out=data.eval,
                pad_token_id=pad_token_id(tokenizer),
                base_scores=base_scores,
                generate=generate,
                continued=begun.state,
            ),
            TrialCallbacks(lambda trainer: report(stands(trainer, "running")), worker.preempted),
            parallel=strategy,
            checkpoints=checkpoints,
        )
        if trainer.args.should_save:
            for left in (staging(checkpoints), *unfinished_writes(location.path / "adapter")):
                shutil.rmtree(left, ignore_errors=True)
        resumed = _resumed(checkpoints, trainer)
        if resumed is None and begun.start is None:
            beat("initializing the method", bulk=True)
            initialize(model, spec, objective, data, cache)
        with embedding_noise(model, spec.train.neftune_noise_alpha):
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        if isinstance(trainer.planned, StreamedSamples):
            refused, steps = trainer.refused_samples(), trainer.state.global_step
            notes = streamed_note(refused, trainer.planned.count(steps), steps)
            scenario["data"]["notes"] += notes
        trainer.return_to_best()
        template, origin = spec.data.chat_template, cache.origin(spec.model)
        adapter = _finish(trainer, model, tokenizer, data.ends, location, origin, template, begun)
        checkpoints.remove_local_copy()
        return stands(trainer, "stopped" if trainer.stopped else "finished", adapter)
    finally:
        changed = spec.method.alters_base or strategy.on_host or spec.train.use_liger_kernel
        _give_back(model, trainer, cache, changed=changed)


def _resumed(checkpoints: StoragePath, trainer: TrialTrainer) -> Path | None:
    """Return what all workers go on from: the checkpoint that the first one finds whole."""
    first = trainer.accelerator.process_index == 0
    _beat_of_first("reading the checkpoint", first)
    if trainer.accelerator.num_processes == 1:
        return latest_checkpoint(checkpoints, trainer.best_of)
    import torch.distributed as dist

    found = latest_checkpoint(checkpoints, trainer.best_of) if first else None
    names = [found.name if found is not None else None]
    dist.broadcast_object_list(names, src=0)
    if names[0] is None:
        return None
    checkpoint = checkpoints / names[0]
    if not checkpoint.download():
        raise StorageError(
            f"storage: this machine does not see '{checkpoint}', from which the trial's first "
            "worker goes on; give one that all nodes share"
        )
    return checkpoint.path


def _finish(
    trainer: TrialTrainer,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    ends: Ends,
    location: StoragePath,
    origin: Base,
    chat_template: str | None,
    begun: Beginning,
) -> StoragePath | None:
    """Write the adapter of a finished trial; remove the checkpoints of one that was stopped."""
    adapter = location / "adapter"
    strategy = trainer.parallel
    if not trainer.stopped:
        _beat_of_first("writing the adapter", trainer.args.should_save)
        # Every worker gives its part, and the first one writes.
        in_parts = trainer.method.changes_base and strategy.gathers
        weights = strategy.weights(model) if in_parts else None
        state = None  # the optimizer's state is that of the last weights
        if trainer.kept_step is None:
            state = state_to_continue(trainer.method, strategy, model, trainer.optimizer)
        with strategy.whole(model):
            if trainer.args.should_save:
                shutil.rmtree(adapter.path, ignore_errors=True)
                with write_directory_whole(adapter.path) as temporary:
                    save_adapter(model, tokenizer, temporary, ends, weights, chat_template)
                    trainer.method.finish_saving(model, temporary)
                    if state is not None:
                        begun.save_after(trainer.state.global_step, state, temporary)
                    bits = begun.start.bits if begun.start is not None else None
                    vouch(temporary, origin, trainer.method.served_bits or bits)
                adapter.upload()
                adapter.remove_local_copy()
    elif trainer.args.should_save:
        clear_checkpoints(location / "checkpoints")
    trainer.accelerator.wait_for_everyone()
    return None if trainer.stopped else adapter


def _beat_of_first(doing: str, first: bool) -> None:
    """Note what the first worker does in bulk; the others note that they wait for it."""
    if first:
        beat(doing, bulk=True)
    else:
        pause()


def _give_back(
    model: torch.nn.Module, trainer: TrialTrainer | None, warm: TrialCache, *, changed: bool
) -> None:
    """Give the base model back to the worker, or drop it if its weights were trained."""
    if changed:
        warm.drop_base()
    else:
        detach(model)
    if trainer is not None:
        trainer.planned.close()
        # Else the optimizer's state would stay beside the next trial's until a collection.
        trainer.optimizer = None
        trainer.lr_scheduler = None
        forget_optimizers()
        trainer.accelerator.free_memory()
