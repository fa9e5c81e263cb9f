"""The official client, unmodified, gets the answers of the version it asked for."""

from typing import Any

import openai
import pytest

from rayfin.serving.engine.request import AdapterSource

MODELS = {
    "tiny": "tiny",
    "support": "support@2",
    "sales": "sales@1",
    "support@prod": "support@1",
    "support@1": "support@1",
    "tiny:sales": "sales@1",
    "tiny:support@prod": "support@1",
}
MESSAGES: Any = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": [{"type": "text", "text": "Héllo"}, {"type": "text", "text": "?"}]},
]
RENDERED = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Héllo\n?"}]
TOKENS = 12
FIXED = {"ignore_eos": True}


@pytest.fixture(scope="session")
def expected(server: Any, lab: Any) -> Any:
    """The engine's own answer, asked without HTTP."""

    def answer(version: str, prompt: list[int]) -> Any:
        source = None
        if version != "tiny":
            path = server.registry.resolve(version).path
            source = AdapterSource(version, path)
        params = lab.greedy(TOKENS)
        return lab.ask(server.engine, prompt, source, params).wait()

    return answer


@pytest.fixture(scope="session")
def chat_prompt(server: Any) -> list[int]:
    encoded = server.engine.tokenizer.apply_chat_template(RENDERED, add_generation_prompt=True)
    return list(encoded["input_ids"])


def test_the_versions_answer_differently(expected: Any, chat_prompt: list[int]) -> None:
    """Or the tests below would not notice a wrong one."""
    assert len({expected(version, chat_prompt).text for version in set(MODELS.values())}) == 4


@pytest.mark.parametrize("model", MODELS)
def test_chat(server: Any, expected: Any, chat_prompt: list[int], model: str) -> None:
    answer = server.client().chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=TOKENS, temperature=0, extra_body=FIXED
    )
    wanted = expected(MODELS[model], chat_prompt)
    assert answer.model == MODELS[model]
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(chat_prompt)
    assert answer.usage.completion_tokens == TOKENS


@pytest.mark.parametrize("model", MODELS)
def test_chat_as_a_stream(server: Any, expected: Any, chat_prompt: list[int], model: str) -> None:
    stream = server.client().chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_completion_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=FIXED,
    )
    pieces = list(stream)
    wanted = expected(MODELS[model], chat_prompt)
    assert {piece.model for piece in pieces} == {MODELS[model]}
    assert len({piece.id for piece in pieces}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(c.delta.content or "" for piece in pieces for c in piece.choices)
    assert text == wanted.text
    reasons = [c.finish_reason for piece in pieces for c in piece.choices]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert pieces[-1].choices == [] and pieces[-1].usage.total_tokens == len(chat_prompt) + TOKENS
    assert all(piece.usage is None for piece in pieces[:-1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_complete(server: Any, expected: Any, model: str, stream: bool) -> None:
    prompt = list(server.engine.tokenizer("Once upon")["input_ids"])
    answer = server.client().completions.create(
        model=model,
        prompt="Once upon",
        max_tokens=TOKENS,
        temperature=0,
        stream=stream,
        extra_body=FIXED,
    )
    pieces = list(answer) if stream else [answer]
    assert {piece.model for piece in pieces} == {MODELS[model]}
    text = "".join(piece.choices[0].text for piece in pieces)
    assert text == expected(MODELS[model], prompt).text


def test_models_are_listed_with_root_and_parent(server: Any) -> None:
    client = server.client()
    listed = {m.id: (m.to_dict()["root"], m.to_dict()["parent"]) for m in client.models.list()}
    assert listed == {
        "tiny": ("tiny", None),
        "sales": ("sales@1", "tiny"),
        "sales@1": ("sales@1", "tiny"),
        "support": ("support@2", "tiny"),
        "support@2": ("support@2", "tiny"),
        "support@1": ("support@1", "tiny"),
        "support@prod": ("support@1", "tiny"),
    }
    for model, version in MODELS.items():
        found = client.models.retrieve(model)
        assert (found.id, found.to_dict()["root"]) == (model, version)


@pytest.mark.parametrize("model", ["suport", "support@9", "support@prd", "gpt-4", "gpt-4:support"])
def test_what_is_not_there_is_not_found_and_never_the_base(server: Any, model: str) -> None:
    client = server.client()
    calls = [
        lambda: client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=1),
        lambda: client.completions.create(model=model, prompt="hi", max_tokens=1, stream=True),
        lambda: client.models.retrieve(model),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert refused.value.code == "model_not_found"
        assert refused.value.param == "model"


def test_prompts_may_be_texts_or_token_ids(server: Any) -> None:
    client = server.client()
    ids = [list(server.engine.tokenizer(text)["input_ids"]) for text in ("one", "two")]
    prompts: list[Any] = [["one", "two"], ids]
    answers = [
        client.completions.create(model="support", prompt=p, max_tokens=4, temperature=0)
        for p in prompts
    ]
    texts = [[choice.text for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1] and len(texts[0]) == 2
    alone = client.completions.create(model="support", prompt=ids[1], max_tokens=4, temperature=0)
    assert alone.choices[0].text == texts[0][1]
    assert answers[0].usage.prompt_tokens == len(ids[0]) + len(ids[1])


def test_n_answers_differ_and_a_seed_brings_them_back(server: Any) -> None:
    def ask(stream: bool) -> list[str]:
        answer = server.client().completions.create(
            model="support", prompt="hi", n=3, seed=7, max_tokens=8, stream=stream
        )
        if not stream:
            return [choice.text for choice in answer.choices]
        texts = ["", "", ""]
        for piece in answer:
            texts[piece.choices[0].index] += piece.choices[0].text
        return texts

    first = ask(stream=False)
    assert len(set(first)) == 3
    assert ask(stream=False) == first
    assert ask(stream=True) == first


def test_logprobs_of_chat(server: Any) -> None:
    answer = server.client().chat.completions.create(
        model="support",
        messages=MESSAGES,
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body=FIXED,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    for token in content:
        assert len(token.top_logprobs) == 3
        # Greedy: the likeliest token was taken.
        assert token.top_logprobs[0].logprob == token.logprob <= 0
        assert token.top_logprobs[0].token == token.token
    # A byte of a character is no text alone; the bytes together are the answer's.
    joined = bytes(byte for token in content for byte in token.bytes)
    assert joined.decode(errors="replace") == answer.choices[0].message.content


def test_logprobs_of_completions_as_a_stream(server: Any) -> None:
    body: dict[str, Any] = {
        "model": "support",
        "prompt": "hi",
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": 2,
        "extra_body": FIXED,
    }
    whole = server.client().completions.create(**body).choices[0].logprobs
    pieces = [
        choice.logprobs
        for piece in server.client().completions.create(stream=True, **body)
        for choice in piece.choices
        if choice.logprobs is not None
    ]
    assert len(whole.tokens) == 6
    for field in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for piece in pieces for value in getattr(piece, field)]
        assert joined == getattr(whole, field)
    assert all(1 <= len(top) <= 2 for top in whole.top_logprobs)


def test_stop_strings_end_the_answer(server: Any) -> None:
    body: dict[str, Any] = {"model": "support", "prompt": "hi", "temperature": 0, "max_tokens": 32}
    client = server.client()
    text = client.completions.create(**body, extra_body=FIXED).choices[0].text
    stop = text[5:7]
    for given in (stop, [stop, "never said"]):
        stopped = client.completions.create(**body, stop=given, extra_body=FIXED).choices[0]
        assert stopped.finish_reason == "stop"
        assert stopped.text == text[: text.index(stop)]


def test_extra_sampling_fields_reach_the_engine(server: Any) -> None:
    body: dict[str, Any] = {"model": "support", "prompt": "hi", "max_tokens": 16}
    client = server.client()
    greedy = client.completions.create(**body, temperature=0, extra_body=FIXED).choices[0].text
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        answer = client.completions.create(**body, extra_body={**FIXED, **extra})
        assert answer.choices[0].text == greedy
    penalised = {**FIXED, "repetition_penalty": 10.0}
    other = client.completions.create(**body, temperature=0, extra_body=penalised)
    assert other.choices[0].text != greedy


def test_max_tokens_is_bounded_by_the_engine(server: Any) -> None:
    answer = server.client().completions.create(
        model="tiny", prompt="x" * 500, max_tokens=10**9, temperature=0, extra_body=FIXED
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == server.engine.max_length


def test_a_running_answer_keeps_its_version(
    tools: Any, engine: Any, registry: Any, tiny_adapters: dict[str, AdapterSource]
) -> None:
    config = tools.ApiConfig()
    with tools.serving(engine, registry, config) as server:
        body: dict[str, Any] = {"prompt": "hi", "max_tokens": 300, "temperature": 0}
        client = server.client()
        whole = client.completions.create(model="support@1", extra_body=FIXED, **body)
        stream = client.completions.create(
            model="support@prod", stream=True, extra_body=FIXED, **body
        )
        first = next(stream)
        registry.promote("support", 2)
        tools.wait_until(
            lambda: client.models.retrieve("support@prod").to_dict()["root"] == "support@2",
            "the alias has moved",
        )
        rest = list(stream)
        assert {piece.model for piece in (first, *rest)} == {"support@1"}
        assert "".join(p.choices[0].text for p in (first, *rest)) == whole.choices[0].text


def test_tokenize(server: Any, chat_prompt: list[int]) -> None:
    tokenizer = server.engine.tokenizer
    text = server.http.post("/tokenize", json={"model": "support", "prompt": "Héllo"}).json()
    assert text["tokens"] == list(tokenizer("Héllo")["input_ids"])
    assert (text["count"], text["max_model_len"]) == (len(text["tokens"]), 512)
    chat = server.http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["tokens"] == chat_prompt
