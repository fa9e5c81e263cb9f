"""What an objective of training is to rayfin, and the registry of those that there are.

An objective is a class in one module beside this one. `register` puts it into OBJECTIVES, where the
configuration (`train.stage`), the data, training, sweeps and reports find it. Its metrics are in
`rayfin.metrics`. Nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, cast

from rayfin.methods.base import Incompatibility, MethodConfig
from rayfin.metrics import BASE, METRICS, Score
from rayfin.samples import NO_LOSS, Example, TokenizedSample
from rayfin.section import Section

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]
Tokenize = Callable[[Sequence[Example]], list[TokenizedSample]]
"""Renders examples by the model's chat template and tokenises them, with loss on the answers."""

DEFAULT = "sft"
"""The objective of a configuration that names none."""


class Companion(NamedTuple):
    """A frozen model that an objective uses beside the one that is trained: a teacher, say."""

    name: str
    """A bundled model, a local directory or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""


class Objective:
    """What a trial is trained for: how its data becomes batches, its loss, and its scores.

    An instance belongs to one trial. Class variables without a value here are facts that every
    objective has to give.
    """

    name: ClassVar[str]
    """Its name in `train.stage`."""
    title: ClassVar[str]
    """Its name in sentences."""
    shapes: ClassVar[tuple[str, ...]]
    """The formats of rows that it trains on (`rayfin.data.columns`)."""
    packing: ClassVar[bool]
    """Whether several samples can be trained on in one row."""
    label_smoothing: ClassVar[bool] = False
    """Whether its loss heeds train.label_smoothing_factor."""
    metrics: ClassVar[tuple[str, ...]]
    """The scores that it measures; a sweep takes the first unless it is told another."""
    columns: ClassVar[tuple[str, ...]]
    """What it measures of each held-out sample: the columns of its table of scores."""

    settings_class: ClassVar[type[Section]] = Section
    """Settings of its own, which stand under `train` beside those of every objective."""
    data_settings: ClassVar[tuple[str, ...] | None] = None
    """Those of `settings_class` on which its tokens depend (`encode`, `truncate`); None is all."""
    score_settings: ClassVar[tuple[str, ...] | None] = None
    """Those on which the scores of a model depend that was not trained; None is all."""
    task_type: ClassVar[str] = "CAUSAL_LM"
    """PEFT's task type."""
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    """Transformers' class that loads the base model."""

    def __init__(self, settings: Any = None) -> None:
        """Take the section `train`, which has the settings of `settings_class`."""
        self.settings = self.settings_class() if settings is None else settings
        self.models: Mapping[str, torch.nn.Module] = {}
        """The companions, whole, frozen, in eval mode and on the trial's device. They are there
        where the objective computes losses and scores, and not where it encodes samples."""

    def companions(self) -> Mapping[str, Companion]:
        """Return the companions that its settings ask for, by the setting that names each.

        rayfin checks that they are there, loads each once for all trials of a worker, and counts
        their memory. In a fingerprint their content stands in the place of their names.
        """
        return {}

    def refusals(self, method: MethodConfig) -> Iterator[Incompatibility]:
        """Yield what of its settings and the method's can't work together."""
        return iter(())

    @property
    def identity(self) -> str:
        """Return a text that two objectives share if they make the same tokens of the same data."""
        return self._identity(self.data_settings)

    @property
    def score_identity(self) -> str:
        """Return a text that two objectives share if they score a model alike on equal tokens."""
        return self._identity(self.score_settings)

    def _identity(self, names: Iterable[str] | None) -> str:
        names = self.settings_class.model_fields if names is None else names
        return f"{self.name} { {name: getattr(self.settings, name) for name in names} }"

    def base_settings(self, examples: Iterable[Example]) -> dict[str, Any]:
        """Return what the base model's configuration is told beside its own: `num_labels`, say.

        `examples` are those of both splits.
        """
        return {}

    # --- from examples to batches -------------------------------------------------------------

    def encode(self, examples: Sequence[Example], tokenize: Tokenize) -> list[TokenizedSample]:
        """Return the examples in tokens, in order and at their full length."""
        return tokenize(examples)

    def truncate(self, sample: TokenizedSample, max_length: int) -> TokenizedSample | None:
        """Return the sample cut to `max_length` tokens; None where nothing to learn is left."""
        return truncated(sample, max_length)

    def without_loss(self, sample: TokenizedSample) -> TokenizedSample:
        """Return a sample of two tokens that stands in a plan for one that has nothing to learn.

        It has the lists of a sample that `truncate` returns; here they are all those of `sample`.
        """
        short: Any = {name: values[:2] for name, values in dict[str, Any](sample).items()}
        short["labels"] = [NO_LOSS] * len(short["labels"])
        return cast(TokenizedSample, short)

    def length(self, sample: TokenizedSample) -> int:
        """Return the number of tokens that the model computes for the sample."""
        return len(sample["input_ids"])

    def collate(
        self, samples: Sequence[TokenizedSample], pad_token_id: int, *, packing: bool = False
    ) -> Batch:
        """Return the samples as the tensors of one batch.

        `input_ids` and `attention_mask`, [rows, tokens], are among them unless `packing`: a method
        that takes its first weights from the data (EVA) calls the model with these two.
        """
        raise NotImplementedError

    # --- training -----------------------------------------------------------------------------

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of terms of a batch's loss, as a tensor without dimensions.

        A step's loss is the sum of its batches' losses, divided by the terms of them all.
        """
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the sum of the loss over the terms of a batch.

        `model` is the model as the strategy wrapped it, which must be called as such for what is
        differentiated.
        """
        raise NotImplementedError

    # --- scores -------------------------------------------------------------------------------

    def score(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return what `columns` say of each sample of a batch: float64 [samples, columns], on CPU.

        Called without gradients; a batch is never packed.
        """
        raise NotImplementedError

    def scores(self, table: torch.Tensor) -> dict[str, float]:
        """Return `metrics` of the held-out samples' table, float64 [samples, columns]."""
        raise NotImplementedError

    def change(self, table: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
        """Return what an interval of the change from `base`, on the same samples, is made from.

        That is `<metric>_only_base` of a score that is the share of samples that fulfil a
        condition, and else `<metric>_change_se` (`rayfin.metrics`), where either can be told.
        """
        return {}

    def all_scores(self, table: torch.Tensor | None, base: torch.Tensor | None) -> dict[str, float]:
        """Return the scores of a model and of its base (`base_<metric>`), and `change`."""
        found = {} if table is None else self.scores(table)
        if base is not None:
            found |= {f"{BASE}{name}": value for name, value in self.scores(base).items()}
            found |= {} if table is None else self.change(table, base)
        return found


def truncated(sample: TokenizedSample, max_length: int) -> TokenizedSample | None:
    """Return a sample of a language model cut at the right; None where no label is left."""
    ids, labels = sample["input_ids"][:max_length], sample["labels"][:max_length]
    # A model predicts from the token before: the first one never has loss.
    if all(label == NO_LOSS for label in labels[1:]):
        return None
    return {"input_ids": ids, "labels": labels}


O = TypeVar("O", bound=Objective)  # noqa: E741

OBJECTIVES: dict[str, type[Objective]] = {}
"""Every objective by its `train.stage`."""


def register(objective: type[O]) -> type[O]:
    """Add an objective to OBJECTIVES.

    Raises TypeError for one that lacks a fact, has another's name, or measures what is no score.
    """
    facts = (name for name in Objective.__annotations__ if not hasattr(Objective, name))
    if lacks := [fact for fact in facts if not hasattr(objective, fact)]:
        raise TypeError(
            f"objective {objective.__name__} lacks {', '.join(lacks)}; give it these class "
            "variables"
        )
    name = objective.name
    if name in OBJECTIVES:
        raise TypeError(f"objective {name} is registered; give this one a name of its own")
    if unknown := [it for it in objective.metrics if not isinstance(METRICS.get(it), Score)]:
        raise TypeError(
            f"objective {name} measures {', '.join(unknown)}, which is no score; register it in "
            "rayfin.metrics"
        )
    OBJECTIVES[name] = objective
    return objective


def stage_of(spec: Mapping[str, Any]) -> str:
    """Return the objective's name in a trial's specification as the history holds it."""
    train = spec.get("train")
    stage = train.get("stage") if isinstance(train, Mapping) else None
    return stage if isinstance(stage, str) else DEFAULT


def main_metric(stage: str) -> str:
    """Return the score by which trials of an objective are judged unless another is named.

    That is the default objective's for one that this rayfin does not have.
    """
    return OBJECTIVES.get(stage, OBJECTIVES[DEFAULT]).metrics[0]
