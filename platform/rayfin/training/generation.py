"""Answer held-out questions greedily, to see how a model does while it is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

import torch

from rayfin.data import render_prompt, turn_end
from rayfin.data.render import RefusedConversation
from rayfin.data.token_settings import TokenSettings
from rayfin.heartbeat import beat
from rayfin.models import max_positions
from rayfin.models.ends import Ends, end_token_ids
from rayfin.samples import ChatTurn
from rayfin.training.spec import TrialSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rayfin.samples import Example
    from rayfin.training.parallel import ParallelStrategy
    from rayfin.training.trial_cache import TrialCache

Generate = Callable[[torch.nn.Module], list[dict[str, Any]]]
"""Takes the model as it is, and returns what it answers, as points of a curve hold it."""

LONGEST = 256
"""Tokens that a generated answer has at most."""


@dataclass(frozen=True)
class Answer:
    """What a model generated for a prompt."""

    text: str
    ended: bool
    """Whether the model ended it; else it was cut."""


@dataclass(frozen=True)
class _Question:
    prompt: str
    """All that generation is given, as text."""
    shown: str
    """The last turn of the user."""
    reference: str
    """The answer that the data has."""
    max_new_tokens: int


def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    ends: Ends,
    max_new_tokens: int,
) -> Answer:
    """Return the model's greedy answer to `prompt`, the rendered text of a conversation.

    The model must be in eval mode.
    """
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    device = next(model.parameters()).device
    output = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"].to(device),
        attention_mask=inputs["attention_mask"].to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(ends.token_ids) or None,
        **({"stop_strings": list(ends.texts), "tokenizer": tokenizer} if ends.texts else {}),
    )
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    said = list(takewhile(lambda token: token not in ends.token_ids, new))
    text = str(tokenizer.decode(said, skip_special_tokens=True))
    ended = len(said) < len(new) or any(end in text for end in ends.texts)
    for end in ends.texts:
        text = text.partition(end)[0]
    return Answer(text.strip(), ended)


def question(messages: Sequence[ChatTurn]) -> str:
    """Return the last turn of the user in a conversation."""
    return next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), "")


def turn_text(turn: ChatTurn) -> str:
    """Return the text of an answer as the data has it, and its tool calls as JSON."""
    calls = [json.dumps(call["function"]) for call in turn.get("tool_calls", ())]
    return "\n".join(filter(None, (turn["content"], *calls)))


def sample_generator(
    spec: TrialSpec, cache: TrialCache, strategy: ParallelStrategy
) -> tuple[Generate | None, tuple[str, ...]]:
    """Return what answers the first `train.sample_generations` held-out questions, or None.

    The second value has a line for the user where that is less than was asked for. An answer has at
    most twice the tokens of the data's answer and 16 more, and at most `LONGEST`. A sample whose
    question leaves no room in data.max_length is passed over, also where data.truncation=left has
    training cut the question.
    """
    count = spec.train.sample_generations
    if not count:
        return None, ()
    asked = f"train.sample_generations={count}"
    if strategy.together:
        why = f"{strategy.group.strategy} shards the model, and no worker can run it alone"
        return None, (f"{asked}: nothing is generated, as {why}; scaling.strategy=ddp can",)
    tokenizer = cache.tokenizer(spec)
    questions = list(islice(_questions(spec, cache.corpus(spec).eval, tokenizer), count))
    notes: tuple[str, ...] = ()
    if (found := len(questions)) < count:
        what = f"{found} of the held-out samples have" if found else "no held-out sample has"
        notes = (f"{asked}: {what} a question that fits data.max_length",)
    if not questions:
        return None, notes
    ends = turn_end(tokenizer) | Ends(end_token_ids(spec.model, tokenizer))

    def generate(model: torch.nn.Module) -> list[dict[str, Any]]:
        training, device = model.training, next(model.parameters()).device
        found = []
        # Greedy decoding draws nothing; should a model do so, the training must not notice.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            model.eval()
            for one in questions:
                beat("generating a sample")
                said = answer(model, tokenizer, one.prompt, ends, one.max_new_tokens)
                found.append(
                    {
                        "prompt": one.shown,
                        "reference": one.reference,
                        "answer": said.text,
                        "ended": said.ended,
                    }
                )
            model.train(training)
        return found

    return generate, notes


def _questions(
    spec: TrialSpec, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> Iterator[_Question]:
    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    positions = max_positions(spec.model)
    settings = TokenSettings.of(spec.data, spec.train)
    for example in map(settings.with_system, examples):
        if not example.messages:
            continue
        try:
            prompt = render_prompt(example.messages, tokenizer, example.tools)
        except RefusedConversation:  # it was left out of training, too
            continue
        reference = turn_text(example.messages[-1])
        if (taken := tokens(prompt)) >= spec.data.max_length:
            continue
        room = LONGEST if positions is None else positions - spec.method.positions - taken
        most = max(1, min(2 * tokens(reference) + 16, room, LONGEST))
        yield _Question(prompt, question(example.messages), reference, most)
