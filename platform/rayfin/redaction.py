"""Redact passwords, keys, tokens and terminal commands before a text is shown.

`***` replaces each secret. A secret is found in a URL (before its host, or among its options), as a
setting (`password=…`), as the value of a configuration's key, or by the prefix that its issuer
gives it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import unquote, unquote_plus

HIDDEN = "***"

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

_URL = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s<>\"'`]+)")
_ONE_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\n]*\Z")
# Greedy: a password that nobody encoded may hold an @, a / or a ?.
_USER = re.compile(r"(?P<user>[^:@/?#]*)(?P<password>:.*)?@(?P<host>[^@]*)", re.DOTALL)
_OPTION = re.compile(r"(?P<mark>[?&;])(?P<name>[^=&;?#]+)=(?P<value>[^&#]*)", re.DOTALL)
# What names a secret, as a key and in the midst of a message alike, …
_NAMES = r"password|passwd|passphrase|pwd|secret|credential|api_?key|access_?key"
# … and what does so as a key or an option alone: in a message it is an ordinary word.
_SECRET = re.compile(
    rf"{_NAMES}|pass(?!file$|_file$|es$)|token(?!s$|s_|ize|_acc|.*length)"
    r"|signature|^sig$|^auth|(^|[._-])keys?$",
    re.IGNORECASE,
)
# As in `password=hush host=db`, which a driver's message may repeat; but neither where a file is
# (`password_file=…`, `GOOGLE_APPLICATION_CREDENTIALS=/…`) nor the shell's directory (`PWD=/…`).
_SETTING = re.compile(
    r"(?P<name>\b(?!\w*_(?:file|path)\b)"
    r"(?!(?:(?:old)?pwd|\w*credentials)[\"']?\s*[=:]\s*[\"']?(?:~|\.{1,2})?/)"
    rf"\w*(?:{_NAMES}|(?:admin|auth|access)_token)\w*)"
    r"(?P<equals>\s*=\s*|[\"']\s*:\s*(?=[\"']))(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;&)}\]'\"]+)",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b(?P<kind>Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
# A file's name may begin as a token does, but has words of one case, or an ending.
_MARKED = re.compile(
    r"\b(?:hf_(?=[a-z0-9]*[A-Z])(?=[A-Z0-9]*[a-z])[A-Za-z0-9]{30,}+"
    r"|sk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[A-Za-z0-9_-]{20,}+"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|gh[pousr]_[A-Za-z0-9]{20,}+|github_pat_\w{20,}+|AIza[\w-]{30,}+)(?!\.\w)"
)


def redact(text: str, known: Iterable[str] = ()) -> str:
    """Return a message without what is secret in it: what looks so, and the `known` secrets.

    A URL in it ends at the first space, quotation mark or angle bracket. One that came from outside
    may have those in its password: give it to `redact_url` before it is put into a message.
    """
    for secret in filter(None, known):
        text = text.replace(secret, HIDDEN)
    text = _SETTING.sub(_hidden_setting, _redact_urls(text))
    return _MARKED.sub(HIDDEN, _HEADER.sub(rf"\g<kind> {HIDDEN}", text))


def redact_url(url: str) -> str:
    """Return a whole URL, whose scheme may be missing, without the secrets in it."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    plain = scheme + separator + _within(rest)
    setting = _SETTING.search(plain) if not separator else None  # as in libpq's `password=… host=…`
    return plain if setting is None else plain[: setting.start("value")] + HIDDEN


def redacted(tree: Any, text: Callable[[str], str] = redact) -> Any:
    """Return JSON data without the values of secret keys, and with `text` applied to all texts."""
    if isinstance(tree, str):
        return text(tree)
    if isinstance(tree, Mapping):
        return {
            key: HIDDEN
            if isinstance(value, str) and value and is_secret(str(key))
            else redacted(value, text)
            for key, value in tree.items()
        }
    return [redacted(item, text) for item in tree] if isinstance(tree, list | tuple) else tree


def redacted_settings(tree: Any) -> Any:
    """Return a configuration that will be read back without secret keys' values and URLs' secrets.

    Nothing else is changed, as the name of a file may look like a token.
    """
    return redacted(tree, lambda text: (redact_url if _ONE_URL.match(text) else _redact_urls)(text))


def is_secret(name: str, value: str = "") -> bool:
    """Whether an option's name means a secret, or its value contains one as a setting."""
    return _SECRET.search(unquote(name)) is not None or (
        _SETTING.search(unquote_plus(value)) is not None
    )


def _redact_urls(text: str) -> str:
    return _URL.sub(lambda found: found["scheme"] + _within(found["rest"]), text)


def _within(rest: str) -> str:
    """Redact what follows `scheme://`: user, password, host, path and options."""
    path, mark, options = rest, "", ""
    # Options begin at the first ? after the last @; one before it is a password's.
    at = rest.rfind("@")
    # An @ among the options is no end of a password: no host follows it, but `&` or the end.
    first = rest.find("?")
    if first != -1 and (at < first or "=" in rest[first:at]):
        path, mark, options = rest[:first], "?", rest[first + 1 :]
    if (user := _USER.match(path)) is not None and (user["password"] or "/" not in user["user"]):
        # A token may stand in the place of a user's name.
        name = HIDDEN if _MARKED.fullmatch(user["user"]) else user["user"]
        password = f":{HIDDEN}" if user["password"] else ""
        path = f"{name}{password}@{path[user.end() - len(user['host']) :]}"
    return path + _OPTION.sub(_hidden_option, mark + options)


def _hidden_option(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    return f"{found['mark']}{name}={HIDDEN if value and is_secret(name, value) else value}"


def _hidden_setting(found: re.Match[str]) -> str:
    return f"{found['name']}{found['equals']}{HIDDEN}"


def printable(text: str) -> str:
    """Return a text, which may come from a model or a file, without commands to a terminal."""
    return "".join("\N{REPLACEMENT CHARACTER}" if is_command(c) else c for c in text)


def is_command(character: str) -> bool:
    """Whether a character is a command to a terminal.

    These are control characters except line ends and tabs, unpaired surrogates, and changes of the
    writing direction.
    """
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS
