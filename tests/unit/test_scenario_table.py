"""What is recommended in the scenarios of docs/recommendations.md, as its reader relies on it.

A part of the scenarios is asked in every run of the tests, and all of them with --long.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rayfin.advisor import practice
from rayfin.advisor.answer import Choice, Recommendation
from rayfin.advisor.knowledge import Knowledge
from rayfin.advisor.recommendation import recommend
from rayfin.advisor.scaffold import scaffold
from rayfin.config import ModelConfig, build_config, load_config
from rayfin.config.load import load_serve_config

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
RESERVED = 1 * GIB
"""What the context of a GPU takes of its memory, and no training can use."""
MOST_EPOCHS = 15
"""LIMA's (arXiv:2305.11206)."""
LOW_RANK = ("lora", "qlora", "dora", "rslora")


def script() -> ModuleType:
    path = ROOT / "experiments" / "recommendations_table.py"
    spec = importlib.util.spec_from_file_location("recommendations_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TABLE = script()
ALL = list(TABLE.cases())
SOME = [
    case
    for case in ALL
    if case.model in (1.5, 8.0, "config.json of Llama-3.1-8B")
    and (case.model == 8.0 or case.priority is None)
]


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return Knowledge.of([])


@pytest.fixture(
    scope="module",
    params=[pytest.param("some"), pytest.param("all", marks=[pytest.mark.long])],
)
def answers(
    request: pytest.FixtureRequest, knowledge: Knowledge
) -> list[tuple[Any, Recommendation]]:
    asked = SOME if request.param == "some" else ALL
    return list(TABLE.answers(knowledge, asked))


def every_choice(answers: list[tuple[Any, Recommendation]]) -> list[tuple[Any, Choice]]:
    return [(case, choice) for case, answer in answers for choice in answer.choices]


def test_the_table_covers_what_it_should() -> None:
    assert len({case.title for case in ALL}) == len(ALL) >= 60
    sizes = {case.model for case in ALL if isinstance(case.model, float)}
    assert min(sizes) == 0.5 and max(sizes) == 70
    assert {case.gib for case in ALL if case.gpus} == {12, 24, 40, 80}
    assert {case.gpus for case in ALL} == {0, 1, 2, 8}
    assert {1_000, 200_000} <= {case.rows for case in ALL}
    assert {"quality", "cost", "latency"} <= {case.priority for case in ALL}


def test_all_that_is_recommended_fits_with_a_margin(
    answers: list[tuple[Any, Recommendation]],
) -> None:
    for case, choice in every_choice(answers):
        workers = choice.config["scaling"]["num_workers"]
        room = case.gib * GIB - RESERVED if case.gpus else case.gib * GIB / workers
        memory = choice.predictions.memory_bytes
        assert memory.expected < memory.high <= room, case.title
        assert choice.feasibility.memory is True, case.title


def test_where_nothing_fits_what_would_is_said(
    answers: list[tuple[Any, Recommendation]],
) -> None:
    for case, answer in answers:
        assert (answer.nothing_fits is None) == bool(answer.choices), case.title
        if answer.nothing_fits is not None:
            assert "what would: " in answer.nothing_fits, case.title


def test_rates_are_within_the_range_of_their_sources(
    answers: list[tuple[Any, Recommendation]],
) -> None:
    for case, choice in every_choice(answers):
        size = float(str(case.model).removesuffix("B")) if isinstance(case.model, float) else None
        usual = practice.learning_rate(choice.method, size)
        spread = practice.learning_rate_spread(choice.method)
        rate = choice.config["train"]["learning_rate"]
        assert usual / spread <= rate <= usual * spread, (case.title, choice.method)


def test_more_memory_never_makes_an_answer_worse(
    answers: list[tuple[Any, Recommendation]],
) -> None:
    found: dict[Any, dict[int, Recommendation]] = {}
    for case, answer in answers:
        if case.gpus:
            found.setdefault(TABLE.replace(case, gib=0), {})[case.gib] = answer
    for case, by_memory in found.items():
        ordered = [by_memory[gib] for gib in sorted(by_memory)]
        for smaller, larger in itertools.pairwise(ordered):
            if not smaller.choices:
                continue
            assert larger.choices, case.title
            less, more = smaller.choices[0], larger.choices[0]
            assert bits(less) <= bits(more), case.title
            took, takes = (one.predictions.train_seconds.expected for one in (less, more))
            # Weights of 16 bits may be larger by a batch that is half as large.
            assert takes <= 1.05 * took, case.title
            assert less.config["method"].get("r", 0) <= more.config["method"].get("r", 0) or (
                less.method != more.method
            ), case.title


def bits(choice: Choice) -> int:
    return choice.config["method"].get("quantization_bit") or 16


def test_steps_are_of_the_batch_the_rows_and_the_budget(
    answers: list[tuple[Any, Recommendation]],
) -> None:
    for case, choice in every_choice(answers):
        train = choice.config["train"]
        step = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
        assert step % choice.config["scaling"]["num_workers"] == 0, case.title
        passes = choice.predictions.steps * step / case.rows
        assert 0 < passes <= MOST_EPOCHS, (case.title, passes)
        if train["num_train_epochs"] is not None:  # the steps are those of the epochs
            assert passes == pytest.approx(train["num_train_epochs"], rel=0.02), case.title
            assert passes >= 1, case.title
        else:  # fewer than an epoch, where no more end in time
            assert case.budget_hours is not None, case.title
        if case.budget_hours is not None:
            assert choice.predictions.train_seconds.low <= 3600 * case.budget_hours, case.title


def test_a_low_rank_adapter_comes_first_where_nobody_waits(
    answers: list[tuple[Any, Recommendation]],
) -> None:
    for case, answer in answers:
        waits = "strict" in (case.latency, answer.scenario["latency"])
        if answer.choices and not waits and case.priority != "latency":
            assert answer.choices[0].method in LOW_RANK, case.title


def test_a_wish_changes_the_choices_or_it_is_said_why_not(
    answers: list[tuple[Any, Recommendation]],
) -> None:
    wishes = {"latency": None, "latency_target_ms": None, "budget_hours": None, "priority": None}
    found = dict(answers)
    for case, answer in answers:
        plain = TABLE.replace(case, **wishes)
        if case == plain or case.priority == "quality":  # quality is what nobody has to ask for
            continue
        before = found[plain]
        changed = [one.settings for one in answer.choices] != [
            one.settings for one in before.choices
        ]
        assert changed or set(answer.notes) - set(before.notes), case.title


def test_nobody_rests_on_the_tiny_model(answers: list[tuple[Any, Recommendation]]) -> None:
    for case, answer in answers:
        told = [trial.summary for choice in answer.choices for trial in choice.trials]
        assert not any("tiny" in text for text in (*told, answer.explanation)), case.title


def test_what_is_learned_rests_on_trials(answers: list[tuple[Any, Recommendation]]) -> None:
    for case, answer in answers:
        for choice in answer.choices:
            assert bool(choice.trials) == (answer.source == "learned"), case.title


def test_the_files_of_every_answer_can_be_read(
    answers: list[tuple[Any, Recommendation]], tmp_path: Path
) -> None:
    for number, (case, answer) in enumerate(answers):
        if not answer.choices:
            continue
        files = scaffold(answer, tmp_path / str(number), name="mine")
        train = load_config(files["train"], [])
        first = answer.choices[0].config
        assert train.train.learning_rate == first["train"]["learning_rate"], case.title
        assert load_config(files["sweep"], []).sweep.num_samples > 1
        load_serve_config(files["serve"], [])


def test_the_committed_table_is_what_the_script_writes(
    answers: list[tuple[Any, Recommendation]],
) -> None:
    written = TABLE.DOCUMENT.read_text(encoding="utf-8")
    for each in answers:
        assert f"| {' | '.join(TABLE.cells(*each))} |\n" in written, each[0].title
    if len(answers) == len(ALL):
        assert written == TABLE.document(answers)


def test_the_configurations_of_the_table_are_the_published_ones() -> None:
    """A typing error in one would make the table answer for another model."""
    from rayfin.advisor.published_models import published_model
    from rayfin.models.sizes import sizes_of

    for name, shape in TABLE.CONFIGS.items():
        found, sizes = published_model(name), sizes_of(json.loads(json.dumps(shape)))
        assert found is not None and sizes is not None
        assert found[0].parameters == sizes.parameters


@pytest.mark.long
def test_a_training_of_the_files_begins(tmp_path: Path) -> None:
    """On a model of 0.5B by its shapes, with random weights and another's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import rayfin
    from rayfin.advisor.published_models import usual_model
    from rayfin.library import advice
    from rayfin.models import locate

    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(locate(ModelConfig(name="tiny")), model)
    facts, _ = usual_model(0.5)
    settings = AutoConfig.from_pretrained(model).to_dict() | {
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.intermediate_size,
        "num_hidden_layers": facts.num_layers,
        "num_attention_heads": facts.num_attention_heads,
        "num_key_value_heads": facts.num_key_value_heads,
        "head_dim": facts.head_dim,
        "vocab_size": facts.vocab_size,
        "tie_word_embeddings": True,
    }
    for old in model.glob("*.safetensors"):
        old.unlink()
    shapes = AutoConfig.for_model(**settings)
    AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16).save_pretrained(model)
    rows = [{"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(100)]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    given = build_config(
        {
            "model": {"name": str(model)},
            "data": {"path": str(data)},
            "storage": str(tmp_path / "storage"),
            "history": f"sqlite:///{tmp_path / 'history.db'}",
        }
    )
    told = TABLE.Case(0.5, 0).told | {
        "model_size_b": None,
        "rows": None,
        "tokens_per_sample": None,
    }
    config, known = advice.scenario_of(given, told, progress=False)
    answer = recommend(known, Knowledge.of([]), 1, config=config)
    files = scaffold(answer, tmp_path / "files", name="mine")
    begun = load_config(files["train"], ["train.max_steps=1", "train.num_train_epochs=null"])
    result = rayfin.train(begun, progress=False)
    assert result.trial.status == "finished" and result.trial.metrics["steps"] == 1
