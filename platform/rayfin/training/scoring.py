"""How well a model does on held-out samples, by its objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from rayfin.heartbeat import beat
from rayfin.objectives import Objective
from rayfin.samples import TokenizedSample

if TYPE_CHECKING:
    from accelerate import Accelerator


class Lockstep(NamedTuple):
    """How often each of several workers calls a model that is in parts on all of them."""

    batches: int
    filler: TokenizedSample
    """The sample of the batches that a worker lacks; it is not counted."""


@torch.no_grad()
def score(
    model: torch.nn.Module,
    samples: Sequence[TokenizedSample],
    objective: Objective,
    *,
    batch_size: int,
    pad_token_id: int,
    lockstep: Lockstep | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return `objective.columns` of each of `samples`, in their order, one forward pass over each.

    The table is float64 [samples, columns], on the CPU. `device` is where the model computes, if
    its parameters may wait elsewhere.
    """
    training = model.training
    model.eval()
    device = device or next(model.parameters()).device

    def scored(some: Sequence[TokenizedSample]) -> torch.Tensor:
        beat("evaluating")
        batch = objective.collate(some, pad_token_id)
        return objective.score(model, {key: value.to(device) for key, value in batch.items()})

    table = torch.zeros(len(samples), len(objective.columns), dtype=torch.float64)
    order = sorted(range(len(samples)), key=lambda index: objective.length(samples[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        table[chosen] = scored([samples[index] for index in chosen])
    if lockstep is not None:
        for _ in range(lockstep.batches - math.ceil(len(order) / batch_size)):
            scored([lockstep.filler])
    model.train(training)
    return table


def score_together(
    accelerator: Accelerator,
    model: torch.nn.Module,
    samples: Sequence[TokenizedSample],
    objective: Objective,
    *,
    batch_size: int,
    pad_token_id: int,
    in_parts: bool,
) -> torch.Tensor:
    """Return the table that `score` would, each worker having computed a share of the samples.

    `in_parts` says that a part of the model is with each worker.
    """
    rank, workers = accelerator.process_index, accelerator.num_processes
    largest_share = math.ceil(math.ceil(len(samples) / workers) / batch_size)
    own = score(
        model,
        samples[rank::workers],
        objective,
        batch_size=batch_size,
        pad_token_id=pad_token_id,
        lockstep=Lockstep(largest_share, samples[0]) if in_parts else None,
        device=accelerator.device,
    )
    if workers == 1:
        return own
    table = torch.zeros(len(samples), own.shape[1], dtype=own.dtype)
    table[rank::workers] = own
    # What the others have is zero here, so that the sum is each sample's own.
    joined: torch.Tensor = accelerator.reduce(table.to(accelerator.device))
    return joined.cpu()
