"""The one table of fine-tuning methods: what each trains, supports, and can be served by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class Method:
    """Facts about one method; `config.method.type` is its key in METHODS."""

    title: str
    trains: Literal["weights", "low rank", "scaling", "virtual tokens", "virtual keys and values"]
    quantized_base: bool
    """Can train over a 4-bit or 8-bit base."""
    packing: bool
    """Can train on several samples in one row."""
    gradient_checkpointing: bool
    merging: bool
    """The adapter can be folded into the base model's weights."""
    engines: tuple[Engine, ...]
    """Serving engines that can answer with it."""
    changes_base: bool = False
    """Training writes to the base model's own weights, so the next trial can't have them."""

    @property
    def virtual_tokens(self) -> bool:
        return self.trains.startswith("virtual")


def _low_rank(title: str, *engines: Engine) -> Method:
    return Method(
        title,
        "low rank",
        quantized_base=True,
        packing=True,
        gradient_checkpointing=True,
        merging=True,
        engines=engines,
    )


def _virtual(title: str, trains: Literal["virtual tokens", "virtual keys and values"]) -> Method:
    # A packed row has many samples and would get one prompt; a prefix is a KV cache, which
    # recomputing activations can't carry.
    return Method(
        title,
        trains,
        quantized_base=True,
        packing=False,
        gradient_checkpointing=trains == "virtual tokens",
        merging=False,
        engines=("transformers",),
    )


METHODS: dict[str, Method] = {
    "full": Method(
        "full fine-tuning",
        "weights",
        quantized_base=False,
        packing=True,
        gradient_checkpointing=True,
        merging=False,
        engines=("transformers", "vllm"),
        changes_base=True,
    ),
    "lora": _low_rank("LoRA", "transformers", "vllm"),
    "qlora": _low_rank("QLoRA", "transformers", "vllm"),
    "dora": _low_rank("DoRA", "transformers"),
    "rslora": _low_rank("rank-stabilised LoRA", "transformers", "vllm"),
    "adalora": _low_rank("AdaLoRA", "transformers"),
    "ia3": Method(
        "IA3",
        "scaling",
        quantized_base=True,
        packing=True,
        gradient_checkpointing=True,
        merging=True,
        engines=("transformers",),
    ),
    "p_tuning": _virtual("P-Tuning", "virtual tokens"),
    "prefix_tuning": _virtual("prefix tuning", "virtual keys and values"),
    "prompt_tuning": _virtual("prompt tuning", "virtual tokens"),
}


def methods_that(supports: str) -> str:
    """Names of the methods with a given support, for error messages."""
    return ", ".join(name for name, method in METHODS.items() if getattr(method, supports))
