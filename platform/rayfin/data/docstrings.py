"""Print the first sentences of the standard library's docstrings as JSON.

This program is run by a Python of its own (see `pydocs`), since libraries such as torch and ray
patch the standard library when they are imported. It must import nothing but that library.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from types import ModuleType

_SHORTEST = 12
_LONGEST = 90
_SENTENCE_END = re.compile(r"(?<=[^.\s]{2})\.(?=\s|$)")
# `log(x, [base=math.e])` and the like: signatures that C functions put before their text.
_SIGNATURE = re.compile(r"^[\w.]+\([^\n]*\)( -+>? ?[^\n]*?)?\s*(\n|--|:|$)\s*")


def first_sentences(name: str) -> dict[str, str]:
    """Return symbol -> first sentence of its docstring, the module's own name masked in both."""
    own_name = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
    sentences: dict[str, str] = {}
    for symbol, doc in sorted(_documented(importlib.import_module(name))):
        sentence = _first_sentence(doc)
        # The same sentence twice (a method and its function, say) would put one question's
        # answer into both splits.
        if len(sentence) >= _SHORTEST:
            sentences.setdefault(own_name.sub("___", sentence), own_name.sub("___", symbol))
    return {symbol: sentence for sentence, symbol in sentences.items()}


def _documented(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of the module's public classes, methods and functions."""
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
    if len(sentence) > _LONGEST:
        sentence = sentence[:_LONGEST].rsplit(" ", 1)[0].rstrip(".:;, ")
    return sentence


if __name__ == "__main__":
    print(json.dumps({name: first_sentences(name) for name in sys.argv[1:]}))
