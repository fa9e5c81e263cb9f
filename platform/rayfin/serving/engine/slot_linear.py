"""The base's linear layers with all slots' adapters, applied to a mixed batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayfin.serving.engine.batch import Batch, SlotSpan
from rayfin.serving.engine.host_adapter import HostAdapter, LowRank
from rayfin.serving.engine.joint_product import JointProduct, product
from rayfin.serving.engine.low_rank import LowRankKernel, blocks_of


@dataclass(frozen=True)
class StackedGroups:
    """Groups of a few tokens each, computed by one product over the slots [first, last]."""

    first: int
    last: int
    places: torch.Tensor
    """[slots, most tokens of a slot] places in the flat line; short groups repeat place 0."""
    direct: bool
    """`places` counts up from 0 without gaps: a view does, and nothing is gathered."""
    real: torch.Tensor
    """Places in `places`, flattened, that are no padding, …"""
    targets: torch.Tensor
    """… and where in the flat line each of them belongs."""

    @property
    def shape(self) -> torch.Size:
        return self.places.shape


class SlotAssignment:
    """The slots of a batch's tokens, which every layer's adapters look up.

    Set once a step by the model; shared by all layers.
    """

    def __init__(self, kernel: LowRankKernel | None) -> None:
        """Begin without a batch; `kernel` adds low-rank adapters, where it isn't torch's own
        products.
        """
        self.kernel = kernel
        self.blocks = blocks_of(())
        """What the kernel is to compute."""
        self.slots: torch.Tensor | None = None
        """[tokens]"""
        self.rank = 0
        """The largest rank among the batch's low-rank adapters; 0 where there is none."""
        self.scaled = False
        """Some adapter of the batch scales inputs or outputs."""
        self.stack: StackedGroups | None = None
        self.groups: tuple[SlotSpan, ...] = ()
        """Low-rank groups outside the stack, computed one by one."""

    def begin(self, batch: Batch, ranks: dict[int, int], scaled: set[int]) -> None:
        """Take a batch up; `ranks` is slot -> rank of its low-rank adapter, `scaled` the slots with
        scales.
        """
        self.slots = batch.slots
        self.scaled = any(group.slot in scaled for group in batch.groups)
        low_rank = [group for group in batch.groups if ranks.get(group.slot, 0)]
        self.rank = max((ranks[group.slot] for group in low_rank), default=0)
        if self.kernel is not None:
            self.blocks = blocks_of(low_rank)
            return
        decoding = [group for group in low_rank if group.stop <= batch.decoding]
        self.stack = _stack(decoding, batch.slots.device)
        stacked = len(decoding) if self.stack is not None else 0
        self.groups = tuple(low_rank[stacked:])


def _stack(groups: list[SlotSpan], device: torch.device) -> StackedGroups | None:
    """Return one product for all `groups` (in the order of their slots), where that is the less
    work.

    It also reads the slots in between, and pads short groups to the longest.
    """
    if len(groups) < 3:
        return None
    first, last = groups[0].slot, groups[-1].slot
    most = max(group.stop - group.start for group in groups)
    tokens = sum(group.stop - group.start for group in groups)
    if (last - first + 1) * most > 3 * tokens:
        return None
    places = torch.zeros(last - first + 1, most, dtype=torch.long)
    real: list[int] = []
    targets: list[int] = []
    for group in groups:
        count, at = group.stop - group.start, (group.slot - first) * most
        places[group.slot - first, :count] = torch.arange(group.start, group.stop)
        real += range(at, at + count)
        targets += range(group.start, group.stop)
    direct = targets == list(range(places.numel()))
    return StackedGroups(
        first,
        last,
        places.to(device),
        direct,
        torch.tensor(real, device=device),
        torch.tensor(targets, device=device),
    )


class SlotLinear(torch.nn.Module):
    """A linear layer with the adapters of all slots.

    It computes y = out_scale * (W (in_scale * x)) + bias + shift + B A x, with all but W of a
    token's slot.

    Slot tensors are made when the first adapter that needs them arrives: a: [slots, rank, in],
    b: [slots, rank, out] (B transposed, its scaling folded in), in_scale [slots + 1, in],
    out_scale [slots + 1, out], shift [slots + 1, out]; slot 0 of the scales is the bare base.
    """

    def __init__(
        self, base: torch.nn.Module, assignment: SlotAssignment, slots: int, dtype: torch.dtype
    ) -> None:
        """Wrap `base`; `dtype` is that of the values that the layer is given."""
        super().__init__()
        self._dtype = dtype
        self.base, self.assignment, self.slots = base, assignment, slots
        self.joint: JointProduct | None = None
        """The layers that are given the same input, if it is computed with them."""
        # Ours, and nobody's submodules: the layer underneath keeps its place in the model.
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None
        self.in_scale: torch.Tensor | None = None
        self.out_scale: torch.Tensor | None = None
        self.shift: torch.Tensor | None = None
        self.filled: dict[int, int] = {}
        """Slot -> rank of what it holds for this layer."""
        self.ranks = torch.zeros(slots + 1, dtype=torch.int32)
        """The rank of each slot's adapter as the kernel reads it; 0 while a slot is filled."""
        self._ranks = self.ranks.numpy()  # the same memory, quicker to write to
        self._scaled: set[int] = set()

    @property
    def in_features(self) -> int:
        return int(self.base.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        return int(self.base.out_features)  # type: ignore[arg-type]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assignment = self.assignment
        flat = hidden.reshape(-1, hidden.shape[-1])
        scaled = assignment.scaled
        given = flat
        if scaled and self.in_scale is not None:
            given = flat * self.in_scale[assignment.slots]
        if self.joint is not None and given is flat:
            out = self.joint.product(self.base, hidden)
        else:
            out = product(self.base, given)
        if scaled and self.out_scale is not None:
            scale = self.out_scale[assignment.slots]
            bias = getattr(self.base, "bias", None)
            out = out * scale if bias is None else (out - bias) * scale + bias
        if scaled and self.shift is not None:
            out = out + self.shift[assignment.slots]
        if assignment.rank and self.a is not None:
            self._add_low_rank(flat, out)
        return out.view(*hidden.shape[:-1], out.shape[-1])

    def _add_low_rank(self, flat: torch.Tensor, out: torch.Tensor) -> None:
        assignment, a, b = self.assignment, self.a, self.b
        assert a is not None
        assert b is not None
        if assignment.kernel is not None:
            assignment.kernel.add(flat, out, a, b, self.ranks, assignment.blocks)
            return
        rank = min(assignment.rank, a.shape[1])
        if (stack := assignment.stack) is not None:
            a_all = a[stack.first - 1 : stack.last, :rank]
            b_all = b[stack.first - 1 : stack.last, :rank]
            count = stack.places.numel()
            tokens = flat[:count].view(*stack.shape, -1) if stack.direct else flat[stack.places]
            # A x^T and not x A^T: the faster way round for a few tokens, as in `joint_product`.
            low = torch.bmm(a_all, tokens.transpose(1, 2)).transpose(1, 2)
            if stack.direct:
                into = out[:count].view(*stack.shape, -1)
                torch.baddbmm(into, low, b_all, out=into)
            else:
                update = torch.bmm(low, b_all).flatten(0, 1)
                out.index_add_(0, stack.targets, update[stack.real])
        for group in assignment.groups:
            if group.slot in self.filled:
                low = flat[group.start : group.stop] @ a[group.slot - 1, :rank].t()
                out[group.start : group.stop].addmm_(low, b[group.slot - 1, :rank])

    # --- filling slots ----------------------------------------------------------------------

    def fill(self, slot: int, adapter: HostAdapter, name: str) -> None:
        """Copies what an adapter has for this layer, `name`, over all that the slot held."""
        self._fill_low_rank(slot, adapter.lora.get(name))
        parts = (adapter.input_scale, adapter.output_scale, adapter.output_shift)
        scales = [part.get(name) for part in parts]
        if slot in self._scaled or any(scale is not None for scale in scales):
            self._fill_scales(slot, *scales)

    def clear(self, slot: int) -> None:
        """Makes the slot the bare base again."""
        self._fill_low_rank(slot, None)
        self._fill_scales(slot, None, None, None)

    def _fill_low_rank(self, slot: int, low_rank: LowRank | None) -> None:
        before, rank = self.filled.get(slot, 0), 0
        self._ranks[slot] = 0
        if low_rank is not None:
            rank = low_rank.rank
            a, b = self._room_for(rank)
            # Half of it would answer as nobody's: until it is whole, `clear` has to look at all.
            self.filled[slot] = max(before, rank)
            a[slot - 1, :rank].copy_(low_rank.a)
            b[slot - 1, :rank].copy_(low_rank.b)
        if before > rank and self.b is not None:
            # A product over all slots goes to the batch's largest rank. Both: what overflows in A
            # is no number times zero.
            self.a[slot - 1, rank:before].zero_()  # type: ignore[index]
            self.b[slot - 1, rank:before].zero_()
        self._ranks[slot] = rank
        if rank:
            self.filled[slot] = rank
        else:
            self.filled.pop(slot, None)

    def _fill_scales(
        self,
        slot: int,
        in_scale: torch.Tensor | None,
        out_scale: torch.Tensor | None,
        shift: torch.Tensor | None,
    ) -> None:
        if in_scale is not None and self.in_scale is None:
            self.in_scale = self._ones(self.in_features)
        if out_scale is not None and self.out_scale is None:
            self.out_scale = self._ones(self.out_features)
        if shift is not None and self.shift is None:
            self.shift = self._zeros(self.slots + 1, self.out_features)
        self._scaled.add(slot)
        for stacked, new, without in (
            (self.in_scale, in_scale, 1.0),
            (self.out_scale, out_scale, 1.0),
            (self.shift, shift, 0.0),
        ):
            if stacked is not None and new is None:
                stacked[slot].fill_(without)
            elif stacked is not None and new is not None:
                stacked[slot].copy_(new)
        if in_scale is None and out_scale is None and shift is None:
            self._scaled.discard(slot)

    @property
    def slot_bytes(self) -> int:
        """Return the memory of all slots."""
        tensors = (self.a, self.b, self.in_scale, self.out_scale, self.shift)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _room_for(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        have = self.a.shape[1] if self.a is not None else 0
        if rank > have or self.a is None or self.b is None:
            rank = -(-rank // 8) * 8
            a = self._zeros(self.slots, rank, self.in_features)
            b = self._zeros(self.slots, rank, self.out_features)
            if self.a is not None and self.b is not None:
                a[:, :have] = self.a
                b[:, :have] = self.b
            self.a, self.b = a, b
        return self.a, self.b

    def _zeros(self, *shape: int) -> torch.Tensor:
        device: torch.device = self.base.weight.device  # type: ignore[assignment]
        return torch.zeros(shape, device=device, dtype=self._dtype)

    def _ones(self, features: int) -> torch.Tensor:
        return self._zeros(self.slots + 1, features).fill_(1.0)
