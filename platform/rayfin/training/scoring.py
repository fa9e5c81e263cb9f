"""How well a model does on held-out samples, from one forward pass over each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from rayfin.data import TokenizedSample
from rayfin.heartbeat import beat
from rayfin.training.batches import IGNORE, collate_padded


@dataclass(frozen=True)
class Scores:
    """What each held-out sample scored, so that two models can be compared sample by sample."""

    table: torch.Tensor
    """float64 [samples, 3], on the CPU: a sample's loss (nats, summed over its labelled tokens),
    its labelled tokens, and those of them that are the model's first choice."""

    @property
    def samples(self) -> int:
        return len(self.table)

    @property
    def tokens(self) -> int:
        return int(self.table[:, 1].sum())

    @property
    def exact(self) -> torch.Tensor:
        """Whether every label of a sample is the model's first choice, bool [samples]."""
        return self.table[:, 2] == self.table[:, 1]

    def metrics(self) -> dict[str, float]:
        """eval_loss (nats a token), perplexity, token_accuracy and exact_match (shares)."""
        loss, tokens, correct = self.table.sum(0).tolist()
        loss /= max(tokens, 1)
        return {
            "eval_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": correct / max(tokens, 1),
            "exact_match": int(self.exact.sum()) / max(self.samples, 1),
        }

    def against(self, base: Scores) -> dict[str, float]:
        """What an interval of the change from `base`, on the same samples, is made from.

        eval_loss_change_se (nats a token) and token_accuracy_change_se (a share) are standard
        errors of the change; exact_match_only_base counts the samples that `base` alone answers
        exactly. Of fewer than 2 samples there is no standard error.
        """
        only_base: dict[str, float] = {
            "exact_match_only_base": int((base.exact & ~self.exact).sum())
        }
        if self.samples < 2:
            return only_base
        change, tokens = self.table - base.table, self.table[:, 1]
        errors = {
            "eval_loss_change_se": _ratio_error(change[:, 0], tokens),
            "token_accuracy_change_se": _ratio_error(change[:, 2], tokens),
        }
        return only_base | {key: error for key, error in errors.items() if math.isfinite(error)}


def all_metrics(trained: Scores | None, base: Scores | None) -> dict[str, float]:
    """What both score, the base model's with `base_` before each name, and what lies between."""
    metrics = trained.metrics() if trained else {}
    if base is not None:
        metrics |= {f"base_{name}": value for name, value in base.metrics().items()}
        metrics |= trained.against(base) if trained else {}
    return metrics


def _ratio_error(change: torch.Tensor, tokens: torch.Tensor) -> float:
    """Standard error of sum(change) / sum(tokens), both [samples].

    Samples are what was drawn, not tokens: those of one answer are alike. Cochran, Sampling
    Techniques, 3rd edition (1977), equation 6.13, of a large population.
    """
    samples = len(change)
    rest = change - change.sum() / tokens.sum() * tokens
    return float((rest.square().sum() * samples / (samples - 1)).sqrt() / tokens.sum())


def completion_logits(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary], targets [n] and rows [n] of the n positions that predict a label.

    The language-model head, a fifth of a small model's work, runs on these positions only: a hook
    hands it no others. It holds for every wrapper around the model (PEFT, DDP), and for virtual
    tokens put before the sequence, as positions are counted from the end.
    """
    labels = inputs["labels"]
    wanted = labels[:, 1:] != IGNORE

    def select(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden = args[0]
        return (hidden[:, -labels.shape[1] : -1][wanted],)

    unwrapped: Any = getattr(model, "module", model)
    handle = unwrapped.get_output_embeddings().register_forward_pre_hook(select)
    try:
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        logits = model(**rest, use_cache=False).logits
    finally:
        handle.remove()
    return logits, labels[:, 1:][wanted], wanted.nonzero()[:, 0]


@torch.no_grad()
def score(
    model: torch.nn.Module,
    samples: Sequence[TokenizedSample],
    *,
    batch_size: int,
    pad_token_id: int,
    batches: int | None = None,
    filler: TokenizedSample | None = None,
    device: torch.device | None = None,
) -> Scores:
    """Loss and hits of each of `samples`, in their order.

    Where the model is in parts on several workers, each must call it equally often: `batches` times
    then, those that it lacks with `filler` alone, which is not counted. `device`: where the model
    computes, if its parameters may wait elsewhere.

    `exact` is true of the samples whose every label is the model's first choice given the labels
    before it: those for which greedy decoding would answer the reference, token for token, and stop
    (for a sample that was not cut, with one answer). It costs no generation.
    """
    training = model.training
    model.eval()
    device = device or next(model.parameters()).device
    table = torch.zeros(len(samples), 3, dtype=torch.float64)
    order = sorted(range(len(samples)), key=lambda index: len(samples[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        beat("evaluating")
        places = order[start : start + batch_size]
        batch = collate_padded([samples[index] for index in places], pad_token_id)
        batch = {key: value.to(device) for key, value in batch.items()}
        logits, targets, rows = completion_logits(model, batch)
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        hits = logits.argmax(-1) == targets
        # On the CPU, where the order of a sum over a sample's tokens is always the same.
        of_sample = rows.cpu()
        for column, values in enumerate((losses, torch.ones_like(losses), hits)):
            table[places, column] = torch.bincount(
                of_sample, weights=values.double().cpu(), minlength=len(places)
            )
    for _ in range(0 if batches is None else batches - math.ceil(len(order) / batch_size)):
        beat("evaluating")
        assert filler is not None
        batch = collate_padded([filler], pad_token_id)
        completion_logits(model, {key: value.to(device) for key, value in batch.items()})
    model.train(training)
    return Scores(table)
