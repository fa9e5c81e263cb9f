"""What ends an answer is what training teaches there, whatever template writes it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.config.schema import ModelConfig
from rayfin.data import Corpus, Example, render_prompt, tokenize_corpus, turn_end
from rayfin.data.learned import learned_ends
from rayfin.data.tokenization import tokenize_examples
from rayfin.models import base_of, load_base, load_tokenizer
from rayfin.models.ends import END_OF_TURN, Ends, end_token_ids
from rayfin.serving.api.adapter_tokenizers import AdapterTokenizers
from rayfin.serving.api.templates import Templates
from rayfin.serving.timed_executor import TimedExecutor
from rayfin.training.checkpoint import save_adapter, vouch

OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}" + OPENS
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}\n{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LATER = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if not loop.last %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% if messages %}<|end|>{% endif %}<|assistant|>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REFUSES = "{{ raise_exception('not so') }}"
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
ROLES = ("<|user|>", "<|assistant|>", "<|end|>")

USER = {"role": "user", "content": "why?"}
ANSWER = {"role": "assistant", "content": "so"}


def ended(tokenizer: Any, ends: Ends) -> list[str]:
    return [*tokenizer.convert_ids_to_tokens(list(ends.token_ids)), *ends.texts]


def corpus_of(*examples: Example) -> Corpus:
    return Corpus(examples, examples, "messages", "digest", "source")


@pytest.mark.parametrize(
    ("template", "added", "end"),
    [
        (None, (), "<|im_end|>"),
        (LLAMA3, HEADERS, "<|eot_id|>"),
        (GEMMA, TURNS, "<end_of_turn>"),
        (PHI3, ROLES, "<|end|>"),
        (THINKING, (), "<|im_end|>"),
        (THINKING, ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), "<|im_end|>"),
        (VICUNA, (), "<|endoftext|>"),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_the_end_is_the_first_token_that_is_learned_after_the_answer(
    chatml: ModuleType, template: str | None, added: tuple[str, ...], end: str, special: bool
) -> None:
    tokenizer = chatml.tokenizer_of(template, *added, special=special)
    assert ended(tokenizer, turn_end(tokenizer)) == [end]
    (sample,) = tokenize_examples([Example(messages=(USER, ANSWER))], tokenizer)
    learned = tokenizer.convert_ids_to_tokens([i for i in sample["labels"] if i != -100])
    after = learned[learned.index("o") + 1 :]
    assert next(token for token in after if token != "Ċ") == end
    taught = learned_ends([Example(messages=(USER, ANSWER))], [sample], tokenizer)
    assert ended(tokenizer, taught) == [end]


def test_an_end_that_is_no_token_is_a_text(chatml: ModuleType) -> None:
    tokenizer = chatml.tokenizer_of(without=("<|im_end|>",))
    assert turn_end(tokenizer) == Ends(texts=("<|im_end|>",))
    assert "im_end" not in "".join(tokenizer.all_special_tokens)


@pytest.mark.parametrize("eos", ["<|endoftext|>", None])
def test_without_a_template_the_end_of_sequence_token_ends_a_turn(
    chatml: ModuleType, eos: str | None
) -> None:
    tokenizer = chatml.tokenizer_of(eos=eos)
    tokenizer.chat_template = None
    assert ended(tokenizer, turn_end(tokenizer)) == [eos] * (eos is not None)


def learned(tokenizer: Any, *messages: dict[str, str]) -> str:
    (sample,) = tokenize_examples([Example(messages=messages)], tokenizer)
    return str(tokenizer.decode([label for label in sample["labels"] if label != -100]))


@pytest.mark.parametrize(
    ("template", "end", "once", "twice"),
    [
        (GLM, "<|user|>", "so<|user|>", "so<|user|>so<|user|>"),
        (LATER, "<|end|>", "so<|end|>", "so<|end|>so<|end|>"),
        (PLAIN, "<|endoftext|>", "so\n<|endoftext|>", "so\nso\n<|endoftext|>"),
    ],
)
def test_where_a_template_writes_nothing_after_the_last_answer_its_end_is_learned_all_the_same(
    chatml: ModuleType, template: str, end: str, once: str, twice: str
) -> None:
    tokenizer = chatml.tokenizer_of(template, *ROLES)
    assert ended(tokenizer, turn_end(tokenizer)) == [end]
    assert learned(tokenizer, USER, ANSWER) == once
    assert learned(tokenizer, USER, ANSWER, USER, ANSWER) == twice
    data = tokenize_corpus(corpus_of(Example(messages=(USER, ANSWER))), tokenizer, 200)
    assert ended(tokenizer, data.ends) == [end]
    assert data.profile.notes == ()
    # What generation is given is what it was.
    shown = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert render_prompt([USER, ANSWER], tokenizer) == shown


@pytest.mark.parametrize("template", [None, VICUNA, GLM, LATER, PLAIN, REFUSES])
def test_serving_ends_an_answer_where_training_does(
    chatml: ModuleType, template: str | None
) -> None:
    tokenizer = chatml.tokenizer_of(template, *ROLES)
    calls = TimedExecutor("looks", threads=1, seconds=60.0, most_stuck=1)
    served = Templates(tokenizer, 1.0, AdapterTokenizers(calls))
    assert asyncio.run(served.ends(None)) == turn_end(tokenizer)


def test_where_nothing_can_end_an_answer_that_is_said(chatml: ModuleType) -> None:
    assert turn_end(chatml.tokenizer_of(REFUSES)) == Ends()
    tokenizer = chatml.tokenizer_of(PLAIN, eos=None)
    assert turn_end(tokenizer) == Ends()
    data = tokenize_corpus(corpus_of(Example(messages=(USER, ANSWER))), tokenizer, 200)
    assert data.ends == Ends()
    assert any("the chat template writes none" in note for note in data.profile.notes)


def test_what_is_taught_follows_the_data(chatml: ModuleType) -> None:
    tokenizer = chatml.tokenizer_of()
    talk, text = Example(messages=(USER, ANSWER)), Example(text="so")
    for examples, tokens in [
        ((talk,), ["<|im_end|>"]),
        ((text,), ["<|endoftext|>"]),
        ((talk, text), ["<|im_end|>", "<|endoftext|>"]),
    ]:
        data = tokenize_corpus(corpus_of(*examples), tokenizer, 200)
        assert ended(tokenizer, data.ends) == tokens
        assert data.profile.notes == ()
    cut = Example(messages=(USER, {"role": "assistant", "content": "so" * 200}))
    data = tokenize_corpus(corpus_of(cut), tokenizer, 100)
    assert data.ends == Ends()
    assert any("every answer is cut before its end" in note for note in data.profile.notes)
    nameless = chatml.tokenizer_of(eos=None)
    notes = tokenize_corpus(corpus_of(text), nameless, 200).profile.notes
    assert any("has no eos_token" in note for note in notes)


def test_padding_with_the_end_of_sequence_token_teaches_the_end_all_the_same(
    chatml: ModuleType,
) -> None:
    tokenizer = chatml.tokenizer_of(VICUNA)
    tokenizer.pad_token = tokenizer.eos_token
    data = tokenize_corpus(corpus_of(Example(messages=(USER, ANSWER))), tokenizer, 200)
    assert ended(tokenizer, data.ends) == ["<|endoftext|>"]


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 3}, {3, 7, 9}),
        ({"eos_token_id": 7}, {"eos_token_id": [7, 8]}, {7, 8}),
        (None, {"eos_token_id": None}, set()),
        ({"eos_token_id": ["x", True, -1, 5]}, {}, {5}),
    ],
)
def test_the_model_s_own_ends_are_those_of_all_its_files(
    chatml: ModuleType, tmp_path: Path, generation: Any, config: Any, ids: set[int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = end_token_ids(ModelConfig(name=str(tmp_path)), chatml.tokenizer_of(eos=None))
    assert set(found) == ids
    tokenizer = chatml.tokenizer_of()
    whole = end_token_ids(ModelConfig(name=str(tmp_path)), tokenizer)
    assert set(whole) == ids | {tokenizer.eos_token_id}


def test_a_version_carries_what_it_was_taught(chatml: ModuleType, tmp_path: Path) -> None:
    """A whole model has it in its generation configuration, too."""
    base = chatml.write_base(tmp_path / "base", chatml.tokenizer_of())
    tokenizer = load_tokenizer(ModelConfig(name=str(base)))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends, trained = Ends((end,), ("---",)), tmp_path / "trained"
    model = ModelConfig(name=str(base))
    save_adapter(load_base(model, None, "cpu"), tokenizer, trained, ends)
    vouch(trained, base_of(model))
    assert json.loads((trained / "generation_config.json").read_text())["eos_token_id"] == [
        tokenizer.eos_token_id,
        end,
    ]
    assert set(end_token_ids(ModelConfig(name=str(trained)), tokenizer)) == {
        tokenizer.eos_token_id,
        end,
    }
    registry = Registry(tmp_path / "registry")
    first = registry.publish("whole", trained)
    told = {"tokens": {"<|im_end|>": end}, "texts": ["---"]}
    assert first.metadata[END_OF_TURN] == told
    assert Ends.from_json(first.metadata[END_OF_TURN], tokenizer) == ends
    assert registry.publish("again", first.path).metadata[END_OF_TURN] == told
    other = {"tokens": {}, "texts": []}
    given = registry.publish("given", trained, {END_OF_TURN: other})
    assert given.metadata[END_OF_TURN] == other


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "other keys"),
        ({"token": {}}, "other keys"),
        ({"tokens": [1]}, "must be a mapping"),
        ({"tokens": {"<|im_end|>": 1}}, "'<|im_end|>' is token 1"),
        ({"tokens": {"<|im_end|>": "x"}}, "'<|im_end|>' is token x"),
        ({"tokens": {"<|unheard|>": None}}, "which the served base's tokenizer does not say"),
        ({"texts": [""]}, "1 to 256 characters"),
        ({"texts": ["x" * 257]}, "1 to 256 characters"),
        ({"texts": list("abcdefghijklmnopq")}, "17 ends; at most 16"),
    ],
)
def test_ends_that_are_none_are_refused(chatml: ModuleType, value: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        Ends.from_json(value, chatml.tokenizer_of())
    assert reason in str(caught.value)
