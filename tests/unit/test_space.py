"""The search space as Optuna sees it, and a sweep's plan: the same point is the same trial."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rayfin.config import Config, load_config
from rayfin.errors import ConfigError, MethodError
from rayfin.paths import Storage
from rayfin.tuning.plan import PlannedTrial, SweepPlan, find_resumable, new_plan
from rayfin.tuning.space import (
    check_space,
    decode,
    distributions,
    encode,
    size,
    trial_config,
    values_in,
    variants,
)


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


def test_decode_and_encode_are_each_others_inverse() -> None:
    config = config_with(AXES)
    drawn = {
        "method.r": 1,
        "method.target_modules": 1,
        "train.learning_rate": 3e-4,
        "train.max_steps": 4,
    }
    values = decode(config, drawn)
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
    inside = decode(config, dict.fromkeys(AXES, 1) | {"train.learning_rate": 1e-4})
    inside["train.max_steps"] = 4
    assert encode(config, inside) is not None
    assert encode(config, inside | change) is None
    assert encode(config, {"method.r": 4}) is None


def test_size_counts_points() -> None:
    assert size(config_with({"method.r": [4, 8], "train.max_steps": AXES["train.max_steps"]})) == 8
    assert math.isinf(size(config_with(AXES)))


def test_settings_that_a_drawn_method_lacks_are_left_out() -> None:
    config = config_with({"method.type": ["lora", "p_tuning"], "method.r": [4, 8]})
    check_space(config)
    drawn = trial_config(config, {"method.type": "p_tuning", "method.r": 4})
    assert drawn.method.type == "p_tuning"
    assert {config.method.type for config in variants(config)} == {"lora", "p_tuning", "qlora"}


def test_values_that_fail_only_together_are_found() -> None:
    config = config_with(
        {"train.packing": [False, True], "method.type": ["lora", "prompt_tuning"]},
    )
    with pytest.raises(MethodError, match=r"train\.packing with .*method\.type: .*prompt_tuning"):
        check_space(config)


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
    assert four.place.path.is_relative_to(plan.place.path)
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
    assert find_resumable(config_with({"method.r": [4, 8]}, data, "train.seed=1"), storage) is None

    (plan.place.path / "config.yaml").write_text("method: {type: from the future}\n")
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
