"""Advice and estimates for models and data that are not here: by size, by name, by config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import rayfin
from rayfin.advisor import description, knowledge
from rayfin.advisor.features import model_row
from rayfin.advisor.published_models import _NAMES, _PUBLISHED, published_model, usual_model
from rayfin.cli import main
from rayfin.config import build_config
from rayfin.config.schema import ModelConfig
from rayfin.errors import ConfigError
from rayfin.models import describe_model

# The numbers of parameters that the models' pages on the Hugging Face hub name.
PARAMETERS = {
    ("gemma2", 2): 2_614_341_888,
    ("gemma2", 9): 9_241_705_984,
    ("gemma2", 27): 27_227_128_320,
    ("gemma3", 1): 999_885_952,
    ("llama2", 7): 6_738_415_616,
    ("llama2", 13): 13_015_864_320,
    ("llama2", 70): 68_976_648_192,
    ("llama3", 8): 8_030_261_248,
    ("llama3", 70): 70_553_706_496,
    ("llama3.1", 8): 8_030_261_248,
    ("llama3.1", 70): 70_553_706_496,
    ("llama3.1", 405): 405_853_388_800,
    ("llama3.2", 1): 1_235_814_400,
    ("llama3.2", 3): 3_212_749_824,
    ("llama3.3", 70): 70_553_706_496,
    ("mistral", 7): 7_248_023_552,
    ("olmo2", 7): 7_298_617_344,
    ("olmo2", 13): 13_716_198_400,
    ("phi3", 3.8): 3_821_079_552,
    ("phi4", 14): 14_659_507_200,
    ("qwen2.5", 0.5): 494_032_768,
    ("qwen2.5", 1.5): 1_543_714_304,
    ("qwen2.5", 3): 3_085_938_688,
    ("qwen2.5", 7): 7_615_616_512,
    ("qwen2.5", 14): 14_770_033_664,
    ("qwen2.5", 32): 32_763_876_352,
    ("qwen2.5", 72): 72_706_203_648,
    ("qwen3", 0.6): 596_049_920,
    ("qwen3", 1.7): 1_720_574_976,
    ("qwen3", 4): 4_022_468_096,
    ("qwen3", 8): 8_190_735_360,
    ("qwen3", 14): 14_768_307_200,
    ("qwen3", 32): 32_762_123_264,
    ("smollm2", 0.135): 134_515_008,
    ("smollm2", 0.36): 361_821_120,
    ("smollm2", 1.7): 1_711_376_384,
    ("smollm3", 3): 3_075_098_624,
    # The language models alone of those that see, too.
    ("gemma3", 4): 3_880_263_168,
    ("gemma3", 12): 11_766_034_176,
    ("gemma3", 27): 27_009_346_304,
}
SIZE = ("--model-size-b", "8", "--rows", "5000", "--tokens-per-sample", "300")
GPU = ("--hardware", "single_gpu", "--gpu-memory-gb", "24")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of its own, and no hub: whoever asks it fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(knowledge, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr("rayfin.hub.ask", lambda _: pytest.fail("the hub was asked"))


def printed(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_published_models_have_the_parameters_of_their_pages() -> None:
    found = {key: published_model(f"{key[0]}-{key[1]}b") for key in _PUBLISHED}
    assert {key: it and it[0].parameters for key, it in found.items()} == PARAMETERS


@pytest.mark.parametrize(
    ("name", "layers", "said"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 32, "published for llama3.1"),
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", 28, "published for qwen2.5"),
        ("mistralai/Mistral-7B-Instruct-v0.3", 32, "published for mistral"),
        ("microsoft/phi-4", 40, "published for phi4"),
        ("microsoft/Phi-3-mini-4k-instruct", 32, "published for phi3"),
        ("NousResearch/Hermes-3-Llama-3.1-8B", 32, "guessed from llama3.1-8B"),
        ("Qwen/Qwen3-30B-A3B", 58, "taken to be dense"),
        ("microsoft/Phi-4-multimodal-instruct", 19, "5.6 billion parameters, and its shapes"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 25, "guessed from qwen2.5-7B"),
    ],
)
def test_a_name_tells_family_and_size(name: str, layers: int, said: str) -> None:
    found = published_model(name)
    assert found is not None
    assert found[0].num_layers == layers and said in found[1] and name in found[1]
    assert published_model("someone/mystery") is None


def test_a_size_alone_is_like_the_nearest_published_model() -> None:
    for size in (0.02, 0.5, 1, 8, 13, 70, 600):
        facts, _ = usual_model(size)
        assert facts.linear_parameters <= facts.parameters
        assert facts.parameters == pytest.approx(size * 1e9, rel=0.01) or size < 0.1
    for size in (0, -1, 1e5, float("nan")):
        with pytest.raises(ConfigError, match="in billions of parameters"):
            usual_model(size)


def test_a_size_is_answered_without_files_or_network(capfd: pytest.CaptureFixture[str]) -> None:
    answer = printed(capfd, "recommend", *SIZE, *GPU)
    first = answer["choices"][0]
    assert answer["source"] == "rules" and len(answer["notes"]) == 4
    assert answer["scenario"]["dataset_rows"] == 5000
    assert 1e-4 <= first["settings"]["train.learning_rate"] <= 5e-4
    assert first["feasibility"]["memory"] and first["config"]["data"]["max_length"] == 960
    assert (first["config"]["model"]["name"], first["config"]["data"]["path"]) == (
        "a model of 8B",
        "5000 rows",
    )
    assert main(["recommend", *SIZE, *GPU, "-k", "1", "train.num_train_epochs=3"]) == 0
    assert re.match(r"Train lora r=\d+, lr \S+, 3 epochs: ", capfd.readouterr().out)
    named = ("model.name=meta-llama/Llama-3.1-8B", *SIZE[2:])
    same = printed(capfd, "recommend", *named, *GPU)
    assert "published for llama3.1" in same["notes"][0]
    assert same["choices"][0]["settings"] == first["settings"]


def test_an_estimate_is_that_of_the_recommendation(capfd: pytest.CaptureFixture[str]) -> None:
    first = printed(capfd, "recommend", *SIZE, *GPU)["choices"][0]
    given = [f"{name}={value}" for name, value in first["settings"].items()]
    found = printed(capfd, "estimate", *SIZE, *GPU, *given)
    assert found["memory"] == first["predictions"]["memory_bytes"]
    assert found["seconds"] == first["predictions"]["train_seconds"]
    assert found["hardware"]["device"] == "cuda" and found["room"] == 24 * 2**30
    cut = ["--rows", "99", "--tokens-per-sample", "90"]  # at the same length, without being told
    whole = printed(capfd, "estimate", *cut, *GPU, "method.type=lora")
    same = printed(capfd, "estimate", *cut, *GPU, "method.type=lora", "data.max_length=320")
    assert (whole["memory"], whole["seconds"]) == (same["memory"], same["seconds"])


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"hardware": "cpu", "gpu_memory_gb": 24}, "hardware=cpu has no GPU, and gpu_memory_gb=24"),
        ({"hardware": "cpu", "num_gpus": 2}, "hardware=cpu has no GPU, and num_gpus=2"),
        ({"hardware": "single_gpu", "num_gpus": 2}, "use hardware=multi_gpu"),
        ({"hardware": "multi_gpu", "num_gpus": 1}, "use hardware=single_gpu"),
        ({"hardware": "single_gpu", "num_gpus": 0}, "use hardware=cpu"),
    ],
)
def test_gpus_that_the_hardware_does_not_have_are_refused(told: dict[str, Any], why: str) -> None:
    for ask in (rayfin.recommend, rayfin.estimate):
        with pytest.raises(ConfigError, match=re.escape(why)):
            ask(model_size_b=8, rows=100, tokens_per_sample=50, progress=False, **told)


def test_lengths_of_data_are_told_where_the_models_tokenizer_is_not_here(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """And `recommend` and `estimate` take them alike."""
    rows = [
        json.dumps({"prompt": f"{n:04} " + "word " * 19, "completion": "a"}) for n in range(2000)
    ]
    Path("my.jsonl").write_text("\n".join(rows))
    asked = ("model.name=Qwen/Qwen2.5-7B", "data.path=my.jsonl", *GPU)
    answer = printed(capfd, "recommend", *asked)
    assert any("57 tokens in the mean" in note for note in answer["notes"])
    choice = answer["choices"][0]
    assert choice["config"]["data"]["max_length"] == 64
    settings = [f"{name}={value}" for name, value in choice["settings"].items()]
    again = printed(capfd, "estimate", *asked, *settings)
    predicted = choice["predictions"]
    assert again["memory"]["expected"] == pytest.approx(predicted["memory_bytes"]["expected"])
    assert again["seconds"]["expected"] == pytest.approx(predicted["train_seconds"]["expected"])


def test_what_is_assumed_of_hardware_and_lengths_is_told(
    capfd: pytest.CaptureFixture[str],
) -> None:
    notes = printed(capfd, "recommend", *SIZE, "--hardware", "multi_gpu")["notes"]
    assert notes[2:-1] == [
        "2 GPUs are assumed; num_gpus says how many",
        "each GPU is taken to have 12 GiB; gpu_memory_gb says how many",
        "each GPU is taken to be as fast as NVIDIA's T4",
    ]
    assert notes[-1].startswith("3 epochs over ")
    rows = [json.dumps({"prompt": f"q {n}", "completion": "a"}) for n in range(20)]
    Path("my.jsonl").write_text("\n".join(rows))
    given = ("data.path=my.jsonl", "method.type=lora", "scaling.use_gpu=true", *GPU)
    assert main(["estimate", "model.name=Qwen/Qwen2.5-7B", *given]) == 0
    assert "95 % of them at most 19, by the bytes of their text" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="must be one of cpu, single_gpu, multi_gpu"):
        rayfin.estimate(hardware="gpu")  # type: ignore[arg-type]


def test_a_gpu_of_which_the_memory_is_told_is_as_fast_as_the_usual_one(
    capfd: pytest.CaptureFixture[str],
) -> None:
    took = [
        printed(capfd, "estimate", *SIZE, *GPU[:3], gib, "method.type=qlora")["seconds"]["expected"]
        for gib in ("12", "24", "40", "80")
    ]
    assert took == sorted(took, reverse=True) and took[0] > 2 * took[-1]


def test_a_directory_that_is_not_there_is_not_guessed_at(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["recommend", "model.name=./models/llama-3-8b", *SIZE[2:], *GPU]) == 2
    assert "there is no directory './models/llama-3-8b'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model.name=tiny", "--model-size-b", "8"), "stands in the place of model.name"),
        (("data.path=pydocs", "--rows", "9"), "stands in the place of data.path"),
        (("--tokens-per-sample", "90"), "needs rows"),
        (("--rows", "0"), "must be from 1 to"),
        (("--rows", "9", "--tokens-per-sample", "0.5"), "must be from 1 to"),
        (("--rows", "9", "--scaffold", "mine"), "name data.path"),
    ],
)
def test_what_is_told_twice_or_cannot_be_is_refused(
    arguments: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["recommend", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and said in err


def test_a_configuration_alone_is_enough_and_tells_the_family(tmp_path: Path) -> None:
    settings = dict(zip(_NAMES, _PUBLISHED["qwen2.5", 7], strict=True))
    folder = tmp_path / "my-llama-3-70b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    facts, note = description.Description().model(
        build_config({"model": {"name": str(folder)}}, {})
    )
    assert (facts.parameters, note) == (PARAMETERS["qwen2.5", 7], None)
    row = model_row(facts.identity, facts.as_dict())
    assert row["brand"] == model_row("Qwen/Qwen2.5-7B", {})["brand"]
    with pytest.raises(Exception, match=r"model\.safetensors"):
        describe_model(ModelConfig(name=str(folder)))  # to train needs weights


def test_a_model_of_the_hubs_cache_is_of_the_family_of_its_name() -> None:
    path = "/hub/models--meta-llama--Llama-3.1-8B/snapshots/d04e592bb4f6aa9cfee91e2e"
    facts = {"name": path, "identity": "local@0123456789abcdef", "architecture": "LlamaForCausalLM"}
    assert model_row("", facts)["generation"] == model_row("Llama-3.1-8B", {})["generation"]
