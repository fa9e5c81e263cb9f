"""Whose trials an answer rests on: models of about its size; a toy's on its own alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rayfin.advisor import Scenario, practice
from rayfin.advisor.answer import Recommendation
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.kernel import Hyperparameters
from rayfin.advisor.knowledge import Knowledge, reference_trials
from rayfin.advisor.model_sizes import FACTOR, LEAST_PARAMETERS, is_comparable, is_toy
from rayfin.advisor.quality_model import QualityModel, model_size
from rayfin.advisor.recommendation import ScenarioFacts, recommend
from rayfin.advisor.sweep_advisor import SweepAdvisor
from rayfin.advisor.trial_table import TrialTable
from rayfin.hardware import Hardware
from rayfin.history import SERVING, TrialRecord
from rayfin.history.csv_table import read_csv
from rayfin.models import ModelFacts
from rayfin.models.sizes import sizes_of

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CPU = Hardware("cpu", "x86_64", 0, 64 * 2**30, 8, 64 * 2**30, True)
GPU = Hardware("cuda", "NVIDIA H100", 1, 80 * 2**30, 16, 256 * 2**30, True)
SHAPES = {  # width, feed-forward width, layers, heads, key-value heads, vocabulary
    "llama-3.2-1.5b": (2048, 8192, 18, 32, 8, 128256),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "tiny": (64, 128, 2, 4, 2, 260),
}
LARGE = ("llama-3.2-1.5b", "llama-3.1-8b", "llama-3.1-70b")


def facts_of(name: str) -> ModelFacts:
    width, inner, layers, heads, groups, vocabulary = SHAPES[name]
    sizes = sizes_of(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "vocab_size": vocabulary,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": width < 4096,
            "torch_dtype": "bfloat16",
        }
    )
    assert sizes is not None
    return ModelFacts(name=name, identity=f"{name}@1", **vars(sizes))


def place(name: str, hardware: Hardware = GPU, source: str = "mine", **known: Any) -> ScenarioFacts:
    facts = facts_of(name)
    scenario = Scenario(
        hardware="cpu" if hardware is CPU else "single_gpu",
        data_scale="small",
        latency="normal",
        model_name=name,
        model_size_b=facts.parameters / 1e9,
        dataset_rows=1000,
        gpu_memory_gb=None if hardware is CPU else hardware.device_memory / 2**30,
        **known,
    )
    profile = {"rows_train": 1000, "digest": "d", "source": source}
    return ScenarioFacts(scenario, facts, hardware, profile)


def tiny_trials(best: float = 1e-2) -> list[TrialRecord]:
    """Of the built-in model, on the task of `place`, as a history holds them."""
    found = []
    for rate, rank in itertools.product((1e-4, 1e-3, 3e-3, 1e-2, 3e-2), (4, 16, 64)):
        facts = facts_of("tiny")
        spec = {
            "model": {"name": "tiny"},
            "data": {"path": "mine.jsonl"},
            "method": {"type": "lora", "r": rank, "lora_alpha": 32.0},
            "train": {"learning_rate": rate, "max_steps": 60},
        }
        scenario = {
            "model": facts.as_dict() | {"identity": "tiny@1"},
            "data": {"rows_train": 1000, "digest": "d", "source": "mine"},
            "hardware": GPU.as_dict(),
        }
        metrics = {"eval_loss": 5.0 + abs(math.log10(rate / best)), "steps": 60}
        served = {f"{SERVING}time_to_first_token_seconds": 0.9}
        found.append(
            TrialRecord(
                trial_id=f"tiny-{rate:g}-{rank}", sweep_id="s", fingerprint="f", status="finished",
                created_at=AT, updated_at=AT, spec=spec, scenario=scenario,
                metrics=metrics | served | {"train_seconds": 900.0},
            )
        )  # fmt: skip
    return found


def public_trials(folder: Path) -> list[TrialRecord]:
    """A table like the sweeps that people publish: models from 4 to 235 billion parameters."""
    models = {
        "Qwen/Qwen3-4B": 1e-3,
        "Qwen/Qwen3-8B": 1e-3,
        "meta-llama/Llama-3.1-8B-Instruct": 3e-4,
        "Qwen/Qwen3.5-27B": 3e-4,
        "meta-llama/Llama-3.1-70B": 3e-4,
        "Qwen/Qwen3-235B-A22B": 3e-4,
    }
    lines = ["model,learning_rate,lora_rank,test_nll,diverged"]
    for (model, best), rate, rank in itertools.product(
        models.items(), (4e-5, 1e-4, 3e-4, 1e-3, 3e-3), (1, 8, 32, 128)
    ):
        diverged = rate > 1e-3 or (rate > best and "70B" in model)
        nll = 0.5 + 0.03 * math.log10(rate / best) ** 2 - 0.002 * math.log2(rank)
        lines.append(f"{model},{rate:g},{rank},{'' if diverged else nll:.5},{int(diverged)}")
    path = folder / "public.csv"
    path.write_text("\n".join(lines))
    records = [record for record in read_csv(path, AT) if isinstance(record, TrialRecord)]
    assert len(records) == len(lines) - 1
    return [record.updated(spec=record.spec | {"data": {"path": "public"}}) for record in records]


# --- the fit ------------------------------------------------------------------------------------


def small_models() -> list[TrialRecord]:
    """Two small models that agree on everything: nothing tells that their size matters."""
    found = []
    for name, size in (("smollm2-135m", 135e6), ("smollm2-360m", 360e6)):
        for row in tiny_trials(best=3e-3):
            model = {"name": name, "identity": f"{name}@1", "parameters": size, "hidden_size": 700}
            found.append(
                row.updated(
                    trial_id=f"{name}-{row.trial_id}",
                    spec=row.spec | {"model": {"name": name}},
                    scenario=row.scenario | {"model": model},
                )
            )
    return found


def test_two_small_models_do_not_teach_that_size_does_not_matter() -> None:
    learned = QualityModel.of(TrialTable.of(small_models())).parameters
    expected = Hyperparameters.expected(COLUMNS)
    for name in (*(f"amplitude.{term}" for term in COLUMNS.terms), "amplitude.common"):
        assert learned.values[name] >= expected.values[name] - 1e-12, name
    assert learned.values != expected.values  # something was learned


def test_the_reference_as_it_comes_was_learned_with_the_same_floor() -> None:
    parameters = Knowledge.of([]).quality_model.parameters
    expected = Hyperparameters.expected(COLUMNS)
    for term in COLUMNS.terms:
        assert parameters.values[f"amplitude.{term}"] >= expected.values[f"amplitude.{term}"] - 1e-9


def test_toys_do_not_take_part_in_the_fit() -> None:
    alone = QualityModel.of(TrialTable.of(small_models())).parameters
    beside = QualityModel.of(TrialTable.of(small_models() + tiny_trials())).parameters
    assert beside.values == alone.values
    only = QualityModel.of(TrialTable.of(tiny_trials())).parameters
    assert only.values == Hyperparameters.expected(COLUMNS).values


# --- whose trials count -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "within"),
    [(8e9, 8e9, True), (8e9, 1.7e9, True), (8e9, 39e9, True), (8e9, 1.5e9, False),
     (8e9, 70e9, False), (math.nan, 8e9, False), (8e9, math.nan, False)],
)  # fmt: skip
def test_reach_is_a_factor_of_size(one: float, other: float, within: bool) -> None:
    assert is_comparable(one, other) is is_comparable(other, one) is within


def test_the_smallest_models_that_people_adapt_are_no_toys() -> None:
    assert is_toy(facts_of("tiny").parameters) and not is_toy(14e6) and not is_toy(math.nan)


def history(which: str, folder: Path) -> list[TrialRecord]:
    named = folder / "named.csv"  # a table names the model, and nothing else tells its size
    named.write_text("model,learning_rate,lora_rank,eval_loss\ntiny,0.03,8,1.0\ntiny,0.001,8,2.0\n")
    table = [row for row in read_csv(named, AT) if isinstance(row, TrialRecord)]
    return {
        "reference": [],
        "tiny": tiny_trials() + table,
        "public": public_trials(folder),
        "all": tiny_trials() + table + public_trials(folder),
    }[which]


@pytest.mark.parametrize("which", ["reference", "tiny", "public", "all"])
@pytest.mark.parametrize("source", ["mine", "public"])
def test_large_models_get_about_practices_rate(which: str, source: str, tmp_path: Path) -> None:
    """Whatever small models say, and on the task of the published table as on another."""
    knowledge = Knowledge.of(history(which, tmp_path))
    for name in LARGE:
        answer = recommend(place(name, source=source), knowledge)
        assert len(answer.choices) == 3
        for choice in answer.choices:
            usual = practice.learning_rate(choice.method, facts_of(name).parameters / 1e9)
            rate = choice.config["train"]["learning_rate"]
            # What covers for the first one may lie as far from practice as practice's sources do.
            first = choice.rank == 1 or answer.source == "rules"
            factor = 3 if first else practice.learning_rate_spread(choice.method)
            assert usual / factor <= rate <= usual * factor, (name, choice.rank)
        assert answer.choices[0].method in ("lora", "qlora")
        assert_honest(answer, knowledge, facts_of(name).parameters)
        if which in ("reference", "tiny"):
            assert answer.source == "rules"


def test_an_answer_says_how_far_the_nearest_trials_are() -> None:
    """Beside trials of small models alone, without the public ones that come with rayfin."""
    small = Knowledge.of(reference_trials(public=False), reference=False)
    for name in LARGE:
        answer = recommend(place(name), small)
        assert answer.source == "rules"
        assert "the nearest, smollm2-135m on " in answer.explanation
        assert "times smaller" in answer.explanation


def assert_honest(answer: Recommendation, knowledge: Knowledge, parameters: float) -> None:
    """What an answer names is of about its size; and where it names nothing, it claims nothing."""
    sizes = {
        knowledge.ids[place]: model_size(group)
        for group in knowledge.quality_model.groups.values()
        for place in group.first
    }
    for choice in answer.choices:
        assert bool(choice.trials) == (answer.source == "learned")
        assert (choice.predictions.divergence is None) == (answer.source == "rules")
        for basis in choice.trials:
            assert is_comparable(sizes[basis.trial_id], parameters), basis


def test_the_task_and_size_of_a_published_table_are_learned_from_it(tmp_path: Path) -> None:
    knowledge = Knowledge.of(history("all", tmp_path), reference=False)
    answer = recommend(place("llama-3.1-8b", source="public"), knowledge)
    assert answer.source == "learned"
    assert "settings tried with 4 models of about this size" in answer.explanation


def without_ids(answer: Recommendation) -> dict[str, Any]:
    return answer.model_dump(exclude={"trials", "explanation"})


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-8b"])
@pytest.mark.parametrize("which", ["tiny", "all"])
def test_a_toys_trials_change_nobody_elses_answer(name: str, which: str, tmp_path: Path) -> None:
    """Neither what is chosen nor what it is said to take, to do or to answer in."""
    more = history(which, tmp_path)
    tinies = [row for row in more if row.spec["model"]["name"] == "tiny"]
    others = [row for row in more if row not in tinies]
    assert len(tinies) == 17
    with_toys, without = Knowledge.of(more), Knowledge.of(others)
    for hardware in (CPU, GPU):
        where = place(name, hardware)
        assert without_ids(recommend(where, with_toys)) == without_ids(recommend(where, without))


def test_a_toy_is_led_by_its_own_trials() -> None:
    answer = recommend(place("tiny", CPU), Knowledge.of(tiny_trials(best=1e-2), reference=False))
    assert answer.source == "learned"
    assert 3e-3 <= answer.choices[0].config["train"]["learning_rate"] <= 3e-2
    assert all(basis.trial_id.startswith("tiny-") for basis in answer.choices[0].trials)
    other = replace(place("tiny", CPU), facts=replace(facts_of("tiny"), name="toy", identity="t"))
    assert recommend(other, Knowledge.of(tiny_trials(), reference=False)).source == "rules"


def test_a_small_model_is_led_by_the_reference() -> None:
    answer = recommend(place("smollm2-135m", CPU), Knowledge.of([]))
    assert answer.source == "learned"
    trials = {row.trial_id: row for row in reference_trials()}
    for choice in answer.choices:
        for basis in choice.trials:
            assert trials[basis.trial_id].spec["model"]["name"] == "smollm2-135m"


def test_a_sweep_of_another_model_is_not_led_by_a_toy() -> None:
    for name, count in (("llama-3.1-8b", 0), ("tiny", 15)):
        where = place(name).columns()
        knowledge = Knowledge.of(tiny_trials(), reference=False)
        advisor = SweepAdvisor(knowledge, where, "eval_loss")
        assert len(advisor._past.observations) == count


def test_models_of_unknown_size_speak_for_their_family_alone() -> None:
    rows: Sequence[TrialRecord] = [
        row.updated(spec=row.spec | {"model": {"name": "atlas-v2"}}, scenario={})
        for row in tiny_trials()
    ]
    quality_model = QualityModel.of(TrialTable.of(rows))
    facts = facts_of("llama-3.1-8b")
    for name, counts in (("atlas-v2-chat", True), ("llama-3.1-8b", False)):
        here = replace(place("llama-3.1-8b"), facts=replace(facts, name=name)).columns()
        assert bool(len(quality_model.posterior(here).process.observations)) is counts


def test_what_is_documented_is_what_holds() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recommend.md").read_text(encoding="utf-8")
    assert f"factor of {FACTOR:g}" in text
    assert f"{LEAST_PARAMETERS / 1e6:g} million parameters" in text
