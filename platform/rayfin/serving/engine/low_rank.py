"""Low-rank adapters' products in C, for float32 on CPU."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence

import torch

from rayfin.config.serving import MAX_RANK
from rayfin.serving.engine import native
from rayfin.serving.engine.batch import SlotSpan

log = logging.getLogger(__name__)

_WIDEST = 2
_BLOCK = 4
"""Tokens of a block, TOKENS in the source."""


def blocks_of(groups: Sequence[SlotSpan]) -> torch.Tensor:
    """Return the tokens of `groups`, a few of one slot at a time: int32 [blocks, (slot, start,
    count)].
    """
    return torch.tensor(
        [
            (group.slot, start, min(_BLOCK, group.stop - start))
            for group in groups
            for start in range(group.start, group.stop, _BLOCK)
        ],
        dtype=torch.int32,
    ).view(-1, 3)


class LowRankKernel:
    """The kernel that adds B A x of each token's slot; raises OSError where it can't be had."""

    def __init__(self, most: int = _WIDEST) -> None:
        """Load the kernel; `most` is the widest registers to use, 2 for AVX-512, 1 for AVX2, 0 for
        what all have.
        """
        library = native.library("low_rank", MOST_RANK=MAX_RANK)
        self.variant: int = library.native_variant(most)
        self.parallel = bool(library.native_threads())
        """Large products use torch's threads."""
        self._add = library.add_low_rank
        pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
        self._add.argtypes = [
            *(pointer, size, pointer, size, pointer, pointer, size, size, size, pointer, pointer),
            *(size, ctypes.c_int, ctypes.c_int),
        ]
        self._add.restype = None

    def add(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        ranks: torch.Tensor,
        blocks: torch.Tensor,
    ) -> None:
        """Adds to out [tokens, out]; x: [tokens, in], a: [slots, room, in], b: [slots, room, out].

        All float32, with a token's values side by side. `ranks`: int32 [slots + 1], what of the
        room each slot uses, by its number; `blocks` from `blocks_of`.
        """
        if x.stride(1) != 1:
            x = x.contiguous()
        if out.stride(1) != 1:
            raise ValueError("a token's outputs don't lie side by side")
        self._add(
            *(x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), a.data_ptr()),
            *(b.data_ptr(), x.shape[1], out.shape[1], a.shape[1], ranks.data_ptr()),
            *(blocks.data_ptr(), len(blocks), torch.get_num_threads()),
            self.variant,
        )


def kernel_for(device: torch.device, dtype: torch.dtype) -> LowRankKernel | None:
    """Return the kernel, or None where torch's products are used: on GPUs, in other types, without
    a C compiler.
    """
    if (device.type, dtype) != ("cpu", torch.float32):
        return None
    try:
        return LowRankKernel()
    except OSError as error:
        log.warning("batches of many adapters are slower than they could be on CPU: %s", error)
        return None
