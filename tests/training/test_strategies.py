"""Every strategy computes what one process does, and goes on from what any other has saved."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayfin.config import TrainConfig
from rayfin.config.schema import Strategy
from rayfin.hardware import describe_hardware
from rayfin.methods import METHODS
from rayfin.paths import StoragePath
from rayfin.training import TrialSpec
from rayfin.training.strategies import STRATEGIES, WorkerLayout, refusal
from rayfin.training.zero import ZeroStrategy

pytestmark = pytest.mark.slow

Run = dict[str, Any]
RATE = 2e-3
"""At which AdamW makes nothing of rounding: see test_loss.py."""
SHARDED = [strategy for strategy in STRATEGIES if strategy != "ddp"]


def job(lab: Any, spec: TrialSpec, workers: int = 2, strategy: str = "ddp", **more: Any) -> Run:
    directory = str(more.pop("directory", lab.directory()))
    Path(directory).mkdir(exist_ok=True)
    return {
        "spec": spec.model_dump_json(),
        "directory": directory,
        "workers": workers,
        "strategy": strategy,
        **more,
    }


def losses(result: Run) -> list[float]:
    return [point["loss"] for point in result["curve"] if "loss" in point]


def ten(lab: Any, method: str, settings: dict[str, Any] | None = None, **changes: Any) -> TrialSpec:
    """10 steps of 4 samples; without dropout, which each worker draws for itself."""
    has_dropout = "lora_dropout" in METHODS[method].model_fields
    spec = lab.spec(
        method,
        ({"lora_dropout": 0.0} if has_dropout else {}) | (settings or {}),
        # An odd number of samples to evaluate on, one at a time: the workers' shares are unequal.
        data={"val_size": 0.18},
        per_device_eval_batch_size=1,
        max_steps=10,
        eval_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=RATE,
        **changes,
    )
    found: TrialSpec = spec
    return found


# The rest of the table is run, and written, by experiments/strategy_table.py.
SEEN: dict[str, list[Strategy]] = {
    "full": list(STRATEGIES),
    "lora": list(STRATEGIES),
    "qlora": ["ddp", "fsdp"],
    "p_tuning": ["ddp", "fsdp"],
    "pissa": ["ddp"],
    "LoRA+": ["ddp", "fsdp"],
    "tables": ["deepspeed-zero3", "fsdp"],
}
OF_LORA: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "LoRA+": {"loraplus_lr_ratio": 4},
    "tables": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # plain PEFT's
@pytest.mark.parametrize("name", SEEN)
def test_every_strategy_gives_the_losses_of_one_process(lab: Any, name: str) -> None:
    method, settings = ("lora", OF_LORA[name]) if name in OF_LORA else (name, {})
    spec = ten(lab, method, settings)
    strategies = SEEN[name]
    jobs = [job(lab, spec, workers=1), *(job(lab, spec, strategy=s) for s in strategies)]
    alone, *together = lab.in_groups(jobs)
    assert alone["status"] == "finished", alone["error"]
    assert len(losses(alone)) == 10
    for strategy, result in zip(strategies, together, strict=True):
        assert result["status"] == "finished", (strategy, result["error"])
        assert losses(result) == lab.rounded(losses(alone)), strategy
        for score in ("base_eval_loss", "eval_loss"):
            assert result["metrics"][score] == lab.rounded(alone["metrics"][score]), strategy
        parameters = "trainable_parameters"
        assert result["metrics"][parameters] == alone["metrics"][parameters]
        # Each sample's scores lie beside the base model's of the same sample.
        sure, expected = (end["metrics"]["eval_loss_change_se"] for end in (result, alone))
        assert sure == pytest.approx(expected, rel=0.02), strategy
        # In plain PEFT, on a base of its own, it scores what was recorded.
        model = lab.reloaded(spec, Path(result["adapter"]))
        assert lab.plain_loss(model, spec) == lab.rounded(result["metrics"]["eval_loss"])
        if method == "full":
            same_weights(Path(result["adapter"]), Path(alone["adapter"]))


@pytest.mark.long
@pytest.mark.parametrize("optim", ["adamw_8bit", "adafactor"])
def test_workers_that_hold_an_adapter_whole_train_it_with_any_optimizer(
    lab: Any, optim: str
) -> None:
    spec = ten(lab, "lora", {"r": 64}, save_steps=3, optim=optim)
    dead = job(lab, spec, strategy="fsdp", kill_in=7)
    goes_on = job(lab, spec, directory=dead["directory"])
    jobs = [job(lab, spec, workers=1), job(lab, spec), dead, goes_on]
    alone, together, _, resumed = lab.in_groups(jobs)
    for result in (alone, together, resumed):
        assert result["status"] == "finished", result["error"]
        # A last digit of a gradient decides how a number of 8 bits is rounded.
        assert losses(result) == pytest.approx(losses(alone), rel=1e-4)


def same_weights(ours: Path, theirs: Path) -> None:
    weights, expected = (load_file(path / "model.safetensors") for path in (ours, theirs))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        # A tenth of one step of AdamW, of which there are 10.
        assert (weight - expected[name]).abs().max() < RATE / 10, name


def test_a_killed_group_goes_on_with_any_strategy(lab: Any) -> None:
    """The worker that is killed takes the group with it; the checkpoint is of no strategy."""
    spec = ten(lab, "full", save_steps=3)  # two groups of parameters, and all of them in parts
    whole = job(lab, spec, workers=1)
    killed = [job(lab, spec, strategy=strategy, kill_in=7) for strategy in STRATEGIES]
    # Each goes on as the next one, and the last alone.
    resumed = [
        job(lab, spec, strategy=following, directory=dead["directory"])
        for dead, following in zip(killed, [*SHARDED, "ddp"], strict=True)
    ]
    alone = job(lab, spec, strategy="deepspeed-zero3", kill_in=7)
    back = job(lab, spec, workers=1, directory=alone["directory"])
    expected, *ends = lab.in_groups([whole, *killed, alone, *resumed, back])
    assert ends[: len(killed) + 1] == [None] * (len(killed) + 1)
    pairs = [*zip(STRATEGIES, [*SHARDED, "ddp"], strict=True), ("deepspeed-zero3", "alone")]
    for pair, end in zip(pairs, ends[len(killed) + 1 :], strict=True):
        assert end["status"] == "finished", (pair, end["error"])
        assert losses(end) == lab.rounded(losses(expected)), pair
        base = expected["metrics"]["base_eval_loss"]
        assert end["metrics"]["base_eval_loss"] == lab.rounded(base), pair


def test_workers_that_see_no_common_disk_go_on_from_a_bucket(
    lab: Any, bucket: str, tmp_path: Path
) -> None:
    """With dropout, for which every worker must draw on where it was."""
    spec = lab.spec("lora", {"lora_dropout": 0.2}, max_steps=12, eval_steps=6, save_steps=3)
    # Apart again, and with none of what they had: as on other machines.
    apart = [{"disks": str(tmp_path / name)} for name in ("one", "two", "three")]
    jobs = [
        job(lab, spec, **apart[0]),
        job(lab, spec, **apart[1], kill_in=8) | {"directory": bucket},
        job(lab, spec, **apart[2]) | {"directory": bucket},
    ]
    whole, killed, resumed = lab.in_groups(jobs)
    assert killed is None
    assert whole["status"] == resumed["status"] == "finished", resumed["error"]
    assert losses(resumed) == losses(whole)
    place = StoragePath.at(bucket)
    assert resumed["adapter"] == str(place / "adapter")
    assert (place / "checkpoints").names() == ["checkpoint-6", "checkpoint-9"]
    assert (place / "adapter").download()
    model = lab.reloaded(spec, (place / "adapter").path)
    assert lab.plain_loss(model, spec) == lab.rounded(resumed["metrics"]["eval_loss"])
    assert not list(tmp_path.glob("three/*/objects/**/*.safetensors")), "copies are let go"


def test_one_worker_alone_may_shard(lab: Any) -> None:
    """As it does on a GPU to offload to its host."""
    spec = ten(lab, "full")
    strategies = ["deepspeed-zero2", "deepspeed-zero3", "fsdp"]
    jobs = [job(lab, spec, workers=1), *(job(lab, spec, workers=1, strategy=s) for s in strategies)]
    alone, *sharded = lab.in_groups(jobs)
    for strategy, result in zip(strategies, sharded, strict=True):
        assert result["status"] == "finished", (strategy, result["error"])
        assert losses(result) == lab.rounded(losses(alone)), strategy
        model = lab.reloaded(spec, Path(result["adapter"]))
        assert lab.plain_loss(model, spec) == lab.rounded(result["metrics"]["eval_loss"])


def test_the_user_s_own_settings_reach_the_strategy(lab: Any) -> None:
    spec = ten(lab, "lora")
    assert len(lab.held_out(spec)) % 2 == 1
    own = {"zero_optimization": {"stage": "auto", "stage3_param_persistence_threshold": 0}}
    wrong = {"gradient_clipping": 99.0}
    layers = {"transformer_layer_cls_to_wrap": "NoSuchLayer"}
    alone, good, refused, unknown = lab.in_groups(
        [
            job(lab, spec, workers=1),
            # Not one parameter stays whole then: also the small ones of this model are in parts.
            job(lab, spec, strategy="deepspeed-zero3", own=own),
            job(lab, spec, strategy="deepspeed-zero2", own=wrong),
            job(lab, spec, strategy="fsdp", own=layers),
        ]
    )
    assert good["status"] == "finished", good["error"]
    assert losses(good) == lab.rounded(losses(alone))
    assert refused["status"] == "failed" and "train.max_grad_norm" in refused["error"]
    assert unknown["status"] == "failed" and "NoSuchLayer" in unknown["error"]


@pytest.mark.parametrize(
    ("own", "bucket"), [(None, 12), ({"zero_optimization": {"reduce_bucket_size": 7}}, 7)]
)
def test_deepspeed_s_buffer_is_no_larger_than_what_is_trained(
    own: dict[str, Any] | None, bucket: int
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(3, 4, bias=False))
    model[0].requires_grad_(False)
    zero = ZeroStrategy(
        WorkerLayout(2, "deepspeed-zero2", own=own), describe_hardware(False), TrainConfig()
    )
    assert zero.settings_for(model)["zero_optimization"]["reduce_bucket_size"] == bucket


def test_zero_keeps_what_a_method_needs_beside_what_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counting(METHODS["lora"]):  # type: ignore[misc,name-defined]
        @classmethod
        def state_beside(cls, model: torch.nn.Module) -> dict[str, torch.Tensor]:
            return {"counts": model.counts}  # type: ignore[dict-item]

        @classmethod
        def load_state_beside(cls, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
            model.counts = state["counts"]

    monkeypatch.setitem(METHODS, "counting", Counting)
    monkeypatch.setattr("deepspeed.utils.safe_get_full_fp32_param", lambda parameter: parameter)
    zero = ZeroStrategy(WorkerLayout(2, "deepspeed-zero2"), describe_hardware(False), TrainConfig())
    model, fresh = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    model.counts, fresh.counts = torch.tensor([3, 5]), torch.tensor([0, 0])
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        found.append(zero.weights(model))
    assert set(found[0]) == {"weight", "bias", "counts"} and not found[1]
    zero.load_weights(fresh, found[0])
    assert torch.equal(fresh.counts, model.counts)
    assert torch.equal(fresh.weight, model.weight)


def test_what_is_refused_has_a_reason_and_a_way_out() -> None:
    refused = [
        (strategy, name, why)
        for strategy, (name, method) in product(STRATEGIES, METHODS.items())
        if (why := refusal(strategy, method.model_validate({"type": name}))) is not None
    ]
    assert refused and not any(strategy == "ddp" for strategy, *_ in refused)
    assert all("use " in why for *_, why in refused)
