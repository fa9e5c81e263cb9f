"""Rows in any common format -> examples -> tokens with a loss mask; and the data's profile."""

from rayfin.data.corpus import load_corpus
from rayfin.data.examples import BadRow, ChatTurn, Corpus, Example, TokenizedSample
from rayfin.data.profile import DataProfile
from rayfin.data.render import render_prompt, turn_end
from rayfin.data.survey import survey_corpus
from rayfin.data.tokens import (
    TokenizedCorpus,
    check_lengths,
    needs_length_check,
    tokenize_corpus,
)

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
