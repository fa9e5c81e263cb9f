"""A trial's specification, its result, and the fingerprint that names its computation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rayfin.config import Config, DataConfig, MethodConfig, ModelConfig, Section, TrainConfig
from rayfin.config.optimizers import OPTIMIZERS
from rayfin.models.chat_templates import template_digest, template_names
from rayfin.objectives import objective_of
from rayfin.paths import StoragePath
from rayfin.statuses import Status
from rayfin.training.schedules import EVALUATED, WITHOUT_WARMUP

MEMORY_MONITOR = "running low on memory"
"""Words by which Ray says that it ended a process before its machine ran out of memory."""


class TrialSpec(Section):
    """The sections of a configuration that decide a trial's result."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    train: TrainConfig
    metric: str | None = None
    """The score that says which evaluation is the best; None where nothing depends on that."""

    @classmethod
    def of(cls, config: Config) -> TrialSpec:
        """Local paths become absolute: Ray's workers run in directories of their own.

        The adapter that the method continues becomes its directory. Raises AdapterError where there
        is none.
        """
        from rayfin.training.starting_adapter import pinned

        return cls(
            model=config.model.model_copy(update={"name": absolute(config.model.name)}),
            data=_absolute_data(config.data),
            method=pinned(config),
            train=absolute_companions(config.train),
            metric=deciding_metric(config),
        )

    def with_rows(self, rows: int) -> TrialSpec:
        """Return the specification with the steps that it has on `rows` training samples."""
        train = self.train.with_rows(rows)
        return self if train is self.train else self.model_copy(update={"train": train})

    def fingerprint(
        self,
        *,
        model_identity: str,
        data_digest: str,
        companions: Mapping[str, str] | None = None,
        start: str | None = None,
    ) -> str:
        """Names the computation, not where it runs: 16 hex digits.

        The model and the data enter by their content, not by their paths, and the batches by the
        number of samples in an optimizer step, which any number of workers share. `companions` are
        the identities of the objective's, by the settings that name them; `start` is that of the
        adapter in method.init_from.
        """
        train = _computed(self.train)
        samples = train.pop("per_device_train_batch_size") * train.pop(
            "gradient_accumulation_steps"
        )
        if self.metric is not None:  # what is kept, and when a trial ends, depends on both
            train |= {"eval_steps": self.train.evaluate_every, "metric": self.metric}
        train |= companions or {}
        attention = self.model.attn_implementation
        method = self.method.computed()
        if self.method.init_from is not None:
            method["init_from"] = start or self.method.init_from
        computation = {
            "model": [model_identity, self.model.dtype, *([attention] * (attention != "auto"))],
            "data": [data_digest, self.data.max_length, *self._tokens()],
            "method": method,
            "train": train | {"samples_per_step": samples},
        }
        return _digest(computation)

    def course(self, data_digest: str) -> str:
        """Return 16 hex digits that name the order of the samples, and whose state the optimizer's.

        Of two trainings of one course, the second can continue the first: it takes the samples that
        come next, and the optimizer's state as it was. Rates and the number of steps may differ.
        """
        train = self.train
        samples = train.per_device_train_batch_size * train.gradient_accumulation_steps
        order = {
            "data": [data_digest, self.data.max_length, self.data.streaming, *self._tokens()],
            "seed": train.seed,
        }
        if train.num_train_epochs is not None:  # each pass has steps of its own
            order["passes"] = True
        optimizer = OPTIMIZERS[train.optim].same_as or train.optim
        in_epochs = train.num_train_epochs is not None
        if train.optim_args is not None:  # with momentum, say, there is more state
            order["optim_args"] = train.optim_args
        if train.train_on != "all":  # other samples are left without an answer, and so left out
            order["train_on"] = train.train_on
        if in_epochs and not train.group_by_length:  # a pass is divided into steps otherwise
            order["group_by_length"] = False
        return _digest(order | {"step": [samples, train.stage, optimizer], "in_epochs": in_epochs})

    def _tokens(self) -> list[dict[str, str]]:
        """Return how the samples become tokens, where that isn't the model's and rayfin's way."""
        data = self.data
        ways = {
            "chat_template": data.chat_template and template_digest(data.chat_template),
            "system": data.system,
            "truncation": data.truncation if data.truncation != "right" else None,
        }
        written = {name: way for name, way in ways.items() if way is not None}
        return [written] if written else []


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _absolute_data(data: DataConfig) -> DataConfig:
    template = data.chat_template
    if template is not None and template not in template_names():
        template = absolute(template)
    return data.with_paths(absolute).model_copy(update={"chat_template": template})


_FIRST = frozenset(
    {
        *("stage", "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size"),
        *("gradient_accumulation_steps", "max_steps", "eval_steps", "save_steps", "seed"),
        *("lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "packing"),
        *("group_by_length", "gradient_checkpointing"),
    }
)
"""Settings of every objective that enter a fingerprint at their default, too. Those that came later
enter where they differ from it, so that trials in older histories are found again."""


def _computed(train: TrainConfig) -> dict[str, Any]:
    """Return the settings on which the computation depends, those without an effect at defaults."""
    found = train.model_dump(mode="json")
    fields = TrainConfig.model_fields
    if train.lr_scheduler_type in WITHOUT_WARMUP or train.warmup_steps is not None:
        found["warmup_ratio"] = fields["warmup_ratio"].default
    found["optim"] = OPTIMIZERS[train.optim].same_as or train.optim
    for name in (
        *("per_device_eval_batch_size", "eval_steps", "save_steps"),
        *("sample_generations", "save_only_model"),
    ):
        del found[name]  # how often one looks, at what, and what is kept: not what is computed
    if train.num_train_epochs is not None:
        del found["max_steps"]  # they follow from the epochs and the data
    if train.lr_scheduler_type in EVALUATED:
        found["eval_steps"] = train.evaluate_every  # it is, by when the rate changes
    return {
        name: value
        for name, value in found.items()
        if name in _FIRST
        or name not in fields
        or value != fields[name].get_default(call_default_factory=True)
    }


def deciding_metric(config: Config) -> str | None:
    """Return the score by which a trial of `config` compares its evaluations, if it does."""
    return config.sweep.metric if config.train.compares_evaluations else None


def absolute_companions(train: TrainConfig) -> TrainConfig:
    """Return the section with the local paths of the objective's companions made absolute."""
    paths = {name: absolute(it.name) for name, it in objective_of(train).companions().items()}
    own = {name: path for name, path in paths.items() if getattr(train, name, path) != path}
    return train.model_copy(update=own) if own else train


def absolute(name: str) -> str:
    """An existing file or directory by its absolute path; any other name as it is."""
    try:
        path = Path(name).expanduser()
        return str(path.resolve()) if name != "pydocs" and path.exists() else name
    except (OSError, RuntimeError):
        return name  # no file system takes it: it is a bundled model's, or a hub's


@dataclass(frozen=True)
class TrialResult:
    """The end of a trial, or (status running) its state at an evaluation.

    `metrics`: the objective's scores (eval_loss, exact_match, …), the same with `base_` of the
    untrained model, how sure the change is (`Objective.change`), train_seconds (optimizer steps
    only), wall_seconds, tokens_per_second, peak_memory_bytes, trainable_parameters, steps.
    `curve`: points {step, loss, learning_rate}, {step, eval_loss, exact_match, …} and, where
    train.sample_generations asks for them, {step, generations}: the answers that the model gave,
    each with its prompt, the data's own answer (reference) and whether the model ended it.
    """

    status: Status
    metrics: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    scenario: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    adapter: StoragePath | None = None
    max_steps: int | None = None
    """The optimizer steps of the whole trial, counted on the samples that it has; None where the
    data was not read."""
    storage_failed: bool = False
    """Whether it failed of its storage (a full disk, say), as any other trial would have."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values for JSON, with the location of the adapter as text."""
        return asdict(self) | {"adapter": str(self.adapter) if self.adapter else None}


Report = Callable[[TrialResult], bool | None]
"""Takes the trial as it stands at an evaluation; returns False to stop it."""


class TrialLeft(BaseException):
    """Raised by a report: the trial is left where it stands. No Exception: it is no failure."""
