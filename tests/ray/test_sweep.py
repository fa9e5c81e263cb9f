"""A sweep from the command line to a published adapter, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayfin.adapters import Registry
from rayfin.config import ModelConfig, load_serve_config
from rayfin.data import load_corpus, tokenize_corpus
from rayfin.history import TrialRecord
from rayfin.models import load_base, load_tokenizer
from rayfin.objectives import SFT
from rayfin.paths import Storage, write_text
from rayfin.training import TrialSpec
from rayfin.training.scoring import score

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

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


def test_a_sweep_from_start_to_adapter(
    lab: Any, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = "sweep.report_samples=2"
    assert lab.script_here("sweep_qlora.py", *SWEEP, samples, "--json") == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
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
    lines = [line for line in err.splitlines() if line.startswith("trial ")]
    assert len(lines) == 6 and sum("ETA" in line for line in lines) == 3

    assert lab.script_here("sweep_qlora.py", *SWEEP, "--json") == 0
    recalled = [row for row in lab.rows() if row.sweep_id != told["sweep_id"]]
    assert all("recalled_from" in row.scenario for row in recalled)
    assert len({row.fingerprint for row in recalled}) == len(recalled) == 3
    assert not list((lab.storage / "sweeps" / recalled[0].sweep_id).glob("trials/*"))
    versions = [version.version for version in Registry(lab.storage / "adapters").list()]
    assert versions == [told["adapter"]["version"]]


def test_a_scaffold_trains_sweeps_and_can_be_served(
    lab: Any, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = lab.root / "mine"
    settings = (*lab.settings, "train.max_steps=4")
    assert lab.rayfin_here("recommend", *settings, "--scaffold", str(mine), "--json") == 0
    first = json.loads(capsys.readouterr().out)["choices"][0]["config"]

    assert lab.rayfin_here("train", str(mine / "train.yaml"), "--json") == 0
    (row,) = lab.rows()
    assert row.status == "finished"
    assert {name: row.spec[name] for name in ("method", "train")} == {
        name: first[name] for name in ("method", "train")
    }

    capsys.readouterr()
    sweep = (str(mine / "sweep.yaml"), "sweep.num_samples=2", "--json")
    assert lab.rayfin_here("sweep", *sweep) == 0
    told = json.loads(capsys.readouterr().out)
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
    scores = score(adapted, samples, SFT, batch_size=8, pad_token_id=tokenizer.pad_token_id)
    return SFT.scores(scores)["eval_loss"]


def test_a_trial_that_cannot_fit_or_runs_out_of_memory_costs_no_other(
    lab: Any, memory: Memory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its row says so, the others run, and a resumed sweep starts it no more than this one did."""
    text = "".join(chr(97 + i * i % 26) for i in range(1000))
    # No batch counts as larger than the data, which would have to be large for a smaller one.
    lab.data.write_text(
        "".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(1000))
    )
    settings = (
        *lab.settings,
        f"model.name={with_many_words(lab.root / 'model')}",
        "data.max_length=400",
        "data.val_size=0.001",
        "train.max_steps=12",
        "train.eval_steps=2",
        "sweep.search=grid",
        "sweep.num_samples=3",
        # The first one needs hundreds of gigabytes for activations.
        "sweep.parameters={train.per_device_train_batch_size: [4096, 4, 1]}",
        "sweep.max_failures=0",
        "sweep.scheduler=none",
        "--json",
    )
    lab.enter = memory.enter
    sweep = lab.typed("sweep", *settings)
    running = sweep.amid(finished=0)
    memory.use(0.99)
    sweep.until(lambda: not psutil.pid_exists(running.scenario["worker"]["pid"]))
    memory.use(0.1)
    assert sweep.end() == 0, sweep.err
    large, killed, small = lab.rows()
    assert large.spec["train"]["per_device_train_batch_size"] == 4096
    assert (large.status, killed.status, small.status) == ("oom", "oom", "finished")
    assert (large.error or "").startswith("not started: by the estimate it needs")
    assert large.directory is None and large.curve == []
    assert f"oom       per_device_train_batch_size=4096  {large.error}" in sweep.err
    # What Ray's memory monitor ends is a trial and not the sweep.
    assert killed.trial_id == running.trial_id
    assert "running low on memory" in (killed.error or "")
    assert "lower train.per_device_train_batch_size" in (killed.error or "")
    assert "Traceback" not in sweep.err
    assert small.metrics["steps"] == 12

    assert lab.rayfin_here("sweep", *settings, "--resume") == 0, capsys.readouterr().err
    judged, *unchanged = lab.rows()
    assert unchanged == [killed, small]
    # By a history that has grown the estimate is another, and so is the reason.
    assert (judged.trial_id, judged.status) == (large.trial_id, "oom")
    assert judged.created_at == large.created_at and judged.directory is None
    assert (judged.error or "").startswith("not started: by the estimate it needs")


def with_many_words(directory: Path) -> Path:
    """A tiny model whose scores of a batch take much memory, as a large vocabulary's do."""
    from transformers import AutoModelForCausalLM

    tiny = ModelConfig(name="tiny")
    config = load_base(tiny, None, "cpu").config
    config.vocab_size = 16384
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    load_tokenizer(tiny).save_pretrained(directory)
    return directory


class Memory:
    """A machine's memory, as Ray's monitor reads it in the files of a container."""

    def __init__(self, files: Path) -> None:
        self.files = files
        files.mkdir()
        (files / "memory.max").write_text(str(self.size))
        (files / "memory.stat").write_text("inactive_file 0\nactive_file 0\n")
        self.use(0.1)

    size = 2**30
    """Less than this machine has, or Ray would look at that."""

    @property
    def enter(self) -> list[str]:
        """What a command begins with that runs in the container."""
        bind = f'mount --bind "{self.files}" /sys/fs/cgroup && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", bind, "sh"]

    def use(self, share: float) -> None:
        write_text(self.files / "memory.current", str(int(share * self.size)))


@pytest.fixture
def memory(lab: Any, tmp_path: Path) -> Memory:
    memory = Memory(tmp_path / "memory")
    lab.environment["RAY_memory_monitor_refresh_ms"] = "100"
    if subprocess.run([*memory.enter, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a memory of its own needs root")
    return memory
