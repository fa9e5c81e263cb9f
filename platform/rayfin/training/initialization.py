"""The first weights of a trial that begins."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rayfin.data import TokenizedCorpus
from rayfin.models.source import model_directory
from rayfin.objectives import Objective
from rayfin.training.batches import batches_from_start, samples_of
from rayfin.training.spec import TrialSpec
from rayfin.training.strategies import Share
from rayfin.training.trial_cache import TrialCache, pad_token_id


def initialize(
    model: torch.nn.Module,
    spec: TrialSpec,
    objective: Objective,
    data: TokenizedCorpus,
    warm: TrialCache,
) -> None:
    """Let the method set its first weights, the same on each of a trial's workers."""

    def batches(labelled: int) -> Iterator[dict[str, torch.Tensor]]:
        train = spec.train
        # One worker that takes the whole step: the others see the same samples.
        whole = Share(train.per_device_train_batch_size, train.gradient_accumulation_steps)
        samples = samples_of(spec, objective, data, whole, warm.reader(spec))
        padding = pad_token_id(warm.tokenizer(spec))
        try:
            yield from batches_from_start(samples, objective, padding, labelled)
        finally:
            samples.close()

    spec.method.initialize(model, lambda: model_directory(spec.model), batches)
