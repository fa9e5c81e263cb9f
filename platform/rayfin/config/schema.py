"""The configuration of an experiment as frozen pydantic models, with a docstring for each field."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    create_model,
    model_validator,
)

from rayfin.config.data import DataConfig
from rayfin.config.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS, Schedule, check_name
from rayfin.config.steps import Interval, steps_of_epochs, steps_of_share
from rayfin.config.sweep import SweepConfig
from rayfin.methods import MethodConfig
from rayfin.objectives import DEFAULT, OBJECTIVES, main_metric
from rayfin.section import OneOf, Section
from rayfin.trackers import TRACKERS

ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ModelConfig(Section):
    name: str = Field("smollm2-135m", min_length=1)
    """A bundled model, a local directory or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "bf16-mixed"] = "auto"
    """Weights of the base model; auto is bfloat16 on GPUs that have it and float32 on CPU, but for
    trainings on processors with AMX: bf16-mixed has products of frozen weights in bfloat16 and all
    else in float32."""
    attn_implementation: Literal[
        "auto",
        "sdpa",
        "eager",
        "flash_attention_2",
        "flash_attention_3",
        "flex_attention",
    ] = "auto"
    """How training computes attention, by Transformers' names; auto is PyTorch's fused one (sdpa)
    where the architecture has it. Flash and flex attention need a GPU."""


class TrainConfig(Section):
    """How a trial is trained.

    Validated as itself, this class takes the settings of any registered objective, by its `stage`.
    """

    model_config = ConfigDict(polymorphic_serialization=True)

    stage: Annotated[str, OneOf(lambda: OBJECTIVES)] = DEFAULT
    """The objective: what the training is for. sft is supervised fine-tuning."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    per_device_train_batch_size: int = Field(4, ge=1)
    """Samples a device takes at once, at most."""
    per_device_eval_batch_size: int = Field(16, ge=1)
    """Samples a device evaluates at once."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches summed into one optimizer step; several workers share them."""
    num_train_epochs: float | None = Field(None, gt=0)
    """Passes over the training samples, in place of max_steps."""
    max_steps: int = Field(60, ge=1)
    """Optimizer steps."""
    eval_steps: Interval | None = None
    """Steps between evaluations, or a share of all steps below 1; null takes a quarter."""
    save_steps: Interval | None = None
    """Steps between checkpoints, or a share of all steps below 1; null takes eval_steps."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """End a trial after so many evaluations without a better sweep.metric; null never does."""
    early_stopping_threshold: float = Field(0.0, ge=0)
    """An evaluation is better for early_stopping_patience by more than this."""
    keep: Literal["best", "last"] = "last"
    """The adapter of the best evaluation by sweep.metric, or that of the last step."""
    optim: Annotated[str, OneOf(lambda: OPTIMIZERS), BeforeValidator(check_name)] = (
        DEFAULT_OPTIMIZER
    )
    """Optimizer, by Transformers' names."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment of AdamW, AdEMAMix and Lion."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment of AdamW and AdEMAMix, and of Lion's only one."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """What AdamW and AdEMAMix add to the denominator."""
    optim_args: str | None = Field(None, min_length=1)
    """Arguments of some other optimizers, as in momentum=0.9,nesterov=true."""
    lr_scheduler_type: Schedule = "cosine"
    """Course of the learning rate, by Transformers' names."""
    lr_scheduler_kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Arguments of the schedule, as in {min_lr_rate: 0.1}."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of max_steps in which the learning rate rises, rounded up; never all of them."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps in which the learning rate rises; null takes warmup_ratio."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay: decoupled in AdamW, AdEMAMix, Lion and Adafactor, and added to the gradient in
    the others."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    train_on: Literal["all", "last"] = "all"
    """The assistant's turns of a conversation that have loss: all of them, or the last one."""
    packing: bool = False
    """Put several samples into one sequence, kept apart by position ids."""
    group_by_length: bool = True
    """Batch samples of similar length, so that little is padded."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """Noise on the token embeddings while training (NEFTune); 5 to 15 is usual, null is none."""
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    """Share of a label's probability that is spread over all tokens, in the training loss only."""
    use_liger_kernel: bool = False
    """Use Liger's Triton kernels for norms, rotary embeddings and feed-forward layers, on GPUs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the initialisation, the order of samples and dropout."""
    save_only_model: bool = False
    """Save the adapter without the optimizer's state, with which method.init_from would go on
    from it: a third of the size."""
    sample_generations: int = Field(0, ge=0)
    """Held-out questions that the model answers at each evaluation, always the same ones; shown in
    the terminal, the trackers and the report. The training stays the same, bit for bit."""

    _counted: bool = PrivateAttr(False)

    @model_validator(mode="wrap")
    @classmethod
    def _of_the_objective(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        stage = value.get("stage") if isinstance(value, Mapping) else None
        if cls is not TrainConfig or not isinstance(stage, str):
            return handler(value)
        section: Any = train_section(stage)
        found: Self = handler(value) if section is TrainConfig else section.model_validate(value)
        return found

    def __reduce__(self) -> Any:
        """Pickles by the settings: an objective's section is made in the process that needs it."""
        return _unpickled, (self.model_dump(exclude_unset=True), self.steps)

    def with_rows(self, rows: int) -> Self:
        """Return the section with max_steps for training data of `rows` samples.

        They change where num_train_epochs is given. Everything that asks for a trial's steps reads
        max_steps of a section that this method has returned.
        """
        if self.num_train_epochs is None:
            return self
        samples = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.with_steps(steps_of_epochs(self.num_train_epochs, rows, samples))

    def with_steps(self, steps: int) -> Self:
        """Return the section with other max_steps, which count as computed and not as written."""
        copied = self.model_copy()
        copied.__dict__["max_steps"], copied._counted = steps, True
        return copied

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None where they are epochs and the samples were not counted."""
        known = self._counted or "max_steps" in self.model_fields_set
        return self.max_steps if known or self.num_train_epochs is None else None

    @property
    def evaluate_every(self) -> int:
        """Steps between evaluations."""
        if self.eval_steps is None and self.num_train_epochs is None:
            return max(1, self.max_steps // 4)
        return steps_of_share(self.eval_steps or 0.25, self.max_steps)

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        if self.save_steps is None:
            return self.evaluate_every
        return steps_of_share(self.save_steps, self.max_steps)

    @property
    def compares_evaluations(self) -> bool:
        """Whether what a trial comes to depends on how its evaluations compare."""
        return self.keep == "best" or self.early_stopping_patience is not None


def _unpickled(settings: dict[str, Any], steps: int | None) -> TrainConfig:
    found = TrainConfig.model_validate(settings)
    return found if found.num_train_epochs is None or steps is None else found.with_steps(steps)


def train_section(stage: str) -> type[TrainConfig]:
    """Return the section `train` of an objective; the general one for a name that is none."""
    objective = OBJECTIVES.get(stage)
    if objective is None or not objective.settings_class.model_fields:
        return TrainConfig
    return _section_with(objective.settings_class)


@functools.cache
def _section_with(settings: type[Section]) -> type[TrainConfig]:
    bases: Any = (settings, TrainConfig)
    return cast("type[TrainConfig]", create_model("TrainConfig", __base__=bases))


Strategy = Literal["auto", "ddp", "fsdp", "deepspeed-zero1", "deepspeed-zero2", "deepspeed-zero3"]


class ScalingConfig(Section):
    num_workers: int = Field(1, ge=1)
    """Processes that train one trial together; they share the samples of each optimizer step."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Train on GPUs; auto uses one where there is one."""
    strategy: Strategy = "auto"
    """How several workers share a trial; auto takes the simplest that fits their memory."""
    cpu_offload: bool = False
    """Keep what the strategy shards in host memory; fsdp and deepspeed-zero1 to 3, on GPUs."""
    strategy_config: str | None = None
    """JSON file of DeepSpeed's or FSDP's own settings, laid over the generated ones."""
    hang_timeout_minutes: float = Field(30.0, gt=0)
    """Time in which a trial must get on: a batch, a sample, a file. One that doesn't, as its disk
    stalls, say, is ended like one whose process died (sweep.max_failures)."""


class PublishConfig(Section):
    name: str = Field(pattern=ADAPTER_NAME)
    """The best trial becomes adapter `name@<version>`."""
    alias: str | None = Field(None, pattern=ADAPTER_NAME)
    """An alias to point at the new version, beside `latest`."""
    storage: str | None = Field(None, min_length=1)
    """Directory under which the registry lies; null is the run's storage."""


def _listed(value: Any) -> Any:
    """Return one name as a list of it, `none` as an empty list, and each name once."""
    if isinstance(value, str):
        return () if value == "none" else (value,)
    strings = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    return tuple(dict.fromkeys(value)) if strings else value


class Config(Section):
    """An experiment: what to train, on what, how, where, and what to do with the result."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    method: MethodConfig = MethodConfig.model_validate({"type": "qlora"})
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    sweep: SweepConfig = SweepConfig()
    publish: PublishConfig | None = None
    """Publish the result as an adapter; null keeps it in the run's directory only."""
    storage: str = Field("./runs", min_length=1)
    """Directory (local or NFS) for runs, history and adapters; or s3://… or gs://… for runs."""
    report_to: Annotated[
        tuple[Annotated[str, OneOf(lambda: TRACKERS)], ...], BeforeValidator(_listed)
    ] = ()
    """Trackers that are shown the trials: tensorboard, mlflow, wandb, trackio."""
    history: str | None = Field(None, repr=False)
    """URL of the trial history; null is SQLite under storage, which must be a directory then."""

    @model_validator(mode="after")
    def _metric_of_the_objective(self) -> Config:
        """Fill in the metric of a sweep that names none, and refuse a mode that seeks its worst."""
        default = main_metric(self.train.stage)
        if "metric" not in self.sweep.model_fields_set and self.sweep.metric != default:
            sweep = self.sweep.model_copy(update={"metric": default})
            sweep.model_fields_set.discard("metric")  # nobody wrote it
            # A frozen section is replaced, before anybody has seen it.
            self.__dict__["sweep"] = sweep
        if self.sweep.mode not in ("auto", self.sweep.direction):
            raise ValueError(
                f"sweep: mode {self.sweep.mode} would look for the worst {self.sweep.metric}; "
                f"set sweep.mode={self.sweep.direction}, or leave it out"
            )
        return self

    def with_rows(self, rows: int) -> Config:
        """Return the configuration with the steps that it has on `rows` training samples."""
        train = self.train.with_rows(rows)
        return self if train is self.train else self.model_copy(update={"train": train})

    @property
    def registry_storage(self) -> str:
        """The storage that has the registry of adapters."""
        own = self.publish.storage if self.publish is not None else None
        return own or self.storage
