"""Combinations that can't work, refused before anything loads."""

from __future__ import annotations

from rayfin.config import Config, TrainConfig
from rayfin.errors import ConfigError, MethodError
from rayfin.methods import methods_that
from rayfin.objectives import Objective, objective_of
from rayfin.training.optimization import check_optimization
from rayfin.training.precision import MIXED, mixed_refusal
from rayfin.training.spec import TrialSpec
from rayfin.training.strategies import needs_group


def check_combination(config: Config) -> None:
    """Raise MethodError or ConfigError, with what would work, where `config` can't be trained."""
    method, train = config.method, config.train

    _check_duration(train)

    def refuse(what: str, why: str, remedy: str) -> None:
        raise MethodError(f"{what} can't work with method.type={method.type}: {why}; {remedy}")

    def refuse_objective(what: str, why: str, remedy: str) -> None:
        raise ConfigError(f"{what} can't work with train.stage={train.stage}: {why}; {remedy}")

    if method.quantization_bit and not method.quantized_base:
        refuse(
            f"method.quantization_bit={method.quantization_bit}",
            "quantised weights have no gradient"
            if method.changes_base
            else "its update takes its shape from that of whole weights",
            f"use method.quantization_bit=null, or one of {methods_that('quantized_base')}",
        )
    if config.model.dtype == MIXED:
        if needs_group(config.scaling):
            workers, strategy = config.scaling.num_workers, config.scaling.strategy
            given = f"num_workers={workers}" if workers > 1 else f"strategy={strategy}"
            raise ConfigError(
                f"model.dtype={MIXED} can't work with scaling.{given}: workers share weights of "
                "one type; use model.dtype=auto or float32"
            )
        if (found := mixed_refusal(method)) is not None:
            refuse(f"model.dtype={MIXED}", *found)
    if train.packing and not method.packing:
        refuse(
            "train.packing=true",
            "a row of several samples would share one set of virtual tokens",
            f"use train.packing=false, or one of {methods_that('packing')}",
        )
    if train.gradient_checkpointing and not method.gradient_checkpointing:
        refuse(
            "train.gradient_checkpointing=true",
            "the learned prefix is a key-value cache, which recomputation drops",
            "use train.gradient_checkpointing=false",
        )
    for refusal in method.refusals(train.max_steps):
        refuse(*refusal)
    if method.init_from is not None:
        if (refused := method.continuation_refusal()) is not None:
            refuse(*refused)
        for name in method.first_weights:
            if (value := getattr(method, name)) != type(method).model_fields[name].default:
                refuse(
                    f"method.{name}={value} with method.init_from",
                    "training starts from the adapter's own weights",
                    f"leave method.{name} out",
                )
    objective = objective_of(train)
    for what, why, remedy in objective.refusals(method):
        refuse_objective(what, why, remedy)
    if train.packing and not objective.packing:
        refuse_objective(
            "train.packing=true", "its samples can't share a row", "use train.packing=false"
        )
    if train.sample_generations and objective.auto_class != Objective.auto_class:
        refuse_objective(
            f"train.sample_generations={train.sample_generations}",
            "its model answers in no words",
            "use train.sample_generations=0",
        )
    if config.sweep.metric not in objective.metrics:
        refuse_objective(
            f"sweep.metric={config.sweep.metric}",
            "it is not measured there",
            f"use one of {', '.join(objective.metrics)}",
        )
    check_optimization(config)
    if method.virtual_tokens:
        tokens = method.positions
        if tokens >= config.data.max_length:
            refuse(
                f"method.{method.capacity}={tokens}",
                f"samples have at most data.max_length={config.data.max_length} tokens",
                "use fewer virtual tokens",
            )


def counted(spec: TrialSpec, rows: int) -> TrialSpec:
    """Return `spec` with the steps that its epochs are on `rows` training samples.

    Raises MethodError where they are too few for the method.
    """
    found = spec.with_rows(rows)
    if found is not spec:
        for refusal in spec.method.refusals(found.train.max_steps):
            raise MethodError("{}: {}; {}".format(*refusal))
    return found


def _check_duration(train: TrainConfig) -> None:
    if train.num_train_epochs is not None and "max_steps" in train.model_fields_set:
        raise ConfigError(
            f"train.num_train_epochs={train.num_train_epochs:g} and train.max_steps="
            f"{train.max_steps} both say how long to train; give one of them (null takes the other "
            "away)"
        )
    if train.early_stopping_threshold and train.early_stopping_patience is None:
        raise ConfigError(
            f"train.early_stopping_threshold={train.early_stopping_threshold:g} has no effect "
            "without train.early_stopping_patience; give that too, such as "
            "train.early_stopping_patience=3"
        )
