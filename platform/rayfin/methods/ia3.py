"""IA3: learned factors of inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator, model_validator

from rayfin.methods.base import MethodConfig, register
from rayfin.methods.layers import Linear, block_linears, targets
from rayfin.methods.module_names import Names, is_named, listed
from rayfin.methods.rates import Rate
from rayfin.sizes import Sizes

if TYPE_CHECKING:
    from peft import PeftConfig


@register
class Ia3Config(MethodConfig):
    """Learned rescaling of keys, values and activations (Liu et al. 2022, arXiv:2205.05638)."""

    title = "IA3"
    order = 6
    trains = "scaling"
    quantized_base = True
    packing = True
    gradient_checkpointing = True
    merging = True
    engines = ("transformers",)
    rate = Rate(
        value=5e-3,
        source="the best of 1e-4, 1e-3 and 5e-3 in PEFT's comparison; PEFT's guide has 8e-3 "
        "(mt0-large)",
    )
    coordinates = (0.0, 1.5)
    module_settings = ("target_modules", "feedforward_modules")

    type: Literal["ia3"]
    target_modules: Names | None = None
    """Rescaled modules; null takes PEFT's choice for the architecture."""
    feedforward_modules: Names | None = None
    """Those of target_modules whose input, not output, is rescaled."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_of_its_own(cls, value: object) -> object:
        if value == "all-linear":
            raise ValueError(
                "ia3 can't take 'all-linear', as it has to know which inputs to rescale; leave "
                "target_modules out for PEFT's choice, or give a list of names"
            )
        return value

    @model_validator(mode="after")
    def _feedforward_is_targeted(self) -> Ia3Config:
        beside = sorted(set(self.feedforward_modules or ()) - set(self.target_modules or ()))
        if self.target_modules is not None and beside:
            raise ValueError(
                f"feedforward_modules has '{beside[0]}', which target_modules lacks; "
                "add it there, or leave it out here"
            )
        return self

    def peft_config(self, max_steps: int, tokenizer_path: str) -> PeftConfig:
        import peft

        return peft.IA3Config(
            target_modules=listed(self.target_modules),
            feedforward_modules=listed(self.feedforward_modules),
        )

    def trained_parameters(self, sizes: Sizes) -> int:
        return round(sum(blocks * factors for factors, blocks in self._factors(sizes)))

    def kept_activations(self, sizes: Sizes, *, mixed_precision: bool) -> float:
        return sum(blocks / sizes.num_layers * factors for factors, blocks in self._factors(sizes))

    def _factors(self, sizes: Sizes) -> Iterator[tuple[int, float]]:
        """Yield the number of factors of each kind of layer, and how many blocks have one."""
        names = _pefts_choice(sizes) if self.target_modules is None else self.target_modules
        for name, linear, layers, share in targets(names, sizes):
            factors = linear.inputs if self._scales_inputs(name, linear) else linear.outputs
            yield factors, len(layers) * share

    def _scales_inputs(self, name: str, linear: Linear) -> bool:
        """Return whether the layer is a feed-forward one."""
        forward = self.feedforward_modules
        return (
            linear.reads == "wide"
            if forward is None
            else any(is_named(name, one) for one in forward)
        )


def _pefts_choice(sizes: Sizes) -> tuple[str, ...]:
    """Return the modules by architecture (TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)."""
    names = tuple(block_linears(sizes))
    if "q_proj" not in names:
        return names[0], names[-1]
    if sizes.architecture.startswith("OPT"):
        return "q_proj", "k_proj", names[-1]
    key = "k_proj" if sizes.architecture.startswith(("LlamaFor", "Mistral")) else "q_proj"
    return key, "v_proj", names[-1]
