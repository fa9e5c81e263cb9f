"""The language in which people are answered: English, or Chinese by the catalogue."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

from rayfin.errors import ConfigError
from rayfin.language.chinese import CHINESE

Language = Literal["zh", "en"]

_current: ContextVar[Language] = ContextVar("language", default="en")


def localized(sentence: str, /, **figures: object) -> str:
    """Return a sentence in the current language, with its `{figures}` filled in.

    `sentence` is the English one. A test holds that the catalogue has a Chinese one for each.
    """
    return localized_template(sentence).format(**figures)


def localized_template(sentence: str) -> str:
    """Return a sentence in the current language, its figures not filled in."""
    return CHINESE.get(sentence, sentence) if _current.get() == "zh" else sentence


def current_language() -> Language:
    """Return the language in which people are answered."""
    return _current.get()


def check_language(language: str) -> None:
    """Raise ConfigError for a language in which nobody is answered."""
    if language not in get_args(Language):
        raise ConfigError(f"lang='{language}' must be one of {', '.join(get_args(Language))}")


@contextmanager
def answering_in(language: Language) -> Iterator[None]:
    """Answer in `language` within the context; English is the default outside of any."""
    token = _current.set(language)
    try:
        yield
    finally:
        _current.reset(token)


def locale_language(environment: Mapping[str, str] = os.environ) -> Language:
    """Return the language of the locale, by the first that is set of POSIX's three variables."""
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    locale = next((value for name in names if (value := environment.get(name))), "")
    return "zh" if locale.lower().startswith("zh") else "en"
