"""Transformers' Trainer, taught three things: our loss, our scores, and whole checkpoints."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from rayfin.config import MethodConfig, TrainConfig
from rayfin.data import TokenizedCorpus
from rayfin.errors import TrialDiverged
from rayfin.hardware import Hardware
from rayfin.methods import after_optimizer_step, regularizer
from rayfin.paths import write_json
from rayfin.training.batches import Collator, PlannedSamples, plan_samples
from rayfin.training.checkpoint import load_state, publish_checkpoint, save_state, staging
from rayfin.training.scoring import Scores, completion_logits, score

_SECONDS = "train_seconds.json"


def training_arguments(
    train: TrainConfig, hardware: Hardware, directory: Path
) -> TrainingArguments:
    """Evaluation, saving and the order of samples are ours; all else is Transformers'."""
    cuda = hardware.device == "cuda"
    return TrainingArguments(
        output_dir=os.fspath(directory),
        max_steps=train.max_steps,
        learning_rate=train.learning_rate,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        activation_checkpointing=train.gradient_checkpointing,
        seed=train.seed,
        use_cpu=not cuda,
        bf16=cuda and hardware.bf16,
        fp16=cuda and not hardware.bf16,
        train_sampling_strategy="sequential",
        eval_strategy="no",
        save_strategy="no",
        logging_steps=max(1, train.max_steps // 100),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
    )


class TrialTrainer(Trainer):
    """Trains one trial; `curve` and `train_seconds` survive a resume with the checkpoint."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        method: MethodConfig,
        train: TrainConfig,
        data: TokenizedCorpus,
        pad_token_id: int,
        hardware: Hardware,
        directory: Path,
        on_evaluation: Callable[[TrialTrainer], bool | None],
        num_workers: int = 1,
    ) -> None:
        samples_per_step = (
            train.per_device_train_batch_size * train.gradient_accumulation_steps * num_workers
        )
        plan = plan_samples(
            [len(sample["input_ids"]) for sample in data.train],
            batch_size=samples_per_step,
            max_steps=train.max_steps,
            seed=train.seed,
            group_by_length=train.group_by_length,
        )
        planned = PlannedSamples(data.train, plan)
        super().__init__(
            model=model,
            args=training_arguments(train, hardware, directory),
            train_dataset=planned,
            data_collator=Collator(pad_token_id, train.packing),
            callbacks=[_Flow(self)],
        )
        self.remove_callback(PrinterCallback)
        # The loss below is a sum over tokens divided by the tokens of the whole step.
        self.model_accepts_loss_kwargs = True
        self.method, self.train_config, self.samples = method, train, data
        self.trained: torch.nn.Module = model  # as it was given: never wrapped, never None
        self.pad_token_id, self.directory = pad_token_id, directory
        self.on_evaluation = on_evaluation
        self.planned, self.samples_per_step = planned, samples_per_step
        self.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.scores: dict[str, float] = {}
        self.stopped = False
        self._clock = _Clock()

    # --- the loss -------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        logits, targets, _ = completion_logits(model, inputs)
        loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
        loss = loss / (num_items_in_batch if num_items_in_batch is not None else len(targets))
        # DDP averages gradients over workers, but the tokens counted are those of all workers.
        loss = loss * self.accelerator.num_processes
        if (penalty := regularizer(model, self.method)) is not None:
            loss = loss + penalty / self.args.gradient_accumulation_steps
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in ("loss", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise TrialDiverged(
                    f"{name} became {logs[name]} at step {self.state.global_step}; "
                    f"lower train.learning_rate ({self.train_config.learning_rate:g})"
                )
        super().log(logs, start_time)

    # --- the scores -----------------------------------------------------------------------

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Scores the validation samples, every worker a share of them."""
        self._clock.stop()
        rank, workers = self.accelerator.process_index, self.accelerator.num_processes
        own = score(
            self.trained,
            self.samples.eval[rank::workers],
            batch_size=self.train_config.per_device_eval_batch_size,
            pad_token_id=self.pad_token_id,
        )
        metrics = self._sum_over_workers(own).metrics()
        self.log(dict(metrics))
        self.scores = metrics
        # The last evaluation is not asked about: it goes into the result.
        last = self.state.global_step >= self.train_config.max_steps
        if not last and self._any_worker(self.on_evaluation(self) is False):
            self.stopped = True
            self.control.should_training_stop = True
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._clock.start()
        return metrics

    def _any_worker(self, flag: bool) -> bool:
        """True on all workers if it is true on one: they must leave the loop together."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags).item())

    def _sum_over_workers(self, own: Scores) -> Scores:
        if self.accelerator.num_processes == 1:
            return own
        sums = torch.tensor(
            [own.loss, own.tokens, own.correct, own.exact, own.samples],
            dtype=torch.float64,
            device=self.accelerator.device,
        )
        loss, tokens, correct, exact, samples = self.accelerator.reduce(sums).tolist()
        return Scores(loss, int(tokens), int(correct), int(exact), int(samples))

    @property
    def train_seconds(self) -> float:
        """Seconds spent in optimizer steps, those before a resume included."""
        return self._clock.before + self._clock.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on a second, in this process's part of the trial."""
        first = self._clock.first_step * self.samples_per_step
        tokens = self.planned.tokens(first, self.state.global_step * self.samples_per_step)
        return tokens / self._clock.seconds if self._clock.seconds else 0.0

    @property
    def curve(self) -> list[dict[str, Any]]:
        """{step, loss} and {step, eval_loss, …} in the order they came, resumed parts included."""
        kept = ("loss", "eval_loss", "exact_match", "token_accuracy")
        points = ({k: e[k] for k in ("step", *kept) if k in e} for e in self.state.log_history)
        return [point for point in points if len(point) > 1]

    # --- checkpoints ----------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._clock.stop()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(self.directory, f"checkpoint-{self.state.global_step}")
        self.accelerator.wait_for_everyone()
        self._clock.start()

    def _get_output_dir(self, trial: Any) -> str:
        return os.fspath(staging(self.directory))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save and output_dir is not None:
            shutil.rmtree(output_dir, ignore_errors=True)
            save_state(self.trained, Path(output_dir))
            write_json(Path(output_dir) / _SECONDS, self.train_seconds)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(self.trained, Path(resume_from_checkpoint))
        self._clock.before = json.loads((Path(resume_from_checkpoint) / _SECONDS).read_text())


class _Clock:
    """Time in the training loop, without evaluations, reports and checkpoints."""

    def __init__(self) -> None:
        self.before = 0.0  # of the processes that this trial was resumed from
        self.first_step = 0
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None


class _Flow(TrainerCallback):
    """When to evaluate and save: every so many steps, and at the last."""

    def __init__(self, trainer: TrialTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._clock.first_step = state.global_step
        self.trainer._clock.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._clock.stop()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        after_optimizer_step(self.trainer.trained, self.trainer.method, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        train = self.trainer.train_config
        last = state.global_step == train.max_steps
        control.should_evaluate = last or state.global_step % train.evaluate_every == 0
        # The last checkpoint would be deleted at once: the adapter is written instead.
        control.should_save = not last and state.global_step % train.save_every == 0
