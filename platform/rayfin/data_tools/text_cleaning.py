"""Clean one text: white space, and characters that nobody sees or means."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Literal

UnicodeForm = Literal["NFC", "NFKC"]

CHANGES = (
    "line-ends",
    "control-characters",
    "invisible-characters",
    "special-spaces",
    "trailing-spaces",
    "blank-lines",
)
"""The kinds of changes that are made to a text unless they are kept, in their order."""

MOST_BLANK_LINES = 2
"""The blank lines in a row that stay: PEP 8 has two between functions."""

REPLACEMENT = "\ufffd"
"""What decoders write in the place of bytes that they can't read."""

_SPACE = " \t\u3000"
_LINE_ENDS = re.compile(r"\r\n|[\r\x0b\x0c\u2028\u2029]")
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)|[@-Z\\^_](?![A-Za-z]))"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
_SPECIAL_SPACES = re.compile(r"[\xa0\u1680\u2000-\u200a\u202f\u205f]")
# Scripts without spaces between words mark them by zero-width spaces.
_UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f]"
# Joiners mean something beside emoji and beside the letters of scripts that join them (Arabic,
# those of India, ...), but nothing in Latin, Greek, Cyrillic, Chinese, Japanese and Korean texts.
_JOINED = r"[^\x00-\u058f\u1e00-\u20cf\u2c60-\u2c7f\u3000-\ua4cf\uac00-\ud7ff\uff00-\uffef\ufeff]"
_INVISIBLE = re.compile(
    rf"[\ufeff\u2060\xad]|(?<!{_UNSPACED})\u200b|\u200b(?!{_UNSPACED})"
    rf"|(?<!{_JOINED})[\u200c\u200d]+(?!{_JOINED})"
)
_TRAILING = re.compile(rf"(?<![{_SPACE}])[{_SPACE}]++(?=\n|\Z)")
_LEADING = re.compile(r"\A(\n*+) (?=\S)")
_BLANK_LINES = re.compile(rf"\n{{{MOST_BLANK_LINES + 2},}}")
_FENCED = re.compile(
    r"^[ \t]*+(?P<fence>`{3,}+|~{3,}+)[^`\n]*+\n(?:.*?\n)??[ \t]*(?P=fence)[`~]*(?=[ \t]*$)"
    r"|^[ \t]*+(?:`{3,}+|~{3,}+)[^`\n]*+\n.*\Z",
    re.MULTILINE | re.DOTALL,
)
"""Code in Markdown, whose own lines keep their white space; one that is not closed runs on."""

_SUSPECT = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u1680\u2000-\u200d\u2028\u2029\u202f\u205f\u2060"
    r"\ufdd0-\ufdef\ufeff\ufffe\uffff]"
)
_SUSPECT_SPACES = (" \n", "\t\n", "\u3000\n", "\n" * (MOST_BLANK_LINES + 2))
_MEANT = {
    number: bytes([number]).decode("windows-1252", errors="ignore") for number in range(128, 160)
}


class TextCleaner:
    """Cleans texts, and counts what it changes of them."""

    def __init__(self, keep: Collection[str] = (), unicode_form: UnicodeForm | None = None) -> None:
        """Clean texts but for the changes in `keep`; `unicode_form` normalises them, too."""
        form = (("unicode-form", partial(_normalized, unicode_form)),) if unicode_form else ()
        steps = (*_CHARACTERS, *form, *_WHITE_SPACE)
        self._steps = [(name, step) for name, step in steps if name not in keep]
        self._looks_first = not form
        self.counts: Counter[str] = Counter()
        """The number of places at which each kind of change was made since this was cleared."""
        self.has_replacements = False
        """Whether one of these texts has U+FFFD, which stands for what an earlier decoder lost."""

    def clean(self, text: str) -> str:
        """Return a text cleaned; what needs no change is returned in a fraction of the time."""
        if not text:
            return text
        if REPLACEMENT in text:
            self.has_replacements = True
        if self._looks_first and not _is_suspect(text):
            return text
        for name, step in self._steps:
            text, count = step(text)
            if count:
                self.counts[name] += count
        return text


def _is_suspect(text: str) -> bool:
    """Whether some step may change a text."""
    return (
        text[0].isspace()
        or text[-1].isspace()
        or _SUSPECT.search(text) is not None
        or any(each in text for each in _SUSPECT_SPACES)
    )


def _line_ends(text: str) -> tuple[str, int]:
    return _LINE_ENDS.subn("\n", text)


def _controls(text: str) -> tuple[str, int]:
    text, escapes = _ESCAPES.subn("", text)
    text, controls = _CONTROLS.subn(lambda found: _MEANT.get(ord(found[0]), ""), text)
    return text, escapes + controls


def _invisible(text: str) -> tuple[str, int]:
    return _INVISIBLE.subn("", text)


def _special_spaces(text: str) -> tuple[str, int]:
    return _SPECIAL_SPACES.subn(" ", text)


def _trailing_spaces(text: str) -> tuple[str, int]:
    text, count = _outside_code(text, lambda part: _TRAILING.subn("", part))
    text, leading = _LEADING.subn(r"\1", text)
    return text, count + leading


def _normalized(form: UnicodeForm, text: str) -> tuple[str, int]:
    if unicodedata.is_normalized(form, text):
        return text, 0
    return unicodedata.normalize(form, text), 1


def _blank_lines(text: str) -> tuple[str, int]:
    most = "\n" * (MOST_BLANK_LINES + 1)
    text, count = _outside_code(text, lambda part: _BLANK_LINES.subn(most, part))
    end = text.find("\n", len(text.rstrip(_SPACE + "\n")))
    if end >= 0:
        text, count = text[:end], count + 1
    begin = text.rfind("\n", 0, len(text) - len(text.lstrip(_SPACE + "\n"))) + 1
    return text[begin:], count + (begin > 0)


def _outside_code(text: str, change: Callable[[str], tuple[str, int]]) -> tuple[str, int]:
    """Change what is not code in Markdown, in fences of three or more ` or ~."""
    if "```" not in text and "~~~" not in text:
        return change(text)
    parts, at, total = [], 0, 0
    for code in _FENCED.finditer(text):
        part, count = change(text[at : code.start()])
        parts += [part, code[0]]
        at, total = code.end(), total + count
    part, count = change(text[at:])
    return "".join([*parts, part]), total + count


_Steps = tuple[tuple[str, Callable[[str], tuple[str, int]]], ...]
_CHARACTERS: _Steps = (
    ("line-ends", _line_ends),
    ("control-characters", _controls),
    ("invisible-characters", _invisible),
    ("special-spaces", _special_spaces),
)
_WHITE_SPACE: _Steps = (("trailing-spaces", _trailing_spaces), ("blank-lines", _blank_lines))
