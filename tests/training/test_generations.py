"""Answers to held-out questions while a trial trains (train.sample_generations)."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from rayfin.config import load_config
from rayfin.errors import ConfigError
from rayfin.evaluation import SweepOutcome, write_sweep_report
from rayfin.heartbeat import busy, seconds_silent
from rayfin.history import TrialRecord
from rayfin.training import TrialSpec
from rayfin.training.combination import check_combination
from rayfin.training.strategies import check_scaling
from rayfin.training.trainer import TrialTrainer
from rayfin.training.trial_cache import TrialCache
from rayfin.tuning.generations import generation_lines, generations_of
from rayfin.tuning.plan import PlannedTrial
from rayfin.tuning.progress import ProgressDisplay
from rayfin.tuning.rows import started, with_result


def contents(directory: Path) -> dict[str, bytes]:
    """The adapter and all of the checkpoints but the log, which has the answers."""
    files = [*directory.glob("adapter/*.safetensors"), *directory.glob("checkpoints/*/*")]
    logs = ("trainer_state.json", "sums.json", "progress.json")  # answers, and seconds
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in files
        if file.name not in logs
    }


@pytest.mark.parametrize("method", ["lora", "p_tuning", "full"])
def test_the_training_is_the_same_bit_for_bit(lab: Any, method: str) -> None:
    ends, curves = [], []
    for count in (0, 3):
        directory = lab.directory()
        spec = lab.spec(method, sample_generations=count, save_steps=4)
        result = lab.run(spec, directory=directory)
        assert result.status == "finished", result.error
        ends.append(contents(directory))
        curves.append([point for point in result.curve if "generations" not in point])
        steps = [step for step, _ in generations_of(result.curve)]
        assert steps == ([4, 8] if count else [])
    assert len(ends[0]) > 3 and ends[0] == ends[1]
    assert curves[0] == curves[1]


def test_the_answers_are_those_of_the_adapter_that_is_saved(lab: Any) -> None:
    """Greedily, by plain PEFT; a resumed trial has those of before, too."""
    spec = lab.spec("lora", sample_generations=3, learning_rate=2e-3)
    directory = lab.directory()
    lab.run(spec, directory=directory, report=lambda result: None)
    result = lab.run(spec, directory=directory)  # from the checkpoint of step 4
    (first, before), (last, answers) = generations_of(result.curve)
    assert (first, last) == (4, 8)
    assert [one["prompt"] for one in answers] == [one["prompt"] for one in before]
    model = lab.reloaded(spec, directory / "adapter").eval()
    tokenizer = lab.warm.tokenizer(spec)
    for sample, one in zip(lab.held_out(spec), answers, strict=False):
        wanted = tokenizer(one["reference"], add_special_tokens=False)["input_ids"]
        most = 2 * len(wanted) + 16
        ids = lab.continued(model, lab.prompt(sample), most)
        end = tokenizer.eos_token_id
        assert one["ended"] is (end in ids)
        said = ids[: ids.index(end)] if end in ids else ids
        assert one["answer"] == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_it_is_no_other_trial(lab: Any) -> None:
    def fingerprint(spec: TrialSpec) -> str:
        return spec.fingerprint(model_identity="m", data_digest="d")

    assert fingerprint(lab.spec(sample_generations=2)) == fingerprint(lab.spec())


def test_the_other_workers_wait_for_the_answers_as_long_as_they_take() -> None:
    waited: list[str] = []
    accelerator = SimpleNamespace(
        is_main_process=False,
        wait_for_everyone=lambda: waited.append(seconds_silent(threading.get_ident())[1]),
    )
    with busy("evaluating"):
        worker: Any = SimpleNamespace(_generate=lambda _: [], accelerator=accelerator)
        TrialTrainer._generate_samples(worker)
    assert waited == [""], "a heartbeat would run out, and the worker be ended as one that hangs"


def test_where_nothing_can_be_asked_a_line_says_so(lab: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"plain text {n}"}) + "\n" for n in range(20)))
    spec = lab.spec(sample_generations=2, data={"path": str(texts)})
    result = lab.run(spec, warm=TrialCache())
    assert result.status == "finished" and generations_of(result.curve) == []
    (note,) = [it for it in result.scenario["data"]["notes"] if "generations" in it]
    assert "no held-out sample has a question" in note


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed-zero3"])
def test_a_model_in_parts_is_refused(strategy: str) -> None:
    config = load_config(
        {
            "method": {"type": "lora"},
            "train": {"sample_generations": 2},
            "scaling": {"num_workers": 2, "strategy": strategy},
        }
    )
    check_combination(config)
    with pytest.raises(ConfigError, match=f"strategy={strategy}: it shards the model"):
        check_scaling(config)


def test_the_terminal_and_the_report_show_them(lab: Any, tmp_path: Path) -> None:
    spec = lab.spec(sample_generations=2)
    location = lab.directory()
    result = lab.run(spec, directory=location)
    planned = PlannedTrial("sweep-0", "f" * 16, {}, spec, result.adapter)
    row = with_result(started(planned), result)
    lines = list(generation_lines(row.curve))
    assert len(lines) == 2 and max(map(len, lines)) <= 120
    (_, answers) = generations_of(row.curve)[-1]
    for line, one in zip(lines, answers, strict=True):
        assert one["prompt"][:20] in line
        assert ("(ended" if one["ended"] else "(did not end") in line
    written = io.StringIO()
    display = ProgressDisplay(Console(file=written, width=80))
    display._config, display._total, display._started = load_config({}), 1, 0.0
    display.update(TrialRecord.parse(row.model_dump() | {"trial_id": "sweep-0"}))
    assert all(line in written.getvalue() for line in lines)
    page = write_sweep_report(
        tmp_path / "report.html", SweepOutcome([row], load_config({}), row, None, False)
    ).read_text("utf-8")
    assert page.count("Answers to question") == 2 and "Answers during the training" in page
    without = row.updated(curve=[])
    page = write_sweep_report(
        tmp_path / "report.html", SweepOutcome([without], load_config({}), without, None, False)
    ).read_text("utf-8")
    assert "Answers during the training" not in page
