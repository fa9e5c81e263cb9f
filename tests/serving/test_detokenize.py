"""Streamed text is the text: whole characters, right spaces, and nothing from a stop string on."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rayfin.config import ModelConfig
from rayfin.models import load_tokenizer
from rayfin.serving.engine.detokenize import Detokenizer

both = pytest.mark.parametrize(
    "name", ["tiny", pytest.param("smollm2-135m", marks=pytest.mark.smollm2)]
)
quick = settings(max_examples=60)

PIECES = [
    "a",
    " ",
    "\n",
    "the ",
    "你好",
    "漢",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "🇫🇷",
    "😀",
    "\ufffd",
    "\u200d",
    "ﷺ",
]
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=25).map("".join))


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return load_tokenizer(ModelConfig(name=name))


@cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama 2's kind: word boundaries as U+2581, the first space stripped, bytes as <0x..>."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdet", "▁a", "▁the"]
    merges = [("▁", "a"), ("▁t", "he"), ("▁", "t"), ("h", "e")]
    vocab = {piece: index for index, piece in enumerate([*pieces, "h", "he", "▁t"])}
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def stream(
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    prompt: list[int] | None = None,
    stop: tuple[str, ...] = (),
) -> tuple[list[str], bool]:
    """What each token brought, and last what the end did; and whether a stop string was met."""
    detokenizer = Detokenizer(tokenizer, prompt or [], stop)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    return [*pieces, detokenizer.flush()], detokenizer.stopped


@both
@quick
@given(text=texts, prompt=texts)
def test_the_pieces_together_are_the_text(name: str, text: str, prompt: str):
    tokenizer = tokenizer_of(name)
    ids = ids_of(tokenizer, text)
    pieces, stopped = stream(tokenizer, ids, ids_of(tokenizer, prompt))
    assert "".join(pieces) == text_of(tokenizer, ids)
    assert not stopped


@both
@quick
@given(text=texts)
def test_each_character_is_sent_when_its_last_byte_is_there(name: str, text: str):
    tokenizer = tokenizer_of(name)
    ids = ids_of(tokenizer, text.replace("\ufffd", "") + ".")
    pieces, _ = stream(tokenizer, ids)
    assert pieces[-1] == ""
    # SmolLM2's vocabulary lacks a few bytes, and with them some rare characters.
    if "\ufffd" not in text_of(tokenizer, ids):
        assert not any("\ufffd" in piece for piece in pieces)


@both
@quick
@given(data=st.data())
def test_any_ids_read_as_their_decoding(name: str, data: st.DataObject):
    tokenizer = tokenizer_of(name)
    byte_ids = sorted(tokenizer.convert_tokens_to_ids(c) for c in "ðŁĺĢäâĤ¬Ã©aĠ")
    # Half characters, special tokens, and ids beyond the vocabulary, as a padded head may give.
    some = st.one_of(
        st.sampled_from(byte_ids),
        st.integers(0, len(tokenizer) + 20),
        st.sampled_from(tokenizer.all_special_ids),
    )
    ids = data.draw(st.lists(some, max_size=60))
    prompt = data.draw(st.lists(some, max_size=12))
    pieces, _ = stream(tokenizer, ids, prompt)
    assert "".join(pieces) == text_of(tokenizer, ids)


def test_bytes_that_make_no_character_are_sent_as_they_come():
    tokenizer = tokenizer_of("tiny")
    for bad in ("Ģ", "ð", "ðŁ", "Ã"):  # a stray continuation; beginnings without an end
        ids = tokenizer.convert_tokens_to_ids(list(bad)) * 500
        pieces, _ = stream(tokenizer, ids)
        assert "".join(pieces) == text_of(tokenizer, ids)
        assert max(len(piece) for piece in pieces) < 20
    for count in range(20):
        ids = tokenizer.convert_tokens_to_ids(["Ģ"] * count + list("ðŁĺĢ"))
        pieces, _ = stream(tokenizer, ids)
        assert "".join(pieces) == "\ufffd" * count + "😀"


def test_special_tokens_are_not_text_even_within_a_character():
    tokenizer = tokenizer_of("tiny")
    euro = ids_of(tokenizer, "€")
    special = [tokenizer.eos_token_id] * 30
    pieces, _ = stream(tokenizer, [*special, euro[0], *special, *euro[1:], *special])
    assert [piece for piece in pieces if piece] == ["€"]


@quick
@given(
    words=st.lists(st.sampled_from(["▁a", "▁the", "a", "▁", "he"]), max_size=12),
    before=st.lists(st.sampled_from(["<s>", "<s>", "▁a", "▁the", "b"]), max_size=12),
)
def test_spaces_are_those_that_follow_the_prompt(words: list[str], before: list[str]):
    tokenizer = sentencepiece_like()
    prompt: list[int] = tokenizer.convert_tokens_to_ids(["<s>", *before])
    ids: list[int] = tokenizer.convert_tokens_to_ids(words)
    pieces, _ = stream(tokenizer, ids, prompt)
    assert text_of(tokenizer, prompt) + "".join(pieces) == text_of(tokenizer, prompt + ids)


@quick
@given(text=st.text("a 你é😀b", max_size=25), prompt=st.text("a 你é😀", min_size=1, max_size=12))
def test_characters_spelled_in_byte_tokens_are_whole(text: str, prompt: str):
    tokenizer = sentencepiece_like()
    before = ids_of(tokenizer, prompt.replace(" ", "▁"))
    ids = ids_of(tokenizer, text.replace(" ", "▁"))
    pieces, _ = stream(tokenizer, ids, before)
    assert text_of(tokenizer, before) + "".join(pieces) == text_of(tokenizer, before + ids)


def test_half_a_character_does_not_change_the_one_before_it():
    tokenizer = sentencepiece_like()
    # This kind of decoder, given all of it, would take back the é and show three U+FFFD.
    ids: list[int] = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0xE4>", "b", "a"])
    pieces, _ = stream(tokenizer, ids, [tokenizer.bos_token_id])
    assert pieces == ["", "é", "", "\ufffdb", "a", ""]


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (("<|im_end|>",), "ab"),
        (("x", "<|im_end|>\n"), "ab"),
        (("b<|im_end|>",), "a"),
        (("<|im_end|>\n<|im_start|>c",), "ab"),
        (("<|im_end|>c",), "ab\ncd"),
        # Of a token that no text shows, no part is text.
        (("end", "|"), "ab\ncd"),
        (("b\nc",), "a"),
    ],
)
def test_a_special_token_that_a_stop_string_names_is_seen_and_not_shown(
    stops: tuple[str, ...], text: str
):
    tokenizer = tokenizer_of("tiny")
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    ids = [*ids_of(tokenizer, "ab"), end, *ids_of(tokenizer, "\n"), start]
    pieces, stopped = stream(tokenizer, [*ids, *ids_of(tokenizer, "cd")], stop=stops)
    assert ("".join(pieces), stopped) == (text, text != "ab\ncd")
    spelled = tokenizer.convert_tokens_to_ids(list("ab<|im_end|>c"))
    pieces, _ = stream(tokenizer, spelled, stop=("<|im_end|>",))
    assert "".join(pieces) == "ab"


def cut(text: str, stops: tuple[str, ...]) -> str:
    """`text` before the stop string that is complete first; of several, that which begins first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@both
@quick
@given(data=st.data())
def test_the_text_ends_before_the_first_stop_string(name: str, data: st.DataObject):
    tokenizer = tokenizer_of(name)
    ids = ids_of(tokenizer, data.draw(texts | st.text("ab", max_size=30)))
    text = text_of(tokenizer, ids)
    places = st.integers(0, len(text))
    # Parts of the text, and parts that go wrong at their end.
    parts = st.tuples(places, st.integers(1, 6), st.sampled_from(["", "", "a", "\n"])).map(
        lambda part: text[part[0] : part[0] + part[1]] + part[2]
    )
    stops = tuple(data.draw(st.lists(parts.filter(bool), max_size=4)))
    pieces, stopped = stream(tokenizer, ids, stop=stops)
    assert "".join(pieces) == cut(text, stops)
    assert stopped == any(stop in text for stop in stops)


@both
def test_the_stop_string_that_is_complete_first_counts_however_tokens_are_cut(name: str):
    tokenizer = tokenizer_of(name)  # SmolLM2 has a token for the word
    ids = ids_of(tokenizer, "some information")
    for stops in (("information", "form"), ("form", "information")):
        pieces, stopped = stream(tokenizer, ids, stop=stops)
        assert "".join(pieces) == "some in" and stopped


def test_nothing_comes_after_a_stop_string():
    tokenizer = tokenizer_of("tiny")
    detokenizer = Detokenizer(tokenizer, [], ("END",))
    sent = [detokenizer.push(token_id) for token_id in ids_of(tokenizer, "one EN two END")]
    assert "".join(sent) == "one EN two " and detokenizer.stopped
    after = [detokenizer.push(token_id) for token_id in ids_of(tokenizer, "three END four")]
    assert not any(after) and detokenizer.flush() == ""


def test_text_is_held_back_only_while_it_may_become_a_stop_string():
    tokenizer = tokenizer_of("tiny")
    pieces, stopped = stream(tokenizer, ids_of(tokenizer, "x\n\ny\n"), stop=("\n\nUser:", "yes"))
    assert pieces == ["x", "", "", "\n\n", "y", "\n"] and not stopped


def test_a_stop_string_that_completes_at_the_end_is_met():
    tokenizer = tokenizer_of("tiny")
    half = ids_of(tokenizer, "ab😀")[:-1]
    assert stream(tokenizer, half, stop=("\ufffd",)) == (["a", "b", "", "", "", ""], True)


@both
def test_an_answer_ends_with_its_beginning_of_a_stop_string(name: str):
    tokenizer = tokenizer_of(name)
    pieces, stopped = stream(tokenizer, ids_of(tokenizer, "Hello, wor"), stop=("world",))
    assert "".join(pieces) == "Hello, wor" and pieces[-1] == "wor" and not stopped
