"""Results of other programs become trials: plain CSV tables and PEFT's method_comparison."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayfin.errors import HistoryError
from rayfin.history import History, ImportReport, import_history


# Reading a file is the same for every database.
@pytest.fixture
def history(tmp_path):
    with History.open(f"sqlite:///{tmp_path / 'history.sqlite'}") as opened:
        yield opened


TABLE = """\
model,learning_rate,lora_rank,test_nll,train_nll,wall_minutes,diverged
org/Small-1B,4e-05,8,0.61,0.62,30.5,0
org/Small-1B,0.003,8,,,,1
org/Small-1B,0.0004,16,0.59,0.60,31,0
"""


def csv(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def one(history, path):
    assert import_history(history, path) == ImportReport(added=1, replaced=0, unchanged=0)
    (trial,) = history.trials()
    return trial


def test_a_table_becomes_trials(history, tmp_path):
    path = csv(tmp_path, TABLE)
    assert import_history(history, path) == ImportReport(added=3, replaced=0, unchanged=0)
    trials = {trial.spec["train"]["learning_rate"]: trial for trial in history.trials()}
    good, diverged = trials[4e-05], trials[0.003]
    assert good.spec == {
        "model": {"name": "org/Small-1B"},
        "method": {"type": "lora", "r": 8},
        "train": {"learning_rate": 4e-05},
    }
    assert good.metrics == {
        "eval_loss": 0.61,
        "train_loss": 0.62,
        "wall_seconds": 1830.0,
        "train_seconds": 1830.0,
    }
    assert (good.sweep_id, good.scenario) == ("table", {"source": "csv"})
    assert (diverged.status, diverged.error, diverged.metrics) == ("failed", "diverged", {})


def test_importing_twice_adds_nothing(history, tmp_path):
    import_history(history, csv(tmp_path, TABLE))
    before = history.trials()
    assert import_history(history, csv(tmp_path, TABLE)).unchanged == 3
    renamed = csv(tmp_path, TABLE, "renamed.csv")
    assert import_history(history, renamed).unchanged == 3
    assert history.trials() == before


def test_every_kind_of_column_finds_its_place(history, tmp_path):
    header = (
        "Base Model,dataset,method-type,r,lora_alpha,train.lr,LR,lr_scheduler_type,max_length,"
        "eval_loss,accuracy,train_minutes,peak_memory_gb,trainable_params,gpu,num_parameters,"
        "note,warm,created_at,experiment,test_loss"
    )
    cells = (
        "m,d.jsonl,DoRA,4,32,7,1e-3,polynomial,128,"
        "1.5,0.25,2,0.5,1000,A100,135000000,hello,3,2026-01-02T03:04:05,runs of may,9"
    )
    trial = one(history, csv(tmp_path, f"{header}\n{cells}\n"))
    assert trial.spec == {
        "model": {"name": "m"},
        "data": {"path": "d.jsonl", "max_length": 128},
        "method": {"type": "dora", "r": 4, "lora_alpha": 32.0},
        "train": {"learning_rate": 1e-3, "lr_scheduler_type": "polynomial"},
        "extra": {"note": "hello"},
    }
    assert trial.metrics == {
        "eval_loss": 1.5,
        "exact_match": 0.25,
        "train_seconds": 120.0,
        "peak_memory_bytes": 2**29,
        "trainable_parameters": 1000,
        "extra": {"train.lr": 7, "warm": 3, "test_loss": 9},
    }
    assert trial.scenario == {
        "source": "csv",
        "model": {"parameters": 135_000_000},
        "hardware": {"device_name": "A100"},
    }
    assert trial.created_at.isoformat() == "2026-01-02T03:04:05+00:00"
    assert trial.sweep_id == "runs-of-may"


def test_a_name_that_two_methods_use_is_the_methods_own(history, tmp_path):
    table = "method,r,alpha,rank_dropout,eval_loss\nLoHa,4,6,none,1\nDoRA,4,6,,1.5\n"
    import_history(history, csv(tmp_path, table))
    found = {trial.spec["method"]["type"]: trial.spec["method"] for trial in history.trials()}
    assert found["loha"] == {"type": "loha", "r": 4, "alpha": 6.0}
    assert found["dora"] == {"type": "dora", "r": 4, "lora_alpha": 6.0}


@pytest.mark.parametrize("text", ["lr;eval_loss\n1;2\n", "\ufefflr\teval_loss\r\n1\t2\r\n"])
def test_semicolons_tabs_and_a_byte_order_mark_are_fine(history, tmp_path, text):
    trial = one(history, csv(tmp_path, text))
    assert (trial.spec, trial.metrics) == ({"train": {"learning_rate": 1.0}}, {"eval_loss": 2.0})


@pytest.mark.parametrize("cell", ["{}", "{'q_proj': 4}"])
def test_a_mapping_as_text_is_kept_as_it_is(history, tmp_path, cell):
    """The usual dump of PEFT's configuration has such columns."""
    text = f'r,rank_pattern,eval_loss\n8,"{cell}",1.5\n'
    assert one(history, csv(tmp_path, text)).spec["method"]["rank_pattern"] == cell


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ("success,,1", ("finished", None)),
        (",,nan", ("failed", "diverged: eval_loss is nan")),
        (",boom,", ("failed", "boom")),
        ("crashed,,", ("failed", "crashed")),
        ("failed,CUDA out of memory,", ("oom", "CUDA out of memory")),
        ("pruned,,2", ("stopped", None)),
        ("running,,", None),
        ("odd,,1", None),
        (",,", None),
    ],
)
def test_a_status_is_understood_or_refused(history, tmp_path, cells, expected):
    path = csv(tmp_path, f"lr,status,error,eval_loss\n1,{cells}\n")
    report = import_history(history, path)
    found = [(trial.status, trial.error) for trial in history.trials()]
    assert found == ([expected] if expected else [])
    assert len(report.skipped) == (0 if expected else 1)


def test_bad_lines_are_named_and_left_out(history, tmp_path):
    lines = ["lr,rank,eval_loss", "1e-3,8,1.0", "1e-3,8", "fast,8,1", "1e-3,0,1", "", "1,8,low"]
    path = csv(tmp_path, "\n".join(lines))
    report = import_history(history, path)
    assert report.added == 1
    assert [line.removeprefix(f"{path}:") for line in report.skipped] == [
        "3: has 2 cells, the header has 3",
        "4: learning_rate is 'fast'; "
        "Input should be a valid number, unable to parse string as a number",
        "5: r is '0'; Input should be greater than or equal to 1",
        "7: eval_loss is 'low'; give a number",
    ]


def peft_result(**changes: Any) -> dict[str, Any]:
    """A result in the shape of PEFT's method_comparison, much shortened."""
    point = {"valid accuracy": 0.25, "train time": 5.0, "tokens / sec": 1000.0, "elapsed time": 9.0}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": ["v_proj", "q_proj"],
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
    }
    train_config = {
        "model_id": "org/Small-1B",
        "dtype": "bfloat16",
        "max_seq_length": 512,
        "batch_size": 4,
        "batch_size_eval": 50,
        "max_steps": 20,
        "eval_steps": 10,
        "use_gc": False,
        "seed": 0,
        "grad_norm_clip": 1.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
        "lr_scheduler": "cosine",
    }
    return {
        "run_info": {
            "created_at": "2026-01-02T03:04:05+00:00",
            "experiment_name": "lora/small-rank16",
            "train_config": train_config | changes.get("train_config", {}),
            "peft_config": changes.get("peft_config", config | changes.get("peft", {})),
            "error_msg": changes.get("error_msg", ""),
        },
        "train_info": {
            "accelerator_memory_max": 2_000_000,
            "train_time": 17.0,
            "file_size": 4000,
            "num_trainable_params": 1000,
            "num_total_params": 101_000,
            "status": changes.get("status", "success"),
            "metrics": [
                {"step": 10, "train loss": 2.0, **point},
                {"step": 20, "train loss": 1.5, **point},
                {"step": 20, "train loss": changes.get("loss", 1.5), "test accuracy": 0.375},
            ],
        },
        "meta_info": {
            "model_info": {"sha": "abc"},
            "dataset_info": {"sums": {"sha": "def"}, "exam": {"sha": None}},
            "package_info": {"peft-version": "0.1", "peft-commit-hash": None},
            "system_info": {"accelerator": "NVIDIA X"},
        },
    }


def test_a_peft_result_becomes_a_trial(history, tmp_path):
    path = tmp_path / "lora.json"
    path.write_text(json.dumps(peft_result()))
    trial = one(history, path)
    assert trial.spec["model"] == {"name": "org/Small-1B", "dtype": "bfloat16", "revision": "abc"}
    assert trial.spec["data"] == {"path": "sums", "max_length": 512}
    assert trial.spec["method"] == {
        "type": "lora",
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "init_lora_weights": True,
    }
    assert trial.spec["train"] == {
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 50,
        "max_steps": 20,
        "eval_steps": 10,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "seed": 0,
    }
    assert trial.metrics == {
        "exact_match": 0.375,
        "train_loss": 1.5,
        "steps": 20,
        "train_seconds": 10.0,
        "wall_seconds": 17.0,
        "tokens_per_second": 1000.0,
        "peak_memory_bytes": 2_000_000,
        "trainable_parameters": 1000,
        "adapter_bytes": 4000,
    }
    assert [point["loss"] for point in trial.curve] == [2.0, 1.5]
    assert trial.scenario["model"] == {"name": "org/Small-1B", "parameters": 100_000}
    assert trial.scenario["hardware"] == {"device_name": "NVIDIA X", "device": "cuda"}
    assert trial.versions == {"peft": "0.1"}
    assert trial.created_at.isoformat() == "2026-01-02T03:04:05+00:00"
    assert import_history(history, path).unchanged == 1


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"peft": {"use_dora": True}}, {"type": "dora", "r": 16}),
        ({"peft": {"use_rslora": True}}, {"type": "rslora", "r": 16}),
        ({"train_config": {"dtype": "int4"}}, {"type": "qlora", "quantization_bit": 4}),
        ({"train_config": {"dtype": "int8"}}, {"type": "lora", "quantization_bit": 8}),
        ({"peft_config": None}, {"type": "full"}),
        (
            {"peft_config": {"peft_type": "P_TUNING", "num_virtual_tokens": 20}},
            {"type": "p_tuning", "num_virtual_tokens": 20},
        ),
        ({"peft_config": {"peft_type": "VERA", "r": 256}}, {"type": "vera", "r": 256}),
    ],
)
def test_methods_get_rayfins_names(history, tmp_path, changes, method):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(peft_result(**changes)))
    assert one(history, path).spec["method"].items() >= method.items()


@pytest.mark.parametrize(
    ("changes", "status", "error"),
    [
        ({"status": "failed", "error_msg": "boom"}, "failed", "boom"),
        ({"status": "canceled", "error_msg": "CUDA out of memory"}, "oom", "CUDA out of memory"),
        ({"status": "canceled", "error_msg": "manually"}, "stopped", "manually"),
        ({"loss": float("nan")}, "failed", "diverged: train loss is nan"),
    ],
)
def test_a_run_that_did_not_end_well_is_a_row(history, tmp_path, changes, status, error):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(peft_result(**changes)))
    trial = one(history, path)
    assert (trial.status, trial.error) == (status, error)


def test_a_directory_of_results_is_imported_whole(history, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(peft_result()))
    (tmp_path / "b.json").write_text(json.dumps(peft_result(peft={"r": 32})))
    (tmp_path / "c.json").write_text('{"train_info": {}}')
    (tmp_path / "d.json").write_text("{")
    (tmp_path / "notes.txt").write_text("not read")
    report = import_history(history, tmp_path)
    assert (report.added, len(report.skipped)) == (2, 2)
    assert report.skipped[0].startswith(f"{tmp_path / 'c.json'}:1: is not a result of PEFT's")
    assert report.skipped[1].startswith(f"{tmp_path / 'd.json'}:1: is not valid JSON")
    assert import_history(history, tmp_path).unchanged == 2


def test_a_directory_without_results_is_an_error(history, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HistoryError, match=r"holds no \.json file"):
        import_history(history, tmp_path / "empty")
