"""Base models, bundled, local or from the hub: tokenizer, weights, quantisation, facts."""

from rayfin.compat.bitsandbytes import import_bitsandbytes
from rayfin.models.bases import BASE_BITS, BASE_IDENTITY, Base, base_of, hub_id
from rayfin.models.bundled import BUNDLED
from rayfin.models.facts import (
    ModelFacts,
    describe_model,
    identity,
    lacks_weights,
    max_positions,
    meta_model,
    weight_names,
)
from rayfin.models.load import Head, check_model, dtype_on, load_base, load_tokenizer
from rayfin.models.source import is_hub, is_in_hub_cache, is_path, locate
from rayfin.models.tiny import write_tiny

__all__ = [
    "BASE_BITS",
    "BASE_IDENTITY",
    "BUNDLED",
    "Base",
    "Head",
    "ModelFacts",
    "base_of",
    "check_model",
    "describe_model",
    "dtype_on",
    "hub_id",
    "identity",
    "import_bitsandbytes",
    "is_hub",
    "is_in_hub_cache",
    "is_path",
    "lacks_weights",
    "load_base",
    "load_tokenizer",
    "locate",
    "max_positions",
    "meta_model",
    "weight_names",
    "write_tiny",
]
