"""Everything a method must carry over a restart, as one flat dictionary of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayfin.methods.attach import ADAPTER

if TYPE_CHECKING:
    import torch

_RANK_PATTERN = "adalora.rank_pattern/"
_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def training_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters by name, and AdaLoRA's importance scores and masks.

    An adapter file is not enough to go on from: P-Tuning's holds the prompt encoder's output
    only, and AdaLoRA's has its masked ranks cut off.
    """
    import torch

    state = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    allocator = _rank_allocator(model)
    if allocator is not None:
        for kind in _IMPORTANCE:
            for name, score in getattr(allocator, kind).items():
                state[f"adalora.{kind}/{name}"] = score
        for name, kept in (allocator.peft_config.rank_pattern or {}).items():
            state[f"{_RANK_PATTERN}{name}"] = torch.tensor(kept, dtype=torch.bool)
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}


def load_training_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts `training_state` back; raises KeyError where `state` is of another model."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])
    allocator = _rank_allocator(model)
    if allocator is None:
        return
    device = next(model.parameters()).device
    for kind in _IMPORTANCE:
        prefix = f"adalora.{kind}/"
        scores = {
            k.removeprefix(prefix): v.to(device) for k, v in state.items() if k.startswith(prefix)
        }
        setattr(allocator, kind, scores)
    pattern = {
        name.removeprefix(_RANK_PATTERN): kept.tolist()
        for name, kept in state.items()
        if name.startswith(_RANK_PATTERN)
    }
    allocator.peft_config.rank_pattern = pattern or None


def _rank_allocator(model: torch.nn.Module):  # type: ignore[no-untyped-def]
    """PEFT's RankAllocator where `model` is AdaLoRA's."""
    if ADAPTER not in getattr(model, "peft_config", {}):
        return None
    return getattr(model.base_model, "rankallocator", None)
