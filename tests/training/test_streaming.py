"""Large data is trained on without being held: which sample when, and what is held out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfin.config import DataConfig, ModelConfig
from rayfin.data import file_ranges, load_corpus, survey_corpus, tokenize_corpus
from rayfin.data.stream import Stream, plan_sample_ranges
from rayfin.data.stream_reader import read_in_process
from rayfin.errors import DataError
from rayfin.models import load_tokenizer
from rayfin.models.chat_templates import read_chat_template
from rayfin.objectives import SFT
from rayfin.samples import NO_LOSS, Example
from rayfin.training import TrialSpec
from rayfin.training.trainer import TrialTrainer
from rayfin.training.trial_cache import TrialCache


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(ModelConfig(name="tiny"))


def rows(count: int) -> list[dict[str, str]]:
    """With prompts that come twice."""
    return [
        {"prompt": f"say {n // 2}" + " please" * (n % 7), "completion": f"it is {n}"}
        for n in range(count)
    ]


def written(path: Path, content: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Data in many file ranges."""
    monkeypatch.setattr(file_ranges, "_MIN_BYTES", 1000)
    return DataConfig(path=written(tmp_path / "a.jsonl", rows(500)), streaming=True)


def contents(examples: tuple[Example, ...]) -> set[str]:
    return {example.canonical() for example in examples}


def stream_of(config: DataConfig) -> Stream:
    stream = load_corpus(config).stream
    assert stream is not None
    return stream


def read(
    config: DataConfig, tokenizer: Any, lanes: list[int], first: int, last: int, of: int = 4
) -> list[tuple[int, str]]:
    stream = stream_of(config)
    ranges = plan_sample_ranges(stream, lanes=lanes, of=of, seed=1, first=first, last=last)
    samples = read_in_process(tokenizer, SFT)(stream, ranges, 1, config.max_length)
    return [(lane, tokenizer.decode(sample["input_ids"])) for lane, sample in samples]


def test_an_epoch_has_every_training_sample_once(data: DataConfig, tokenizer: Any) -> None:
    corpus = load_corpus(data)
    assert corpus.stream is not None and len(corpus.stream.ranges) > 12
    trained = sum(corpus.stream.rows)
    assert trained + len(corpus.eval) == 500 and len(corpus.eval) == 50
    for lanes in (1, 4):
        seen = read(data, tokenizer, list(range(lanes)), 0, 3 * trained, of=lanes)
        epoch = Counter(text for _, text in seen)
        assert len(epoch) == trained and min(epoch.values()) > 1
    whole = [text for _, text in read(data, tokenizer, [0], 0, 2 * trained, of=1)]
    first, second = whole[:trained], whole[trained:]
    assert first != second and sorted(first) == sorted(second), "a new order for each epoch"
    assert len(set(first)) == trained
    held = {message["content"] for example in corpus.eval for message in example.messages}
    prompts = {text for text in first if any(f"{each}\n" in text for each in held)}
    assert prompts == set(), "a prompt that is held out is not trained on"


def test_a_lane_that_is_opened_anywhere_goes_on_as_it_would_have(
    data: DataConfig, tokenizer: Any
) -> None:
    whole = read(data, tokenizer, [0, 1, 2, 3], 0, 300)
    for first in (1, 17, 131, 299):
        later = read(data, tokenizer, [2, 3], first, 300)
        for lane in (2, 3):
            all_of_it = [text for at, text in whole if at == lane]
            assert [text for at, text in later if at == lane] == all_of_it[first:]


def test_samples_come_as_they_are_needed(data: DataConfig) -> None:
    """So no lane's samples pile up while another's are waited for."""
    ranges = plan_sample_ranges(stream_of(data), lanes=range(4), of=4, seed=0, first=5, last=400)
    assert [each.step for each in ranges] == sorted(each.step for each in ranges)
    for lane in range(4):
        own = [each for each in ranges if each.lane == lane]
        ends = [each.step + each.stop - each.start for each in own]
        assert own[0].step == 5 and ends[-1] == 400
        assert [each.step for each in own[1:]] == ends[:-1], "without a gap"


def test_fewer_ranges_than_lanes(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path / "few.jsonl", rows(8))
    seen = read(DataConfig(path=path, streaming=True), tokenizer, [0, 1, 2, 3], 0, 20)
    assert Counter(lane for lane, _ in seen) == dict.fromkeys(range(4), 20)


def test_the_survey_is_the_corpus_of_the_same_rows(data: DataConfig) -> None:
    streamed = load_corpus(data)
    held = load_corpus(data.model_copy(update={"streaming": False}))
    assert contents(streamed.eval) == contents(held.eval), "the same samples are held out"
    assert (streamed.source, streamed.shape) == (held.source, held.shape)
    assert contents(streamed.train) == contents(held.train)
    assert streamed.digest != held.digest, "the order differs, and so do the trials"

    def backwards(look: Any, parts: Any) -> Iterator[Any]:
        yield from reversed(
            [look(part) for part in reversed([[n] for part in parts for n in part])]
        )

    assert survey_corpus(data, backwards) == streamed, "whoever looks through which part"


def test_weights_and_columns_are_streamed_as_they_are_held(tmp_path: Path, tokenizer: Any) -> None:
    def turns(n: int) -> list[dict[str, Any]]:
        answer = {"role": "assistant", "content": f"no, {n}", "weight": n % 2}
        return [{"role": "user", "content": f"say {n}"}, answer] * 2

    last = {"role": "user", "content": "so?"}, {"role": "assistant", "content": "yes"}
    path = written(
        tmp_path / "a.jsonl",
        [{"messages": [*turns(n), *last], "system": "S", "id": n, "tools": "x"} for n in range(60)],
    )
    config = DataConfig(path=path, streaming=True, ignore_columns=("tools",))
    held = load_corpus(config.model_copy(update={"streaming": False}))
    stream = stream_of(config)
    assert load_corpus(config).notes == held.notes
    assert "not trained on: id; where" in held.notes[0]
    ranges = plan_sample_ranges(stream, lanes=[0], of=1, seed=0, first=0, last=sum(stream.rows))
    labels = [
        sample["labels"] for _, sample in read_in_process(tokenizer, SFT)(stream, ranges, 0, 256)
    ]
    assert sorted(labels) == sorted(
        sample["labels"] for sample in tokenize_corpus(held, tokenizer, 256).train
    )
    assert len({sum(label != NO_LOSS for label in each) for each in labels}) > 2


def test_how_much_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayfin.data.survey.MAX_HELD_OUT", 20)
    path = written(tmp_path / "b.jsonl", rows(500))
    assert len(load_corpus(DataConfig(path=path, streaming=True, val_size=0.5)).eval) == 20
    same = [{"prompt": "tell me", "completion": f"story {n}"} for n in range(100)]
    path = written(tmp_path / "c.jsonl", same)
    corpus = load_corpus(DataConfig(path=path, streaming=True))
    assert len(corpus.eval) == 10 and corpus.stream and sum(corpus.stream.rows) == 90


@pytest.mark.parametrize("name", ["data.parquet", "more"])
def test_parquet_and_directories(
    tmp_path: Path, tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if name == "more":
        (tmp_path / name).mkdir()
        written(tmp_path / name / "a.jsonl", rows(50))
        written(tmp_path / name / "b.ndjson", rows(100)[50:])
    else:
        pq.write_table(pa.Table.from_pylist(rows(100)), tmp_path / name, row_group_size=13)
    monkeypatch.setattr(file_ranges, "_MIN_BYTES", 1000)
    config = DataConfig(path=str(tmp_path / name), streaming=True)
    stream = stream_of(config)
    assert sum(stream.rows) == 90 and len(stream.ranges) > 3
    texts = {text for _, text in read(config, tokenizer, [0], 0, 90, of=1)}
    assert len(texts) == 90


def test_of_a_data_set_with_splits_all_of_train_is_read_and_nothing_of_test(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_ranges, "_MIN_BYTES", 1000)
    (tmp_path / "set").mkdir()
    written(tmp_path / "set" / "train.jsonl", rows(100))
    written(tmp_path / "set" / "test.jsonl", rows(120)[100:])
    config = DataConfig(path=str(tmp_path / "set"), streaming=True)
    texts = {text for _, text in read(config, tokenizer, [0], 0, 100, of=1)}
    answers = {int(text.partition("it is ")[2].partition("<")[0]) for text in texts}
    assert answers == set(range(100))


def test_bad_rows_are_found_before_anything_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    written(path, rows(200))
    lines = path.read_text().splitlines()
    lines[150], lines[180] = '{"prompt": "no answer"}', "{broken"
    path.write_text("\n".join(lines))
    config = DataConfig(path=str(path), streaming=True)
    with pytest.raises(DataError, match=r"bad\.jsonl:151: completion missing.*\(2 of 200 rows"):
        load_corpus(config)
    corpus = load_corpus(config.model_copy(update={"on_bad_row": "skip"}))
    assert corpus.stream and sum(corpus.stream.rows) + len(corpus.eval) == 198
    assert corpus.stream.bad_rows == 2


@pytest.mark.parametrize(
    ("name", "content", "settings", "says"),
    [
        ("a.csv", "prompt,completion\na,b\n", {}, "can't be read in parts"),
        ("a.jsonl.gz", "", {}, "unpack .gz"),
        ("a.jsonl", "", {}, "is empty"),
        ("a.jsonl", '{"text": "a"}\n' * 9, {}, "not two different"),
        ("a.jsonl", '{"text": "a"}\n', {"max_samples": 5}, "leave one of the two"),
        ("a.parquet", "no parquet", {}, "broken Parquet"),
        ("a.jsonl", '{"chosen": "a", "rejected": "b"}\n', {}, "preference pairs"),
        ("a.jsonl", '{"other": "a"}\n', {}, "has no valid row"),
        (
            "a.jsonl",
            '\ufeff{"text": "a"}\n',
            {},
            "is UTF-16, which can't .* iconv -f utf-16 -t utf",
        ),
        ("a.jsonl", '{\n"text": "a"}\n', {}, "an object must be on one line; jq -c ."),
    ],
)
def test_what_cannot_be_streamed(
    tmp_path: Path, name: str, content: str, settings: dict[str, Any], says: str
) -> None:
    encoding = "utf-16" if content.startswith("\ufeff") else "utf-8"
    (tmp_path / name).write_text(content.lstrip("\ufeff"), encoding=encoding)
    with pytest.raises(DataError, match=says):
        load_corpus(DataConfig(path=str(tmp_path / name), streaming=True, **settings))


def test_a_sample_without_its_answer_takes_its_place_and_no_time(
    tmp_path: Path, tokenizer: Any
) -> None:
    long = [{"prompt": "a " * 200 + str(n), "completion": "b"} for n in range(20)]
    config = DataConfig(
        path=written(tmp_path / "a.jsonl", rows(40) + long), streaming=True, max_length=128
    )
    stream = stream_of(config)
    ranges = plan_sample_ranges(stream, lanes=[0], of=1, seed=0, first=0, last=sum(stream.rows))
    samples = [sample for _, sample in read_in_process(tokenizer, SFT)(stream, ranges, 0, 128)]
    without = [sample for sample in samples if set(sample["labels"]) == {NO_LOSS}]
    assert len(samples) == sum(stream.rows) and 10 < len(without) <= 20
    assert {len(sample["input_ids"]) for sample in without} == {2}
    profile = tokenize_corpus(load_corpus(config), tokenizer, 128).profile
    assert profile.rows_train == sum(stream.rows)


# --- training on it -----------------------------------------------------------------------


@pytest.fixture
def spec(lab: Any, tmp_path: Path) -> TrialSpec:
    path = written(tmp_path / "a.jsonl", rows(500))
    # No dropout: each worker would draw its own.
    found: TrialSpec = lab.spec(
        settings={"lora_dropout": 0.0}, data={"path": path, "streaming": True}
    )
    return found


def test_a_trial_on_streamed_data_learns(lab: Any, spec: TrialSpec) -> None:
    result = lab.run(spec, warm=TrialCache())
    assert result.status == "finished", result.error
    assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"]
    assert result.metrics["tokens_per_second"] > 0
    assert result.scenario["data"]["rows_train"] == 450


def test_after_a_kill_it_goes_on_at_the_right_sample(
    lab: Any, spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[list[int]] = []
    compute_loss = TrialTrainer.compute_loss

    def noted(self: TrialTrainer, model: Any, inputs: Any, *others: Any, **more: Any) -> Any:
        trained.append(inputs["input_ids"].flatten().tolist())
        return compute_loss(self, model, inputs, *others, **more)

    monkeypatch.setattr(TrialTrainer, "compute_loss", noted)
    whole = lab.run(spec, warm=TrialCache())
    every, trained[:] = list(trained), []

    job = {"spec": spec.model_dump_json(), "directory": str(lab.root / "streamed"), "step": 6}
    Path(job["directory"]).mkdir()
    assert [end["signal"] for end in lab.killed([job])] == [9]
    resumed = lab.run(spec, warm=TrialCache(), directory=Path(job["directory"]))
    assert trained == every[4:], "it was saved after step 4"
    assert resumed.metrics["eval_loss"] == whole.metrics["eval_loss"]
    assert [p["step"] for p in resumed.curve] == [p["step"] for p in whole.curve]


def refusing(path: Path, condition: str) -> str:
    """A file with a chat template that refuses conversations with such a message `m`."""
    check = f"{{% if {condition} %}}{{{{ raise_exception('No roads') }}}}{{% endif %}}"
    loop = "{%- for message in messages -%}"
    before = "{%- for m in messages %}" + check + "{% endfor %}" + loop
    path.write_text(read_chat_template("chatml").replace(loop, before))
    return str(path)


@pytest.mark.long
def test_refused_conversations_are_passed_over_and_counted(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where whole parts of a file are refused, and once where a trial is resumed."""
    monkeypatch.setattr(file_ranges, "_MIN_BYTES", 1000)
    talks = rows(60)
    for row in talks[:24]:
        row["prompt"] += " road"
    data = {
        "path": written(tmp_path / "a.jsonl", talks),
        "streaming": True,
        "chat_template": refusing(tmp_path / "own.jinja", "'road' in m.content"),
        "on_bad_row": "skip",
        "max_length": 128,
    }
    spec = lab.spec(data=data, max_steps=None, num_train_epochs=1, save_steps=4)
    evaluations: list[Any] = []

    def dies(result: Any) -> None:
        evaluations.append(result)
        if len(evaluations) == 2:
            raise RuntimeError("the machine is gone")

    (directory := tmp_path / "trial").mkdir()
    assert lab.run(spec, directory=directory, report=dies).status == "failed"
    ended = lab.run(spec, directory=directory)
    assert ended.status == "finished", ended.error
    corpus = load_corpus(spec.data)
    held = sum("road" in example.messages[0]["content"] for example in corpus.eval)
    refused, read, steps = 24 - held, corpus.rows, ended.metrics["steps"]
    assert ended.scenario["data"]["notes"][-2:] == [
        "data: 24 of 60 sampled conversations left out (data.on_bad_row=skip), as the chat "
        "template refuses them",
        f"data: {refused} of {read} conversations left out (data.on_bad_row=skip), as the chat "
        f"template refuses them, in {steps} steps",
    ]
    assert ended.metrics["eval_loss"] < ended.metrics["base_eval_loss"]

    # All but two are refused: one that is held out, and one that the first step doesn't read.
    asked = [each[0].messages[0]["content"] for each in (corpus.train, corpus.eval)]
    other = refusing(tmp_path / "o.jinja", f"m.role == 'user' and m.content not in {asked}")
    failed = lab.run(lab.spec(data=data | {"chat_template": other}, max_steps=1, eval_steps=1))
    assert failed.error == (
        "data: the chat template refuses all 4 rows that 1 step read of the streamed data; use "
        "another model or data.chat_template"
    )


def test_any_number_of_workers_trains_the_same_steps(lab: Any, spec: TrialSpec) -> None:
    train = spec.train.model_copy(
        update={
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2e-3,  # at which AdamW makes nothing of rounding
        }
    )
    spec = spec.model_copy(update={"train": train})
    alone = lab.run(spec, warm=TrialCache())
    job = {"spec": spec.model_dump_json(), "workers": 2, "strategy": "ddp"}
    directory = lab.root / "two-workers-stream"
    directory.mkdir()
    (pair,) = lab.in_groups([job | {"directory": str(directory)}])
    assert pair["status"] == "finished", pair["error"]
    losses = [[p["loss"] for p in curve if "loss" in p] for curve in (alone.curve, pair["curve"])]
    assert losses[1] == lab.rounded(losses[0])
    tokens = [result["tokens_per_second"] for result in (alone.metrics, pair["metrics"])]
    assert min(tokens) > 0
