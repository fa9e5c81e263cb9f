"""First weights of LoRA's matrices that PEFT does not draw: computed once, when a trial starts.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) train W - s B0 A0 + s B A, where s is the
scale and B0 A0 the largest part of W. What is learned is s (B A - B0 A0): an update of twice the
rank for W itself. LoftQ (arXiv:2310.08659) starts from the part of a base that quantisation lost,
EVA (arXiv:2410.07170) from the directions in which the training data's activations vary most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfin.compat.peft import initialize_from_weight
from rayfin.errors import MethodError
from rayfin.methods.attach import ADAPTER, frozen_kept
from rayfin.methods.base import Batches

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_INITIAL = "initial/"
_MOST_BATCHES = 1000
"""Batches after which EVA's directions have settled, if they ever do; PEFT sets no bound."""


def check_rooms(kind: str, linears: Mapping[str, Any], rank_of: Callable[[str], int]) -> None:
    """Raise MethodError for a layer that has fewer such matrices' rows than its rank.

    It is raised for OLoRA and LoftQ of a Conv1D, too, whose weight lies transposed in the file.
    """
    for name, module in linears.items():
        conv1d = type(module).__name__ == "Conv1D"
        # Once it is quantised, bitsandbytes' layer stands in its place, and says of which it was.
        stored = getattr(module, "source_cls", type(module)).__name__
        if stored == "Conv1D" and kind == "loftq":
            raise MethodError(
                f"method.init_lora_weights=loftq: {name!r} is a Conv1D as models like GPT-2 have "
                "them, whose lost part rayfin can't compute; use eva, or leave it out"
            )
        if conv1d and kind == "olora":
            raise MethodError(
                f"method.init_lora_weights=olora: PEFT can't decompose {name!r}, a Conv1D as "
                "models like GPT-2 have them; use pissa, or leave it out"
            )
        if not conv1d and not hasattr(module, "in_features"):
            raise MethodError(
                f"method.init_lora_weights={kind}: {name!r} is no linear layer; leave it out of "
                "method.target_modules, or leave method.init_lora_weights out"
            )
        shape = module.weight.shape if conv1d else (module.in_features, module.out_features)
        most = shape[0] if kind == "eva" else min(shape)
        if (rank := rank_of(name)) > most:
            raise MethodError(
                f"method.init_lora_weights={kind}: rank {rank} is more than the {most} "
                f"{'inputs' if kind == 'eva' else 'rows or columns'} of {name!r}; use a smaller "
                "method.r, or a method.rank_pattern for it"
            )


def take_out_of_base(model: torch.nn.Module, kind: str) -> None:
    """Set A and B of every layer to the largest part of its weight, which loses that part.

    `kind` is `pissa`, `pissa_niter_<iterations>` or `olora`. The matrices are kept with the model,
    for checkpoints and for `plain_lora`.
    """
    initial: dict[str, torch.Tensor] = {}
    for name, layer in _layers(model):
        base = layer.get_base_layer()
        whole = base.weight.data
        base.weight.data = whole.clone()  # PEFT may write to it
        initialize_from_weight(layer, ADAPTER, kind)
        base.weight.data = whole
        for matrix, full_name in _matrices(name, layer):
            matrix.weight.data = matrix.weight.data.float().contiguous()
            initial[full_name] = matrix.weight.detach().cpu().clone()
    subtract(model, initial)


def subtract(model: torch.nn.Module, initial: dict[str, torch.Tensor]) -> None:
    """Take the product of the `initial` matrices out of the base's weights, which are whole."""
    for name, layer in _layers(model):
        weight = layer.get_base_layer().weight
        a, b = (initial[full_name].to(weight.device) for _, full_name in _matrices(name, layer))
        part = layer.scaling[ADAPTER] * (b @ a)
        rest = weight.data.float() - (part.T if layer.fan_in_fan_out else part)
        weight.data = rest.to(weight.dtype)
    model.rayfin_initial = initial  # type: ignore[assignment]


def initial_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint keeps of the matrices that were taken out of the base."""
    kept: Any = getattr(model, "rayfin_initial", {})
    return {f"{_INITIAL}{name}": tensor for name, tensor in kept.items()}


def expect(model: torch.nn.Module) -> None:
    """Mark a model whose base is still whole, and must not be trained so."""
    model.rayfin_initial = {}  # type: ignore[assignment]


def load_initial_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Rebuild the base's weights from the matrices in a checkpoint; does nothing to other models.

    A decomposition that is computed anew may come out otherwise on another processor. Raises
    MethodError for a checkpoint without them.
    """
    if getattr(model, "rayfin_initial", None) != {}:
        return
    found = {
        name.removeprefix(_INITIAL): tensor
        for name, tensor in state.items()
        if name.startswith(_INITIAL)
    }
    if not found:
        raise MethodError(
            "the checkpoint lacks the matrices that were taken out of the base's weights; remove "
            "it, and the trial begins anew"
        )
    subtract(model, found)


def plain_lora(directory: Path, model: torch.nn.Module) -> None:
    """Rewrite the adapter in `directory` as plain LoRA for the base as it was."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    for full_name, first in model.rayfin_initial.items():  # type: ignore[operator,union-attr]
        name = full_name.replace(f".{ADAPTER}.", ".")
        sign, dim = (1, 0) if ".lora_A." in name else (-1, 1)
        tensors[name] = torch.cat([tensors[name], sign * first], dim).contiguous()
    save_file(tensors, weights, {"format": "pt"})
    settings = directory / "adapter_config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    # The scale is lora_alpha / r, or lora_alpha / sqrt(r), and has to stay.
    factor = math.sqrt(2) if config["use_rslora"] else 2
    config["r"] *= 2
    config["lora_alpha"] *= factor
    config["rank_pattern"] = {name: 2 * r for name, r in config["rank_pattern"].items()}
    config["alpha_pattern"] = {n: factor * one for n, one in config["alpha_pattern"].items()}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def lost_by_quantization(model: torch.nn.Module, weights: Path) -> None:
    """Set s B A of every layer to the best approximation of what its 4-bit weight has lost.

    One step of LoftQ's algorithm 1, with the weights as they are quantised already. `weights` is
    the directory of the base's own weights in safetensors. PEFT's function for this needs CUDA, and
    leaves the scale s out.
    """
    import torch

    whole = _reader(weights)
    for name, layer in _layers(model):
        module, base = name.removeprefix(_PREFIX), layer.get_base_layer()
        # What the layer computes says what its weight is, whatever bitsandbytes made of it.
        identity = torch.eye(base.in_features, device=base.weight.device)
        with torch.no_grad():
            quantised = (base(identity).float() - base(torch.zeros_like(identity[:1])).float()).T
        tensor = whole(f"{module}.weight")
        if tensor is None or tensor.shape != quantised.shape:
            raise MethodError(
                f"method.init_lora_weights=loftq: no safetensors file in '{weights}' has the whole "
                f"weight of {module!r}, by which to tell what 4 bits lost; use a base that is "
                "saved as safetensors and isn't quantised there, or leave it out"
            )
        lost = tensor.to(quantised.device, torch.float32) - quantised
        u, s, v = torch.linalg.svd(lost, full_matrices=False)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        rank, root = len(a), (s / layer.scaling[ADAPTER]).sqrt()
        a.data = (root[:rank, None] * v[:rank]).contiguous()
        b.data = (u[:, :rank] * root[:rank]).contiguous()


def explain_variance(model: torch.nn.Module, rank: int, batches: Batches) -> None:
    """Set A of every layer to the directions in which its inputs vary most, by PEFT's EVA."""
    import peft
    import torch

    # As every rank is the same, EVA has none to move between layers (rho = 1).
    config = peft.LoraConfig(r=rank, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))

    def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
        model(**{key: batch[key] for key in ("input_ids", "attention_mask")}, use_cache=False)

    with frozen_kept(model):  # PEFT takes the adapter off, and puts it on again
        found = peft.get_eva_state_dict(
            model,
            _Bounded(batches, rank),
            config,
            forward_fn=forward,
            adapter_name=ADAPTER,
            gather_distributed_inputs=False,  # every worker has the same batches
            show_progress_bar=False,
        )
    with torch.no_grad():
        for name, directions in found.items():
            model.get_submodule(name).lora_A[ADAPTER].weight.copy_(directions)  # type: ignore[index,union-attr]


class _Bounded:
    """Batches for PEFT's EVA, which goes on until all directions have settled."""

    def __init__(self, batches: Batches, rank: int) -> None:
        self._batches, self._rank = batches, rank

    def __len__(self) -> int:
        return _MOST_BATCHES

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # PEFT passes over a batch of fewer tokens than directions; with more, it takes fewer.
        batches = self._batches(4 * self._rank)
        for _ in range(_MOST_BATCHES):
            yield next(batches)
        raise MethodError(
            f"method.init_lora_weights=eva: the directions of the activations have not settled "
            f"after {_MOST_BATCHES} batches; use a smaller method.r, or leave it out"
        )


def _layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Return names and modules of the layers that have an update."""
    return [(n, m) for n, m in model.named_modules() if ADAPTER in getattr(m, "lora_A", ())]


def _matrices(name: str, layer: Any) -> Iterator[tuple[Any, str]]:
    """Yield A and B of a layer, each with the name of its parameter."""
    for matrix in ("lora_A", "lora_B"):
        yield getattr(layer, matrix)[ADAPTER], f"{name}.{matrix}.{ADAPTER}.weight"


def _reader(directory: Path) -> Callable[[str], torch.Tensor | None]:
    """Return what reads a tensor of a model's safetensors files by its name, or its name's end."""
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> torch.Tensor | None:
        # A checkpoint of the model without its head lacks the first part of the names.
        known = next((n for n in (name, name.partition(".")[2]) if n in files), None)
        if known is None:
            return None
        with safe_open(files[known], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(known)
        return tensor

    return read
