"""A registered method lacks nothing anywhere; and a new one takes one file."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import create_model

from rayfin import methods
from rayfin.advisor import Scenario
from rayfin.advisor.candidates import ScenarioFacts, candidates
from rayfin.advisor.chart_marks import MARKS, mark_number
from rayfin.advisor.features import setting_row
from rayfin.advisor.memory import memory_of
from rayfin.advisor.practice import learning_rate
from rayfin.cli.completion import SettingsCompleter
from rayfin.cli.settings import settings_lines
from rayfin.config import Config, ModelConfig, build_config, dump_yaml, load_config, parse_yaml
from rayfin.errors import ConfigError
from rayfin.hardware import describe_hardware
from rayfin.history.imported import method_name
from rayfin.methods import METHODS, MethodConfig, register
from rayfin.methods.attach import attach
from rayfin.methods.initialization import explain_variance
from rayfin.models import base_of, describe_model, load_base
from rayfin.objectives.tensors import adapter_disabled
from rayfin.paths import StoragePath
from rayfin.serving.engine.adapter import _READERS, BaseLayout, read_adapter
from rayfin.serving.engine.request import AdapterSource
from rayfin.training import TrialSpec
from rayfin.training.combination import check_combination
from rayfin.training.trial import run_trial
from rayfin.training.trial_cache import TrialCache
from rayfin.tuning.space import SearchSpace

TINY = ModelConfig(name="tiny")
GUIDE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def lacks(name: str) -> Iterator[str]:
    """What the method `name` lacks, in words."""
    method = METHODS[name]
    if not method.rate.source or not 1e-6 < method.rate.at() < 1:
        yield "a starting rate with its source"
    if method.rate.of_lora != all(number < 1.5 for number in method.coordinates):
        yield "coordinates below 1.5 exactly if its rate is a share of LoRA's"
    beside = [other for other in METHODS.values() if other.coordinates == method.coordinates]
    if len(beside) > 1:
        yield "coordinates of its own"
    if method.order >= len(MARKS) or [mark_number(n) for n in METHODS].count(mark_number(name)) > 1:
        yield "a colour and mark of its own"
    if not method.changes_base and not re.search(r"\(.* \d{4}, arXiv", method.__doc__ or ""):
        yield "a docstring with its paper"
    for hook in ("trained_parameters", "peft_config"):
        if getattr(method, hook) is getattr(MethodConfig, hook):
            yield f"a {hook}() of its own"
    fields = set(method.model_fields)
    capacity = [] if method.capacity is None else [method.capacity]
    named = [*capacity, *method.module_settings, *method.synonyms]
    for setting in {*named, *method.usual(8, 256), *method.of_capacity(4)} - fields:
        yield f"the setting {setting}, which it speaks of"
    for setting, field in method.model_fields.items():
        if not field.description and setting != "type":
            yield f"a description of {setting}"
    usual = {f"method.{setting}": value for setting, value in method.usual(8, 256).items()}
    check_combination(build_config({"method": {"type": name}}, usual))
    if (row := documented().get(name)) != facts(method):
        yield f"a true row in docs/methods.md: {row} is not {facts(method)}"
    if not method.changes_base:
        peft = method(type=name).peft_config(20, "").peft_type.value  # type: ignore[union-attr]
        if ("transformers" in method.engines) != (peft in _READERS):
            yield f"a reader of {peft} in serving/engine/adapter.py, or engines that lack it"


def documented() -> dict[str, list[str]]:
    """The table's rows by the method's name."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", GUIDE, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def facts(method: type[MethodConfig]) -> list[str]:
    """A method's row in the guide, but for its name."""
    supports = ("quantized_base", "packing", "gradient_checkpointing", "merging")
    words = ["yes" if getattr(method, name) else "no" for name in supports]
    return [method.title, method.trains, *words, ", ".join(method.engines) or "after merging"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_lacks_nothing(name: str) -> None:
    assert list(lacks(name)) == []


def test_foreign_names_are_one_methods_each() -> None:
    names = Counter(chain(METHODS, *(method.aliases for method in METHODS.values())))
    assert {name for name, count in names.items() if count > 1} == set()
    assert all(name == re.sub(r"[^a-z0-9]+", "_", name.lower()) for name in names)


def test_the_guide_has_no_other_methods() -> None:
    assert list(documented()) == list(METHODS)


# --- a method that a test makes up --------------------------------------------------------

HALVED = '''
"""LoRA with half the scale."""

from typing import Literal

from rayfin.methods.base import register
from rayfin.methods.low_rank import LowRankConfig
from rayfin.methods.rates import Rate


@register
class HalvedConfig(LowRankConfig):
    """LoRA with half the scale (Nobody et al. 2030, arXiv:3001.00001)."""

    title = "halved LoRA"
    order = 19
    engines = ("transformers",)
    rate = Rate(value=2.0, of_lora=True, source="made up")
    coordinates = (0.1, 0.3)
    aliases = ("half_lora",)

    type: Literal["halved"]

    def peft_config(self, max_steps, tokenizer_path):
        config = super().peft_config(max_steps, tokenizer_path)
        config.lora_alpha /= 2
        return config
'''


@pytest.fixture
def halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file more in rayfin/methods, and nothing else."""
    (tmp_path / "halved.py").write_text(HALVED)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    methods.load_all()
    yield "halved"
    METHODS.pop("halved")
    del sys.modules["rayfin.methods.halved"]


def test_a_file_makes_a_method_that_is_configured_completed_and_advised(halved: str) -> None:
    assert list(METHODS)[-1] == halved
    config = load_config(None, ["method.type=halved", "method.r=4"])
    assert config.method.model_dump()["r"] == 4
    assert load_config(parse_yaml(dump_yaml(config), "saved")) == config
    with pytest.raises(ConfigError, match=r"allowed: full, .*, halved .did you mean 'halved'"):
        load_config(None, ["method.type=halve"])
    with pytest.raises(ConfigError, match=r"method.rr: unknown key .did you mean 'method.r'"):
        load_config(None, ["method.type=halved", "method.rr=4"])
    assert "  halved         LoRA with half the scale" in "\n".join(settings_lines())
    assert "method.type=halved" in SettingsCompleter("experiment")("method.type=h")
    assert method_name("Half-LoRA") == halved
    swept = {"method.type": ["lora", "halved"], "method.r": [4, 8]}
    assert SearchSpace(build_config({"sweep": {"parameters": swept}}, {})).size == 4

    row = setting_row(config.model_dump(mode="json"))
    assert row is not None and (row["method_x"], row["method_y"]) == (0.1, 0.3)
    assert row["learning_rate"] == pytest.approx(math.log10(2e-4 / learning_rate(halved)))
    place = ScenarioFacts(
        Scenario(hardware="cpu", data_scale="small", latency="normal"),
        describe_model(TINY),
        describe_hardware(use_gpu=False),
    )
    found = [it for it in candidates(Config(), place) if it.method == halved]
    assert {it.config.method.rank for it in found} == {8, 16, 64}
    assert memory_of(config, place.facts, device="cpu").adapter > 0


def test_a_file_makes_a_method_that_is_trained_counted_saved_and_served(
    halved: str, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {n}", "completion": f"{n % 3}"} for n in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data.path": str(data), "data.max_length": 32, "train.learning_rate": 1e-2}
    settings |= {"model.name": "tiny", "train.max_steps": 6, "method.r": 4}
    config = build_config({"method": {"type": halved}}, settings)
    storage = StoragePath(tmp_path / "trial")
    result = run_trial(TrialSpec.of(config), lambda _: None, location=storage, warm=TrialCache())
    assert (result.status, result.error) == ("finished", None)
    metrics = result.metrics
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    facts = describe_model(TINY)
    assert metrics["trainable_parameters"] == config.method.trained_parameters(facts)
    assert result.adapter is not None
    saved = json.loads((result.adapter.path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"]) == ("LORA", 4, 8)
    layout = BaseLayout.of(load_base(TINY, None, "cpu"), base_of(TINY))
    assert read_adapter(AdapterSource("mine@1", result.adapter.path), layout).rank == 4


def test_a_method_that_lacks_a_fact_is_not_registered(halved: str) -> None:
    before = list(METHODS)

    class Untitled(MethodConfig):
        type: Literal["untitled"]

    with pytest.raises(TypeError, match=r"untitled lacks coordinates, engines, .*, title, trains"):
        register(Untitled)
    for taken in ("halved", "other"):
        with pytest.raises(TypeError, match=rf"{taken} .* of halved, which is registered"):
            register(create_model("Other", __base__=METHODS[halved], type=(Literal[taken], ...)))  # type: ignore[call-overload]
    assert list(METHODS) == before


def test_what_a_method_has_frozen_of_an_adapter_stays_frozen() -> None:
    """PEFT would let all of it train once it is on again."""
    lora = build_config({"method": {"type": "lora", "r": 2}}, {}).method
    model = attach(load_base(TINY, None, "cpu"), lora, 1, "")
    matrices = {name: it for name, it in model.named_parameters() if ".lora_" in name}
    for name, parameter in matrices.items():
        parameter.requires_grad_(".lora_A." not in name)
    ids = torch.arange(8)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with adapter_disabled(model):
        pass
    explain_variance(model, 2, lambda _: repeat(batch))
    assert {n for n, it in matrices.items() if it.requires_grad} == {
        n for n in matrices if ".lora_B." in n
    }
