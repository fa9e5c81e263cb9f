"""The state that a method carries over a restart, as one flat dictionary of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayfin.methods.base import METHODS

if TYPE_CHECKING:
    import torch


def training_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters by name, and what their method needs beside them.

    An adapter file is not enough to go on from: P-Tuning's, say, holds the prompt encoder's output
    only.
    """
    state = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    state |= state_beside(model)
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}


def state_beside(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what a method needs beside the trained parameters, as it lies on its device."""
    state: dict[str, torch.Tensor] = {}
    for method in METHODS.values():
        state |= method.state_beside(model)
    return state


def load_training_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put `training_state` back; raise KeyError where `state` is of another model."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])
    load_state_beside(model, state)


def load_state_beside(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put `state_beside` back from a `training_state`."""
    for method in METHODS.values():
        method.load_state_beside(model, state)
