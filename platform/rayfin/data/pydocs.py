"""The built-in demonstration data: which module of Python's standard library has this symbol?

It is built from the docstrings of the running Python, so that it needs no download, consists of
real text, and is the same for everyone with the same Python version.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayfin.errors import DataError
from rayfin.samples import Example

MODULES = (
    "asyncio",
    "calendar",
    "datetime",
    "decimal",
    "inspect",
    "logging",
    "math",
    "pathlib",
    "random",
    "socket",
    "statistics",
    "tarfile",
    "threading",
    "unittest",
)
"""Modules of every build of Python that import fast and are told apart by their words."""

QUESTION = "Answer with the name of the Python module."
_MOST_PER_MODULE = 48
_LEAST_PER_MODULE = 10


@functools.cache
def pydocs_examples() -> tuple[Example, ...]:
    """Return at most 48 questions per module, in a fixed order.

    Raises DataError where Python was built without docstrings.
    """
    sentences = _sentences()
    homes = Counter(symbol for symbols in sentences.values() for symbol in symbols)
    examples = tuple(
        _example(f"{symbol}: {symbols[symbol]}", module)
        for module, symbols in sentences.items()
        for symbol in sorted(symbols, key=_fixed_order)[:_MOST_PER_MODULE]
        # `Condition.wait` is in threading and in asyncio: nobody could answer that.
        if homes[symbol] == 1
    )
    answers = Counter(example.messages[-1]["content"] for example in examples)
    if any(answers[module] < _LEAST_PER_MODULE for module in MODULES):
        raise DataError(
            "data.path: 'pydocs' is built from Python's docstrings, and this Python was built "
            "without them; use another Python, or give a file"
        )
    return examples


class PydocsRows:
    """The examples as rows of format messages; they are made when the rows are asked for."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"messages": list(example.messages)} for example in pydocs_examples())


def _sentences() -> dict[str, dict[str, str]]:
    """Return module -> symbol -> sentence, as a Python that has loaded nothing else sees them."""
    program = Path(__file__).with_name("docstrings.py")
    # -I -S: neither the environment nor site-packages can change what is found.
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(program), *MODULES]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise DataError(
            f"data.path: 'pydocs' is built by running '{sys.executable}', which failed "
            f"({reason:.200}); mend that Python, or give a file"
        ) from error
    found: dict[str, dict[str, str]] = json.loads(run.stdout)
    return found


def _example(question: str, module: str) -> Example:
    return Example(
        messages=(
            # A system turn of our own is shorter than what chat templates put in its place.
            {"role": "system", "content": QUESTION},
            {"role": "user", "content": question},
            {"role": "assistant", "content": module},
        )
    )


def _fixed_order(symbol: str) -> str:
    return hashlib.sha256(symbol.encode()).hexdigest()
