"""Clean the texts of one row in whatever format, and leave the rest of it as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rayfin.data.columns import (
    COLUMNS,
    CONTENT_KEYS,
    PAIR_KEYS,
    SPEAKER_KEYS,
    SPEAKERS,
    is_blank,
    parsed_list,
)
from rayfin.data.row_reader import RowReader
from rayfin.data.row_settings import RowSettings
from rayfin.data.turns import is_pair
from rayfin.data_tools.text_cleaning import TextCleaner

_LISTS = ("messages", "conversations", "history")
"""The columns that hold lists of turns, as JSON text too."""


class RowCleaner:
    """Cleans the texts of rows of one format: those that are trained on, turn by turn."""

    def __init__(self, shape: str, settings: RowSettings, texts: TextCleaner) -> None:
        """Clean texts by `texts` in the columns that `shape` uses."""
        self._shape, self._texts = shape, texts
        self._reader = RowReader(settings)

    def clean(self, value: object) -> object:
        """Return a row with its texts cleaned; tools, calls of them and other columns are kept."""
        if isinstance(value, list):  # turns, without an object around them
            return [self._turn(each) for each in value]
        if not isinstance(value, Mapping):
            return value
        cleaned = dict(value)
        for name, column in self._reader.used_names(value, self._shape):
            if column != "tools":
                cleaned[name] = self._column(value[name], column)
        return cleaned

    def without_value(self, value: object) -> str | None:
        """Return the name of a column that the format needs and that is blank, if one is."""
        if not isinstance(value, Mapping):
            return None
        names: dict[str, list[str]] = {}
        for name, column in self._reader.used_names(value, self._shape):
            names.setdefault(column, []).append(name)
        for column in COLUMNS[self._shape]:
            if column in names and all(is_blank(value[name]) for name in names[column]):
                return names[column][0]
        return None

    def _column(self, value: object, column: str) -> object:
        if isinstance(value, str):
            turns = parsed_list(value)
            if not turns or column not in _LISTS:
                return self._texts.clean(value)
            cleaned = [self._turn(each) for each in turns]
            return value if cleaned == turns else json.dumps(cleaned, ensure_ascii=False)
        return [self._turn(each) for each in value] if isinstance(value, list) else value

    def _turn(self, turn: Any) -> Any:
        if isinstance(turn, (list, tuple)):  # a question and its answer in a history
            return [self._texts.clean(each) if isinstance(each, str) else each for each in turn]
        if not isinstance(turn, Mapping):
            return turn
        if is_pair(turn):
            return {
                key: self._texts.clean(said)
                if isinstance(said, str) and (key in PAIR_KEYS or key == "system")
                else said
                for key, said in turn.items()
            }
        speaker = next((turn[key] for key in SPEAKER_KEYS if turn.get(key) is not None), None)
        key = next((key for key in CONTENT_KEYS if turn.get(key) is not None), None)
        calls = isinstance(speaker, str) and SPEAKERS.get(speaker.strip().lower()) == "call"
        if key is None or calls:  # a call is JSON, whose white space may be an argument's
            return turn
        return {**turn, key: self._content(turn[key])}

    def _content(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._texts.clean(content)
        if not isinstance(content, list):
            return content
        return [self._part(part) for part in content]

    def _part(self, part: Any) -> Any:
        if isinstance(part, str):
            return self._texts.clean(part)
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            return {**part, "text": self._texts.clean(part["text"])}
        return part
