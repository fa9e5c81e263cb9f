"""The optimizers and schedules that rayfin trains with, by Transformers' names."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rayfin.compat.bitsandbytes import import_bitsandbytes
from rayfin.errors import did_you_mean

ArgumentKind = Literal["share", "number", "count", "flag"]
"""What an argument may be: a number from 0 to below 1, one from 0, a whole one from 1, a truth."""

_RANGES: dict[ArgumentKind, str] = {
    "share": "a number from 0 to below 1",
    "number": "a number of 0 or more",
    "count": "a whole number of 1 or more",
    "flag": "true or false",
}
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class OptimizerFacts:
    """What rayfin has to know of an optimizer beside what Transformers does."""

    moments: int | None
    """Numbers that it keeps for a trained one; None where those of a matrix are factored."""
    bits: Literal[8, 32] = 32
    """Bits of such a number. 8 have a float32 scale for every 256 of them."""
    settings: tuple[str, ...] = ()
    """The settings `train.adam_…` that it takes."""
    arguments: dict[str, ArgumentKind] = field(default_factory=dict)
    """What `train.optim_args` may hold."""
    package: str | None = None
    """The package that it comes from, where that is neither torch nor Transformers."""
    paged: bool = False
    """Whether its state moves between a GPU's memory and the host's; it needs a GPU then."""
    same_as: str | None = None
    """The other name that Transformers has for it."""


_BETAS = ("adam_beta1", "adam_beta2")
_ADAM = (*_BETAS, "adam_epsilon")
_ADEMAMIX: dict[str, ArgumentKind] = {
    "beta3": "share",
    "alpha": "number",
    "t_alpha": "count",
    "t_beta3": "count",
}
_BITSANDBYTES = "bitsandbytes"


def _bnb(
    moments: int, bits: Literal[8, 32], settings: tuple[str, ...], **others: Any
) -> OptimizerFacts:
    return OptimizerFacts(moments, bits, settings, package=_BITSANDBYTES, **others)


OPTIMIZERS: dict[str, OptimizerFacts] = {
    "adamw_torch_fused": OptimizerFacts(2, settings=_ADAM),
    "adamw_torch": OptimizerFacts(2, settings=_ADAM),
    "adamw_8bit": _bnb(2, 8, _ADAM),
    "adamw_bnb_8bit": _bnb(2, 8, _ADAM, same_as="adamw_8bit"),
    "paged_adamw_8bit": _bnb(2, 8, _ADAM, paged=True),
    "paged_adamw_32bit": _bnb(2, 32, _ADAM, paged=True),
    "adafactor": OptimizerFacts(None),
    "lion_8bit": _bnb(1, 8, _BETAS),
    "lion_32bit": _bnb(1, 32, _BETAS),
    "paged_lion_8bit": _bnb(1, 8, _BETAS, paged=True),
    "paged_lion_32bit": _bnb(1, 32, _BETAS, paged=True),
    "ademamix": _bnb(3, 32, _ADAM, arguments=_ADEMAMIX),
    "ademamix_8bit": _bnb(3, 8, _ADAM, arguments=_ADEMAMIX),
    "paged_ademamix_32bit": _bnb(3, 32, _ADAM, arguments=_ADEMAMIX, paged=True),
    "paged_ademamix_8bit": _bnb(3, 8, _ADAM, arguments=_ADEMAMIX, paged=True),
    "sgd": OptimizerFacts(
        0, arguments={"momentum": "share", "dampening": "share", "nesterov": "flag"}
    ),
    "rmsprop": OptimizerFacts(
        1,
        arguments={"momentum": "share", "alpha": "share", "eps": "number", "centered": "flag"},
    ),
    "rmsprop_bnb": _bnb(1, 32, (), same_as="rmsprop_bnb_32bit"),
    "rmsprop_bnb_32bit": _bnb(1, 32, ()),
    "rmsprop_bnb_8bit": _bnb(1, 8, ()),
    "adagrad": OptimizerFacts(1, arguments={"lr_decay": "number", "eps": "number"}),
}
"""Transformers' name -> facts. Its other names are refused with what is missing for them."""

DEFAULT_OPTIMIZER = "adamw_torch_fused"
"""Transformers' own default, too."""

ADAM_SETTINGS = _ADAM

Schedule = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
    "greedy",
]
PLAIN_SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine", "constant", "constant_with_warmup")
"""Schedules without an argument that they need."""


_PLAIN_NAMES = {"adam": "adamw_torch", "adamw": "adamw_torch"}


def check_name(name: Any) -> Any:
    """Return a setting `train.optim` as it is; raise ValueError for a name that rayfin lacks.

    For one of Transformers' it says itself, being imported only then, what is missing.
    """
    if not isinstance(name, str) or name in OPTIMIZERS:
        return name
    missing, near = None, did_you_mean(_PLAIN_NAMES.get(name.lower(), name), OPTIMIZERS)
    if importlib.util.find_spec("transformers") is not None:
        import_bitsandbytes()  # Trainer imports PEFT, which would import it with a warning
        from rayfin.compat.transformers import missing_for_optimizer

        missing = missing_for_optimizer(name)
    why = missing or f"Transformers has no such optimizer{near}"
    raise ValueError(f"{name!r}: {why}; rayfin trains with {', '.join(OPTIMIZERS)}")


def parse_arguments(
    text: str | None, takes: dict[str, ArgumentKind]
) -> dict[str, float | int | bool]:
    """Return the arguments in `train.optim_args`, which is `name=value,…`, by their names.

    Raise ValueError, which says what is allowed, for a name that `takes` lacks or a wrong value.
    """
    found: dict[str, float | int | bool] = {}
    for part in [] if text is None else text.replace(" ", "").split(","):
        if not part:
            raise ValueError(f"'{text}' has an empty part; write name=value,name=value")
        name, _, value = part.partition("=")
        if name not in takes:
            allowed = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise ValueError(f"it has no argument '{name}'; {allowed}")
        if name in found:
            raise ValueError(f"'{name}' is there twice; give it once")
        found[name] = _value(name, value, takes[name])
    return found


def _value(name: str, text: str, kind: ArgumentKind) -> float | int | bool:
    value: float | int | bool
    try:
        if kind == "flag":
            return _TRUTH[text.lower()]
        value = int(text) if kind == "count" else float(text)
    except (ValueError, KeyError):
        value = math.nan
    low, above = {"share": (0, 1), "number": (0, math.inf), "count": (1, math.inf)}.get(
        kind, (0, 0)
    )
    if not low <= value < above:
        raise ValueError(f"{name}={text!r} should be {_RANGES[kind]}")
    return value
