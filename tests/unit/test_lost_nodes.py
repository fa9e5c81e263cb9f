"""A sweep that has lost its nodes says so, waits, and ends."""

from __future__ import annotations

import time

import pytest

from rayfin.errors import HardwareError
from rayfin.tuning import lost_nodes
from rayfin.tuning.lost_nodes import LostNodeWatch


class Scene:
    """A cluster, a clock, and what the user is told."""

    def __init__(self, processes: int = 1, **need: float) -> None:
        self.nodes: list[dict[str, float]] = []
        self.now = 0.0
        self.told: list[str] = []
        self.watch = LostNodeWatch(
            need,
            self.told.append,
            processes=processes,
            living=lambda: self.nodes,
            clock=lambda: self.now,
        )

    def wait(self, seconds: float, *, running: bool = False) -> None:
        for _ in range(int(seconds / 5)):
            self.now += 5
            self.watch.look(running=running)


def test_nodes_too_small_for_a_trial_are_waited_for_and_then_given_up() -> None:
    scene = Scene(CPU=4.0, GPU=0.0)
    scene.nodes = [{"CPU": 2.0}, {"CPU": 2.0}]
    scene.wait(600)
    (told,) = scene.told
    assert "4 CPU on one node" in told and "waiting 20 minutes" in told
    with pytest.raises(HardwareError, match="--resume"):
        scene.wait(620)


def test_a_group_waits_for_the_nodes_of_all_its_workers() -> None:
    """Its trial counts as running all the while: only Ray Train knows that it waits."""
    scene = Scene(2, CPU=4.0)
    scene.nodes = [{"CPU": 4.0}, {"CPU": 4.0}]
    scene.wait(60, running=True)
    assert not scene.told
    del scene.nodes[0]
    scene.wait(60, running=True)
    (told,) = scene.told
    assert "2 times 4 CPU on one node" in told
    with pytest.raises(HardwareError, match="--resume"):
        scene.wait(1200, running=True)


def test_a_node_that_comes_in_time_is_used_and_the_next_loss_waits_anew() -> None:
    scene = Scene(CPU=1.0, GPU=0.5)
    scene.wait(1100)
    scene.nodes = [{"CPU": 8.0, "GPU": 1.0}]
    scene.wait(1100)
    scene.nodes = []
    scene.wait(1100)
    assert len(scene.told) == 2


def test_while_a_trial_runs_nothing_is_missing() -> None:
    scene = Scene(CPU=1.0)
    scene.wait(5000, running=True)
    assert not scene.told


def test_it_ends_by_the_clock_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that loses the node of its trials in the middle of a sweep, as nobody tells it."""
    monkeypatch.setattr(lost_nodes, "_EVERY", 0.01)
    monkeypatch.setattr(lost_nodes, "_PATIENCE", 0.3)
    living = [{"CPU": 4.0}]
    told: list[str] = []
    waiting = LostNodeWatch({"CPU": 4.0}, told.append, living=lambda: living)
    give_up = time.monotonic() + 540

    def sweep() -> None:
        while time.monotonic() < give_up:
            waiting.look()
            time.sleep(0.02)
            living.clear()

    with pytest.raises(HardwareError, match="none came"):
        sweep()
    assert len(told) == 1
