"""Learning rates to start from, each with its source.

Sources that come up again:

- LoRA Without Regret: Schulman and Thinking Machines Lab 2025, doi 10.64434/tml.20250929, and what
  TRL's documentation takes from it (huggingface.co/docs/trl/lora_without_regret);
- QLoRA: Dettmers et al. 2023, arXiv:2305.14314, and its code (github.com/artidoro/qlora);
- PEFT's guides: huggingface.co/docs/peft, the quicktour, "Prompt-based methods" and "IA3";
- PEFT's comparison: github.com/huggingface/peft, method_comparison/MetaMathQA, where many methods
  train Llama-3.2-3B on one task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_LORA = ((2.0, 5e-4), (20.0, 2e-4), (math.inf, 1e-4))
"""Billions of parameters below which a rate holds.

The last two are QLoRA's: 2e-4 for 7B and 13B, 1e-4 beyond (its README; 20 lies between 13B and the
33B that it tried next). TRL's guide has 2e-4 for a 3B. For small models the one source at hand is
PEFT's quicktour, 1e-3 for Llama-3.2-1B; 5e-4 lies between, a convention and nothing measured.
"""


def lora_rate(model_size_b: float | None = None) -> float:
    """Return LoRA's rate for a model of so many billions of parameters; None means 2 to 20."""
    size = 7.0 if model_size_b is None else model_size_b
    return next(rate for below, rate in _LORA if size < below)


WIDTH_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
"""By which power of its width a family's rate falls, by tinker-cookbook's `get_lr`."""
_OTHER_EXPONENT = 0.43
"""That of other families: the mean of the two, a convention."""
_AT_WIDTH_2000 = 5e-4
_LEAST, _MOST = 1e-4, 1e-3
"""The sources' rates lie between QLoRA's for 33B and PEFT's quicktour's."""


def lora_rate_by_width(hidden_size: float, family: str | None = None) -> float:
    """Return LoRA's rate for a model of a width, a hidden size, and family, such as `llama`.

    It is 5e-4 * (2000 / width) ** exponent: the formula of tinker-cookbook's `get_lr` (Apache-2.0,
    github.com/thinking-machines-lab/tinker-cookbook), whose LoRA's rate is ten times full tuning's
    5e-5. Beyond the sources' range it is their nearest rate.
    """
    exponent = WIDTH_EXPONENTS.get(family or "", _OTHER_EXPONENT)
    rate: float = _AT_WIDTH_2000 * (2000.0 / hidden_size) ** exponent
    return min(max(rate, _LEAST), _MOST)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A method's peak learning rate for AdamW, whatever the rank.

    It is nearly the same for all ranks because the update is scaled by alpha / r (LoRA Without
    Regret). Methods that train few numbers take a larger one, which no source gives by size.
    """

    value: float = 1.0
    """The rate for every size of model, or the share of LoRA's rate where `of_lora`."""
    of_lora: bool = False
    spread: float = 5.0
    """Sources' rates are at most this factor above or below."""
    source: str

    def at(self, model_size_b: float | None = None) -> float:
        """Return the rate for a model of so many billions of parameters; None means 2 to 20."""
        if not self.of_lora:
            return self.value
        # 2e-4 * 0.1 is not 2e-5 to the last digit, and people read this number.
        return float(f"{lora_rate(model_size_b) * self.value:.3g}")
