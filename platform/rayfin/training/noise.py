"""NEFTune: noise on the token embeddings while a model trains.

Jain et al. 2023, arXiv:2310.05914.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rayfin.objectives.tensors import unwrapped

if TYPE_CHECKING:
    import torch


@contextmanager
def embedding_noise(model: torch.nn.Module, alpha: float | None) -> Iterator[None]:
    """Have the model's embeddings add Transformers' noise in training mode, within the block.

    Afterwards the model is as before however the block ends: a base model goes on to other trials.
    The noise comes from torch's generator, whose state a checkpoint holds. None adds none.
    """
    if alpha is None:
        yield
        return
    from transformers.integrations.neftune import neftune_post_forward_hook

    inner: Any = unwrapped(model)
    embeddings = inner.get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha  # where the hook looks for it
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    try:
        yield
    finally:
        handle.remove()
        del embeddings.neftune_noise_alpha
