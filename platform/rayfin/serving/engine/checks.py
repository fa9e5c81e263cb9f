"""Check that an adapter fits the served base, by its settings and its file's header alone.

They run before any tensor is read: what does not fit takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayfin.adapters.metadata import claimed_base
from rayfin.models import BASE_BITS, Base
from rayfin.serving.engine.layout import BaseLayout
from rayfin.serving.engine.peft_files import CONFIG, AdapterSettings, AdapterWeights, shown

OWN_BASE = "serve it with its own base"
BASE_IS_RIGHT = "--base-is-right"
"""The option by which a user answers for an adapter's base."""


def check_base(
    settings: AdapterSettings,
    metadata: Mapping[str, Any],
    served: Base,
    quantization_bit: int | None = None,
) -> None:
    """Raises AdapterError unless the adapter was trained on `served`.

    An adapter that is exact over a base in 4 or 8 bits alone has to find it in these. The bases'
    content is compared where the adapter's rayfin.json tells of it (`metadata`, which
    must be trusted), else the name that PEFT wrote.
    """
    claim = claimed_base(settings.values, metadata)
    mend = f"rayfin adapters add DIR NAME {BASE_IS_RIGHT} model.name={served.name}"
    if claim is None:
        raise settings.error(
            f"{CONFIG} names no base model, and the served one is {served}; if it was trained on "
            f"that, publish it with: {mend}"
        )
    if not claim.is_same(served):
        raise settings.error(
            f"it was trained on {_short(claim)}, and the served base is {served}; {OWN_BASE} "
            f"(model.name=BASE), or, if that is the served one by another name, publish it with: "
            f"{mend}"
        )
    bits = metadata.get(BASE_BITS)
    if bits is not None and bits != quantization_bit:
        raise settings.error(
            f"it makes up for what its base has lost to {shown(bits)} bits (LoftQ), and the served "
            "base has other weights; serve it with engine.type=transformers "
            f"engine.quantization_bit={shown(bits)}"
        )


def _short(base: Base) -> str:
    """Returns the base's name in one short line of ASCII: anybody may have written it."""
    text = str(base).encode("unicode_escape").decode("ascii")
    return text if len(text) <= 160 else f"{text[:160]}…"


def check_rank(settings: AdapterSettings, rank: int, most: int) -> None:
    """Raises AdapterError for a rank above `most`, the highest that a slot holds."""
    if rank > most:
        raise settings.error(f"it has rank {rank}, and slots hold {most}; raise engine.max_rank")


def check_low_rank(
    settings: AdapterSettings,
    weights: AdapterWeights,
    base: BaseLayout,
    modules: Mapping[str, Mapping[str, str]],
    ranks: Mapping[str, int],
) -> None:
    """Raises AdapterError for ranks (by module) or shapes of tensors that don't fit the base."""
    check_rank(settings, max(ranks.values()), base.max_rank)
    for module, parts in modules.items():
        (in_features, out_features), r = base.linears[module], ranks[module]
        shapes: dict[str, tuple[int, ...]] = {
            "A": (r, in_features),
            "B": (out_features, r),
            "E": (r, 1),
            "magnitude": (out_features,),
        }
        weights.check({name: shapes[part] for part, name in parts.items()})


def modules_of(
    weights: AdapterWeights,
    suffixes: Mapping[str, str],
    linears: Mapping[str, tuple[int, int]],
) -> dict[str, dict[str, str]]:
    """Returns module name in the base -> part -> tensor name, for all tensors but those `aside`.

    Raises AdapterError for modules that the base lacks, and where there are none.
    """
    modules = weights.by_module(suffixes)
    if not modules:
        raise weights.error("its file has no tensor of an adapted layer; save or copy it again")
    for module in modules:
        if module not in linears:
            raise weights.error(
                f"it adapts {shown(module)}, which is none of the served base's "
                f"{len(linears)} adaptable linear layers (such as "
                f"'{next(iter(linears), '')}'); train it on this base with "
                "target_modules=all-linear"
            )
    return modules
