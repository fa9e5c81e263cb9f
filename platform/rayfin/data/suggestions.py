"""Suggest the setting that would make rows with unknown names of columns readable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rayfin.data.columns import SPEAKER_KEYS, parsed_list
from rayfin.data.row_reader import columns_setting

_ASKS = (
    *("question", "prompt", "query", "instruction", "request", "input", "user", "human", "ask"),
    *("problem", "source", "utterance", "message", "title", "subject", "text", "问", "指令"),
)
_ANSWERS = (
    *("answer", "response", "completion", "output", "reply", "assistant", "solution", "target"),
    *("resolution", "summary", "result", "label", "intent", "category", "答", "输出"),
)
"""Parts of the names that people give to questions and to answers, the surest first."""


def suggestion(row: object, *, answered: bool = False) -> str:
    """Return `; perhaps data.columns=... is meant` for a row, or an empty text.

    With `answered`, a text alone is not suggested, as the row was meant to have an answer.
    """
    names = _guess(row, answered) if isinstance(row, Mapping) else {}
    names = {column: name for column, name in names.items() if column != name}
    return f"; perhaps {columns_setting(names)} is meant" if names else ""


def _guess(row: Mapping[str, Any], answered: bool) -> dict[str, str]:
    talks = [name for name, value in row.items() if _is_talk(value)]
    if talks:
        return {"messages": talks[0]}
    texts = [name for name, value in row.items() if _is_text(value)]
    if len(texts) < 2:
        return {} if answered or not texts else {"text": texts[0]}
    answer = _named(row, _ANSWERS)
    if answer is not None and answer not in texts:
        return {}  # what is no text can't be named to be one
    asked = _named([name for name in texts if name != answer], _ASKS)
    if len(texts) > 2 and (asked is None or answer is None):
        return {}
    asked = asked or next(name for name in texts if name != answer)
    return {"prompt": asked, "completion": answer or next(n for n in texts if n != asked)}


def _named(names: Iterable[str], words: Iterable[str]) -> str | None:
    plain = {name: name.casefold() for name in names}
    return next((name for word in words for name, of in plain.items() if word in of), None)


def _is_talk(value: object) -> bool:
    found = parsed_list(value)
    return bool(found) and all(
        isinstance(each, Mapping) and not each.keys().isdisjoint(SPEAKER_KEYS) for each in found
    )


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or not any(map(str.isalpha, value)):
        return False
    try:
        float(value)  # 1e-4 is a number
    except ValueError:
        return True
    return False
