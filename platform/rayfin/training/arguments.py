"""What Transformers' Trainer is told of a trial."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from rayfin.training.parallel import ParallelStrategy
from rayfin.training.schedules import EVALUATED, warmup_steps


def training_arguments(
    parallel: ParallelStrategy, model: torch.nn.Module, directory: Path
) -> TrainingArguments:
    """Evaluation, saving and the order of samples are ours; all else is Transformers'."""
    train, cuda = parallel.train, parallel.hardware.device == "cuda"
    evaluated = train.lr_scheduler_type in EVALUATED  # `TrialTrainer` makes that schedule
    return TrainingArguments(
        output_dir=os.fspath(directory),
        max_steps=train.max_steps,
        learning_rate=train.learning_rate,
        per_device_train_batch_size=parallel.share.batch_size,
        gradient_accumulation_steps=parallel.share.accumulation,
        optim=train.optim,
        optim_args=train.optim_args,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        lr_scheduler_type="constant" if evaluated else train.lr_scheduler_type,
        lr_scheduler_kwargs=dict(train.lr_scheduler_kwargs) or None,
        metric_for_best_model="eval_loss" if evaluated else None,
        warmup_steps=warmup_steps(train, train.max_steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        activation_checkpointing=train.gradient_checkpointing,
        use_liger_kernel=train.use_liger_kernel,
        seed=train.seed,
        bf16=parallel.precision == "bfloat16",
        fp16=parallel.precision == "float16",
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
        **parallel.arguments(model),
    )
