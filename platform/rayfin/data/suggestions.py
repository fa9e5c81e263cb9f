"""Suggest the setting that would make rows with unknown names of columns readable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rayfin.data.columns import is_blank, parsed_list
from rayfin.data.row_reader import columns_setting
from rayfin.data.rows import TableRow
from rayfin.data.turns import is_conversation

_ASKS = (
    *("question", "prompt", "query", "instruction", "request", "input", "user", "human", "ask"),
    *("problem", "source", "utterance", "message", "title", "subject", "text", "问", "指令"),
    *("frage", "article", "document", "pregunta", "domanda"),
)
_ANSWERS = (
    *("answer", "response", "completion", "output", "reply", "assistant", "solution", "target"),
    *("resolution", "summary", "result", "label", "intent", "category", "答", "输出"),
    *("antwort", "highlights", "réponse", "reponse", "respuesta", "risposta"),
)
"""Parts of the names that people give to questions and to answers, the surest first."""


def suggestion(row: object, *, answered: bool = False) -> str:
    """Return `; perhaps data.columns=... is meant` for a row, or an empty text.

    With `answered`, a text alone is not suggested, as the row was meant to have an answer.
    """
    if not isinstance(row, Mapping):
        return ""
    if isinstance(row, TableRow) and any(_are_alike(*cell) for cell in row.items()):
        return (
            "; the file seems to have no header, as its first line reads like a row: put a line "
            "before it that names each column, such as prompt,completion"
        )
    names = _guess(row, answered)
    names = {column: name for column, name in names.items() if column != name}
    return f"; perhaps {columns_setting(names)} is meant" if names else ""


def _are_alike(name: str, value: object) -> bool:
    """Whether the name of a column reads like the value below it, as a sentence or a number."""
    if not isinstance(value, str):
        return False
    ends = (text.strip()[-1:] for text in (name, value))
    words = (len(text.split()) for text in (name, value))
    return len(set(ends)) == 1 and min(words) > 1 and name.strip()[-1:] in "?!.。？！"


def _guess(row: Mapping[str, Any], answered: bool) -> dict[str, str]:
    talks = [name for name, value in row.items() if is_conversation(parsed_list(value))]
    if talks:  # of several, such as a good and a bad answer, none is the conversation
        return {"messages": talks[0]} if len(talks) == 1 else {}
    texts = [name for name, value in row.items() if _is_text(value)]
    if len(texts) < 2:
        # What stands beside lists or objects may be no more than their title.
        beside = any(isinstance(each, (list, dict)) and not is_blank(each) for each in row.values())
        return {} if answered or beside or not texts else {"text": texts[0]}
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


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or not any(map(str.isalpha, value)):
        return False
    if "://" in value and len(value.split()) == 1:  # an address
        return False
    try:
        float(value)  # 1e-4 is a number
    except ValueError:
        return True
    return False
