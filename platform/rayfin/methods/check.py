"""Combinations that can't work, refused before anything loads."""

from __future__ import annotations

from rayfin.config import Config
from rayfin.config.method import AdaloraConfig, PromptTuningConfig
from rayfin.errors import MethodError
from rayfin.methods.table import METHODS, methods_that


def check_combination(config: Config) -> None:
    """Raises MethodError, with the reason and what would work, where `config` can't be trained."""
    settings, train = config.method, config.train
    name, method = settings.type, METHODS[settings.type]

    def refuse(what: str, why: str, remedy: str) -> None:
        raise MethodError(f"{what} can't work with method.type={name}: {why}; {remedy}")

    if settings.quantization_bit and not method.quantized_base:
        refuse(
            f"method.quantization_bit={settings.quantization_bit}",
            "quantised weights have no gradient",
            f"use method.quantization_bit=null, or one of {methods_that('quantized_base')}",
        )
    if train.packing and not method.packing:
        refuse(
            "train.packing=true",
            "a row of several samples would share one set of virtual tokens",
            f"use train.packing=false, or one of {methods_that('packing')}",
        )
    if train.gradient_checkpointing and not method.gradient_checkpointing:
        refuse(
            "train.gradient_checkpointing=true",
            "the learned prefix is a key-value cache, which recomputation drops",
            "use train.gradient_checkpointing=false",
        )
    if isinstance(settings, AdaloraConfig):
        if settings.target_r >= settings.init_r:
            refuse(
                f"method.target_r={settings.target_r} with method.init_r={settings.init_r}",
                "there is no budget to take away",
                f"use a target_r below {settings.init_r}",
            )
        if train.max_steps < 4:
            refuse(
                f"train.max_steps={train.max_steps}",
                "the rank budget needs a start, a middle and an end",
                "use at least 4 steps",
            )
    if (
        isinstance(settings, PromptTuningConfig)
        and settings.prompt_tuning_init == "TEXT"
        and not settings.prompt_tuning_init_text
    ):
        refuse(
            "method.prompt_tuning_init=TEXT",
            "no text is given",
            "set method.prompt_tuning_init_text",
        )
    if method.virtual_tokens:
        tokens = getattr(settings, "num_virtual_tokens", 0)
        if tokens >= config.data.max_length:
            refuse(
                f"method.num_virtual_tokens={tokens}",
                f"samples have at most data.max_length={config.data.max_length} tokens",
                "use fewer virtual tokens",
            )
