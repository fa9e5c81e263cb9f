"""The search space as Optuna sees it, and a sweep's plan: the same point is the same trial."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rayfin.config import Config, dump_yaml, load_config, parse_yaml
from rayfin.errors import ConfigError, MethodError
from rayfin.methods import METHODS
from rayfin.paths import Storage
from rayfin.training.combination import check_combination
from rayfin.tuning.plan import PlannedTrial, SweepPlan, find_resumable, new_plan
from rayfin.tuning.space import (
    Values,
    decode,
    distributions,
    drawn,
    encode,
    grid,
    moved,
    size,
    trial_config,
    values_in,
)
from rayfin.tuning.space_check import check_space, space_notes, variants


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
    found = distributions(config_with(AXES))
    assert found["method.r"] == IntDistribution(0, 2)
    assert found["method.target_modules"] == CategoricalDistribution([0, 1])
    assert found["train.learning_rate"] == FloatDistribution(1e-5, 1e-2, log=True)
    assert found["train.max_steps"] == IntDistribution(2, 5)
    mixed = config_with({"method.r": [8, 4], "train.packing": [False, True]})
    assert all(isinstance(d, CategoricalDistribution) for d in distributions(mixed).values())


def decoded(config: Config, drawn: dict[str, Any]) -> Values:
    return {axis: decode(config.sweep.parameters[axis], value) for axis, value in drawn.items()}


def test_decode_and_encode_are_each_others_inverse() -> None:
    config = config_with(AXES)
    drawn = {
        "method.r": 1,
        "method.target_modules": 1,
        "train.learning_rate": 3e-4,
        "train.max_steps": 4,
    }
    values = decoded(config, drawn)
    assert values == {
        "method.r": 8,
        "method.target_modules": ["q_proj", "v_proj"],
        "train.learning_rate": 3e-4,
        "train.max_steps": 4,
    }
    assert encode(config, values) == drawn
    saved = trial_config(config, values).model_dump(mode="json")
    assert values_in(config, saved) == values


@pytest.mark.parametrize(
    "change", [{"method.r": 5}, {"train.learning_rate": 1.0}, {"train.max_steps": "4"}]
)
def test_what_lies_outside_the_space_has_no_code(change: dict[str, Any]) -> None:
    config = config_with(AXES)
    inside = decoded(config, dict.fromkeys(AXES, 1) | {"train.learning_rate": 1e-4})
    inside["train.max_steps"] = 4
    assert encode(config, inside) is not None
    assert encode(config, inside | change) is None
    assert encode(config, {"method.r": 4}) is None


def test_size_counts_points() -> None:
    assert size(config_with({"method.r": [4, 8], "train.max_steps": AXES["train.max_steps"]})) == 8
    assert math.isinf(size(config_with(AXES)))


CONDITIONAL = {
    "method.type": ["lora", "ia3", "p_tuning"],
    "method.r": [4, 8, 16],
    "method.num_virtual_tokens": [5, 10],
    "train.packing": [False],
}


def test_a_trial_takes_the_axes_that_its_method_has() -> None:
    config = config_with(CONDITIONAL, "method.type=lora")
    check_space(config)
    points = list(grid(config))
    assert len(points) == size(config) == 3 + 1 + 2
    assert {len(point) for point in points if point["method.type"] == "ia3"} == {2}
    for point in points:
        config_of = trial_config(config, point)
        saved = config_of.model_dump(mode="json")
        assert values_in(config, saved) == point
        assert encode(config, point) is not None
    assert {one.method.type for one in variants(config)} == {"lora", "ia3", "p_tuning"}
    # An infinite range of one method makes the space infinite.
    assert math.isinf(size(config_with(CONDITIONAL | {"method.lora_alpha": RANGE})))


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
    return load_config({"method": method, "sweep": {"parameters": axes}})


@given(spaces(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_every_drawn_trial_is_valid_and_holds_all_that_was_written(
    config: Config, random: Random
) -> None:
    """Or the space is refused before anything starts."""
    written = {f"method.{k}": getattr(config.method, k) for k in config.method.model_fields_set}
    del written["method.type"]
    axes = config.sweep.parameters
    if (said := refusal(config)) is not None:
        # By name: an axis, or what was written.
        assert any(name in said for name in (*axes, *written))
        return
    used: set[str] = set()
    first = drawn(config, random)
    for value in [first, moved(config, first, random), *itertools.islice(grid_of(config), 40)]:
        trial = trial_config(config, value)  # valid
        check_combination(trial)
        has = {f"method.{name}" for name in type(trial.method).model_fields}
        assert trial.method.type in axes["method.type"]  # type: ignore[operator]
        assert value.keys() == {a for a in axes if not a.startswith("method.") or a in has}
        for name in has & written.keys() - axes.keys():
            assert getattr(trial.method, name.partition(".")[2]) == written[name]
            used.add(name)
        parameters = encode(config, values_in(config, trial.model_dump(mode="json")))
        assert parameters is not None
        assert trial_config(config, decoded(config, parameters)) == trial
    saved = load_config(parse_yaml(dump_yaml(config), "saved"))
    assert trial_config(saved, first) == trial_config(config, first)
    if size(config) <= 40:
        assert used == written.keys() - axes.keys()


def refusal(config: Config) -> str | None:
    try:
        check_space(config)
    except (ConfigError, MethodError) as error:
        return str(error)
    return None


def grid_of(config: Config) -> Iterator[Values]:
    return grid(config) if math.isfinite(size(config)) else iter(())


def test_what_not_every_method_has_is_named_once() -> None:
    written = {"type": "lora", "lora_alpha": 32}
    config = load_config({"method": written, "sweep": {"parameters": CONDITIONAL}})
    assert space_notes(config) == [
        "method.lora_alpha is for lora; ia3 and p_tuning have no such setting",
        "method.r is for lora; ia3 and p_tuning have no such setting",
        "method.num_virtual_tokens is for p_tuning; lora and ia3 have no such setting",
    ]
    assert space_notes(config_with({"method.r": [4]}, "method.lora_alpha=2")) == []


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
        check_space(load_config({"method": method, "sweep": {"parameters": axes}}))


def test_values_that_fail_only_together_are_found() -> None:
    config = config_with(
        {"train.packing": [False, True], "method.type": ["lora", "prompt_tuning"]},
    )
    with pytest.raises(MethodError, match=r"train\.packing with method\.type=prompt_tuning: "):
        check_space(config)


def test_a_point_is_known_again_by_what_its_spec_says(tmp_path: Path, data: str) -> None:
    """A spec has paths absolute, and numbers as the setting takes them."""
    relative = os.path.relpath(data.partition("=")[2])
    config = config_with({"data.path": [relative, "pydocs"], "method.r": ["8", 16]})
    plan = new_plan(config, Storage.open(tmp_path))
    for point in grid(config):
        spec = plan.trial(point).spec.model_dump(mode="json")
        assert encode(config, values_in(config, spec)) == encode(config, point)


def test_a_range_of_fractions_over_whole_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.r: .* whole number.*randint"):
        check_space(config_with({"method.r": {"space": "uniform", "lower": 2, "upper": 8}}))
    check_space(config_with({"method.r": {"space": "randint", "lower": 2, "upper": 8}}))


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
    assert PlannedTrial.from_tune_config(four.as_tune_config()) == four


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
    short, long = (plan.corpus(one.data) for one in variants(config))
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
    config = load_config({"method": {"type": "lora", "r": 4, "quantization_bit": 4}})
    ia3 = trial_config(config, {"method.type": "ia3"}).method
    assert (ia3.target_modules, ia3.quantization_bit) == (None, 4)
    dora = trial_config(config, {"method.type": "dora"}).method
    assert (dora.r, dora.target_modules, dora.quantization_bit) == (4, "all-linear", 4)
    assert trial_config(load_config(), {"method.type": "dora"}).method.quantization_bit is None
