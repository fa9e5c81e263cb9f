"""What is learned of conversations is what generation would have to say, for the formats in use."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rayfin.data import Corpus, tokenize_corpus
from rayfin.data.token_settings import TokenSettings
from rayfin.data.tokenization import tokenize_examples
from rayfin.errors import DataError, RequestError
from rayfin.models.chat_templates import set_chat_template, template_names
from rayfin.objectives import SFT
from rayfin.samples import NO_LOSS, Example
from rayfin.serving.api.adapter_tokenizers import AdapterTokenizers
from rayfin.serving.api.prompts import Prompts
from rayfin.serving.api.schema import ChatBody
from rayfin.serving.api.templates import Templates

PUBLISHED = Path(__file__).parents[1] / "chat_templates"
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("a", "b"), (">", "Ċ"), ("Ċ", "x"), ("Ġ", "x")]

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a “city”, now",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}},
)


def call(city: str, said: str = "") -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"zone": 1, "city": city}}  # not in a sorted order
    called = {"type": "function", "function": function, "id": "a1b2c3d4e"}
    return {"role": "assistant", "content": said, "tool_calls": [called]}


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Is it cold\nin 北京?"}
ANSWER = {"role": "assistant", "content": "Yes: ab, −3 °C."}
THANKS = {"role": "user", "content": "Thanks"}
WELCOME = {"role": "assistant", "content": "You are welcome. xab"}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "a1b2c3d4e", "content": "-3"}
THOUGHT = {"role": "assistant", "content": "<think>\nIt is winter.\n</think>\n\nYes, ab."}
THOUGHT_AGAIN = {"role": "assistant", "content": "<think>\nPolite.\n</think>\n\nNo."}
TALKS: dict[str, tuple[dict[str, Any], ...]] = {
    "one": (USER, ANSWER),
    "two": (USER, ANSWER, THANKS, WELCOME),
    "system": (SYSTEM, USER, ANSWER, THANKS, WELCOME),
    "reasoning": (USER, THOUGHT, THANKS, THOUGHT_AGAIN),
    "tools": (USER, call("北京"), RESULT, ANSWER),
    "tools, two": (USER, call("北京"), RESULT, ANSWER, THANKS, WELCOME),
    "tools, reasoning": (USER, call("ab", str(THOUGHT["content"])), RESULT, THOUGHT_AGAIN),
    "tools, twice": (USER, ANSWER, THANKS, call("Köln"), RESULT, call("ab"), RESULT, WELCOME),
}
CALLS = call("ab") | {"tool_calls": call("ab")["tool_calls"] + call("Köln")["tool_calls"]}
CANT_TELL, NO_ROLE, NO_TOOLS = "can't be told from the question", "refuses", "leaves out the tools"
WITH_TOOLS = [talk for talk in TALKS if talk.startswith("tools")]


@dataclass(frozen=True)
class Format:
    """A chat template, the tokens that it writes, and what it makes of `TALKS`."""

    end: str
    special: tuple[str, ...]
    bos: str | None = None
    learned: dict[str, list[int] | str] | None = None
    """The learned turns, or why the talk is refused; left out: all of the assistant's."""


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]")
MISTRAL = (*MISTRAL, "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
UNABLE: dict[str, list[int] | str] = dict.fromkeys(WITH_TOOLS, NO_TOOLS)
NO_TOOL_ROLE: dict[str, list[int] | str] = dict.fromkeys(WITH_TOOLS, NO_ROLE)
LAST_TOOLS: dict[str, list[int] | str] = {"tools, two": [5], "tools, twice": [3, 5, 7]}
FORMATS = {
    "chatml": Format("<|im_end|>", CHATML, learned=UNABLE),
    "llama3": Format("<|eot_id|>", LLAMA, "<|begin_of_text|>"),
    "qwen2.5": Format("<|im_end|>", CHATML),
    # It drops the reasoning of answers before the last question, and writes an empty one at the
    # end: of those only what follows the last question is learned.
    "qwen3": Format(
        "<|im_end|>",
        CHATML,
        learned={
            "two": [3],
            "system": [4],
            "reasoning": [3],
            "tools": [3],
            "tools, two": [5],
            "tools, twice": [7],
        },
    ),
    # Tools go before the last question, and the system message is only there for generation.
    "mistral": Format("</s>", MISTRAL, "<s>", LAST_TOOLS | {"system": CANT_TELL}),
    "gemma2": Format("<end_of_turn>", GEMMA, "<bos>", NO_TOOL_ROLE | {"system": NO_ROLE}),
    "phi3": Format("<|end|>", PHI, learned=UNABLE),
}
NAMED = {
    "alpaca": Format("</s>", ("</s>",), learned=NO_TOOL_ROLE),
    "chatml": FORMATS["chatml"],
    "gemma": Format("<end_of_turn>", GEMMA, "<bos>", NO_TOOL_ROLE),
    "hermes": FORMATS["qwen2.5"],
    "llama2": Format("</s>", ("<s>", "</s>"), "<s>", NO_TOOL_ROLE),
    "llama3": FORMATS["llama3"],
    "mistral": Format("</s>", MISTRAL, "<s>", LAST_TOOLS | {"system": [4]}),
    "phi": FORMATS["phi3"],
    "vicuna": Format("</s>", ("</s>",), learned=NO_TOOL_ROLE),
    "zephyr": Format("</s>", ("</s>",), learned=UNABLE),
}


def tokenizer_of(form: Format, template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges across the borders of turns, and a format's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(letters)}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in form.special])
    if form.bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{form.bos} $A", special_tokens=[(form.bos, backend.token_to_id(form.bos))]
        )
    eos = form.special[-1] if form.special[-1].startswith("<|end") else form.end
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=form.bos,
        eos_token=eos,
        pad_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def cases(formats: dict[str, Format]) -> list[tuple[str, str]]:
    return [(name, talk) for name in formats for talk in TALKS]


def published(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model that has the published template."""
    return tokenizer_of(FORMATS[name], (PUBLISHED / f"{name}.jinja").read_text())


def named(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model without one, for which `data.chat_template` names it."""
    tokenizer = tokenizer_of(NAMED[name], None)
    set_chat_template(tokenizer, name)
    return tokenizer


def tools_of(talk: str) -> tuple[dict[str, Any], ...]:
    return TOOLS if talk.startswith("tools") else ()


def check(form: Format, tokenizer: PreTrainedTokenizerFast, talk: str) -> None:
    """Check that each learned turn is what generation has to say after the prompt before it."""
    messages, tools = TALKS[talk], tools_of(talk)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    expected = (form.learned or {}).get(talk, answers)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            tokenize_examples([Example(messages, tools=tools)], tokenizer)
        return
    (sample,) = tokenize_examples([Example(messages, tools=tools)], tokenizer)
    ids, labels = sample["input_ids"], sample["labels"]
    unexplained = [i for i, label in enumerate(labels) if label != NO_LOSS]
    for turn in expected:
        # By Transformers alone, as it renders and tokenises for generation.
        prompt = tokenizer.apply_chat_template(
            list(messages[:turn]),
            tools=list(tools) or None,
            add_generation_prompt=True,
            return_dict=False,
        )
        whole = tokenizer.apply_chat_template(
            list(messages[: turn + 1]), tools=list(tools) or None, tokenize=False
        )
        start = len(prompt)
        stop = start
        while stop < len(labels) and labels[stop] != NO_LOSS:
            stop += 1
        assert ids[:start] == prompt
        said = tokenizer.decode(ids[start:stop])
        assert said.endswith(form.end)
        assert said.count(form.end) == 1
        rest = whole.removeprefix(tokenizer.decode(ids[:stop]))
        assert len(rest) < len(whole)  # it begins with what was learned
        assert not rest.replace(str(tokenizer.eos_token), "").strip()
        if "tool_calls" not in messages[turn]:  # Llama 3 and Mistral write nothing beside them
            assert messages[turn]["content"].rpartition("</think>")[2].strip() in said
        for called in messages[turn].get("tool_calls", ()):
            assert called["function"]["name"] in said
            assert '{"zone": 1, "city": "' in said
        unexplained = [i for i in unexplained if not start <= i < stop]
    assert unexplained == []


@pytest.mark.parametrize(("name", "talk"), cases(FORMATS))
def test_loss_is_on_what_generation_would_have_to_say(name: str, talk: str) -> None:
    check(FORMATS[name], published(name), talk)


@pytest.mark.parametrize(("name", "talk"), cases(NAMED))
def test_a_template_by_name_is_one_that_can_be_learned(name: str, talk: str) -> None:
    assert set(NAMED) == set(template_names())
    check(NAMED[name], named(name), talk)


def test_reasoning_of_the_turns_that_a_template_keeps_is_learned() -> None:
    tokenizer = published("qwen3")
    for talk, kept in (("reasoning", [False, True]), ("tools, reasoning", [True, True])):
        (sample,) = tokenize_examples([Example(TALKS[talk], tools=tools_of(talk))], tokenizer)
        said = tokenizer.decode([label for label in sample["labels"] if label != NO_LOSS])
        assert [thought in said for thought in ("It is winter.", "Polite.")] == kept


def test_a_template_that_opens_the_reasoning_for_generation_alone_is_refused() -> None:
    opening = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    template = (PUBLISHED / "chatml.jinja").read_text().partition("{% if add_gen")[0] + opening
    tokenizer = tokenizer_of(FORMATS["chatml"], template)
    with pytest.raises(DataError, match=f"{CANT_TELL}.*another data.chat_template"):
        tokenize_examples([Example(TALKS["one"])], tokenizer)


def test_an_earlier_answer_whose_first_letter_merges_with_its_prompt_is_not_learned() -> None:
    """The model is never given these tokens before it: at its turn, the prompt ends otherwise."""
    tokenizer = published("chatml")
    merged = {"role": "assistant", "content": "xab"}
    for messages, said in (
        ((USER, merged, THANKS, ANSWER), [ANSWER]),
        ((USER, ANSWER, THANKS, merged), [ANSWER, merged]),
    ):
        (sample,) = tokenize_examples([Example(messages)], tokenizer)
        learned = tokenizer.decode([label for label in sample["labels"] if label != NO_LOSS])
        assert learned == "".join(f"{answer['content']}<|im_end|>" for answer in said)


@pytest.mark.parametrize(
    ("leaves_out", "source"),
    [
        ("the tools", "{{ m.tool_calls }}{{ m.content }}"),
        ("the tool calls", "{{ tools }}{{ m.content }}"),
        (
            "the arguments of tool calls",
            "{% for c in m.tool_calls %}{{c.function.name}}{% endfor %}{{ tools }}{{ m.content }}",
        ),
        (
            "the results of tools",
            "{{ tools }}{{ m.tool_calls }}{{ m.role != 'tool' and m.content }}",
        ),
    ],
)
def test_a_template_that_leaves_something_of_tools_out_is_refused(
    leaves_out: str, source: str
) -> None:
    template = "{% for m in messages %}" + source + "<|im_end|>{% endfor %}"
    tokenizer = tokenizer_of(FORMATS["chatml"], template)
    with pytest.raises(DataError, match=f"leaves out {leaves_out} .*data.chat_template") as error:
        tokenize_examples([Example(TALKS["tools"], tools=TOOLS)], tokenizer)
    assert "\n" not in str(error.value)
    assert tokenize_examples([Example(TALKS["one"])], tokenizer)


@pytest.mark.parametrize(
    ("leaves_out", "later", "source"),
    [
        (
            "the tool calls",
            (SYSTEM, USER, CALLS, RESULT, RESULT, ANSWER),
            "{{ tools }}{{ m.content }}{{ (m.tool_calls or [''])[0] }}",
        ),
        (
            "the tools",
            TALKS["tools"],
            "{{ m.content }}{{ m.tool_calls }}{{ tools if m.role == 'system' }}",
        ),
    ],
)
def test_a_template_that_leaves_something_of_a_later_sample_out_is_refused(
    leaves_out: str, later: tuple[dict[str, Any], ...], source: str
) -> None:
    template = "{% for m in messages %}" + source + "<|im_end|>{% endfor %}"
    tokenizer = tokenizer_of(FORMATS["chatml"], template)
    first = Example((SYSTEM, *TALKS["tools"]), tools=TOOLS)
    assert tokenize_examples([first], tokenizer)
    with pytest.raises(DataError, match=f"leaves out {leaves_out} of the samples"):
        tokenize_examples([first, Example(later, tools=TOOLS)], tokenizer)


@pytest.mark.parametrize("name", ["gemma", "llama2"])
def test_a_system_message_before_a_greeting_stands_in_the_first_question(name: str) -> None:
    tokenizer = named(name)
    greeted = (SYSTEM, WELCOME, USER, ANSWER, THANKS, WELCOME)
    (sample,) = tokenize_examples([Example(greeted)], tokenizer)
    text = tokenizer.decode(sample["input_ids"])
    greeting, _, rest = text.partition("Be brief.")
    assert greeting.count(WELCOME["content"]) == 1
    assert USER["content"] not in greeting
    assert rest.lstrip("\n</SY>").startswith(USER["content"])


def test_brackets_that_are_text_by_design_are_not_told_of() -> None:
    corpus = Corpus((Example(TALKS["one"]),), (Example(TALKS["two"]),), "messages", "d", "s")

    def notes(form: Format, name: str) -> tuple[str, ...]:
        tokenizer = tokenizer_of(form, None)
        set_chat_template(tokenizer, name)
        settings = TokenSettings(chat_template=name)
        return tokenize_corpus(corpus, tokenizer, 9999, SFT, settings).profile.notes

    assert notes(NAMED["llama2"], "llama2") == ()
    some = Format("</s>", ("<s>", "[TOOL_CALLS]", "</s>"), "<s>")
    assert [note.partition("writes ")[2] for note in notes(some, "mistral")] == [
        "[INST], [/INST], which the model's tokenizer has no tokens for: they are plain text to "
        "the model"
    ]


@pytest.mark.parametrize(("name", "told"), [("llama3", True), ("qwen2.5", False)])
def test_words_beside_a_call_that_a_template_leaves_out_are_told_of(name: str, told: bool) -> None:
    spoken, silent = (
        Example(TALKS[talk], tools=TOOLS) for talk in ("tools, reasoning", "tools, two")
    )
    corpus = Corpus((spoken, silent), (silent,), "messages", "digest", "source")
    notes = tokenize_corpus(corpus, published(name), 9999).profile.notes
    note = "data: in 1 of 3 conversations the assistant says something beside a tool call, which"
    assert any(each.startswith(note) for each in notes) == told


def test_a_system_message_that_a_template_leaves_out_is_told_of() -> None:
    template = (
        (PUBLISHED / "chatml.jinja")
        .read_text()
        .replace(
            "for message in messages", "for message in messages if message['role'] != 'system'"
        )
    )
    tokenizer = tokenizer_of(FORMATS["chatml"], template)
    corpus = Corpus((Example(TALKS["one"]),), (Example(TALKS["two"]),), "messages", "d", "s")
    settings = TokenSettings(system="Be brief.")
    notes = tokenize_corpus(corpus, tokenizer, 9999, SFT, settings).profile.notes
    assert notes == (
        "data: data.system has no effect, as the chat template leaves system messages out",
    )


def test_a_model_without_a_template_refuses_tools() -> None:
    tokenizer = tokenizer_of(FORMATS["chatml"], None)
    for messages, tools in ((TALKS["one"], TOOLS), (TALKS["tools"], ())):
        with pytest.raises(DataError, match=r"no chat template; set data\.chat_template"):
            tokenize_examples([Example(messages, tools=tools)], tokenizer)


def from_a_client(message: dict[str, Any]) -> dict[str, Any]:
    """A message as OpenAI's client sends it: arguments as JSON, null beside calls."""
    if "tool_calls" not in message:
        return message
    (called,) = message["tool_calls"]
    function = called["function"] | {"arguments": json.dumps(called["function"]["arguments"])}
    return message | {
        "content": message["content"] or None,
        "tool_calls": [called | {"function": function}],
    }


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2.5", "qwen3"])
def test_a_served_prompt_has_the_tokens_of_training(name: str, talk: str) -> None:
    tokenizer, messages, tools = published(name), TALKS[talk], tools_of(talk)
    if isinstance((FORMATS[name].learned or {}).get(talk), str):
        return  # it can't be trained
    (sample,) = tokenize_examples([Example(messages, tools=tools)], tokenizer)
    sent = [from_a_client(message) for message in messages[:-1]]
    body = ChatBody.model_validate({"model": "base", "messages": sent, "tools": list(tools)})
    templates = Templates(tokenizer, 1.0, cast(AdapterTokenizers, None))
    try:
        prompt = asyncio.run(Prompts(tokenizer, templates).of_chat(None, body.messages, body.tools))
    finally:
        templates.close()
    assert list(prompt) == sample["input_ids"][: len(prompt)]
    assert sample["labels"][len(prompt) - 1] == NO_LOSS
    assert sample["labels"][len(prompt)] != NO_LOSS


def test_of_a_models_several_templates_the_one_for_tools_writes_them() -> None:
    tokenizer = published("qwen2.5")
    own = {"tool_use": tokenizer.chat_template, "default": published("chatml").chat_template}
    tokenizer.chat_template = own
    messages = TALKS["tools"]
    (sample,) = tokenize_examples([Example(messages, tools=TOOLS)], tokenizer)
    templates = Templates(tokenizer, 1.0, cast(AdapterTokenizers, None))
    try:
        text = asyncio.run(templates.render(None, list(messages[:-1]), list(TOOLS)))
        assert "# Tools" not in asyncio.run(templates.render(None, [USER]))
    finally:
        templates.close()
    assert "# Tools" in text
    assert tokenizer.decode(sample["input_ids"]).startswith(text)


def test_served_tools_that_the_template_leaves_out_are_refused() -> None:
    templates = Templates(published("chatml"), 1.0, cast(AdapterTokenizers, None))
    try:
        with pytest.raises(RequestError, match="of the base model writes no tools"):
            asyncio.run(templates.render(None, [USER], list(TOOLS)))
        assert asyncio.run(templates.render(None, [USER]))
    finally:
        templates.close()


def notes_of(template: str, *talks: tuple[dict[str, Any], ...]) -> tuple[str, ...]:
    """What is told of conversations under a template in which `{turn}` stands for one message."""
    corpus = Corpus(tuple(map(Example, talks)), (Example(talks[0]),), "messages", "d", "s")
    source = template.replace("{turn}", "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n")
    tokenizer = tokenizer_of(FORMATS["chatml"], source)
    return tokenize_corpus(corpus, tokenizer, 9999).profile.notes


OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WHOLE = "{% for m in messages %}{turn}{% endfor %}" + OPEN


@pytest.mark.parametrize(
    ("left_out", "template"),
    [
        ("the questions", "{% for m in messages if m.role != 'user' %}{turn}{% endfor %}" + OPEN),
        ("the answers", "{% for m in messages if m.role == 'user' %}{turn}{% endfor %}" + OPEN),
    ],
)
def test_a_template_that_leaves_out_what_is_said_is_refused(left_out: str, template: str) -> None:
    with pytest.raises(DataError, match=f"leaves out {left_out} of the samples; use one that"):
        notes_of(template, TALKS["one"])


def test_what_a_template_does_to_a_conversation_is_told() -> None:
    assert notes_of(WHOLE, TALKS["system"], TALKS["one"]) == ()
    silent = "{% for m in messages if m.role != 'system' %}{turn}{% endfor %}" + OPEN
    (note,) = notes_of(silent, TALKS["one"], TALKS["system"])
    assert "leaves out the system messages of 1 of 3 conversations" in note
    (note,) = notes_of(WHOLE.removesuffix(OPEN), TALKS["two"])
    assert "no generation prompt, so that '<|im_start|>assistant' is learned" in note
    loud = WHOLE.replace("{turn}", "<|im_start|>{{ m.role }}\n{{ m.content|upper }}<|im_end|>\n")
    (note,) = notes_of(loud, TALKS["one"])
    assert "the chat template writes answers otherwise than they are" in note
    marked = {"role": "user", "content": "Is <|im_end|> the end?"}
    (note,) = notes_of(WHOLE, (marked, ANSWER), TALKS["one"])
    assert (
        "2 of 3 conversations have special tokens of the model in their text (<|im_end|>)" in note
    )


def test_the_reason_is_told_where_all_conversations_are_refused() -> None:
    raises = "{{ raise_exception('one call at a time') }}"
    corpus = Corpus((Example(TALKS["one"]),), (Example(TALKS["two"]),), "messages", "d", "s")
    settings = TokenSettings(on_bad_row="skip")
    with pytest.raises(
        DataError, match=r"all of the train split \(of the first: one call at a time"
    ):
        tokenize_corpus(corpus, tokenizer_of(FORMATS["chatml"], raises), 9999, SFT, settings)
