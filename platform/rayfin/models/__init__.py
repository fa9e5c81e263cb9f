"""Base models: bundled, local or from the hub; tokenizer, weights, quantisation, facts."""

from rayfin.models.bundled import BUNDLED
from rayfin.models.facts import ModelFacts, describe_model, identity
from rayfin.models.load import load_base, load_tokenizer
from rayfin.models.source import locate
from rayfin.models.tiny import write_tiny

__all__ = [
    "BUNDLED",
    "ModelFacts",
    "describe_model",
    "identity",
    "load_base",
    "load_tokenizer",
    "locate",
    "write_tiny",
]
