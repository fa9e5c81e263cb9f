"""The state of any optimizer as tensors by parameter name, and back.

`<key>/<parameter>` is what an optimizer keeps of a parameter, by its own key: AdamW's `exp_avg`,
Adafactor's `exp_avg_sq_row`, an 8-bit `state1` and its scales `absmax1`. A number that is the same
for all of them, that of the steps, stands under the key alone. A number that is Python's, and no
tensor, is one of 64 bits without dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

_PYTHONS = (torch.int64, torch.float64)


def named_state(
    states: Mapping[str, Mapping[str, Any]], whole: Callable[[torch.Tensor], torch.Tensor]
) -> Tensors:
    """Return the optimizer's `states` of parameters by name, on the CPU and with 16 bits as 32.

    `whole` assembles what several workers have in parts.
    """
    found: Tensors = {}
    seen: set[int] = set()
    for key in dict.fromkeys(key for state in states.values() for key in state):
        kept = {n: _tensor(state[key]) for n, state in states.items() if state.get(key) is not None}
        if not kept:
            continue
        first = next(iter(kept.values()))
        if len(kept) == len(states) and all(_one_number(first, value) for value in kept.values()):
            found[key] = first.cpu()
            continue
        for name, tensor in kept.items():
            value = whole(tensor)
            if value.is_floating_point() and value.element_size() < 4:
                value = value.float()
            value = value.cpu().contiguous()
            # A map of quantised values is one tensor for all parameters; a file has no such thing.
            found[f"{key}/{name}"] = value.clone() if value.data_ptr() in seen else value
            seen.add(value.data_ptr())
    return found


def states_of(
    parameters: Mapping[str, torch.nn.Parameter],
    stored: Mapping[str, torch.Tensor],
    part: Callable[[torch.Tensor, torch.nn.Parameter], torch.Tensor],
) -> dict[str, dict[str, Any]]:
    """Return what an optimizer keeps of each of `parameters`, out of what `named_state` returned.

    `part` takes a worker's part of a tensor that has the shape of its parameter. A parameter that
    has not been trained has no state.
    """
    states: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    shared = {key: value for key, value in stored.items() if "/" not in key}
    for name, value in stored.items():
        key, _, parameter = name.partition("/")
        if parameter in states:
            own = parameters[parameter]
            alike = value.shape == own.shape
            states[parameter][key] = part(value, own) if alike else value.to(own.device)
    for state in states.values() if len(shared) == len(stored) else filter(None, states.values()):
        # Each gets a number of its own, which it counts up in place.
        state |= {key: value.clone() for key, value in shared.items()}
    return {
        name: {key: _value(value) for key, value in state.items()}
        for name, state in states.items()
        if state
    }


def _one_number(first: torch.Tensor, other: torch.Tensor) -> bool:
    return first.ndim == other.ndim == 0 and bool(torch.equal(first, other))


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _value(value: torch.Tensor) -> Any:
    return value.item() if value.ndim == 0 and value.dtype in _PYTHONS else value
