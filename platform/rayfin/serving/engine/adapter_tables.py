"""Output heads and embeddings of adapters' own (`modules_to_save`)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional

from rayfin.serving.engine.batch import Batch
from rayfin.serving.engine.layout import BaseLayout
from rayfin.serving.engine.peft_files import PREFIX, AdapterSettings, AdapterWeights

SETTING = "modules_to_save"


def saved_tables(
    settings: AdapterSettings, weights: AdapterWeights, base: BaseLayout
) -> dict[str, str]:
    """Returns module name -> tensor name of the tables in `modules_to_save`; checks their shapes.

    Raises AdapterError where it names any other module, or one whose tensor is missing, and where
    they take too much memory.
    """
    named = settings.values.get(SETTING)
    if named in (None, []):
        return {}
    last = {module.rpartition(".")[2]: module for module in base.tables}
    known = last | {module: module for module in base.tables}
    if not isinstance(named, list) or not all(
        isinstance(one, str) and one in known for one in named
    ):
        raise settings.error(
            f"adapter_config.json sets {SETTING!r} to modules other than {' and '.join(last)}, "
            "which the engine does not serve; train again without it, or merge the adapter into "
            "its base and serve the merged model (model.name=DIRECTORY)"
        )
    modules = sorted({known[one] for one in named})
    if settings.flag("ensure_weight_tying") and len(modules) < len(base.tables):
        raise settings.error(
            f"it ties the output head to the embeddings (ensure_weight_tying), and {SETTING!r} has "
            "one of both; name both when you train it, or merge it into its base"
        )
    tensors = {module: f"{PREFIX}{module}.weight" for module in modules}
    weights.check({tensor: base.tables[module] for module, tensor in tensors.items()})
    need = base.itemsize * sum(math.prod(base.tables[module]) for module in modules)
    if need > base.max_table_bytes:
        megabytes = math.ceil(need / 2**20)
        raise settings.error(
            f"its own {' and '.join(modules)} take {megabytes} MB, and the slots have room for "
            f"{base.max_table_bytes / 2**20:.0f}; set engine.tables_mb={megabytes} or more"
        )
    return tensors


class AdapterTables:
    """The heads and embeddings of the adapters that are in slots now.

    A token is embedded and scored by those of its own adapter.
    """

    def __init__(self, embedding: str | None, head: str | None) -> None:
        """Takes the names of both modules in the base; None for one that the base lacks."""
        self._names = (embedding, head)
        self._embeddings: dict[int, torch.Tensor] = {}
        self._heads: dict[int, torch.Tensor] = {}

    def fill(
        self,
        slot: int,
        tables: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        for name, held in zip(self._names, (self._embeddings, self._heads), strict=True):
            if name is not None and (table := tables.get(name)) is not None:
                held[slot] = table.to(device, dtype)

    def forget(self, slot: int) -> None:
        self._embeddings.pop(slot, None)
        self._heads.pop(slot, None)

    @property
    def nbytes(self) -> int:
        held = (*self._embeddings.values(), *self._heads.values())
        return sum(table.nbytes for table in held)

    def embed(self, batch: Batch, embedded: torch.Tensor) -> None:
        """Puts the adapters' own embeddings over the base's, `embedded` [tokens, hidden]."""
        for group in batch.groups if self._embeddings else ():
            if (table := self._embeddings.get(group.slot)) is not None:
                ids = batch.token_ids[group.start : group.stop]
                embedded[group.start : group.stop] = functional.embedding(ids, table)

    def score(self, batch: Batch, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Puts the scores of the adapters' own heads over the base's, `logits` [pieces, tokens].

        `hidden` is [pieces, hidden], of the last token of each piece that asks for scores.
        """
        if not self._heads:
            return
        slots = [piece.slot for piece in batch.asking]
        for slot in set(slots) & self._heads.keys():
            rows = [row for row, other in enumerate(slots) if other == slot]
            logits[rows] = functional.linear(hidden[rows], self._heads[slot]).to(logits.dtype)
