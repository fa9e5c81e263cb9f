"""The scenario that an adapter is trained for, as far as it is known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from rayfin.config.data import DataConfig
from rayfin.config.schema import ModelConfig
from rayfin.errors import ConfigError
from rayfin.hardware import describe_hardware

HardwareClass = Literal["cpu", "single_gpu", "multi_gpu"]
DataScale = Literal["small", "medium", "large"]
Latency = Literal["strict", "normal"]
Priority = Literal["quality", "cost", "latency"]

SMALL_ROWS, MEDIUM_ROWS = 5_000, 100_000
"""The numbers of rows below which a data set is small, and below which it is medium.

They lie between LIMA's 1,000 (arXiv:2305.11206) and Alpaca's 52,000, and between that and the
millions of the large instruction sets (FLAN: arXiv:2301.13688): a convention, nothing measured.
"""
_GIB = 2**30


@dataclass(frozen=True)
class Scenario:
    """What is known of a scenario; None stands for what is not.

    The first three fields choose the rule (`rayfin.advisor.rules`), for which any value but the
    ones listed counts as unknown. The others refine what is recommended.
    """

    hardware: HardwareClass | str | None = None
    """cpu, single_gpu or multi_gpu."""
    data_scale: DataScale | str | None = None
    """small, medium or large."""
    latency: Latency | str | None = None
    """strict or normal: whether somebody waits for the answers."""
    description: str = ""
    """Anything else, for readers."""
    model_name: str | None = None
    model_size_b: float | None = None
    """Billions of parameters."""
    sequence_length: int | None = None
    """The tokens of a sample."""
    dataset_rows: int | None = None
    gpu_memory_gb: float | None = None
    """The memory of one GPU, in GiB."""
    num_gpus: int | None = None
    latency_target_ms: float | None = None
    """The time to the first token."""
    budget_hours: float | None = None
    """The wall-clock time of the training."""
    priority: Priority = "quality"

    def __post_init__(self) -> None:
        for name in (
            *("model_size_b", "sequence_length", "dataset_rows", "gpu_memory_gb"),
            *("latency_target_ms", "budget_hours"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value} must be a positive number, or left out")
        if self.num_gpus is not None and self.num_gpus < 0:
            raise ConfigError(f"num_gpus={self.num_gpus} must be 0 or more, or left out")
        if self.priority not in get_args(Priority):
            raise ConfigError(
                f"priority='{self.priority}' must be one of {', '.join(get_args(Priority))}"
            )

    @classmethod
    def detect(
        cls,
        model: ModelConfig | None = None,
        data: DataConfig | None = None,
        *,
        use_gpu: bool | Literal["auto"] = "auto",
        **known: Any,
    ) -> Scenario:
        """Detect the scenario from this machine, the model and the data; `known` fields come first.

        Latency is strict where `latency_target_ms` is known, else normal. Raises what reading the
        model's and the data's files raises, and ConfigError for an unknown field.
        """
        unknown = sorted(known.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise ConfigError(
                f"a scenario has no '{unknown[0]}'; it has {', '.join(cls.__dataclass_fields__)}"
            )
        found: dict[str, Any] = {}
        if "hardware" not in known:
            machine = describe_hardware(use_gpu)
            found["num_gpus"] = known.get("num_gpus", machine.device_count)
            found["hardware"] = hardware_class(found["num_gpus"])
        else:  # another machine may be meant; of its GPUs nothing else tells, this one's do
            machine = describe_hardware(use_gpu=False if known["hardware"] == "cpu" else "auto")
        if machine.device == "cuda" and (found | known)["hardware"] != "cpu":
            found["gpu_memory_gb"] = machine.device_memory / _GIB
        if model is not None:
            from rayfin.models import describe_model

            found["model_name"] = model.name
            found["model_size_b"] = describe_model(model).parameters / 1e9
        if data is not None:
            from rayfin.data import load_corpus

            corpus = load_corpus(data)
            found["dataset_rows"] = len(corpus.train)
            found["sequence_length"] = data.max_length
        rows = known.get("dataset_rows", found.get("dataset_rows"))
        if rows is not None:
            found["data_scale"] = data_scale(rows)
        found["latency"] = "strict" if known.get("latency_target_ms") is not None else "normal"
        return cls(**found | known)

    def as_dict(self) -> dict[str, Any]:
        """Return the scenario as JSON stores it."""
        return asdict(self)


def hardware_class(num_gpus: int) -> HardwareClass:
    """Return the class of a machine with so many GPUs."""
    return "cpu" if num_gpus == 0 else "single_gpu" if num_gpus == 1 else "multi_gpu"


def data_scale(rows: int) -> DataScale:
    """Return the scale of a data set with so many rows."""
    return "small" if rows < SMALL_ROWS else "medium" if rows < MEDIUM_ROWS else "large"
