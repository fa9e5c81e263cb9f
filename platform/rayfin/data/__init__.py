"""Read rows of any common format, make examples and then tokens with a loss mask of them, and
profile the data."""

from rayfin.data.corpus import Corpus
from rayfin.data.load import load_corpus
from rayfin.data.profile import DataProfile
from rayfin.data.render import render_prompt, turn_end
from rayfin.data.rows import BadRow
from rayfin.data.survey import survey_corpus
from rayfin.data.tokenization import (
    TokenizedCorpus,
    check_lengths,
    needs_length_check,
    tokenize_corpus,
)
from rayfin.samples import ChatTurn, Example, TokenizedSample

__all__ = [
    "BadRow",
    "ChatTurn",
    "Corpus",
    "DataProfile",
    "Example",
    "TokenizedCorpus",
    "TokenizedSample",
    "check_lengths",
    "load_corpus",
    "needs_length_check",
    "render_prompt",
    "survey_corpus",
    "tokenize_corpus",
    "turn_end",
]
