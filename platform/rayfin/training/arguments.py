"""What Transformers' Trainer is told of a trial."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from rayfin.training.parallel import ParallelStrategy


def training_arguments(
    parallel: ParallelStrategy, model: torch.nn.Module, directory: Path
) -> TrainingArguments:
    """Evaluation, saving and the order of samples are ours; all else is Transformers'."""
    train, cuda = parallel.train, parallel.hardware.device == "cuda"
    return TrainingArguments(
        output_dir=os.fspath(directory),
        max_steps=train.max_steps,
        learning_rate=train.learning_rate,
        per_device_train_batch_size=parallel.share.batch_size,
        gradient_accumulation_steps=parallel.share.accumulation,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        activation_checkpointing=train.gradient_checkpointing,
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
