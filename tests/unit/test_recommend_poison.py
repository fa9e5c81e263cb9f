"""Wrong trials move no answer and are named in it; a history that says otherwise moves it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from rayfin.advisor import Scenario
from rayfin.advisor.answer import Recommendation
from rayfin.advisor.doubt import PRIOR, excess_noise, far_below, impossible
from rayfin.advisor.features import COLUMNS
from rayfin.advisor.knowledge import Knowledge
from rayfin.advisor.recommendation import ScenarioFacts, recommend
from rayfin.hardware import Hardware
from rayfin.history import TrialRecord
from rayfin.history.csv_table import read_csv
from rayfin.models import ModelFacts
from rayfin.models.sizes import sizes_of

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GPU = Hardware("cuda", "NVIDIA RTX 4090", 1, 24 * 2**30, 16, 128 * 2**30, True)
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
MODELS = {
    MODEL: 3e-4,
    "meta-llama/Llama-3.2-3B": 4e-4,
    "Qwen/Qwen3-8B": 1e-3,
    "Qwen/Qwen3-14B": 5e-4,
}
RATES, RANKS = (4e-5, 1e-4, 3e-4, 1e-3, 3e-3), (4, 16, 64, 128)
WRONG_RATES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 3e-2)
COUNTS = (1, 5, 20, 60)


def nll(rate: float, rank: int, best: float) -> str:
    """A made-up loss with its best rate, better by rank; empty where the training diverges."""
    if rate > 6 * best:
        return ""
    return f"{0.57 + 0.02 * math.log10(rate / best) ** 2 - 0.002 * math.log2(rank):.4f}"


def read(folder: Path, name: str, rows: Sequence[tuple[object, ...]]) -> list[TrialRecord]:
    """What an imported table holds: (model, rate, rank, loss); a loss of "" is a divergence."""
    path = folder / name
    lines = [
        ",".join(map(str, (*row, index, int(row[-1] == "")))) for index, row in enumerate(rows)
    ]
    path.write_text(
        "\n".join(["model,learning_rate,lora_rank,test_nll,wall_minutes,diverged", *lines])
    )
    return [record for record in read_csv(path, AT) if isinstance(record, TrialRecord)]


def grid(model: str, best: float) -> list[tuple[object, ...]]:
    return [
        (model, rate, rank, nll(rate, rank, best)) for rate, rank in itertools.product(RATES, RANKS)
    ]


def swept(folder: Path) -> list[TrialRecord]:
    return read(
        folder, "sweep.csv", [row for model, best in MODELS.items() for row in grid(model, best)]
    )


def place() -> ScenarioFacts:
    sizes = sizes_of(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "torch_dtype": "bfloat16",
        }
    )
    assert sizes is not None
    facts = ModelFacts(name="llama-3.1-8b", identity="llama-3.1-8b@1", **vars(sizes))
    scenario = Scenario(
        hardware="single_gpu",
        data_scale="small",
        latency="normal",
        model_name=facts.name,
        model_size_b=facts.parameters / 1e9,
        dataset_rows=1000,
        gpu_memory_gb=24,
    )
    return ScenarioFacts(
        scenario, facts, GPU, {"rows_train": 1000, "digest": "d", "source": "mine"}
    )


def answered(records: Sequence[TrialRecord]) -> Recommendation:
    return recommend(place(), Knowledge.of(records, reference=False))


def rate_of(answer: Recommendation) -> float:
    return float(answer.choices[0].config["train"]["learning_rate"])


def impossible_losses(count: int, chance: random.Random) -> list[tuple[object, ...]]:
    return [
        (MODEL, chance.choice(WRONG_RATES[-2:]), chance.choice(RANKS), chance.choice((0, -0.5)))
        for _ in range(count)
    ]


def swapped_labels(count: int, chance: random.Random) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    while len(found) < count:
        rows = grid(MODEL, MODELS[MODEL])
        losses = [row[-1] for row in rows]
        chance.shuffle(losses)
        found += [(*row[:-1], loss) for row, loss in zip(rows, losses, strict=True)]
    return found[:count]


def random_losses(
    count: int, chance: random.Random, low: float = 0.1, high: float = 5.0
) -> list[tuple[object, ...]]:
    return [
        (
            MODEL,
            chance.choice(WRONG_RATES),
            chance.choice(RANKS),
            round(chance.uniform(low, high), 4),
        )
        for _ in range(count)
    ]


def other_scale(count: int, chance: random.Random) -> list[tuple[object, ...]]:
    return random_losses(count, chance, 20.0, 90.0)


def duplicates(count: int, _: random.Random) -> list[tuple[object, ...]]:
    return [grid(MODEL, MODELS[MODEL])[0]] * count  # of a rate that is too small


KINDS = (impossible_losses, swapped_labels, random_losses, other_scale, duplicates)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> list[TrialRecord]:
    return swept(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def clean(sweep: list[TrialRecord]) -> Recommendation:
    answer = answered(sweep)
    assert answer.source == "learned" and answer.doubted == []
    assert 2e-4 <= rate_of(answer) <= 4e-4
    return answer


@pytest.mark.parametrize("name", ["poison.csv", "sweep.csv"])
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_trials_move_no_answer(
    kind: object, name: str, sweep: list[TrialRecord], clean: Recommendation, tmp_path: Path
) -> None:
    """In a table of their own, and among those of the sweep."""
    assert callable(kind)
    for count in COUNTS:
        wrong = read(tmp_path, name, kind(count, random.Random(count)))
        answer = answered([*sweep, *wrong])
        assert answer.source == "learned", count
        assert answer.choices[0].method == clean.choices[0].method
        assert 0.45 <= rate_of(answer) / rate_of(clean) <= 2.1, count


def test_losses_that_can_not_be_are_named(
    sweep: list[TrialRecord], clean: Recommendation, tmp_path: Path
) -> None:
    wrong = read(tmp_path, "wrong.csv", [(MODEL, 3e-3, 16, 0), (MODEL, 3e-3, 64, 0)])
    answer = answered([*sweep, *wrong])
    assert {one.trial_id for one in answer.doubted} == {row.trial_id for row in wrong}
    assert {one.doubt for one in answer.doubted} == {"impossible"}
    (note,) = (note for note in answer.notes if note.startswith("set aside: "))
    assert note.startswith("set aside: 2 trials (") and wrong[0].trial_id in note
    assert answer.model_dump(exclude={"doubted", "notes", "explanation", "trials"}) == (
        clean.model_dump(exclude={"doubted", "notes", "explanation", "trials"})
    )


def test_a_source_that_scatters_is_named(sweep: list[TrialRecord], tmp_path: Path) -> None:
    wrong = read(tmp_path, "wrong.csv", swapped_labels(20, random.Random(0)))
    answer = answered([*sweep, *wrong])
    named = {one.trial_id for one in answer.doubted if one.doubt == "noisy"}
    assert len(named) > 10 and named <= {row.trial_id for row in wrong}
    assert any(note.startswith("count for less: ") for note in answer.notes)


def test_a_good_import_lowers_no_relevance(sweep: list[TrialRecord], tmp_path: Path) -> None:
    """Whether it is of this model's siblings, or of other methods that tell little."""
    before = answered(sweep).relevance
    more = read(tmp_path, "more.csv", grid("meta-llama/Llama-3-8B", 3e-4))
    assert answered([*sweep, *more]).relevance > before
    one_rate = [row for row in grid("meta-llama/Llama-3-8B", 3e-4) if row[1] == 1e-4]
    assert answered([*sweep, *read(tmp_path, "one.csv", one_rate)]).relevance >= before


def test_a_history_that_says_otherwise_is_believed(
    sweep: list[TrialRecord], tmp_path: Path
) -> None:
    """Twenty trials that agree with each other, as good trials do."""
    rates = (5e-5, 1e-4, 3e-4, 1e-3, 2e-3)
    other = [
        (MODEL, rate, rank, nll(rate, rank, 1.2e-3))
        for rate, rank in itertools.product(rates, RANKS)
    ]
    knowledge = [*sweep, *read(tmp_path, "mine.csv", other)]
    assert rate_of(answered(knowledge)) >= 2 * rate_of(answered(sweep))


def test_the_order_of_imports_does_not_matter(sweep: list[TrialRecord], tmp_path: Path) -> None:
    wrong = read(tmp_path, "wrong.csv", random_losses(20, random.Random(1)))
    one, other = answered([*sweep, *wrong]), answered([*reversed(wrong), *reversed(sweep)])
    assert one == other


# --- what is doubted ----------------------------------------------------------------------------


def rows_of(rates: Sequence[float], ranks: Sequence[int]) -> np.ndarray:
    rows = np.full((len(rates), len(COLUMNS.names)), np.nan)
    rows[:, COLUMNS.names.index("learning_rate")] = np.log10(rates)
    rows[:, COLUMNS.names.index("capacity")] = np.log2(ranks)
    for name in COLUMNS.categorical:
        rows[:, COLUMNS.names.index(name)] = 1.0
    return rows


def test_scores_that_no_model_has() -> None:
    values = np.array([-1.0, 0.0, 0.5, 1.0, 2.0, np.nan])
    assert impossible(values, "eval_loss").tolist() == [True, True, False, False, False, False]
    assert impossible(values, "perplexity").tolist() == [True, True, True, True, False, False]
    assert impossible(values, "exact_match").tolist() == [True, False, False, False, True, False]


def test_a_loss_far_below_all_near_it_and_one_that_was_approached() -> None:
    rates = np.geomspace(1e-4, 2e-3, 8)
    rows = rows_of(rates, [16] * 8)
    alone = np.array([2.0, 1.9, 1.8, 0.1, 1.8, 1.9, 2.0, 2.1])
    assert np.flatnonzero(far_below(rows, alone, "eval_loss")).tolist() == [3]
    approached = np.array([2.0, 1.5, 0.6, 0.3, 0.5, 1.5, 2.0, 2.1])
    assert not far_below(rows, approached, "eval_loss").any()
    assert not far_below(rows, -alone / 10, "exact_match").any()


def test_each_source_has_its_noise_and_an_outlier_counts_for_little() -> None:
    draws = np.random.default_rng(0)
    rates, ranks = zip(*itertools.product(np.geomspace(1e-4, 1e-2, 8), (4, 16, 64)), strict=True)
    rows = np.concatenate([rows_of(rates, ranks)] * 2)
    smooth = 0.3 * (rows[:, COLUMNS.names.index("learning_rate")] + 3.0) ** 2
    sources = np.repeat([0.0, 1.0], len(rates))
    values = smooth + np.where(sources > 0, draws.normal(scale=0.4, size=len(rows)), 0.0)
    values[5] += 0.8
    usual = np.ones(len(rows))
    excess, outliers, scatter = excess_noise(rows, values, usual, sources)
    assert np.flatnonzero(outliers[: len(rates)]).tolist() == [5]
    deviation = np.sqrt(np.median(excess[sources > 0]) + PRIOR["noise"] ** 2)
    assert deviation == pytest.approx(0.4, rel=0.5)
    assert scatter[sources == 0].max() < 2 < scatter[sources > 0].min()
    assert np.median(excess[sources == 0]) < 0.1 * np.median(excess[sources > 0])
    again = excess_noise(rows, smooth, usual, np.zeros(len(rows)))
    assert not again[1].any() and again[2].max() < 1.5
