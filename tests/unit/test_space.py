"""The search space as Optuna sees it, and a sweep's plan: the same point is the same trial."""

from __future__ import annotations

import itertools
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rayfin.config import Config, dump_yaml, load_config, parse_yaml, saved, with_values
from rayfin.errors import ConfigError, MethodError
from rayfin.methods import METHODS
from rayfin.paths import Storage
from rayfin.training import TrialSpec
from rayfin.training.combination import check_combination
from rayfin.tuning.plan import SweepPlan, find_resumable, new_plan
from rayfin.tuning.space import SearchSpace, Values, decode
from rayfin.tuning.space_check import check_space, space_notes, variants


def space_with(parameters: dict[str, Any], *overrides: str) -> SearchSpace:
    return SearchSpace(config_with(parameters, *overrides))


def config_with(parameters: dict[str, Any], *overrides: str) -> Config:
    return load_config({"model": {"name": "tiny"}, "sweep": {"parameters": parameters}}, overrides)


RANGE = {"space": "loguniform", "lower": 1e-5, "upper": 1e-2}
AXES = {
    "method.r": [4, 8, 16],
    "method.target_modules": ["all-linear", ["q_proj", "v_proj"]],
    "train.learning_rate": RANGE,
    "train.max_steps": {"space": "randint", "lower": 2, "upper": 5},
}


def test_lists_of_numbers_are_ordinal_and_other_lists_are_not() -> None:
    found = space_with(AXES).distributions
    assert found["method.r"] == IntDistribution(0, 2)
    assert found["method.target_modules"] == CategoricalDistribution([0, 1])
    assert found["train.learning_rate"] == FloatDistribution(1e-5, 1e-2, log=True)
    assert found["train.max_steps"] == IntDistribution(2, 5)
    mixed = space_with({"method.r": [8, 4], "train.packing": [False, True]})
    assert all(isinstance(d, CategoricalDistribution) for d in mixed.distributions.values())


def decoded(space: SearchSpace, drawn: dict[str, Any]) -> Values:
    return {axis: decode(space.axes[axis], value) for axis, value in drawn.items()}


def test_decode_and_encode_are_each_others_inverse() -> None:
    space = space_with(AXES)
    drawn = {
        "method.r": 1,
        "method.target_modules": 1,
        "train.learning_rate": 3e-4,
        "train.max_steps": 4,
    }
    values = decoded(space, drawn)
    assert values == {
        "method.r": 8,
        "method.target_modules": ["q_proj", "v_proj"],
        "train.learning_rate": 3e-4,
        "train.max_steps": 4,
    }
    assert space.encode(values) == drawn
    saved = space.config_of(values).model_dump(mode="json")
    assert space.values_in(saved) == values


@pytest.mark.parametrize(
    "change", [{"method.r": 5}, {"train.learning_rate": 1.0}, {"train.max_steps": "4"}]
)
def test_what_lies_outside_the_space_has_no_code(change: dict[str, Any]) -> None:
    space = space_with(AXES)
    inside = decoded(space, dict.fromkeys(AXES, 1) | {"train.learning_rate": 1e-4})
    inside["train.max_steps"] = 4
    assert space.encode(inside) is not None
    assert space.encode(inside | change) is None
    assert space.encode({"method.r": 4}) is None


def test_size_counts_points() -> None:
    assert space_with({"method.r": [4, 8], "train.max_steps": AXES["train.max_steps"]}).size == 8
    assert math.isinf(space_with(AXES).size)


CONDITIONAL = {
    "method.type": ["lora", "ia3", "p_tuning"],
    "method.r": [4, 8, 16],
    "method.num_virtual_tokens": [5, 10],
    "train.packing": [False],
}


def test_a_trial_takes_the_axes_that_its_method_has() -> None:
    space = space_with(CONDITIONAL, "method.type=lora")
    check_space(space)
    points = list(space.grid())
    assert len(points) == space.size == 3 + 1 + 2
    assert {len(point) for point in points if point["method.type"] == "ia3"} == {2}
    for point in points:
        saved = space.config_of(point).model_dump(mode="json")
        assert space.values_in(saved) == point
        assert space.encode(point) is not None
    assert {one.method.type for one in variants(space)} == {"lora", "ia3", "p_tuning"}
    # An infinite range of one method makes the space infinite.
    assert math.isinf(space_with(CONDITIONAL | {"method.lora_alpha": RANGE}).size)


AXES_OF_ALL = {
    "method.r": st.sampled_from([[2, 4], {"space": "randint", "lower": 1, "upper": 9}]),
    "method.lora_alpha": st.just({"space": "uniform", "lower": 4, "upper": 64}),
    "method.lora_dropout": st.just([0.0, 0.1]),
    "method.init_r": st.just([12, 16]),
    "method.target_r": st.just([4, 8]),
    "method.num_virtual_tokens": st.just([4, 8]),
    "method.encoder_hidden_size": st.just([None, 16]),
    "method.prefix_projection": st.just([False, True]),
    "method.quantization_bit": st.just([4, 8]),
    "train.learning_rate": st.just(RANGE),
    "train.max_steps": st.just([4, 8]),
}
WRITTEN = {
    "r": 3, "lora_alpha": 24.0, "lora_dropout": 0.2, "quantization_bit": 8, "init_r": 10,
    "target_r": 5, "orth_reg_weight": 0.1, "num_virtual_tokens": 7, "encoder_hidden_size": 24,
    "encoder_num_layers": 3, "prompt_tuning_init": "RANDOM", "feedforward_modules": ["up_proj"],
    "target_modules": ["up_proj", "q_proj"],
}  # fmt: skip


@st.composite
def spaces(draw: st.DrawFn) -> Config:
    """A sweep over some methods, with axes and settings that not all of them have."""
    types = draw(st.lists(st.sampled_from(sorted(METHODS)), min_size=1, unique=True))
    names = draw(st.lists(st.sampled_from(sorted(AXES_OF_ALL)), unique=True, max_size=5))
    axes = {"method.type": types} | {name: draw(AXES_OF_ALL[name]) for name in names}
    base = draw(st.sampled_from(sorted(METHODS)))
    fields = sorted(WRITTEN.keys() & METHODS[base].model_fields.keys())
    kept = draw(st.lists(st.sampled_from(fields), unique=True)) if fields else []
    method = {"type": base} | {name: WRITTEN[name] for name in kept}
    train = {"weight_decay": 0.1, "eval_steps": 2}
    return load_config({"method": method, "train": train, "sweep": {"parameters": axes}})


@given(spaces(), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_every_drawn_trial_is_valid_and_holds_all_that_was_written(
    config: Config, random: Random
) -> None:
    """Or the space is refused before anything starts."""
    written = {f"method.{k}": getattr(config.method, k) for k in config.method.model_fields_set}
    del written["method.type"]
    axes = config.sweep.parameters
    space = SearchSpace(config)
    if (said := refusal(space)) is not None:
        # By name: an axis, or what was written.
        assert any(name in said for name in (*axes, *written))
        return
    used: set[str] = set()
    first = space.drawn(random)
    for value in [first, space.moved(first, random), *itertools.islice(grid_of(space), 40)]:
        trial = space.config_of(value)  # valid
        # As if the whole configuration were validated again, which takes a hundred times as long.
        whole = with_values(config, value)
        assert (trial, saved(trial)) == (whole, saved(whole))
        assert trial.method.model_fields_set == whole.method.model_fields_set
        assert space.spec_of(value) == TrialSpec.of(whole)
        check_combination(trial)
        has = {f"method.{name}" for name in type(trial.method).model_fields}
        assert trial.method.type in axes["method.type"]  # type: ignore[operator]
        assert value.keys() == {a for a in axes if not a.startswith("method.") or a in has}
        for name in has & written.keys() - axes.keys():
            assert getattr(trial.method, name.partition(".")[2]) == written[name]
            used.add(name)
        parameters = space.encode(space.values_in(trial.model_dump(mode="json")))
        assert parameters is not None
        assert space.config_of(decoded(space, parameters)) == trial
    again = SearchSpace(load_config(parse_yaml(dump_yaml(config), "saved")))
    assert again.config_of(first) == space.config_of(first)
    if space.size <= 40:
        assert used == written.keys() - axes.keys()


def refusal(space: SearchSpace) -> str | None:
    try:
        check_space(space)
    except (ConfigError, MethodError) as error:
        return str(error)
    return None


def grid_of(space: SearchSpace) -> Iterator[Values]:
    return space.grid() if math.isfinite(space.size) else iter(())


def test_what_not_every_method_has_is_named_once() -> None:
    written = {"type": "lora", "lora_alpha": 32}
    space = SearchSpace(load_config({"method": written, "sweep": {"parameters": CONDITIONAL}}))
    assert space_notes(space) == [
        "method.lora_alpha is for lora; ia3 and p_tuning have no such setting",
        "method.r is for lora; ia3 and p_tuning have no such setting",
        "method.num_virtual_tokens is for p_tuning; lora and ia3 have no such setting",
    ]
    assert space_notes(space_with({"method.r": [4]}, "method.lora_alpha=2")) == []


@pytest.mark.parametrize(
    ("method", "axes", "said"),
    [
        (
            {"type": "lora"},
            {"method.type": ["ia3", "p_tuning"], "method.r": [4]},
            r"sweep\.parameters\.method\.r: no setting of ia3 and p_tuning.*; lora, .* have it",
        ),
        (
            {"type": "lora"},
            {"method.num_virtual_token": [4]},
            r"method\.num_virtual_token: unknown setting.*any setting of",
        ),
        (
            {"type": "lora"},
            {"method.type": ["lora", "p_tuning"], "method.num_virtual_token": [4]},
            r"method\.num_virtual_token: .*did you mean 'method\.num_virtual_tokens'",
        ),
        (
            {"type": "lora"},
            {"method.num_virtual_tokens": [4]},
            r"num_virtual_tokens: no setting of lora.*p_tuning, .* have it",
        ),
        (
            {"type": "lora", "r": 4},
            {"method.type": ["ia3", "p_tuning"]},
            r"method\.r: no method of sweep\.parameters\.method\.type \(ia3, p_tuning\) has it",
        ),
        (
            {"type": "lora", "target_modules": "all-linear"},
            {"method.type": ["lora", "ia3"]},
            r"method\.type=ia3: method\.target_modules: .* 'all-linear'.* leave .* that has it",
        ),
        (
            {"type": "lora", "quantization_bit": 4},
            {"method.type": ["lora", "full"]},
            r"method\.type=full: .*quantization_bit=4 can't work with method\.type=full",
        ),
        ({}, {"method.type": ["lora", "lroa"]}, r"'lroa' is not a method.*mean 'lora'"),
        ({}, {"method.type": ["lora", None]}, r"null is not a method"),
        ({}, {"method.type": [["lora"]]}, r"is not a method"),
        (
            {},
            {"method.type": {"space": "uniform", "lower": 0, "upper": 1}},
            r"method\.type: methods are no range",
        ),
        (
            {},
            {"method.type": ["lora", "adalora"], "method.init_r": [4, 16]},
            r"method\.init_r with method\.type=adalora: .*use a target_r below 4",
        ),
    ],
)
def test_what_no_trial_could_use_is_refused(
    method: dict[str, Any], axes: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, MethodError), match=said):
        check_space(SearchSpace(load_config({"method": method, "sweep": {"parameters": axes}})))


def test_values_that_fail_only_together_are_found() -> None:
    space = space_with(
        {"train.packing": [False, True], "method.type": ["lora", "prompt_tuning"]},
    )
    with pytest.raises(MethodError, match=r"train\.packing with method\.type=prompt_tuning: "):
        check_space(space)


def test_a_point_is_known_again_by_what_its_spec_says(tmp_path: Path, data: str) -> None:
    """A spec has paths absolute, and numbers as the setting takes them."""
    relative = os.path.relpath(data.partition("=")[2])
    config = config_with({"data.path": [relative, "pydocs"], "method.r": ["8", 16]})
    plan = new_plan(config, Storage.open(tmp_path))
    for point in plan.space.grid():
        spec = plan.trial(point).spec.model_dump(mode="json")
        assert plan.space.encode(plan.space.values_in(spec)) == plan.space.encode(point)


def test_a_range_of_fractions_over_whole_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.r: .* whole number.*randint"):
        check_space(space_with({"method.r": {"space": "uniform", "lower": 2, "upper": 8}}))
    check_space(space_with({"method.r": {"space": "randint", "lower": 2, "upper": 8}}))


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    rows = (f'{{"prompt": "what is {n}", "completion": "{n}"}}\n' for n in range(9))
    path.write_text("".join(rows))
    return f"data.path={path}"


def test_the_same_point_is_the_same_trial(tmp_path: Path, data: str) -> None:
    config = config_with({"method.r": [4, 8]}, data)
    plan = new_plan(config, Storage.open(tmp_path))
    again = SweepPlan(plan.sweep_id, config, plan.storage)
    four, eight = plan.trial({"method.r": 4}), plan.trial({"method.r": 8})
    assert again.trial({"method.r": 4}) == four
    assert four.trial_id != eight.trial_id
    assert four.location.path.is_relative_to(plan.location.path)
    assert pickle.loads(pickle.dumps(four)) == four  # as Tune sends it to a worker


def test_where_and_how_often_one_looks_is_no_part_of_the_fingerprint(
    tmp_path: Path, data: str
) -> None:
    def fingerprint(*overrides: str) -> str:
        config = config_with({"method.r": [4]}, data, *overrides)
        return SweepPlan("any", config, Storage.open(tmp_path)).trial({}).fingerprint

    same = fingerprint()
    assert fingerprint("train.eval_steps=3", "sweep.num_samples=3", "publish.name=x") == same
    halved = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")
    assert fingerprint(*halved) == same
    assert fingerprint("scaling.num_workers=2", "scaling.strategy=fsdp") == same
    assert fingerprint("train.per_device_train_batch_size=2") != same
    assert fingerprint("train.seed=1") != same
    assert fingerprint("data.max_length=128") != same


def test_data_is_read_once_for_a_sweep_of_its_length(tmp_path: Path, data: str) -> None:
    config = config_with({"data.max_length": [64, 128]}, data)
    plan = new_plan(config, Storage.open(tmp_path))
    short, long = (plan.corpus(one.data) for one in variants(plan.space))
    assert short is long
    assert len(plan.corpora) == 2


def test_a_sweep_is_found_again_by_what_it_computes(tmp_path: Path, data: str) -> None:
    storage = Storage.open(tmp_path / "runs")
    config = config_with({"method.r": [4, 8]}, data)
    assert find_resumable(config, storage) is None
    plan = new_plan(config, storage)
    plan.save()

    longer = config_with({"method.r": [4, 8]}, data, "sweep.num_samples=99", "sweep.mode=min")
    found = find_resumable(longer, storage)
    assert found is not None
    assert (found.sweep_id, found.config) == (plan.sweep_id, longer)
    assert find_resumable(config_with({"method.r": [4]}, data), storage) is None
    file = plan.location.path / "config.yaml"  # an earlier version's: with the method's defaults
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert find_resumable(longer, storage) == found
    assert find_resumable(config_with({"method.r": [4, 8]}, data, "train.seed=1"), storage) is None

    (plan.location.path / "config.yaml").write_text("method: {type: from the future}\n")
    assert find_resumable(config, storage) is None


def test_two_sweeps_that_start_together_have_names_of_their_own(tmp_path: Path, data: str) -> None:
    config = config_with({"method.type": ["lora", "p_tuning"]}, data, "method.type=p_tuning")
    names = {new_plan(config, Storage.open(tmp_path)).sweep_id for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith("data-p-tuning-") for name in names)


def test_a_drawn_method_brings_its_own_defaults_and_keeps_what_was_written() -> None:
    space = SearchSpace(load_config({"method": {"type": "lora", "r": 4, "quantization_bit": 4}}))
    ia3 = space.config_of({"method.type": "ia3"}).method
    assert (ia3.target_modules, ia3.quantization_bit) == (None, 4)
    dora = space.config_of({"method.type": "dora"}).method
    assert (dora.r, dora.target_modules, dora.quantization_bit) == (4, "all-linear", 4)
    assert (
        SearchSpace(load_config()).config_of({"method.type": "dora"}).method.quantization_bit
        is None
    )


@pytest.mark.parametrize(
    ("axes", "settings", "said"),
    [
        ({"method.r": [4, 8, 16]}, (), "method.r is 4 to 16 here, which suits lora; vera usually"),
        ({"method.r": {"space": "randint", "lower": 2, "upper": 32}}, (), "method.r is 2 to 32"),
        ({}, ("method.r=8",), "method.r is 8 here, which suits lora; vera usually has 64 to 1024"),
        ({"method.r": [8, 64]}, (), None),
        ({"train.seed": [1, 2]}, (), None),
    ],
)
def test_a_method_that_shares_a_rank_it_usually_does_not_have_is_named(
    axes: dict[str, Any], settings: tuple[str, ...], said: str | None
) -> None:
    """VeRA's are larger than LoRA's; nothing but the note changes."""
    space = space_with({"method.type": ["lora", "vera"], **axes}, *settings)
    check_space(space)
    notes = [note for note in space_notes(space) if " suits " in note]
    assert [note.startswith(str(said)) for note in notes] == [True] * (said is not None)
    if notes:
        assert "with method.type=vera sweep.parameters.method.r=[64,256,1024]" in notes[0]
        alone = space_with({"method.r": [4, 8]}, "method.type=vera")
        assert space_notes(alone) == [], "who sweeps one method chose its ranks for it"
