"""Supervised fine-tuning: the next token of the answers that the data has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayfin.metrics import CHANGE_ERROR, ONLY_BASE, exponential
from rayfin.objectives.base import Batch, Objective, register
from rayfin.objectives.tensors import (
    count_labels,
    label_logits,
    pack,
    pad,
    ratio_error,
    sum_by_row,
)
from rayfin.samples import TokenizedSample

if TYPE_CHECKING:
    import torch


@register
class SupervisedFineTuning(Objective):
    """The cross entropy of every labelled token, given those before it.

    A sample is exact where its every label is the model's first choice given the labels before it:
    greedy decoding would answer the reference then, token for token, and stop (for a sample that
    was not cut, with one answer). It costs no generation.
    """

    name = "sft"
    title = "supervised fine-tuning"
    shapes = ("messages", "conversations", "instruction", "prompt_completion", "text")
    packing = True
    label_smoothing = True
    metrics = ("eval_loss", "perplexity", "exact_match", "token_accuracy")
    columns = ("loss", "tokens", "correct")
    # The loss in nats, summed over the sample's labelled tokens; their number; and how many of
    # them are the model's first choice.

    def collate(
        self, samples: Sequence[TokenizedSample], pad_token_id: int, *, packing: bool = False
    ) -> Batch:
        return pack(samples) if packing else pad(samples, pad_token_id)

    def count(self, batch: Batch) -> torch.Tensor:
        return count_labels(batch)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        from torch.nn import functional

        logits, targets, _ = label_logits(model, batch)
        # Of the training loss only: `score` stays comparable between trials.
        smoothing = getattr(self.settings, "label_smoothing_factor", 0.0)
        return functional.cross_entropy(
            logits.float(), targets, reduction="sum", label_smoothing=smoothing
        )

    def score(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        import torch
        from torch.nn import functional

        logits, targets, rows = label_logits(model, batch)
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        hits = logits.argmax(-1) == targets
        columns = (losses, torch.ones_like(losses), hits)
        return torch.stack([sum_by_row(each, rows, len(batch["labels"])) for each in columns], 1)

    def scores(self, table: torch.Tensor) -> dict[str, float]:
        loss, tokens, correct = table.sum(0).tolist()
        loss /= max(tokens, 1)
        return {
            "eval_loss": loss,  # nats a token
            "perplexity": exponential(loss),
            "token_accuracy": correct / max(tokens, 1),
            "exact_match": int(_exact(table).sum()) / max(len(table), 1),
        }

    def change(self, table: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
        """Return what `Objective.change` does; fewer than 2 samples have no standard errors."""
        found: dict[str, float] = {
            f"exact_match{ONLY_BASE}": int((_exact(base) & ~_exact(table)).sum())
        }
        if len(table) < 2:
            return found
        change, tokens = table - base, table[:, 1]
        errors = {
            f"eval_loss{CHANGE_ERROR}": ratio_error(change[:, 0], tokens),
            f"token_accuracy{CHANGE_ERROR}": ratio_error(change[:, 2], tokens),
        }
        return found | {key: error for key, error in errors.items() if math.isfinite(error)}


def _exact(table: torch.Tensor) -> torch.Tensor:
    """Return whether every label of a sample is the model's first choice, bool [samples]."""
    return table[:, 2] == table[:, 1]


SFT = SupervisedFineTuning()
