"""Answers in Chinese: a catalogue without gaps, and the locale's language."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

import rayfin
from rayfin.advisor import RULES
from rayfin.errors import ConfigError
from rayfin.language import answering_in, locale_language, localized
from rayfin.language.chinese import CHINESE

SOURCE = Path(rayfin.__file__).parent


def sentences() -> Iterator[str]:
    """Yield the English sentences of the source that are said in the current language."""
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "localized(" not in text or path.parent.name == "language":
            continue
        for node in ast.walk(ast.parse(text)):
            name = getattr(getattr(node, "func", None), "id", None)
            if name == "localized":
                said = node.args[0]
                if isinstance(said, ast.Constant):
                    yield said.value
                else:  # the only sentences that are kept elsewhere
                    assert ast.unparse(said).startswith("rule."), (path, ast.unparse(said))
    for rule in RULES:
        yield from filter(None, (rule.reason, rule.risk, rule.deployment))


def figures(sentence: str) -> list[tuple[str, str]]:
    """Return what is filled in and how, but for an English plural."""
    parts = string.Formatter().parse(sentence)
    return sorted((name, spec or "") for _, name, spec, _ in parts if name and name != "plural")


def test_every_sentence_has_a_chinese_one_with_its_figures() -> None:
    said = set(sentences())
    assert len(said) > 40
    assert said - CHINESE.keys() == set()
    for english, chinese in CHINESE.items():
        assert figures(english) == figures(chinese), english
        assert chinese != english
    names = {"a GPU"}  # of devices, by localized_template
    assert CHINESE.keys() - said - names == set()


def test_a_sentence_is_said_in_the_language_in_force() -> None:
    english = "4-bit weights make room for it"
    assert localized(english) == english
    with answering_in("zh"):
        assert localized(english) == CHINESE[english]
        with answering_in("en"):
            assert localized(english) == english
    assert localized(english) == english


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "de_DE", "LC_MESSAGES": "zh_TW"}, "zh"),
        ({"LANG": "zh_CN", "LC_ALL": ""}, "zh"),
    ],
    ids=str,
)
def test_the_locale_tells_the_language(environment: dict[str, str], language: str) -> None:
    assert locale_language(environment) == language


def test_a_language_that_nobody_is_answered_in_is_refused() -> None:
    with pytest.raises(ConfigError, match="lang='fr' must be one of zh, en"):
        rayfin.recommend(lang="fr")  # type: ignore[arg-type]
