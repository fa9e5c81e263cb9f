"""AdaLoRA: ranks that move between layers during training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rayfin.compat.peft import rank_allocator
from rayfin.methods.adapted import TARGET_MODULES, LowRankMethod, whole
from rayfin.methods.attach import ADAPTER
from rayfin.methods.base import Incompatibility, register
from rayfin.methods.layers import Linear
from rayfin.methods.module_names import Names, listed
from rayfin.methods.rates import Rate

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

_RANK_PATTERN = "adalora.rank_pattern/"
_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@register
class AdaloraConfig(LowRankMethod):
    """Ranks moved between layers during training (Zhang et al. 2023, arXiv:2303.10512)."""

    title = "AdaLoRA"
    order = 5
    engines = ("transformers",)
    rate = Rate(of_lora=True, source="PEFT's comparison gives it LoRA's rate")
    coordinates = (0.3, 0.4)
    capacity = "target_r"
    capacity_is_free = False  # init_r has to be above it

    type: Literal["adalora"]
    init_r: int = Field(12, ge=1)
    """Rank of every update before the budget shrinks."""
    target_r: int = Field(8, ge=1)
    """Average rank that the budget shrinks to; at most init_r."""
    lora_alpha: float = Field(16, gt=0)
    """The update is scaled by lora_alpha / rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the update matrices."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Module names that get an update, or `all-linear`."""
    orth_reg_weight: float = Field(0.5, ge=0)
    """Weight of the penalty that keeps P and Q orthogonal."""

    @property
    def rank(self) -> int:
        return self.init_r

    def layer_parameters(self, linear: Linear, rank: int) -> float:
        """Return the number of trained parameters: those of A and B, and the singular values."""
        return super().layer_parameters(linear, rank) + rank

    def peft_config(self, max_steps: int, tokenizer_path: str) -> PeftConfig:
        """Return a schedule with full rank for the first tenth of the steps and the target rank for
        the last quarter; between them it is the cubic one of arXiv:2303.10512."""
        import peft

        return peft.AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=whole(self.lora_alpha),  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules=listed(self.target_modules),
            modules_to_save=listed(self.modules_to_save),  # type: ignore[arg-type]
            orth_reg_weight=self.orth_reg_weight,
            total_step=max_steps,
            tinit=max_steps // 10,
            tfinal=max(1, max_steps // 4),
            deltaT=max(1, max_steps // 100),
        )

    def strategy_refusal(self, strategy: str) -> str | None:
        if not strategy.startswith("deepspeed"):
            return None
        return (
            "AdaLoRA moves its rank budget by the gradients that are left after an optimizer step, "
            "and DeepSpeed has handed them out by then; use ddp or fsdp"
        )

    def refusals(self, max_steps: int) -> Iterator[Incompatibility]:
        if self.target_r >= self.init_r:
            yield Incompatibility(
                f"method.target_r={self.target_r} with method.init_r={self.init_r}",
                "there is no budget to take away",
                f"use a target_r below {self.init_r}",
            )
        if max_steps < 4:
            yield Incompatibility(
                f"train.max_steps={max_steps}",
                "the rank budget needs a start, a middle and an end",
                "use at least 4 steps",
            )

    def continuation_refusal(self) -> Incompatibility:
        return Incompatibility(
            f"method.init_from={self.init_from}",
            "its ranks were given out over the steps of its training, and the adapter has only "
            "those that were left at the end",
            "train anew with more train.max_steps",
        )

    def regularizer(self, model: torch.nn.Module) -> torch.Tensor | None:
        """Return the orthogonality penalty, the mean over matrices of ||P P^T - I||_F.

        Equation 4 of arXiv:2303.10512. PEFT adds it to a loss that the model itself computes; ours
        is computed outside.
        """
        import torch

        if self.orth_reg_weight == 0:
            return None
        norms = []
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                identity = torch.eye(len(gram), device=gram.device)
                norms.append(torch.linalg.matrix_norm(gram - identity))
        return self.orth_reg_weight * torch.stack(norms).mean()

    def after_optimizer_step(self, model: torch.nn.Module, step: int) -> None:
        """Move the rank budget after the update, while the gradients are still there."""
        model.base_model.update_and_allocate(step)  # type: ignore[operator,union-attr]

    @classmethod
    def state_beside(cls, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return importance scores and masks of ranks, which an adapter file lacks."""
        import torch

        if (allocator := rank_allocator(model, ADAPTER)) is None:
            return {}
        state: dict[str, torch.Tensor] = {}
        for kind in _IMPORTANCE:
            for name, score in getattr(allocator, kind).items():
                state[f"adalora.{kind}/{name}"] = score
        for name, kept in (allocator.peft_config.rank_pattern or {}).items():
            state[f"{_RANK_PATTERN}{name}"] = torch.tensor(kept, dtype=torch.bool)
        return state

    @classmethod
    def load_state_beside(cls, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        if (allocator := rank_allocator(model, ADAPTER)) is None:
            return
        device = next(model.parameters()).device
        for kind in _IMPORTANCE:
            scores = _under(f"adalora.{kind}/", state)
            setattr(allocator, kind, {name: score.to(device) for name, score in scores.items()})
        pattern = {name: kept.tolist() for name, kept in _under(_RANK_PATTERN, state).items()}
        allocator.peft_config.rank_pattern = pattern or None

    @classmethod
    def usual(cls, rank: int, length: int) -> dict[str, Any]:
        # The initial rank is half as much again: PEFT's defaults, 12 and 8.
        return {
            "init_r": rank * 3 // 2,
            "target_r": rank,
            "lora_alpha": cls.usual_alpha,
            "target_modules": TARGET_MODULES,
        }

    @classmethod
    def of_capacity(cls, capacity: int) -> dict[str, Any]:
        return {
            "target_r": capacity,
            "lora_alpha": cls.usual_alpha,
            "init_r": max(capacity * 3 // 2, capacity),
        }


def _under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
