"""DeepSpeed's ZeRO, stages 1 to 3, through Transformers' and Accelerate's integration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from rayfin.compat.accelerate import start_deepspeed_state
from rayfin.compat.deepspeed import (
    element_count,
    leave_out_shared_memory_operator,
    make_optimizer_state,
    part_size,
)
from rayfin.config import TrainConfig
from rayfin.hardware import Hardware
from rayfin.methods import load_state_beside, state_beside
from rayfin.training.optimizer_state import Tensors
from rayfin.training.parallel import MOMENTS, ParallelStrategy, trained
from rayfin.training.strategies import WorkerLayout
from rayfin.training.strategy_files import LARGEST_BUCKET, deepspeed_settings


class ZeroStrategy(ParallelStrategy):
    """DeepSpeed's ZeRO; see the base class."""

    def __init__(self, group: WorkerLayout, hardware: Hardware, train: TrainConfig) -> None:
        super().__init__(group, hardware, train)
        self.stage = int(group.strategy[-1])
        self.together = self.on_host = self.stage == 3
        self.gathers = self.keeps_dtype = True
        if hardware.device == "cpu":
            # Else DeepSpeed warns of what it did not find.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            leave_out_shared_memory_operator()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return what DeepSpeed is started with."""
        return deepspeed_settings(
            self.group.strategy,
            self.group.own,
            batch_size=self.share.batch_size,
            accumulation=self.share.accumulation,
            workers=self.group.size,
            max_grad_norm=self.train.max_grad_norm,
            precision=self.precision,
            offload=self.group.cpu_offload,
        )

    def settings_for(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return `settings`, with a buffer for gradients that is no larger than `model` can use.

        DeepSpeed allocates it whole, by default two gigabytes for the few megabytes of an adapter.
        """
        numbers = sum(element_count(p) for _, p in trained(model))
        bucket = {"reduce_bucket_size": min(LARGEST_BUCKET, numbers)}
        own = self.settings["zero_optimization"]
        return self.settings | {"zero_optimization": bucket | own}

    def arguments(self, model: torch.nn.Module) -> dict[str, Any]:
        start_deepspeed_state("nccl" if self.hardware.device == "cuda" else "gloo")
        return {
            "deepspeed": self.settings_for(model),
            "accelerator_config": {"use_configured_state": True},
        }

    @contextmanager
    def _sharded_loading(self) -> Iterator[None]:
        import deepspeed
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(
                "nccl" if self.hardware.device == "cuda" else "gloo", auto_mpi_discovery=False
            )
        # While it is there, Transformers hands every layer that it loads to ZeRO-3 at once.
        self._loading = HfDeepSpeedConfig(self.settings)
        yield

    def loading(self) -> AbstractContextManager[None]:
        return self._sharded_loading() if self.stage == 3 else nullcontext()

    def whole(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        return self._gathered([p for _, p in trained(model)])

    def _gathered(
        self, parameters: list[torch.nn.Parameter], *, write: bool = False
    ) -> AbstractContextManager[None]:
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0 if write else None
        )
        return context

    def weights(self, model: torch.nn.Module) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensors = {}
        for name, parameter in trained(model):
            whole = safe_get_full_fp32_param(parameter)
            if dist.get_rank() == 0:
                found[name] = whole.float().cpu().contiguous()
        if dist.get_rank() == 0:
            found |= {n: t.cpu().contiguous() for n, t in state_beside(model).items()}
        return found

    def load_weights(self, model: torch.nn.Module, weights: Tensors) -> None:
        for name, parameter in trained(model):
            with self._gathered([parameter], write=True), torch.no_grad():
                parameter.copy_(weights[name])
        load_state_beside(model, weights)

    def replace_weights(self, model: torch.nn.Module, weights: Tensors) -> None:
        self.load_weights(model, weights)
        for name, parameter in trained(model):  # the float32 copies, which `weights` reads
            self._put(parameter, weights[name], None)

    def moments(self, model: torch.nn.Module, optimizer: Any) -> Tensors:
        from deepspeed.utils import safe_get_full_optimizer_state

        found: Tensors = {}
        for name, parameter in trained(model):
            for moment in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, moment)
                if dist.get_rank() == 0:
                    found[f"{moment}/{name}"] = whole.float().cpu().contiguous()
        (step, *_) = [state["step"] for state in _flat(optimizer).state.values()]
        found["step"] = torch.tensor(float(step))
        return found

    def prepared(self, optimizer: Any) -> None:
        make_optimizer_state(optimizer.optimizer, self.stage, MOMENTS)

    def load_moments(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        moments: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
    ) -> None:
        for name, parameter in trained(model):
            self._put(parameter, weights[name], None)
            for moment in MOMENTS:
                self._put(parameter, moments[f"{moment}/{name}"], moment)
        for state in _flat(optimizer).state.values():
            step = state["step"]
            kept = isinstance(step, torch.Tensor)
            taken = float(moments["step"])
            state["step"] = torch.full_like(step, taken) if kept else int(taken)

    def _put(self, parameter: torch.nn.Parameter, whole: torch.Tensor, moment: str | None) -> None:
        """Write this worker's part of a float32 weight, or of a moment."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.stage < 3:
            if moment is None:
                safe_set_full_fp32_param(parameter, whole)
            else:
                safe_set_full_optimizer_state(parameter, whole, moment)
            return
        # DeepSpeed's own function for the whole reads past the end of the last, padded part.
        size = part_size(parameter)
        padded = torch.zeros(size * self.group.size)
        padded[: whole.numel()] = whole.flatten()
        local = padded.narrow(0, size * dist.get_rank(), size)
        if moment is None:
            safe_set_local_fp32_param(parameter, local)
        else:
            safe_set_local_optimizer_state(parameter, local, moment)


def _flat(optimizer: Any) -> torch.optim.Optimizer:
    """Return the AdamW over this worker's flat parts, without its two wrappers."""
    found: torch.optim.Optimizer = optimizer.optimizer.optimizer
    return found
