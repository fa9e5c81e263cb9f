"""Render conversations as the text that a model sees, with the spans that are learned.

A tokenizer's chat template decides the text. Without one it is

    user:
    What is the capital of France?

    assistant:
    Paris<eos>

(the bos token before it where the tokenizer puts one), the same for training and generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayfin.data.tools import check_tools, refuse_tools
from rayfin.errors import DataError
from rayfin.models.chat_templates import begins_with_bos
from rayfin.models.ends import PROBES, Ends, after_answer, leaves_open, turn_ends
from rayfin.samples import ChatTurn, Example, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class RefusedConversation(DataError):
    """A conversation that the chat template refuses, or whose answer can't be told from it."""

    def __init__(self, message: str, why: str = "") -> None:
        """`why` is the reason that the template gives, if it does."""
        super().__init__(message)
        self.why = why


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as text, with the character positions of what is learned."""

    text: str
    answer: int
    """The position where the last answer begins."""
    spans: tuple[tuple[int, int], ...]
    """The (start, end) of each learned span; the last one begins at `answer`."""

    @property
    def prompt(self) -> str:
        """The text that generation starts from."""
        return self.text[: self.answer]


def render_prompt(
    messages: Sequence[ChatTurn],
    tokenizer: PreTrainedTokenizerFast,
    tools: Sequence[Tool] = (),
) -> str:
    """Return the text that generation starts from: all before the last answer, and its opening.

    Tokenise it with `add_special_tokens=False`, as the text holds the special tokens already.
    """
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return render_texts([before], tokenizer, opens=True, tools=[tools])[0]


def render_conversations(
    conversations: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    *,
    last_only: bool = False,
) -> list[RenderedConversation]:
    """Render conversations as text, with the spans of their learned assistant turns.

    A span includes the end of the turn. It is the difference between two renderings: up to the turn
    with the generation prompt, and with the turn. What ends the last turn (`turn_end`) is added
    where the template writes nothing there, as no answer would be taught to end otherwise. An
    earlier turn that the template writes otherwise once others follow (without its reasoning, for
    example) is not learned, and none is with `last_only`. Raises DataError where the text does not
    begin with what generation would be given, and for tools that the template leaves out.
    """
    check_tools(conversations, lambda example: render_example(example, tokenizer))
    turns = [learned_turns(example)[-1 if last_only else 0 :] for example in conversations]
    pairs = [
        (example, turn) for example, its in zip(conversations, turns, strict=True) for turn in its
    ]
    tools = [example.tools for example, _ in pairs]
    before = [example.messages[:turn] for example, turn in pairs]
    prompts = iter(render_texts(before, tokenizer, opens=True, tools=tools))
    until = [example.messages[: turn + 1] for example, turn in pairs]
    wholes = iter(render_texts(until, tokenizer, tools=tools))
    ending = _TurnEnding(tokenizer)
    return [
        _with_spans([(next(prompts), next(wholes)) for _ in its], ending, example)
        for its, example in zip(turns, conversations, strict=True)
    ]


def turn_end(tokenizer: PreTrainedTokenizerFast) -> Ends:
    """Return what ends an answer in a conversation, as the tokenizer's own template writes it."""
    return turn_ends((probed(probe, tokenizer) for probe in PROBES), tokenizer)


def learned_turns(example: Example) -> list[int]:
    """Return the indices of the learned assistant turns: those after the first question."""
    roles = [message["role"] for message in example.messages]
    first = roles.index("user")
    return [
        turn
        for turn, role in enumerate(roles)
        if role == "assistant" and turn > first and turn not in example.unlearned
    ]


def probed(probe: Sequence[ChatTurn], tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a conversation as the template writes it, or an empty text where it refuses it."""
    try:
        return render_texts([probe], tokenizer)[0]
    except DataError:  # a template that refuses such a conversation shows nothing
        return ""


class _TurnEnding:
    """What a tokenizer's template writes after an answer, and how much of it ends the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        added = tokenizer.added_tokens_decoder
        special = [token.content for token in added.values() if token.special]
        self._tokens = tuple(
            token for token in {*special, *tokenizer.all_special_tokens} if token.strip()
        )
        shown, ends = probed(PROBES[0], tokenizer), turn_end(tokenizer)
        named = "".join(tokenizer.convert_ids_to_tokens(list(ends.token_ids)))
        self.added = named if leaves_open(shown) else ""
        """What ends an answer where the template writes nothing after the last, else ''."""
        self._after = after_answer(shown)
        # A template may write more where a conversation ends (Phi-3: <|end|>, and <|endoftext|>).
        found = self._after.find(named) if named else -1
        self._kept = found + len(named) if found >= 0 else len(self._after.rstrip())

    def end(self, whole: str, start: int) -> int:
        """Return where the turn that begins at `start` and ends a rendering is at its end.

        White space after its end token is left out, and what a template writes after it where the
        conversation ends.
        """
        answered = len(whole) - len(self._after)
        if self._kept and answered >= start and whole.endswith(self._after):
            return answered + self._kept
        trimmed = whole[start:].rstrip()
        return start + len(trimmed) if trimmed.endswith(self._tokens) else len(whole)


def _with_spans(
    renderings: list[tuple[str, str]], ending: _TurnEnding, example: Example
) -> RenderedConversation:
    """Return a conversation of (prompt, whole) renderings of each turn, with its end added.

    The end is learned after earlier answers, too, where the text has it there.
    """
    added, (last_prompt, last_whole) = ending.added, renderings[-1]
    text = last_whole + added
    if not text.startswith(last_prompt) or len(text) <= len(last_prompt):
        raise RefusedConversation(
            f"data: the chat template's text of {_named(example.messages)} doesn't begin with its "
            f"generation prompt (...{last_prompt[-40:]!r}), so the answer can't be told "
            "from the question; use a model whose template keeps the two the same, or another "
            "data.chat_template",
            f"its text doesn't begin with its generation prompt, ...{last_prompt[-40:]!r}",
        )
    spans = []
    for prompt, whole in renderings:
        ended = whole + added if text.startswith(whole + added) else whole
        end = ending.end(ended, len(prompt))
        # What precedes the turn is what generation would be given, and the turn what it would say.
        if len(prompt) < end and ended.startswith(prompt) and text.startswith(ended[:end]):
            spans.append((len(prompt), end))
    return RenderedConversation(text, len(last_prompt), tuple(spans))


def render_example(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a whole conversation as text; raises as `render_texts` does."""
    return render_texts([example.messages], tokenizer, tools=[example.tools])[0]


def render_texts(
    conversations: Sequence[Sequence[ChatTurn]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    opens: bool = False,
    tools: Sequence[Sequence[Tool]] = (),
) -> list[str]:
    """Render conversations as text; `opens` adds the beginning of the assistant's next turn.

    `tools` are those of each conversation, or none at all. Raises RefusedConversation, which names
    the first one that the chat template refuses.
    """
    if not conversations:
        return []
    if not tokenizer.chat_template:
        refuse_tools(conversations, tools)
        bos = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
        eos = str(tokenizer.eos_token or "")
        return [bos + _plain(messages, eos, opens) for messages in conversations]
    texts = [""] * len(conversations)
    groups: dict[int, list[int]] = {}  # those that share their tools, or have none, are one batch
    for index in range(len(conversations)):
        key = id(tools[index]) if tools and tools[index] else 0
        groups.setdefault(key, []).append(index)
    for key, group in groups.items():
        lists = [list(conversations[index]) for index in group]
        offered = tools[group[0]] if key else ()
        for index, text in zip(group, _templated(lists, tokenizer, offered, opens), strict=True):
            texts[index] = text
    return texts


def _templated(
    conversations: list[list[ChatTurn]],
    tokenizer: PreTrainedTokenizerFast,
    tools: Sequence[Tool],
    opens: bool,
) -> list[str]:
    try:
        texts = tokenizer.apply_chat_template(
            conversations,
            tools=[*tools] if tools else None,
            tokenize=False,
            add_generation_prompt=opens,
        )
    except Exception as error:  # a template is a program: it raises what it likes
        if len(conversations) > 1:  # one of them; which, the error doesn't say
            return [_templated([each], tokenizer, tools, opens)[0] for each in conversations]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RefusedConversation(
            f"data: the chat template refuses {_named(conversations[0])} ({reason:.200}); change "
            "the data as it asks, or use another model or data.chat_template",
            f"{reason:.200}",
        ) from error
    return [str(text) for text in texts]


def _named(messages: Sequence[ChatTurn]) -> str:
    asked = next((turn["content"] for turn in messages if turn["role"] == "user"), "")
    return f"the conversation with the question {str(asked)[:60]!r}"


def _plain(messages: Sequence[ChatTurn], eos: str, opens: bool) -> str:
    turns = [
        f"{message['role']}:\n{message['content']}{eos if message['role'] == 'assistant' else ''}"
        for message in messages
    ]
    return "\n\n".join([*turns, "assistant:\n"] if opens else turns)
