"""The embedded demo data: which module of Python's standard library has this symbol?

Built from the docstrings of the running Python, so it needs no download, holds real text, and is
the same for everyone with the same Python version.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

from rayfin.data.examples import Example
from rayfin.errors import DataError

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
"""In every build of Python, quick to import, free of side effects, told apart by their words."""

QUESTION = "Answer with the name of the Python module."
_MOST_PER_MODULE = 48
_LEAST_PER_MODULE = 10
_SHORTEST_SENTENCE = 12
_LONGEST_SENTENCE = 90
_SENTENCE_END = re.compile(r"(?<=[^.\s]{2})\.(?=\s|$)")
# `log(x, [base=math.e])` and the like: signatures that C functions put before their text.
_SIGNATURE = re.compile(r"^[\w.]+\([^\n]*\)( -+>? ?[^\n]*?)?\s*(\n|--|:|$)\s*")


def pydocs_examples() -> list[Example]:
    """At most 48 questions a module, in a fixed order; raises DataError without docstrings."""
    questions = {module: _questions(module) for module in MODULES}
    homes = Counter(symbol for symbols in questions.values() for symbol in symbols)
    examples = [
        _example(f"{symbol}: {symbols[symbol]}", module)
        for module, symbols in questions.items()
        for symbol in sorted(symbols, key=_fixed_order)[:_MOST_PER_MODULE]
        # `Condition.wait` is in threading and in asyncio: nobody could answer that.
        if homes[symbol] == 1
    ]
    # Under -OO only what is written in C still has docstrings.
    answers = Counter(example.messages[-1]["content"] for example in examples)
    if any(answers[module] < _LEAST_PER_MODULE for module in MODULES):
        raise DataError(
            "data.path: 'pydocs' is built from Python's docstrings, and this Python lacks them; "
            "run it without -OO, or give a file"
        )
    return examples


def _example(question: str, module: str) -> Example:
    return Example(
        messages=(
            # A system turn of our own is shorter than what chat templates put in its place.
            {"role": "system", "content": QUESTION},
            {"role": "user", "content": question},
            {"role": "assistant", "content": module},
        )
    )


def _questions(name: str) -> dict[str, str]:
    """Symbol -> first sentence of its docstring, the module's own name masked in both."""
    own_name = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
    sentences: dict[str, str] = {}
    for symbol, doc in sorted(_documented(importlib.import_module(name))):
        sentence = _first_sentence(doc)
        # The same sentence twice (a method and its function, say) would put one question's
        # answer into both splits.
        if len(sentence) >= _SHORTEST_SENTENCE:
            sentences.setdefault(own_name.sub("___", sentence), own_name.sub("___", symbol))
    return {symbol: sentence for sentence, symbol in sentences.items()}


def _documented(module: ModuleType) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of the module's own public classes, methods and functions."""
    # vars(), not getattr: looking a deprecated name up would warn.
    members = vars(module)
    for name in members.get("__all__", sorted(members)):
        value = members.get(name)
        if name.startswith("_") or not _is_own(value, module):
            continue
        if inspect.isclass(value):
            yield from _with_doc(name, vars(value).get("__doc__"))
            for attribute, member in vars(value).items():
                if not attribute.startswith("_") and _is_method(member):
                    yield from _with_doc(f"{name}.{attribute}", member.__doc__)
        elif inspect.isroutine(value):
            yield from _with_doc(name, value.__doc__)


def _with_doc(symbol: str, doc: object) -> Iterator[tuple[str, str]]:
    if isinstance(doc, str):
        yield symbol, doc


def _is_own(value: object, module: ModuleType) -> bool:
    home = getattr(value, "__module__", None) or ""
    owner = getattr(value, "__self__", None)  # random.choice is a method of a hidden instance
    return home.split(".")[0].lstrip("_") == module.__name__ or (
        type(owner).__module__ == module.__name__
    )


def _is_method(member: object) -> bool:
    return inspect.isroutine(member) or isinstance(member, property)


def _first_sentence(doc: str) -> str:
    text = _SIGNATURE.sub("", doc.strip(), count=1)
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = _SENTENCE_END.split(paragraph, maxsplit=1)[0].rstrip(".:;, ")
    if len(sentence) > _LONGEST_SENTENCE:
        sentence = sentence[:_LONGEST_SENTENCE].rsplit(" ", 1)[0].rstrip(".:;, ")
    return sentence


def _fixed_order(symbol: str) -> str:
    return hashlib.sha256(symbol.encode()).hexdigest()
