"""The names, linear layers and sizes of the served base model, which an adapter must fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from rayfin.compat.bitsandbytes import unpacked
from rayfin.config.serving import MAX_RANK
from rayfin.errors import AdapterError, ModelError
from rayfin.models import Base
from rayfin.serving.engine.int8 import Int8Linear
from rayfin.serving.engine.slot_linear import SlotLinear

MAX_VIRTUAL_TOKENS = 4096


@dataclass(frozen=True)
class BaseLayout:
    """A base model's layout, built once; the callables read its weights whenever they are asked."""

    base: Base
    linears: Mapping[str, tuple[int, int]]
    """Full module name -> (in_features, out_features) of all linear layers but the output head."""
    hidden_size: int
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    tables: Mapping[str, tuple[int, int]]
    """Full module name -> (tokens, hidden) of the embeddings and the output head, where an adapter
    may bring its own: not of a kind that does more than look up or multiply."""
    weight: Callable[[str], torch.Tensor]
    """Module name -> float32 weight [out, in], dequantised: for DoRA's norms."""
    bias: Callable[[str], torch.Tensor | None]
    """Module name -> float32 bias [out], or None."""
    max_rank: int = MAX_RANK
    """The largest that the engine's slots hold."""
    max_virtual_tokens: int = MAX_VIRTUAL_TOKENS
    """The most that leave room for a prompt."""
    max_table_bytes: float = math.inf
    """The most that an adapter's own output head and embeddings may take, in `itemsize` a value."""
    itemsize: int = 4
    quantization_bit: int | None = None
    """The bits in which the base is loaded; None where its weights are whole."""

    @classmethod
    def of(cls, model: Any, base: Base) -> BaseLayout:
        """Return the layout of a loaded causal model, whether or not the engine has put its slots
        into it.

        Raises ModelError where its layers are Conv1D (GPT-2), whose weights are transposed.
        """
        linears = dict(_linears(model))
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            base=base,
            linears=linears_of(model),
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            tables=_tables(model),
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            weight=lambda name: _weight(name, linears[name]),
            bias=lambda name: _bias(linears[name]),
        )

    def unloaded(self) -> BaseLayout:
        """Returns this layout with placeholder weights, with which an adapter can be checked alone.

        The weights of a model on torch's meta device have no values.
        """
        biased = {name for name in self.linears if self.bias(name) is not None}
        return replace(
            self,
            weight=lambda name: torch.ones(*reversed(self.linears[name])),
            bias=lambda name: torch.zeros(self.linears[name][1]) if name in biased else None,
        )


def linears_of(model: Any) -> dict[str, tuple[int, int]]:
    """Return `BaseLayout.linears` of a model, loaded or not."""
    return {name: (one.in_features, one.out_features) for name, one in _linears(model)}


def _linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and modules of the base's own linear layers, inside the engine's if any."""
    head = model.get_output_embeddings()
    inner = set()
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            raise ModelError(
                f"model.name: '{next(iter(model.config.architectures or ['the model']))}' has "
                f"Conv1D layers ('{name}'), which rayfin's engine does not adapt; serve a model "
                "with linear layers (Llama, Qwen, Mistral, …)"
            )
        if isinstance(module, SlotLinear):
            inner.add(module.base)
            yield name, module.base
        elif isinstance(module, torch.nn.Linear) and module is not head and module not in inner:
            yield name, module


def _tables(model: Any) -> dict[str, tuple[int, int]]:
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if module is embedding and type(module) is torch.nn.Embedding and module.max_norm is None:
            found[name] = (module.num_embeddings, module.embedding_dim)
        # Its weights may be gone by now: int8 has its own.
        plain = type(module) is torch.nn.Linear and getattr(module, "bias", None) is None
        if module is head and plain:
            found[name] = (head.out_features, head.in_features)
    return found


def _weight(name: str, linear: Any) -> torch.Tensor:
    """Return a layer's weight, float32 [out, in]; raises AdapterError for an unknown format."""
    if isinstance(linear, Int8Linear):
        return linear.rounded.dense()[: linear.out_features]
    kind = type(linear.weight).__name__
    if kind == "Params4bit":
        return _dequantize_4bit(linear.weight)
    if kind == "Int8Params":
        return _dequantize_8bit(linear)
    weight: torch.Tensor = linear.weight.detach()
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise AdapterError(
            f"a DoRA adapter needs the weights of '{name}', which this base holds as {kind} of "
            f"{weight.dtype}; serve the base in full precision, 8 or 4 bits"
        )
    return weight.float()


def _dequantize_8bit(linear: Any) -> torch.Tensor:
    from bitsandbytes import functional

    # bitsandbytes moves the scales from the weight to the state at the first call.
    scales = linear.state.SCB if linear.state.SCB is not None else linear.weight.SCB
    weight: torch.Tensor = functional.int8_vectorwise_dequant(linear.weight.data, scales)
    return weight.float()


def _dequantize_4bit(weight: Any) -> torch.Tensor:
    from bitsandbytes import functional

    data, state = unpacked(weight.data, weight.quant_state)
    dequantised: torch.Tensor = functional.dequantize_4bit(data, state)
    return dequantised.float()


def _bias(linear: Any) -> torch.Tensor | None:
    return None if linear.bias is None else linear.bias.detach().float()
