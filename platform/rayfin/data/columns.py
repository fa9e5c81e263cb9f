"""Which columns of a row and which keys of a turn are used, refused, or reported as unused.

The tables here are the only place that says so. What they don't list is unused, and reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

COLUMNS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that each format needs, in the order in which formats are tried on a row."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "tools"),
    "messages": ("system", "tools"),
    "conversations": ("system", "tools"),
    "instruction": ("input", "system", "history", "tools"),
    "prompt_completion": ("system", "history", "tools"),
    "text": (),
}
"""The columns that each format uses where a row has them."""

_SYSTEM = {"system_prompt": "system", "system_message": "system"}
_TOOLS = {"functions": "tools"}

TEXTS_OR_TURNS = ("prompt", "completion", "chosen", "rejected")
"""The columns that hold the text of one turn, or a list of turns."""

OTHER_NAMES: dict[str, dict[str, str]] = {
    "preference": _TOOLS,
    "messages": {
        **dict.fromkeys(("conversation", "dialogue", "dialog", "chat"), "messages"),
        **_SYSTEM,
        **_TOOLS,
    },
    "conversations": {**_SYSTEM, **_TOOLS},
    "instruction": {
        "response": "output",
        "context": "input",
        "指令": "instruction",
        "输入": "input",
        "输出": "output",
        **_SYSTEM,
        **_TOOLS,
    },
    "prompt_completion": {
        **dict.fromkeys(("question", "query", "problem", "input", "inputs", "问题"), "prompt"),
        **dict.fromkeys(("answer", "response", "solution", "output", "targets"), "completion"),
        **dict.fromkeys(("回答", "答案"), "completion"),
        **_SYSTEM,
        **_TOOLS,
    },
    "text": {},
}
"""For each format, other names of columns; one counts only where its column has no value.

They are in lower case, and so are the formats' own names: a table may write them as it likes.
"""

SPEAKER_KEYS = ("role", "from")
"""The keys that hold a turn's speaker."""

CONTENT_KEYS = ("content", "value", "text")
"""The keys that hold what a turn says."""

CALL_KEYS = ("tool_calls", "function_call")
"""The keys of an assistant's turn that hold its calls of tools."""

RESULT_KEYS = ("name", "tool_call_id")
"""The keys of a tool's turn that say which call it answers."""

LEARN_KEYS = ("weight", "train", "loss", "loss_weight")
"""The keys of a turn whose value 0 (or false) excludes the turn from the loss."""

SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "ai": "assistant",
    **dict.fromkeys(("function_call", "function-call", "tool_call", "tool_calls"), "call"),
    **dict.fromkeys(("tool", "tools", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "function_response"), "tool"),
    "系统": "system",
    "用户": "user",
    "助手": "assistant",
}
"""The role of each speaker, in lower case; a `call` is an assistant's turn that calls tools."""

PAIR_KEYS = {"human": "user", "user": "user", "input": "user"} | dict.fromkeys(
    ("assistant", "bot", "gpt", "output"), "assistant"
)
"""The role of each key of an object that holds a question and its answer: two turns in one."""

_NO_TOOLS = "this format has no place for tools"
_MEDIA = "images, sound and video can't be trained on yet"
_REASONING = "reasoning beside an answer can't be trained on yet; put it into the content"
_WEIGHTS = "weights of whole samples can't be trained with yet"
_LABELS = (
    "which answers are good, or which class a text is of, can't be trained on yet; take the bad "
    "answers out"
)
_PAIRS = "rows of this format can't be preference pairs"
_TEMPLATE = "options of the chat template can't be given by the data yet"
_PARTIAL = "only whole turns can be left out of the learning (weight: 0)"
_CHOICES = "is a part of the question that this format has no place for; put it into the question"
_ASKED = "is asked beside what this format takes as the question; put the two together"
PARTS = (_CHOICES, _ASKED)
"""The reasons to refuse what is a part of the question."""

_QUESTIONS = "question query problem 问题"
_PASSAGES = "choices options passage article document premise hypothesis"


def _with_reason(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


_MEDIA_NAMES = "image images video videos audio audios"
UNSUPPORTED = {
    **_with_reason(_NO_TOOLS, "tools functions tool_calls function_call"),
    **_with_reason(_MEDIA, _MEDIA_NAMES),
    **_with_reason(_LABELS, "label kto_tag"),
    **_with_reason(
        _PAIRS, "chosen rejected rejected_response rejected_messages rejected_completion"
    ),
    **_with_reason(_WEIGHTS, "weight sample_weight loss_weight"),
    **_with_reason(_TEMPLATE, "chat_template chat_template_kwargs"),
}
"""Why a row with one of these columns is refused: it would be learned as what it is not."""

UNSUPPORTED_IN = {
    "messages": _with_reason("earlier turns belong into messages", "history"),
    "conversations": _with_reason("earlier turns belong into conversations", "history"),
    "instruction": {
        **_with_reason(_CHOICES, _PASSAGES),
        **_with_reason(_ASKED, _QUESTIONS),
        "context": "input has a value already; put the two together",
    },
    "prompt_completion": {
        **_with_reason(_CHOICES, f"{_PASSAGES} context input instruction 指令"),
        **_with_reason(_ASKED, _QUESTIONS),
    },
}
"""Format -> columns that can't be trained on in this format only, each with the reason."""

UNSUPPORTED_TURN_KEYS = {
    "tool_responses": "what a tool answers is a turn of its own, of the role tool",
    **_with_reason(_MEDIA, _MEDIA_NAMES),
    **_with_reason(_REASONING, "reasoning_content reasoning thinking"),
    **_with_reason(_PARTIAL, "train_detail training_detail train_on_detail loss_mask"),
}

USED = frozenset(
    {column for need in (*COLUMNS.values(), *OPTIONAL.values()) for column in need}
    | {name for names in OTHER_NAMES.values() for name in names}
)
"""All columns that some format uses."""

NAMED = frozenset(
    USED | UNSUPPORTED.keys() | {name for names in UNSUPPORTED_IN.values() for name in names}
)
"""All columns that these tables name; their values decide what becomes of a row."""

NEEDED = frozenset(
    {column for need in COLUMNS.values() for column in need}
    | {
        name
        for shape, names in OTHER_NAMES.items()
        for name, column in names.items()
        if column in COLUMNS[shape] and name != "input"
    }
)
"""All columns that some format needs, by all of their names."""

NOT_NEEDED = frozenset(
    {
        *("input", "context", "输入", "history", "tools", "functions"),
        *("system", "system_prompt", "system_message"),
    }
)
"""The columns that are used where a row has them, but that no format needs."""


def is_missing(value: object) -> bool:
    """Whether a value is missing: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: object, *, text: bool = False) -> bool:
    """Whether a value is missing, white space, or a container of such values only.

    With `text`, a string that spells such a value counts too, as in a cell of a CSV.
    """
    if isinstance(value, str):
        return not value.strip() or (text and value.strip() in ("[]", "{}", "null", "NaN"))
    left = [value]
    while left:  # no recursion, as containers may be nested deeply
        value = left.pop()
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
        elif not (is_missing(value) or (isinstance(value, str) and not value.strip())):
            return False
    return True


def parsed_list(value: object) -> list[Any]:
    """Return a list as it is, or from its JSON text, and an empty list for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []
