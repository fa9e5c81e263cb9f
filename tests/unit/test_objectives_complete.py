"""A registered objective lacks nothing anywhere; and a new one takes one file."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from rich.console import Console

from rayfin import objectives
from rayfin.advisor.estimate import estimate
from rayfin.advisor.memory import memory_of
from rayfin.cli.completion import SettingsCompleter
from rayfin.cli.settings import settings_lines
from rayfin.config import Config, build_config, dump_yaml, load_config, parse_yaml
from rayfin.data.columns import COLUMNS
from rayfin.errors import ConfigError, DataError, ModelError
from rayfin.evaluation import SweepOutcome, write_sweep_report
from rayfin.hardware import describe_hardware
from rayfin.history import History, TrialRecord
from rayfin.metrics import METRICS, Score
from rayfin.models import describe_model, write_tiny
from rayfin.objectives import OBJECTIVES, Objective, register
from rayfin.paths import Storage, StoragePath
from rayfin.training import TrialSpec
from rayfin.training.combination import check_combination
from rayfin.training.spec import TrialLeft, TrialResult
from rayfin.training.strategies import check_scaling
from rayfin.training.trial import run_trial
from rayfin.training.trial_cache import TrialCache
from rayfin.tuning.plan import new_plan
from rayfin.tuning.preflight import check_run
from rayfin.tuning.progress import evaluation_line, trials_table
from rayfin.tuning.rows import started, with_result
from rayfin.tuning.space import SearchSpace
from rayfin.tuning.space_check import check_space
from rayfin.tuning.sweep import best_trial


def lacks(name: str) -> Iterator[str]:
    """What the objective `name` lacks, in words."""
    objective = OBJECTIVES[name]
    for hook in ("collate", "count", "loss", "score", "scores", "change"):
        if getattr(objective, hook) is getattr(Objective, hook):
            yield f"a {hook}() of its own"
    if not objective.shapes or set(objective.shapes) - set(COLUMNS):
        yield "formats of rows that there are"
    if not hasattr(peft.TaskType, objective.task_type):
        yield "a task type of PEFT's"
    if not hasattr(transformers, objective.auto_class):
        yield "an auto class of Transformers'"
    if METRICS[objective.metrics[0]].progress is None:
        yield "a column for its main score in a sweep's table"
    for metric in map(METRICS.__getitem__, objective.metrics):
        if not isinstance(metric, Score) or "{value}" not in metric.says:
            yield f"a sentence for {metric.name}"
    for setting, field in objective.settings_class.model_fields.items():
        if not field.description or field.is_required():
            yield f"a description and a default of train.{setting}"
    if not (objective.__doc__ and objective.title and objective.columns):
        yield "a docstring, a title, or columns"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_lacks_nothing(name: str) -> None:
    assert list(lacks(name)) == []


# --- an objective that a test makes up ----------------------------------------------------

FIRST_TOKEN = '''
"""The first token of each answer, and nothing else."""

import torch
from pydantic import Field
from torch.nn import functional

from rayfin.metrics import ONLY_BASE, Column, Score
from rayfin.metrics import register as register_metric
from rayfin.objectives.base import Objective, register
from rayfin.objectives.tensors import count_labels, label_logits, pad
from rayfin.samples import NO_LOSS
from rayfin.section import Section

register_metric(
    Score(
        name="first_right", label="First token right", kind="share", better="more",
        says="begins {value} rightly", of_samples=True, progress=Column("first_right", 4),
    )
)


class FirstTokenSettings(Section):
    smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the loss that asks for any token."""


@register
class FirstToken(Objective):
    """The cross entropy of the first token of the last answer."""

    name = "first_token"
    title = "first tokens"
    shapes = ("prompt_completion", "messages")
    packing = False
    metrics = ("first_right",)
    columns = ("right",)
    settings_class = FirstTokenSettings

    def encode(self, examples, tokenize):
        samples = tokenize(examples)
        for sample in samples:
            labels = sample["labels"]
            first = next(i for i, label in enumerate(labels) if label != NO_LOSS)
            sample["labels"] = [x if i == first else NO_LOSS for i, x in enumerate(labels)]
        return samples

    def collate(self, samples, pad_token_id, *, packing=False):
        return pad(samples, pad_token_id)

    def count(self, batch):
        return count_labels(batch)

    def loss(self, model, batch):
        logits, targets, _ = label_logits(model, batch)
        smoothing = self.settings.smoothing
        return functional.cross_entropy(
            logits.float(), targets, reduction="sum", label_smoothing=smoothing
        )

    def score(self, model, batch):
        logits, targets, _ = label_logits(model, batch)
        return (logits.argmax(-1) == targets).double().cpu()[:, None]

    def scores(self, table):
        return {"first_right": float(table.mean())}

    def change(self, table, base):
        return {f"first_right{ONLY_BASE}": int((base > table).sum())}
'''


@pytest.fixture
def first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file more in rayfin/objectives, and nothing else."""
    with one_more("first_token", FIRST_TOKEN, tmp_path, monkeypatch):
        yield "first_token"


@contextmanager
def one_more(
    name: str, source: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    (directory / f"{name}.py").write_text(source)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(directory)])
    before = set(METRICS)
    objectives.load_all()
    yield
    del OBJECTIVES[name], sys.modules[f"rayfin.objectives.{name}"]
    for metric in set(METRICS) - before:
        del METRICS[metric]


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {n}", "completion": f"yes {n}"} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def configured(data: str, **more: Any) -> Config:
    settings = {"train.stage": "first_token", "train.learning_rate": 1e-2, "train.max_steps": 6}
    settings |= {"train.eval_steps": 2, "model.name": "tiny", "data.max_length": 48}
    return build_config({"method": {"type": "lora"}}, settings | {"data.path": data, **more})


def test_a_file_makes_an_objective_that_is_configured_and_completed(
    first_token: str, data: str
) -> None:
    assert list(lacks(first_token)) == []
    config = load_config(None, ["train.stage=first_token", "train.smoothing=0.1"])
    assert config.train.model_dump()["smoothing"] == 0.1
    assert load_config(parse_yaml(dump_yaml(config), "saved")) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert (config.sweep.metric, config.sweep.direction) == ("first_right", "max")
    assert Config().sweep.metric == "eval_loss"
    with pytest.raises(ConfigError, match=r"train.stage: 'first' is not .* 'sft' or 'first_token'"):
        load_config(None, ["train.stage=first"])
    with pytest.raises(ConfigError, match=r"train.smoothing: unknown key"):
        load_config(None, ["train.smoothing=0.1"])
    with pytest.raises(ConfigError, match=r"unknown key .did you mean 'train.smoothing'"):
        load_config(None, ["train.stage=first_token", "train.smothing=0.1"])
    assert "train.stage=first_token" in SettingsCompleter("experiment")("train.stage=f")
    assert "train.smoothing=" in SettingsCompleter("experiment")("train.sm")
    lines = "\n".join(settings_lines())
    assert "train.stage = sft  (sft | first_token)" in lines and "train.smoothing = 0.0" in lines
    for wrong, says in (
        ({"train.packing": True}, "train.packing=true can't work with train.stage=first_token"),
        ({"sweep.metric": "exact_match"}, "sweep.metric=exact_match .* use one of first_right"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_combination(configured(data, **wrong))


def test_rows_that_an_objective_cannot_train_on_are_refused(
    first_token: str, tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a b"}\n{"text": "c d"}\n')
    spec = TrialSpec.of(configured(str(tmp_path / "texts.jsonl")))
    with pytest.raises(DataError, match=r"format text, which train.stage=first_token can't train"):
        TrialCache().tokenized(spec)


def test_a_file_makes_an_objective_that_trains_resumes_and_is_swept_and_reported(
    first_token: str, data: str, tmp_path: Path
) -> None:
    axes = {"sweep.parameters.train.smoothing": [0.0, 0.4]}
    config = configured(data, **axes)
    check_space(SearchSpace(config))
    plan, cache = new_plan(config, Storage.open(str(tmp_path / "runs"))), TrialCache()
    rows: list[TrialRecord] = []
    told: list[str] = []

    def tell(result: TrialResult) -> None:
        told.append(evaluation_line(result, config.train.model_dump()))

    with History.open(f"sqlite:///{tmp_path}/history.db") as history:
        for smoothing in (0.0, 0.4):
            planned = plan.trial({"train.smoothing": smoothing})
            result = run_trial(planned.spec, tell, location=planned.location, warm=cache)
            assert (result.status, result.error) == ("finished", None)
            history.put(with_result(started(planned), result))
        rows = history.trials(sweep_id=plan.sweep_id)
    assert len({row.fingerprint for row in rows}) == 2
    best = best_trial(rows, config.sweep.metric, config.sweep.direction)
    assert best is not None
    assert 1 == best.metrics["first_right"] > best.metrics["base_first_right"]
    assert best.curve[-1] == {"step": 6, "first_right": 1.0}
    assert "eval_loss" not in best.metrics
    assert told[0].startswith("step 2/6  first_right ") and "eval_loss" not in told[0]
    console = Console(width=120, file=io.StringIO())
    console.print(trials_table(config, rows))
    table = console.file.getvalue()  # type: ignore[attr-defined]
    assert "first_right" in table and "1.0000" in table and "eval_loss" not in table
    page = write_sweep_report(
        tmp_path / "report.html", SweepOutcome(rows, config, best)
    ).read_text()
    assert "begins 6 of 6 held-out samples rightly, the base model 0" in page
    assert "First token right" in page

    # Left at an evaluation, and taken up again from the checkpoint before it.
    location = StoragePath(tmp_path / "resumed")

    def leave(result: TrialResult) -> None:
        if result.metrics["steps"] == 4:
            raise TrialLeft

    with pytest.raises(TrialLeft):
        run_trial(plan.trial({}).spec, leave, location=location, warm=cache)
    resumed = run_trial(plan.trial({}).spec, lambda _: None, location=location, warm=cache)
    assert resumed.metrics["steps"] == 6
    whole = rows[0].curve if rows[0].spec["train"]["smoothing"] == 0 else rows[1].curve
    assert [p for p in resumed.curve if "loss" in p] == [p for p in whole if "loss" in p]


def test_an_objective_that_lacks_a_fact_or_a_metric_is_not_registered(first_token: str) -> None:
    before = list(OBJECTIVES)

    class Untitled(Objective):
        name = "untitled"

    class Unmeasured(OBJECTIVES[first_token]):  # type: ignore[misc]
        name = "unmeasured"
        metrics = ("nothing",)

    with pytest.raises(TypeError, match="Untitled lacks title, shapes, packing, metrics, columns"):
        register(Untitled)
    with pytest.raises(TypeError, match="unmeasured measures nothing, which is no score"):
        register(Unmeasured)
    with pytest.raises(TypeError, match="first_token is registered"):
        register(OBJECTIVES[first_token])
    assert list(OBJECTIVES) == before


# --- an objective with a companion --------------------------------------------------------

DISTILL = '''
"""Distillation: what a teacher says of each labelled token."""

import torch
from torch.nn import functional

from rayfin.metrics import Column, Score
from rayfin.metrics import register as register_metric
from rayfin.objectives.base import Companion, Objective, register
from rayfin.objectives.tensors import count_labels, label_logits, pad, ratio_error, sum_by_row
from rayfin.section import Section

register_metric(
    Score(
        name="teacher_kl", label="KL from the teacher", better="less",
        says="is {value} nats a token from its teacher", progress=Column("teacher_kl", 4),
    )
)

computed = []


class DistillSettings(Section):
    teacher: str = "tiny"
    """The model whose predictions are learned."""


@register
class Distill(Objective):
    """KL(teacher || student) at every labelled token (Hinton et al. 2015)."""

    name = "distill"
    title = "distillation"
    shapes = ("prompt_completion", "messages")
    packing = False
    metrics = ("teacher_kl",)
    columns = ("kl", "tokens")
    settings_class = DistillSettings

    def companions(self):
        return {"teacher": Companion(self.settings.teacher)}

    def collate(self, samples, pad_token_id, *, packing=False):
        return pad(samples, pad_token_id)

    def count(self, batch):
        return count_labels(batch)

    def divergences(self, model, batch):
        teacher = self.models["teacher"]
        computed.append((id(self), id(teacher), teacher.training))
        with torch.no_grad():
            taught = label_logits(teacher, batch)[0].float().log_softmax(-1)
        logits, _, rows = label_logits(model, batch)
        said = logits.float().log_softmax(-1)
        return functional.kl_div(said, taught, log_target=True, reduction="none").sum(-1), rows

    def loss(self, model, batch):
        return self.divergences(model, batch)[0].sum()

    def score(self, model, batch):
        divergences, rows = self.divergences(model, batch)
        columns = (divergences, torch.ones_like(divergences))
        return torch.stack([sum_by_row(each, rows, len(batch["labels"])) for each in columns], 1)

    def scores(self, table):
        return {"teacher_kl": float(table[:, 0].sum() / table[:, 1].sum())}

    def change(self, table, base):
        return {"teacher_kl_change_se": ratio_error((table - base)[:, 0], table[:, 1])}
'''


@pytest.fixture
def distill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with one_more("distill", DISTILL, tmp_path, monkeypatch):
        yield "distill"


@pytest.fixture
def teachers(tmp_path: Path) -> list[str]:
    """The directories of a teacher, of a copy of it, and of another one."""
    paths = [tmp_path / name for name in ("teacher", "copied", "other")]
    write_tiny(paths[0], seed=1)
    shutil.copytree(paths[0], paths[1])
    write_tiny(paths[2], seed=2)
    return [str(path) for path in paths]


def test_a_teacher_is_loaded_once_for_the_trials_of_a_worker(
    distill: str, teachers: list[str], data: str, tmp_path: Path
) -> None:
    assert list(lacks(distill)) == []
    computed = sys.modules["rayfin.objectives.distill"].computed
    cache = TrialCache()

    def trained(name: str, leave_at: int | None = None, **more: Any) -> TrialResult:
        config = configured(data, **{"train.stage": distill, "train.teacher": teachers[0]} | more)

        def tell(result: TrialResult) -> None:
            if result.metrics["steps"] == leave_at:
                raise TrialLeft

        computed.clear()
        location = StoragePath(tmp_path / name)
        result = run_trial(TrialSpec.of(config), tell, location=location, warm=cache)
        assert (result.status, result.error) == ("finished", None)
        # Base scores, losses and scores: of one object and one teacher, in eval mode.
        assert len(set(computed)) == 1 and not computed[0][2]
        return result

    whole = trained("whole")
    assert whole.metrics["teacher_kl"] < 0.9 * whole.metrics["base_teacher_kl"]
    assert whole.scenario["companions"]["teacher"]["parameters"] > 0
    trained("slow", **{"train.learning_rate": 1e-4})
    assert (cache.loads, cache.companion_loads) == (1, 1)

    with pytest.raises(TrialLeft):
        trained("left", leave_at=4)
    resumed = trained("left")
    assert [p for p in resumed.curve if "loss" in p] == [p for p in whole.curve if "loss" in p]

    hardware = describe_hardware()
    of = {"train.stage": distill, "train.teacher": teachers[0]}
    kept = cache.objective(TrialSpec.of(configured(data, **of)), hardware).models["teacher"]
    assert not kept.training and not any(p.requires_grad for p in kept.parameters())
    kept.itself = [kept]  # only the collector frees what is in a cycle
    first = weakref.ref(kept)
    del kept
    other = trained("other", **{"train.teacher": teachers[2]})
    assert other.metrics["base_teacher_kl"] != whole.metrics["base_teacher_kl"]
    assert (cache.loads, cache.companion_loads) == (1, 2)
    assert first() is None


def test_the_content_of_a_teacher_is_a_part_of_what_a_trial_is(
    distill: str,
    teachers: list[str],
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = {"train.stage": distill, "sweep.parameters.train.teacher": [*teachers, "copied"]}
    plan = new_plan(configured(data, **of), Storage.open(str(tmp_path / "runs")))
    monkeypatch.chdir(tmp_path)
    trials = [plan.trial({"train.teacher": name}) for name in (*teachers, "copied")]
    first, copied, other, relative = (trial.fingerprint for trial in trials)
    assert first == copied == relative != other
    # Workers run in directories of their own.
    alone = TrialSpec.of(configured(data, **{"train.stage": distill, "train.teacher": "copied"}))
    for spec in (trials[3].spec, alone):
        assert spec.train.model_dump()["teacher"] == teachers[1]
    plain = new_plan(configured(data, **{"train.stage": "sft"}), plan.storage).trial({})
    assert plain.fingerprint == plain.spec.fingerprint(
        model_identity=plan.identity(plain.spec.model),
        data_digest=plan.corpus(plain.spec.data).digest,
    )


def test_a_teacher_is_looked_for_and_counted_before_anything_starts(
    distill: str, teachers: list[str], data: str, tmp_path: Path
) -> None:
    storage = Storage.open(str(tmp_path / "runs"))
    missing = configured(
        data, **{"train.stage": distill, "train.teacher": str(tmp_path / "missing")}
    )
    with pytest.raises(ModelError, match=r"^train.teacher: .*missing"):
        check_run(new_plan(missing, storage), [missing], None)
    config = configured(data, **{"train.stage": distill, "train.teacher": teachers[0]})
    check_run(new_plan(config, storage), [config], None)
    facts, hardware = describe_model(config.model), describe_hardware(False)
    counted = estimate(config, facts, hardware).parts
    alone = memory_of(config, facts, device="cpu")
    assert counted.weights == alone.weights + 4 * describe_model(config.model).parameters
    (Path(teachers[1]) / "tokenizer.json").unlink()
    broken = configured(data, **{"train.stage": distill, "train.teacher": teachers[1]})
    with pytest.raises(ModelError, match=r"^train.teacher: the tokenizer in "):
        check_run(new_plan(broken, storage), [broken], None)
    sharded = config.scaling.model_copy(update={"strategy": "deepspeed-zero3"})
    with pytest.raises(ConfigError, match=r"zero3 can't train train.stage=distill: .* use ddp"):
        check_scaling(config.model_copy(update={"scaling": sharded}))
