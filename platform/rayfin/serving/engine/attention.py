"""Write one token a row to the cache, and compute its attention, in C."""

from __future__ import annotations

import ctypes
import logging

import torch

from rayfin.serving.engine import native

log = logging.getLogger(__name__)

_WIDEST = 1
_MOST_GROUP = 64


class AttentionKernel:
    """The kernel for float32 on CPU; raises OSError where it can't be had."""

    def __init__(self, most: int = _WIDEST) -> None:
        """Load the kernel; `most` is the widest registers to use, 1 for AVX2, 0 for what all
        processors have.
        """
        library = native.library("attention", MOST_GROUP=_MOST_GROUP)
        self.variant: int = library.native_variant(most)
        self.parallel = bool(library.native_threads())
        """Long rows use torch's threads."""
        pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
        self._write, self._rows = library.attention_write, library.attention_rows
        cache = (pointer, pointer, size, size, size)
        strided = (pointer, size, size)
        self._write.argtypes = [*cache, *strided, *strided, pointer, pointer, size]
        self._rows.argtypes = [
            *(*cache, *strided, pointer, pointer, size, pointer, size),
            *(ctypes.c_float, ctypes.c_int, ctypes.c_int),
        ]
        self._write.restype = self._rows.restype = None

    def write(
        self,
        cache: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Puts keys and values [heads, tokens, dim] at `positions` of `rows`, both int64 [tokens].

        `cache`: keys and values [rows, heads, places, dim]; that the places exist is not checked.
        One head is taken for all of the cache's; raises RuntimeError for other shapes.
        """
        heads, dim = cache[0].shape[1], cache[0].shape[3]
        keys, values = (new.expand(heads, len(rows), dim) for new in (keys, values))
        self._write(
            *(*_cache(cache), *_strided(keys), *_strided(values)),
            *(rows.data_ptr(), positions.data_ptr(), len(rows)),
        )

    def attend(
        self,
        cache: tuple[torch.Tensor, torch.Tensor],
        query: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
        scaling: float,
    ) -> None:
        """Sets out [tokens, query heads, dim] for query [query heads, tokens, dim].

        Each token sees its row up to its own position. Raises ValueError for shapes that the cache
        does not fit.
        """
        shared, dim = cache[0].shape[1], cache[0].shape[3]
        heads, tokens = query.shape[:2]
        group, left = divmod(heads, shared)
        if query.shape[2] != dim or left or group > _MOST_GROUP or out.dtype != torch.float32:
            raise ValueError(
                f"{heads} query heads of {query.shape[2]} values don't fit {shared} key/value "
                f"heads of {dim}, or {out.dtype} is not float32"
            )
        if out.shape[1:] != (heads, dim) or len(out) < tokens or not out.is_contiguous():
            raise ValueError(f"out {tuple(out.shape)} has no room for {tokens} tokens")
        self._rows(
            *(*_cache(cache), *_strided(query), rows.data_ptr(), positions.data_ptr()),
            *(tokens, out.data_ptr(), group, scaling),
            *(torch.get_num_threads(), self.variant),
        )


def _cache(cache: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, ...]:
    keys, values = cache
    return keys.data_ptr(), values.data_ptr(), *keys.shape[1:]


def _strided(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return where [heads, tokens, dim] lies; a head's values have to lie side by side."""
    if tensor.stride(2) != 1 or tensor.dtype != torch.float32:
        raise ValueError(f"a head's values don't lie side by side, or {tensor.dtype} not float32")
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def kernel_for(device: torch.device, dtype: torch.dtype, group: int) -> AttentionKernel | None:
    """Return the kernel, or None where torch's attention is used: on GPUs, in other types, without
    a C compiler.

    `group`: query heads to a key/value head.
    """
    if (device.type, dtype) != ("cpu", torch.float32) or group > _MOST_GROUP:
        return None
    try:
        return AttentionKernel()
    except OSError as error:
        log.warning("decoding is slower than it could be on CPU: %s", error)
        return None
