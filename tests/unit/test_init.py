"""`rayfin init`: a configuration from one's own data that runs as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rayfin.advisor import draft, scenario
from rayfin.advisor.draft import SampleLengths
from rayfin.advisor.estimate import estimate
from rayfin.advisor.published_models import usual_model
from rayfin.cli import main
from rayfin.config import load_config
from rayfin.hardware import Hardware
from rayfin.methods import METHODS
from rayfin.tuning.space import SearchSpace
from rayfin.tuning.space_check import check_space


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"q {i}", "completion": "a" * (1 + i % 7)} for i in range(50)]
    rows.append({"prompt": "q", "completion": "a" * 100})
    Path("support.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return "data.path=support.jsonl"


def written(*words: str) -> str:
    assert main(["init", "model.name=tiny", *words]) == 0
    return Path("my-sweep.yaml").read_text()


def test_the_data_decide_and_every_line_is_explained(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = written(data)
    assert "rayfin sweep my-sweep.yaml" in capsys.readouterr().out
    config = load_config("my-sweep.yaml")
    assert (config.data.path, config.model.name) == ("support.jsonl", "tiny")
    # The longest sample has 100 letters of answer: nothing is cut, and little is left free.
    assert 100 < config.data.max_length <= 160
    assert config.publish is not None and config.publish.name == "support"
    assert {"train.learning_rate", "method.r"} <= set(config.sweep.parameters)
    assert "the longest has" in text and "one epoch is" in text
    lines = text.splitlines()
    for number, line in enumerate(lines):
        key = line.split(":")[0].strip()
        if line.startswith("  ") and not line.startswith(("    ", "  #")):
            assert lines[number - 1].startswith("  # "), f"{key} is not explained"


@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_with_every_method_can_be_checked(data: str, method: str) -> None:
    written(data, f"method.type={method}")
    config = load_config("my-sweep.yaml")
    assert config.method.type == method
    check_space(SearchSpace(config))


def test_what_was_named_is_kept(data: str) -> None:
    settings = ["train.max_steps=7", "method.r=3", "data.max_length=99", "publish.name=mine"]
    text = written(data, *settings, "storage=here", "sweep.num_samples=2", "train.seed=5")
    tree = yaml.safe_load(text)
    assert (tree["train"]["max_steps"], tree["train"]["seed"]) == (7, 5)
    assert (tree["method"]["r"], tree["data"]["max_length"]) == (3, 99)
    assert (tree["publish"]["name"], tree["storage"]) == ("mine", "here")
    assert tree["sweep"]["num_samples"] == 2


def test_nothing_is_overwritten_or_guessed(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my-sweep.yaml").write_text("mine")
    assert main(["init", "model.name=tiny", data]) == 2
    assert "'my-sweep.yaml' exists; give another with --output FILE" in capsys.readouterr().err
    assert Path("my-sweep.yaml").read_text() == "mine"
    assert main(["init", "model.name=tiny"]) == 2
    assert "name them with data.path=FILE" in capsys.readouterr().err


def test_long_samples_give_way_to_the_memory() -> None:
    lengths = SampleLengths.of([*range(1, 96), 5000, 5000, 5000, 5000, 5000])
    assert (lengths.p50, lengths.p95, lengths.longest) == (50, 95, 5000)
    assert lengths.within(256) == 256
    assert lengths.within(8192) == 5024
    assert SampleLengths.of([300] * 100).within(256) == 320  # or nearly every sample would be cut


def test_what_it_writes_can_be_swept_over_methods(data: str) -> None:
    written(data)
    axes = "{method.type: [lora, ia3, p_tuning], method.r: [4, 8], method.num_virtual_tokens: [5]}"
    check_space(SearchSpace(load_config("my-sweep.yaml", [f"sweep.parameters={axes}"])))


def test_a_large_model_is_made_to_fit_the_gpu(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = usual_model(8.0)[0]
    gpu = Hardware("cuda", "a GPU", 1, 12 * 2**30, 8, 2**36, True)
    monkeypatch.setattr(draft, "describe_model", lambda _: facts)
    monkeypatch.setattr(draft, "describe_hardware", lambda _: gpu)
    monkeypatch.setattr(scenario, "describe_hardware", lambda use_gpu: gpu)
    written(data, "method.type=qlora")
    config = load_config("my-sweep.yaml")
    assert estimate(config, facts, gpu).fits is True
    train = config.train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 16
    whole = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    more = config.model_copy(update={"train": train.model_copy(update=whole)})
    assert estimate(more, facts, gpu).fits is not True
