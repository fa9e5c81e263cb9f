"""The steps of workers that train a trial together: load, shard, and read back what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from rayfin.config import TrainConfig
from rayfin.hardware import Hardware
from rayfin.methods import load_training_state, training_state
from rayfin.training.optimizer_state import Tensors, named_state, states_of
from rayfin.training.strategies import WorkerLayout, share_of_step

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every trained number, by PyTorch's names."""


class ParallelStrategy:
    """The strategy of a process alone, and of workers that each hold all (DDP); the base of others.

    What a trial has learned is read and written whole and in float32, by the names that it has in
    the model as `attach` returns it: a checkpoint knows nothing of strategies and workers.
    """

    together = False
    """Whether all workers must call the model equally often, as a part of it is with each."""
    gathers = False
    """Whether all workers must take part in reading back whole what is trained."""
    on_host = False
    """Whether the base is loaded into host memory, from where the strategy takes its part."""
    keeps_dtype = False
    """Whether weights that method.type=full trains stay as loaded, with float32 copies aside."""

    def __init__(self, group: WorkerLayout, hardware: Hardware, train: TrainConfig) -> None:
        self.group, self.hardware, self.train = group, hardware, train
        self.share = share_of_step(train, group.size)

    @property
    def precision(self) -> str:
        """Return the type in which products are computed."""
        if self.hardware.device == "cpu":
            return "float32"
        return "bfloat16" if self.hardware.bf16 else "float16"

    def arguments(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return what TrainingArguments need beside rayfin's own settings, to train `model`."""
        return {"use_cpu": self.hardware.device == "cpu"}

    def loading(self) -> AbstractContextManager[None]:
        """Return the context in which the base is loaded."""
        return nullcontext()

    def shard(self, model: torch.nn.Module) -> None:
        """Give this worker its part of `model`, before a trainer has it."""

    def prepared(self, optimizer: Any) -> None:
        """Take the trainer's optimizer, once that is made and the model is wrapped."""

    def average_gradients(self, model: torch.nn.Module) -> None:
        """Average the gradients over the workers, after the last backward pass of a step.

        This does nothing where a wrapper around the model does it by itself.
        """

    def whole(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the adapter's parameters are whole on rank 0.

        All workers must enter it.
        """
        return nullcontext()

    def weights(self, model: torch.nn.Module) -> Tensors:
        """Return all that is trained, whole on rank 0.

        All workers must call it where `gathers`.
        """
        return training_state(model)

    def load_weights(self, model: torch.nn.Module, weights: Tensors) -> None:
        """Put `weights` back; all workers must call it, before the trainer wraps `model`."""
        load_training_state(model, weights)

    def replace_weights(self, model: torch.nn.Module, weights: Tensors) -> None:
        """Put other `weights` in place after the training; all workers must call it."""
        self.load_weights(model, weights)

    def moments(self, model: torch.nn.Module, optimizer: Any) -> Tensors:
        """Return the optimizer's state of `model`, whole and by name; see `weights`.

        `optimizer` is the trainer's, in the wrappers of Accelerate; `optimizer_state` says by which
        names.
        """
        state = _inner(optimizer).state
        kept = {name: state[p] for name, p in trained(model) if p in state}
        return named_state(kept, self._assemble)

    def load_moments(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        moments: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
    ) -> None:
        """Put `moments` back into the optimizer that the trainer has just made.

        `weights` are those that `load_weights` has put back, for an optimizer with copies of them.
        """
        inner = _inner(optimizer)
        states = states_of(dict(trained(model)), moments, self._part)
        names = {parameter: name for name, parameter in trained(model)}
        numbered = (p for group in inner.param_groups for p in group["params"])
        state = {n: states[names[p]] for n, p in enumerate(numbered) if names[p] in states}
        groups = inner.state_dict()["param_groups"]
        inner.load_state_dict({"state": state, "param_groups": groups})

    def _assemble(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the optimizer as one whole."""
        return tensor

    def _part(self, whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return what this worker keeps of a whole tensor beside `parameter`."""
        return whole.to(parameter.device)


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the names and parameters that are trained."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself, without the wrappers of Accelerate."""
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = wrapped
    found: torch.optim.Optimizer = optimizer
    return found
