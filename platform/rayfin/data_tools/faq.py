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
    r"\s*\d*\s*[:：.]\s*(?(bold)(?P<closed>\*\*|__)?)\s*(?P<text>.*)"
)
_QUESTION = ("q", "question", "frage", "问")


@dataclass
class _Section:
    """A heading, or the mark of a question, with the lines beneath it."""

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
    has any, what follows `Q:` up to `A:`. What is neither question nor answer is a row with a
    problem. Raises DataError where the file can't be read.
    """
    with read_errors(path):
        text = path.read_text(encoding="utf-8-sig")
    lines = text.splitlines()
    headings, fenced = _structure(text)
    marks = [
        (number, found)
        for number, line in enumerate(lines)
        if number not in fenced and (found := _MARK.fullmatch(line))
    ]
    if any(found["kind"].lower() in _QUESTION for _, found in marks):
        yield from _by_marks(str(path), lines, marks)
    elif headings:
        yield from _by_headings(str(path), lines, headings)
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
    end = len(text.splitlines())
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


def _by_headings(file: str, lines: list[str], headings: list[_Section]) -> Iterator[Row]:
    yield from _stray(file, lines, 0, headings[0].line - 1, "text before the first heading")
    levels = [*(each.level for each in headings[1:]), 0]
    for heading, next_level in zip(headings, levels, strict=True):
        answer = _text(lines, heading.first, heading.last)
        if next_level > heading.level:
            what = f"text of the section '{heading.title}', whose questions are beneath it"
            yield from _stray(file, lines, heading.first, heading.last, what)
        elif not answer or not heading.title:
            missing = "answer" if heading.title else "question"
            value = {"prompt": heading.title, "completion": answer}
            yield Row(file, heading.line, value, f"the heading '{heading.title}' has no {missing}")
        else:
            yield Row(file, heading.line, {"prompt": heading.title, "completion": answer})


def _by_marks(file: str, lines: list[str], marks: list[tuple[int, re.Match[str]]]) -> Iterator[Row]:
    yield from _stray(file, lines, 0, marks[0][0], "text before the first question")
    ends = [*(number for number, _ in marks[1:]), len(lines)]
    question: tuple[int, str] | None = None
    for (number, found), end in zip(marks, ends, strict=True):
        text = found["text"]
        if found["bold"] and not found["closed"]:
            text = text.removesuffix(found["bold"])
        rest = [text, *lines[number + 1 : end]]
        said = _text(rest, 0, len(rest))
        if found["kind"].lower() in _QUESTION:
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
