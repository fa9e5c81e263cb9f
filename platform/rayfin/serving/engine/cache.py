"""The key/value cache of all rows, allocated once and written in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from rayfin.errors import ConfigError, ModelError
from rayfin.serving.engine.attention import AttentionKernel
from rayfin.serving.engine.batch import Batch, RowSpan

ATTENTION = "rayfin"
"""The name under which transformers' models find `attend`."""


_VECTOR = 32
"""Places of a row that no processor's registers split, in any type."""


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
        kernel: AttentionKernel | None = None,
    ) -> None:
        """Allocate the cache; `kernel` writes places, and attends to them, where it isn't torch.

        Raises ConfigError where the device has too little memory for so much.
        """
        self.kernel = kernel
        shape = (rows, heads, max_length, head_dim)
        try:
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
            self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        except RuntimeError as error:  # of a GPU it is OutOfMemoryError, which is one
            size = 2 * layers * math.prod(shape) * dtype.itemsize
            raise ConfigError(
                f"engine.max_rows={rows} rows of engine.max_length={max_length} tokens take "
                f"{size / 2**30:.1f} GiB of memory, more than is left beside the model; lower one "
                "of them"
            ) from error
        self.batch: Batch | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def begin(self, batch: Batch) -> None:
        """Sets what the next forward pass is about."""
        self.batch = batch
        self._span = 0
        places = self.keys[0].shape[2]
        if self.kernel is not None:
            # What it is given, it takes for granted.
            rows_here = range(len(self.keys[0]))
            for piece in batch.pieces:
                if piece.row not in rows_here or piece.start < 0 or piece.stop > places:
                    raise IndexError(
                        f"{len(rows_here)} rows of {places} places don't have places "
                        f"{piece.start} to {piece.stop - 1} of row {piece.row}"
                    )
        elif batch.decoding:
            rows = batch.rows[: batch.decoding]
            lengths = batch.positions[: batch.decoding] + 1
            # Rows in between that don't decode now are computed too, and their result is dropped.
            self._span = int(max(piece.row for piece in batch.pieces[: batch.decoding])) + 1
            limit = torch.ones(self._span, dtype=torch.long, device=rows.device)
            limit[rows] = lengths
            # Each row's place in the flat line; 0 for rows whose result is dropped.
            self._tokens = torch.zeros_like(limit)
            self._tokens[rows] = torch.arange(batch.decoding, device=rows.device)
            # Whole vectors, so that a row's last bits seldom tell how long the longest row is.
            self._length = min(-(-batch.longest // _VECTOR) * _VECTOR, places)
            beyond = torch.arange(self._length, device=rows.device)[None, :] >= limit[:, None]
            dtype = self.keys[0].dtype
            bias = torch.zeros(beyond.shape, dtype=dtype, device=rows.device)
            self._bias = bias.masked_fill_(beyond, torch.finfo(dtype).min)[:, None, None]

    def clear_row(self, row: int, stop: int) -> None:
        """Zeroes a row's first `stop` places.

        torch masks places beyond a row's length by adding the least number, and what is no number
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
        if self.kernel is not None:
            cache = self.keys[layer], self.values[layer]
            self.kernel.write(cache, keys[0], values[0], rows, positions)
            return keys, values
        self.keys[layer][rows, :, positions] = keys[0].transpose(0, 1)
        self.values[layer][rows, :, positions] = values[0].transpose(0, 1)
        return keys, values

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    # --- attention --------------------------------------------------------------------------

    def attend(self, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Compute attention of the batch's queries [heads, tokens, head_dim] over their own rows.

        Returns [tokens, heads, head_dim].
        """
        batch = self.batch
        assert batch is not None
        if batch.decoding == len(batch) and self.kernel is None:
            return self._decode(layer, query, scaling)
        out = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format)
        if batch.decoding and self.kernel is not None:
            cache, decoding = (self.keys[layer], self.values[layer]), query[:, : batch.decoding]
            self.kernel.attend(cache, decoding, batch.rows, batch.positions, out, scaling)
        elif batch.decoding:
            out[: batch.decoding] = self._decode(layer, query[:, : batch.decoding], scaling)
        start = batch.decoding
        for piece in batch.pieces[batch.decoding :]:
            stop = start + len(piece.token_ids)
            out[start:stop] = self._prefill(layer, piece, query[:, start:stop], scaling)
            start = stop
        return out

    def _decode(self, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attend for one token a row; queries that share a key/value head stand as tokens of a
        sequence.
        """
        batch = self.batch
        assert batch is not None
        heads, _, dim = query.shape
        keys = self.keys[layer][: self._span, :, : self._length]
        values = self.values[layer][: self._span, :, : self._length]
        queries = query.transpose(0, 1)[self._tokens]
        result = functional.scaled_dot_product_attention(
            queries.view(self._span, keys.shape[1], -1, dim),
            keys,
            values,
            attn_mask=self._bias,
            scale=scaling,
        )
        # Not view: some of CUDA's kernels lay their result out token by token.
        return result.reshape(self._span, heads, dim)[batch.rows[: batch.decoding]]

    def _prefill(
        self, layer: int, piece: RowSpan, query: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attend for consecutive tokens of one row: each sees the row up to itself."""
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
    """Implement transformers' attention interface: query [1, heads, tokens, head_dim] -> [1,
    tokens, …].
    """
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__} has soft caps or sinks in its attention, which rayfin's "
            "engine does not compute; serve another model"
        )
    cache: KVCache = module.rayfin_cache  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = cache.attend(layer, query[0], query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out[None], None
