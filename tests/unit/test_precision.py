"""bfloat16 products on processors: what they compute, and when rayfin chooses them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayfin import hardware
from rayfin.cli import main
from rayfin.config import Config, ServeConfig
from rayfin.config.schema import ModelConfig
from rayfin.errors import ConfigError, HardwareError, MethodError, ModelError
from rayfin.history import History
from rayfin.history.driver import interrupted
from rayfin.methods import MethodConfig
from rayfin.methods.attach import attach, detach
from rayfin.models import dtype_on, load_base
from rayfin.models.mixed_precision import BFloat16Linear
from rayfin.paths import Storage
from rayfin.training import TrialSpec
from rayfin.training.combination import check_combination
from rayfin.training.precision import precision_note, with_precision
from rayfin.tuning import preflight, single, sweep
from rayfin.tuning.plan import SweepPlan, new_plan
from rayfin.tuning.rows import started

IDS = torch.arange(64).view(2, 32)
AMX = frozenset({"avx2", "avx512_bf16", "amx_tile", "amx_bf16"})


def of(dtype: str = "auto", method: str = "lora", **sections: Any) -> Config:
    model = {"name": "tiny", "dtype": dtype}
    return Config.model_validate({"model": model, "method": {"type": method}} | sections)


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the processor has, and how much faster its bfloat16 products are."""
    monkeypatch.setenv("RAYFIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "has_gpu", lambda *, asked: False)

    def set_up(flags: frozenset[str], gain: float) -> list[float]:
        asked: list[float] = []

        def measured() -> float:
            asked.append(gain)
            return gain

        monkeypatch.setattr(hardware, "_processor", lambda: ("A processor", flags))
        monkeypatch.setattr(hardware, "_measured_gain", measured)
        return asked

    return set_up


def test_only_the_products_of_frozen_weights_are_rounded() -> None:
    base = load_base(ModelConfig(name="tiny", dtype="bf16-mixed"), None, "cpu")
    whole = load_base(ModelConfig(name="tiny"), None, "cpu")
    layer = base.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, BFloat16Linear)
    inputs = torch.randn(3, 64)
    expected = torch.nn.functional.linear(inputs.bfloat16(), layer.weight).float()
    assert torch.equal(layer(inputs), expected) and layer(inputs).dtype == torch.float32
    dtypes = {n: p.dtype for n, p in base.named_parameters()}
    assert dtypes["model.norm.weight"] == dtypes["model.embed_tokens.weight"] == torch.float32
    assert dtypes["lm_head.weight"] == dtypes["model.layers.1.mlp.up_proj.weight"] == torch.bfloat16
    error = (base(IDS).logits - whole(IDS).logits).norm() / whole(IDS).logits.norm()
    assert base(IDS).logits.dtype == torch.float32 and 0 < error < 0.02


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3", "oft", "loha", "p_tuning"])
def test_adapters_are_trained_in_float32_over_it(method: str) -> None:
    base = load_base(ModelConfig(name="tiny", dtype="bf16-mixed"), None, "cpu")
    before = base(IDS).logits
    model: Any = attach(base, MethodConfig.model_validate({"type": method}), 8, "")
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}
    detach(model)
    assert torch.equal(base(IDS).logits, before)


def test_it_is_measured_once_and_chosen_only_where_it_is_clearly_faster(
    processor: Any, tmp_path: Path
) -> None:
    asked = processor(AMX, 4.5)
    chosen = with_precision(of())
    assert chosen.model.dtype == "bf16-mixed"
    assert precision_note(chosen) and not precision_note(of())
    assert with_precision(of()) == chosen and asked == [4.5]
    (known,) = json.loads((tmp_path / "cache" / "bfloat16.json").read_text()).items()
    assert known[0].startswith("A processor, torch 2.") and known[1] == 4.5
    (tmp_path / "cache" / "bfloat16.json").write_text("{torn")
    processor(AMX, 1.9)
    assert with_precision(of()) == of()
    processor(AMX - {"amx_bf16"}, 9.0)
    assert with_precision(of()) == of() and hardware.bfloat16_gain() is None


@pytest.mark.parametrize(
    "config",
    [
        of("float32"),
        of("bfloat16"),
        of(method="qlora"),
        of(method="full"),
        of(method="lora", scaling={"num_workers": 2}),
        of(method="lora", scaling={"strategy": "fsdp"}),
        of(sweep={"parameters": {"method.type": ["lora", "qlora"]}}),
        of(sweep={"parameters": {"model.dtype": ["auto", "float32"]}}),
        of(method="lora", sweep={"parameters": {"method.init_lora_weights": ["pissa", True]}}),
    ],
    ids=str,
)
def test_what_it_is_not_chosen_for(config: Config, processor: Any) -> None:
    processor(AMX, 4.5)
    assert with_precision(config) == config


def test_the_fingerprint_tells_it_apart() -> None:
    where = {"model_identity": "tiny@1", "data_digest": "d"}
    prints = {TrialSpec.of(of(dtype)).fingerprint(**where) for dtype in ("auto", "bf16-mixed")}
    assert len(prints) == 2


def test_what_it_can_t_do_is_refused() -> None:
    with pytest.raises(MethodError, match=r"bf16-mixed can't work with method\.type=qlora.*4 bits"):
        check_combination(of("bf16-mixed", "qlora"))
    with pytest.raises(MethodError, match=r"base's own weights.*use model\.dtype=auto or float32"):
        check_combination(of("bf16-mixed", "full"))
    with pytest.raises(ConfigError, match=r"num_workers=2: workers share weights of one type"):
        check_combination(of("bf16-mixed", scaling={"num_workers": 2}))
    with pytest.raises(ConfigError, match=r"strategy=fsdp: workers share weights of one type"):
        check_combination(of("bf16-mixed", scaling={"strategy": "fsdp"}))
    with pytest.raises(HardwareError, match=r"dtype=bf16-mixed is for processors.*use_gpu=false"):
        check_combination(of("bf16-mixed", scaling={"use_gpu": True}))
    with pytest.raises(ModelError, match=r"for processors.*use model\.dtype=auto"):
        dtype_on(ModelConfig(dtype="bf16-mixed"), "cuda")
    with pytest.raises(ValueError, match="bf16-mixed is for training; use auto, float32"):
        ServeConfig.model_validate({"model": {"dtype": "bf16-mixed"}})


def test_a_gpu_refuses_it_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(hardware.describe_hardware(use_gpu=False), device="cuda")
    monkeypatch.setattr(preflight, "describe_hardware", lambda use_gpu: gpu)
    config = of("bf16-mixed")
    with pytest.raises(HardwareError, match=r"dtype=bf16-mixed is for processors"):
        preflight.check_run(new_plan(config, Storage.at(tmp_path)), [config], None)


@pytest.mark.parametrize("began", ["auto", "bf16-mixed"])
def test_an_interrupted_training_goes_on_in_the_precision_in_which_it_began(
    began: str, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that would choose the other one."""
    processor(AMX, 4.5 if began == "auto" else 0.5)
    rows = [{"prompt": f"red {n}", "completion": "der"} for n in range(20)]
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    storage, told = Storage.at(tmp_path / "runs"), []
    config = of(data={"path": str(data)})
    trial = SweepPlan(single.RUNS, of(began, data={"path": str(data)}), storage).trial({})
    gone_on: list[Any] = []

    def train_locked(plan: Any, trial: Any, *_: Any) -> None:
        gone_on.append((plan.config.model.dtype, trial.spec.model.dtype, trial.trial_id))

    monkeypatch.setattr(single, "_train_locked", train_locked)
    with History.open(f"sqlite:///{tmp_path}/history.sqlite") as history:
        history.put(interrupted(started(trial)))
        single.train_once(config, history=history, storage=storage, show=told.append)
        assert gone_on == [(began, began, trial.trial_id)]
        assert f"was interrupted in model.dtype={began}" in "".join(told)
        gpu = replace(hardware.describe_hardware(use_gpu=False), device="cuda")
        monkeypatch.setattr(single, "describe_hardware", lambda use_gpu: gpu)
        single.train_once(config, history=history, storage=storage, show=told.append)
        assert (gone_on[1] == gone_on[0]) == (began == "auto")
        assert ("use_gpu=false goes on with it" in "".join(told)) == (began == "bf16-mixed")


def test_an_interrupted_sweep_goes_on_in_the_precision_in_which_it_began(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(AMX, 0.5)
    storage = Storage.at(tmp_path)
    plan = new_plan(of("bf16-mixed"), storage)
    plan.save()
    config, (line,) = sweep._in_precision(of(), storage, True, None)
    assert config.model.dtype == "bf16-mixed" and plan.sweep_id in line
    assert sweep._in_precision(of(), storage, False, None) == (of(), [])
    assert sweep._in_precision(of("float32"), storage, True, None) == (of("float32"), [])
    gpu = replace(hardware.describe_hardware(use_gpu=False), device="cuda")
    monkeypatch.setattr(sweep, "describe_hardware", lambda use_gpu: gpu)
    with pytest.raises(ConfigError, match=rf"{plan.sweep_id} began on a processor.*use_gpu=false"):
        sweep._in_precision(of(), storage, True, None)


def test_the_guide_s_commands_train_in_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"red {n}", "completion": "der"} for n in range(20)]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    guide = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", guide.partition("## Precision")[2], re.DOTALL)
    for command in block.strip().splitlines():
        assert main(shlex.split(command)[1:]) == 0
    with History.open(f"sqlite:///{tmp_path}/runs/history.sqlite") as history:
        found = {row.spec["model"]["dtype"]: row for row in history.trials()}
    losses = [found[dtype].metrics["eval_loss"] for dtype in ("bf16-mixed", "float32")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)
    assert len({row.fingerprint for row in found.values()}) == 2


def test_the_probe_answers_with_a_ratio() -> None:
    assert 0 < hardware._measured_gain() < 1000
