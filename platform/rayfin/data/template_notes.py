"""Notes on what a chat template, or the data beside it, does to what is learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rayfin.data.corpus import Corpus
from rayfin.data.render import (
    learned_turns,
    probed,
    render_conversations,
    render_example,
    render_texts,
)
from rayfin.data.token_settings import TokenSettings
from rayfin.data.tools import leaves_out_words, said_beside_calls, without_system
from rayfin.models.chat_templates import template_label, unknown_special_tokens
from rayfin.models.ends import PROBES, after_answer
from rayfin.samples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN_TOKENS = 3


def template_notes(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, settings: TokenSettings
) -> tuple[str, ...]:
    """Return what is to be told of a chat template that was chosen, and of a default system."""
    talks = [each for each in (*corpus.train, *corpus.eval) if each.text is None]
    written = settings.of_conversations()
    if written and not talks:
        return (f"data: {', '.join(written)} has no effect, as the data are plain texts",)
    if not talks:
        return ()
    kind = "sampled conversations" if corpus.stream is not None else "conversations"
    notes = [*_special_token_note(talks, kind, tokenizer)]
    if tokenizer.chat_template:
        notes += _left_out_system_note(talks, kind, tokenizer)
        notes += _header_note(talks, tokenizer, settings)
    if settings.system is not None:
        notes.append(_system_note(talks, tokenizer, settings))
    spoken = said_beside_calls(talks)
    if spoken and leaves_out_words(spoken[0], partial(render_example, tokenizer=tokenizer)):
        notes.append(
            f"data: in {len(spoken)} of {len(talks)} conversations the assistant says something "
            "beside a tool call, which the chat template leaves out: it is not learned"
        )
    if settings.chat_template is not None:
        shown = probed(PROBES[0], tokenizer)
        if unknown := unknown_special_tokens(shown, tokenizer):
            ends = [token for token in unknown if token in after_answer(shown)]
            taught = f", and answers are taught to end with {', '.join(ends)}" if ends else ""
            notes.append(
                f"data: data.chat_template={template_label(settings.chat_template)} writes "
                f"{', '.join(unknown)}, which the model's tokenizer has no tokens for: they are "
                f"plain text to the model{taught}"
            )
    return tuple(notes)


def _system_note(
    talks: Sequence[Example], tokenizer: PreTrainedTokenizerFast, settings: TokenSettings
) -> str:
    given = [example for example in talks if settings.with_system(example) is not example]
    if not given:
        return "data: data.system has no effect, as every conversation has a system message"
    texts = [render_example(it, tokenizer) for it in (given[0], settings.with_system(given[0]))]
    if texts[0] == texts[1]:
        return "data: data.system has no effect, as the chat template leaves system messages out"
    return (
        f"data: {len(given)} of {len(talks)} conversations had no system message and have "
        "data.system; give it in requests to the adapter, too"
    )


def _left_out_system_note(
    talks: Sequence[Example], kind: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, ...]:
    having = [(each, bare) for each in talks if (bare := without_system(each)) is not None]
    if not having:
        return ()
    given, bare = having[0]
    if render_example(given, tokenizer) != render_example(bare, tokenizer):
        return ()
    return (
        f"data: the chat template leaves out the system messages of {len(having)} of {len(talks)} "
        f"{kind}; use a data.chat_template that writes them",
    )


def _header_note(
    talks: Sequence[Example], tokenizer: PreTrainedTokenizerFast, settings: TokenSettings
) -> tuple[str, ...]:
    """Return a line where an answer is learned with what opens its turn.

    Such a template does not look at add_generation_prompt, and what generation is given ends before
    the assistant's turn begins.
    """
    example = settings.with_system(talks[0])
    turn = learned_turns(example)[-1]
    before, tools = example.messages[:turn], [example.tools]
    closed, opened = (
        render_texts([before], tokenizer, opens=opens, tools=tools)[0] for opens in (False, True)
    )
    said = example.messages[turn]["content"].strip()
    if closed != opened or not said:
        return ()
    (rendered,) = render_conversations([example], tokenizer)
    start, end = rendered.spans[-1]
    header = rendered.text[start:end].partition(said)[0].strip()
    if not header or header == rendered.text[start:end].strip():
        return ()
    return (
        f"data: the chat template has no generation prompt, so that {header!r:.60} is learned as a "
        "part of each answer, and the adapter says it too; let the template open the turn where "
        "add_generation_prompt is set",
    )


def _special_token_note(
    talks: Sequence[Example], kind: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, ...]:
    """Return a line on conversations in which special tokens stand as text, if there are any."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    tokens = sorted((token for token in special if token.strip()), key=len, reverse=True)
    if not tokens:
        return ()
    any_of, begins = re.compile("|".join(map(re.escape, tokens))), {token[0] for token in tokens}
    found: dict[str, None] = {}
    count = 0
    for example in talks:
        texts = [str(turn["content"]) for turn in example.messages]
        within = [
            token
            for text in texts
            if any(begin in text for begin in begins)
            for token in any_of.findall(text)
        ]
        count += bool(within)
        found.update(dict.fromkeys(within))
    if not count:
        return ()
    shown = ", ".join([*found][:_SHOWN_TOKENS])
    return (
        f"data: {count} of {len(talks)} {kind} have special tokens of the model in their "
        f"text ({shown}), which it reads as the tokens themselves, ends of turns among them; take "
        "them out where that is not meant",
    )
