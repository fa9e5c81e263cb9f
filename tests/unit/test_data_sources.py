"""Rows to evaluate on from elsewhere, several sources in one training, and configurations."""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from rayfin.cli import main
from rayfin.config import DataConfig, build_config, dump_yaml, load_config
from rayfin.data import Corpus, file_ranges, load_corpus
from rayfin.data.mixture import samples_to_take, source_hash
from rayfin.data.stream import plan_epoch_ranges
from rayfin.data.stream_reader import tokenize_range
from rayfin.errors import ConfigError, DataError, DependencyError
from rayfin.objectives import SFT
from rayfin.training import TrialSpec

GUIDE = Path(__file__).parents[2] / "docs" / "data-sources.md"


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} asks {n}", "completion": f"{n} of {name}"} for n in range(count)]


def chats(name: str, count: int) -> list[dict[str, Any]]:
    """The same content as `rows`, in another layout."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows(name, count)
    ]


def write(path: Path, content: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def load(**settings: Any) -> Corpus:
    return load_corpus(DataConfig.model_validate(settings))


def names(examples: tuple[Any, ...]) -> Counter[str]:
    """How many samples come from each source, by the name in their questions."""
    return Counter(e.messages[0]["content"].partition(" asks")[0] for e in examples)


@pytest.fixture(params=[False, True], ids=["held", "streamed"])
def streaming(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_the_evaluated_rows_are_those_of_eval_path(tmp_path: Path, streaming: bool) -> None:
    """Whatever their layout; the data's own split is not read, and nothing is held out."""
    write(tmp_path / "data" / "train.jsonl", rows("train", 20))
    write(tmp_path / "data" / "test.jsonl", rows("test", 5))
    mine = write(tmp_path / "mine.jsonl", chats("mine", 7) + chats("train", 2))
    corpus = load(path=str(tmp_path / "data"), eval_path=mine, val_size=0.3, streaming=streaming)
    assert names(corpus.train) == {"train": 20}
    assert names(corpus.eval) == {"mine": 7, "train": 2}
    assert (corpus.eval_split, corpus.eval_rows_in_train) == ("eval_path", 2)
    assert corpus.shape == "prompt_completion, messages"
    assert corpus.notes == (
        "data: trains on 20 rows of train.jsonl, evaluates on 9 rows of mine.jsonl",
        "data: data.val_size=0.3 has no effect: nothing is held out of training",
        "data: 2 of the 9 rows evaluated on are trained on, too: the scores of these say nothing "
        "of new data",
        "data: not read: test.jsonl (split test)",
    )


def test_what_is_evaluated_on_decides_the_digest_and_not_the_likeness(
    tmp_path: Path, streaming: bool
) -> None:
    path = write(tmp_path / "train.jsonl", rows("train", 20))
    evals = [write(tmp_path / f"{n}.jsonl", rows("mine", n)) for n in (5, 6)]
    corpora = [load(path=path, eval_path=each, streaming=streaming) for each in evals]
    corpora.append(load(path=path, streaming=streaming))
    assert len({corpus.digest for corpus in corpora}) == 3
    assert len({corpus.source for corpus in corpora}) == 1, "what is trained on is the same data"


def test_a_split_of_its_own_is_taken_of_a_directory_to_evaluate_on(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", rows("train", 20))
    write(tmp_path / "other" / "train.jsonl", rows("other", 3))
    write(tmp_path / "other" / "test.jsonl", rows("test", 4))
    corpus = load(path=path, eval_path=str(tmp_path / "other"))
    assert (names(corpus.train), names(corpus.eval)) == ({"train": 20}, {"test": 4})
    assert corpus.notes[1:] == ("data: not read: train.jsonl (split train)",)


def test_a_format_that_was_given_holds_for_evaluated_rows_that_have_it(tmp_path: Path) -> None:
    both = [{**row, "text": f"plain {n}"} for n, row in enumerate(rows("train", 9))]
    path = write(tmp_path / "train.jsonl", both)
    for mine, shape in ((both[:3], "text"), (chats("mine", 3), "text, messages")):
        corpus = load(path=path, eval_path=write(tmp_path / "m.jsonl", mine), format="text")
        assert corpus.shape == shape and len(corpus.eval) == 3


def test_columns_hold_for_evaluated_rows_that_have_them(tmp_path: Path, streaming: bool) -> None:
    table = [{"frage": row["prompt"], "antwort": row["completion"]} for row in rows("train", 9)]
    path = write(tmp_path / "train.jsonl", table)
    columns = {"prompt": "frage", "completion": "antwort"}
    late = [*chats("mine", 1), *table[:3]]
    for mine, said in ((table[:3], False), (late, False), (chats("mine", 3), True)):
        corpus = load(
            path=path,
            eval_path=write(tmp_path / "m.jsonl", mine),
            columns=columns,
            streaming=streaming,
            on_bad_row="skip",
        )
        assert len(corpus.eval) == 3
        assert any("data.columns is not used for the rows" in n for n in corpus.notes) == said
    sources = [{"path": path, "columns": columns}, {"path": write(tmp_path / "b.jsonl", mine)}]
    assert names(load(sources=sources, streaming=streaming).eval) == {"train": 1, "mine": 1}


@pytest.mark.parametrize("evaluated", ["a.jsonl", "./sub/../a.jsonl", "link.jsonl"])
def test_what_is_trained_on_is_not_evaluated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.jsonl", rows("a", 9))
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    with pytest.raises(DataError, match=r"data\.eval_path: '.*' is what data\.path='a\.jsonl'"):
        load(path="a.jsonl", eval_path=evaluated)
    write(tmp_path / "b.jsonl", rows("b", 4))
    listed = [{"path": "b.jsonl"}, {"path": "a.jsonl"}]
    with pytest.raises(DataError, match=r"is what data\.sources\.1\.path='a\.jsonl' trains on"):
        load(sources=listed, eval_path=evaluated)


def test_an_evaluated_file_of_the_trained_directory_is_left_out_of_training(tmp_path: Path) -> None:
    for name in ("a", "b", "heldout"):
        write(tmp_path / f"{name}.jsonl", rows(name, 5))
    corpus = load(path=str(tmp_path), eval_path=str(tmp_path / "heldout.jsonl"))
    assert (names(corpus.train), names(corpus.eval)) == ({"a": 5, "b": 5}, {"heldout": 5})
    assert corpus.notes == (
        "data: trains on 10 rows of a.jsonl and b.jsonl, evaluates on 5 rows of heldout.jsonl",
        "data: not trained on: heldout.jsonl (data.eval_path)",
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], r"^data\.eval_path: '.*mine\.jsonl' is empty; give a source that has rows$"),
        ([{"prompt": "no answer"}], r"^data\.eval_path: '.*mine\.jsonl' has no valid row \(the"),
        (None, r"^data\.eval_path: '.*mine\.jsonl' does not exist; give pydocs"),
    ],
)
def test_problems_of_the_evaluated_rows_name_their_setting(
    tmp_path: Path, streaming: bool, content: list[dict[str, Any]] | None, says: str
) -> None:
    path = write(tmp_path / "train.jsonl", rows("train", 9))
    mine = str(tmp_path / "mine.jsonl")
    if content is not None:
        write(tmp_path / "mine.jsonl", content)
    with pytest.raises(DataError, match=says):
        load(path=path, eval_path=mine, streaming=streaming)


def test_large_data_are_evaluated_on_a_file_that_cannot_be_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayfin.data.survey.MAX_HELD_OUT", 6)
    path = write(tmp_path / "train.jsonl", rows("train", 30))
    lines = [f"{row['prompt']},{row['completion']}" for row in rows("mine", 8)]
    (tmp_path / "mine.csv").write_text("prompt,completion\n" + "\n".join(lines) + "\nbad,\n")
    settings = {"path": path, "eval_path": str(tmp_path / "mine.csv"), "streaming": True}
    with pytest.raises(DataError, match=r"mine\.csv:10: completion is empty"):
        load(**settings)
    corpus = load(**settings, on_bad_row="skip")
    assert names(corpus.eval) == {"mine": 6}
    assert any(
        note.startswith("data: 2 of the 8 rows of mine.csv are not") for note in corpus.notes
    )


def test_sources_without_weights_are_all_their_rows(tmp_path: Path, streaming: bool) -> None:
    """Each in a layout of its own, and each with its own share held out."""
    a = write(tmp_path / "a.jsonl", rows("a", 40))
    b = write(tmp_path / "b.jsonl", chats("b", 200))
    corpus = load(sources=[{"path": a}, {"path": b}], streaming=streaming)
    assert names(corpus.eval) == {"a": 4, "b": 20}
    assert [(use.rows, use.train, use.eval, use.share) for use in corpus.sources] == [
        (40, 36, 4, 0.1667),
        (200, 180, 20, 0.8333),
    ]
    if corpus.stream is None:
        assert names(corpus.train) == {"a": 36, "b": 180}
    else:
        assert sum(corpus.stream.rows) == 216
    assert corpus.notes[:2] == (
        "data: a.jsonl: trains on 36 of 40 rows, 16.7 % of an epoch; evaluates on 4 held out",
        "data: b.jsonl: trains on 180 of 200 rows, 83.3 % of an epoch; evaluates on 20 held out",
    )
    assert corpus.shape == "prompt_completion, messages"


def test_weights_are_the_shares_of_an_epoch(tmp_path: Path, streaming: bool) -> None:
    """It ends where the first source is exhausted: of the others only a part is taken."""
    a = write(tmp_path / "a.jsonl", rows("a", 40))
    b = write(tmp_path / "b.jsonl", rows("b", 200))
    sources = [{"path": a, "weight": 4}, {"path": b, "weight": 1}]
    corpus = load(sources=sources, streaming=streaming)
    assert [(use.train, use.eval, use.share) for use in corpus.sources] == [
        (36, 4, 0.8),
        (9, 1, 0.2),
    ]
    assert corpus.notes[1].endswith("held out; 190 rows left out by weight 1")
    mine = write(tmp_path / "mine.jsonl", rows("mine", 3))
    corpus = load(sources=sources, streaming=streaming, eval_path=mine)
    assert [(use.train, use.eval) for use in corpus.sources] == [(40, 0), (10, 0)]
    assert names(corpus.eval) == {"mine": 3}
    assert corpus.notes[2] == "data: evaluates on 3 rows of mine.jsonl (data.eval_path)"


def test_a_mix_depends_on_content_only(tmp_path: Path) -> None:
    """Not on the order of rows, nor of sources; and one source is the data of that path."""
    content = {name: rows(name, count) for name, count in (("a", 30), ("b", 90))}
    digests = set()
    for seed in range(3):
        order = list(content)
        random.Random(seed).shuffle(order)
        for name in order:
            random.Random(seed).shuffle(content[name])
        sources = [
            {"path": write(tmp_path / f"{name}.jsonl", content[name]), "weight": len(name) + 1}
            for name in order
        ]
        digests.add(load(sources=sources).digest)
    assert len(digests) == 1
    alone, path = load(sources=sources[:1]), load(path=sources[0]["path"])
    assert (alone.digest, alone.source) == (path.digest, path.source)


@dataclass
class Reading:
    """Reads what streamed data are trained on, in small parts of the files."""

    seen: list[str] = field(default_factory=list)

    def epochs(self, corpus: Corpus, first: int, last: int, lanes: int = 1) -> list[str]:
        """What the first lane reads between two steps, as samples in canonical form."""
        stream, sft = corpus.stream, cast("Any", SFT)
        assert stream is not None and len(stream.ranges) > 12
        self.seen.clear()
        for each in plan_epoch_ranges(stream, lanes=[0], of=lanes, seed=3, first=first, last=last):
            tokenize_range(stream, each, sft, sft, seed=3, max_length=64)
        return list(self.seen)

    def encode(self, examples: Any, _: Any) -> list[Any]:
        self.seen += [example.canonical() for example in examples]
        return [{"input_ids": [1, 2], "labels": [1, 2]} for _ in examples]


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    reading, sft = Reading(), cast("Any", SFT)
    monkeypatch.setattr(file_ranges, "_MIN_BYTES", 700)
    monkeypatch.setattr(sft, "encode", reading.encode)
    return reading


def held(split: tuple[Any, ...]) -> Counter[str]:
    return Counter(example.canonical() for example in split)


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_streamed_mix_has_the_rows_of_the_one_that_is_held(
    tmp_path: Path, reading: Reading, evaluated: bool
) -> None:
    """In every epoch, also where rows are in the data several times, and read on in the middle."""
    a = write(tmp_path / "a.jsonl", rows("a", 40))
    many = chats("b", 40) * 6 + chats("c", 90) + chats("d", 30) * 3
    b = write(tmp_path / "b.jsonl", many)
    mine = {"eval_path": write(tmp_path / "mine.jsonl", rows("mine", 3))} if evaluated else {}
    for weight in (1, 2.5, 6):
        sources = [{"path": a, "weight": 1}, {"path": b, "weight": weight}]
        streamed = load(sources=sources, streaming=True, **mine)
        kept = load(sources=sources, **mine)
        epoch = len(kept.train)
        if evaluated:
            assert streamed.rows == epoch == 40 + round(40 * weight)
        else:  # six equal rows may not fit into what is held out, and are kept together
            assert abs(streamed.rows - epoch) < 6
            assert streamed.rows + len(streamed.eval) == epoch + len(kept.eval)
            continue
        assert held(streamed.eval) == held(kept.eval)
        whole = reading.epochs(streamed, 0, 2 * epoch)
        for part in (whole[:epoch], whole[epoch:]):
            assert Counter(part) == held(kept.train)
        assert whole[:epoch] != whole[epoch:]
        assert reading.epochs(streamed, epoch + 17, 2 * epoch) == whole[epoch + 17 :]
        sample = held(streamed.train)
        assert sample == held(kept.train), "the profile is that of the rows that are trained on"
    digests = {
        load(sources=[sources[0], {"path": b, "weight": w}], streaming=True, **mine).digest
        for w in (1, 2)
    }
    assert len(digests) == 2


def test_a_prompt_held_out_of_one_source_is_not_trained_on_in_another(
    tmp_path: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = rows("common", 60)
    a = write(tmp_path / "a.jsonl", common + rows("a", 40))
    b = write(tmp_path / "b.jsonl", [{**row, "completion": "another"} for row in common])
    settings: dict[str, Any] = {"sources": [{"path": a}, {"path": b}], "val_size": 0.3}
    corpus, streamed = load(**settings), load(**settings, streaming=True)
    asked = [{e.messages[0]["content"] for e in split} for split in (corpus.train, corpus.eval)]
    assert asked[0] & asked[1] == set() and len(corpus.train) + len(corpus.eval) == 160
    assert all(use.eval > 0 for use in corpus.sources) and corpus.eval_rows_in_train == 0
    assert held(streamed.eval) == held(corpus.eval) and streamed.sources == corpus.sources
    assert Counter(reading.epochs(streamed, 0, len(corpus.train))) == held(corpus.train)
    assert streamed.notes == corpus.notes

    # No more are evaluated on than are held: the rest is left out, and told.
    monkeypatch.setattr("rayfin.data.survey.MAX_HELD_OUT", 20)
    few = load(**settings, streaming=True)
    assert len(few.eval) == 20 and any("left out, of prompts held out" in n for n in few.notes)
    prompts = {e.messages[0]["content"] for e in few.eval}
    trained = [json.loads(each)[0]["content"] for each in reading.epochs(few, 0, few.rows)]
    assert len(trained) == few.rows and prompts.isdisjoint(trained)


def test_a_held_out_prompt_is_not_trained_on_beside_a_split_of_its_own(
    tmp_path: Path, streaming: bool
) -> None:
    common = rows("common", 40)
    write(tmp_path / "own" / "train.jsonl", [{**row, "completion": "x"} for row in common])
    write(tmp_path / "own" / "validation.jsonl", rows("held", 3))
    plain = write(tmp_path / "plain.jsonl", common)
    small = write(tmp_path / "small.jsonl", common[:1])

    def mixed(*paths: str, **settings: Any) -> Corpus:
        sources = [{"path": path} for path in paths]
        return load(sources=sources, streaming=streaming, **settings)

    own = str(tmp_path / "own")
    for sources in ([own, plain], [plain, small], [small, plain]):
        corpus = mixed(*sources, val_size=0.6)
        asked = [{e.messages[0]["content"] for e in split} for split in (corpus.train, corpus.eval)]
        assert asked[0] & asked[1] == set() and corpus.eval_rows_in_train == 0
        if len(corpus.eval) == 27:
            assert corpus.notes[0] == (
                "data: own: trains on 16 of 40 rows of train.jsonl, 50.0 % of an epoch; evaluates "
                "on 3 rows of validation.jsonl; 24 rows left out, of prompts held out of another "
                "source"
            )
    assert names(mixed(own, plain).eval)["held"] == 3


def test_sources_with_splits_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "own" / "train.jsonl", rows("own", 10))
    write(tmp_path / "own" / "validation.jsonl", rows("held", 3))
    plain = write(tmp_path / "plain.jsonl", rows("plain", 10))
    corpus = load(sources=[{"path": str(tmp_path / "own")}, {"path": plain}])
    assert names(corpus.eval) == {"held": 3, "plain": 1}
    assert corpus.eval_split == "validation and held_out"
    assert corpus.notes[0] == (
        "data: own: trains on 10 of 10 rows of train.jsonl, 52.6 % of an epoch; "
        "evaluates on 3 rows of validation.jsonl"
    )
    only = load(sources=[{"path": str(tmp_path / "own"), "split": "validation"}, {"path": plain}])
    assert names(only.train)["held"] == 2 and names(only.train)["own"] == 0


@pytest.mark.parametrize(
    ("counts", "weights", "most", "taken"),
    [
        ([40, 200], [None, None], None, [40, 200]),
        ([40, 200], [None, None], 60, [10, 50]),
        ([40, 200], [4, 1], None, [40, 10]),
        ([40, 200], [4, 1], 20, [16, 4]),
        ([900, 100], [0.9, 0.1], None, [900, 100]),
        ([7, 7, 7], [1, 1, 1], 10, [4, 3, 3]),
        ([5], [3], None, [5]),
        ([20, 60], [3, 1], None, [20, 7]),
    ],
)
def test_how_many_of_each_source_are_taken(
    counts: list[int], weights: list[float | None], most: int | None, taken: list[int]
) -> None:
    assert samples_to_take(counts, weights, most) == taken


def test_likeness_of_a_mix_is_by_what_is_taken() -> None:
    """Data sets that share a large source of which little is taken are seldom alike."""
    drawn = random.Random(0)

    def smallest(count: int) -> str:
        """The smallest hash of so many samples."""
        return f"{int(16**64 * (1 - (1 - drawn.random()) ** (1 / count))):064x}"

    alike = 0
    for _ in range(300):
        common = smallest(100_000)
        alike += (
            len({source_hash([smallest(90), common], [90, 100_000], [90, 10]) for _ in "ab"}) == 1
        )
    assert alike < 30


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"path": "a", "sources": [{"path": "b"}]}, "path 'a' and sources can't both be given"),
        ({"path": "pydocs", "sources": [{"path": "b"}]}, "path 'pydocs' and sources can't both"),
        ({"name": "en", "sources": [{"path": "b"}]}, "name 'en' has no effect beside sources"),
        ({"format": "text", "sources": [{"path": "b"}]}, "format 'text' has no effect beside"),
        (
            {"sources": [{"path": "a", "weight": 1}, {"path": "b"}]},
            "sources: 'a' has a weight and 'b' has none; give every source a weight, or none",
        ),
        ({"sources": [{"path": "a", "weight": 0}]}, "data.sources.0.weight: 0 is not allowed"),
        ({"sources": [{"weight": 1}]}, "data.sources.0.path: is missing"),
        ({"sources": ["a.jsonl"]}, "data.sources.0: 'a.jsonl' is not allowed; it should be a sec"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        build_config({"data": settings})
    assert "\n" not in str(caught.value)


def test_a_source_of_which_nothing_is_taken_is_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", rows(name, 9)) for name in "ab"]
    sources = [{"path": path, "weight": w} for path, w in zip(paths, (1, 1e-6), strict=True)]
    with pytest.raises(DataError, match=r"data\.sources\.1: weight 1e-06 leaves no row of '.*b\."):
        load(sources=sources)
    same = [write(tmp_path / f"{name}.jsonl", rows(name, 1)) for name in "ab"]
    with pytest.raises(DataError, match=r"data\.sources: none has two different rows"):
        load(sources=[{"path": path} for path in same])


def test_sources_survive_what_is_saved_of_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep's config.yaml, and the specification in a trial's row."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", rows(name, 3))
    written = "data.sources=[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]"
    config = load_config(None, [written, "data.eval_path=b.jsonl"])
    assert [source.weight for source in config.data.sources] == [2, 1]
    Path("saved.yaml").write_text(dump_yaml(config))
    assert load_config("saved.yaml") == config
    spec = TrialSpec.of(config)
    assert spec.data.sources[1].path == spec.data.eval_path == str(tmp_path / "b.jsonl")
    assert DataConfig.model_validate(spec.model_dump(mode="json")["data"]) == spec.data
    hash(spec.data)


CARD = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/train.jsonl}, {split: test, path: en/test.jsonl}]
- {config_name: de, data_files: de/*.jsonl}
---
"""


def test_a_configuration_of_a_card_is_chosen_by_name(tmp_path: Path) -> None:
    for name in ("en/train", "en/test", "de/a", "de/b"):
        write(tmp_path / f"{name}.jsonl", rows(name, 6))
    (tmp_path / "README.md").write_text(CARD)
    root = str(tmp_path)
    corpus = load(path=root, name="en")
    assert (names(corpus.train), names(corpus.eval)) == ({"en/train": 6}, {"en/test": 6})
    together = load(path=root, name="de", split="all")
    assert names(together.train + together.eval) == {"de/a": 6, "de/b": 6}
    mixed = load(sources=[{"path": root, "name": "en"}, {"path": root, "name": "de"}])
    assert [note.split(":")[1] for note in mixed.notes] == [f" {root} (en)", f" {root} (de)"]
    with pytest.raises(
        DataError, match=r"no configuration 'dee' .did you mean 'de'\?.; it lists en"
    ):
        load(path=root, name="dee")
    with pytest.raises(DataError, match=r"several subsets \(en, de\).*data\.name=en"):
        load(path=root)
    with pytest.raises(DataError, match=r"^data\.sources\.0\.name: .* lists no configuration 'x'"):
        load(sources=[{"path": root, "name": "x"}])
    (tmp_path / "README.md").unlink()
    with pytest.raises(DataError, match=r"data\.name: 'en' can't be had of directory .*no README"):
        load(path=root, name="en")
    with pytest.raises(DataError, match=r"data\.name: 'en' can't be had of data\.path=.*leave"):
        load(path=str(tmp_path / "en" / "test.jsonl"), name="en")


def test_a_saved_data_set_has_the_configuration_it_was_saved_of(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(rows("saved", 6))
    saved.info.config_name = "main"
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "saved"))
    assert names(load(path=str(tmp_path / "saved"), name="main").train) == {"saved": 5}
    with pytest.raises(DataError, match=r"data\.name: 'other' .*was saved of configuration main;"):
        load(path=str(tmp_path / "saved"), name="other")


def test_configurations_and_splits_of_a_hub_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    for name in ("en/train", "en/test", "de/a"):
        write(tmp_path / "repo" / f"{name}.jsonl", rows(name, 4))
    (tmp_path / "repo" / "README.md").write_text(CARD)
    load_dataset, cache = datasets.load_dataset, str(tmp_path / "cache")

    def from_disk(path: str, *, split: str | None, name: str | None = None) -> Any:
        assert path == "owner/name"
        return load_dataset(str(tmp_path / "repo"), name=name, split=split, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    monkeypatch.setattr("rayfin.hub.ask", lambda question: None)  # it answers
    monkeypatch.chdir(tmp_path)
    corpus = load(path="owner/name", name="en")
    assert (names(corpus.train), names(corpus.eval)) == ({"en/train": 4}, {"en/test": 4})
    mixed = load(sources=[{"path": "owner/name", "name": "de"}])
    assert names(mixed.train + mixed.eval) == {"de/a": 4}
    evaluated = load(path="owner/name:train", name="en", eval_path="owner/name:test")
    assert (names(evaluated.train), names(evaluated.eval)) == ({"en/train": 4}, {"en/test": 4})
    with pytest.raises(DataError, match=r"eval_path: 'owner/name:train' is what data\.path=.owner"):
        load(path="owner/name:train", name="en", eval_path="owner/name:train")
    for settings, says in (
        (
            {},
            r"Config name is missing.*'en', 'de'.*; name one of its configurations with data\.name",
        ),
        ({"name": "fr"}, r"'fr' not found. Available: \['en', 'de'\].*data\.name"),
        ({"name": "en", "split": "dev"}, r"Unknown split \"dev\".*'train', 'test'.*data\.split"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            load(path="owner/name", **settings)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DependencyError, match=r"'owner/name' .* run: pip install datasets, or give"
    ):
        load(path="owner/name")


def test_a_repository_in_the_hubs_cache_is_read_by_its_snapshot(tmp_path: Path) -> None:
    """Its files are links to the blobs; two snapshots are not one data set."""
    blobs, snapshots = (tmp_path / "set" / name for name in ("blobs", "snapshots"))
    for revision in ("0ld", "new"):
        for name in ("en/train", "en/test", "de/a"):
            blob = write(blobs / f"{revision}-{name}", rows(name, 4))
            link = snapshots / revision / f"{name}.jsonl"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        (snapshots / revision / "README.md").write_bytes(CARD.replace("\n", "\r\n").encode())
    corpus = load(path=str(snapshots / "new"), name="en")
    assert (names(corpus.train), names(corpus.eval)) == ({"en/train": 4}, {"en/test": 4})
    with pytest.raises(DataError, match=r"snapshots are data sets of their own; give one .*/0ld, "):
        load(path=str(tmp_path / "set"))


def shown() -> list[tuple[str, list[str]]]:
    """(command, the lines beneath it) of the guide."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL):
        for each in block.removeprefix("$ ").split("\n$ "):
            command, *lines = each.splitlines()
            found.append((command, lines))
    return found


def test_what_the_guide_shows_is_what_the_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "faq.jsonl", rows("faq", 40))
    write(tmp_path / "chat.jsonl", chats("chat", 200))
    write(tmp_path / "held.jsonl", rows("held", 8) + rows("faq", 2))
    commands = shown()
    assert len(commands) == 6
    for command, lines in commands:
        refused = any(line.startswith("rayfin:") for line in lines)
        assert main(shlex.split(command)[1:]) == (2 if refused else 0), command
        err = capsys.readouterr().err.splitlines()
        assert [line for line in err if line.startswith(("data:", "rayfin:"))] == lines
    assert main(["history", "list", "--limit", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)[0]["scenario"]["data"]
    assert [(it["path"], it["rows"], it["train"]) for it in data["sources"]] == [
        ("faq.jsonl", 40, 36),
        ("chat.jsonl", 200, 9),
    ]
