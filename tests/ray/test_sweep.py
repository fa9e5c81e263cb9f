"""A sweep from the command line to a published adapter, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayfin.adapters import Registry
from rayfin.config import load_serve_config
from rayfin.data import load_corpus, tokenize_corpus
from rayfin.history import TrialRecord
from rayfin.models import load_base, load_tokenizer
from rayfin.paths import Storage
from rayfin.training import TrialSpec
from rayfin.training.scoring import score

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SWEEP = (
    "train.max_steps=8",
    "train.eval_steps=2",
    "sweep.num_samples=4",
    "sweep.scheduler=none",
    # Three settings: lora has a rank and p_tuning has virtual tokens, both over 4 bits.
    "sweep.parameters={method.type: [lora, p_tuning], method.r: [4, 8],"
    " method.num_virtual_tokens: [5]}",
    "method.quantization_bit=4",
    "publish.name=colours",
)


def test_a_sweep_from_start_to_adapter(lab: Any) -> None:
    sweep = lab.script("sweep_qlora.py", *SWEEP, "sweep.report_samples=2", "--json")
    assert sweep.end() == 0, sweep.err
    told = json.loads(sweep.out)
    rows = lab.rows()
    best = next(row for row in rows if row.trial_id == told["best"])

    assert len({row.trial_id for row in rows}) == len({row.fingerprint for row in rows}) == 3
    assert {row.status for row in rows} == {"finished"}
    assert told["notes"][-1] == "3 distinct settings of 4 trials"
    methods = [row.spec["method"] for row in rows]
    assert sorted(m["type"] for m in methods) == ["lora", "lora", "p_tuning"]
    assert {m.get("r", m.get("num_virtual_tokens")) for m in methods} == {4, 8, 5}
    assert {m["quantization_bit"] for m in methods} == {4}
    assert all(row.sweep_id == told["sweep_id"] for row in rows)
    for row in rows:
        assert {"eval_loss", "base_eval_loss", "exact_match", "perplexity"} <= row.metrics.keys()
        assert {"train_seconds", "peak_memory_bytes", "tokens_per_second"} <= row.metrics.keys()
        steps = [point["step"] for point in row.curve if "eval_loss" in point]
        assert steps == [2, 4, 6, 8]
        assert {"model", "data", "hardware"} <= row.scenario.keys()
    assert best.metrics["eval_loss"] == min(row.metrics["eval_loss"] for row in rows)
    assert best.metrics["eval_loss"] < best.metrics["base_eval_loss"]

    # One warm process trained them all, and loaded its base model once.
    workers = [row.scenario["worker"] for row in rows]
    assert len({worker["pid"] for worker in workers}) == 1
    assert {worker["base_loads"] for worker in workers} == {1}

    report = Path(told["report"]).read_text()
    assert best.trial_id in report and report.count('class="sample"') == 2
    assert plain_peft_loss(best, told["adapter"]["path"]) == pytest.approx(
        best.metrics["eval_loss"], abs=1e-3
    )
    # Not on a terminal, progress is a line for each start and end, with the time that is left.
    lines = [line for line in sweep.err.splitlines() if line.startswith("trial ")]
    assert len(lines) == 6 and sum("ETA" in line for line in lines) == 3

    again = lab.script("sweep_qlora.py", *SWEEP, "--json")
    assert again.end() == 0, again.err
    recalled = [row for row in lab.rows() if row.sweep_id != told["sweep_id"]]
    assert all("recalled_from" in row.scenario for row in recalled)
    assert len({row.fingerprint for row in recalled}) == len(recalled) == 3
    assert not list((lab.storage / "sweeps" / recalled[0].sweep_id).glob("trials/*"))
    versions = [version.version for version in Registry(lab.storage / "adapters").list()]
    assert versions == [told["adapter"]["version"]]


def test_a_scaffold_trains_sweeps_and_can_be_served(lab: Any) -> None:
    mine = lab.root / "mine"
    advice = lab.rayfin("recommend", "train.max_steps=4", "--scaffold", str(mine), "--json")
    assert advice.end() == 0, advice.err
    first = json.loads(advice.out)["choices"][0]["config"]

    train = lab.typed("train", str(mine / "train.yaml"), "--json")
    assert train.end() == 0, train.err
    (row,) = lab.rows()
    assert row.status == "finished"
    assert {name: row.spec[name] for name in ("method", "train")} == {
        name: first[name] for name in ("method", "train")
    }

    sweep = lab.typed("sweep", str(mine / "sweep.yaml"), "sweep.num_samples=2", "--json")
    assert sweep.end() == 0, sweep.err
    told = json.loads(sweep.out)
    assert [trial["status"] for trial in told["trials"]] == ["finished"] * 2
    assert told["adapter"]["name"] == "colours"

    serve = load_serve_config(mine / "serve.yaml", [])
    assert serve.model.name == "tiny"
    adapters = Registry(Storage.open(serve.storage).adapters).list()
    assert [version.name for version in adapters] == ["colours"] * 2


def plain_peft_loss(trial: TrialRecord, adapter: str) -> float:
    """The eval loss of a published adapter on the trial's base, loaded as anyone would load it."""
    from peft import PeftModel

    spec = TrialSpec.model_validate(trial.spec)
    tokenizer = load_tokenizer(spec.model)
    samples = tokenize_corpus(load_corpus(spec.data), tokenizer, spec.data.max_length).eval
    base = load_base(spec.model, spec.method.quantization_bit, "cpu")
    adapted = PeftModel.from_pretrained(base, adapter)
    scores = score(adapted, samples, batch_size=8, pad_token_id=tokenizer.pad_token_id)
    return scores.metrics()["eval_loss"]


def test_a_trial_that_cannot_fit_is_not_started(lab: Any) -> None:
    """Its row says so, the others run, and a resumed sweep starts it no more than this one did."""
    text = "".join(chr(97 + i * i % 26) for i in range(1000))
    with lab.data.open("w") as file:
        for number in range(1000):
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    settings = (
        # For the size of its vocabulary: no batch counts as larger than the data, which would have
        # to be large for a smaller one.
        "model.name=smollm2-135m",
        "data.max_length=400",
        "data.val_size=0.001",
        "train.max_steps=1",
        "sweep.search=grid",
        "sweep.num_samples=2",
        # The larger one needs hundreds of gigabytes for activations.
        "sweep.parameters={train.per_device_train_batch_size: [4096, 1]}",
        "sweep.scheduler=none",
        "--json",
    )
    sweep = lab.rayfin("sweep", *settings)
    assert sweep.end() == 0, sweep.err
    large, small = lab.rows()
    assert large.spec["train"]["per_device_train_batch_size"] == 4096
    assert (large.status, small.status) == ("oom", "finished")
    assert (large.error or "").startswith("not started: by the estimate it needs")
    assert large.directory is None and large.curve == []
    assert f"oom       per_device_train_batch_size=4096  {large.error}" in sweep.err

    again = lab.rayfin("sweep", *settings, "--resume")
    assert again.end() == 0, again.err
    judged, unchanged = lab.rows()
    assert unchanged == small
    # By a history that has grown the estimate is another, and so is the reason.
    assert (judged.trial_id, judged.status) == (large.trial_id, "oom")
    assert judged.created_at == large.created_at and judged.directory is None
    assert (judged.error or "").startswith("not started: by the estimate it needs")


def test_what_ray_ends_for_want_of_memory_is_a_trial_and_not_the_sweep(lab: Any) -> None:
    """Its memory monitor ends every process here, as none may take more than nothing."""
    lab.environment |= {
        "RAY_memory_usage_threshold": "0.001",
        "RAY_memory_monitor_refresh_ms": "100",
    }
    settings = ("sweep.search=grid", "sweep.num_samples=2", "sweep.parameters={method.r: [2, 4]}")
    sweep = lab.rayfin("sweep", *settings, "train.max_steps=2000")
    assert sweep.end() == 1, sweep.err
    assert [row.status for row in lab.rows()] == ["oom", "oom"]
    for row in lab.rows():
        assert "running low on memory" in (row.error or "")
        assert "lower train.per_device_train_batch_size" in (row.error or "")
    assert "Traceback" not in sweep.err
