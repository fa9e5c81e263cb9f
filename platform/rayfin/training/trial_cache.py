"""What a worker keeps between trials: models, the tokenised data, and the base's own scores."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rayfin.config import DataConfig, ModelConfig
from rayfin.data import Corpus, TokenizedCorpus, load_corpus, tokenize_corpus
from rayfin.data.conversion import check_shape
from rayfin.data.stream_reader import StreamReader, read_in_process
from rayfin.data.token_settings import TokenSettings
from rayfin.hardware import Hardware
from rayfin.heartbeat import beat
from rayfin.models import Base, Head, ModelFacts, base_of, describe_model, load_base, load_tokenizer
from rayfin.objectives import Objective, objective_of
from rayfin.training.companions import companion_models, of_companions
from rayfin.training.scoring import score
from rayfin.training.spec import TrialSpec
from rayfin.training.starting_adapter import StartingAdapter, read_starting_adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


K = TypeVar("K")
V = TypeVar("V")

_MOST_KEPT = 8
"""A sweep over a setting on which the data depends would fill the memory, trial by trial."""


@dataclass
class _Base:
    key: tuple[object, ...]
    model: PreTrainedModel


class TrialCache:
    """Loads each thing when it is first asked for, and again only when something else was.

    A trial borrows the base model, attaches its method to it, and takes it off again; a trial
    that changed the weights themselves calls `drop_base`, one that failed `drop_models`.
    """

    def __init__(
        self,
        corpora: dict[DataConfig, Corpus] | None = None,
        reader: Callable[[TrialSpec], StreamReader] | None = None,
    ) -> None:
        """Take `reader`, which makes what reads streamed data elsewhere than in this process."""
        self._reader = reader
        self._corpora = dict(corpora or {})
        self._facts: dict[ModelConfig, ModelFacts] = {}
        self._origins: dict[ModelConfig, Base] = {}
        self._tokenizers: dict[tuple[ModelConfig, str | None], PreTrainedTokenizerFast] = {}
        self._tokenized: dict[tuple[object, ...], TokenizedCorpus] = {}
        self._starts: dict[str, StartingAdapter] = {}
        self._base: _Base | None = None
        self._base_scores: dict[tuple[object, ...], torch.Tensor] = {}
        self.loads = 0
        """Base models loaded so far."""
        self._companions: dict[tuple[str, str], PreTrainedModel] = {}
        self.companion_loads = 0
        """Companions of objectives loaded so far."""

    def facts(self, model: ModelConfig) -> ModelFacts:
        if model not in self._facts:
            beat("reading the base model's configuration", bulk=True)
            self._facts[model] = describe_model(model)
        return self._facts[model]

    def origin(self, model: ModelConfig) -> Base:
        """Return what an adapter that is trained on `model` is to say of its base."""
        if model not in self._origins:
            self._origins[model] = base_of(model)
        return self._origins[model]

    def tokenizer(self, spec: TrialSpec) -> PreTrainedTokenizerFast:
        """Return the tokenizer of a trial's model, with the chat template of the trial."""
        key = (spec.model, spec.data.chat_template)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(*key)
        return self._tokenizers[key]

    def start(self, spec: TrialSpec) -> StartingAdapter | None:
        """Return the adapter that a trial continues; None where it starts anew."""
        if (name := spec.method.init_from) is None:
            return None
        if name not in self._starts:
            beat("reading the adapter to start from", bulk=True)
            self._starts[name] = read_starting_adapter(Path(name))
        return self._starts[name]

    def corpus(self, spec: TrialSpec) -> Corpus:
        """Return the samples of a trial's data."""
        objective = objective_of(spec.train)
        if spec.data not in self._corpora:
            self._corpora[spec.data] = load_corpus(spec.data, objective)
        # It may have been read for another objective.
        check_shape(spec.data, self._corpora[spec.data].shape, objective)
        return self._corpora[spec.data]

    def tokenized(self, spec: TrialSpec) -> TokenizedCorpus:
        objective = objective_of(spec.train)
        settings = TokenSettings.of(spec.data, spec.train)
        key = (spec.data, spec.model, objective.identity, settings)

        def tokenize() -> TokenizedCorpus:
            beat("reading and tokenising the data", bulk=True)
            corpus, tokenizer = self.corpus(spec), self.tokenizer(spec)
            return tokenize_corpus(corpus, tokenizer, spec.data.max_length, objective, settings)

        return _kept(self._tokenized, key, tokenize)

    def reader(self, spec: TrialSpec) -> StreamReader:
        """Return what reads streamed data for a trial."""
        if self._reader is not None:
            return self._reader(spec)
        settings = TokenSettings.of(spec.data, spec.train)
        return read_in_process(self.tokenizer(spec), objective_of(spec.train), settings)

    def objective(self, spec: TrialSpec, hardware: Hardware) -> Objective:
        """Return the objective of one trial with its companions loaded, whole on the device.

        Companions of the trial before that this one doesn't have are dropped first.
        """
        objective = objective_of(spec.train)
        configs = companion_models(spec.train, spec.model)
        keys = {name: (it.model_dump_json(), hardware.device) for name, it in configs.items()}
        kept = {key: model for key, model in self._companions.items() if key in keys.values()}
        if len(kept) < len(self._companions):
            self._drop_companions(kept)

        def loaded(model: ModelConfig) -> PreTrainedModel:
            key = (model.model_dump_json(), hardware.device)
            if key not in self._companions:
                beat("loading a companion of the objective", bulk=True)
                self._companions[key] = load_base(model, None, hardware.device)
                self.companion_loads += 1
            return self._companions[key]

        objective.models = of_companions(spec.train, spec.model, loaded)
        return objective

    def _drop_companions(self, kept: dict[tuple[str, str], PreTrainedModel]) -> None:
        self._companions = kept
        gc.unfreeze()  # a base that was loaded after them has frozen them, too
        _collect()

    def base(
        self, spec: TrialSpec, hardware: Hardware, *, on_host: bool = False
    ) -> PreTrainedModel:
        """Return the base model, frozen, in eval mode; in host memory if `on_host`."""
        bits, objective = spec.method.quantization_bit, objective_of(spec.train)
        corpus = self.corpus(spec)
        head = Head(objective.auto_class, objective.base_settings(chain(corpus.train, corpus.eval)))
        key = (spec.model.model_dump_json(), bits, hardware.device, head)
        if self._base is None or self._base.key != key:
            if self._base is not None:
                self.drop_base()
            # A trial collects garbage a few times, each a walk over all objects of the process.
            # Those of the libraries stay: passing over them saves half a second. The base is made
            # after that, so that it can go, too.
            gc.freeze()
            beat("loading the base model", bulk=True)
            model = load_base(spec.model, bits, hardware.device, on_host=on_host, head=head)
            self._base = _Base(key, model)
            self.loads += 1
        return self._base.model

    def drop_base(self) -> None:
        """Forget the base model and give its memory back."""
        self._base = None
        _collect()

    def drop_models(self) -> None:
        """Forget the base model and all companions and give their memory back."""
        if self._companions:
            self._drop_companions({})
        self.drop_base()

    def base_scores(
        self, spec: TrialSpec, objective: Objective, hardware: Hardware
    ) -> torch.Tensor:
        """Return the table of the untrained model's scores on the held-out samples.

        `objective` is the trial's, with its companions.
        """
        bits = spec.method.quantization_bit
        companions = tuple(companion_models(spec.train, spec.model).items())
        own = (objective.identity, objective.score_identity, companions)
        settings = TokenSettings.of(spec.data, spec.train)
        key = (spec.model, bits, spec.data, settings, hardware.device, *own)

        def compute() -> torch.Tensor:
            return score(
                self.base(spec, hardware),
                self.tokenized(spec).eval,
                objective,
                batch_size=spec.train.per_device_eval_batch_size,
                pad_token_id=pad_token_id(self.tokenizer(spec)),
            )

        return _kept(self._base_scores, key, compute)


def _kept(cache: dict[K, V], key: K, make: Callable[[], V]) -> V:
    """Return the value of `key`, made where the cache lacks it; the oldest of many values goes."""
    cache[key] = cache.pop(key) if key in cache else make()
    while len(cache) > _MOST_KEPT:
        del cache[next(iter(cache))]
    return cache[key]


def _collect() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pad_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the padding token, which `load_tokenizer` guarantees."""
    token = tokenizer.pad_token_id
    assert isinstance(token, int)
    return token
