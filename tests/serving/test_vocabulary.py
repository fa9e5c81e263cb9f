"""An adapter that brings another tokenizer, or a larger vocabulary, is not the served base's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayfin.config.schema import ModelConfig
from rayfin.errors import AdapterError
from rayfin.models import load_tokenizer
from rayfin.serving.engine.engine import Engine
from rayfin.serving.engine.request import AdapterSource


@pytest.fixture(scope="module")
def source(
    lab: Any, tiny: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., AdapterSource]:
    """A LoRA that was saved with its tokenizer, changed by `edit`."""
    made = lab.make_adapter(tmp_path_factory.mktemp("lora"), tiny, lab.METHODS["lora"], 0)

    def make(path: Path, edit: Callable[[Any], object]) -> AdapterSource:
        shutil.copytree(made.path, path)
        tokenizer = load_tokenizer(ModelConfig(name=tiny))
        edit(tokenizer)
        tokenizer.save_pretrained(path)
        return AdapterSource(f"{path.name}@1", path)

    return make


@pytest.fixture
def engine(tiny: str, engines: Any) -> Engine:
    made: Engine = engines(tiny, max_length=64)
    return made


def test_the_base_s_own_and_one_that_pads_otherwise_answer(
    lab: Any, source: Any, engine: Engine, tmp_path: Path
) -> None:
    own = source(tmp_path / "own", lambda _: None)
    padded = source(
        tmp_path / "padded", lambda t: t.add_special_tokens({"pad_token": "<|padding|>"})
    )
    for one in (own, padded):
        assert lab.ask(engine, [1, 2], one, lab.greedy(4)).wait().last.finish_reason == "length"


def test_added_tokens_are_named(source: Any, engine: Engine, tmp_path: Path) -> None:
    resized = source(tmp_path / "resized", lambda t: t.add_tokens(["<|call|>"]))
    with pytest.raises(
        AdapterError, match=r"token '<.call.>' as \d+, and the served base's tokenizer doesn't"
    ):
        engine.check(resized)


def test_other_numbers_are_another_tokenizer(source: Any, engine: Engine, tmp_path: Path) -> None:
    other = source(tmp_path / "other", lambda _: None)
    file = other.path / "tokenizer.json"
    told = json.loads(file.read_text())
    words = list(told["model"]["vocab"])
    numbers = list(told["model"]["vocab"].values())
    told["model"]["vocab"] = dict(zip(words, reversed(numbers), strict=True))
    file.write_text(json.dumps(told))
    with pytest.raises(AdapterError, match="another tokenizer, or a resized vocabulary"):
        engine.check(other)
    file.write_text("[" * 10**5)
    with pytest.raises(AdapterError, match="not valid JSON"):
        engine.check(AdapterSource("damaged@1", other.path))
