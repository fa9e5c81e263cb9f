"""Read facts from a model's name, where neither its files nor recorded facts are at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Billions of parameters, all and active, of models whose names leave one of them out; their model
# cards say them.
_PUBLISHED = {
    "deepseek-v3": (671.0, 37.0),
    "deepseek-r1": (671.0, 37.0),
    "gpt-oss-120b": (117.0, 5.1),
    "gpt-oss-20b": (21.0, 3.6),
    "kimi-k2": (1000.0, 32.0),
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (141.0, 39.0),
    "phi-3-mini": (3.8, 3.8),
    "phi-4-mini": (3.8, 3.8),
    "phi-4-multimodal": (5.6, 5.6),
    "phi-4": (14.7, 14.7),
}
_BUNDLED = {"tiny": 90_688 / 1e9}
"""The billions of parameters of rayfin's own test model, which has no size in its name."""
_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])")
_ACTIVE = re.compile(r"(?<![a-z0-9.])a(\d+(?:\.\d+)?)([bm])(?![a-z0-9])")
_TUNED = re.compile(r"(?<![a-z])(instruct|chat|it|thinking|sft|dpo|rl|reasoning)(?![a-z])")
_BASE = re.compile(r"(?<![a-z])(base|pt|pretrained)(?![a-z])")
_FAMILY = re.compile(r"([a-z]+)[-_ ]?(v?\d+(?:\.\d+)?(?![\d.]*[bm]\b))?")
_POINT = re.compile(r"(?<=-\d)_(?=\d)")  # of stablelm-2-1_6b and llama-3_3
_CACHED = re.compile(r"models--[^/]+--([^/]+)/snapshots/")
_CLASS = re.compile(r"(For[A-Z]|LMHead).*")  # of LlamaForCausalLM and GPT2LMHeadModel
_PUBLISHER = re.compile(r"^(nvidia|meta|mistralai|google|microsoft)[-_]")


@dataclass(frozen=True)
class NameFacts:
    """What a model's name says, or None for what it does not; sizes in billions of parameters."""

    size_b: float | None
    active_b: float | None
    """The parameters that each token uses; all of them in a dense model."""
    brand: str
    """The brand, such as `qwen`."""
    generation: str
    """The brand and its generation, such as `qwen3.5`."""
    tuned: bool | None
    """Whether the model was tuned to follow instructions."""


def facts_from_name(name: str) -> NameFacts:
    """Read a name: `Qwen/Qwen3-30B-A3B-Base` gives 30, 3, qwen, qwen3 and False."""
    plain = _PUBLISHER.sub("", name.rstrip("/").rpartition("/")[2].lower())
    plain = _POINT.sub(".", plain.partition("@")[0]).replace("_", "-")
    size, active = _sizes(plain)
    family = _FAMILY.match(plain)
    brand = family[1] if family else plain
    version = (family[2] or "").removeprefix("v") if family else ""
    tuned = True if _TUNED.search(plain) else False if _BASE.search(plain) else None
    return NameFacts(size, active, brand, brand + version, tuned)


def name_to_read(name: str, identity: str, architecture: str) -> str:
    """Return the name that tells a model's family: for a directory, its architecture's.

    How a directory is called says nothing, but for one of the Hugging Face hub's cache.
    """
    if (cached := _CACHED.search(name)) is not None:
        return cached[1]
    return _CLASS.sub("", architecture) if identity.startswith("local@") else name


def _sizes(plain: str) -> tuple[float | None, float | None]:
    if plain in _BUNDLED:
        return _BUNDLED[plain], _BUNDLED[plain]
    for start, published in _PUBLISHED.items():
        if plain.startswith(start) and "distill" not in plain:  # that is another model's size
            return published
    said = _SIZE.search(plain)
    if said is None:
        return None, None
    active = _ACTIVE.search(plain)
    return _billions(said), _billions(active or said)


def _billions(said: re.Match[str]) -> float:
    return float(said[1]) * (1.0 if said[2] == "b" else 1e-3)
