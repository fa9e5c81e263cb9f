"""Conversations as the text that a model sees, and where in it the assistant speaks.

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

from rayfin.data.examples import ChatTurn, Example
from rayfin.errors import DataError
from rayfin.models.ends import PROBES, Ends, leaves_open, turn_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Rendered:
    """A conversation's `text`; the last answer begins at `answer`; `spans` are learned."""

    text: str
    answer: int
    spans: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> str:
        """What generation is given."""
        return self.text[: self.answer]


def render_prompt(messages: Sequence[ChatTurn], tokenizer: PreTrainedTokenizerFast) -> str:
    """The text that generation starts from: all before the last assistant turn, and its opening.

    Tokenise it with `add_special_tokens=False`: what the model expects is in the text.
    """
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return render_texts([before], tokenizer, opens=True)[0]


def render_conversations(
    conversations: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> list[Rendered]:
    """Each conversation as text with the spans of what is learned, end of turn included: of all
    its assistant turns but those that the example says are not to be learned.

    A turn's span is the difference between two renderings: up to the turn with the generation
    prompt, and with the turn. What ends the last turn is added where the template writes nothing
    there (`turn_end`): else no answer would be taught to end. Where a template rewrites earlier
    turns (drops their reasoning, say) only the last turn is learned; where not even that begins
    with what generation would be given, DataError is raised.
    """
    turns = [learned_turns(example) for example in conversations]
    pairs = list(zip((example.messages for example in conversations), turns, strict=True))
    prompts = iter(
        render_texts([m[:turn] for m, of in pairs for turn in of], tokenizer, opens=True)
    )
    wholes = iter(render_texts([m[: turn + 1] for m, of in pairs for turn in of], tokenizer))
    endings, added = _end_of_turn_tokens(tokenizer), _unwritten_end(tokenizer)
    return [_spanned([(next(prompts), next(wholes)) for _ in of], endings, added) for of in turns]


def turn_end(tokenizer: PreTrainedTokenizerFast) -> Ends:
    """Returns what ends an answer in a conversation as the tokenizer's own template writes it."""
    return turn_ends((_probed(probe, tokenizer) for probe in PROBES), tokenizer)


def begins_with_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer itself puts its bos token before a text."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    )


def learned_turns(example: Example) -> list[int]:
    """The assistant turns that answer something: a greeting before the first question does not."""
    roles = [message["role"] for message in example.messages]
    first = roles.index("user")
    return [
        turn
        for turn, role in enumerate(roles)
        if role == "assistant" and turn > first and turn not in example.unlearned
    ]


def _unwritten_end(tokenizer: PreTrainedTokenizerFast) -> str:
    """What ends an answer where the chat template writes nothing after a conversation's last one;
    nothing where it does."""
    if not leaves_open(_probed(PROBES[0], tokenizer)):
        return ""
    return "".join(tokenizer.convert_ids_to_tokens(list(turn_end(tokenizer).token_ids)))


def _probed(probe: Sequence[ChatTurn], tokenizer: PreTrainedTokenizerFast) -> str:
    try:
        return render_texts([probe], tokenizer)[0]
    except DataError:  # a template that refuses such a conversation shows nothing
        return ""


def _spanned(renderings: list[tuple[str, str]], endings: tuple[str, ...], added: str) -> Rendered:
    """`added` goes after the last answer, and is learned after earlier ones where it stands."""
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
    return Rendered(text, len(last_prompt), spans)


def _end_of_turn(whole: str, start: int, endings: tuple[str, ...]) -> int:
    """Where the turn from `start` on ends: white space after its end token isn't learned."""
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
    """The conversations as text; `opens` adds the beginning of the assistant's next turn."""
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
