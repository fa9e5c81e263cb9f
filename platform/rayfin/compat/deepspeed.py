"""DeepSpeed's private names: where its ZeRO optimizers keep their parts, and its operators."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from rayfin.compat.private import PrivateName

if TYPE_CHECKING:
    import torch

_name = partial(PrivateName, __name__)

_PUBLIC_STATE = "a call that makes AdamW's state before the first step"
_STATE = "read a checkpoint's moments into an optimizer that has not stepped"
_PARTS = _name(
    "deepspeed.runtime.zero.stage_1_and_2",
    "DeepSpeedZeroOptimizer.single_partition_of_fp32_groups",
    needed_to=_STATE,
    instead=_PUBLIC_STATE,
    on_instances=True,
)
_NOTE_STATE = _name(
    "deepspeed.runtime.zero.stage_1_and_2",
    "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
    needed_to=_STATE,
    instead=_PUBLIC_STATE,
    parameters=(),
)
_PARTS_OF_STAGE_3 = _name(
    "deepspeed.runtime.zero.stage3",
    "DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat",
    needed_to=_STATE,
    instead=_PUBLIC_STATE,
    on_instances=True,
)
_OPERATORS = _name(
    "deepspeed.ops",
    "__compatible_ops__",
    needed_to="start without compiling an operator that only inference calls",
    instead="a setting of DeepSpeed that turns off operators which are compiled at the first use",
)
_SETTINGS = _name(
    "deepspeed.runtime.zero.config",
    "DeepSpeedZeroConfig.model_fields",
    needed_to="refuse settings of zero_optimization that DeepSpeed would drop without a word",
    instead="a check of DeepSpeed's own that refuses unknown settings",
)
_PARTITION = "deepspeed.runtime.zero.partition_parameters"
_NUMBERS = _name(
    _PARTITION,
    "ds_numel",
    needed_to="count the parameters of a model in parts",
    instead="a public count of a ZeRO-3 parameter's elements",
    on_instances=True,
)
_OWN_PART = _name(
    _PARTITION,
    "ds_tensor",
    needed_to="write a worker's part of a ZeRO-3 parameter",
    instead="safe_set_full_fp32_param that does not read past the end of the last, padded part",
    on_instances=True,
)


def element_count(parameter: torch.nn.Parameter) -> int:
    """Return the elements of a whole parameter, of which ZeRO-3 may leave none on this worker."""
    count: int = getattr(parameter, "ds_numel", parameter.numel())
    return count


def part_size(parameter: Any) -> int:
    """Return the elements of each worker's part of a ZeRO-3 parameter, padding included."""
    size: int = _OWN_PART.of(parameter).ds_numel
    return size


def make_optimizer_state(optimizer: Any, stage: int, moments: Iterable[str]) -> None:
    """Make the state of the AdamW in a ZeRO optimizer of `stage` as its first step would.

    DeepSpeed (0.19) notes where the moments are after the first group's first step, when the
    second group has none yet, and never again.
    """
    import torch

    parts = (_PARTS if stage < 3 else _PARTS_OF_STAGE_3).of(optimizer)
    state = optimizer.optimizer.state
    for part in parts:
        if not state[part]:
            state[part] = {
                "step": torch.tensor(0.0, device=part.device),
                **{moment: torch.zeros_like(part) for moment in moments},
            }
    if stage < 3:
        _NOTE_STATE.of(optimizer)()


def leave_out_shared_memory_operator() -> None:
    """Keep DeepSpeed from compiling a C++ operator (half a minute) that only inference calls."""
    _OPERATORS.get()["deepspeed_shm_comm"] = False


def zero_settings() -> set[str]:
    """Return the names that a section `zero_optimization` may have, aliases included."""
    logging.disable(logging.WARNING)  # that this machine has no GPU, where only a file is read
    try:
        fields = _SETTINGS.get()
    finally:
        logging.disable(logging.NOTSET)
    return {*fields, *(str(field.alias) for field in fields.values() if field.alias)}
