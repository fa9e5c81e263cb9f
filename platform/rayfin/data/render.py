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

from rayfin.errors import DataError
from rayfin.models.ends import PROBES, Ends, leaves_open, turn_ends
from rayfin.samples import ChatTurn, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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


def render_prompt(messages: Sequence[ChatTurn], tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the text that generation starts from: all before the last answer, and its opening.

    Tokenise it with `add_special_tokens=False`, as the text holds the special tokens already.
    """
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return render_texts([before], tokenizer, opens=True)[0]


def render_conversations(
    conversations: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> list[RenderedConversation]:
    """Render conversations as text, with the spans of their learned assistant turns.

    A span includes the end of the turn. It is the difference between two renderings: up to the turn
    with the generation prompt, and with the turn. What ends the last turn (`turn_end`) is added
    where the template writes nothing there, as no answer would be taught to end otherwise. Where a
    template rewrites earlier turns (drops their reasoning, for example), only the last turn is
    learned. Raises DataError where the text does not begin with what generation would be given.
    """
    if any(example.uses_tools for example in conversations):
        raise DataError(
            "data: samples with tools can't be rendered yet; leave out the columns of tools with "
            "data.ignore_columns=[tools], and take conversations with tool calls out"
        )
    turns = [learned_turns(example) for example in conversations]
    pairs = list(zip((example.messages for example in conversations), turns, strict=True))
    prompts = iter(
        render_texts([m[:turn] for m, of in pairs for turn in of], tokenizer, opens=True)
    )
    wholes = iter(render_texts([m[: turn + 1] for m, of in pairs for turn in of], tokenizer))
    endings, added = _end_of_turn_tokens(tokenizer), _unwritten_end(tokenizer)
    return [
        _with_spans([(next(prompts), next(wholes)) for _ in of], endings, added) for of in turns
    ]


def turn_end(tokenizer: PreTrainedTokenizerFast) -> Ends:
    """Return what ends an answer in a conversation, as the tokenizer's own template writes it."""
    return turn_ends((_probed(probe, tokenizer) for probe in PROBES), tokenizer)


def begins_with_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts its bos token before a text by itself."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    )


def learned_turns(example: Example) -> list[int]:
    """Return the indices of the learned assistant turns: those after the first question."""
    roles = [message["role"] for message in example.messages]
    first = roles.index("user")
    return [
        turn
        for turn, role in enumerate(roles)
        if role == "assistant" and turn > first and turn not in example.unlearned
    ]


def _unwritten_end(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return what ends an answer where the template writes nothing after the last, else ''."""
    if not leaves_open(_probed(PROBES[0], tokenizer)):
        return ""
    return "".join(tokenizer.convert_ids_to_tokens(list(turn_end(tokenizer).token_ids)))


def _probed(probe: Sequence[ChatTurn], tokenizer: PreTrainedTokenizerFast) -> str:
    try:
        return render_texts([probe], tokenizer)[0]
    except DataError:  # a template that refuses such a conversation shows nothing
        return ""


def _with_spans(
    renderings: list[tuple[str, str]], endings: tuple[str, ...], added: str
) -> RenderedConversation:
    """Return a conversation of (prompt, whole) renderings of each turn, with `added` at its end.

    `added` is learned after earlier answers, too, where the text has it there.
    """
    text = renderings[-1][1] + added
    renderings = [
        (of, whole + added if text.startswith(whole + added) else whole) for of, whole in renderings
    ]
    last_prompt = renderings[-1][0]
    if not text.startswith(last_prompt) or len(text) <= len(last_prompt):
        raise DataError(
            "data: the chat template's text of a conversation doesn't begin with its generation "
            f"prompt (...{last_prompt[-40:]!r}), so the answer can't be told from the question; "
            "use a model whose template keeps the two the same"
        )
    nested = all(text.startswith(whole) and whole.startswith(of) for of, whole in renderings)
    learned = renderings if nested else renderings[-1:]
    spans = tuple((len(of), _end_of_turn(whole, len(of), endings)) for of, whole in learned)
    return RenderedConversation(text, len(last_prompt), spans)


def _end_of_turn(whole: str, start: int, endings: tuple[str, ...]) -> int:
    """Return where the turn from `start` on ends, without the white space after its end token."""
    trimmed = whole[start:].rstrip()
    return start + len(trimmed) if trimmed.endswith(endings) else len(whole)


def _end_of_turn_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(token for token in {*added, *tokenizer.all_special_tokens} if token.strip())


def render_texts(
    conversations: Sequence[Sequence[ChatTurn]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    opens: bool = False,
) -> list[str]:
    """Render conversations as text; `opens` adds the beginning of the assistant's next turn.

    Raises DataError where the chat template refuses a conversation.
    """
    if not conversations:
        return []
    if not tokenizer.chat_template:
        bos = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
        eos = str(tokenizer.eos_token or "")
        return [bos + _plain(messages, eos, opens) for messages in conversations]
    lists = [list(messages) for messages in conversations]
    try:
        texts = tokenizer.apply_chat_template(lists, tokenize=False, add_generation_prompt=opens)
    except Exception as error:  # a template is a program: it raises what it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data: the model's chat template refuses a conversation ({reason:.200}); "
            "change the order of roles as it asks, or use another model"
        ) from error
    return [str(text) for text in texts]


def _plain(messages: Sequence[ChatTurn], eos: str, opens: bool) -> str:
    turns = [
        f"{message['role']}:\n{message['content']}{eos if message['role'] == 'assistant' else ''}"
        for message in messages
    ]
    return "\n\n".join([*turns, "assistant:\n"] if opens else turns)
