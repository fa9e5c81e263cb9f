"""The keys and values of all rows, in memory that is allocated once and written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from rayfin.errors import ModelError
from rayfin.serving.engine.batch import Batch, Piece

ATTENTION = "rayfin"
"""The name under which transformers' models find `attend`."""


class KVCache:
    """Keys and values [rows, key/value heads, max_length, head_dim] of every layer.

    To transformers' attention layers it is the `past_key_values` of one sequence: the flat line of
    a batch's tokens. `update` writes each token to its row and place; `attend` reads whole rows.
    """

    is_compileable = False

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (rows, heads, max_length, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.batch: Batch | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def begin(self, batch: Batch) -> None:
        """Sets what the next forward pass is about."""
        self.batch = batch
        self._span = 0
        if batch.decoding:
            rows = batch.rows[: batch.decoding]
            lengths = batch.positions[: batch.decoding] + 1
            # Rows in between that don't decode now are computed too, and their result is dropped.
            self._span = int(max(piece.row for piece in batch.pieces[: batch.decoding])) + 1
            limit = torch.ones(self._span, dtype=torch.long, device=rows.device)
            limit[rows] = lengths
            places = torch.arange(batch.longest, device=rows.device)
            beyond = places[None, :] >= limit[:, None]
            dtype = self.keys[0].dtype
            self._bias = torch.zeros(beyond.shape, dtype=dtype, device=rows.device)
            self._bias.masked_fill_(beyond, torch.finfo(dtype).min)

    def clear_row(self, row: int, stop: int) -> None:
        """Zeroes a row's first `stop` places.

        Places beyond a row's length are masked by adding the least number, and what is no number
        stays none: NaN that one row left would be the next one's.
        """
        for tensor in (*self.keys, *self.values):
            tensor[row, :, :stop].zero_()

    def write_prefix(self, row: int, prefix: torch.Tensor) -> None:
        """Puts a learned prefix [layers, 2, heads, virtual tokens, head_dim] before a row."""
        for layer, (keys, values) in enumerate(prefix):
            self.keys[layer][row, :, : keys.shape[1]] = keys
            self.values[layer][row, :, : values.shape[1]] = values

    # --- what transformers' layers call -----------------------------------------------------

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the batch's keys and values [1, heads, tokens, head_dim]; returns them."""
        assert self.batch is not None
        rows, positions = self.batch.rows, self.batch.positions
        self.keys[layer][rows, :, positions] = keys[0].transpose(0, 1)
        self.values[layer][rows, :, positions] = values[0].transpose(0, 1)
        return keys, values

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    # --- attention --------------------------------------------------------------------------

    def attend(self, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of the batch's queries [heads, tokens, head_dim] over their own rows.

        Returns [tokens, heads, head_dim].
        """
        batch = self.batch
        assert batch is not None
        out = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format)
        if batch.decoding:
            out[: batch.decoding] = self._decode(layer, query[:, : batch.decoding], scaling)
        start = batch.decoding
        for piece in batch.pieces[batch.decoding :]:
            stop = start + len(piece.token_ids)
            out[start:stop] = self._prefill(layer, piece, query[:, start:stop], scaling)
            start = stop
        return out

    def _decode(self, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """One token a row: the rows' queries that share a key/value head are one small product."""
        batch, span = self.batch, self._span
        assert batch is not None
        rows = batch.rows[: batch.decoding]
        heads, _, dim = query.shape
        keys = self.keys[layer][:span, :, : batch.longest]
        values = self.values[layer][:span, :, : batch.longest]
        shared = keys.shape[1]
        queries = query.new_zeros(span, heads, dim)
        queries[rows] = query.transpose(0, 1) * scaling
        scores = torch.matmul(
            queries.view(span, shared, heads // shared, dim), keys.transpose(2, 3)
        )
        weights = (scores + self._bias[:, None, None]).softmax(-1, dtype=torch.float32)
        result = torch.matmul(weights.to(values.dtype), values)
        return result.view(span, heads, dim)[rows]

    def _prefill(
        self, layer: int, piece: Piece, query: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Consecutive tokens of one row: each sees the row up to itself."""
        keys = self.keys[layer][piece.row, :, : piece.stop]
        values = self.values[layer][piece.row, :, : piece.stop]
        mask = None
        if piece.start:
            places = torch.arange(piece.stop, device=query.device)
            mask = places[None, :] <= places[piece.start :, None]
        result = functional.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[0] != keys.shape[0],
        )
        return result[0].transpose(0, 1)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, head_dim] -> [1, tokens, …]."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__} has soft caps or sinks in its attention, which rayfin's "
            "engine does not compute; serve another model"
        )
    cache: KVCache = module.rayfin_cache  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = cache.attend(layer, query[0], query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out[None], None
