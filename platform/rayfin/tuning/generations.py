"""What a model answered while it was trained (train.sample_generations), for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayfin.metrics import GENERATIONS
from rayfin.redaction import printable

_QUESTION, _ANSWER = 24, 26
"""Characters that a line of the terminal shows of a question, and of each answer."""


def generations_of(
    curve: Sequence[Mapping[str, Any]],
) -> list[tuple[int, list[Mapping[str, Any]]]]:
    """Return (step, answers) of each evaluation at which samples were generated."""
    return [(point["step"], point[GENERATIONS]) for point in curve if GENERATIONS in point]


def generation_lines(curve: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each answer of the newest evaluation: question, answer, and how it ended."""
    for _, answers in generations_of(curve)[-1:]:
        for one in answers:
            said, wanted = one["answer"], one["reference"].strip()
            right = "" if said == wanted else f"; the data's is {_cut(wanted, _ANSWER)}"
            ended = "ended" if one["ended"] else "did not end"
            yield f"  {_cut(one['prompt'], _QUESTION)} -> {_cut(said, _ANSWER)} ({ended}{right})"


def _cut(text: str, most: int) -> str:
    line = " ".join(printable(text).split())
    return repr(line if len(line) <= most else f"{line[: most - 1]}…")
