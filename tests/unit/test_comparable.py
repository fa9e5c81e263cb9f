"""Which trials' scores compare: by what was scored, and by which score."""

from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayfin.config import ModelConfig, build_config
from rayfin.data import load_corpus, tokenize_corpus
from rayfin.data.token_settings import TokenSettings
from rayfin.evaluation import SweepOutcome, write_sweep_report
from rayfin.evaluation.importance import comparable_trials
from rayfin.history import TrialRecord
from rayfin.history.comparable import centred, comparable, comparison_groups, not_comparable
from rayfin.library.results import SweepResult
from rayfin.models import load_tokenizer
from rayfin.objectives import SFT
from rayfin.tuning.comparison import comparison_notes
from rayfin.tuning.progress import trials_table
from rayfin.tuning.rows import early_stop, end_line
from rayfin.tuning.space import SearchSpace
from rayfin.tuning.space_check import space_notes

STOP = "early stop at step 4, after 2 evaluations without a better exact_match"
BEST = "the best evaluation by exact_match"
AT = datetime(2026, 1, 2, tzinfo=UTC)


def row(number: int, loss: float, profile: dict[str, Any], **spec: Any) -> TrialRecord:
    settings = {"method": {"type": "lora", "r": number}, "train": {"max_steps": 4}}
    return TrialRecord(
        trial_id=f"t{number}",
        sweep_id="s",
        fingerprint=f"f{number}",
        status="finished",
        created_at=AT + timedelta(minutes=number),
        updated_at=AT + timedelta(minutes=number),
        spec=settings | {"model": {"name": "tiny"}, "data": {"path": "a"}} | spec,
        scenario={"data": profile},
        metrics={"eval_loss": loss, "exact_match": loss / 10, "steps": 4},
        curve=[{"step": 2, "loss": 1.0}, {"step": 4, "eval_loss": loss}],
    )


def profiles(path: Path, **settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What rows say of their data, by names of settings."""
    found = {}
    for name, own in settings.items():
        config = build_config({"data": {"path": str(path), "max_length": 300} | own})
        tokenizer = load_tokenizer(ModelConfig(name="tiny"), config.data.chat_template)
        corpus, tokens = load_corpus(config.data), TokenSettings.of(config.data, config.train)
        tokenized = tokenize_corpus(corpus, tokenizer, config.data.max_length, SFT, tokens)
        found[name] = tokenized.profile.as_dict()
    return found


@pytest.mark.parametrize("turns", [1, 2])
def test_exact_matches_compare_where_the_same_answers_are_given(tmp_path: Path, turns: int) -> None:
    path = tmp_path / "rows.jsonl"
    talks = [
        [
            {"role": role, "content": f"{role} {n}" + " so" * (n % 9)}
            for _ in range(turns)
            for role in ("user", "assistant")
        ]
        for n in range(40)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    found = profiles(
        path,
        own={},
        wider={"max_length": 400},
        phi={"chat_template": "phi"},
        system={"system": "Be kind."},
        cut={"max_length": 60},
        other={"val_size": 0.3},
    )
    rows = [row(n, 1.0, profile) for n, profile in enumerate(found.values())]

    def alike(metric: str) -> list[set[str]]:
        groups: dict[str, set[str]] = {}
        for name, group in zip(found, comparison_groups(rows, metric), strict=True):
            groups.setdefault(group, set()).add(name)
        return [names for names in groups.values() if len(names) > 1]

    assert alike("eval_loss") == alike("token_accuracy") == [{"own", "wider"}]
    # Of an answer before the last, a template may leave out what it can't tell exactly.
    expected = {"own", "wider", "phi", "system"} if turns == 1 else {"own", "wider"}
    assert alike("exact_match") == [expected]


def test_centred_scores_tell_nothing_between_groups_and_all_within() -> None:
    values, groups = [1.0, 2.0, 4.0, 10.0, 30.0, 7.0], ["a", "a", "a", "b", "b", "c"]
    found = centred(values, groups)
    assert found == [1.0, 2.0, 4.0, 1.0, 3.0, 2.0]
    assert centred(values, ["a"] * 6) == values


@pytest.mark.parametrize(
    ("a", "b", "stand"),
    [
        ([3.0, 4.0, 5.0], [30.0, 100.0, 300.0], [3.0, 4.0, 4.0 + 200 / 70]),
        (
            [3.0, 4.0, 5.0],
            [30.0, 30.0, 30.0, 30.0],
            [4.0] * 4,
        ),  # it is the larger, but says nothing
        ([3.0, 4.0, 5.0], [30.0, 30.0, 60.0], [4.0, 4.0, 7.0]),
        ([3.0, 3.0, 3.0], [30.0], [3.0]),
    ],
)
def test_groups_of_scores_on_other_scales_stand_alike(
    a: list[float], b: list[float], stand: list[float]
) -> None:
    """The better ones of a model with large perplexities are no better than those of another."""
    found = centred([*a, *b], ["a"] * len(a) + ["b"] * len(b))
    assert found == [*a, *map(pytest.approx, stand)]


def test_the_end_names_what_decided_on_what_was_scored() -> None:
    axes = {
        "train.train_on": ["all", "last"],
        "data.streaming": [False, True],
        "model.dtype": ["auto", "float32"],
    }
    space = SearchSpace(build_config({"sweep": {"parameters": axes}}))
    rows = []
    for number, on in enumerate(["all", "all", "last"]):
        other = on == "last"
        rows.append(
            row(
                number,
                1.0,
                {"eval_digest": on},
                train={"max_steps": 4, "train_on": on},
                data={"path": "a", "streaming": other},
                model={"name": "tiny", "dtype": "float32" if other else "auto"},
            )
        )
    (note,) = comparison_notes(space, rows)
    assert note.startswith("trial 3 with train.train_on=last was scored on other held-out tokens")


@pytest.mark.parametrize(
    ("axes", "data", "metric", "says"),
    [
        ({"method.r": [2, 4], "train.optim": ["adafactor", "adamw_torch"]}, {}, "eval_loss", None),
        ({"data.max_length": [40, 64]}, {}, "eval_loss", "compare eval_loss only among trials"),
        ({"data.max_length": [40, 64]}, {}, "exact_match", "compare exact_match only among trials"),
        (
            {"data.chat_template": ["chatml", "phi"], "data.eval_path": ["a", "b"]},
            {},
            "eval_loss",
            "same ones; sweep.metric=exact_match compares across data.chat_template where answers",
        ),
        ({"data.system": ["a", "b"]}, {}, "exact_match", "; it compares across data.system where"),
        ({"data.path": ["a", "b"]}, {}, "eval_loss", "data.path decides which held-out tokens"),
        ({"data.path": ["a", "b"]}, {"eval_path": "e"}, "eval_loss", None),
        ({"data.streaming": [True, False]}, {}, "eval_loss", None),
    ],
)  # fmt: skip
def test_a_sweep_says_what_it_will_compare_before_it_starts(
    axes: dict[str, Any], data: dict[str, Any], metric: str, says: str | None
) -> None:
    sweep = {"parameters": axes, "metric": metric}
    lines = space_notes(SearchSpace(build_config({"data": data, "sweep": sweep})))
    (line,) = lines or [""]
    assert (says or "") in line and (says is None) == (line == "")


@pytest.mark.parametrize(
    ("search", "scheduler", "who"),
    [
        ("auto", "asha", "ASHA, the search and the choice of the best compare"),
        ("tpe", "none", "the search and the choice of the best compare"),
        ("grid", "asha", "ASHA and the choice of the best compare"),
        ("grid", "predictive", "early stopping and the choice of the best compare"),
        ("random", "none", "the choice of the best compares"),
    ],
)
def test_a_sweep_says_who_compares(search: str, scheduler: str, who: str) -> None:
    sweep = {"parameters": {"data.max_length": [40, 64]}, "search": search, "scheduler": scheduler}
    (line,) = space_notes(SearchSpace(build_config({"sweep": sweep})))
    assert f"tokens are scored: {who} eval_loss only among trials" in line


def test_reports_show_on_one_axis_only_what_compares(tmp_path: Path) -> None:
    """Of three trials of other tokens, and four among which the best is chosen."""
    rows = [row(n, 3.0 - n / 10, {"eval_digest": "long"}) for n in range(4)]
    rows += [
        row(n, 0.1, {"eval_digest": "short"}, data={"path": "a", "max_length": 40})
        for n in range(4, 7)
    ]
    config = build_config(
        {"sweep": {"parameters": {"method.r": [0, 1, 2, 3], "data.max_length": [40, 256]}}}
    )
    best = rows[3]
    assert comparable(rows, "eval_loss") == rows[:4] == comparable_trials(rows, "eval_loss")
    assert not_comparable(rows, "eval_loss") == [False] * 4 + [True] * 3

    outcome = SweepOutcome(rows, config, best)
    page = write_sweep_report(tmp_path / "report.html", outcome).read_text("utf-8")
    found = re.search(r'id="report-data">(.*?)</script>', page, re.S)
    assert found is not None
    shown = json.loads(found.group(1))["trials"]
    assert [trial["metric"] for trial in shown] == [3.0, 2.9, 2.8, 2.7, None, None, None]
    assert [bool(trial["evalLoss"]) for trial in shown] == [True] * 4 + [False] * 3
    assert all(trial["loss"] for trial in shown)
    assert page.count("scored on other held-out tokens") == 3
    # In the table they stand with their scores, for who wants to know them.
    assert page.count('data-value="0.1"') == 3

    console = Console(width=160, file=io.StringIO())
    console.print(trials_table(config, rows))
    assert console.file.getvalue().count("scored on other held-out tokens") == 3
    result: Any = SweepResult(config, "s", tuple(rows), best, None, "", "")  # type: ignore[arg-type]
    assert result.not_comparable == ("t4", "t5", "t6")


def test_what_was_kept_is_said_in_words() -> None:
    ended = row(2, 1.0, {}).updated(scenario={"early_stop": 2400, "kept_step": 2160})
    assert early_stop(ended) == (
        "early stop at step 2400, kept the adapter of step 2160, the best evaluation"
    )
    console = Console(width=160, file=io.StringIO())
    console.print(trials_table(build_config({"sweep": {"parameters": {"method.r": [2]}}}), [ended]))
    assert early_stop(ended) in console.file.getvalue()


@pytest.mark.parametrize(
    ("keep", "scenario", "says"),
    [
        ("last", {}, ""),
        (
            "last",
            {"early_stop": 4},
            f"{STOP}; kept the adapter of step 4, the last ("
            "train.keep=best keeps that of the best evaluation)",
        ),
        (
            "best",
            {"kept_step": 2},
            f"kept the adapter of step 2, {BEST}",
        ),
        ("best", {}, f"kept the adapter of step 4, the last and {BEST}"),
        (
            "best",
            {"early_stop": 4, "kept_step": 2},
            f"{STOP}; kept the adapter of step 2, {BEST}",
        ),
    ],
)
def test_a_training_ends_with_what_it_kept_and_why(
    keep: str, scenario: dict[str, Any], says: str
) -> None:
    train = {"max_steps": 40, "keep": keep, "early_stopping_patience": 2}
    ended = row(2, 1.0, {}, train=train, metric="exact_match").updated(scenario=scenario)
    assert end_line(ended) == says
