"""Choose the strategy by which workers train a trial together."""

from __future__ import annotations

from rayfin.config import TrainConfig
from rayfin.hardware import Hardware
from rayfin.training.parallel import ParallelStrategy
from rayfin.training.strategies import WorkerLayout


def parallel_strategy(
    layout: WorkerLayout, hardware: Hardware, train: TrainConfig
) -> ParallelStrategy:
    """Return the strategy that `layout` names, which must not be `auto` any more."""
    if layout.strategy == "fsdp":
        from rayfin.training.fsdp import FullyShardedStrategy

        return FullyShardedStrategy(layout, hardware, train)
    if layout.strategy.startswith("deepspeed"):
        from rayfin.training.zero import ZeroStrategy

        return ZeroStrategy(layout, hardware, train)
    return ParallelStrategy(layout, hardware, train)
