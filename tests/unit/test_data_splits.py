"""A data set's own splits are kept: what is for testing is never trained on, and it is said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayfin.config import DataConfig
from rayfin.data import Corpus, load_corpus
from rayfin.errors import DataError


def load(path: Path, **settings: object) -> Corpus:
    return load_corpus(DataConfig.model_validate({"path": str(path), **settings}))


def rows(name: str, count: int = 3) -> list[dict[str, str]]:
    return [{"prompt": f"{name} asks {n}", "completion": f"{n} of {name}"} for n in range(count)]


def write(root: Path, name: str, content: list[dict[str, str]] | None = None) -> None:
    """A file whose rows tell in which file they are."""
    content = rows(name) if content is None else content
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".csv":
        path.write_text(
            "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in content)
        )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))


def files_of(corpus: Corpus) -> tuple[set[str], set[str]]:
    """The files that are trained on, and those that are evaluated on."""
    train, evaluated = (
        {example.messages[0]["content"].partition(" asks")[0] for example in split}
        for split in (corpus.train, corpus.eval)
    )
    return train, evaluated


LAYOUTS = {
    "files": ("train.jsonl", "validation.jsonl", "test.jsonl"),
    "upper case": ("TRAIN.jsonl", "Valid.jsonl", "Test.jsonl"),
    "words": ("my-train_v2.jsonl", "my-dev_v2.jsonl", "my-test_v2.jsonl"),
    "numbers": ("train2017.jsonl", "val2017.jsonl", "test2017.jsonl"),
    "other words": ("training.csv", "evaluation.csv", "testing.csv"),
    "sets": ("trainset.jsonl", "devset.jsonl", "testset.jsonl"),
    "capital letters": ("myTrainData.jsonl", "myValData.jsonl", "myTestData.jsonl"),
    "hub": (
        "data/train-00000-of-00001-a1b2c3.parquet",
        "data/validation-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    ),
    "directories": ("train/a.jsonl", "validation/a.jsonl", "test/a.jsonl"),
    "below data": ("data/train/train_x.jsonl", "data/eval/a.jsonl", "data/test/a.jsonl"),
    "words of other splits in files": ("train/dev_a.jsonl", "dev/train_a.jsonl", "test/a.jsonl"),
    "one below a directory": ("train.jsonl", "eval/questions.jsonl", "test/questions.jsonl"),
    "a directory whose name tells two": (
        "train_test_split/train.jsonl",
        "train_test_split/validation.jsonl",
        "train_test_split/test.jsonl",
    ),
    "a directory with a split's name": ("eval-1/train.csv", "eval-1/val.csv", "eval-1/test.csv"),
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_train_is_trained_on_and_validation_or_test_evaluated_on(
    tmp_path: Path, names: tuple[str, str, str]
) -> None:
    train, validation, test = names
    write(tmp_path, train)
    write(tmp_path, test)
    corpus = load(tmp_path)
    assert files_of(corpus) == ({train}, {test}) and corpus.eval_split == "test"
    said = f"data: trains on 3 rows of {train}, evaluates on 3 rows of {test}"
    assert corpus.notes == (said,)

    write(tmp_path, validation)
    corpus = load(tmp_path)
    assert files_of(corpus) == ({train}, {validation})
    assert corpus.eval_split in ("validation", "eval")
    said = f"data: trains on 3 rows of {train}, evaluates on 3 rows of {validation}"
    assert corpus.notes == (said, f"data: not read: {test} (split test)")

    streaming = load(tmp_path, streaming=True) if train.endswith(("jsonl", "parquet")) else corpus
    assert (files_of(streaming), streaming.notes) == (files_of(corpus), corpus.notes)


def test_all_files_of_a_split_are_read(tmp_path: Path) -> None:
    train = {f"train-0000{n}-of-00005.jsonl" for n in range(5)}
    for name in (*train, "val-a.jsonl", "val-b.jsonl"):
        write(tmp_path, name)
    corpus = load(tmp_path)
    assert files_of(corpus) == (train, {"val-a.jsonl", "val-b.jsonl"})
    assert corpus.notes == (
        "data: trains on 15 rows of train-00000-of-00005.jsonl and 4 more files, "
        "evaluates on 6 rows of val-a.jsonl and val-b.jsonl",
    )


def test_without_a_split_to_evaluate_on_rows_are_held_out_of_train(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "extra.jsonl"):
        write(tmp_path, name, rows(name, 10))
    corpus = load(tmp_path, val_size=0.2)
    assert (len(corpus.train), len(corpus.eval), corpus.eval_split) == (16, 4, "held_out")
    assert files_of(corpus)[0] == {"train-0.jsonl", "train-1.jsonl"}
    assert corpus.notes[0] == (
        "data: trains on 16 rows of train-0.jsonl and train-1.jsonl, evaluates on 4 rows held out "
        "(data.val_size=0.2)"
    )
    assert corpus.notes[1].startswith("data: not read: extra.jsonl, whose names tell no split")


def test_names_that_tell_no_split_are_one_data_set(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "latest.jsonl", "contraining.jsonl"):
        write(tmp_path, name)
    corpus = load(tmp_path)
    assert len(corpus.train) + len(corpus.eval) == 12
    assert "a.jsonl and 3 more files" in corpus.notes[0]


def test_one_file_is_the_data_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path, "test.jsonl")
    corpus = load(tmp_path / "test.jsonl")
    assert (len(corpus.train), len(corpus.eval), corpus.notes) == (2, 1, ())
    with pytest.raises(DataError, match=r"data\.split: 'test' can't be had of .*leave data\.split"):
        load(tmp_path / "test.jsonl", split="test")


@pytest.mark.parametrize(
    ("names", "settings", "says"),
    [
        (("test.jsonl",), {}, "no train split, only test; .*data.split=test"),
        (("dev.jsonl", "a.jsonl"), {}, "no train split, only validation, a.jsonl; name what is"),
        (("train.jsonl", "val-test.jsonl"), {}, "'val-test.jsonl' tells more than one split"),
        (("train.jsonl", "test.jsonl"), {"split": "tes"}, "no split 'tes' .did you mean 'test'"),
        (("a.jsonl", "b.jsonl"), {"split": "train"}, "its names tell none: leave data.split out"),
        (
            ("train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"),
            {},
            "several train splits .train_gen, train_sft.; say with data.split=train_gen",
        ),
    ],
)
def test_what_is_in_doubt_is_refused(
    tmp_path: Path, names: tuple[str, ...], settings: dict[str, Any], says: str
) -> None:
    for name in names:
        write(tmp_path, name)
    with pytest.raises(DataError, match=says) as caught:
        load(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_one_split_or_all_of_them_can_be_asked_for(tmp_path: Path) -> None:
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "other.jsonl"):
        write(tmp_path, name)
    one = load(tmp_path, split="validation")
    assert set.union(*files_of(one)) == {"validation.jsonl"} and len(one.train) == 2
    assert any("train.jsonl" in note for note in one.notes[1:])
    together = load(tmp_path, split="all")
    write(tmp_path, "train_test/val-test.jsonl")
    assert len(files_of(load(tmp_path, split="all"))[0]) == 5
    assert len(together.train) + len(together.eval) == 12 and len(together.notes) == 1


def test_the_same_rows_in_train_and_test_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", rows("x", 8))
    write(tmp_path, "test.jsonl", rows("x", 2) + rows("y", 2))
    for streaming in (False, True):
        corpus = load(tmp_path, streaming=streaming)
        assert corpus.eval_rows_in_train == 2
        assert corpus.notes[1].startswith("data: 2 of the 4 rows evaluated on are trained on, too:")


def test_settings_for_holding_out_and_sampling(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", rows("train", 50))
    write(tmp_path, "test.jsonl", rows("test", 30))
    corpus = load(tmp_path, val_size=0.3, max_samples=20)
    assert (len(corpus.train), len(corpus.eval)) == (20, 20)
    assert "data: data.val_size=0.3 has no effect: nothing is held out of training" in corpus.notes


def test_both_splits_decide_the_digest(tmp_path: Path) -> None:
    """So no trial that was evaluated on other rows is taken for this one."""
    digests = set()
    for streaming in (False, True):
        write(tmp_path, "train.jsonl", rows("train", 9))
        for test in (rows("test", 4), rows("test", 5), rows("other", 4)):
            write(tmp_path, "test.jsonl", test)
            digests.add(load(tmp_path, streaming=streaming).digest)
        write(tmp_path, "train.jsonl", rows("train", 8))
        digests.add(load(tmp_path, streaming=streaming).digest)
    assert len(digests) == 8


def test_bad_rows_of_the_evaluated_split_are_named_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl")
    write(tmp_path, "test.jsonl", [*rows("test"), {"prompt": "no answer"}])
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"test\.jsonl:4: completion missing"):
            load(tmp_path, streaming=streaming)
        corpus = load(tmp_path, streaming=streaming, on_bad_row="skip")
        skipped = corpus.stream.bad_rows if corpus.stream else len(corpus.skipped)
        assert (skipped, len(corpus.eval)) == (1, 3)
    # As where the answers are kept back, in competitions.
    write(tmp_path, "test.jsonl", [{"prompt": "no answer"}] * 2)
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"no valid row .*data\.split=train eval.*held out"):
            load(tmp_path, streaming=streaming, on_bad_row="skip")
    write(tmp_path, "test.jsonl", [])
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"split test \(test\.jsonl\) is empty"):
            load(tmp_path, streaming=streaming)


def test_of_streamed_data_a_sample_is_evaluated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayfin.data.survey.MAX_HELD_OUT", 20)
    write(tmp_path, "train.jsonl", rows("train", 300))
    write(tmp_path, "test.jsonl", rows("test", 100))
    corpus = load(tmp_path, streaming=True)
    assert corpus.stream is not None and sum(corpus.stream.rows) == 300
    assert len(corpus.eval) == 20 and files_of(corpus) == ({"train"}, {"test"})


def test_metadata_is_no_row_and_data_of_that_name_is(tmp_path: Path) -> None:
    write(tmp_path, "data.jsonl")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("dataset_info.json", "dataset_infos.json", "config.json"):
        (tmp_path / name).write_text('{"default": {"features": {}}}')
    (tmp_path / "state.json").write_text(json.dumps(rows("state")))
    for folder in (".git", "__MACOSX"):
        write(tmp_path, f"{folder}/a.jsonl")
    corpus = load(tmp_path)
    assert set.union(*files_of(corpus)) == {"data.jsonl", "state"}


def test_what_looks_like_data_and_is_not_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, "data.jsonl")
    for name in ("more.xls", "old/some.jsonl.7z", ".cache/a.zip", "run.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert "data: not read: more.xls and old/some.jsonl.7z; what is" in load(tmp_path).notes[1]


def test_links_are_followed_and_what_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "elsewhere/a.jsonl")
    write(tmp_path, "data/test/a.jsonl")
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "test" / "back").symlink_to(tmp_path / "data")
    assert files_of(load(tmp_path / "data")) == ({"elsewhere/a.jsonl"}, {"data/test/a.jsonl"})
    scandir = os.scandir

    def denied(path: str) -> Any:
        if str(path).endswith("test"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # the tests may run as root, who may read all
    with pytest.raises(DataError, match=r"/test' can't be read \(Permission denied\)"):
        load(tmp_path / "data")


def test_llama_factorys_list_of_data_sets_is_not_dropped_without_a_word(tmp_path: Path) -> None:
    write(tmp_path, "mine.jsonl")
    listed = {"mine": {"file_name": "mine.jsonl", "columns": {"prompt": "x"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(listed))
    corpus = load(tmp_path)
    assert set.union(*files_of(corpus)) == {"mine.jsonl"}
    assert "data: not read: dataset_info.json of LLaMA-Factory (columns)" in corpus.notes[1]


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: [part-1.jsonl, "more/*.jsonl"]
  - split: test
    path: train-hard.jsonl
---
# About
"""


def test_the_card_of_a_hub_repository_tells_the_splits(tmp_path: Path) -> None:
    for name in ("part-1.jsonl", "more/a.jsonl", "train-hard.jsonl"):
        write(tmp_path, name)
    (tmp_path / "README.md").write_text(CARD)
    assert files_of(load(tmp_path)) == ({"part-1.jsonl", "more/a.jsonl"}, {"train-hard.jsonl"})
    (tmp_path / "train-hard.jsonl").unlink()
    with pytest.raises(DataError, match=r"README\.md' lists 'test', which is not there; fetch"):
        load(tmp_path)
    subsets = "configs:\n- {config_name: a, data_files: a/*}\n- {config_name: b, data_files: b/*}"
    (tmp_path / "README.md").write_text(f"---\n{subsets}\n---\n")
    with pytest.raises(DataError, match=r"several subsets \(a, b\).*give the directory"):
        load(tmp_path)


def card(root: Path, configs: str) -> None:
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")


@pytest.mark.parametrize("pattern", ["data/**", "data/**/*", "**", "data/**/b/**"])
def test_a_cards_pattern_that_ends_in_two_stars_is_of_all_files_below(
    tmp_path: Path, pattern: str
) -> None:
    for name in ("data/a/b/x.jsonl", "data/c/b/y.jsonl"):
        write(tmp_path, name)
    card(tmp_path, f"- {{config_name: default, data_files: '{pattern}'}}")
    corpus = load(tmp_path)
    assert set.union(*files_of(corpus)) == {"data/a/b/x.jsonl", "data/c/b/y.jsonl"}
    assert load(tmp_path, split="train").digest == corpus.digest


@pytest.mark.parametrize("pattern", ["''", "{train: ''}", "[{split: train}]", "./", "a**.jsonl"])
def test_a_cards_pattern_that_is_none_is_refused(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, "a.jsonl")
    card(tmp_path, f"- {{config_name: default, data_files: {pattern}}}")
    with pytest.raises(DataError, match=r"README\.md' gives .* which is no pattern of files"):
        load(tmp_path)


def test_subsets_that_a_card_gives_by_their_directories(tmp_path: Path) -> None:
    for name in ("en/train.jsonl", "en/test.jsonl", "de/a.jsonl", "de/b.jsonl"):
        write(tmp_path, name)
    subsets = "- {config_name: en, data_dir: en}\n- {config_name: de, data_dir: de%s}"
    card(tmp_path, subsets % "")
    with pytest.raises(DataError, match=r"several subsets \(en, de\)"):
        load(tmp_path)
    card(tmp_path, subsets % ", default: true")
    assert set.union(*files_of(load(tmp_path))) == {"de/a.jsonl", "de/b.jsonl"}
    card(tmp_path, "- {config_name: en, data_dir: en}")
    assert files_of(load(tmp_path)) == ({"en/train.jsonl"}, {"en/test.jsonl"})
    card(tmp_path, "- {config_name: en, data_dir: fr}")
    with pytest.raises(DataError, match="lists 'fr', which is not there"):
        load(tmp_path)


# --- what the datasets library writes and loads --------------------------------------------


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ("train", "validation", "test")
    whole = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows(name, 5)) for name in names}
    )
    whole.save_to_disk(tmp_path / "dict", num_shards={"train": 3, "validation": 1, "test": 1})
    corpus = load(tmp_path / "dict")
    assert files_of(corpus) == ({"train"}, {"validation"}) and len(corpus.train) == 5
    assert "data: not read: test/data-00000-of-00001.arrow (split test)" in corpus.notes

    # What the library made of it on the way is none of the data.
    one = datasets.load_from_disk(tmp_path / "dict" / "train")
    one.map(lambda row: {"prompt": "never", "completion": "this"})
    assert list((tmp_path / "dict" / "train").glob("cache-*.arrow"))
    assert set.union(*files_of(load(tmp_path / "dict" / "train"))) == {"train"}
    assert files_of(load(tmp_path / "dict")) == ({"train"}, {"validation"})

    state = tmp_path / "dict" / "train" / "state.json"
    indexed = json.loads(state.read_text()) | {"_indices_data_files": [{"filename": "i.arrow"}]}
    state.write_text(json.dumps(indexed))
    with pytest.raises(DataError, match=r"indices, which is not read; .*flatten_indices"):
        load(tmp_path / "dict")
    shutil.rmtree(tmp_path / "dict" / "train")
    with pytest.raises(DataError, match="lists 'train', which is not there"):
        load(tmp_path / "dict")


def test_arrow_files(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows("a", 4))
    for name, writer in (("s.arrow", pa.ipc.new_stream), ("f.arrow", pa.ipc.new_file)):
        with writer(str(tmp_path / name), table.schema) as out:
            out.write_table(table)
        assert len(load(tmp_path / name).train) == 3
    for content in (b"", b"no arrow"):
        (tmp_path / "x.arrow").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.arrow"):
            load(tmp_path / "x.arrow")


def test_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub lays them out, loaded by the datasets library itself."""
    datasets = pytest.importorskip("datasets")
    from rayfin.data import sources

    for name in ("train", "validation", "test"):
        write(tmp_path / "repo", f"data/{name}-00000-of-00001.parquet", rows(name))
    load_dataset = datasets.load_dataset

    def from_disk(name: str, *, split: str | None) -> Any:
        assert name == "owner/name"
        return load_dataset(str(tmp_path / "repo"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    monkeypatch.setattr(sources, "_existing", lambda path: None)
    monkeypatch.setattr("rayfin.hub.ask", lambda question: None)  # it answers
    corpus = load(Path("owner/name"))
    assert files_of(corpus) == ({"train"}, {"validation"})
    assert corpus.notes == (
        "data: trains on 3 rows of split train, evaluates on 3 rows of split validation",
        "data: not read: split test",
    )
    for settings in ({"path": "owner/name:test"}, {"path": "owner/name", "split": "test"}):
        only = load_corpus(DataConfig.model_validate(settings))
        assert set.union(*files_of(only)) == {"test"} and len(only.train) == 2
    with pytest.raises(DataError, match=r"data\.streaming=true: 'owner/name:train' is a hub"):
        load(Path("owner/name"), streaming=True)
    with pytest.raises(DataError, match="name two splits; leave one out"):
        load(Path("owner/name:test"), split="train")
