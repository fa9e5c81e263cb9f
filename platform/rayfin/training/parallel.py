"""What the strategies do to a trial: loading, sharding, and reading what is trained back whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from rayfin.config import TrainConfig
from rayfin.hardware import Hardware
from rayfin.methods import load_training_state, training_state
from rayfin.training.strategies import WorkerLayout, share_of_step

if TYPE_CHECKING:
    from rayfin.training.trainer import TrialTrainer

Tensors = dict[str, torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every trained number, by PyTorch's names."""


def parallel(group: WorkerLayout, hardware: Hardware, train: TrainConfig) -> Parallel:
    """The strategy of `group`, which must be named by now."""
    if group.strategy == "fsdp":
        from rayfin.training.fsdp import FullySharded

        return FullySharded(group, hardware, train)
    if group.strategy.startswith("deepspeed"):
        from rayfin.training.zero import Zero

        return Zero(group, hardware, train)
    return Parallel(group, hardware, train)


class Parallel:
    """Every worker holds all (DDP), and a process alone; the others change what they must.

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
        """What products are computed in."""
        if self.hardware.device == "cpu":
            return "float32"
        return "bfloat16" if self.hardware.bf16 else "float16"

    def arguments(self, model: torch.nn.Module) -> dict[str, Any]:
        """What Transformers' TrainingArguments need beside rayfin's own, to train `model`."""
        return {"use_cpu": self.hardware.device == "cpu"}

    def loading(self) -> AbstractContextManager[None]:
        """Around loading the base."""
        return nullcontext()

    def shard(self, model: torch.nn.Module) -> None:
        """Gives this worker its part of `model`, before a trainer has it."""

    def prepared(self, trainer: TrialTrainer) -> None:
        """Once the trainer has made the optimizer and wrapped the model."""

    def average_gradients(self, model: torch.nn.Module) -> None:
        """After the last backward pass of a step; wrappers around a model do it by themselves."""

    def whole(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Inside, the adapter's parameters are whole on rank 0; entered by all workers."""
        return nullcontext()

    def weights(self, model: torch.nn.Module) -> Tensors:
        """All that is trained, whole on rank 0; called by all workers where `gathers`."""
        return training_state(model)

    def load_weights(self, model: torch.nn.Module, weights: Tensors) -> None:
        """Puts `weights` back; called by all workers, before the trainer wraps `model`."""
        load_training_state(model, weights)

    def moments(self, trainer: TrialTrainer) -> Tensors:
        """AdamW's state, `<moment>/<parameter>`, and `step`; as `weights`."""
        state = _inner(trainer.optimizer).state
        found: Tensors = {}
        for name, parameter in trained(trainer.trained):
            kept = state[parameter]
            found["step"] = torch.tensor(float(kept["step"]))
            for moment in MOMENTS:
                found[f"{moment}/{name}"] = self._assemble(kept[moment]).float().cpu()
        return found

    def load_moments(self, trainer: TrialTrainer, moments: Tensors) -> None:
        """Puts `moments` back into the optimizer that the trainer has just made."""
        optimizer = _inner(trainer.optimizer)
        names = {parameter: name for name, parameter in trained(trainer.trained)}
        numbered = (p for group in optimizer.param_groups for p in group["params"])
        state = {
            number: {"step": moments["step"].clone()}
            | {m: self._part(moments[f"{m}/{names[p]}"], p) for m in MOMENTS}
            for number, p in enumerate(numbered)
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _assemble(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the optimizer's, whole."""
        return tensor

    def _part(self, whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What of a whole tensor this worker keeps beside `parameter`."""
        return whole.to(parameter.device)


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """PyTorch's own, without the wrappers of Accelerate."""
    while not type(optimizer).__module__.startswith("torch."):
        optimizer = optimizer.optimizer
    found: torch.optim.Optimizer = optimizer
    return found
