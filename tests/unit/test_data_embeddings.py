"""`rayfin data dedupe` and `leaks` find rows of similar meaning by a model's embeddings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rayfin.cli import main
from rayfin.config.schema import ModelConfig
from rayfin.data_tools.embedding_model import EmbeddingModel
from rayfin.models.bundled import bundled_directory
from rayfin.models.load import load_tokenizer

ANGLES = {
    "How do I cancel?": 0,
    "I want to end my plan.": 10,  # as the first
    "Stop billing me": 25,  # as the second, which is not kept
    "How do I cancel??": 90,
    "No more invoices, please": 22,  # as the third
    "End it.": 12,  # as the first, and a little less as the third
}


class KnownVectors:
    """Takes the place of a model, with vectors at known angles."""

    pooling, device, size, truncated, max_tokens = "mean", "cpu", 2, 0, 512

    def __init__(self, name: str) -> None:
        self.name = name

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        angles = np.radians([ANGLES[text] for text in texts])
        return np.stack((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayfin.data_tools.compared_rows.EmbeddingModel", KnownVectors)


def write(name: str, texts: Sequence[str]) -> None:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts_of(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(name).read_text().splitlines()]


def report(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[Any, str]:
    assert main(["data", *words, "--json"]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def cosine(first: str, second: str) -> float:
    return math.cos(math.radians(ANGLES[first] - ANGLES[second]))


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("block", [1, 2, 1024])
def test_rows_in_other_words_are_left_out_for_the_most_similar_one_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Whatever is compared at a time; one that differs in a character stays if its vector does."""
    monkeypatch.setattr("rayfin.data_tools.embeddings._BLOCK", block)
    monkeypatch.setattr("rayfin.data_tools.embeddings._OTHERS", block)
    texts = [*ANGLES, "How do I cancel?"]
    write("all.jsonl", texts)
    words = ("dedupe", "all.jsonl", "--output=some.jsonl", "--embedding-model=known")
    found, said = report(capsys, *words)
    assert said == "known (mean pooling, on cpu): 6 rows to embed, 15 pairs to compare\n"
    assert texts_of("some.jsonl") == [texts[0], texts[2], texts[3]]
    how = [found[name] for name in ("part", "threshold", "embedding_model", "pooling")]
    assert how == ["whole", 0.95, "known", "mean"]
    counts = [found[name] for name in ("rows", "written", "equal", "similar", "unusable")]
    assert counts == [7, 3, 1, 3, 0]
    lost = [(each["line"], each["duplicate_of"]["line"]) for each in found["left_out"]]
    assert lost == [(2, 1), (5, 3), (6, 1), (7, 1)]
    for each, (line, other) in zip(found["left_out"], lost, strict=True):
        similarity = cosine(texts[line - 1], texts[other - 1])
        assert each["similarity"] == pytest.approx(similarity, abs=1e-3)
        assert each["equal"] == (line == 7)


@pytest.mark.usefixtures("_known")
def test_leaks_in_other_words_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows to train on are compared with those evaluated on alone."""
    texts = list(ANGLES)
    write("train.jsonl", [texts[1], texts[5], texts[2], texts[3]])
    write("test.jsonl", [texts[0], texts[3]])
    words = ("leaks", "train.jsonl", "data.eval_path=test.jsonl", "--embedding-model=known")
    found, said = report(capsys, *words, code=1)
    assert said.startswith("known (mean pooling, on cpu): 5 rows to embed, 6 pairs to compare\n")
    leaks = [(each["line"], each["evaluated"]["line"]) for each in found["left_out"]]
    assert leaks == [(1, 1), (2, 1), (4, 2)]
    assert (found["equal"], found["similar"], found["eval_rows_in_train"]) == (1, 2, 2)


def bert(directory: Path, pooling: dict[str, Any] | None) -> None:
    """Write an encoder that was trained with a head, and how its states are pooled."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = load_tokenizer(ModelConfig(name="tiny"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(tokenizer), **sizes, **more)
        BertForMaskedLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if pooling is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("name", "pooling", "first_token"),
    [
        ("tiny", None, False),
        ("bert", None, False),
        ("bert", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True),
    ],
)
def test_an_embedding_is_the_text_s_own_whatever_it_is_embedded_with(
    capsys: pytest.CaptureFixture[str],
    name: str,
    pooling: dict[str, Any] | None,
    first_token: bool,
) -> None:
    """Neither padding nor a head changes it; of a long text the beginning is read, and told."""
    from transformers import AutoModel

    if name == "bert":
        bert(Path(name), pooling)
    model = EmbeddingModel(name)
    texts = ["Where are my invoices?", "Why?", "x" * 600]
    vectors = model.encode(texts)
    plain = AutoModel.from_pretrained(bundled_directory(name) if name == "tiny" else name)
    tokenizer = load_tokenizer(ModelConfig(name="tiny"))
    for text, vector in zip(texts, vectors, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : model.max_tokens]
        with torch.inference_mode():
            states = plain.eval()(input_ids=ids).last_hidden_state[0]
        right = states[0] if first_token else states.mean(0)
        assert np.allclose(vector, right / right.norm(), atol=1e-5)
    assert (model.max_tokens, model.truncated) == (512 if name == "tiny" else 64, 1)

    capsys.readouterr()
    write("all.jsonl", texts)
    words = ("dedupe", "all.jsonl", "--output=some.jsonl", f"--embedding-model={name}")
    found, said = report(capsys, *words, "--threshold=0.5")
    how = "cls" if first_token else "mean"
    assert said == f"{name} ({how} pooling, on cpu): 3 rows to embed, 3 pairs to compare\n"
    assert f"the {model.max_tokens} tokens that are embedded of each: 1;" in found["notes"][-1]
    near = vectors @ vectors.T
    lost = {each["line"] - 1: each["duplicate_of"]["line"] - 1 for each in found["left_out"]}
    kept = [row for row in range(3) if row not in lost]
    assert texts_of("some.jsonl") == [texts[row] for row in kept]
    assert all(near[a, b] < 0.5 for a in kept for b in kept if b < a)
    for each, (row, other) in zip(found["left_out"], lost.items(), strict=True):
        assert other in kept and each["similarity"] == pytest.approx(near[row, other], abs=1e-3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--embedding-model=./nowhere"], "--embedding-model: there is no directory './nowhere'"),
        (["--embedding-model="], "--embedding-model: '' is no model"),
        (["--embedding-model=tiny", "--threshold=1"], "without any model; leave one of them out"),
        (["--embedding-model=pickled"], "has pickled weights only"),
        (["--embedding-model=most"], "asks for the pooling pooling_mode_max_tokens; choose"),
        (["--embedding-model=dense"], "'dense' has a module Dense, which is not supported"),
        (["--embedding-model=unsaid"], "config.json' is missing, which says how 'unsaid' pools"),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    Path("pickled").mkdir()
    Path("pickled/config.json").write_text("{}")
    Path("pickled/pytorch_model.bin").touch()
    for name, file, content in (
        ("most", "1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
        ("dense", "modules.json", [{"type": "models.Pooling"}, {"type": "models.Dense"}]),
        ("unsaid", "modules.json", [{"type": "sentence_transformers.models.Pooling"}]),
    ):
        shutil.copytree(bundled_directory("tiny"), name)
        Path(name, file).parent.mkdir(exist_ok=True)
        Path(name, file).write_text(json.dumps(content))
    write("two.jsonl", ["a", "b"])
    before = sorted(Path().iterdir())
    assert main(["data", "dedupe", "two.jsonl", "--output=o.jsonl", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and "--embedding-model: " in said and said.count("\n") == 1
    assert sorted(Path().iterdir()) == before


@pytest.mark.usefixtures("_known")
def test_more_rows_than_can_be_compared_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is embedded; rows that are equal don't count."""
    monkeypatch.setattr("rayfin.data_tools.embeddings._MOST_ROWS", 5)
    texts = list(ANGLES)
    write("six.jsonl", texts)
    write("five.jsonl", [*texts[:5], texts[0]])
    words = ("--output=o.jsonl", "--embedding-model=known")
    assert main(["data", "dedupe", "six.jsonl", *words]) == 2
    said = capsys.readouterr().err
    assert "6 rows are 15 pairs to compare, more than those of 5 rows" in said
    assert "embed, " not in said and not Path("o.jsonl").exists()
    assert main(["data", "dedupe", "five.jsonl", *words]) == 0
