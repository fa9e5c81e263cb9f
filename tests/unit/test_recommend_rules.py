"""The rules' table, to the letter, and what a scenario finds out by itself."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rayfin.advisor import RULES, Scenario, recommend_text, rule_for
from rayfin.advisor import scenario as scenarios
from rayfin.cli import main
from rayfin.config.data import DataConfig
from rayfin.config.schema import ModelConfig
from rayfin.errors import ConfigError
from rayfin.hardware import Hardware

CPU = "推荐 LoRA 或 P-Tuning，优先选择轻量模型并结合量化部署。"
ONE_LARGE = "推荐 QLoRA，利用 4bit 加载与梯度检查点应对大规模数据。"
ONE_SMALL = "LoRA 即可满足需求，结合梯度累积提升吞吐。"
MANY_STRICT = "QLoRA + 分布式推理，或蒸馏后上线轻量模型。"
MANY_NORMAL = "LoRA/QLoRA 均可，根据数据规模选择是否量化。"
INCOMPLETE = "请提供完整场景信息。"
ENGLISH = {
    CPU: "LoRA or P-Tuning; prefer a small model, and quantise it for deployment.",
    ONE_LARGE: "QLoRA: a base model in 4 bits and gradient checkpointing make room for large data.",
    ONE_SMALL: "LoRA is enough; gradient accumulation raises the throughput.",
    MANY_STRICT: "QLoRA with distributed inference, or a small model distilled from it.",
    MANY_NORMAL: "LoRA or QLoRA; let the size of the data decide whether to quantise.",
    INCOMPLETE: "Please describe the scenario in full.",
}
SENTENCES = {
    **{("cpu", data, latency): CPU for data, latency in product("sml", "sn")},
    **{("single_gpu", data, latency): ONE_SMALL for data, latency in product("sm", "sn")},
    **{("single_gpu", "l", latency): ONE_LARGE for latency in "sn"},
    **{("multi_gpu", data, "s"): MANY_STRICT for data in "sml"},
    **{("multi_gpu", data, "n"): MANY_NORMAL for data in "sml"},
}
LONG = {"s": "small", "m": "medium", "l": "large"}


def test_there_are_18_combinations() -> None:
    assert len(SENTENCES) == 18


@pytest.mark.parametrize(("hardware", "data", "latency"), SENTENCES)
def test_each_has_its_sentence_in_both_languages(hardware: str, data: str, latency: str) -> None:
    scenario = Scenario(hardware, LONG[data], {"s": "strict", "n": "normal"}[latency], "anything")
    sentence = SENTENCES[hardware, data, latency]
    assert recommend_text(scenario) == recommend_text(scenario, lang="zh") == sentence
    assert recommend_text(scenario, lang="en") == ENGLISH[sentence]


HARDWARE = {
    "cpu": ("--hardware", "cpu"),
    "single_gpu": ("--hardware", "single_gpu", "--gpu-memory-gb", "24"),
    "multi_gpu": ("--hardware", "multi_gpu", "--num-gpus", "2", "--gpu-memory-gb", "24"),
}
ROWS = {"s": "2000", "m": "50000", "l": "500000"}


@pytest.mark.parametrize(("hardware", "data", "latency"), SENTENCES)
def test_the_command_says_each_sentence_to_the_letter(
    capfd: pytest.CaptureFixture[str], hardware: str, data: str, latency: str
) -> None:
    """In both languages; all figures of the Chinese answer are the English one's."""
    asked = ["recommend", "--model-size-b", "0.5", "--rows", ROWS[data], "--tokens-per-sample"]
    asked += ["100", *HARDWARE[hardware], "-k", "2", "method.type=lora", "--why"]
    asked += ["--latency", "strict"] if latency == "s" else []
    said = {}
    for lang in ("zh", "en"):
        assert main([*asked, "--lang", lang]) == 0
        said[lang] = capfd.readouterr().out
    sentence = SENTENCES[hardware, data, latency]
    assert f"规则建议：{sentence}" in said["zh"].replace("\n", "")
    assert f"The rules say: {ENGLISH[sentence]}" in said["en"].replace("\n", " ")
    zh, en = (sorted(re.findall(r"\d+(?:[.,]\d+)*", said[lang])) for lang in ("zh", "en"))
    assert zh == en


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(),
        Scenario(hardware="", data_scale="", latency="", description=""),
        Scenario(hardware="tpu", data_scale="small", latency="normal"),
        Scenario(hardware="single_gpu", latency="strict"),
        Scenario(hardware="single_gpu", data_scale="huge", latency="strict"),
        Scenario(hardware="multi_gpu", data_scale="small"),
        Scenario(hardware="multi_gpu", data_scale="small", latency="soon"),
    ],
)
def test_an_incomplete_one_is_asked_for_more(scenario: Scenario) -> None:
    assert recommend_text(scenario) == INCOMPLETE
    assert recommend_text(scenario, lang="en") == ENGLISH[INCOMPLETE]
    assert rule_for(scenario).methods == ()


def test_a_language_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="lang='fr' must be zh or en"):
        recommend_text(Scenario(), lang="fr")  # type: ignore[arg-type]


def test_methods_are_those_that_can_be_trained() -> None:
    from rayfin.methods import METHODS

    assert {method for rule in RULES for method in rule.methods} <= METHODS.keys()
    for rule in RULES[:-1]:
        assert rule.methods and rule.reason and rule.risk and rule.deployment


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model_size_b": -7}, "model_size_b=-7"),
        ({"budget_hours": float("nan")}, "budget_hours=nan"),
        ({"latency_target_ms": 0}, "latency_target_ms=0"),
        ({"dataset_rows": float("inf")}, "dataset_rows=inf"),
        ({"num_gpus": -1}, "num_gpus=-1"),
        ({"priority": "fame"}, "priority='fame' must be one of quality, cost, latency"),
    ],
)
def test_absurd_facts_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Scenario(**wrong)


@pytest.mark.parametrize(
    ("rows", "scale"),
    [(1, "small"), (4_999, "small"), (5_000, "medium"), (99_999, "medium"), (100_000, "large")],
)
def test_the_scale_of_data(rows: int, scale: str) -> None:
    assert scenarios.data_scale(rows) == scale


def test_what_machine_model_and_data_tell(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n}?", "completion": "{n}"}}\n' for n in range(50)))
    found = Scenario.detect(
        ModelConfig(name="tiny"),
        DataConfig(path=str(rows), max_length=64, val_size=0.2),
        use_gpu=False,
        budget_hours=2.0,
    )
    assert (found.hardware, found.num_gpus, found.gpu_memory_gb) == ("cpu", 0, None)
    assert (found.data_scale, found.dataset_rows, found.sequence_length) == ("small", 40, 64)
    assert found.model_name == "tiny" and 0 < (found.model_size_b or 0) < 0.001
    assert (found.latency, found.budget_hours) == ("normal", 2.0)
    assert recommend_text(found) == CPU


def test_what_is_known_goes_before_what_is_found() -> None:
    found = Scenario.detect(
        ModelConfig(name="tiny"),
        hardware="multi_gpu",
        model_size_b=70.0,
        dataset_rows=2_000_000,
        latency_target_ms=200.0,
    )
    assert (found.hardware, found.model_size_b, found.data_scale) == ("multi_gpu", 70.0, "large")
    assert found.latency == "strict"
    assert recommend_text(found) == MANY_STRICT
    with pytest.raises(ConfigError, match="a scenario has no 'gpus'"):
        Scenario.detect(gpus=4)


@pytest.mark.parametrize(
    ("known", "memory"),
    [
        ({}, 24.0),
        ({"hardware": "single_gpu"}, 24.0),
        ({"hardware": "multi_gpu", "gpu_memory_gb": 80.0}, 80.0),
        ({"hardware": "cpu"}, None),
    ],
)
def test_the_memory_of_this_machines_gpu_is_found(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, Any], memory: float | None
) -> None:
    machine = Hardware("cuda", "NVIDIA A10", 1, 24 * 2**30, 8, 2**36, True)
    cpu = replace(machine, device="cpu", device_count=0)
    monkeypatch.setattr(scenarios, "describe_hardware", lambda use_gpu: machine if use_gpu else cpu)
    assert Scenario.detect(**known).gpu_memory_gb == memory


def test_a_gpu_that_is_not_here_may_be_described() -> None:
    found = Scenario.detect(use_gpu=True, hardware="multi_gpu", num_gpus=8)
    assert (found.hardware, found.num_gpus) == ("multi_gpu", 8)
