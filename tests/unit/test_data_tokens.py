"""What is learned is the assistant's text, and what comes before it is what generation sees."""

import json
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rayfin.data import Corpus, Example, TokenizedSample, render_prompt, tokenize_corpus
from rayfin.data.tokenization import tokenize_examples
from rayfin.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models do it: an earlier answer is rendered otherwise than the last one.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNFIT = (
    "{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
MERGES = [("a", "b"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), (":", "Ċ"), ("Ċ", "x")]

USER = {"role": "user", "content": "What is ab?"}
ANSWER = {"role": "assistant", "content": "ab, naïvely 你好.\n"}
AGAIN = {"role": "assistant", "content": "ba"}


def make_tokenizer(template: str | None = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, some of them across the border to an answer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(letters)}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+(?!\S)|\s+|[^\s]+\s?"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<s>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def corpus_of(*examples: Example) -> Corpus:
    return Corpus(examples[:-1], examples[-1:], "messages", "digest", "source")


def learned(sample: TokenizedSample, tokenizer: PreTrainedTokenizerFast) -> str:
    assert all(a in (-100, b) for a, b in zip(sample["labels"], sample["input_ids"], strict=True))
    return str(tokenizer.decode([label for label in sample["labels"] if label != -100]))


def one(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, str]) -> TokenizedSample:
    return tokenize_examples([Example(messages=messages)], tokenizer)[0]


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("bos", [False, True])
def test_loss_is_on_the_assistants_turns_and_their_end(template: str | None, bos: bool) -> None:
    tokenizer = make_tokenizer(template, bos=bos)
    sample = one(tokenizer, USER, ANSWER, USER, AGAIN)
    assert learned(sample, tokenizer) == "ab, naïvely 你好.\n<|im_end|>ba<|im_end|>"
    text = tokenizer.decode(sample["input_ids"])
    assert text.startswith("<s>") == (bos and template is None)
    if template:
        assert text == tokenizer.apply_chat_template([USER, ANSWER, USER, AGAIN], tokenize=False)


@pytest.mark.parametrize("template", [CHATML, None, REWRITING])
@pytest.mark.parametrize("content", ["ab", "x", "\n\nab", "  ab", "\n", " x ", "ïab", "<|im_end|>"])
def test_tokens_before_the_last_answer_are_the_prompts_own(
    template: str | None, content: str
) -> None:
    tokenizer = make_tokenizer(template)
    for before in [(USER,), (USER, AGAIN, USER)]:
        messages = (*before, {"role": "assistant", "content": content})
        sample = one(tokenizer, *messages)
        prompt = tokenizer(render_prompt(messages, tokenizer), add_special_tokens=False).input_ids
        assert sample["input_ids"][: len(prompt)] == prompt
        assert sample["labels"][len(prompt)] == sample["input_ids"][len(prompt)]
        expected = f"<think></think>{content}" if template == REWRITING else content
        assert learned(sample, tokenizer).endswith(f"{expected}<|im_end|>")
        whole = tokenizer.decode(sample["input_ids"])
        assert whole.startswith(render_prompt(messages, tokenizer) + expected)


def test_a_template_that_rewrites_earlier_turns_learns_the_last() -> None:
    tokenizer = make_tokenizer(REWRITING)
    sample = one(tokenizer, USER, ANSWER, USER, AGAIN)
    assert learned(sample, tokenizer) == "<think></think>ba<|im_end|>"
    several, one_answer = (
        Example(messages=(USER, ANSWER, USER, AGAIN)),
        Example(messages=(USER, AGAIN)),
    )
    notes = [
        tokenize_corpus(corpus_of(several, one_answer), make_tokenizer(template), 200).profile.notes
        for template in (CHATML, REWRITING)
    ]
    assert notes[0] == ()
    assert notes[1][0].startswith("data: of 1 of 2 samples only the last answer is learned")


def test_a_greeting_before_the_first_question_is_not_learned() -> None:
    tokenizer = make_tokenizer(CHATML)
    assert learned(one(tokenizer, ANSWER, USER, AGAIN), tokenizer) == "ba<|im_end|>"
    corpus = corpus_of(Example((ANSWER, USER, AGAIN)), Example((USER, AGAIN)))
    (note,) = tokenize_corpus(corpus, tokenizer, 200).profile.notes
    assert note.startswith("data: 1 of 2 samples begin with an answer before the first question")


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_turn_that_is_not_to_be_learned_is_read_only(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    messages = (USER, ANSWER, USER, AGAIN, USER, AGAIN)
    sample, whole = (
        tokenize_examples([Example(messages=messages, unlearned=which)], tokenizer)[0]
        for which in ((1,), ())
    )
    assert sample["input_ids"] == whole["input_ids"]
    assert learned(sample, tokenizer) == "ba<|im_end|>ba<|im_end|>"
    assert learned(whole, tokenizer).startswith("ab, na")


def test_plain_rendering() -> None:
    tokenizer = make_tokenizer(bos=True)
    prompt = "<s>user:\nWhat is ab?\n\nassistant:\n"
    assert render_prompt([USER, AGAIN], tokenizer) == prompt
    assert render_prompt([USER], tokenizer) == prompt
    assert tokenizer.decode(one(tokenizer, USER, AGAIN)["input_ids"]) == prompt + "ba<|im_end|>"


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_is_learned_whole(bos: bool) -> None:
    tokenizer = make_tokenizer(CHATML, bos=bos)
    for text in ("abba", "abba<|im_end|>"):
        sample = tokenize_examples([Example(text=text)], tokenizer)[0]
        assert learned(sample, tokenizer) == f"{'<s>' if bos else ''}abba<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"), [(UNFIT, "generation prompt"), (STRICT, "no system")]
)
def test_unfit_templates(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        one(make_tokenizer(template), {"role": "system", "content": "x"}, USER, AGAIN)


def test_samples_are_cut_dropped_and_counted() -> None:
    tokenizer = make_tokenizer(CHATML)
    short = Example(messages=(USER, AGAIN))
    no_answer = Example(messages=({"role": "user", "content": "z" * 500}, AGAIN))
    cut = Example(messages=(USER, {"role": "assistant", "content": "z" * 500}))
    result = tokenize_corpus(corpus_of(short, no_answer, cut, short), tokenizer, 100)
    assert [len(sample["input_ids"]) for sample in result.train] == [
        len(result.eval[0]["input_ids"]),
        100,
    ]
    profile = result.profile
    assert (profile.rows_train, profile.rows_eval) == (2, 1)
    assert (profile.truncated, profile.dropped) == (2, 1)
    assert profile.tokens_per_sample_max == 100

    with pytest.raises(DataError, match=r"data.max_length: 20 cuts every answer off") as caught:
        tokenize_corpus(corpus_of(no_answer, no_answer), tokenizer, 20)
    first, whole = [
        int(word.strip(",")) for word in str(caught.value).split() if word[0].isdigit()
    ][1:]
    assert tokenize_corpus(corpus_of(no_answer, no_answer), tokenizer, first).profile.truncated == 2
    assert tokenize_corpus(corpus_of(no_answer, no_answer), tokenizer, whole).profile.truncated == 0
    with pytest.raises(DataError):
        tokenize_corpus(corpus_of(no_answer, no_answer), tokenizer, first - 1)


def test_profile() -> None:
    tokenizer = make_tokenizer()
    texts = ["c d e", "c d e", "d e f", "c q"]
    profile = tokenize_corpus(
        corpus_of(*(Example(text=text) for text in texts)), tokenizer, 64
    ).profile
    values = profile.as_dict()
    assert json.loads(json.dumps(values)) == values
    held_out = [Example(text=text) for text in ("a q", "c q")]
    same, other = (
        tokenize_corpus(corpus_of(held_out[0], eval_), tokenizer, 64).profile.eval_digest
        for eval_ in reversed(held_out)
    )
    assert values.pop("eval_digest") == same != other  # of the held-out samples alone
    assert values.pop("eval_answers") is None  # plain texts are no answers
    assert values == {
        "rows_train": 3,
        "rows_eval": 1,
        "skipped_rows": 0,
        "shape": "messages",
        "tokens_per_sample_mean": 5.5,
        "tokens_per_sample_p50": 6,
        "tokens_per_sample_p95": 6,
        "tokens_per_sample_max": 6,
        "completion_share": 1.0,
        "truncated": 0,
        "dropped": 0,
        "vocabulary_size": 7,
        "vocabulary_overlap": 0.75,
        "type_token_ratio": 7 / 22,
        "duplicate_share": 0.25,
        "mean_turns": 1.0,
        "digest": "digest",
        "source": "source",
        "eval_split": "held_out",
        "sources": [],
        "eval_rows_in_train": 0,
        "notes": [],
    }


def test_many_samples_are_tokenised_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(CHATML)
    calls = 0
    encode: Callable[..., object] = PreTrainedTokenizerFast.__call__

    def counted(self: PreTrainedTokenizerFast, *args: object, **settings: object) -> object:
        nonlocal calls
        calls += 1
        return encode(self, *args, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    samples = [
        Example(messages=(USER, {"role": "assistant", "content": str(i)})) for i in range(99)
    ]
    assert len(tokenize_examples(samples, tokenizer)) == 99
    assert calls <= 3
