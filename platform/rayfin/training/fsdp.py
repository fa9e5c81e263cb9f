"""PyTorch's FSDP2, which keeps the frozen base (or all, if all is trained) in parts on workers.

An adapter is a percent of the base: it stays whole on every worker, as in DDP, and its gradients
are averaged in one message. Its products are plain ones then, and so every method can run here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rayfin.compat.transformers import layer_classes, mark_sharded
from rayfin.errors import ConfigError
from rayfin.training.optimizer_state import Tensors
from rayfin.training.parallel import ParallelStrategy


class FullyShardedStrategy(ParallelStrategy):
    """PyTorch's FSDP2; see the base class."""

    together = gathers = on_host = True

    def shard(self, model: torch.nn.Module) -> None:
        """Shards the model layer by layer, so that no device ever holds it whole."""
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        adapter = set() if base is model else {p for p in model.parameters() if p.requires_grad}
        own = self.group.own or {}
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.hardware.device, (self.group.size,)),
            "reshard_after_forward": own.get("reshard_after_forward", True),
            "ignored_params": adapter,
        }
        if self.group.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy()
        if base is model and self.precision != "float32":
            # What is trained is float32; products are not.
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=getattr(torch, self.precision), reduce_dtype=torch.float32
            )
        for layer in self._layers(base, own):
            fully_shard(layer, **options)
        fully_shard(model, **options)
        device = torch.device(self.hardware.device)
        for parameter in adapter:
            parameter.data = parameter.data.to(device)
        _move_scales(model, device)
        mark_sharded(base)

    def _layers(self, base: Any, own: Any) -> list[torch.nn.Module]:
        names = own.get("transformer_layer_cls_to_wrap") or layer_classes(base)
        names = {names} if isinstance(names, str) else set(names)
        layers = [m for m in base.modules() if type(m).__name__ in names]
        if not layers:
            raise ConfigError(
                f"scaling.strategy=fsdp: the model has no layer of the classes {sorted(names)}; "
                "name its own as transformer_layer_cls_to_wrap in scaling.strategy_config"
            )
        return layers

    def average_gradients(self, model: torch.nn.Module) -> None:
        plain = [
            p.grad
            for p in model.parameters()
            if p.requires_grad and p.grad is not None and not isinstance(p.grad, DTensor)
        ]
        if not plain:
            return
        flat = torch.cat([gradient.flatten() for gradient in plain])
        dist.all_reduce(flat)
        flat /= self.group.size
        parts = torch.split(flat, [gradient.numel() for gradient in plain])
        for gradient, part in zip(plain, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def weights(self, model: torch.nn.Module) -> Tensors:
        return {
            name: self._assemble(tensor).cpu().contiguous()
            for name, tensor in super().weights(model).items()
        }

    def load_weights(self, model: torch.nn.Module, weights: Tensors) -> None:
        parts = {
            name: self._part(weights[name], parameter)
            for name, parameter in model.named_parameters()
            if name in weights
        }
        super().load_weights(model, weights | parts)

    def _assemble(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _part(self, whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        data: torch.Tensor = parameter.data
        if not isinstance(data, DTensor):
            return super()._part(whole, parameter)
        # Every worker has read the file: nobody need send anybody anything.
        return distribute_tensor(
            whole.to(data.device_mesh.device_type),
            data.device_mesh,
            data.placements,
            src_data_rank=None,
        ).to(data.device)


def _move_scales(model: torch.nn.Module, device: torch.device) -> None:
    """Moves the scales of 4-bit weights, which lie beside the parameter: FSDP leaves them."""
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None and device.type != "cpu":
            state.to(device)
