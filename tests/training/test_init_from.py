"""`method.init_from`: a training starts from an adapter, and continues the one that made it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayfin.advisor.features import row_of
from rayfin.cli import main
from rayfin.config import Config, build_config
from rayfin.errors import AdapterError, MethodError, RayfinError
from rayfin.history import History
from rayfin.methods import METHODS
from rayfin.paths import Storage
from rayfin.training import TrialSpec, starting_checks
from rayfin.training.batches import plan_epochs, plan_samples
from rayfin.training.combination import check_combination
from rayfin.training.starting_adapter import pinned, read_starting_adapter
from rayfin.training.starting_checks import check_starting_adapter
from rayfin.tuning.plan import SweepPlan, find_resumable

STATE = "training_state.safetensors"
GUIDE = Path(__file__).parents[2] / "docs" / "adapters.md"
CONTINUED = [name for name in METHODS if name not in ("full", "adalora")]
CONSTANT: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "group_by_length": False,
    "eval_steps": 7,
}


def in_two_parts(
    lab: Any, method: str, settings: dict[str, Any] | None = None, **train: Any
) -> Any:
    """The trial of the second 7 steps, and the specification of one of all 14."""
    train = CONSTANT | train
    first = lab.finish(lab.spec(method, settings, max_steps=7, **train))
    assert first.result.error is None
    own = {"init_from": str(first.adapter)} | (settings or {})
    return (
        lab.finish(lab.spec(method, own, max_steps=7, **train)),
        lab.spec(method, settings, max_steps=14, **train),
    )


def assert_is(lab: Any, second: Any, spec: TrialSpec) -> None:
    whole = lab.finish(spec)
    assert (second.result.status, second.result.error) == ("finished", None)
    for file in ("adapter_model.safetensors", STATE):
        found, expected = (load_file(one.adapter / file) for one in (second, whole))
        assert found.keys() == expected.keys()
        # The same numbers went through the same operations: not only within 1e-4.
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    for name in ("eval_loss", "exact_match", "base_eval_loss"):
        assert second.result.metrics[name] == whole.result.metrics[name], name
    started = read_starting_adapter(Path(second.spec.method.init_from))
    told = second.result.scenario["init_from"]
    assert told == {
        "adapter": second.spec.method.init_from,
        "identity": started.identity,
        "continues": True,
        "steps": 7,
    }
    assert second.result.metrics["steps"] == 7
    assert read_starting_adapter(second.adapter).steps == 14


@pytest.mark.numeric
@pytest.mark.parametrize("method", ["lora", "p_tuning", "prompt_tuning"])
def test_seven_steps_and_seven_more_are_fourteen(method: str, lab: Any) -> None:
    """With dropout, and with AdamW, whose state the adapter brings."""
    assert_is(lab, *in_two_parts(lab, method))


@pytest.mark.long
@pytest.mark.numeric
@pytest.mark.parametrize(
    "method",
    [
        *sorted({*CONTINUED} - {"lora", "p_tuning", "prompt_tuning"}),
        "prefix_projection",
        "lora with tables",
    ],
)
def test_seven_and_seven_are_fourteen_for_every_method(method: str, lab: Any) -> None:
    settings: dict[str, Any] | None = None
    if method == "prefix_projection":
        method, settings = "prefix_tuning", {"num_virtual_tokens": 4, "prefix_projection": True}
    if method == "lora with tables":
        method, settings = "lora", {"modules_to_save": ["lm_head"], "loraplus_lr_ratio": 4}
    assert_is(lab, *in_two_parts(lab, method, settings))


@pytest.mark.numeric
def test_a_continued_trial_that_is_interrupted_goes_on_to_the_same_end(lab: Any) -> None:
    second, _ = in_two_parts(lab, "lora")
    train = second.spec.train.model_copy(update={"eval_steps": 3, "save_steps": 2})
    spec = second.spec.model_copy(update={"train": train})

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    directory = lab.directory()
    with pytest.raises(KeyboardInterrupt):
        lab.run(spec, report=interrupt, directory=directory)
    resumed = lab.run(spec, directory=directory)
    assert resumed.metrics["eval_loss"] == second.result.metrics["eval_loss"]
    found, expected = (load_file(one / STATE) for one in (directory / "adapter", second.adapter))
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_another_course_starts_from_the_weights_alone(lab: Any) -> None:
    first = lab.finish(lab.spec("lora", max_steps=7, **CONSTANT))
    own = {"init_from": str(first.adapter)}
    train = CONSTANT | {"max_steps": 1, "eval_steps": 1, "learning_rate": 1e-12, "seed": 5}
    result = lab.run(lab.spec("lora", own, **train))
    assert result.metrics["eval_loss"] == lab.rounded(first.result.metrics["eval_loss"])
    assert result.metrics["base_eval_loss"] == first.result.metrics["base_eval_loss"]
    assert result.scenario["init_from"]["continues"] is False
    assert read_starting_adapter(result.adapter.path).steps == 1
    small = lab.run(lab.spec("lora", save_only_model=True, max_steps=1, eval_steps=1))
    assert not (small.adapter.path / STATE).exists()


def test_other_arguments_of_the_optimizer_start_from_the_weights_alone(lab: Any) -> None:
    """With momentum there is more state than the adapter has."""
    train = {"optim": "rmsprop", "max_steps": 1, "eval_steps": 1}
    first = lab.finish(lab.spec("lora", **train))
    own = {"init_from": str(first.adapter)}
    result = lab.run(lab.spec("lora", own, optim_args="momentum=0.9", **train))
    assert (result.status, result.error) == ("finished", None)
    assert result.scenario["init_from"]["continues"] is False


def test_a_course_names_which_samples_come_next() -> None:
    def course(**train: Any) -> str:
        return TrialSpec.of(build_config({"train": train})).course("d")

    assert course(train_on="last") != course() == course(group_by_length=False)
    epochs = {"num_train_epochs": 1}
    assert course(**epochs, group_by_length=False) != course(**epochs) != course()


@pytest.mark.parametrize("group", [False, True])
def test_parts_see_what_the_whole_sees(group: bool) -> None:
    """A sample comes again only after all others, however a training is cut."""
    same: dict[str, Any] = {"batch_size": 3, "seed": 4, "group_by_length": group}
    lengths = [n % 7 for n in range(20)]
    whole = plan_samples(lengths, max_steps=14, **same)
    parts = [plan_samples(lengths, max_steps=7, steps_before=n, **same) for n in (0, 7)]
    joined = [*parts[0], *parts[1]]
    assert sorted(joined) == sorted(whole)
    assert group or joined == whole


@pytest.mark.parametrize("group", [False, True])
def test_an_epoch_and_another_are_two(group: bool) -> None:
    same: dict[str, Any] = {"batch_size": 3, "seed": 4, "group_by_length": group}
    lengths = [n % 7 for n in range(20)]  # 7 steps an epoch
    whole = plan_epochs(lengths, max_steps=14, **same)
    parts = [plan_epochs(lengths, max_steps=7, steps_before=n, **same) for n in (0, 7)]
    assert [*parts[0], *parts[1]] == whole


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 4 of two modules."""
    spec = lab.spec("lora", {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0})
    return Path(lab.finish(spec).adapter)


SAME = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def checked(directory: Path, method: dict[str, Any], **model: Any) -> None:
    sections = {"model": {"name": "tiny"} | model, "method": method, "train": {"max_steps": 7}}
    config = Config.model_validate(sections)
    check_combination(config)
    check_starting_adapter(read_starting_adapter(directory), config)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": 8}, "has r 4, and method.r=8; set method.r=4"),
        (
            {"lora_alpha": 32},
            "has lora_alpha 16, and method.lora_alpha=32; set method.lora_alpha=16",
        ),
        ({"type": "dora"}, "an adapter of lora, and method.type=dora; set method.type=lora"),
        ({"type": "rslora"}, "an adapter of lora, and method.type=rslora; set method.type=lora"),
        (
            {"target_modules": ["q_proj"]},
            "has q_proj,v_proj as target_modules, and this trial q_proj; "
            "set method.target_modules=[q_proj,v_proj]",
        ),
        ({"layers_to_transform": [0]}, "(model.layers.1.self_attn.q_proj is in one of them only)"),
        (
            {"modules_to_save": ["lm_head"]},
            "has none as modules_to_save, and this trial lm_head; set method.modules_to_save=null",
        ),
        (
            {"rank_pattern": {"v_proj": 2}},
            "has rank_pattern {}, and method.rank_pattern={v_proj: 2}",
        ),
    ],
    ids=str,
)
def test_another_shape_is_refused_with_both_values(
    changes: dict[str, Any], told: str, adapter: Path
) -> None:
    checked(adapter, SAME)
    checked(adapter, SAME | {"lora_dropout": 0.5, "loraplus_lr_ratio": 2})
    checked(adapter, SAME | {"type": "qlora", "quantization_bit": 4})
    with pytest.raises(MethodError, match=re.escape(told)) as error:
        checked(adapter, SAME | changes)
    assert "\n" not in str(error.value) and "method.init_from" in str(error.value)


def test_another_kind_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"adapter of lora, and method\.type=ia3; set method"):
        checked(adapter, {"type": "ia3"})
    from rayfin.models import write_tiny

    write_tiny(tmp_path / "other", seed=1)
    with pytest.raises(MethodError, match=r"was trained on 'tiny' .*set model\.name=tiny, or give"):
        checked(adapter, SAME, name=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"type": "full"}, "name the directory of the model to continue by model.name"),
        ({"type": "adalora"}, "has only those that were left at the end; train anew with more"),
        ({"type": "lora", "init_lora_weights": "eva"}, "leave method.init_lora_weights out"),
        ({"type": "vera", "d_initial": 0.5}, "leave method.d_initial out"),
        (
            {"type": "prompt_tuning", "prompt_tuning_init": "RANDOM"},
            "leave method.prompt_tuning_init out",
        ),
    ],
    ids=str,
)
def test_methods_and_settings_without_a_continuation(method: dict[str, Any], told: str) -> None:
    config = Config.model_validate({"method": method | {"init_from": "support@1"}})
    with pytest.raises(MethodError, match=re.escape(told)):
        check_combination(config)


def test_p_tuning_needs_its_encoder(lab: Any, tmp_path: Path) -> None:
    settings = {"num_virtual_tokens": 4}
    spec = lab.spec("p_tuning", settings, max_steps=7, **CONSTANT)
    shutil.copytree(lab.finish(spec).adapter, tmp_path / "own")
    checked(tmp_path / "own", {"type": "p_tuning"} | settings)
    with pytest.raises(MethodError, match=r"num_virtual_tokens 4, and method.num_virtual_tokens=5"):
        checked(tmp_path / "own", {"type": "p_tuning", "num_virtual_tokens": 5})
    (tmp_path / "own" / STATE).unlink()
    with pytest.raises(MethodError, match="put out, and not the encoder, which is trained"):
        checked(tmp_path / "own", {"type": "p_tuning"} | settings)


def test_what_is_no_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    save_file({"moments/step": torch.zeros(1)}, own / STATE)
    with pytest.raises(AdapterError, match=r"no training state of rayfin's; remove it"):
        read_starting_adapter(own)
    (own / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"^method\.init_from: .*has no adapter_model"):
        read_starting_adapter(own)
    for name in ("support@3", "sup/port", str(tmp_path / "nowhere")):
        config = Config.model_validate(
            {"method": {"type": "lora", "init_from": name}, "storage": str(tmp_path)}
        )
        with pytest.raises(AdapterError, match=r"^method\.init_from: "):
            pinned(config)


# --- what names a trial, and where it comes from ------------------------------------------------


def test_the_guide_s_commands_and_the_lineage(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(lab.data, "answers.jsonl")
    section = GUIDE.read_text(encoding="utf-8").partition("## Continuing one")[2]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    train, again, show = block.replace("\\\n", " ").strip().splitlines()
    assert main(shlex.split(train)[1:]) == 0
    capsys.readouterr()
    assert main(shlex.split(again)[1:]) == 0
    assert "continues support@1 at step 31 of its data" in capsys.readouterr().err
    assert main(shlex.split(show)[1:]) == 0
    told = capsys.readouterr().out
    assert re.search(r"init_from\.adapter +support@1\s", told)
    with History.open(f"sqlite:///{tmp_path}/runs/history.sqlite") as history:
        second, first = history.trials(newest_first=True)
    assert second.scenario["init_from"]["adapter"] == "support@1"
    assert second.metrics["base_eval_loss"] == first.metrics["base_eval_loss"]
    rows = [row_of(row) for row in (first, second)]
    assert rows[0] is not None and rows[1] is not None
    assert rows[0]["task"] == rows[1]["task"] and rows[0]["group"] != rows[1]["group"]

    # A rank that is swept is refused before Ray starts, with the axis' value.
    sweep = [word for word in shlex.split(again)[2:] if not word.startswith("publish")]
    assert main(["sweep", *sweep, "sweep.parameters.method.r=[8,16]"]) == 2
    assert "has r 8, and method.r=16; set method.r=8" in capsys.readouterr().err


def test_an_adapter_s_content_names_the_trial(adapter: Path, tmp_path: Path) -> None:
    from rayfin.adapters import Registry

    storage = Storage.open(str(tmp_path / "runs"))
    registry = Registry(storage.adapters)
    registry.publish("support", adapter)

    def plan(name: str, **settings: Any) -> SweepPlan:
        method = SAME | {"init_from": name} | settings
        sections = {"model": {"name": "tiny"}, "method": method, "data": {"path": str(data)}}
        config = Config.model_validate(sections | {"storage": str(tmp_path / "runs")})
        return SweepPlan("rows-lora-1", config, storage)

    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n' * 9)
    by_name = plan("support").trial({})
    assert by_name.spec.method.init_from == str(registry.resolve("support@1").path)
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    names = ("support@1", str(adapter), str(copy))
    assert {plan(name).trial({}).fingerprint for name in names} == {by_name.fingerprint}
    anew = plan("support").config.method.model_copy(update={"init_from": None})
    config = plan("support").config.model_copy(update={"method": anew})
    assert SweepPlan("test", config, storage).trial({}).fingerprint != by_name.fingerprint

    # `latest` moves on: another trial, but not within a sweep that has begun.
    begun = plan("support")
    begun.save()
    assert begun.trial({}).fingerprint == by_name.fingerprint
    weights = load_file(copy / "adapter_model.safetensors")
    (copy / "adapter_model.safetensors").unlink()
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, copy / "adapter_model.safetensors"
    )
    registry.publish("support", copy)
    assert begun.trial({}).fingerprint == by_name.fingerprint
    moved = plan("support").trial({})
    assert moved.fingerprint != by_name.fingerprint
    assert moved.fingerprint == plan("support@2").trial({}).fingerprint
    found = [find_resumable(plan(name).config, storage) for name in ("support", "support@1")]
    assert [it and it.trial({}).fingerprint for it in found] == [by_name.fingerprint] * 2
    assert find_resumable(plan("support@2").config, storage) is None

    path = registry.resolve("support@2").path / "adapter_model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RayfinError, match=r"^method\.init_from: .*support@2.*changed since"):
        plan("support@2").trial({})


def test_a_binding_to_four_bits_is_kept(adapter: Path) -> None:
    start = replace(read_starting_adapter(adapter), bits=4)
    config = Config.model_validate({"model": {"name": "tiny"}, "method": SAME})
    with pytest.raises(MethodError, match=r"4 bits have lost, and method\.quantization_bit=null"):
        check_starting_adapter(start, config)
    assert json.loads((adapter / "rayfin.json").read_text())["files"][STATE]["bytes"] > 0


def test_bitsandbytes_is_imported_before_peft_imports_it_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def imported() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(starting_checks, "import_bitsandbytes", imported, raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(KeyboardInterrupt):
        starting_checks.check_starting_adapter(cast("Any", None), Config())
