"""A trial that is killed goes on where it was, and ends with the bits of one that ran through.

The same numbers go through the same operations, on any processor. With another number of threads,
or on another machine, sums may have another order, and then the last digits differ.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import SchedulerType

from rayfin.config import Config
from rayfin.config.optimizers import OPTIMIZERS
from rayfin.errors import ConfigError
from rayfin.history import History, TrialRecord
from rayfin.paths import Storage, StoragePath
from rayfin.training import TrialSpec
from rayfin.training.checkpoint import latest_checkpoint, load_progress
from rayfin.training.optimization import check_optimization
from rayfin.training.spec import TrialResult
from rayfin.training.trainer import TrialTrainer
from rayfin.training.trial import run_trial
from rayfin.training.trial_cache import TrialCache
from rayfin.tuning.driver_lock import driver_lock
from rayfin.tuning.single import train_once


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that trials in this process take from now on."""
    taken: list[int] = []
    compute_loss = TrialTrainer.compute_loss

    def counted(self: TrialTrainer, *args: Any, **kwargs: Any) -> Any:
        taken.append(self.state.global_step)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(TrialTrainer, "compute_loss", counted)
    return taken


def saved_at_every_step(spec: TrialSpec) -> TrialSpec:
    return spec.model_copy(update={"train": spec.train.model_copy(update={"save_steps": 1})})


def kill_in_a_step(lab: Any, specs: list[TrialSpec]) -> list[tuple[Path, int]]:
    """Starts each trial in a process that dies in a random step; its directory and that step."""
    jobs = [
        {
            "spec": saved_at_every_step(spec).model_dump_json(),
            "directory": str(lab.root / f"killed-{spec.method.type}-{number}"),
            "step": random.randint(1, spec.train.max_steps - 1),
        }
        for number, spec in enumerate(specs, len(list(lab.root.iterdir())))
    ]
    for job in jobs:
        Path(job["directory"]).mkdir()
    assert [end["signal"] for end in lab.killed(jobs)] == [signal.SIGKILL] * len(jobs)
    return [(Path(job["directory"]), job["step"]) for job in jobs]


@pytest.fixture(scope="module")
def killed(lab: Any) -> dict[str, tuple[Path, int]]:
    names = lab.every_method
    return dict(zip(names, kill_in_a_step(lab, [lab.spec(name) for name in names]), strict=True))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All that the safetensors files of a directory hold, by file and name."""
    return {
        f"{file.name}: {name}": tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_bits(one: Path, other: Path) -> None:
    found, expected = tensors(one), tensors(other)
    assert found and found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_same_end(lab: Any, resumed: TrialResult, whole: TrialResult) -> None:
    """Losses, scores and the adapter's weights are equal, not only close."""
    assert (resumed.status, resumed.error) == ("finished", None)
    assert lab.losses(resumed) == lab.losses(whole)
    assert [p["step"] for p in resumed.curve] == [p["step"] for p in whole.curve]
    for name in ("eval_loss", "exact_match", "base_eval_loss", "steps"):
        assert resumed.metrics[name] == whole.metrics[name], name
    assert resumed.adapter is not None and whole.adapter is not None
    assert_same_bits(resumed.adapter.path, whole.adapter.path)


def assert_goes_on(lab: Any, spec: TrialSpec, directory: Path, step: int, taken: list[int]) -> None:
    spec = saved_at_every_step(spec)
    whole = lab.finish(spec)
    newest = latest_checkpoint(StoragePath(directory / "checkpoints"))
    assert newest is not None and newest.name == f"checkpoint-{step}"
    taken.clear()
    resumed = lab.run(spec, directory=directory)
    assert_same_end(lab, resumed, whole.result)
    assert taken == list(range(step, spec.train.max_steps))
    assert {path.name for path in directory.iterdir()} == {"adapter", "checkpoints"}
    # The last checkpoints: AdamW's moments, and P-Tuning's encoder, which an adapter doesn't carry.
    last = f"checkpoints/checkpoint-{spec.train.max_steps - 1}"
    assert_same_bits(directory / last, whole.adapter.parent / last)


@pytest.mark.numeric
def test_after_a_kill_all_is_as_in_a_whole_run(
    every_method: str, lab: Any, killed: dict[str, tuple[Path, int]], steps_taken: list[int]
) -> None:
    assert_goes_on(lab, lab.spec(every_method), *killed[every_method], steps_taken)


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 1}
PLATEAU |= {"lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.5}}
GREEDY = {"lr_scheduler_type": "greedy", "eval_steps": 1}
GREEDY |= {"lr_scheduler_kwargs": {"patience": 1, "min_lr": 1e-4, "factor": 0.5, "smooth": True}}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "learning_rate": 0.1}
RATES = {"sgd": 0.1, "lion_8bit": 1e-3, "lion_32bit": 1e-3, "ademamix_8bit": 1e-3, "ademamix": 1e-3}
# Of a rank with which a matrix has the 4,096 numbers from which bitsandbytes keeps 8 bits.
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"optim": "adamw_8bit", "adam_beta2": 0.95},
    "adafactor": {"optim": "adafactor", "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    "noise": {"neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1, **MOMENTUM},
    "plateau": PLATEAU,
}
LONG: dict[str, dict[str, Any]] = {
    **{
        name: {"optim": name, "learning_rate": RATES.get(name, 1e-2)}
        for name, facts in OPTIMIZERS.items()
        if not facts.paged
        and name not in ("adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "adafactor")
    },
    "greedy": GREEDY,
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "polynomial": {"lr_scheduler_kwargs": {"power": 2.0}},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 3}, "warmup_steps": 2},
    "noise on virtual tokens": {"neftune_noise_alpha": 5.0},
    "all weights in 8 bits": {"optim": "adamw_8bit", "learning_rate": 3e-3},
}
for _name in SchedulerType:
    if _name.value in LONG:
        LONG[_name.value] |= {"lr_scheduler_type": _name.value}


@pytest.mark.numeric
@pytest.mark.parametrize(
    "option", [*OPTIONS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
)
def test_an_optimizer_a_schedule_or_noise_goes_on_as_in_a_whole_run(
    option: str, lab: Any, steps_taken: list[int]
) -> None:
    method, train = "lora", {**OPTIONS, **LONG}[option]
    settings: dict[str, Any] = {"r": 64, "lora_dropout": 0.1}
    if option == "noise on virtual tokens":
        method, settings = "p_tuning", {}
    if option == "all weights in 8 bits":  # but the embeddings, which stay in 32
        method, settings = "full", {}
    spec = lab.spec(method, settings, **train)
    check_optimization(
        Config(**{part: getattr(spec, part) for part in Config.model_fields if hasattr(spec, part)})
    )
    ((directory, step),) = kill_in_a_step(lab, [spec])
    assert_goes_on(lab, spec, directory, step, steps_taken)
    metrics = lab.finish(saved_at_every_step(spec)).result.metrics
    assert metrics["eval_loss"] != metrics["base_eval_loss"]


def test_a_kill_at_any_touch_of_a_file_leaves_a_trial_that_goes_on(lab: Any) -> None:
    spec = lab.spec(max_steps=3, eval_steps=1)
    whole = lab.finish(spec)
    job = {"spec": spec.model_dump_json(), "directory": str(lab.root / "events-all")}
    Path(job["directory"]).mkdir()
    touches = lab.killed([job])[0]["events"]
    assert touches > 20
    # The last touches write the adapter.
    chosen = {touches, touches - 3, *random.sample(range(2, touches - 3), 3)}
    jobs = [job | {"directory": str(lab.root / f"events-{n}"), "event": n} for n in chosen]
    for job in jobs:
        Path(job["directory"]).mkdir()
    ends = lab.killed(jobs)
    for job, end in zip(jobs, ends, strict=True):
        assert end["signal"] == signal.SIGKILL, job
        print(job)
        assert_same_end(lab, lab.run(spec, directory=Path(job["directory"])), whole.result)


@pytest.mark.parametrize(
    ("write", "newest"),
    [(4, "checkpoint-1"), (5, "checkpoint-1"), (6, "checkpoint-1"), (7, "checkpoint-2")],
    ids=["weights", "moments", "scores", "adapter"],
)
def test_a_kill_within_a_write_of_tensors_leaves_the_checkpoint_before(
    lab: Any, write: int, newest: str
) -> None:
    """Of three tensor files in each of two checkpoints, and the adapter's."""
    spec = lab.spec(max_steps=3, eval_steps=1)
    whole = lab.finish(spec)
    directory = lab.root / f"write-{write}"
    directory.mkdir()
    job = {"spec": spec.model_dump_json(), "directory": str(directory), "write": write}
    assert lab.killed([job])[0]["signal"] == signal.SIGKILL
    (half,) = directory.rglob(".tmp*")  # safetensors renames what it has written
    assert 0 < half.stat().st_blocks * 512 < half.stat().st_size
    found = latest_checkpoint(StoragePath(directory / "checkpoints"))
    assert found is not None and found.name == newest
    assert_same_end(lab, lab.run(spec, directory=directory), whole.result)
    assert not half.exists() and not list(directory.rglob(".tmp*"))


def interrupted(lab: Any, spec: TrialSpec) -> Path:
    """The directory of a trial that ended by Ctrl-C at its first evaluation."""
    directory: Path = lab.directory()

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.run(spec, report=interrupt, directory=directory)
    return directory


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_16", "olora"])
def test_what_was_taken_out_of_the_base_is_taken_from_the_checkpoint(
    kind: str, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another processor the decomposition comes out otherwise, here much so."""
    spec = saved_at_every_step(lab.spec(kind))
    whole = lab.finish(spec)
    directory = interrupted(lab, spec)
    monkeypatch.setattr(torch.linalg, "svd", lambda a, **_: [torch.ones_like(a)] * 3)
    monkeypatch.setattr(torch.linalg, "qr", lambda a, **_: [torch.ones_like(a)] * 2)
    monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", lambda a, *_, **__: [a] * 3)
    assert_same_end(lab, lab.run(spec, directory=directory), whole.result)


def test_a_checkpoint_without_what_was_taken_out_of_the_base_is_not_gone_on_from(lab: Any) -> None:
    spec = saved_at_every_step(lab.spec("pissa"))
    directory = interrupted(lab, spec)
    newest = latest_checkpoint(StoragePath(directory / "checkpoints"))
    assert newest is not None
    (file,) = newest.glob("training_state.safetensors")
    save_file({n: t for n, t in load_file(file).items() if "initial" not in n}, file)
    sums = json.loads((newest / "sums.json").read_text())
    del sums[file.name]
    (newest / "sums.json").write_text(json.dumps(sums))
    result = lab.run(spec, directory=directory)
    assert result.status == "failed" and "the checkpoint lacks the matrices" in result.error


def test_lora_plus_has_a_learning_rate_for_b_of_its_own(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[dict[str, float]] = []

    def seen(trainer: TrialTrainer, *args: Any, **kwargs: Any) -> Any:
        names = {parameter: name for name, parameter in trainer.trained.named_parameters()}
        groups = trainer.optimizer.param_groups  # type: ignore[union-attr]
        rates.append({names[p]: g["lr"] for g in groups for p in g["params"]})
        return step(trainer, *args, **kwargs)

    step = TrialTrainer.training_step
    monkeypatch.setattr(TrialTrainer, "training_step", seen)
    lab.run(lab.spec("lora", {"loraplus_lr_ratio": 16}, learning_rate=1e-3, max_steps=4))
    assert len(rates) == 4 and len({len(names) for names in rates}) == 1
    for names in rates:
        a, b = ({rate for n, rate in names.items() if f"lora_{m}" in n} for m in "AB")
        assert {16 * rate for rate in a} == b and len(b) == 1


def test_seconds_of_the_part_before_the_kill_count(lab: Any) -> None:
    spec = lab.spec(save_steps=1, eval_steps=3)
    directory = interrupted(lab, spec)
    newest = latest_checkpoint(StoragePath(directory / "checkpoints"))
    assert newest is not None
    before = load_progress(newest).train_seconds
    assert before > 0
    assert lab.run(spec, directory=directory).metrics["train_seconds"] > before


def test_a_single_run_keeps_its_checkpoints_until_its_end_is_recorded(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_taken: list[int]
) -> None:
    spec = lab.spec(save_steps=1)
    parts = {part: getattr(spec, part) for part in ("model", "data", "method", "train")}
    config, storage = Config(**parts, storage=str(tmp_path)), Storage.at(tmp_path)
    put = History.put
    told: list[str] = []

    def left(history: History, row: TrialRecord) -> None:
        if row.status == "finished":
            raise KeyboardInterrupt
        put(history, row)

    def run(**options: bool) -> TrialRecord:
        steps_taken.clear()
        told.clear()
        return train_once(config, history=history, storage=storage, show=told.append, **options)

    with History.open(storage.history_url) as history:
        with monkeypatch.context() as patch:
            patch.setattr(History, "put", left)
            with pytest.raises(KeyboardInterrupt):
                run()
        last = spec.train.max_steps
        assert told[-1] == f"the same command goes on from step {last - 1}, its newest checkpoint"
        first = run()
        assert told[0] == f"goes on from step {last - 1}, its newest checkpoint"
        assert told[-1].startswith(f"step {last}/{last}  eval_loss ")
        assert first.status == "finished" and steps_taken == [spec.train.max_steps - 1]
        (directory,) = tmp_path.glob("sweeps/train/trials/*")
        assert latest_checkpoint(StoragePath(directory / "checkpoints")) is None
        with (
            driver_lock(StoragePath(directory), "", ""),
            pytest.raises(ConfigError, match="another process"),
        ):
            run(rerun=True)
        assert not steps_taken
        # The driver was killed after it had recorded the end, and before it let them go.
        shutil.copytree(interrupted(lab, spec), directory, dirs_exist_ok=True)
        again = run(rerun=True)
        assert steps_taken == list(range(spec.train.max_steps)), "it is made anew"
        assert again.metrics["eval_loss"] == first.metrics["eval_loss"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_without_the_base_models_scores_is_gone_on_from(
    lab: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier rayfin's groups did not keep them; what was trained itself is no base any more."""
    spec = lab.spec(method, save_steps=1)
    recorded = lab.finish(spec).result.metrics["base_eval_loss"]
    with monkeypatch.context() as patch:
        patch.setattr(TrialCache, "base_scores", lambda *_: None)  # as it is for a group
        directory = interrupted(lab, spec)
        newest = latest_checkpoint(StoragePath(directory / "checkpoints"))
        assert newest is not None
        (newest / "base_scores.safetensors").unlink()
        sums = json.loads((newest / "sums.json").read_text())
        del sums["base_scores.safetensors"]
        (newest / "sums.json").write_text(json.dumps(sums))
        resumed = lab.run(spec, directory=directory)
    assert resumed.status == "finished", resumed.error
    if method == "full":
        assert "base_eval_loss" not in resumed.metrics
    else:
        assert resumed.metrics["base_eval_loss"] == recorded


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["qlora", pytest.param("p_tuning", marks=pytest.mark.long)])
def test_smollm2_goes_on_too(lab: Any, name: str, steps_taken: list[int]) -> None:
    spec = lab.spec(
        name,
        model="smollm2-135m",
        data={"max_length": 40, "max_samples": 8, "val_size": 0.2},
        max_steps=3,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
    )
    ((directory, step),) = kill_in_a_step(lab, [spec])
    assert_goes_on(lab, spec, directory, step, steps_taken)
    finished = lab.finish(saved_at_every_step(spec))
    model = lab.reload(finished)
    recorded = finished.result.metrics["eval_loss"]
    assert lab.plain_loss(model, spec) == lab.rounded(recorded, spec.model.name)
    assert lab.answers(model, spec) == finished.answers


@pytest.mark.parametrize("file", ["optimizer.safetensors", "trainer_state.json", "sums.json"])
@pytest.mark.parametrize("harm", ["truncated", "missing", "flipped"])
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(
    lab: Any, file: str, harm: str, caplog: pytest.LogCaptureFixture, moment: random.Random
) -> None:
    spec = lab.spec(save_steps=2, eval_steps=5)
    directory = interrupted(lab, spec)
    checkpoints = directory / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4"]
    torn = checkpoints / "checkpoint-4" / file
    content = torn.read_bytes()
    if harm == "truncated":
        torn.write_bytes(content[: moment.randrange(len(content))])
    elif harm == "flipped":
        at = moment.randrange(len(content))
        torn.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        torn.unlink()
    resumed = lab.run(spec, directory=directory)
    assert "checkpoint-4 is damaged" in caplog.text
    assert_same_end(lab, resumed, lab.finish(spec).result)


def test_where_all_checkpoints_are_torn_a_trial_begins_anew(lab: Any) -> None:
    spec = lab.spec(save_steps=2, eval_steps=3)
    directory = interrupted(lab, spec)
    (only,) = (directory / "checkpoints").glob("checkpoint-*")
    (only / "training_state.safetensors").write_bytes(b"")
    resumed = lab.run(spec, directory=directory)
    assert_same_end(lab, resumed, lab.finish(spec).result)


def test_a_bucket_that_goes_away_is_no_fault_of_the_trial(
    lab: Any, s3_elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = lab.spec(save_steps=2, eval_steps=3)
    with ExitStack() as server:
        environment = server.enter_context(s3_elsewhere())
        address = environment.pop("AWS_ENDPOINT_URL").removeprefix("http://")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        location = StoragePath.at(f"s3://rayfin-test/x?scheme=http&endpoint_override={address}")

        def goes_away(_: TrialResult) -> None:
            assert (location / "checkpoints").names() == ["checkpoint-2"]
            server.close()

        result = run_trial(spec, goes_away, location=location, warm=lab.warm)
    assert result.status == "failed" and result.storage_failed
    assert result.error is not None and "\n" not in result.error
    assert "checkpoint-4" in result.error and "can't be written" in result.error
