"""Transformers' Trainer with a loss, scores and checkpoints of our own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import PrinterCallback

from rayfin.compat.deepspeed import element_count
from rayfin.errors import TrialDiverged
from rayfin.heartbeat import beat, pause
from rayfin.metrics import GENERATIONS, METRICS
from rayfin.objectives import Objective
from rayfin.objectives.base import Batch
from rayfin.objectives.tensors import adapter_disabled
from rayfin.paths import StoragePath
from rayfin.training.arguments import training_arguments
from rayfin.training.batches import Collator
from rayfin.training.checkpointed_trainer import CheckpointedTrainer
from rayfin.training.clock import Clock
from rayfin.training.curve import curve_of
from rayfin.training.flow import Flow
from rayfin.training.learning_rates import divide_groups
from rayfin.training.parallel import ParallelStrategy
from rayfin.training.preemption import PreemptionWatch
from rayfin.training.schedules import own_schedule
from rayfin.training.scoring import score_together
from rayfin.training.selection import evaluations_without_gain
from rayfin.training.spec import TrialSpec
from rayfin.training.trial_inputs import TrialCallbacks, TrialData


class TrialTrainer(CheckpointedTrainer):
    """Trains one trial; `curve` and `train_seconds` survive a resume with the checkpoint.

    What is specific to the trial's objective, its loss and scores, the objective does.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: TrialSpec,
        data: TrialData,
        callbacks: TrialCallbacks,
        *,
        parallel: ParallelStrategy,
        checkpoints: StoragePath,
    ) -> None:
        train, planned, method = spec.train, data.planned, spec.method
        self.objective: Objective = data.objective
        self.trainable_parameters = sum(
            element_count(p) for p in model.parameters() if p.requires_grad
        )
        parallel.shard(model)
        self.clock = Clock()
        stepped = partial(method.after_optimizer_step, model)
        flow = Flow(train, self.clock, self._score_base, stepped, self._to_be_saved_now)
        super().__init__(
            model=model,
            args=training_arguments(parallel, model, checkpoints.path),
            train_dataset=planned,
            data_collator=Collator(self.objective, data.pad_token_id, train.packing),
            callbacks=[flow],
        )
        self.remove_callback(PrinterCallback)
        # The loss below is a sum over its terms divided by those of the whole step.
        self.model_accepts_loss_kwargs = True
        self.method, self.train_config, self.held_out = method, train, data.held_out
        self.parallel, self.base_scores = parallel, data.base_scores
        self._preemption = PreemptionWatch(callbacks.preempted)
        self.trained: torch.nn.Module = model  # as it was given: never wrapped, never None
        self.pad_token_id, self.checkpoints = data.pad_token_id, checkpoints
        self._evaluated, self._generate = callbacks.evaluated, data.generate
        self.planned = planned
        self.samples_per_step = len(planned) // train.max_steps
        self.scores: torch.Tensor | None = None
        self.resumed_weights: dict[str, torch.Tensor] = {}
        self.continued = data.continued
        self.stopped = False
        self.metric, self.keeps_best = spec.metric, train.keep == "best"
        self.ended_early = False
        """Whether early stopping ended the trial before its last step."""
        self.kept_step: int | None = None
        """The step of the evaluation whose weights were put back in the end, if any were."""

    # --- the loss -------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        assert isinstance(num_items_in_batch, torch.Tensor)  # by `get_batch_samples`
        # In large data, all answers of a step may lie beyond max_length.
        loss = self.objective.loss(model, inputs) / num_items_in_batch.clamp(min=1)
        # DDP averages gradients over workers, but the terms counted are those of all workers.
        loss = loss * self.accelerator.num_processes
        if (penalty := self.method.regularizer(model)) is not None:
            loss = loss + penalty / self.args.gradient_accumulation_steps
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """Return the batches of a step, and the terms of their loss on all workers, as a float."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = [self.objective.count(batch) for batch in batches]
        count = (torch.stack(counts).sum() if counts else torch.tensor(0)).to(device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count).sum()
        return batches, count.float()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, with the parameters of each learning rate in groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        divide_groups(optimizer, self.trained, self.method.rate_factor)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Transformers' own, but for those that it ties to evaluations of its own."""
        own = own_schedule(self.train_config, self.optimizer, num_training_steps)
        self.lr_scheduler = self.lr_scheduler or own
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        beat(f"training step {self.state.global_step + 1}")
        if self.continued is not None:  # not before: what was made until now may draw, too
            self.continued.set_random()
            self.continued = None
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self.parallel.average_gradients(self.trained)
        return loss

    def average_adapter_gradients(self, model: torch.nn.Module) -> None:
        """Does nothing: adapters were drawn from one seed, and `training_step` keeps them equal.

        Transformers would send each of their gradients in a message of its own.
        """

    @contextmanager
    def without_gradient_reduction(self) -> Iterator[None]:
        """Sums gradients on each worker, until the last batch of a step."""
        sharded: Any = self.trained
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in ("loss", *self.objective.metrics):
            checked = name == "loss" or METRICS[name].diverges
            if checked and name in logs and not math.isfinite(logs[name]):
                raise TrialDiverged(
                    f"{name} became {logs[name]} at step {self.state.global_step}; "
                    f"lower train.learning_rate ({self.train_config.learning_rate:g})"
                )
        super().log(logs, start_time)

    # --- the scores -----------------------------------------------------------------------

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Scores the validation samples, every worker a share of them."""
        self.clock.stop()
        self.scores = self._score()
        metrics = self.objective.scores(self.scores)
        self.log(dict(metrics))
        self._generate_samples()
        # The last evaluation is not asked about: it goes into the result.
        last = self.state.global_step >= self.train_config.max_steps
        self.ended_early = not last and self._gains_no_more()
        last = last or self.ended_early
        if self.accelerator.is_main_process:  # who is told pauses where it waits for an answer
            beat("recording an evaluation", bulk=True)
        else:
            pause()  # for the first worker
        if not last and self._any_worker(self._evaluated(self) is False):
            self.stopped = True
        beat("evaluated")
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.stopped or self.ended_early:
            self.control.should_training_stop = True
        if self.ended_early:  # a checkpoint from here would be gone on from after a kill
            self.control.should_save = False
        elif not last and self.best_step == self.state.global_step:
            self.control.should_save = True
        self.clock.start()
        return metrics

    def _generate_samples(self) -> None:
        """Note what the model answers now to a few held-out questions, on the first worker."""
        if self._generate is None:
            return
        if self.accelerator.is_main_process:
            with self.accelerator.autocast():
                answers = self._generate(self.trained)
            logged: list[dict[str, Any]] = self.state.log_history
            logged.append({"step": self.state.global_step, GENERATIONS: answers})
        else:
            pause()  # as long as the first worker generates
        self.accelerator.wait_for_everyone()

    def _gains_no_more(self) -> bool:
        patience = self.train_config.early_stopping_patience
        if patience is None or self.metric is None:
            return False
        threshold = self.train_config.early_stopping_threshold
        waited = evaluations_without_gain(self.curve, self.metric, threshold)
        return self._any_worker(waited >= patience)

    def return_to_best(self) -> None:
        """Put the weights and scores of the best evaluation back where train.keep asks for them."""
        if not self.stopped and (best := self.read_best()) is not None:
            self.scores, self.kept_step = self._score(), best

    def _score(self) -> torch.Tensor:
        return score_together(
            self.accelerator,
            self.trained,
            self.held_out,
            self.objective,
            batch_size=self.train_config.per_device_eval_batch_size,
            pad_token_id=self.pad_token_id,
            in_parts=self.parallel.together,
        )

    def _score_base(self) -> None:
        """Scores the base model, where neither the caller nor a checkpoint has its scores.

        A model whose own weights have been trained, and whose checkpoint is of a rayfin that did
        not keep them, goes without.
        """
        if self.base_scores is not None:
            return
        if not self.method.alters_base:
            with adapter_disabled(self.trained):
                self.base_scores = self._score()
        elif self.state.global_step == 0:  # nothing has been trained yet
            self.base_scores = self._score()

    def _any_worker(self, flag: bool) -> bool:
        """True on all workers if it is true on one: they must leave the loop together."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags).item())

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on a second, in this process's part of the trial."""
        first = self.clock.first_step * self.samples_per_step
        tokens = self.planned.tokens(first, self.state.global_step * self.samples_per_step)
        return tokens / self.clock.seconds if self.clock.seconds else 0.0

    @property
    def curve(self) -> list[dict[str, Any]]:
        """What was measured so far, resumed parts included, as `TrialResult.curve` has it."""
        return curve_of(self.state.log_history, self.objective.metrics)

    def _to_be_saved_now(self) -> bool:
        steps = self.state.global_step - self.clock.first_step
        return self._preemption.save_now(self.accelerator, steps, self.clock)
