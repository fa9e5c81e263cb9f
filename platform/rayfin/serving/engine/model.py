"""The base model with its layers' slots and its rows' cache: a forward pass over a mixed batch."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AttentionInterface

from rayfin.config.serving import EngineConfig
from rayfin.errors import ConfigError, ModelError
from rayfin.serving.engine import attention
from rayfin.serving.engine.adapter_tables import AdapterTables
from rayfin.serving.engine.batch import Batch, RowSpan
from rayfin.serving.engine.cache import ATTENTION, KVCache, attend
from rayfin.serving.engine.host_adapter import HostAdapter
from rayfin.serving.engine.int8 import Int8Kernel, Int8Linear
from rayfin.serving.engine.joint_product import TOGETHER, join_layers, product
from rayfin.serving.engine.low_rank import kernel_for
from rayfin.serving.engine.packed_linear import PackedLinear, can_pack
from rayfin.serving.engine.slot_linear import SlotAssignment, SlotLinear

log = logging.getLogger(__name__)

AttentionInterface.register(ATTENTION, attend)


class BatchedModel:
    """A base model, changed in place for serving: nothing else may use it then.

    Raises ModelError for an architecture that the engine can't serve.
    """

    def __init__(self, name: str, base: Any, config: EngineConfig) -> None:
        _check_attention(name, base, config.max_length)
        self.base, self.config = base, config
        self.slots, self.rows = config.slots, config.max_rows
        self.embedding = base.get_input_embeddings()
        self.head = base.get_output_embeddings()
        self.decoder = base.get_decoder()
        self.device, self.dtype = self.embedding.weight.device, self.embedding.weight.dtype
        int8 = self._int8_kernel(name) if config.weights == "int8" else None
        self.assignment = SlotAssignment(kernel_for(self.device, self.dtype))
        self.linears: dict[str, SlotLinear] = {}
        self._prompts: dict[int, torch.Tensor] = {}
        self._prefixes: dict[int, torch.Tensor] = {}
        self._ranks: dict[int, int] = {}
        self._scaled: set[int] = set()
        self._tables = AdapterTables(*(_name_of(base, one) for one in (self.embedding, self.head)))
        self._insert_slots(int8)
        self._insert_cache()

    # --- a step -----------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, pieces: list[RowSpan]) -> tuple[list[RowSpan], torch.Tensor]:
        """Return the pieces that want logits, and the last tokens' logits [pieces, vocabulary]."""
        batch = Batch(pieces, self.device, self._prompts)
        self.assignment.begin(batch, self._ranks, self._scaled)
        self.cache.begin(batch)
        embedded = self.embedding(batch.token_ids)
        self._tables.embed(batch, embedded)
        for start, virtual in batch.overlays:
            embedded[start : start + len(virtual)] = virtual
        hidden = self.decoder(
            inputs_embeds=embedded[None],
            position_ids=batch.positions[None],
            # Four dimensions: taken for a finished mask and passed on; ours is in the cache.
            attention_mask=self._no_mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[0]
        if not len(batch.last):
            return [], hidden.new_empty(0, 0, dtype=torch.float32)
        # The head sees the tokens that are asked for, no others.
        chosen = hidden[batch.last]
        logits = self._logits(chosen).float()
        self._tables.score(batch, chosen, logits)
        return batch.asking, logits

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return product(self.head, hidden)

    # --- slots ------------------------------------------------------------------------------

    @torch.inference_mode()
    def fill(self, slot: int, adapter: HostAdapter) -> None:
        """Copies an adapter into a slot, over whatever was there."""
        self.forget(slot)
        try:
            for name, linear in self.linears.items():
                linear.fill(slot, adapter, name)
            if adapter.input_scale or adapter.output_scale:
                self._scaled.add(slot)
            self._tables.fill(slot, adapter.tables, self.device, self.dtype)
            if adapter.prompt is not None:
                self._prompts[slot] = adapter.prompt.to(self.device, self.dtype)
            if adapter.prefix is not None:
                self._prefixes[slot] = adapter.prefix.to(self.device, self.dtype)
            self._ranks[slot] = adapter.rank
        except BaseException:
            self.clear(slot)  # half an adapter would answer as nobody's
            raise

    def clear(self, slot: int) -> None:
        for linear in self.linears.values():
            linear.clear(slot)
        self.forget(slot)

    def forget(self, slot: int) -> None:
        """Lets go of what is there for this slot alone; it is not to be used until it is filled."""
        self._prompts.pop(slot, None)
        self._prefixes.pop(slot, None)
        self._ranks.pop(slot, None)
        self._tables.forget(slot)
        self._scaled.discard(slot)

    def table_bytes(self, adapter: HostAdapter) -> int:
        """Return what the adapter's own output head and embeddings take while it is in a slot."""
        return int(self.dtype.itemsize) * sum(table.numel() for table in adapter.tables.values())

    @torch.inference_mode()
    def begin_row(self, row: int, slot: int) -> None:
        """Puts the slot's learned prefix, if it has one, before the row."""
        if (prefix := self._prefixes.get(slot)) is not None:
            self.cache.write_prefix(row, prefix)

    @torch.inference_mode()
    def end_row(self, row: int, tokens: int) -> None:
        """Leaves nothing of a row that had so many tokens to the next one."""
        self.cache.clear_row(row, tokens)

    def embedded_tokens(self, slot: int) -> int:
        """Return how many virtual tokens of a slot's adapter enter as embeddings."""
        return len(self._prompts[slot]) if slot in self._prompts else 0

    def virtual_tokens(self, slot: int) -> int:
        """Return the number of virtual tokens before the prompt, embedded or keys and values."""
        prefix = self._prefixes.get(slot)
        return self.embedded_tokens(slot) + (0 if prefix is None else prefix.shape[-2])

    @property
    def vocab_size(self) -> int:
        return int(self.base.config.get_text_config().vocab_size)

    @property
    def slot_bytes(self) -> int:
        return sum(linear.slot_bytes for linear in self.linears.values()) + self._tables.nbytes

    # --- making -----------------------------------------------------------------------------

    def _int8_kernel(self, name: str) -> Int8Kernel:
        if (self.device.type, self.dtype) != ("cpu", torch.float32):
            raise ConfigError(
                f"engine.weights: int8 is for float32 models on CPU, and '{name}' is "
                f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}; set "
                "engine.weights=auto, or model.dtype=float32 and deployment.gpus=0"
            )
        try:
            kernel = Int8Kernel()
        except OSError as error:
            raise ConfigError(
                f"engine.weights: int8 needs a C compiler ({error}); set engine.weights=auto, or "
                "mend that"
            ) from error
        if not kernel.parallel and torch.get_num_threads() > 1:
            log.warning("engine.weights: int8 uses one thread: the compiler lacks OpenMP for torch")
        return kernel

    def _insert_slots(self, int8: Int8Kernel | None) -> None:
        """Puts a SlotLinear in the place of every linear layer but the head.

        With `int8`, over weights that are rounded to it, and the head's too.
        """
        found = [
            name
            for name, module in self.base.named_modules()
            if _is_linear(module) and module is not self.head
        ]
        # Names alone: a layer's float weights go as soon as it has its int8 ones.
        for name in found:
            module = self.base.get_submodule(name)
            parent, _, child = name.rpartition(".")
            inner = module if int8 is None else Int8Linear(module, int8)
            wrapped = SlotLinear(inner, self.assignment, self.slots, self.dtype)
            setattr(self.base.get_submodule(parent), child, wrapped)
            self.linears[name] = wrapped
        self._join_families()
        head = self.head
        if int8 is not None:
            self.head = Int8Linear(head, int8)
            if head.weight is not self.embedding.weight:  # else it is needed, and stays
                head.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        elif can_pack(head):
            self.head = PackedLinear(head)

    def _join_families(self) -> None:
        for name in self.linears:
            parent, _, child = name.rpartition(".")
            for children in TOGETHER:
                members = [self.linears.get(f"{parent}.{other}") for other in children]
                linears = [one for one in members if one]
                if child != children[0] or len(linears) < len(children):
                    continue
                product_of_all = join_layers([one.base for one in linears])
                for one in linears:
                    one.joint = product_of_all

    def _insert_cache(self) -> None:
        text = self.base.config.get_text_config()
        layers = [m for m in self.base.modules() if hasattr(m, "layer_idx") and _attends(m)]
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.cache = KVCache(
            layers=text.num_hidden_layers,
            rows=self.rows,
            heads=heads,
            max_length=self.config.max_length,
            head_dim=dim,
            dtype=self.dtype,
            device=self.device,
            kernel=attention.kernel_for(self.device, self.dtype, text.num_attention_heads // heads),
        )
        for layer in layers:
            layer.rayfin_cache = self.cache
        self.base.set_attn_implementation(ATTENTION)
        self._no_mask = torch.empty(1, 1, 1, 1, device=self.device)


def _name_of(base: torch.nn.Module, wanted: torch.nn.Module) -> str | None:
    return next((name for name, module in base.named_modules() if module is wanted), None)


def _is_linear(module: torch.nn.Module) -> bool:
    """Return whether a module is a torch linear layer, bitsandbytes' quantised ones included."""
    return isinstance(module, torch.nn.Linear)


def _attends(module: torch.nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


# What some models do beside plain attention and a plain head, by its name in the configuration.
_UNSERVED = {
    "attn_logit_softcapping": "soft caps on attention",
    "final_logit_softcapping": "soft caps on its scores",
    "logits_scaling": "scaled scores",
    "logit_scale": "scaled scores",
}


def _check_attention(name: str, base: Any, max_length: int) -> None:
    """Raises ModelError for a model that this engine would compute something else for."""
    text = base.config.get_text_config()
    for setting, what in _UNSERVED.items():
        if getattr(text, setting, None) not in (None, 1, 1.0):
            raise _unserved(name, f"has {what} ({setting})")
    types = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if types is None:
        limited = window is not None and getattr(text, "use_sliding_window", True)
        types = ["sliding_attention" if limited else "full_attention"]
    kinds = set(types) - {"full_attention"}
    if kinds - {"sliding_attention"} or (kinds and (window is None or window < max_length)):
        raise _unserved(name, f"has layers of {', '.join(sorted(kinds))} over {window} tokens")
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # Frequencies that depend on the longest row of a batch: rows would change each other's.
        short = rope.get("original_max_position_embeddings") or text.max_position_embeddings
        if max_length > short:
            raise _unserved(
                name, f"has other positions beyond {short} tokens ({rope['rope_type']})"
            )


def _unserved(name: str, why: str) -> ModelError:
    return ModelError(
        f"model.name: '{name}' {why}, and rayfin's engine serves models whose layers all have "
        "plain, full attention; choose one of those, or a smaller engine.max_length where it is "
        "about tokens"
    )
