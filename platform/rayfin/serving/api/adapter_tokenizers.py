"""Read what serving uses of an adapter's own tokenizer, from files that nobody vouches for."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from rayfin.errors import AdapterError
from rayfin.models.chat_templates import MAX_TEMPLATE
from rayfin.serving.engine.request import AdapterSource
from rayfin.serving.engine.vocabulary import SETTINGS, named_token
from rayfin.serving.timed_executor import TimedExecutor

_MAX_FILE = 8 * 2**20
_REMEMBERED = 1024


@dataclass(frozen=True)
class AdapterTokenizer:
    """The chat template and the end-of-sequence token that an adapter brings, if it does."""

    template: str | None = None
    eos_token: str | None = None


class AdapterTokenizers:
    """Reads the tokenizers that adapters bring, once for each version."""

    def __init__(self, reads: TimedExecutor) -> None:
        self._reads = reads
        self._known: OrderedDict[str, AdapterTokenizer] = OrderedDict()

    async def of(self, source: AdapterSource) -> AdapterTokenizer:
        """Returns what the version brings.

        Raises AdapterError for files that can't be used, Unavailable where the disk stalls.
        """
        if source.ref in self._known:
            return self._known[source.ref]
        what = f"the tokenizer of adapter '{source.ref}' is being read"
        read = self._reads.submit(what, partial(_read_own, source))
        own, stays = await asyncio.wrap_future(read)
        # A version never changes. Without its directory it has been removed, or the disk has gone,
        # and may come back.
        if stays:
            self._known[source.ref] = own
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return cast("AdapterTokenizer", own)


def _read_own(source: AdapterSource) -> tuple[AdapterTokenizer, bool]:
    own = AdapterTokenizer(read_template(source), read_eos_token(source))
    return own, source.path.is_dir()


def read_template(source: AdapterSource) -> str | None:
    """Returns the chat template in an adapter's directory, or None.

    Raises AdapterError for one that is too large, or whose file can't be read.
    """
    template = _read_file(source, "chat_template.jinja", 4 * MAX_TEMPLATE)
    if template is None:
        template = _template_of(source, _read_config(source))
    if template is not None and len(template) > MAX_TEMPLATE:
        raise _too_large(source, "its chat template", len(template), MAX_TEMPLATE)
    return template


def read_eos_token(source: AdapterSource) -> str | None:
    """Returns the end-of-sequence token of the tokenizer in an adapter's directory, or None.

    Raises AdapterError for a file that can't be read.
    """
    return named_token(_read_config(source), "eos_token")


def _template_of(source: AdapterSource, config: dict[str, Any]) -> str | None:
    """Returns `chat_template` of a tokenizer_config.json, a text or a list of named ones."""
    found = config.get("chat_template")
    if isinstance(found, list):
        try:
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        except (KeyError, TypeError) as error:
            raise _unreadable(source) from error
    return found if isinstance(found, str) else None


def _read_config(source: AdapterSource) -> dict[str, Any]:
    """Returns the object in tokenizer_config.json; an empty one where there is no such file."""
    text = _read_file(source, SETTINGS, _MAX_FILE)
    try:
        config = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(source) from error
    if not isinstance(config, dict):
        raise _unreadable(source)
    return config


def _unreadable(source: AdapterSource) -> AdapterError:
    return AdapterError(f"adapter '{source.ref}': its {SETTINGS} can't be read; publish it again")


def _read_file(source: AdapterSource, name: str, most: int) -> str | None:
    """Returns the text of a regular file of at most `most` bytes; None where there is none."""
    broken = AdapterError(
        f"adapter '{source.ref}': its {name} is no text file that can be read; publish it again"
    )
    try:
        # No link is followed, and opening a pipe doesn't wait for its other end.
        file = os.open(source.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise broken from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise broken
        if status.st_size > most:
            raise _too_large(source, f"its {name}", status.st_size, most)
        with os.fdopen(file, "rb", closefd=False) as stream:
            return stream.read(most).decode()
    except UnicodeDecodeError as error:
        raise broken from error
    finally:
        os.close(file)


def _too_large(source: AdapterSource, what: str, size: int, most: int) -> AdapterError:
    return AdapterError(
        f"adapter '{source.ref}': {what} has {size} characters, and {most} are allowed; "
        "publish it with a smaller one"
    )
