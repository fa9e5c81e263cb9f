"""Chat templates by name, written from the formats that models' makers publish, or from a file."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rayfin.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = "chat_template"
"""The key of rayfin.json for the template's name that `data.chat_template` gave."""

MAX_TEMPLATE = 64 * 2**10
"""The most characters of a chat template; the longest in use have about 20,000."""

_DIRECTORY = Path(__file__).parent / "templates"
_FILE = re.compile(r"[/\\]|\.\w+$")
# The forms in which published templates write their special tokens.
_BRACKETED = re.compile(r"\[/?[A-Z_]{4,}\]")
_SPECIAL = re.compile(rf"<\|[\w ]+\|>|</?(?:s|start_of_turn|end_of_turn)>|{_BRACKETED.pattern}")


@functools.cache
def template_names() -> tuple[str, ...]:
    """Return the names of the chat templates that come with rayfin, sorted."""
    return tuple(sorted(path.stem for path in _DIRECTORY.glob("*.jinja")))


def read_chat_template(setting: str) -> str:
    """Return the text of the template that `data.chat_template` names, or that is in its file.

    Raises DataError where there is no such template, or its file can't be used.
    """
    if setting in template_names():
        return (_DIRECTORY / f"{setting}.jinja").read_text(encoding="utf-8")
    path = Path(setting).expanduser()
    try:
        if not path.is_file():
            raise _not_there(setting)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(
            f"data.chat_template: '{setting}' can't be read ({reason}); give a Jinja file"
        ) from error
    if not text.strip() or len(text) > MAX_TEMPLATE:
        raise DataError(
            f"data.chat_template: '{setting}' has {len(text)} characters; a template has 1 to "
            f"{MAX_TEMPLATE}"
        )
    _check_syntax(setting, text)
    return text


def set_chat_template(tokenizer: PreTrainedTokenizerFast, setting: str) -> None:
    """Give a tokenizer the template that `data.chat_template` names; raises DataError.

    Templates with a name serve all models: they begin with the bos token where texts of the
    tokenizer do. A file's template is taken as it is.
    """
    template = read_chat_template(setting)
    named = setting in template_names() and "bos_token" not in template
    bos = "{{ bos_token }}" if named and begins_with_bos(tokenizer) else ""
    tokenizer.chat_template = bos + template


def begins_with_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts its bos token before a text by itself."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    )


def template_digest(setting: str) -> str:
    """Return 16 hexadecimal digits that name a template by its text; raises DataError.

    A file's are others than those of the same text with a name, which `set_chat_template` begins
    with the bos token.
    """
    kind = "named\0" if setting in template_names() else ""
    return hashlib.sha256((kind + read_chat_template(setting)).encode()).hexdigest()[:16]


def template_label(setting: str) -> str:
    """Return the name of a template as an adapter tells it: its own, or its file's without path."""
    return setting if setting in template_names() else Path(setting).name


def unknown_special_tokens(template: str, tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Return the special tokens that a template writes and the tokenizer has no tokens for.

    Words in brackets are such tokens only to a tokenizer that has one: Llama 2's [INST] is text.
    """
    backend = tokenizer.backend_tokenizer
    bracketed = any(
        _BRACKETED.fullmatch(t.content) for t in tokenizer.added_tokens_decoder.values()
    )
    written = dict.fromkeys(_SPECIAL.findall(template))
    return tuple(
        token
        for token in written
        if backend.token_to_id(token) is None and (bracketed or not _BRACKETED.fullmatch(token))
    )


def _check_syntax(setting: str, text: str) -> None:
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=text)  # compiles it
    except TemplateError as error:
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        raise DataError(
            f"data.chat_template: '{setting}' is no Jinja template ({line}{error}); mend the file"
        ) from error


def _not_there(setting: str) -> DataError:
    names = ", ".join(template_names())
    if _FILE.search(setting):
        return DataError(
            f"data.chat_template: there is no file '{setting}'; give one that is there, or one of "
            f"{names}"
        )
    near = did_you_mean(setting, template_names())
    return DataError(f"data.chat_template: '{setting}' is neither a file nor one of {names}{near}")
