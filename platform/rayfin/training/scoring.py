"""How well a model does on held-out samples, from one forward pass over each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from rayfin.data import Tokens
from rayfin.training.batches import IGNORE, collate_padded


@dataclass(frozen=True)
class Scores:
    """Sums over samples, so that the scores of several workers add up."""

    loss: float = 0.0
    tokens: int = 0
    correct: int = 0
    exact: int = 0
    samples: int = 0

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            self.loss + other.loss,
            self.tokens + other.tokens,
            self.correct + other.correct,
            self.exact + other.exact,
            self.samples + other.samples,
        )

    def metrics(self) -> dict[str, float]:
        """eval_loss (nats a token), perplexity, token_accuracy and exact_match (shares)."""
        loss = self.loss / max(self.tokens, 1)
        return {
            "eval_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": self.correct / max(self.tokens, 1),
            "exact_match": self.exact / max(self.samples, 1),
        }


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
    samples: Sequence[Tokens],
    *,
    batch_size: int,
    pad_token_id: int,
    batches: int | None = None,
    filler: Tokens | None = None,
    device: torch.device | None = None,
) -> Scores:
    """Sums of loss and hits over `samples`.

    Where the model is in parts on several workers, each must call it equally often: `batches` times
    then, those that it lacks with `filler` alone, which is not counted. `device`: where the model
    computes, if its parameters may wait elsewhere.

    `exact` counts the samples whose every label is the model's first choice given the labels
    before it: those for which greedy decoding would answer the reference, token for token, and stop
    (for a sample that was not cut, with one answer). It costs no generation.
    """
    training = model.training
    model.eval()
    device = device or next(model.parameters()).device
    total = Scores()
    ordered = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        batch = collate_padded(ordered[start : start + batch_size], pad_token_id)
        batch = {key: value.to(device) for key, value in batch.items()}
        logits, targets, rows = completion_logits(model, batch)
        hits = logits.argmax(-1) == targets
        missed = torch.zeros(len(batch["labels"]), dtype=torch.bool, device=device)
        missed[rows[~hits]] = True
        total += Scores(
            loss=float(functional.cross_entropy(logits.float(), targets, reduction="sum")),
            tokens=len(targets),
            correct=int(hits.sum()),
            exact=int((~missed).sum()),
            samples=len(missed),
        )
    for _ in range(0 if batches is None else batches - math.ceil(len(ordered) / batch_size)):
        assert filler is not None
        batch = collate_padded([filler], pad_token_id)
        completion_logits(model, {key: value.to(device) for key, value in batch.items()})
    model.train(training)
    return total
