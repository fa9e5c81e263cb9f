"""Transformers' private names: the steps of its Trainer, and marks on its models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.training_args import OptimizerNames

from rayfin.compat.private import PrivateName
from rayfin.compat.versions import check_trainer

with redirect_stdout(sys.stderr):  # where WANDB_MODE=offline, it prints that, among the results
    from transformers import Trainer
    from transformers import trainer as _trainer

TRAINER_STATE_NAME: str = _trainer.TRAINER_STATE_NAME
_name = partial(PrivateName, __name__)
_step = partial(_name, "transformers", instead="a documented method of Trainer to override")

STEPS = (
    _step(
        "Trainer._save_checkpoint",
        needed_to="write a checkpoint beside the others before it counts",
        parameters=("model", "trial"),
    ),
    _step(
        "Trainer._get_output_dir",
        needed_to="say where a checkpoint is written",
        parameters=("trial",),
    ),
    _step(
        "Trainer._save_optimizer_and_scheduler",
        needed_to="write the optimizer's state alike for every strategy",
        parameters=("output_dir",),
    ),
    _step(
        "Trainer._load_from_checkpoint",
        needed_to="read weights alike for every strategy",
        parameters=("resume_from_checkpoint", "model"),
    ),
    _step(
        "Trainer._prepare_for_training",
        needed_to="read the optimizer's state alike for every strategy",
        parameters=("max_steps", "train_dataloader", "resume_from_checkpoint"),
    ),
    _step(
        "Trainer._load_scaler",
        needed_to="go on with the scale of float16's gradients",
        parameters=("checkpoint",),
    ),
    _step(
        "Trainer._load_rng_state",
        needed_to="refuse random states that are no plain values",
        parameters=("checkpoint",),
    ),
    _step(
        "Trainer.save_model",
        needed_to="write what is trained alike for every strategy",
        parameters=("output_dir", "_internal_call"),
    ),
    _step(
        "Trainer._sync_replicated_trainable_parameters",
        needed_to="average an adapter's gradients in one message",
        parameters=("model",),
    ),
    _step(
        "Trainer._defer_fsdp_gradient_reduction",
        needed_to="sum gradients on each worker until the last batch of a step",
        parameters=(),
    ),
)
"""What `SteppedTrainer` overrides."""
_SHARDED = _name(
    "transformers",
    "PreTrainedModel._is_distributed_loading_by_transformers",
    needed_to="hand Trainer a model that FSDP has sharded",
    instead="an argument of Trainer that says that a model is in place",
)
_WHOLE_LAYERS = _name(
    "transformers",
    "PreTrainedModel._no_split_modules",
    needed_to="know which layers FSDP shards, each as one",
    instead="a public list of a model's layer classes",
)

check_trainer()
# A step that was renamed would no longer be called, and nothing would say so.
for _one in STEPS:
    _one.check()


class SteppedTrainer(Trainer):
    """Transformers' Trainer with a public method to override for each private step of a training.

    By default each method does what Transformers does.
    """

    def write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint of the state as it is."""
        super()._save_checkpoint(model, trial)

    def checkpoints_directory(self) -> str:
        """Return the directory in which `write_checkpoint` makes one of its own."""
        return super()._get_output_dir(None)

    def write_weights(self, directory: str | None) -> None:
        """Write what is trained; called on all workers, without a directory where none writes."""
        super().save_model(directory, _internal_call=True)

    def write_optimizer_state(self, directory: str) -> None:
        """Write the state of the optimizer and its schedule; called on all workers."""
        super()._save_optimizer_and_scheduler(directory)

    def read_weights(self, checkpoint: str) -> None:
        """Read what is trained from a checkpoint."""
        super()._load_from_checkpoint(checkpoint)

    def read_scaler(self, checkpoint: str) -> None:
        """Read the scale of float16's gradients from a checkpoint."""
        super()._load_scaler(checkpoint)

    def read_random_states(self, checkpoint: str | None) -> None:
        """Set this worker's random states to those of a checkpoint."""
        super()._load_rng_state(checkpoint)

    def prepare_training(self, max_steps: int, loader: Any, checkpoint: str | None) -> Any:
        """Make the optimizer, and wrap the model; read the optimizer's state of a checkpoint."""
        whole: Any = super()
        return whole._prepare_for_training(max_steps, loader, checkpoint)

    def average_adapter_gradients(self, model: nn.Module) -> None:
        """Average the gradients of an adapter that is whole on each worker of FSDP."""
        whole: Any = super()
        whole._sync_replicated_trainable_parameters(model)

    @contextmanager
    def without_gradient_reduction(self) -> Iterator[None]:
        """Have FSDP leave gradients on each worker within the block."""
        whole: Any = super()
        with whole._defer_fsdp_gradient_reduction():
            yield

    # --- what Transformers calls --------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.write_weights(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.write_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints_directory()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.write_optimizer_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.read_weights(resume_from_checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.read_random_states(checkpoint)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        return self.prepare_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        self.average_adapter_gradients(model)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        with self.without_gradient_reduction():
            yield


def mark_sharded(model: Any) -> None:
    """Have Trainer neither move nor wrap `model`, which is sharded by then."""
    _SHARDED.get()
    model._is_distributed_loading_by_transformers = True


def layer_classes(model: Any) -> list[str]:
    """Return the names of the classes of a model's layers."""
    names: list[str] | None = _WHOLE_LAYERS.of(model)
    return sorted(names or ())


def missing_for_optimizer(name: str) -> str | None:
    """Return what keeps Transformers from making one of its optimizers; None for no name of its.

    It says itself which package is missing. Where none is, the answer is that rayfin does without.
    """
    if name not in {it.value for it in OptimizerNames}:
        return None
    arguments: Any = SimpleNamespace(
        optim=OptimizerNames(name),
        optim_args=None,
        optim_target_modules=None,
        learning_rate=1.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        warmup_steps=0,
    )
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        return " ".join(str(error).split()).rstrip(".")
    except Exception as error:  # noqa: BLE001 - of a package that is there, or a failed import
        reason = " ".join(str(error).split()).rstrip(".")
        return reason if "import" in reason or "nstall" in reason else "rayfin can't resume it"
    return "rayfin can't resume it"
