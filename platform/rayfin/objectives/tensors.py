"""What objectives are built from: batches of token ids, logits of labels, errors of a change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rayfin.methods.attach import frozen_kept
from rayfin.samples import NO_LOSS, TokenizedSample

if TYPE_CHECKING:
    import torch


def pad(samples: Sequence[TokenizedSample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return right-padded [batch, longest] input_ids, attention_mask and labels."""
    import torch

    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    ids = [list(sample["input_ids"]) for sample in samples]
    batch = {
        "input_ids": padded(ids, pad_token_id),
        "labels": padded([list(sample["labels"]) for sample in samples], NO_LOSS),
    }
    lengths = torch.tensor([len(row) for row in ids])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def pack(samples: Sequence[TokenizedSample]) -> dict[str, torch.Tensor]:
    """Return one row [1, total] without padding; position_ids start anew at every sample.

    Transformers derives the block-diagonal attention mask from them where no attention_mask is
    given. The first label of each sample is ignored: the token before it is another sample's.
    """
    import torch

    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for sample in samples:
        row["input_ids"] += sample["input_ids"]
        row["labels"] += [NO_LOSS, *sample["labels"][1:]]
        row["position_ids"] += range(len(sample["input_ids"]))
    return {key: torch.tensor([values]) for key, values in row.items()}


def label_logits(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits [n, vocabulary], targets [n] and rows [n] of the n positions with a label.

    The language-model head, a fifth of a small model's work, runs on these positions only: a hook
    hands it no others. It holds for every wrapper around the model (PEFT, DDP), and for virtual
    tokens put before the sequence, as positions are counted from the end.
    """

    labels = batch["labels"]
    wanted = labels[:, 1:] != NO_LOSS

    def select(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden = args[0]
        return (hidden[:, -labels.shape[1] : -1][wanted],)

    head: Any = unwrapped(model)
    handle = head.get_output_embeddings().register_forward_pre_hook(select)
    try:
        rest = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**rest, use_cache=False).logits
    finally:
        handle.remove()
    return logits, labels[:, 1:][wanted], wanted.nonzero()[:, 0]


def count_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the number of labels that a token before them predicts."""
    return (batch["labels"][..., 1:] != NO_LOSS).sum()


def sum_by_row(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the sums of `values` [n] over each of `count` rows: float64 [count], on the CPU.

    There the order of a sum over a sample's tokens is always the same.
    """
    import torch

    return torch.bincount(rows.cpu(), weights=values.double().cpu(), minlength=count)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model without the wrapper of DDP."""
    inner: torch.nn.Module = getattr(model, "module", model)
    return inner


@contextmanager
def adapter_disabled(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the model as its base; a model without an adapter is its own base."""
    inner: Any = unwrapped(model)
    if not hasattr(inner, "disable_adapter"):
        yield inner
        return
    with frozen_kept(inner), inner.disable_adapter():
        yield inner


def ratio_error(change: torch.Tensor, weights: torch.Tensor) -> float:
    """Return the standard error of sum(change) / sum(weights), both [samples].

    Samples are what was drawn, not their tokens: those of one answer are alike. Cochran, Sampling
    Techniques, 3rd edition (1977), equation 6.13, of a large population.
    """
    samples = len(change)
    rest = change - change.sum() / weights.sum() * weights
    return float((rest.square().sum() * samples / (samples - 1)).sqrt() / weights.sum())
