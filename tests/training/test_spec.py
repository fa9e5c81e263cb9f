"""A fingerprint names what is computed: every hyperparameter, and nothing of where it runs."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest

from rayfin.config import Config, TrainConfig
from rayfin.methods import METHODS
from rayfin.training import TrialResult, TrialSpec

# How often one looks, what is kept, and how a step's samples are cut into batches, is not what is
# computed.
FREE = {
    *("per_device_eval_batch_size", "eval_steps", "save_steps", "stage"),
    *("sample_generations", "save_only_model"),
}
OTHER: dict[str, Any] = {
    "lr_scheduler_type": "linear",
    "train_on": "last",
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "lr_scheduler_kwargs": {"num_cycles": 1.5},
    "warmup_steps": 4,
    "neftune_noise_alpha": 5.0,
    "target_modules": ["q_proj"],
    "feedforward_modules": ["down_proj"],
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": "a text",
    "encoder_reparameterization_type": "LSTM",
    "quantization_bit": 8,
    "encoder_hidden_size": 7,
    "prefix_projection": True,
    "exclude_modules": ["k_proj"],
    "layers_to_transform": [1],
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4.0},
    "init_lora_weights": "gaussian",
    "loraplus_lr_ratio": 4.0,
    "modules_to_save": ["lm_head"],
    "init_from": "/",  # a directory that is there
    "num_train_epochs": 3.0,
    "early_stopping_patience": 2,
    "keep": "best",
}


def other(name: str, value: Any) -> Any:
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2 + 0.01


def fingerprint(sections: dict[str, Any], **where: Any) -> str:
    spec = TrialSpec.of(Config.model_validate(sections))
    return spec.fingerprint(**({"model_identity": "tiny@1", "data_digest": "d"} | where))


@pytest.mark.parametrize("name", sorted(set(TrainConfig.model_fields) - FREE))
def test_every_training_setting_enters(name: str) -> None:
    beside = {"early_stopping_patience": 2} if name == "early_stopping_threshold" else {}
    changed = {"train": beside | {name: other(name, getattr(TrainConfig(), name))}}
    assert fingerprint(changed) != fingerprint({"train": beside})


@pytest.mark.parametrize("train", [{"keep": "best"}, {"early_stopping_patience": 2}])
def test_when_evaluations_are_compared_enters_when_and_by_what(train: dict[str, Any]) -> None:
    plain = fingerprint({"train": train})
    assert fingerprint({"train": train | {"eval_steps": 15}}) == plain, "a quarter of 60"
    assert fingerprint({"train": train | {"eval_steps": 5}}) != plain
    assert fingerprint({"train": train, "sweep": {"metric": "exact_match"}}) != plain
    assert fingerprint({"train": train | {"save_steps": 5}}) == plain


def test_epochs_enter_as_such() -> None:
    epochs = {"train": {"num_train_epochs": 2}}
    spec = TrialSpec.of(Config.model_validate(epochs))
    found = {
        spec.with_rows(rows).fingerprint(model_identity="tiny@1", data_digest="d")
        for rows in (10, 1000)
    }
    assert found == {fingerprint(epochs)} != {fingerprint({"train": {"num_train_epochs": 3}})}


EFFECTIVE = {
    "p_tuning": {"encoder_reparameterization_type": "LSTM"},
    "prefix_tuning": {"prefix_projection": True},
    "prompt_tuning": {"prompt_tuning_init": "TEXT"},
}
"""What makes the rest of a method's settings have an effect."""


def test_every_setting_of_every_method_enters() -> None:
    for kind, config in METHODS.items():
        for name in set(config.model_fields) - {"type"}:
            effective = EFFECTIVE.get(kind, {})
            section = {"type": kind} | ({} if name in effective else effective)
            changed = section | {name: other(name, getattr(config.model_validate(section), name))}
            assert fingerprint({"method": changed}) != fingerprint({"method": section}), name
    kinds = {fingerprint({"method": {"type": kind}}) for kind in METHODS}
    assert len(kinds) == len(METHODS)


BEFORE = {
    "full": "f6633319825e78a6",
    "lora": "6359a0929f93d5c9",
    "qlora": "cfd48511033b775e",
    "dora": "c7ada058f2f7504e",
    "rslora": "b6ca890fc60dcd42",
    "adalora": "26cdb813fdf75e02",
    "ia3": "cd320a15a27a3f4a",
    "p_tuning": "e7ecf55fc0ebf397",
    "prefix_tuning": "36b25ddbb0724986",
    "prompt_tuning": "e816d7be12826d24",
}
"""Fingerprints of each method as it comes, by the rayfin before methods had more settings."""


@pytest.mark.parametrize("kind", BEFORE)
def test_trials_in_older_histories_are_found_again(kind: str) -> None:
    assert fingerprint({"method": {"type": kind}}) == BEFORE[kind]


def test_model_data_and_length_enter_by_content() -> None:
    plain = fingerprint({})
    assert fingerprint({}, model_identity="tiny@2") != plain
    assert fingerprint({}, data_digest="e") != plain
    assert fingerprint({"data": {"max_length": 99}}) != plain
    assert fingerprint({"model": {"dtype": "bfloat16"}}) != plain
    assert fingerprint({"model": {"attn_implementation": "eager"}}) != plain


@pytest.mark.parametrize(
    "sections",
    [
        {"scaling": {"num_workers": 4, "use_gpu": False, "strategy": "ddp"}},
        {"storage": "elsewhere", "history": "sqlite:///h.sqlite"},
        {"data": {"path": "elsewhere.jsonl"}, "model": {"name": "copy-of-it"}},
        {"train": {"eval_steps": 3, "save_steps": 2, "per_device_eval_batch_size": 3}},
        {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
        {"sweep": {"num_samples": 99}, "publish": {"name": "x"}},
    ],
    ids="-".join,
)
def test_where_it_runs_does_not_enter(sections: dict[str, Any]) -> None:
    assert fingerprint(sections) == fingerprint({})


@pytest.mark.parametrize(
    ("sections", "same"),
    [
        (
            {"method": {"type": "lora", "quantization_bit": 8}},
            {"method": {"type": "qlora", "quantization_bit": 8}},
        ),
        (
            {"method": {"type": "p_tuning", "encoder_num_layers": 3, "encoder_dropout": 0.2}},
            {"method": {"type": "p_tuning"}},
        ),
        (
            {"method": {"type": "prefix_tuning", "encoder_hidden_size": 8}},
            {"method": {"type": "prefix_tuning"}},
        ),
        (
            {"method": {"type": "prompt_tuning", "prompt_tuning_init_text": "Say"}},
            {"method": {"type": "prompt_tuning"}},
        ),
        (
            {"train": {"lr_scheduler_type": "constant", "warmup_ratio": 0.2}},
            {"train": {"lr_scheduler_type": "constant"}},
        ),
        (
            {"train": {"optim": "adamw_bnb_8bit"}},
            {"train": {"optim": "adamw_8bit"}},
        ),
        (
            {
                "method": {
                    "type": "lora",
                    "loraplus_lr_ratio": 1,
                    "exclude_modules": ["k_proj", "q_proj"],
                    "modules_to_save": ["lm_head", "embed_tokens"],
                    "layers_to_transform": [1, 0],
                    "rank_pattern": {"v_proj": 8},
                    "alpha_pattern": {"v_proj": 16, "o_proj": 4},
                }
            },
            {
                "method": {
                    "type": "lora",
                    "exclude_modules": ["q_proj", "k_proj", "q_proj"],
                    "modules_to_save": ["embed_tokens", "lm_head"],
                    "layers_to_transform": [0, 1],
                    "alpha_pattern": {"o_proj": 4},
                }
            },
        ),
    ],
    ids=[
        "lora over 4 bit",
        "MLP encoder",
        "no projection",
        "no text",
        "constant rate",
        "alias",
        "orders",
    ],
)
def test_what_others_leave_without_effect_does_not_enter(
    sections: dict[str, Any], same: dict[str, Any]
) -> None:
    assert fingerprint(sections) == fingerprint(same)


def test_evaluations_enter_where_the_learning_rate_follows_them() -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 3}
    assert fingerprint({"train": plateau}) != fingerprint({"train": plateau | {"eval_steps": 4}})


def test_batches_enter_through_the_samples_of_a_step() -> None:
    plain = fingerprint({"train": {"per_device_train_batch_size": 8}})
    halves = {"per_device_train_batch_size": 4}
    assert fingerprint({"train": halves | {"gradient_accumulation_steps": 2}}) == plain
    assert fingerprint({"train": halves}) != plain


def test_a_result_is_plain_values() -> None:
    result = TrialResult("finished", {"eval_loss": 1.5}, adapter=Path("a") / "b")
    values = json.loads(json.dumps(result.as_dict()))
    assert values["adapter"] == "a/b" and values["metrics"] == {"eval_loss": 1.5}
    assert set(values) == set(typing.get_type_hints(TrialResult))
