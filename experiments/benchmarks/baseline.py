"""The other side of the comparisons: TRL's SFTTrainer, configured with care, on the same samples.

Checkpointing and bf16 are off, as both slow a CPU down; samples come tokenised, with their labels,
in an order that leaves no padding to speak of: the very order that rayfin trains in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SEED = 0


def train_with_trl(
    model_path: str,
    train: list[dict[str, Any]],
    evaluation: list[dict[str, Any]],
    *,
    learning_rate: float,
    batch_size: int,
    max_steps: int,
    output_dir: str,
    rank: int = 8,
    evaluate_every: int | None = None,
    evaluated: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Loads the model, trains LoRA on all linear layers, evaluates once; seconds and losses.

    With `evaluate_every`, it evaluates after every so many steps instead, calls `evaluated` with
    the step and the loss, and leaves the adapter in `output_dir` before the last call.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    class LoopClock(TrainerCallback):
        """Times what rayfin times: the steps, not the making of optimizer and data loader."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    class Evaluations(TrainerCallback):
        """Passes on each evaluation's loss."""

        def on_evaluate(self, args: Any, state: Any, control: Any, **told: Any) -> None:
            if state.global_step >= max_steps:
                told["model"].save_pretrained(output_dir)
            evaluated(state.global_step, float(told["metrics"]["eval_loss"]))

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    set_seed(SEED)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(evaluation),
        peft_config=LoraConfig(
            r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=SFTConfig(
            output_dir=output_dir,
            max_steps=max_steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=64,  # one batch: TRL averages over batches
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            weight_decay=0.0,
            seed=SEED,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            logging_steps=1,
            save_strategy="no",
            eval_strategy="steps" if evaluate_every else "no",
            eval_steps=evaluate_every,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    clock = LoopClock()
    trainer.add_callback(clock)
    if evaluate_every:
        trainer.add_callback(Evaluations())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "train_seconds": clock.seconds,
        "losses": losses,
        "eval_loss": losses[-1] if evaluate_every else trainer.evaluate()["eval_loss"],
    }
