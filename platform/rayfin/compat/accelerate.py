"""Accelerate's private names."""

from __future__ import annotations

import os
from functools import partial

from rayfin.compat.private import PrivateName

_RESET = partial(PrivateName, __name__)(
    "accelerate.state",
    "AcceleratorState._reset_state",
    needed_to="run DeepSpeed on CPU after a training without it in the same process",
    instead="an argument of Accelerator that says to use DeepSpeed on CPU",
    parameters=("reset_partial_state",),
)


def start_deepspeed_state(backend: str) -> None:
    """Make Accelerate's state of this process anew, for DeepSpeed over a `backend` of torch's.

    Accelerate takes DeepSpeed for a thing of GPUs, unless its state is made by hand.
    """
    from accelerate.state import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        _RESET.get()(reset_partial_state=True)
        PartialState(backend=backend)
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
