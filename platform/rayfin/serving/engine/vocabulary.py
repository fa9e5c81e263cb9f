"""Check that an adapter's own tokenizer has the served base's tokens, with the same ids."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayfin.adapters.files import read_json
from rayfin.errors import AdapterError
from rayfin.serving.engine.peft_files import shown
from rayfin.serving.engine.request import AdapterSource

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
MAX_BYTES = 128 * 2**20
_REMEMBERED = 256


class Vocabulary:
    """The tokens of the served base; safe to call from several threads."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        """`tokens` maps tokens to ids, added ones included (a tokenizer's `get_vocab`)."""
        self._tokens = tokens
        self._fitting: OrderedDict[bytes, None] = OrderedDict()
        """Digests of files that were found to fit: most adapters of a base bring the same."""

    def check(self, source: AdapterSource) -> None:
        """Raises AdapterError where the adapter brings a tokenizer that reads text otherwise.

        The base's is the one that is used. A token that the base lacks is let pass where it only
        pads: no prompt has it.
        """
        path = source.path / TOKENIZER
        if not path.is_file():
            return
        if path.stat().st_size > MAX_BYTES:
            raise AdapterError(
                f"adapter '{source.ref}': '{path}' has {path.stat().st_size} bytes; "
                f"at most {MAX_BYTES} are read"
            )
        digest = _digest(path)
        if digest in self._fitting:
            return
        padding = _padding(source.path)
        for token, token_id in _tokens(read_json(path)):
            known = self._tokens.get(token)
            if known == token_id or (known is None and token == padding):
                continue
            told = "doesn't have it" if known is None else f"has it as {known}"
            raise AdapterError(
                f"adapter '{source.ref}': its {TOKENIZER} has the token {shown(token)} as "
                f"{shown(token_id)}, and the served base's tokenizer {told}: it was trained with "
                "another tokenizer, or a resized vocabulary; serve it with its own base "
                "(model.name=BASE)"
            )
        self._fitting[digest] = None
        while len(self._fitting) > _REMEMBERED:
            self._fitting.popitem(last=False)


def _digest(path: Path) -> bytes:
    """Returns a digest of the tokenizer's files and of the file that says which token pads."""
    digest = hashlib.sha256()
    for file in (path, path.with_name(SETTINGS)):
        if file.is_file() and file.stat().st_size <= MAX_BYTES:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.digest()


def _tokens(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields each token and its id, in a file in the format of the `tokenizers` library.

    A file of another format yields nothing.
    """
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    elif isinstance(vocabulary, list):  # Unigram: [token, score], in the order of their ids
        for token_id, entry in enumerate(vocabulary):
            if isinstance(entry, list) and entry and isinstance(entry[0], str):
                yield entry[0], token_id
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield entry["content"], entry.get("id")


def named_token(settings: Mapping[str, Any], name: str) -> str | None:
    """Returns the token that a tokenizer_config.json names, such as `pad_token`, or None."""
    found = settings.get(name)
    if isinstance(found, dict):  # an AddedToken
        found = found.get("content")
    return found if isinstance(found, str) else None


def _padding(directory: Path) -> str | None:
    """Returns the padding token of the tokenizer in `directory`, or None."""
    path = directory / SETTINGS
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    return named_token(read_json(path), "pad_token")
