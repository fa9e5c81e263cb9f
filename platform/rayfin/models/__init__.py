"""Base models: bundled, local or from the hub; tokenizer, weights, quantisation, facts."""

from rayfin.models.bundled import BUNDLED
from rayfin.models.load import load_base, load_tokenizer
from rayfin.models.source import locate
from rayfin.models.tiny import write_tiny

__all__ = ["BUNDLED", "load_base", "load_tokenizer", "locate", "write_tiny"]
