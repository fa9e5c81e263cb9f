"""Read a page of questions and answers in Markdown, one question and its answer a row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rayfin.data.readers import read_errors
from rayfin.data.rows import Row
from rayfin.errors import DataError

_MARK = re.compile(
    r"\s*(?:[-*+]\s+)?(?P<bold>\*\*|__)?(?P<kind>Q|A|(?i:question|answer|frage|antwort)|问|答)"
    r"\s*\d*\s*(?P<end>[:：.])\s*(?(bold)(?P<closed>\*\*|__)?)\s*(?P<text>.*)"
)
_DOTTED = ("Q", "A")
"""What may be marked with a dot, as in `Q. Why?`; `Answer. ` begins a sentence."""
_QUESTION = ("q", "question", "frage", "问")


_Marks = dict[int, re.Match[str]]
"""The marks of questions and answers, by the numbers of their lines."""


@dataclass
class _Section:
    """A heading with the lines beneath it."""

    line: int
    title: str
    level: int = 1
    first: int = 0
    """The number of the first line beneath it, from 0."""
    last: int = 0
    """The number after that of the last line beneath it."""


def is_markdown(path: Path) -> bool:
    """Whether the name of a file is that of a Markdown page."""
    return path.suffix.lower() in (".md", ".markdown")


def faq_rows(path: Path) -> Iterator[Row]:
    """Yield a row with `prompt` and `completion` for each question of a page.

    A question is a heading with an answer and no heading of its own beneath it, or, where a page
    has more of these, what follows `Q:` up to `A:`. What is neither question nor answer is a row
    with a problem. Raises DataError where the file can't be read.
    """
    with read_errors(path):
        text = path.read_text(encoding="utf-8-sig")
    lines = text.split("\n")  # as Markdown counts them, which knows no other line ends
    headings, fenced = _structure(text)
    marks = _marks(lines, headings, fenced)
    if _is_marked(lines, headings, marks):
        yield from _by_marks(str(path), lines, headings, marks)
    elif headings:
        yield from _by_headings(str(path), lines, headings, marks)
    else:
        raise DataError(
            f"data.path: '{path}' has no question: neither a heading with text beneath it nor "
            "a line that begins with Q:"
        )


def _structure(text: str) -> tuple[list[_Section], set[int]]:
    """Return the headings, and the numbers of the lines that are code."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").parse(text)
    headings: list[_Section] = []
    fenced: set[int] = set()
    end = text.count("\n") + 1
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.map is None:
            continue
        if token.type in ("fence", "code_block"):
            fenced.update(range(*token.map))
        if token.type == "heading_open" and token.level == 0 and following is not None:
            if headings:
                headings[-1].last = token.map[0]
            title = following.content.strip()
            headings.append(_Section(token.map[0] + 1, title, int(token.tag[1]), token.map[1], end))
    return headings, fenced


def _marks(lines: list[str], headings: list[_Section], fenced: set[int]) -> _Marks:
    """Return the marks outside code; the mark of a question that is a heading is in its line."""
    titles = {heading.line - 1: heading.title for heading in headings}
    inside = {n for each in headings for n in range(each.line, each.first)} | fenced
    texts = ((n, titles.get(n, line)) for n, line in enumerate(lines) if n not in inside)
    found = {number: mark for number, text in texts if (mark := _MARK.fullmatch(text))}
    dots = any(mark["kind"] == "Q" and mark["end"] == "." for mark in found.values())
    return {
        number: mark
        for number, mark in found.items()
        if mark["end"] != "." or (dots and mark["kind"] in _DOTTED)
    }


def _is_question(mark: re.Match[str]) -> bool:
    return mark["kind"].lower() in _QUESTION


def _is_marked(lines: list[str], headings: list[_Section], marks: _Marks) -> bool:
    """Whether the questions of a page are marked, rather than its headings."""
    titles = {heading.line - 1 for heading in headings}
    kinds = [_is_question(mark) for number, mark in marks.items() if number not in titles]
    questions, answers = kinds.count(True), kinds.count(False)
    if not questions or not headings:
        return bool(questions)
    asked = [
        heading
        for heading, next_level in zip(headings, _next_levels(headings), strict=True)
        if next_level <= heading.level
        and _text(lines, heading.first, heading.last)
        and not any(
            n in marks and _is_question(marks[n]) for n in range(heading.first, heading.last)
        )
    ]
    if not asked:
        return answers > 0
    return len(asked) < questions and 0 < answers <= questions


def _next_levels(headings: list[_Section]) -> list[int]:
    return [*(each.level for each in headings[1:]), 0]


def _by_headings(
    file: str, lines: list[str], headings: list[_Section], marks: _Marks
) -> Iterator[Row]:
    yield from _stray(file, lines, 0, headings[0].line - 1, "text before the first heading")
    for heading, next_level in zip(headings, _next_levels(headings), strict=True):
        title, answer = heading.title, _text(lines, heading.first, heading.last)
        mark = marks.get(heading.line - 1)
        if mark is not None and _is_question(mark):
            title = _beside(mark)
        if next_level > heading.level:
            what = f"text of the section '{title}', whose questions are beneath it"
            yield from _stray(file, lines, heading.first, heading.last, what)
            continue
        first = next((n for n in range(heading.first, heading.last) if lines[n].strip()), -1)
        if first in marks and not _is_question(marks[first]):
            answer = _marked_text(lines, first, heading.last, marks[first])
        value = {"prompt": title, "completion": answer}
        if not answer or not title:
            missing = "answer" if title else "question"
            yield Row(file, heading.line, value, f"the heading '{title}' has no {missing}")
        else:
            yield Row(file, heading.line, value)


def _by_marks(
    file: str, lines: list[str], headings: list[_Section], marks: _Marks
) -> Iterator[Row]:
    titles = {heading.line - 1: heading.title for heading in headings}
    starts = sorted(titles.keys() | marks.keys())
    yield from _stray(file, lines, 0, starts[0], "text before the first question")
    question: tuple[int, str] | None = None
    for number, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        if number in titles:
            what = f"heading of the section '{titles[number]}', whose questions are marked"
            yield from _stray(file, lines, number, end, what)
            continue
        said = _marked_text(lines, number, end, marks[number])
        if _is_question(marks[number]):
            if question is not None:
                yield _unanswered(file, question)
            question = (number + 1, said)
        elif question is None or not said or not question[1]:
            at, asked = question or (number + 1, "")
            value = {"prompt": asked, "completion": said}
            missing = "answer" if asked else "question"
            yield Row(file, at, value, f"there is no {missing} to what stands here")
            question = None
        else:
            yield Row(file, question[0], {"prompt": question[1], "completion": said})
            question = None
    if question is not None:
        yield _unanswered(file, question)


def _beside(mark: re.Match[str]) -> str:
    """Return what stands in the line of a mark, without the end of bold type around both."""
    text = mark["text"]
    return text.removesuffix(mark["bold"]) if mark["bold"] and not mark["closed"] else text


def _marked_text(lines: list[str], number: int, end: int, mark: re.Match[str]) -> str:
    """Return the text from a mark in line `number` on, up to line `end`, without the mark."""
    rest = [_beside(mark), *lines[number + 1 : end]]
    return _text(rest, 0, len(rest))


def _unanswered(file: str, question: tuple[int, str]) -> Row:
    value = {"prompt": question[1], "completion": ""}
    return Row(file, question[0], value, f"the question '{question[1]}' has no answer")


def _stray(file: str, lines: list[str], first: int, last: int, what: str) -> Iterator[Row]:
    """Yield a row with a problem for lines that are no question and no answer, if there are any."""
    if text := _text(lines, first, last):
        line = next(n for n in range(first, last) if lines[n].strip())
        yield Row(file, line + 1, {"text": text}, what)


def _text(lines: list[str], first: int, last: int) -> str:
    return "\n".join(line.rstrip() for line in lines[first:last]).strip()
