"""Passwords, keys and tokens in what is shown or written: `***` stands for each.

One function for all of it. A secret comes in a URL (before its host, or among its options), as a
setting (`password=…`), as the value under a key of a configuration, or with the prefix by which its
issuer marks it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, unquote_plus

HIDDEN = "***"

_URL = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s<>\"'`]+)")
# Greedy: a password that nobody encoded may hold an @, a / or a ?.
_USER = re.compile(r"(?P<user>[^:@/?#]*)(?P<password>:.*)?@(?P<host>[^@]*)", re.DOTALL)
_OPTION = re.compile(r"(?P<mark>[?&;])(?P<name>[^=&;?#]+)=(?P<value>[^&#]*)", re.DOTALL)
_SECRET = re.compile(
    r"pass(?!file$|_file$|es$)|pwd|secret|token(?!s$|s_|ize|_acc|.*length)|credential|signature"
    r"|^sig$|^auth|api_?key|access_?key|(^|[._-])keys?$",
    re.IGNORECASE,
)
# As in `password=hush host=db`, which a driver's message may repeat.
_SETTING = re.compile(
    r"(?P<name>\b\w*(?:password|passwd|secret|api_?key|access_key|(?:admin|auth|access)_token)\w*)"
    r"(?P<equals>\s*=\s*|[\"']\s*:\s*(?=[\"']))(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;&)}\]'\"]+)",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b(?P<kind>Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_MARKED = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AIza[\w-]{30,})\b"
)


def redact(text: str) -> str:
    """`text` without what is secret in it; a URL that is all of it may have spaces."""
    whole = _URL.match(text)
    if whole is not None and "\n" not in text:
        text = whole["scheme"] + _within(text[whole.end("scheme") :])
    else:
        text = _URL.sub(lambda found: found["scheme"] + _within(found["rest"]), text)
    text = _SETTING.sub(_hidden_setting, text)
    return _MARKED.sub(HIDDEN, _HEADER.sub(rf"\g<kind> {HIDDEN}", text))


def redacted(tree: Any) -> Any:
    """A configuration, or any tree of JSON, redacted by its keys and in its texts."""
    if isinstance(tree, str):
        return redact(tree)
    if isinstance(tree, Mapping):
        return {
            key: HIDDEN
            if isinstance(value, str) and value and is_secret(str(key))
            else redacted(value)
            for key, value in tree.items()
        }
    return [redacted(item) for item in tree] if isinstance(tree, list | tuple) else tree


def is_secret(name: str, value: str = "") -> bool:
    """Whether the value of an option or key of this name is one, or holds one as a setting."""
    return _SECRET.search(unquote(name)) is not None or (
        _SETTING.search(unquote_plus(value)) is not None
    )


def _within(rest: str) -> str:
    """What follows `scheme://`: user, password, host, path and options."""
    path, mark, options = rest, "", ""
    # Options begin at the first ? after the last @; one before it is a password's.
    at = rest.rfind("@")
    # An @ among the options is no end of a password: no host follows it, but `&` or the end.
    first = rest.find("?")
    if first != -1 and (at < first or "=" in rest[first:at]):
        path, mark, options = rest[:first], "?", rest[first + 1 :]
    if (user := _USER.match(path)) is not None and (user["password"] or "/" not in user["user"]):
        name = user["user"] if user["password"] else _user_alone(user["user"])
        password = f":{HIDDEN}" if user["password"] else ""
        path = f"{name}{password}@{path[user.end() - len(user['host']) :]}"
    return path + _OPTION.sub(_hidden_option, mark + options)


def _user_alone(user: str) -> str:
    """A token may stand in the place of a user's name."""
    return HIDDEN if _MARKED.fullmatch(user) else user


def _hidden_option(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    return f"{found['mark']}{name}={HIDDEN if value and is_secret(name, value) else value}"


def _hidden_setting(found: re.Match[str]) -> str:
    return f"{found['name']}{found['equals']}{HIDDEN}"
