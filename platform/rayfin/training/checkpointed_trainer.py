"""The checkpoints of a trial: written whole on whatever worker, and read back by any strategy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from rayfin.compat.transformers import TRAINER_STATE_NAME, SteppedTrainer
from rayfin.config import TrainConfig
from rayfin.errors import StorageError, TrialError
from rayfin.heartbeat import beat, pause
from rayfin.objectives import Objective
from rayfin.paths import StoragePath
from rayfin.training.batches import PlannedSamples, StreamedSamples
from rayfin.training.checkpoint import (
    TrainingProgress,
    gather_random_states,
    load_progress,
    load_tensors,
    publish_checkpoint,
    save_progress,
    save_tensors,
    staging,
)
from rayfin.training.clock import Clock
from rayfin.training.learning_rates import resume_schedule
from rayfin.training.parallel import ParallelStrategy
from rayfin.training.schedules import schedule_state
from rayfin.training.selection import best_step
from rayfin.training.starting_adapter import TrainingState

_WEIGHTS, _MOMENTS, _BASE_SCORES = "training_state", "optimizer", "base_scores"


class CheckpointedTrainer(SteppedTrainer):
    """Transformers' Trainer whose checkpoints hold what is trained, and no more, by its names.

    Where `keeps_best`, the checkpoints of the best evaluation of each of the last two stay, too.
    """

    objective: Objective
    parallel: ParallelStrategy
    checkpoints: StoragePath
    trained: torch.nn.Module
    base_scores: torch.Tensor | None
    metric: str | None
    """The score by which evaluations compare; None where nothing depends on that."""
    keeps_best: bool
    clock: Clock
    train_config: TrainConfig
    resumed_weights: dict[str, torch.Tensor]
    continued: TrainingState | None
    """What the adapter that the trial continues has beside its weights."""
    planned: PlannedSamples | StreamedSamples
    _refused_before = 0

    @property
    def train_seconds(self) -> float:
        """Seconds spent in optimizer steps, those before a resume included."""
        return self.clock.before + self.clock.seconds

    def refused_samples(self) -> int:
        """Return how many samples so far the chat template refuses, those before a resume included.

        All workers call it together.
        """
        if not isinstance(self.planned, StreamedSamples):
            return 0  # they are not among the samples
        own = self.planned.refused(self.clock.first_step, self.state.global_step)
        if self.accelerator.num_processes > 1:
            counted = torch.tensor(own, device=self.accelerator.device)
            own = int(self.accelerator.reduce(counted).item())
        return self._refused_before + own

    # --- the best evaluation --------------------------------------------------------------

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation so far; None where the last weights are kept anyway."""
        return self._best_step(self.state.log_history)

    def _best_step(self, log: list[dict[str, Any]]) -> int | None:
        if self.metric is None or not self.keeps_best:
            return None
        return best_step(log, self.metric)

    def best_of(self, checkpoint: Path) -> str | None:
        """Return the name of the checkpoint that one needs beside it: that of its best step."""
        if not self.keeps_best:
            return None
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        best = self._best_step(state["log_history"])
        return None if best is None else f"checkpoint-{best}"

    def read_best(self) -> int | None:
        """Put the weights of the best evaluation back, and return its step; all workers call it.

        Return None where they are in place. Raise StorageError where its checkpoint is gone.
        """
        best = self.best_step
        if best is None or best == self.state.global_step:
            return None
        checkpoint = self.checkpoints / f"checkpoint-{best}"
        if not checkpoint.download():
            raise StorageError(
                f"storage: '{checkpoint}', which train.keep=best keeps, is gone; the same command "
                "trains it again"
            )
        weights = load_tensors(checkpoint.path, _WEIGHTS)
        self.parallel.replace_weights(self.trained, weights)
        return best

    # --- writing and reading --------------------------------------------------------------

    def write_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.clock.stop()
        staged = staging(self.checkpoints)
        pause()  # the others wait for the one that writes
        if self.args.should_save:
            beat("writing a checkpoint", bulk=True)
            shutil.rmtree(staged, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # or it would take another worker's files with it
        super().write_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.checkpoints.objects is not None:
            gather_random_states(staged / f"checkpoint-{self.state.global_step}", self.accelerator)
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            publish_checkpoint(self.checkpoints, name, needs=self.best_of)
        self.accelerator.wait_for_everyone()
        self.clock.start()

    def checkpoints_directory(self) -> str:
        return os.fspath(staging(self.checkpoints))

    def write_weights(self, directory: str | None) -> None:
        writes = self.args.should_save and directory is not None
        if writes or self.parallel.gathers:
            weights = self.parallel.weights(self.trained)
        if writes and directory is not None:
            save_tensors(weights, Path(directory), _WEIGHTS)

    def write_optimizer_state(self, directory: str) -> None:
        if self.args.should_save or self.parallel.gathers:
            moments = self.parallel.moments(self.trained, self.optimizer)
        refused = self.refused_samples()  # all workers count together
        if self.args.should_save:
            save_tensors(moments, Path(directory), _MOMENTS)
            scheduler: Any = self.lr_scheduler
            progress = TrainingProgress(
                train_seconds=self.train_seconds,
                schedule_steps=scheduler.last_epoch,
                learning_rate=scheduler.get_last_lr()[0],
                schedule=schedule_state(self.train_config, scheduler),
                refused=refused or None,
            )
            save_progress(progress, Path(directory))
            if self.base_scores is not None:
                save_tensors({"table": self.base_scores}, Path(directory), _BASE_SCORES)

    def read_weights(self, checkpoint: str) -> None:
        self.resumed_weights = load_tensors(Path(checkpoint), _WEIGHTS)
        self.parallel.load_weights(self.trained, self.resumed_weights)

    def prepare_training(self, max_steps: int, loader: Any, checkpoint: str | None) -> Any:
        if checkpoint is not None and self.is_deepspeed_enabled:
            self.read_weights(checkpoint)
        # Not told of the checkpoint: each strategy has a format of its own there, rayfin has one.
        prepared = super().prepare_training(max_steps, loader, None)
        self.parallel.prepared(self.optimizer)
        if (before := self.continued) is not None and checkpoint is None:
            self.parallel.load_moments(self.trained, self.optimizer, before.moments, before.weights)
        if checkpoint is not None:
            self.continued = None  # the checkpoint was written later
            directory = Path(checkpoint)
            moments = load_tensors(directory, _MOMENTS)
            self.parallel.load_moments(self.trained, self.optimizer, moments, self.resumed_weights)
            if self.accelerator.scaler is not None:  # of fp16 only
                self.read_scaler(checkpoint)
            progress = load_progress(directory)
            resume_schedule(self.lr_scheduler, progress)
            self.clock.before = progress.train_seconds
            self._refused_before = progress.refused or 0
            if self.base_scores is None and (directory / f"{_BASE_SCORES}.safetensors").exists():
                self.base_scores = load_tensors(directory, _BASE_SCORES)["table"]
        self.resumed_weights = {}
        return prepared

    def read_random_states(self, checkpoint: str | None) -> None:
        try:
            super().read_random_states(checkpoint)
        except UnpicklingError as error:
            raise TrialError(
                f"'{checkpoint}': its random states are no plain values, so that they are not read "
                "(a pickle can run code); remove this directory, and the trial goes on from the "
                "checkpoint before it or begins anew"
            ) from error
