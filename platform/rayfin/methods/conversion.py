"""Plain LoRA for the base as it was, from an adapter that began with a part of the base's weights.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) train W - s B0 A0 + s B A, where s is the
scale. What is learned is s (B A - B0 A0): an update of twice the rank for W itself.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PARTS = (".lora_A.", ".lora_B.")


def lora_pairs(model: torch.nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Copies of A and B of every layer, by their names in a saved adapter."""
    return {
        name.replace(f".{adapter}.", "."): parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if any(part in name for part in _PARTS)
    }


def convert(directory: Path, began: dict[str, torch.Tensor]) -> None:
    """Rewrites the adapter in `directory`, whose matrices `began` as these."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, settings = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors = load_file(weights)
    for name, first in began.items():
        sign, dim = (1, 0) if ".lora_A." in name else (-1, 1)
        tensors[name] = torch.cat([tensors[name], sign * first], dim).contiguous()
    save_file(tensors, weights, {"format": "pt"})
    config = json.loads(settings.read_text(encoding="utf-8"))
    # The scale is lora_alpha / r, or lora_alpha / sqrt(r), and has to stay.
    factor = math.sqrt(2) if config["use_rslora"] else 2
    config["r"] *= 2
    config["lora_alpha"] *= factor
    config["rank_pattern"] = {name: 2 * r for name, r in config["rank_pattern"].items()}
    config["alpha_pattern"] = {n: factor * alpha for n, alpha in config["alpha_pattern"].items()}
    config["init_lora_weights"] = True
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
