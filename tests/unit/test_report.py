"""Parameter importance and the sweep report: what they say, and what they never do."""

import json
import math
import random
import re
from datetime import UTC, datetime, timedelta

import pytest

from rayfin.config import load_config
from rayfin.evaluation import Sample, SweepOutcome, parameter_importance, write_sweep_report
from rayfin.evaluation.quantities import show_number, show_quantity
from rayfin.history.record import TrialRecord

START = datetime(2025, 3, 4, 12, tzinfo=UTC)
SPACE = {
    "method.r": [4, 8, 16],
    "method.target_modules": ["all-linear", ["q_proj", "v_proj"]],
    "train.learning_rate": {"space": "loguniform", "lower": 1e-5, "upper": 3e-3},
}
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def config(**sections):
    return load_config({"sweep": {"parameters": SPACE}, **sections})


def record(number, *, learning_rate=2e-4, r=8, status="finished", loss=1.5, **fields):
    ended = status in ("finished", "stopped")
    metrics = {"eval_loss": loss, "base_eval_loss": 3.0, "train_seconds": 10.0 + r, "steps": 20}
    values = {
        "trial_id": f"t{number}",
        "sweep_id": "sweep-1",
        "fingerprint": "f",
        "status": status,
        "created_at": START + timedelta(minutes=number),
        "updated_at": START + timedelta(minutes=number + 1),
        "spec": {
            "method": {"type": "lora", "r": r, "target_modules": "all-linear"},
            "train": {"learning_rate": learning_rate},
        },
        "metrics": metrics if ended else {},
        "curve": [{"step": 10, "loss": 2.0}, {"step": 20, "eval_loss": loss}] if ended else [],
        "error": None if ended or status == "running" else "the loss became NaN",
    }
    return TrialRecord(**{**values, **fields})


def history(count, seed=0):
    """Trials whose loss depends on the learning rate, and on nothing else."""
    rng = random.Random(seed)
    trials = []
    for number in range(count):
        rate = 10 ** rng.uniform(-5, -2.5)
        loss = 1 + (math.log10(rate) + 3.5) ** 2
        trials.append(record(number, learning_rate=rate, r=rng.choice([4, 8, 16]), loss=loss))
    return trials


def written(tmp_path, trials, **options):
    options.setdefault("config", config())
    options.setdefault("best", None)
    beside = {key: options.pop(key) for key in ("samples", "notes") if key in options}
    outcome = SweepOutcome(trials, **options)
    return write_sweep_report(tmp_path / "report.html", outcome, **beside).read_text("utf-8")


def data_of(page):
    return json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.S).group(1))


def test_a_sweep_over_epochs_tells_the_steps_that_they_were(tmp_path):
    epochs = config(sweep={"parameters": {"train.num_train_epochs": [1, 2]}})
    rows = [record(n, spec={"train": {"num_train_epochs": n, "max_steps": 7 * n}}) for n in (1, 2)]
    assert "up to 14 optimizer steps each" in written(tmp_path, rows, config=epochs)


@pytest.mark.parametrize("seed", range(5))
def test_the_parameter_that_decides_comes_first(seed):
    shares = parameter_importance(history(24, seed), "eval_loss", "min", list(SPACE))
    assert next(iter(shares)) == "train.learning_rate"
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["train.learning_rate"] > 0.5


def test_the_direction_of_the_metric_counts():
    trials = [record(n, r=r, loss=1.0 + n % 2) for n, r in enumerate([4, 8] * 10)]
    for mode in ("min", "max"):
        assert parameter_importance(trials, "eval_loss", mode, ["method.r"]) == {"method.r": 1.0}


def test_a_parameter_that_never_varied_is_not_judged():
    shares = parameter_importance(history(20), "eval_loss", "min", list(SPACE))
    assert "method.target_modules" not in shares


def test_a_parameter_of_another_method_may_be_absent():
    trials = history(20)
    trials += [t.updated(trial_id=f"{t.trial_id}b", spec={"train": {}}) for t in trials[:4]]
    assert set(parameter_importance(trials, "eval_loss", "min", list(SPACE))) == {
        "train.learning_rate",
        "method.r",
    }


@pytest.mark.parametrize(
    "trials",
    [
        [],
        history(19),
        [record(n, r=4 * (n % 3 + 1)) for n in range(24)],
        [record(n, loss=1.0 + n) for n in range(24)],
        [*history(19), *(record(n, r=4 * n, status="failed") for n in range(20, 30))],
        [*history(19), *(record(n, r=4, status="stopped", loss=2) for n in range(20, 30))],
        [t.updated(spec={**t.spec, "data": {"path": n % 2}}) for n, t in enumerate(history(38))],
    ],
    ids=["none", "too few", "equal scores", "equal settings", "failed", "stopped", "other data"],
)
def test_no_importance_is_invented(trials):
    assert parameter_importance(trials, "eval_loss", "min", list(SPACE)) == {}


def test_the_page_refers_to_nothing_outside(tmp_path):
    trials = history(6)
    page = written(tmp_path, trials, best=trials[0], adapter="demo@1")
    tags = " ".join(re.findall(r"<[a-z][^>]*>", page))
    linked = re.findall(
        r"""\s(?:src|srcset|href|action|poster|data)\s*=\s*["']?([^"'\s>]*)""", tags
    )
    # An empty icon, so that no browser asks for one.
    assert linked == ["data:,"]
    assert not re.search(r"@import|fetch\(|XMLHttpRequest|\bimport\b.*from", page)
    # The one address in the file is the name of the SVG namespace.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


def test_names_and_texts_are_escaped_everywhere(tmp_path):
    spec = {"method": {"target_modules": EVIL}, "train": {"learning_rate": 1e-4}}
    trials = [record(0, spec=spec), record(1, status="failed", error=EVIL)]
    page = written(
        tmp_path,
        trials,
        config=config(model={"name": EVIL}, data={"path": EVIL}),
        best=trials[0],
        samples=[Sample(EVIL, EVIL, EVIL, EVIL)],
    )
    assert "<img" not in page
    # Only the data and the page's own script.
    assert len(re.findall(r"<script", page)) == 2
    assert data_of(page)["parameters"][1]["choices"][-1] == EVIL


def test_notes_are_listed_escaped_and_without_passwords(tmp_path):
    assert 'class="notes"' not in written(tmp_path, history(3))
    page = written(tmp_path, history(3), notes=[EVIL, "read from postgresql://ann:s3cret@db/h"])
    assert page.count("<li>&lt;/script&gt;") == 1
    assert "<li>read from postgresql://ann:***@db/h</li>" in page


def test_what_is_to_be_told_of_the_data_is_told_once(tmp_path):
    told = {"data": {"notes": ["evaluated on test.jsonl"]}}
    page = written(tmp_path, [record(n, scenario=told) for n in range(3)])
    assert page.count("<li>evaluated on test.jsonl</li>") == 1


def test_passwords_stay_out(tmp_path):
    page = written(
        tmp_path,
        [record(0, status="failed", error="can't reach postgresql://ann:s3cret@db/h")],
        config=config(history="postgresql+psycopg://ann:s3cret@db/h"),
    )
    assert "s3cret" not in page
    assert page.count("//ann:***@db/h") == 2


def test_chart_data_follows_the_trials(tmp_path):
    trials = [record(1, r=16, loss=1.2), record(0, r=4), record(2, status="oom")]
    data = data_of(written(tmp_path, trials, best=trials[0]))
    assert [trial["id"] for trial in data["trials"]] == ["t0", "t1", "t2"]
    assert [trial["metric"] for trial in data["trials"]] == [1.5, 1.2, None]
    assert [trial["best"] for trial in data["trials"]] == [False, True, False]
    assert data["trials"][0]["evalLoss"] == [[20.0, 1.5]]
    assert data["baseLoss"] == 3.0
    rank, modules, rate = data["parameters"]
    assert (rank["kind"], rank["choices"], rank["values"]) == (
        "choice",
        ["4", "8", "16"],
        [0, 2, 1],
    )
    assert modules["choices"] == ["all-linear", "q_proj, v_proj"]
    assert (rate["kind"], rate["lower"], rate["upper"]) == ("log", 1e-5, 3e-3)
    assert [cost["label"] for cost in data["costs"]] == ["Training time"]


def test_the_best_is_set_against_the_base(tmp_path):
    metrics = {
        "eval_loss": 1.5, "base_eval_loss": 13.0, "eval_loss_change_se": 0.1,
        "perplexity": math.exp(1.5), "base_perplexity": math.exp(13), "token_accuracy": 0.5,
        "exact_match": 0.1, "base_exact_match": 0.3, "exact_match_only_base": 8,
    }  # fmt: skip
    trial = record(0, metrics=metrics, scenario={"data": {"rows_eval": 40}})
    page = written(tmp_path, [trial], best=trial, adapter="demo@2")
    scores = re.sub(r"<[^>]*>", " ", re.search(r"<tbody>(.*?)</tbody>", page, re.S).group(1))
    assert " ".join(scores.split()) == (
        "Eval loss 13 1.5 11.50 better 95 % interval 11.30 to 11.70 "
        "Perplexity 442,413 4.482 98,716 times lower 95 % interval ÷ 80,638 to ÷ 120,846 "
        "Exact match 30.0 % 10.0 % 20 points worse 95 % interval −34 to −6 "
        "Token accuracy – 50.0 % –"
    )
    assert '<span class="worse">20 points worse' in page
    assert "rayfin adapters show demo@2 storage=" in page


def test_the_verdict_comes_first_and_the_versions_last(tmp_path):
    trial = record(0, versions={"torch": "2.13.0"})
    page = written(tmp_path, [trial], best=trial)
    text = " ".join(re.sub(r"<[^>]*>", " ", page[page.index("<body>") :]).split())
    assert text.startswith("rayfin sweep sweep-1 The one finished trial (#1: lora, r 8, ")
    assert page.count("2.13.0") == 1
    assert page.index("Resolved configuration") < page.index("Versions: torch 2.13.0")


def test_failed_trials_are_rows_with_their_reason(tmp_path):
    trace = "Traceback (most recent call last):\n  File x\nValueError: rank 0"
    trials = [record(0), record(1, status="failed", error=trace), record(2, status="stopped")]
    page = written(tmp_path, trials)
    assert "<summary>ValueError: rank 0</summary>" in page
    assert "after 20 steps" in page
    assert page.count("<tr data-trial=") == 3


def test_importance_waits_for_trials_that_tell_it(tmp_path):
    few = written(tmp_path, history(19))
    assert "it takes 20 finished trials on the same model and data" in few
    assert "there are 19." in few
    assert 'class="bar"' not in few
    assert 'class="bar"' in written(tmp_path, history(20))
    assert "there are none." in written(tmp_path, [])


def test_long_curves_are_thinned_but_keep_their_ends(tmp_path):
    curve = [{"step": step, "loss": 1.0} for step in range(1, 60_001)]
    points = data_of(written(tmp_path, [record(0, curve=curve)]))["trials"][0]["loss"]
    assert len(points) <= 20_001
    assert (points[0][0], points[-1][0]) == (1, 60_000)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.23456, "1.235"), (12345.6, "12,346"), (0.0002, "2e-4"), (0.00123, "1.23e-3"),
     (2e6, "2e6"), (-0.5, "-0.5"), (100.0, "100")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert show_number(value) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("exact_match", 0.25, "25.0 %"), ("train_seconds", 150.0, "150 s"),
     ("train_seconds", 900, "15 min"), ("peak_memory_bytes", 3 * 2**30, "3 GiB"),
     ("trainable_parameters", 9_728_000, "9.728 M"), ("steps", 1200, "1,200"),
     ("eval_loss", math.nan, "–"), ("eval_loss", None, "–")],
)  # fmt: skip
def test_quantities_carry_their_unit(name, value, text):
    assert show_quantity(name, value) == text
