"""What is cut, what is left out, which turns have loss, and the default system message."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rayfin.config import Config, ModelConfig, TrainConfig, load_config
from rayfin.config.data import DataConfig
from rayfin.data import (
    Corpus,
    Example,
    check_lengths,
    needs_length_check,
    survey_corpus,
    tokenize_corpus,
)
from rayfin.data.fitting import fit_samples
from rayfin.data.render import render_texts
from rayfin.data.stream import plan_sample_ranges
from rayfin.data.stream_reader import read_in_process
from rayfin.data.token_settings import TokenSettings
from rayfin.data.tokenization import encode_examples, tokenize_examples
from rayfin.errors import DataError
from rayfin.models import load_tokenizer
from rayfin.models.chat_templates import read_chat_template
from rayfin.objectives import SFT
from rayfin.samples import NO_LOSS, TokenizedSample
from rayfin.training import TrialSpec
from rayfin.tuning.space import SearchSpace
from rayfin.tuning.space_check import space_notes

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Where does the long and winding road lead to?"}
ANSWER = {"role": "assistant", "content": "To your door."}
AGAIN = {"role": "user", "content": "And then?"}
LAST = {"role": "assistant", "content": "No further."}
TALK = Example((SYSTEM, USER, ANSWER, AGAIN, LAST))
SHORT = Example((USER, ANSWER))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(ModelConfig(name="tiny"))


def corpus_of(*examples: Example) -> Corpus:
    return Corpus(examples[:-1], examples[-1:], "messages", "digest", "source")


def encode(tokenizer: Any, *examples: Example) -> list[TokenizedSample]:
    return tokenize_examples(examples, tokenizer)


def cut(tokenizer: Any, example: Example, length: int, **settings: Any) -> TokenizedSample:
    corpus = corpus_of(example, example)
    return tokenize_corpus(corpus, tokenizer, length, SFT, TokenSettings(**settings)).eval[0]


def learned(sample: TokenizedSample, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in sample["labels"] if label != NO_LOSS]))


def test_left_leaves_out_the_earliest_turns_and_keeps_the_system_message(tokenizer: Any) -> None:
    later = Example((SYSTEM, AGAIN, LAST))
    (whole,), (short,) = encode(tokenizer, TALK), encode(tokenizer, later)
    for length in (len(whole["input_ids"]) - 1, len(short["input_ids"])):
        assert cut(tokenizer, TALK, length, truncation="left") == short
    assert cut(tokenizer, TALK, len(whole["input_ids"]), truncation="left") == whole


def test_left_then_cuts_the_beginning_of_the_question(tokenizer: Any) -> None:
    (whole,) = encode(tokenizer, Example((SYSTEM, USER, ANSWER)))
    for less in (1, 7, 30):
        length = len(whole["input_ids"]) - less
        sample = cut(tokenizer, Example((SYSTEM, USER, ANSWER)), length, truncation="left")
        asked = USER | {"content": USER["content"][less:]}  # a token a byte
        assert sample == encode(tokenizer, Example((SYSTEM, asked, ANSWER)))[0]
    # Nothing but the answer could be cut: it is, at the right, as there is nothing else.
    shortest = len(
        encode(tokenizer, Example((SYSTEM, {**USER, "content": "?"}, ANSWER)))[0]["labels"]
    )
    sample = cut(
        tokenizer, Example((SYSTEM, USER, ANSWER)), length=shortest + 40, truncation="left"
    )
    assert learned(sample, tokenizer) == "To your door.<|im_end|>"


def test_left_keeps_the_end_of_a_plain_text(tokenizer: Any) -> None:
    text = Example(text="once upon a time there was a princess")
    sample = cut(tokenizer, text, 10, truncation="left")
    assert tokenizer.decode(sample["input_ids"]) == " princess<|im_end|>"
    assert tokenizer.decode(cut(tokenizer, text, 10)["input_ids"]) == "once upon "


@pytest.mark.parametrize("repeats", [400, 40_000])
def test_left_fills_the_length_from_a_text_of_any_size(repeats: int, tokenizer: Any) -> None:
    long = "".join(f"word {n} " for n in range(repeats)) + "the end"
    plain = cut(tokenizer, Example(text=long), 300, truncation="left")
    asked = cut(tokenizer, Example(({**USER, "content": long}, ANSWER)), 300, truncation="left")
    for sample, end in ((plain, "the end<|im_end|>"), (asked, "To your door.<|im_end|>")):
        assert 290 < len(sample["input_ids"]) <= 300
        assert learned(sample, tokenizer).endswith(end)
    assert "the end<|im_end|>" in tokenizer.decode(asked["input_ids"])


def test_left_leaves_out_the_earliest_calls_where_the_question_is_not_enough() -> None:
    tokenizer = load_tokenizer(ModelConfig(name="tiny"), "hermes")

    def step(name: str) -> tuple[dict[str, Any], ...]:
        call = {"type": "function", "function": {"name": name, "arguments": {"x": 1}}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        return said, {"role": "tool", "content": f"{name} " * 40}

    steps = [step(name) for name in ("one", "two", "three")]
    talk = Example((SYSTEM, USER, *steps[0], *steps[1], *steps[2], LAST), unlearned=(2, 4))
    later = Example((SYSTEM, USER, *steps[1], *steps[2], LAST), unlearned=(2,))
    last, none = Example((SYSTEM, USER, *steps[2], LAST)), Example((SYSTEM, USER, LAST))
    for expected in (later, last, none):
        (whole,) = encode(tokenizer, expected)
        assert cut(tokenizer, talk, len(whole["input_ids"]), truncation="left") == whole
    # Less than that: the question goes, the answer stays.
    length = len(encode(tokenizer, none)[0]["input_ids"]) - 9
    sample = cut(tokenizer, talk, length, truncation="left")
    asked = USER | {"content": USER["content"][9:]}
    assert sample == encode(tokenizer, Example((SYSTEM, asked, LAST)))[0]


def test_left_renders_a_long_conversation_a_few_times(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Example((USER, ANSWER) * 64)
    (short,) = encode(tokenizer, Example((USER, ANSWER) * 5))
    rendered: list[int] = []

    def counted(conversations: Any, *args: Any, **settings: Any) -> list[str]:
        rendered.append(len(conversations))
        return render_texts(conversations, *args, **settings)

    monkeypatch.setattr("rayfin.data.render.render_texts", counted)
    settings, length = TokenSettings(truncation="left"), len(short["input_ids"])
    encoded = partial(encode_examples, tokenizer=tokenizer, objective=SFT, settings=settings)
    wholes = encoded([talk])
    rendered.clear()
    fit = partial(fit_samples, encode=encoded, max_length=length, objective=SFT)
    assert fit([talk], wholes, settings=settings) == [short]
    assert sum(rendered) < 64


def test_left_keeps_which_turns_are_not_learned(tokenizer: Any) -> None:
    talk = Example((USER, ANSWER, AGAIN, ANSWER, AGAIN, LAST), unlearned=(3,))
    length = len(encode(tokenizer, talk)[0]["input_ids"]) - 1
    sample = cut(tokenizer, talk, length, truncation="left")
    assert sample == encode(tokenizer, Example((AGAIN, ANSWER, AGAIN, LAST), unlearned=(1,)))[0]


@pytest.mark.parametrize("truncation", ["right", "left", "drop"])
def test_what_is_cut_and_left_out_is_counted_and_told(truncation: str, tokenizer: Any) -> None:
    length = len(encode(tokenizer, TALK)[0]["input_ids"]) - 1
    corpus = corpus_of(TALK, *[SHORT] * 9)
    settings = TokenSettings(truncation=truncation)  # type: ignore[arg-type]
    data = tokenize_corpus(corpus, tokenizer, length, SFT, settings)
    dropped = truncation == "drop"
    assert (data.profile.truncated, data.profile.dropped) == (not dropped, dropped)
    assert len(data.train) == 9 - dropped
    (note,) = data.profile.notes
    what = {
        "right": "cut at data.max_length",
        "left": "cut at their beginning at data.max_length",
        "drop": "left out (data.truncation=drop)",
    }
    assert note.startswith(f"data: 1 of 10 samples (10%, more than 5%) {what[truncation]}")
    many = corpus_of(TALK, *[SHORT] * 19)  # exactly 5 %
    (note,) = tokenize_corpus(many, tokenizer, length, SFT, settings).profile.notes
    assert note.startswith(f"data: 1 of 20 samples {what[truncation]}")


def test_drop_without_a_sample_left_is_refused_before_anything_starts(tokenizer: Any) -> None:
    settings = TokenSettings(truncation="drop")
    corpus, length = corpus_of(TALK, SHORT), len(encode(tokenizer, SHORT)[0]["input_ids"])
    whole = len(encode(tokenizer, TALK)[0]["input_ids"])
    for check in (tokenize_corpus, check_lengths):
        with pytest.raises(DataError, match=f"all of the train split at {length}; give .*{whole}"):
            check(corpus, tokenizer, length, SFT, settings)
        check(corpus, tokenizer, whole, SFT, settings)
    assert needs_length_check(corpus, length, settings)


def test_loss_on_the_last_turn_alone(tokenizer: Any) -> None:
    both = cut(tokenizer, TALK, 500)
    last = cut(tokenizer, TALK, 500, train_on="last")
    assert learned(both, tokenizer) == "To your door.<|im_end|>No further.<|im_end|>"
    assert learned(last, tokenizer) == "No further.<|im_end|>"
    assert last["input_ids"] == both["input_ids"]
    profile = tokenize_corpus(
        corpus_of(TALK, TALK), tokenizer, 500, SFT, TokenSettings(train_on="last")
    ).profile
    assert profile.notes == ()  # nobody is told that a template keeps one from learning the rest


def test_a_default_system_message_is_for_conversations_without_one(tokenizer: Any) -> None:
    settings = TokenSettings(system="Be brief.")
    without = Example((USER, ANSWER, AGAIN, ANSWER, AGAIN, LAST), unlearned=(3,))
    data = tokenize_corpus(corpus_of(without, TALK), tokenizer, 500, SFT, settings)
    (given,) = data.train
    assert given == encode(tokenizer, Example((SYSTEM, *without.messages), unlearned=(4,)))[0]
    assert data.eval == encode(tokenizer, TALK)
    (note,) = data.profile.notes
    assert note.startswith("data: 1 of 2 conversations had no system message and have data.system")


@pytest.mark.parametrize(
    ("settings", "examples", "note"),
    [
        ({"system": "x"}, (TALK, TALK), "data.system has no effect, as every conversation has"),
        ({"system": "x", "train_on": "last"}, None, "data.system, train.train_on has no effect"),
        ({"chat_template": "zephyr"}, None, "data.chat_template has no effect, as the data are"),
    ],
)
def test_a_setting_without_effect_is_named(
    settings: dict[str, Any], examples: tuple[Example, ...] | None, note: str, tokenizer: Any
) -> None:
    corpus = corpus_of(*(examples or (Example(text="a text"), Example(text="another"))))
    notes = tokenize_corpus(corpus, tokenizer, 500, SFT, TokenSettings(**settings)).profile.notes
    assert [each for each in notes if note in each], notes


def test_a_template_of_other_tokens_than_the_tokenizers_is_named() -> None:
    for name, unknown in (("phi", "<|user|>, <|end|>, <|assistant|>"), ("chatml", None)):
        tokenizer = load_tokenizer(ModelConfig(name="tiny"), name)
        settings = TokenSettings(chat_template=name)
        data = tokenize_corpus(corpus_of(SHORT, SHORT), tokenizer, 500, SFT, settings)
        assert len(data.profile.notes) == (unknown is not None)
        if unknown is not None:
            (note,) = data.profile.notes
            assert f"chat_template={name} writes {unknown}, which" in note
            assert note.endswith(
                "plain text to the model, and answers are taught to end with <|end|>"
            )
            assert learned(data.train[0], tokenizer) == "To your door.<|end|>"
            assert data.ends.texts == ("<|end|>",)


def test_a_template_is_a_name_or_a_file(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert load_tokenizer(ModelConfig(name="tiny"), str(own)).chat_template == own.read_text()
    assert "im_start" in read_chat_template("chatml")
    broken, empty = tmp_path / "broken.jinja", tmp_path / "empty.jinja"
    broken.write_text("{% for m in messages %}\n{{ m.content }")
    empty.write_text("\n")
    for setting, message in {
        "chatlm": "'chatlm' is neither a file nor one of alpaca, .*did you mean 'chatml'",
        str(tmp_path / "none.jinja"): "there is no file '.*none.jinja'; give one that is there",
        str(tmp_path): "there is no file",
        str(broken): "is no Jinja template .*line 2",
        str(empty): "has 1 characters; a template has 1 to",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            read_chat_template(setting)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"chat_template": "chatml"}},
        {"data": {"system": "Be brief."}},
        {"data": {"truncation": "left"}},
        {"data": {"truncation": "drop"}},
        {"train": {"train_on": "last"}},
    ],
    ids=str,
)
def test_what_changes_the_tokens_enters_the_fingerprint(sections: dict[str, Any]) -> None:
    def fingerprint(sections: dict[str, Any]) -> str:
        spec = TrialSpec.of(Config.model_validate(sections))
        return spec.fingerprint(model_identity="tiny@1", data_digest="d")

    assert fingerprint(sections) != fingerprint({})
    defaults = {"data": {"truncation": "right"}, "train": {"train_on": "all"}}
    assert fingerprint(defaults) == fingerprint({})


def test_a_template_enters_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(name: str) -> str:
        spec = TrialSpec.of(Config(data=DataConfig(chat_template=name)))
        assert spec.data.chat_template == ("chatml" if name == "chatml" else str(tmp_path / name))
        return spec.fingerprint(model_identity="tiny@1", data_digest="d")

    monkeypatch.chdir(tmp_path)
    for name in ("one.jinja", "copy.jinja"):
        Path(name).write_text(read_chat_template("chatml"))
    Path("other.jinja").write_text(read_chat_template("phi"))
    assert fingerprint("one.jinja") == fingerprint("copy.jinja")
    assert fingerprint("one.jinja") != fingerprint("chatml")  # which begins with the bos token
    assert fingerprint("other.jinja") != fingerprint("one.jinja")


def test_the_settings_are_those_of_the_configuration() -> None:
    data = DataConfig(chat_template="phi", system="s", truncation="left")
    found = TokenSettings.of(data, TrainConfig(train_on="last"))
    assert found == TokenSettings("phi", "s", "last", "left")


def test_streamed_samples_are_made_by_the_same_settings(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    talks = [[{**USER, "content": "why " * (n % 3 * 40) + str(n)}, ANSWER] for n in range(20)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    stream = survey_corpus(DataConfig(path=str(path), streaming=True)).stream
    assert stream is not None
    ranges = plan_sample_ranges(stream, lanes=[0], of=1, seed=0, first=0, last=40)
    settings = TokenSettings(system="Be brief.", truncation="drop")
    read = read_in_process(tokenizer, SFT, settings)
    samples = [sample for _, sample in read(stream, ranges, 0, 200)]
    expected = [
        each
        for each in encode(tokenizer, *(Example((SYSTEM, *talk)) for talk in talks))
        if len(each["input_ids"]) <= 200
    ]
    whole = [sample for sample in samples if len(sample["input_ids"]) > 2]
    assert 0 < len(whole) < len(samples)
    assert all(sample in expected for sample in whole)
    left_out = [sample for sample in samples if len(sample["input_ids"]) == 2]
    assert all(sample["labels"] == [NO_LOSS] * 2 for sample in left_out)


def test_a_conversation_that_the_template_refuses_is_named_or_left_out(tmp_path: Path) -> None:
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    refusal = "{% if 'road' in m.content %}{{ raise_exception('No roads') }}{% endif %}"
    loop = "{%- for message in messages -%}"
    checked = "{%- for m in messages %}" + refusal + "{% endfor %}" + loop
    own = write("own.jinja", read_chat_template("chatml").replace(loop, checked))
    tokenizer = load_tokenizer(ModelConfig(name="tiny"), own)
    good, refused = Example((AGAIN, LAST)), TALK
    corpus, skip = corpus_of(good, refused, good, good), TokenSettings(on_bad_row="skip")
    named = "refuses the conversation with the question 'Where does .* roads.*on_bad_row=skip"
    for check in (tokenize_corpus, check_lengths):
        with pytest.raises(DataError, match=f"(?i){named}"):
            check(corpus, tokenizer, 500, SFT, TokenSettings())
        check(corpus, tokenizer, 500, SFT, skip)
    data = tokenize_corpus(corpus, tokenizer, 500, SFT, skip)
    assert data.train == encode(tokenizer, good, good)
    assert (data.profile.rows_train, data.profile.dropped) == (2, 0)
    assert any("1 of 4 conversations left out" in note for note in data.profile.notes)
    with pytest.raises(DataError, match="refuses all of the eval split"):
        tokenize_corpus(corpus_of(good, refused), tokenizer, 500, SFT, skip)

    rows = tmp_path / "rows.jsonl"
    asked = [USER if n % 5 == 3 else AGAIN for n in range(40)]
    talks = [[it | {"content": f"{it['content']} {n}"}, LAST] for n, it in enumerate(asked)]
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    stream = survey_corpus(DataConfig(path=str(rows), streaming=True)).stream
    assert stream is not None
    ranges = plan_sample_ranges(stream, lanes=[0], of=1, seed=0, first=0, last=30)
    read = read_in_process(tokenizer, SFT, skip)
    samples = [sample for _, sample in read(stream, ranges, 0, 500)]
    assert 0 < samples.count(None) < len(samples) == 30
    none = load_tokenizer(
        ModelConfig(name="tiny"), write("none.jinja", "{{ raise_exception('No') }}")
    )
    samples = [each for _, each in read_in_process(none, SFT, skip)(stream, ranges, 0, 500)]
    assert samples == [None] * 30
    with pytest.raises(DataError, match=f"(?i){named}"):
        list(read_in_process(tokenizer, SFT)(stream, ranges, 0, 500))


def test_a_sweep_over_what_is_scored_says_that_its_scores_do_not_compare() -> None:
    def notes(**parameters: list[Any]) -> list[str]:
        config = load_config({"sweep": {"parameters": parameters}, "method": {"type": "lora"}})
        return space_notes(SearchSpace(config))

    assert notes(**{"train.learning_rate": [1e-3, 2e-3]}) == []
    axes = {"data.chat_template": ["chatml", "phi"], "train.train_on": ["all", "last"]}
    (note,) = notes(**axes)
    assert note.startswith(
        "data.chat_template and train.train_on decide which held-out tokens are scored: "
    )


def test_the_end_is_learned_where_the_pad_token_is_the_end_token(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    samples = encode(tokenizer, SHORT, Example((AGAIN, LAST)))
    batch = SFT.collate(samples, end)
    assert batch["input_ids"][1].tolist().count(end) > 2  # the question's, the answer's, padding
    for row, sample in zip(batch["labels"].tolist(), samples, strict=True):
        assert [label for label in row if label != NO_LOSS][-1] == end
        assert row.count(end) == 1
        assert row[: len(sample["labels"])] == sample["labels"]
