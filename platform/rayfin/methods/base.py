"""The base class of fine-tuning methods, and the registry of all methods.

A method is a class in one module beside this one: its settings are the class' fields, all else
that rayfin knows of it are class variables and methods. `register` puts it into METHODS, where the
configuration, training, the advisor and the reports find it. Nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, model_validator
from pydantic_core import PydanticCustomError

from rayfin.methods.rates import Rate
from rayfin.section import Section
from rayfin.sizes import Sizes

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

EngineType = Literal["transformers", "vllm"]
Batches = Callable[[int], "Iterator[dict[str, torch.Tensor]]"]
"""Takes a number of labelled tokens, and returns endless padded batches of the training's samples
from the first on, each with as many such tokens at least."""
Trained = Literal[
    "weights", "low rank", "scaling", "rotations", "virtual tokens", "virtual keys and values"
]


class Incompatibility(NamedTuple):
    """The reason why settings can't work together; each field completes a sentence."""

    what: str
    """The setting and its value."""
    why: str
    remedy: str


class MethodConfig(Section):
    """A fine-tuning method: its settings, and all that rayfin asks of it.

    Validated as itself, this class takes the settings of any registered method, by their `type`.
    """

    model_config = ConfigDict(polymorphic_serialization=True)

    if TYPE_CHECKING:  # each method declares the field, after its parents' settings
        type: str
    quantization_bit: Literal[4, 8] | None = None
    """Load the base model in 4-bit NF4 (double quantisation) or 8-bit; null leaves it as it is."""
    init_from: str | None = Field(None, min_length=1)
    """Continue to train this adapter: NAME, NAME@VERSION or NAME@ALIAS of the registry, or the
    directory of one. Its base, method, rank and modules must be those of the trial."""

    # --- facts; a method without a value for one that has none here is not registered ---------

    title: ClassVar[str]
    """The method's name in sentences."""
    order: ClassVar[int]
    """Its position in lists of methods, which also chooses its colour and mark in charts."""
    trains: ClassVar[Trained]
    quantized_base: ClassVar[bool]
    """Can train over a 4-bit or 8-bit base."""
    packing: ClassVar[bool]
    """Can train on several samples in one row."""
    gradient_checkpointing: ClassVar[bool]
    merging: ClassVar[bool]
    """The adapter can be folded into the base model's weights."""
    engines: ClassVar[tuple[EngineType, ...]]
    """Serving engines that can answer with it."""
    rate: ClassVar[Rate]
    """The learning rate to start from, with its source."""
    coordinates: ClassVar[tuple[float, float]]
    """The coordinates of the method in the learned model.

    Methods that share how they change the base lie close: what was learned of one is taken for the
    other until its own trials say otherwise. Those whose rate is a share of LoRA's have both
    numbers below 1.5, all others at least one above.
    """

    changes_base: ClassVar[bool] = False
    """Training writes to the base model's own weights, so the next trial can't have them."""
    fragments_heap: ClassVar[bool] = False
    """Its training makes many small tensors, between which a heap on CPU keeps holes."""
    virtual_tokens: ClassVar[bool] = False
    """It learns tokens, or their keys and values, that stand before every sequence."""
    capacity: ClassVar[str | None] = None
    """The setting that says how much it can learn: a rank, or a number of virtual tokens."""
    capacity_label: ClassVar[str] = ""
    """Stands before the capacity in lists, where that is no rank and no number of tokens."""
    capacity_is_free: ClassVar[bool] = True
    """The capacity may change while all other settings stay."""
    usual_alpha: ClassVar[float | None] = None
    """`lora_alpha` to start from, whatever the rank; None where there is no such setting."""
    scale_exponent: ClassVar[float] = 1.0
    """The update is scaled by lora_alpha / capacity ** this."""
    module_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that name modules of the base model."""
    first_weights: ClassVar[tuple[str, ...]] = ()
    """Settings that say nothing but where training starts, which `init_from` says otherwise."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Its names in other programs' results: lower case, words joined by `_`."""
    synonyms: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Setting -> its names in the columns of other programs' tables."""

    @model_validator(mode="wrap")
    @classmethod
    def _of_the_type(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if cls is not MethodConfig or not isinstance(value, Mapping):
            return handler(value)
        kind = value.get("type")
        method: Any = METHODS.get(kind) if isinstance(kind, str) else None
        if method is None:
            raise PydanticCustomError("unknown_method", "no registered method has this type")
        found: Self = method.model_validate(value)
        return found

    # --- training -----------------------------------------------------------------------------

    def peft_config(self, max_steps: int, tokenizer_path: str) -> PeftConfig | None:
        """Return PEFT's configuration; None where the base's own weights are trained.

        `max_steps` are the optimizer steps of the training, for methods with a schedule, and
        `tokenizer_path` is the directory of the base's tokenizer.
        """
        raise NotImplementedError

    def refusals(self, max_steps: int) -> Iterator[Incompatibility]:
        """Yield what of these settings can't work in a training of `max_steps` steps."""
        return iter(())

    def continuation_refusal(self) -> Incompatibility | None:
        """Return why no training can continue an adapter of the method; None where one can."""
        return None

    @property
    def adapter_is_whole(self) -> bool:
        """Whether an adapter file holds all that is trained, so that training can continue it."""
        return True

    def strategy_refusal(self, strategy: str) -> str | None:
        """Return why `scaling.strategy` can't train it, and what can; None where it can."""
        return None

    @property
    def depends_on_base(self) -> bool:
        """Whether `check_base` has anything to check."""
        return False

    def check_base(self, base: torch.nn.Module) -> None:
        """Raise MethodError for settings that don't fit a base, or would change nothing of it.

        `base` may be a skeleton, whose parameters have shapes and no values.
        """

    def computed(self) -> dict[str, Any]:
        """Return the settings that a trial's fingerprint is made of: equal for equal computations.

        Settings that others leave without effect are at their defaults. `init_from` is left out:
        the adapter's content enters the fingerprint in its place.
        """
        return self.model_dump(mode="json", exclude={"init_from"})

    @classmethod
    def _idle(cls, idle: bool, *names: str) -> dict[str, Any]:
        """Return the defaults of settings that are without effect where `idle`, for `computed`."""
        return {name: cls.model_fields[name].default for name in names if idle}

    def attached(self, model: torch.nn.Module) -> None:
        """Run once PEFT has attached the method; `model` is PEFT's."""

    def initialize(
        self, model: torch.nn.Module, weights: Callable[[], Path], batches: Batches
    ) -> None:
        """Set the weights that training starts from, where PEFT has not; not called on a resume.

        `weights` returns the directory of the base's own files.
        """

    def regularizer(self, model: torch.nn.Module) -> torch.Tensor | None:
        """Return what is added to the loss; None where nothing is."""
        return None

    def rate_factor(self, parameter: str) -> float:
        """Return the factor of the learning rate for the trained parameter of this name."""
        return 1.0

    def after_optimizer_step(self, model: torch.nn.Module, step: int) -> None:
        """Run after each optimizer step, while the gradients are still there."""

    @property
    def alters_base(self) -> bool:
        """Whether a trial changes the base's own weights, so that the next one can't have them."""
        return self.changes_base

    def finish_saving(self, model: torch.nn.Module, directory: Path) -> None:
        """Rewrite the saved adapter in `directory`, where it has to fit the base as it was."""

    @classmethod
    def state_beside(cls, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return what a resumed training needs beside the trained parameters, by name.

        The result is empty for models of other methods.
        """
        return {}

    @classmethod
    def load_state_beside(cls, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Put `state_beside` back; do nothing to models of other methods."""

    # --- sizes, by formula --------------------------------------------------------------------

    def trained_parameters(self, sizes: Sizes) -> int:
        """Return the number of parameters that are attached and trained."""
        raise NotImplementedError

    def kept_activations(self, sizes: Sizes, *, mixed_precision: bool) -> float:
        """Return the numbers a token that autograd keeps of a block beside a frozen one's."""
        return 0.0

    def kept_weights(self, sizes: Sizes) -> float:
        """Return the float32 numbers that autograd keeps of a block, however many the tokens."""
        return 0.0

    def host_parameters(self, sizes: Sizes) -> float:
        """Return the float32 numbers that stay in host memory beside what is trained."""
        return 0.0

    def flops_per_token(self, sizes: Sizes) -> float:
        """Return the FLOPs a token that it adds to a training step of the base."""
        return 0.0

    @property
    def rank(self) -> int:
        """The rank of its update matrices when training starts; 0 where it has none."""
        return 0

    @property
    def served_rank(self) -> int:
        """The largest rank in the adapter that it saves, which the engine's slots must hold."""
        return self.rank

    @property
    def served_bits(self) -> int | None:
        """The bits of the base's weights without which an adapter is not exact; None for any."""
        return None

    @property
    def row_tokens(self) -> int:
        """The number of tokens in every row of a batch beside the data's."""
        return 0

    @property
    def positions(self) -> int:
        """The number of the base model's positions that it takes from the data."""
        return 0

    # --- what the learned model sees ------------------------------------------------------------

    @classmethod
    def coordinates_of(cls, settings: Mapping[str, Any]) -> tuple[float, float]:
        """Return `coordinates`, moved by settings that the learned model has no column for.

        `settings` are a record's, which may hold anything.
        """
        return cls.coordinates

    # --- where to start -----------------------------------------------------------------------

    @classmethod
    def usual(cls, rank: int, length: int) -> dict[str, Any]:
        """Return settings to start from: `rank` fits the device's memory, `length` is in tokens."""
        return {}

    @classmethod
    def of_capacity(cls, capacity: int) -> dict[str, Any]:
        """Return the settings that change together for another capacity."""
        return {} if cls.capacity is None else {cls.capacity: capacity}

    @classmethod
    def quantized_by_default(cls) -> bool:
        return cls.model_fields["quantization_bit"].default is not None

    # --- other programs' results --------------------------------------------------------------

    @classmethod
    def is_pefts(cls, name: str, config: Mapping[str, Any], bits: int | None) -> bool:
        """Return whether an adapter_config.json is of this method.

        `name` is its peft_type, spelled as rayfin spells methods; `bits` are the base's, where it
        was quantised.
        """
        return name == name_of(cls)


M = TypeVar("M", bound=MethodConfig)

METHODS: dict[str, type[MethodConfig]] = {}
"""Every method by its `method.type`, by `order`."""


def register(method: type[M]) -> type[M]:
    """Add a method to METHODS.

    Raises TypeError for one that lacks a fact, or has another's name or order.
    """
    name = name_of(method)
    lacks = [fact for fact in _facts() if not hasattr(method, fact)]
    if lacks:
        raise TypeError(f"method {name} lacks {', '.join(lacks)}; give it these class variables")
    for other in METHODS.values():
        if name == name_of(other) or other.order == method.order:
            raise TypeError(
                f"method {name} has the name or order {method.order} of {name_of(other)}, which "
                "is registered; give it its own"
            )
    METHODS[name] = method
    for name in sorted(METHODS, key=lambda name: METHODS[name].order):
        METHODS[name] = METHODS.pop(name)
    return method


def name_of(method: type[MethodConfig]) -> str:
    """Return the one value of a method's `type`."""
    (name,) = get_args(method.model_fields["type"].annotation)
    return str(name)


def methods_that(supports: str) -> str:
    """Return the names of the methods with a given support, for error messages."""
    return ", ".join(name for name, method in METHODS.items() if getattr(method, supports))


def capacities() -> tuple[str, ...]:
    """Return the settings that hold a method's capacity, each once."""
    return tuple(dict.fromkeys(m.capacity for m in METHODS.values() if m.capacity is not None))


def _facts() -> list[str]:
    """Return the class variables that every method has to give."""
    return [name for name in sorted(MethodConfig.__class_vars__) if not hasattr(MethodConfig, name)]
