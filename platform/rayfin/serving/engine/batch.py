"""The tokens that one step computes, of many rows, flat and grouped by adapter slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NO_ADAPTER = 0
"""The slot of the bare base model; adapters have slots 1, 2, …"""


@dataclass(frozen=True)
class RowSpan:
    """Consecutive tokens of one row; `start` is the first one's place in the row's cache."""

    row: int
    slot: int
    start: int
    token_ids: Sequence[int]
    """-1 stands for a virtual token: its embedding is in `Batch.virtual`."""
    wants_logits: bool
    """The last token's logits are asked for."""

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class SlotSpan:
    """Tokens [start, stop) of the flat line, all of one adapter slot."""

    slot: int
    start: int
    stop: int


class Batch:
    """The pieces of a step in the order of their slots, single tokens first, as flat tensors.

    - token_ids, positions, rows, slots: [tokens]
    - last: [pieces that want logits], the place of each one's last token
    """

    def __init__(
        self,
        pieces: Sequence[RowSpan],
        device: torch.device,
        virtual: dict[int, torch.Tensor] | None = None,
    ) -> None:
        """Lay the pieces out; `virtual` is slot -> embeddings [virtual tokens, hidden] of its
        adapter.
        """
        # Single tokens first: their attention is computed for all rows at once.
        self.pieces = sorted(pieces, key=lambda p: (len(p.token_ids) > 1, p.slot, p.row))
        self.decoding = sum(len(piece.token_ids) == 1 for piece in self.pieces)
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        slots: list[int] = []
        last: list[int] = []
        self.groups: list[SlotSpan] = []
        overlays: list[tuple[int, torch.Tensor]] = []
        for piece in self.pieces:
            start, count = len(ids), len(piece.token_ids)
            ids += piece.token_ids
            positions += range(piece.start, piece.stop)
            rows += [piece.row] * count
            slots += [piece.slot] * count
            if piece.wants_logits:
                last.append(len(ids) - 1)
            if piece.slot != NO_ADAPTER:
                self._extend_groups(piece.slot, start, start + count)
            if virtual and piece.token_ids[0] < 0:
                embeddings = virtual[piece.slot]
                overlays.append((start, embeddings[piece.start : piece.stop][:count]))
        self.overlays = overlays
        self.longest = max(p.stop for p in self.pieces[: self.decoding]) if self.decoding else 0
        self.token_ids = torch.tensor(ids, device=device).clamp_(min=0)
        self.positions = torch.tensor(positions, device=device)
        self.rows = torch.tensor(rows, device=device)
        self.slots = torch.tensor(slots, device=device)
        self.last = torch.tensor(last, device=device, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def asking(self) -> list[RowSpan]:
        """Return the pieces that the rows of logits belong to, in order."""
        return [piece for piece in self.pieces if piece.wants_logits]

    def _extend_groups(self, slot: int, start: int, stop: int) -> None:
        # Decoding tokens and prompts stay apart: their adapters are applied in different ways.
        last = self.groups[-1] if self.groups and start != self.decoding else None
        if last is not None and last.slot == slot and last.stop == start:
            start = self.groups.pop().start
        self.groups.append(SlotSpan(slot, start, stop))
